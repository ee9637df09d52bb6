"""Dense CRF over the classes present in a photo (Kraehenbuehl and Koltun 2011), by pydensecrf."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float32, Integer, UInt8

from wsss_core.config import CrfConfig


def soft_unary(
    scores: Float[np.ndarray, "k h w"], *, threshold: float
) -> Float32[np.ndarray, "k+1 h w"]:
    """Probabilities proportional to the scores, the background's being `threshold`.

    Args:
        scores: Normalised CAMs of the present classes, in [0, 1].
        threshold: Score of the background, in (0, 1).
    """
    background = np.full((1, *scores.shape[1:]), threshold, np.float32)
    stacked = np.concatenate([background, np.asarray(scores, np.float32)]) + 1e-3
    probabilities: Float32[np.ndarray, "k+1 h w"] = stacked / stacked.sum(axis=0)
    return probabilities


def hard_unary(
    scores: Float[np.ndarray, "k h w"], *, threshold: float, confidence: float
) -> Float32[np.ndarray, "k+1 h w"]:
    """The winner's probability is `confidence`; the others share the rest (irn misc/imutils.py)."""
    num_labels = scores.shape[0] + 1
    background = np.full((1, *scores.shape[1:]), threshold, np.float32)
    winner = np.concatenate([background, np.asarray(scores, np.float32)]).argmax(axis=0)
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


def labels_of(
    marginals: Float[np.ndarray, "l h w"], classes: Integer[np.ndarray, " k"]
) -> UInt8[np.ndarray, "h w"]:
    """Mask labels of the most probable CRF label: 0 background, class + 1 elsewhere."""
    names = np.concatenate([[0], np.asarray(classes) + 1]).astype(np.uint8)
    return names[marginals.argmax(axis=0)]
