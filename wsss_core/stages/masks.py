"""Stages `masks` and `truth_masks`: seeds expanded to pseudo-masks (step 2, expansion)."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wsss_core.config import Config
from wsss_core.data.images import write_mask
from wsss_core.data.truth import TruthMasks
from wsss_core.errors import InputError
from wsss_core.expansion import crf, irn, none
from wsss_core.expansion.method import Method, Seeded, labels_of
from wsss_core.models.boundary import BoundaryNet
from wsss_core.records import Manifest, TaggedPhoto
from wsss_core.seeds.cam import read_cam, upsample_cam
from wsss_core.stages.boundary import boundary_maps, load_boundary_net
from wsss_core.stages.resume import write_shards
from wsss_core.stages.shards import naming, read_batches
from wsss_core.stages.stage import Job, Stage
from wsss_core.store import Content, Measured

METHODS: dict[str, Method] = {"none": none, "crf": crf, "irn": irn}
"""The modules that expand seeds, by `expansion.method`."""

BATCH_PHOTOS = 4


def _write(
    out: Path,
    job: Job,
    *,
    data: Manifest,
    cams: Manifest | None,
    boundary: Manifest | None = None,
) -> Measured:
    dataset = job.work.dataset(data)
    photos = dataset.splits["train"]
    method: str = job.settings["method"]
    if method == "folder":
        content: Content = job.settings["folder"]
        masks = TruthMasks((content.folder,))
        return _adopt(out, job, photos, masks, num_classes=len(dataset.classes))
    if cams is None:
        raise InputError("there are no CAMs to expand; make them, or set expansion.folder")
    device = "cpu" if boundary is None else str(job.work.device())
    failed = int(
        sum(
            write_shards(
                functools.partial(
                    _write_shard,
                    cams=job.work.folder(cams),
                    boundary=None if boundary is None else job.work.folder(boundary),
                    device=device,
                    method=method,
                    settings=job.settings,
                ),
                photos,
                out=out,
                job=job,
                what="masks",
                device=device,
            )
        )
    )
    if failed:
        job.work.recorder.note(f"the CRF failed on {failed} photos; their masks are their seeds")
    return Measured({"expansion/fallbacks": float(failed)})


def _write_shard(
    photos: Sequence[TaggedPhoto],
    *,
    out: Path,
    cams: Path,
    boundary: Path | None,
    device: str,
    method: str,
    settings: dict[str, Any],
) -> int:
    """Expand the seeds of a shard; returns on how many photos the method failed."""
    net = None if boundary is None else _load(boundary, device)
    failed = 0
    for positions, pixels in read_batches(photos, batch_size=BATCH_PHOTOS):
        ids = [photos[position].id for position in positions]
        with naming("photos", ids):
            boundaries: Iterable[Tensor | None] = (
                [None] * len(pixels)
                if net is None
                else boundary_maps(net, pixels, scales=settings["scales"])
            )
            seeded = []
            for photo_id, photo, edges in zip(ids, pixels, boundaries, strict=True):
                cam = read_cam(cams / f"{photo_id}.npz")
                scores = upsample_cam(cam.cam, cam.size)
                seeded.append(Seeded(photo, cam.classes, cam.cam, scores, edges))
            expanded = METHODS[method].expand(seeded, settings)
            for photo_id, before, after in zip(ids, seeded, expanded, strict=True):
                write_mask(out / f"{photo_id}.png", labels_of(after.scores, before.classes))
                failed += after.failed
    return failed


@functools.lru_cache(maxsize=1)
def _load(folder: Path, device: str) -> BoundaryNet:
    return load_boundary_net(folder).to(device).to(memory_format=torch.channels_last)


def _adopt(
    out: Path, job: Job, photos: Sequence[TaggedPhoto], masks: TruthMasks, *, num_classes: int
) -> Measured:
    """Masks from a folder, true ones or anybody's, checked for size and labels."""
    for done, photo in enumerate(photos, start=1):
        mask = masks.read(photo, num_classes=num_classes)
        write_mask(out / f"{photo.id}.png", mask)
        job.work.recorder.progress("masks from folder", done, len(photos))
    return Measured()


def _write_truth(out: Path, job: Job, *, data: Manifest, truth: Manifest) -> Measured:
    dataset, masks = job.work.dataset(data), TruthMasks.of(job.work.data_root(data))
    return _adopt(out, job, dataset.splits["train"], masks, num_classes=len(dataset.classes))


def _settings(config: Config) -> dict[str, Any]:
    expansion = config.expansion
    if expansion.folder is not None:
        return {"method": expansion.method, "folder": Content(expansion.folder)}
    return {"method": expansion.method, **METHODS[expansion.method].choose_settings(config)}


expand_masks = Stage("masks", _write, _settings)
truth_masks = Stage("truth_masks", _write_truth, lambda config: {})
