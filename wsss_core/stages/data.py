"""The first artifacts of a run: which photos, tags and masks there are, by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from wsss_core.config import Config
from wsss_core.data.images import read_photo
from wsss_core.data.index import INDEX_FILE, index_dataset, unique_photos
from wsss_core.data.source import read_source
from wsss_core.data.truth import TruthMasks
from wsss_core.errors import DataError, InputError
from wsss_core.records import Manifest, TaggedPhoto
from wsss_core.stages.stage import Workspace
from wsss_core.store import Measured, file_sha256

TRUTH_FILE = "truth.json"


def index_data(config: Config, work: Workspace) -> Manifest:
    """The manifest of the photos below `work.photos_root`: `dataset.json`, keyed by its content.

    Every photo is hashed on every call, so a photo or tag that changed is seen; each is decoded
    once, when the data set is new, so that a broken one is named before anything is trained.

    Raises:
        DataError: For a fault of the data; one line.
        InputError: If the recipe needs a folder and none was given.
    """
    root = work.photos_root
    if root is None:
        raise InputError(
            f"source {config.data.source!r} needs the folder of its photos; give it with --data DIR"
        )
    dataset = read_source(config.data, root, work.recorder)
    photos = unique_photos(dataset)

    def verify() -> None:
        _decode_all(photos, root, work)

    return _publish(
        work, "dataset", INDEX_FILE, index_dataset(dataset, root, work.recorder), verify
    )


def index_truth(config: Config, work: Workspace, *, data: Manifest) -> Manifest | None:
    """The manifest of the masks of `data`: `truth.json`, keyed by its content; None without any."""
    masks = TruthMasks.of(work.data_root(data))
    photos = unique_photos(work.dataset(data))
    digests = {}
    for done, photo in enumerate(photos, start=1):
        path = masks.path(photo.id)
        if path is not None:
            digests[photo.id] = file_sha256(path)
        work.recorder.progress("hashing masks", done, len(photos))
    if not digests:
        return None
    return _publish(work, "truth", TRUTH_FILE, json.dumps(digests, indent=1).encode() + b"\n")


def _publish(
    work: Workspace,
    stage: str,
    file: str,
    content: bytes,
    verify: Callable[[], None] = lambda: None,
) -> Manifest:
    key = hashlib.sha256(content).hexdigest()[:24]
    found, problem = work.store.find(stage, key)
    if found is not None:
        return found
    if problem is not None:
        work.recorder.note(f"rebuilt {stage}: {problem}")

    def write(out: Path) -> Measured:
        verify()
        (out / file).write_bytes(content)
        return Measured()

    return work.store.publish(stage, key, write)


def _decode_all(photos: list[TaggedPhoto], root: Path, work: Workspace) -> None:
    broken = []
    for done, photo in enumerate(photos, start=1):
        try:
            read_photo(photo.path)
        except DataError as error:
            broken.append(str(error))
        work.recorder.progress("opening photos", done, len(photos))
    if len(broken) > 1:
        raise DataError(
            f"{broken[0]} (the first of {len(broken)} broken photos: `conta data check {root}` "
            "names all)"
        )
    if broken:
        raise DataError(broken[0])
