"""Stages `masks` and `truth_masks`: seeds expanded to pseudo-masks (step 2, expansion)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wsss_core.config import Config, ExpansionConfig
from wsss_core.data.images import photo_size, read_mask, read_photo, write_mask
from wsss_core.data.truth import TruthMasks
from wsss_core.errors import DataError, InputError
from wsss_core.expansion.crf import hard_unary, labels_of, refine, soft_unary
from wsss_core.records import IGNORE_INDEX, Manifest, TaggedPhoto
from wsss_core.seeds.cam import label_map, read_cam, upsample_cam
from wsss_core.stages.shards import split_shards
from wsss_core.stages.stage import Job, Stage
from wsss_core.store import Content, Measured
from wsss_core.workers import map_shards


def _write(out: Path, job: Job, *, data: Manifest, cams: Manifest | None) -> Measured:
    settings: ExpansionConfig = job.settings["expansion"]
    dataset = job.work.dataset(data)
    photos = dataset.splits["train"]
    content: Content | None = job.settings["folder"]
    if content is not None:
        return _adopt(out, job, photos, content.folder, num_labels=len(dataset.classes) + 1)
    if cams is None:
        raise InputError("there are no CAMs to expand; make them, or set expansion.folder")
    shard = functools.partial(
        _write_shard,
        cams=job.work.folder(cams),
        out=out,
        settings=settings,
        threshold=job.settings["threshold"],
    )
    failed = sum(
        map_shards(
            shard,
            split_shards(photos),
            workers=job.work.runtime.workers,
            recorder=job.work.recorder,
            what="masks",
        )
    )
    if failed:
        job.work.recorder.note(f"the CRF failed on {failed} photos; their masks are their seeds")
    return Measured({"expansion/fallbacks": float(failed)})


def _write_shard(
    photos: Sequence[TaggedPhoto],
    *,
    cams: Path,
    out: Path,
    settings: ExpansionConfig,
    threshold: float,
) -> int:
    """Expand the seeds of a shard; returns on how many photos the CRF failed."""
    failed = 0
    for photo in photos:
        cam = read_cam(cams / f"{photo.id}.npz")
        scores = upsample_cam(cam.cam, cam.size)
        mask = label_map(scores, cam.classes, threshold=threshold)
        if settings.method == "crf":
            pixels = read_photo(photo.path)
            try:
                mask = _refine(pixels, scores, cam.classes, settings, threshold)
            except (RuntimeError, ValueError, MemoryError):
                failed += 1
        write_mask(out / f"{photo.id}.png", mask)
    return failed


def _refine(
    pixels: np.ndarray,
    scores: np.ndarray,
    classes: np.ndarray,
    settings: ExpansionConfig,
    threshold: float,
) -> np.ndarray:
    unary = (
        soft_unary(scores, threshold=threshold)
        if settings.unary == "soft"
        else hard_unary(scores, threshold=threshold, confidence=settings.hard_confidence)
    )
    return labels_of(refine(pixels, unary, settings.crf), classes)


def _adopt(
    out: Path, job: Job, photos: Sequence[TaggedPhoto], folder: Path, *, num_labels: int
) -> Measured:
    """Anybody's masks, checked for size and labels."""
    for done, photo in enumerate(photos, start=1):
        path = folder / f"{photo.id}.png"
        mask = read_mask(path)
        if mask.shape != photo_size(photo.path):
            raise DataError(
                f"{path} is {mask.shape}, its photo {photo_size(photo.path)}; sizes must agree"
            )
        stray = mask[(mask >= num_labels) & (mask != IGNORE_INDEX)]
        if stray.size:
            raise DataError(
                f"{path} holds label {stray[0]}; expected 0..{num_labels - 1} or {IGNORE_INDEX}"
            )
        write_mask(out / f"{photo.id}.png", mask)
        job.work.recorder.progress("masks from folder", done, len(photos))
    return Measured()


def _write_truth(out: Path, job: Job, *, data: Manifest, truth: Manifest) -> Measured:
    dataset = job.work.dataset(data)
    masks = TruthMasks.of(job.work.data_root(data))
    photos = dataset.splits["train"]
    for done, photo in enumerate(photos, start=1):
        mask = masks.read(photo.id, photo_size(photo.path), num_classes=len(dataset.classes))
        write_mask(out / f"{photo.id}.png", mask)
        job.work.recorder.progress("true masks", done, len(photos))
    return Measured()


def _settings(config: Config) -> dict[str, Any]:
    expansion = config.expansion
    return {
        "expansion": expansion.model_copy(update={"folder": None}),
        "threshold": config.seeds.threshold,
        "folder": None if expansion.folder is None else Content(expansion.folder),
    }


expand_masks = Stage("masks", _write, _settings)
truth_masks = Stage("truth_masks", _write_truth, lambda config: {})
