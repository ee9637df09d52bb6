"""`dataset.json`: what a data set holds, by content and not by place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wsss_core.data.document import INDEX_FILE
from wsss_core.data.images import photo_size
from wsss_core.data.labels import TRAIN
from wsss_core.errors import DataError
from wsss_core.observe import Recorder
from wsss_core.records import Dataset, TaggedPhoto
from wsss_core.store import file_sha256


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


def index_dataset(
    dataset: Dataset, root: Path, recorder: Recorder, *, long_side_px: int | None = None
) -> bytes:
    """The text of `dataset.json`: classes, photos with tags and a hash of their bytes, splits.

    The same photos, tags and splits give the same text wherever `root` is.

    Args:
        dataset: The photos.
        root: Folder that their files are below.
        recorder: Hears of the progress.
        long_side_px: Of photos with a longer side, `size` and `seen_size` are written down too.
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
                **_shrink(photo.path, long_side_px),
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
    return _encode(document)


def keep_training(text: str) -> bytes:
    """A `dataset.json` with its training list alone."""
    document = json.loads(text)
    trained = document["splits"][TRAIN]
    known = set(trained)
    photos = [entry for entry in document["photos"] if entry["id"] in known]
    return _encode(document | {"photos": photos, "splits": {TRAIN: trained}})


def _encode(document: dict[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, indent=1).encode() + b"\n"


def write_index(folder: Path, dataset: Dataset, root: Path, recorder: Recorder) -> None:
    """Write `dataset.json` into `folder`."""
    (folder / INDEX_FILE).write_bytes(index_dataset(dataset, root, recorder))


def _shrink(path: Path, long_side_px: int | None) -> dict[str, tuple[int, int]]:
    """(height, width) of a photo that is larger than it may be seen, and how large it is seen."""
    if long_side_px is None:
        return {}
    try:
        height, width = photo_size(path)
    except DataError:  # named when the photos are opened, with all others that are broken
        return {}
    ratio = long_side_px / max(height, width)
    seen = (max(1, round(height * ratio)), max(1, round(width * ratio)))
    return {} if ratio >= 1 else {"size": (height, width), "seen_size": seen}


def unique_photos(dataset: Dataset) -> list[TaggedPhoto]:
    """The photos of all splits, each once, sorted by id."""
    photos = {photo.id: photo for split in dataset.splits.values() for photo in split}
    return [photos[name] for name in sorted(photos)]
