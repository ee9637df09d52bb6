"""Stages `score_cams`, `score_masks`, `score_segmenter`, `check_tags`: what masks are worth.

The first three compare with pixel truth and hold `report.json` (an `evaluation.report.Report`);
photos without a true mask are left out and counted. `check_tags` needs no truth. Nothing here feeds
a later stage.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64, UInt8
from pydantic import BaseModel

from wsss_core.config import Config, SegmenterTestConfig
from wsss_core.data.images import read_mask
from wsss_core.data.labels import BACKGROUND, read_labels
from wsss_core.data.truth import TruthMasks
from wsss_core.errors import DataError
from wsss_core.evaluation.agreement import compare_tags, find_classes
from wsss_core.evaluation.confusion import confusion_matrix, mean_iou
from wsss_core.evaluation.report import Report, build_report, core_labels, flat_metrics, optional
from wsss_core.evaluation.threshold import (
    THRESHOLDS,
    build_curve,
    confusion_by_threshold,
    count_scores,
)
from wsss_core.observe import Recorder, SilentRecorder
from wsss_core.records import Manifest, TaggedPhoto
from wsss_core.seeds.cam import Cam, read_cam, upsample_cam
from wsss_core.stages.data import TRUTH_FILE
from wsss_core.stages.stage import Job, Stage
from wsss_core.store import Measured

REPORT, CURVE = "report.json", "curve.json"
_NAMED = 5  # files a message names before it only counts


def score_folder(
    masks: Path, truth: Path, labels: Path, *, recorder: Recorder | None = None
) -> Report:
    """Score the mask PNGs of a folder against those of the same name in another.

    Args:
        masks: Folder of masks, of any origin.
        truth: Folder of true masks; 255 is not counted.
        labels: Text file, one class a line, background first.
        recorder: Hears of the progress and of files without a partner, which are not scored.

    Raises:
        DataError: If no name is in both folders, or a file is broken, of the wrong size or of other
            labels.
    """
    recorder = recorder or SilentRecorder()
    names = (BACKGROUND, *read_labels(labels))
    ours, true = _masks_below(masks), _masks_below(truth)
    both = sorted(ours.keys() & true.keys())
    if not both:
        raise DataError(
            f"no PNG in {masks} has the name of one in {truth}; masks are matched by file name"
        )
    alone = sorted(ours.keys() - true.keys())
    missing = sorted(true.keys() - ours.keys())
    _note_unpaired(recorder, alone, f"in {masks} have no truth")
    _note_unpaired(recorder, missing, f"in {truth} have no mask")
    total = np.zeros((len(names), len(names)), np.int64)
    for done, name in enumerate(both, 1):
        total += confusion_matrix(
            read_mask(ours[name]), read_mask(true[name]), num_classes=len(names), name=name
        )
        recorder.progress("score masks", done, len(both))
    return build_report(total, names=names, split=masks.name, photos=len(both), unscored=len(alone))


def _write_cams(
    out: Path, job: Job, *, data: Manifest, truth: Manifest | None, cams: Manifest
) -> Measured:
    threshold: float = job.settings["threshold"]
    thresholds = np.union1d(THRESHOLDS, [threshold])
    exam = _Exam(job, data=data, truth=truth, split="train")
    folder = job.work.folder(cams)

    def count(photo: TaggedPhoto, true: np.ndarray) -> np.ndarray:
        cam = read_cam(folder / f"{photo.id}.npz")
        score, best = best_scores(cam)
        return count_scores(
            score,
            best,
            true,
            thresholds=thresholds,
            num_classes=len(exam.names),
            name=photo.id,
        )

    confusions = confusion_by_threshold(exam.sum_counts("score cams", count))
    report = exam.report(
        confusions[np.searchsorted(thresholds, threshold)], settings=f"threshold {threshold:g}"
    )
    curve = build_curve(confusions, thresholds=thresholds)
    _write_json(out / REPORT, report)
    _write_json(out / CURVE, curve)
    oracle = {"miou_oracle": curve.miou_oracle, "threshold_oracle": curve.threshold_oracle}
    return Measured(report.metrics("cam") | flat_metrics(oracle, prefix="cam"))


def best_scores(
    cam: Cam,
) -> tuple[Float32[np.ndarray, "h w"], Int64[np.ndarray, "h w"]]:
    """Score and mask label of each pixel's best class, at the photo's full size; 0 if none."""
    if not len(cam.classes):
        return np.zeros(cam.size, np.float32), np.zeros(cam.size, np.int64)
    scores = upsample_cam(cam.cam, cam.size)
    return scores.max(axis=0), cam.classes[scores.argmax(axis=0)] + 1


def _write_masks(
    out: Path, job: Job, *, data: Manifest, truth: Manifest | None, masks: Manifest
) -> Measured:
    report = _score_pngs(job, masks, data=data, truth=truth, split="train", settings="")
    _write_json(out / REPORT, report)
    return Measured(report.metrics("pseudo"))


def _write_segmenter(
    out: Path,
    job: Job,
    *,
    data: Manifest,
    truth: Manifest | None,
    predictions: Manifest,
    split: str,
) -> Measured:
    test = job.settings["test"] if predictions.stage == "test" else SegmenterTestConfig()
    report = _score_pngs(
        job, predictions, data=data, truth=truth, split=split, settings=describe_test(test)
    )
    _write_json(out / REPORT, report)
    return Measured(report.metrics(f"seg_{split}"))


def describe_test(test: SegmenterTestConfig) -> str:
    """How a segmenter was scored, for the table: `scale 1, flip, no CRF`."""
    scales = " ".join(f"{scale:g}" for scale in test.scales)
    flip, crf = ("flip" if test.flip else "no flip"), ("CRF" if test.crf else "no CRF")
    return f"scale{'s' if len(test.scales) > 1 else ''} {scales}, {flip}, {crf}"


def _write_agreement(
    out: Path, job: Job, *, data: Manifest, predictions: Manifest, before: Manifest | None = None
) -> Measured:
    dataset = job.work.dataset(data)
    photos, num_classes = dataset.splits["train"], len(dataset.classes) + 1
    found = np.zeros((len(photos), len(dataset.classes)), bool)
    tagged = np.zeros_like(found)
    changes = np.zeros((num_classes, num_classes), np.int64)
    for row, photo in enumerate(photos):
        mask = read_mask(job.work.folder(predictions) / f"{photo.id}.png")
        found[row] = find_classes(mask, num_classes=num_classes)
        tagged[row, list(photo.tags)] = True
        if before is not None:
            last = read_mask(job.work.folder(before) / f"{photo.id}.png")
            changes += confusion_matrix(mask, last, num_classes=num_classes, name=photo.id)
        job.work.recorder.progress("check tags", row + 1, len(photos))
    report = compare_tags(
        found,
        tagged,
        classes=dataset.classes,
        stability=None if before is None else optional(mean_iou(changes)),
    )
    _write_json(out / REPORT, report)
    return Measured(report.metrics())


@dataclass(frozen=True)
class IndexedTruth:
    """The true masks that `truth.json` names; a later file changes nothing.

    Attributes:
        ids: Photos with a true mask.
        masks: Where they are.
        num_classes: Number of foreground classes.
    """

    ids: frozenset[str]
    masks: TruthMasks
    num_classes: int

    def read(self, photo: TaggedPhoto) -> UInt8[np.ndarray, "h w"]:
        """The true mask of a photo, at the size the photo is seen at.

        Raises:
            DataError: If it is gone, broken, of another size than the photo or of other labels.
        """
        return self.masks.read(photo, num_classes=self.num_classes)


def open_truth(job: Job, *, data: Manifest, truth: Manifest | None) -> IndexedTruth:
    """The truth behind a manifest; no photo has any without one."""
    index = {} if truth is None else json.loads((job.work.folder(truth) / TRUTH_FILE).read_text())
    masks = TruthMasks.of(job.work.data_root(data))
    return IndexedTruth(frozenset(index), masks, len(job.work.dataset(data).classes))


class _Exam:
    """One comparison with truth: which photos can be scored, and what the report must say.

    Attributes:
        names: Name of each mask label, background first.
        photos: Photos of the split that have a true mask.
    """

    def __init__(self, job: Job, *, data: Manifest, truth: Manifest | None, split: str) -> None:
        dataset = job.work.dataset(data)
        if split not in dataset.splits:
            raise DataError(f"no split {split!r} in this data; it has {', '.join(dataset.splits)}")
        self.names = (BACKGROUND, *dataset.classes)
        self.core = core_labels(job.settings["core_classes"], names=self.names)
        self.truth = open_truth(job, data=data, truth=truth)
        self.photos = [photo for photo in dataset.splits[split] if photo.id in self.truth.ids]
        self.unscored = len(dataset.splits[split]) - len(self.photos)
        if not self.photos:
            raise DataError(
                f"no photo of split {split!r} has a true mask; add masks, or go by tag agreement"
            )
        self.job, self.split = job, split

    def sum_counts(
        self, what: str, count: Callable[[TaggedPhoto, np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """Sum of `count(photo, true mask)` over the photos."""
        total: Any = 0
        for done, photo in enumerate(self.photos, 1):
            total = total + count(photo, self.truth.read(photo))
            self.job.work.recorder.progress(what, done, len(self.photos))
        return total

    def report(self, confusion: Int64[np.ndarray, "k k"], *, settings: str) -> Report:
        """The report of the counts."""
        return build_report(
            confusion,
            names=self.names,
            split=self.split,
            photos=len(self.photos),
            unscored=self.unscored,
            supervision="tags" if self.job.settings["supervision"] == "tags" else "uses truth",
            settings=settings,
            core=self.core,
        )


def _score_pngs(
    job: Job,
    masks: Manifest,
    *,
    data: Manifest,
    truth: Manifest | None,
    split: str,
    settings: str,
) -> Report:
    exam = _Exam(job, data=data, truth=truth, split=split)
    folder = job.work.folder(masks)

    def count(photo: TaggedPhoto, true: np.ndarray) -> np.ndarray:
        mask = read_mask(folder / f"{photo.id}.png")
        return confusion_matrix(mask, true, num_classes=len(exam.names), name=photo.id)

    confusion = exam.sum_counts(f"score {masks.stage} of {split}", count)
    return exam.report(confusion, settings=settings)


def _write_json(path: Path, document: BaseModel) -> None:
    path.write_text(document.model_dump_json(indent=1) + "\n")


def _masks_below(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; give the folder that holds the mask PNGs")
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.png")
    }


def _note_unpaired(recorder: Recorder, names: Sequence[str], what: str) -> None:
    if names:
        shown = ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
        recorder.note(f"{len(names)} masks {what} and are not scored: {shown}")


def _table_settings(config: Config) -> dict[str, Any]:
    return {
        "core_classes": config.data.core_classes,
        "supervision": config.supervision,
    }


score_cams = Stage(
    "score_cams", _write_cams, lambda c: _table_settings(c) | {"threshold": c.seeds.threshold}
)
score_masks = Stage("score_masks", _write_masks, _table_settings)
score_segmenter = Stage(
    "score_segmenter", _write_segmenter, lambda c: _table_settings(c) | {"test": c.segmenter_test}
)
check_tags = Stage("check_tags", _write_agreement, lambda c: {})
