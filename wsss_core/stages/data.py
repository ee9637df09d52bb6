"""The first artifacts of a run: which photos, tags and masks there are, by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from wsss_core.config import Config
from wsss_core.data.document import INDEX_FILE
from wsss_core.data.images import read_photo
from wsss_core.data.index import hash_file, index_dataset, keep_training, unique_photos
from wsss_core.data.source import read_source
from wsss_core.data.truth import TruthMasks
from wsss_core.errors import DataError, InputError
from wsss_core.records import Manifest, TaggedPhoto
from wsss_core.stages.stage import Workspace
from wsss_core.store import Measured

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
            f"source {config.data.source!r} needs the folder of its photos; give it with "
            "--data DIR (data.root)"
        )
    dataset = read_source(config.data, root, work.recorder)
    photos = unique_photos(dataset)

    def verify() -> None:
        _open_all(photos, lambda photo: read_photo(photo.path), "photos", root, work)

    content = index_dataset(dataset, root, work.recorder, long_side_px=config.data.long_side_px)
    return _publish(work, "dataset", INDEX_FILE, content, verify)


def training_part(data: Manifest, work: Workspace) -> Manifest:
    """The manifest of the training photos of `data` alone, where that is not the same.

    What is learned takes this one, so that it does not hang on which photos are scored. Scenes are
    made with all their lists and stay whole.
    """
    if data.stage != "dataset":
        return data
    content = keep_training((work.folder(data) / INDEX_FILE).read_text())
    return _publish(work, "dataset", INDEX_FILE, content, verify=lambda: None)  # `data` was


def index_truth(config: Config, work: Workspace, *, data: Manifest) -> Manifest | None:
    """The manifest of the masks of `data`: `truth.json`; None without any.

    Keyed by its content and that of the data: each mask is opened once for the photos and classes
    that it has to fit, so that a faulty one is named before anything is trained.

    Raises:
        DataError: For a mask that is broken, or does not fit its photo or the classes; one line.
    """
    masks, dataset = TruthMasks.of(work.data_root(data)), work.dataset(data)
    photos = unique_photos(dataset)
    digests = {}
    for done, photo in enumerate(photos, start=1):
        path = masks.path(photo.id)
        if path is not None:
            digests[photo.id] = hash_file(path)
        work.recorder.progress("hashing masks", done, len(photos))
    if not digests:
        return None

    def verify() -> None:
        known = [photo for photo in photos if photo.id in digests]
        size = len(dataset.classes)
        _open_all(
            known,
            lambda photo: masks.read(photo, num_classes=size),
            "masks",
            work.data_root(data),
            work,
        )

    content = json.dumps(digests, indent=1).encode() + b"\n"
    return _publish(work, "truth", TRUTH_FILE, content, verify, beside=data.digest)


def find_scored(work: Workspace, data: Manifest, truth: Manifest) -> frozenset[str]:
    """The splits of which at least one photo has a true mask."""
    known = json.loads((work.folder(truth) / TRUTH_FILE).read_text())
    splits = work.dataset(data).splits.items()
    return frozenset(name for name, photos in splits if any(p.id in known for p in photos))


def _publish(
    work: Workspace,
    stage: str,
    file: str,
    content: bytes,
    verify: Callable[[], None],
    *,
    beside: str = "",
) -> Manifest:
    key = hashlib.sha256(content + beside.encode()).hexdigest()[:24]
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


def _open_all(
    photos: Sequence[TaggedPhoto],
    read: Callable[[TaggedPhoto], object],
    what: str,
    root: Path,
    work: Workspace,
) -> None:
    broken = []
    for done, photo in enumerate(photos, start=1):
        try:
            read(photo)
        except DataError as error:
            broken.append(str(error))
        work.recorder.progress(f"opening {what}", done, len(photos))
    if len(broken) > 1:
        raise DataError(
            f"{broken[0]} (the first of {len(broken)} broken {what}: `conta data check {root}` "
            "names all)"
        )
    if broken:
        raise DataError(broken[0])
