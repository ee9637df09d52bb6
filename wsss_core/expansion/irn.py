"""IRNet's expansion without its instance step: the seeds walk, boundaries hold them back.

Source: irn step/make_sem_seg_labels.py. A dense CRF may follow the walk, as PSA has it (Ahn and
Kwak 2018): the walk decides on cells of four pixels, the CRF on where exactly an edge runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float32
from torch import Tensor

from wsss_core.config import Config
from wsss_core.errors import InputError
from wsss_core.expansion.crf import FAILURES, hard_unary, refine
from wsss_core.expansion.method import Expanded, Seeded, add_background
from wsss_core.expansion.random_walk import propagate


def choose_settings(config: Config) -> dict[str, Any]:
    """Boundaries, the walk, the background's score; the boundary network is an input."""
    irn = config.expansion.irn
    return {
        "scales": irn.scales,
        "radius": irn.radius,
        "beta": irn.beta,
        "log2_steps": irn.log2_steps,
        "threshold": irn.threshold,
        "refine": _refinement(config) if irn.refine else None,
        "refine_seeds": _refinement(config) | {"threshold": config.seeds.threshold}
        if irn.refine_seeds
        else None,
    }


def _refinement(config: Config) -> dict[str, Any]:
    return {"confidence": config.expansion.hard_confidence, "crf": config.expansion.crf}


def expand(seeded: Sequence[Seeded], settings: dict[str, Any]) -> list[Expanded]:
    """The seeds after the walk, divided by their largest value over classes and pixels.

    One maximum for all classes, as irn has it: a class that is weak beside another stays weak.

    Raises:
        InputError: If there are no boundaries.
    """
    cams, failed = zip(*(choose_start(photo, settings) for photo in seeded), strict=True)
    seeds, boundary = _stack(seeded, cams)
    walked = propagate(
        seeds,
        boundary,
        radius=settings["radius"],
        beta=settings["beta"],
        log2_steps=settings["log2_steps"],
    )
    full = F.interpolate(walked, scale_factor=4, mode="bilinear", align_corners=False)
    height, width = seeded[0].photo.shape[:2]
    scores = full[:, :, :height, :width]
    scores = scores / scores.amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)
    return [
        _decide(photo, planes[: len(photo.classes)].cpu().numpy(), settings, failed=gave_up)
        for photo, planes, gave_up in zip(seeded, scores, failed, strict=True)
    ]


def choose_start(
    seeded: Seeded, settings: dict[str, Any]
) -> tuple[Float32[np.ndarray, "k h w"], bool]:
    """The CAMs that walk, and whether the CRF that should have refined them failed.

    A CRF knows the edges of this photo, the CAM where a class is most itself; their product is
    large where both are. The walk still carries it over the whole object.
    """
    refinement = settings.get("refine_seeds")
    if refinement is None or not len(seeded.classes):
        return seeded.cam, False
    unary = hard_unary(
        seeded.scores, threshold=refinement["threshold"], confidence=refinement["confidence"]
    )
    try:
        marginals = torch.from_numpy(refine(seeded.photo, unary, refinement["crf"])[1:])
    except FAILURES:
        return seeded.cam, True
    right, bottom = (-side % 4 for side in (marginals.shape[2], marginals.shape[1]))
    whole = F.pad(marginals[None], (0, right, 0, bottom), mode="replicate")
    return seeded.cam * F.avg_pool2d(whole, 4)[0].numpy(), False


def _decide(
    seeded: Seeded, scores: np.ndarray, settings: dict[str, Any], *, failed: bool
) -> Expanded:
    """The walked scores beside a background's, or what a CRF makes of them."""
    threshold, refinement = settings["threshold"], settings.get("refine")
    if refinement is None:
        return Expanded(add_background(scores, threshold=threshold), failed=failed)
    unary = hard_unary(scores, threshold=threshold, confidence=refinement["confidence"])
    try:
        return Expanded(refine(seeded.photo, unary, refinement["crf"]), failed=failed)
    except FAILURES:
        return Expanded(add_background(scores, threshold=threshold), failed=True)


def _stack(
    seeded: Sequence[Seeded], cams: Sequence[np.ndarray]
) -> tuple[Float32[Tensor, "b k h w"], Float32[Tensor, "b h w"]]:
    """Seeds and boundaries of a batch; a photo with fewer classes than another has empty ones."""
    boundaries = [photo.boundary for photo in seeded if photo.boundary is not None]
    if len(boundaries) < len(seeded):
        raise InputError("method irn walks between boundaries; train a boundary network first")
    boundary = torch.stack(boundaries)
    num_classes = max(1, *(len(photo.classes) for photo in seeded))
    seeds = boundary.new_zeros(len(seeded), num_classes, *boundary.shape[1:])
    for planes, cam in zip(seeds, cams, strict=True):
        planes[: len(cam)] = torch.from_numpy(cam)
    return seeds, boundary
