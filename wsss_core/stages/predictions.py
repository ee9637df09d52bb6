"""Stages `predictions` and `test`: what the segmenter sees in a split, as masks and as X_m."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float32, UInt8
from safetensors.torch import save_file
from torch import nn

from wsss_core.causal.confounders import squash
from wsss_core.config import CrfConfig
from wsss_core.data.images import write_mask
from wsss_core.data.transforms import normalise, resize_photo, scaled_size
from wsss_core.expansion.crf import refine
from wsss_core.records import Manifest, TaggedPhoto
from wsss_core.stages.resume import write_shards
from wsss_core.stages.segmenter import load_segmenter
from wsss_core.stages.shards import naming, read_batches
from wsss_core.stages.stage import Job, Stage
from wsss_core.store import Measured

BATCH_PHOTOS = 4


@torch.inference_mode()
def segment_photos_of_size(
    model: nn.Module, photos: UInt8[np.ndarray, "b h w 3"], *, scales: Sequence[float], flip: bool
) -> Float32[np.ndarray, "b k h w"]:
    """Class probabilities of equally sized photos: scores averaged with the flip, then over scales.

    Args:
        model: Segmenter in evaluation mode.
        photos: RGB, 0..255.
        scales: Photo sizes relative to the original; each side is rounded to a multiple of 16 px.
        flip: Add the mirrored photos.
    """
    device = next(model.parameters()).device
    num, size = len(photos), (photos.shape[1], photos.shape[2])
    total = torch.zeros(())
    for scale in scales:
        target = scaled_size(size, scale, multiple=16)
        views = torch.stack([normalise(resize_photo(photo, target)) for photo in photos])
        if flip:
            views = torch.cat([views, views.flip(-1)])
        scores = model(views.to(device, memory_format=torch.channels_last)).float()
        if flip:
            scores = scores[:num] + scores[num:].flip(-1)
            scores = scores / 2
        full = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
        total = total + full.softmax(dim=1).cpu()
    probabilities: Float32[np.ndarray, "b k h w"] = (total / len(scales)).numpy()
    return probabilities


def segment_photo(
    model: nn.Module, photo: UInt8[np.ndarray, "h w 3"], *, scales: Sequence[float], flip: bool
) -> Float32[np.ndarray, "k h w"]:
    """Class probabilities of one photo; see `segment_photos_of_size`."""
    return segment_photos_of_size(model, photo[None], scales=scales, flip=flip)[0]


def refine_prediction(
    photo: UInt8[np.ndarray, "h w 3"],
    probabilities: Float32[np.ndarray, "k h w"],
    config: CrfConfig,
) -> Float32[np.ndarray, "k h w"]:
    """The CRF over the background and the classes that win a pixel: its cost is linear in them."""
    present = np.union1d([0], np.unique(probabilities.argmax(axis=0)))
    if len(present) == 1:
        return probabilities
    part = probabilities[present]
    refined = np.zeros_like(probabilities)
    refined[present] = refine(photo, part / part.sum(axis=0), config)
    return refined


def _write(out: Path, job: Job, *, data: Manifest, segmenter: Manifest, split: str) -> Measured:
    photos = job.work.dataset(data).splits[split]
    settings: dict[str, Any] = job.settings
    device = str(job.work.device())
    rows = write_shards(
        functools.partial(
            _write_shard, folder=job.work.folder(segmenter), settings=settings, device=device
        ),
        photos,
        out=out,
        job=job,
        what=f"segment {split}",
        device=device,
    )
    if settings["context_size"] is not None:
        save_file({"x_m": torch.from_numpy(np.concatenate(rows))}, out / "x_m.safetensors")
    return Measured()


def _write_shard(
    photos: Sequence[TaggedPhoto], *, out: Path, folder: Path, settings: dict[str, Any], device: str
) -> Float32[np.ndarray, "b s s"]:
    """Write the shard's masks; returns X_m = 1 - p_background of each, in the canonical frame."""
    model = _load(folder, device)
    side = settings["context_size"] or 1
    x_m = np.zeros((len(photos), side, side), np.float32)
    for positions, pixels in read_batches(photos, batch_size=BATCH_PHOTOS):
        with naming("photos", [photos[position].id for position in positions]):
            batch = segment_photos_of_size(
                model, pixels, scales=settings["scales"], flip=settings["flip"]
            )
            for position, photo, probabilities in zip(positions, pixels, batch, strict=True):
                x_m[position] = squash(1.0 - probabilities[0], size=side)
                if settings["crf"] is not None:
                    probabilities = refine_prediction(photo, probabilities, settings["crf"])
                mask = probabilities.argmax(axis=0).astype(np.uint8)
                write_mask(out / f"{photos[position].id}.png", mask)
    return x_m


@functools.lru_cache(maxsize=1)
def _load(folder: Path, device: str) -> nn.Module:
    model, _ = load_segmenter(folder)
    return model.to(device).to(memory_format=torch.channels_last)


def _context_settings(config: Any) -> dict[str, Any]:
    # X_m: whole photo, one scale plus flip, no CRF, for training and unseen photos alike
    size = config.causal.context_size
    return {"scales": (1.0,), "flip": True, "crf": None, "context_size": size}


def _test_settings(config: Any) -> dict[str, Any]:
    test = config.segmenter_test
    crf = test.crf_params if test.crf else None
    return {"scales": test.scales, "flip": test.flip, "crf": crf, "context_size": None}


segment_photos = Stage("predictions", _write, _context_settings)
test_segmenter = Stage("test", _write, _test_settings)
