"""Stage `boundary_labels`: confident labels of the training photos, for the boundary network."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wsss_core.data.images import read_pixels, write_mask
from wsss_core.errors import InputError
from wsss_core.expansion.boundary_labels import choose_settings, label_confidently
from wsss_core.expansion.crf import FAILURES
from wsss_core.records import IGNORE_INDEX, Manifest, TaggedPhoto
from wsss_core.seeds.cam import read_cam, upsample_cam
from wsss_core.stages.resume import write_shards
from wsss_core.stages.shards import naming
from wsss_core.stages.stage import Job, Stage
from wsss_core.store import Measured


def _write(out: Path, job: Job, *, data: Manifest, cams: Manifest | None) -> Measured:
    if cams is None:
        raise InputError("there are no CAMs to label boundaries with; make them first")
    rows = write_shards(
        functools.partial(_write_shard, cams=job.work.folder(cams), settings=job.settings),
        job.work.dataset(data).splits["train"],
        out=out,
        job=job,
        what="boundary labels",
    )
    failed, unsure, pixels = (int(total) for total in np.sum(rows, axis=0))
    if failed:
        job.work.recorder.note(f"the CRF failed on {failed} photos; they teach no boundary")
    return Measured(
        {"boundary_labels/fallbacks": float(failed), "boundary_labels/unsure": unsure / pixels}
    )


def _write_shard(
    photos: Sequence[TaggedPhoto], *, out: Path, cams: Path, settings: dict[str, Any]
) -> tuple[int, int, int]:
    """Label a shard; returns on how many photos the CRF failed, pixels without label, pixels."""
    failed = unsure = total = 0
    for photo in photos:
        with naming("photo", [photo.id]):
            cam = read_cam(cams / f"{photo.id}.npz")
            pixels, scores = read_pixels(photo), upsample_cam(cam.cam, cam.size)
            try:
                labels = label_confidently(pixels, scores, cam.classes, settings)
            except FAILURES:
                failed += 1
                labels = np.full(cam.size, IGNORE_INDEX, np.uint8)
            write_mask(out / f"{photo.id}.png", labels)
        unsure += int((labels == IGNORE_INDEX).sum())
        total += labels.size
    return failed, unsure, total


label_boundaries = Stage("boundary_labels", _write, choose_settings)
