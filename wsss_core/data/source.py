"""One door to a person's data: the layout is told apart here and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from wsss_core.config import DataConfig
from wsss_core.data.labels import TRAIN, Fault, refuse
from wsss_core.data.photos import read_photos
from wsss_core.data.voc import find_devkit, read_voc
from wsss_core.observe import Recorder
from wsss_core.records import Dataset


def read_source(config: DataConfig, root: Path, recorder: Recorder) -> Dataset:
    """The photos, tags and splits below `root`, each split cut to its first `config.limit` ids.

    Every photo exists and has a row of tags, with at least one tag in the split `train`, which is
    never empty. No picture is opened.

    Args:
        config: `source` is `voc` or `photos`; scenes make their own data.
        root: The folder of the data.
        recorder: Hears of long passes, and of photos that both train and score.

    Raises:
        DataError: At the first fault; one line that names file, line, value and next step.
    """
    dataset = gather_source(config, root, recorder, fault=refuse)
    for warning in find_overlaps(dataset):
        recorder.note(warning)
    return dataset


def gather_source(config: DataConfig, root: Path, recorder: Recorder, *, fault: Fault) -> Dataset:
    """What `read_source` gives, with every fault handed to `fault`; what is faulty is left out."""
    if not root.is_dir() and not config.download:
        fault(f"{root} is not a folder; give the folder of the photos with --data DIR")
        return Dataset((), {TRAIN: ()})
    if TRAIN in config.val:
        fault("data.val names 'train', the split that trains; score it under another list's name")
    if config.source == "voc":
        dataset = read_voc(config, root, recorder, fault=fault)
    elif config.source == "photos":
        dataset = read_photos(config, root, fault=fault)
    else:
        raise ValueError(f"source is {config.source!r}; scenes are made, not read")
    if not dataset.splits[TRAIN]:
        fault(f"{root} holds no photo to train on; look at the list {config.train!r}")
    cut = {name: photos[: config.limit] for name, photos in dataset.splits.items()}
    return Dataset(dataset.classes, cut)


def detect_source(root: Path) -> Literal["voc", "photos"]:
    """`voc` if there is a JPEGImages folder at `root` or in the devkit below it, else `photos`."""
    return "photos" if find_devkit(root) is None else "voc"


def find_overlaps(dataset: Dataset) -> list[str]:
    """One line for each val split that shares photos with `train`."""
    trained = {photo.id for photo in dataset.splits[TRAIN]}
    shared = {
        name: [photo.id for photo in photos if photo.id in trained]
        for name, photos in dataset.splits.items()
        if name != TRAIN
    }
    return [
        f"{len(ids)} photos of {name!r} are also trained on (first: {ids[0]!r}); its scores are "
        "not those of unseen photos"
        for name, ids in shared.items()
        if ids
    ]
