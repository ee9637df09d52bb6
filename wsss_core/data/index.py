"""`dataset.json`: what a data set holds, by content and not by place."""

from __future__ import annotations

import json
from pathlib import Path

from wsss_core.errors import DataError
from wsss_core.observe import Recorder
from wsss_core.records import Dataset, TaggedPhoto
from wsss_core.store import file_sha256

INDEX_FILE = "dataset.json"


def hash_file(path: Path) -> str:
    """`file_sha256` of a photo or mask of the user's.

    Raises:
        DataError: If it cannot be read.
    """
    try:
        return file_sha256(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); check it and its permissions"
        ) from error


def index_dataset(dataset: Dataset, root: Path, recorder: Recorder) -> bytes:
    """The text of `dataset.json`: classes, photos with tags and a hash of their bytes, splits.

    The same photos, tags and splits give the same text wherever `root` is.
    """
    photos = unique_photos(dataset)
    entries = []
    for done, photo in enumerate(photos, start=1):
        entries.append(
            {
                "id": photo.id,
                "file": photo.path.relative_to(root).as_posix(),
                "sha256": hash_file(photo.path),
                "tags": list(photo.tags),
            }
        )
        recorder.progress("hashing photos", done, len(photos))
    document = {
        "classes": list(dataset.classes),
        "photos": entries,
        "splits": {
            name: [photo.id for photo in split] for name, split in sorted(dataset.splits.items())
        },
    }
    return json.dumps(document, ensure_ascii=False, indent=1).encode() + b"\n"


def write_index(folder: Path, dataset: Dataset, root: Path, recorder: Recorder) -> None:
    """Write `dataset.json` into `folder`."""
    (folder / INDEX_FILE).write_bytes(index_dataset(dataset, root, recorder))


def unique_photos(dataset: Dataset) -> list[TaggedPhoto]:
    """The photos of all splits, each once, sorted by id."""
    photos = {photo.id: photo for split in dataset.splits.values() for photo in split}
    return [photos[name] for name in sorted(photos)]
