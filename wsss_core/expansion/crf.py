"""Dense CRF over the classes present in a photo (Kraehenbuehl and Koltun 2011), by pydensecrf."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, UInt8

from wsss_core.config import Config, CrfConfig
from wsss_core.expansion.method import Expanded, Seeded, add_background

FAILURES = (RuntimeError, ValueError)
"""What pydensecrf raises on a photo that it cannot do; want of memory passes and is tried again."""


def choose_settings(config: Config) -> dict[str, Any]:
    """The seeds' threshold, the unary and the kernels."""
    expansion = config.expansion
    return {
        "threshold": config.seeds.threshold,
        "unary": expansion.unary,
        "confidence": expansion.hard_confidence,
        "crf": expansion.crf,
    }


def expand(seeded: Sequence[Seeded], settings: dict[str, Any]) -> list[Expanded]:
    """The CRF's marginals; a photo that it fails on keeps its seeds."""
    return [_expand_photo(photo, settings) for photo in seeded]


def _expand_photo(seeded: Seeded, settings: dict[str, Any]) -> Expanded:
    threshold = settings["threshold"]
    try:
        unary = (
            soft_unary(seeded.scores, threshold=threshold)
            if settings["unary"] == "soft"
            else hard_unary(seeded.scores, threshold=threshold, confidence=settings["confidence"])
        )
        return Expanded(refine(seeded.photo, unary, settings["crf"]))
    except FAILURES:
        return Expanded(add_background(seeded.scores, threshold=threshold), failed=True)


def soft_unary(
    scores: Float[np.ndarray, "k h w"], *, threshold: float
) -> Float32[np.ndarray, "k+1 h w"]:
    """Probabilities proportional to the scores, the background's being `threshold`.

    Args:
        scores: Normalised CAMs of the present classes, in [0, 1].
        threshold: Score of the background, in (0, 1).
    """
    stacked = add_background(scores, threshold=threshold) + 1e-3
    probabilities: Float32[np.ndarray, "k+1 h w"] = stacked / stacked.sum(axis=0)
    return probabilities


def hard_unary(
    scores: Float[np.ndarray, "k h w"], *, threshold: float, confidence: float
) -> Float32[np.ndarray, "k+1 h w"]:
    """The winner's probability is `confidence`; the others share the rest (irn misc/imutils.py)."""
    num_labels = scores.shape[0] + 1
    winner = add_background(scores, threshold=threshold).argmax(axis=0)
    rest = (1.0 - confidence) / max(1, num_labels - 1)
    labels = np.arange(num_labels)[:, None, None]
    return np.where(winner[None] == labels, confidence, rest).astype(np.float32)


def refine(
    photo: UInt8[np.ndarray, "h w 3"],
    probabilities: Float32[np.ndarray, "l h w"],
    config: CrfConfig,
) -> Float32[np.ndarray, "l h w"]:
    """Mean-field marginals of the fully connected CRF.

    Args:
        photo: RGB, 0..255.
        probabilities: Unary of each label, summing to 1 a pixel.
        config: Kernels and iterations.
    """
    from pydensecrf.densecrf import DenseCRF2D

    labels, height, width = probabilities.shape
    crf = DenseCRF2D(width, height, labels)
    energy = -np.log(np.clip(probabilities, 1e-6, 1.0)).reshape(labels, -1)
    crf.setUnaryEnergy(np.ascontiguousarray(energy, np.float32))
    crf.addPairwiseGaussian(sxy=config.gaussian_sxy, compat=config.gaussian_compat)
    crf.addPairwiseBilateral(
        sxy=config.bilateral_sxy,
        srgb=config.bilateral_srgb,
        rgbim=np.ascontiguousarray(photo),
        compat=config.bilateral_compat,
    )
    marginals: Float32[np.ndarray, "l h w"] = np.asarray(
        crf.inference(config.iterations), np.float32
    ).reshape(labels, height, width)
    return marginals
