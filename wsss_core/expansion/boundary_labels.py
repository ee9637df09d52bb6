"""Confident labels for the boundary network: where two CRF passes leave no doubt.

Source: irn step/cam_to_ir_label.py. The first pass looks for foreground under a high threshold, the
second for background under a low one; where they disagree nothing is said.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Integer, UInt8

from wsss_core.config import Config
from wsss_core.expansion.crf import hard_unary, refine
from wsss_core.expansion.method import labels_of
from wsss_core.records import IGNORE_INDEX

AUTO_MARGIN = 0.1
"""Between `seeds.threshold` and an `auto` threshold (ReCAM's author, its issue 15)."""


def choose_settings(config: Config) -> dict[str, Any]:
    """Both thresholds, the confidence of the hard unary, the kernels.

    An `auto` one of the two stops at the other, where that is a number.
    """
    expansion, threshold = config.expansion, config.seeds.threshold
    pair = {"foreground": expansion.irn.foreground, "background": expansion.irn.background}
    if threshold != "auto":  # it is a number by the time that labels are made
        above, below = (
            round(min(max(value, 0.02), 0.98), 4)
            for value in (threshold + AUTO_MARGIN, threshold - AUTO_MARGIN)
        )
        if pair["foreground"] == "auto":
            given = pair["background"]
            pair["foreground"] = above if given == "auto" else max(above, given)
        if pair["background"] == "auto":
            pair["background"] = min(below, pair["foreground"])
    return {
        **pair,
        "confidence": expansion.hard_confidence,
        "crf": expansion.crf,
    }


def label_confidently(
    photo: UInt8[np.ndarray, "h w 3"],
    scores: Float[np.ndarray, "k h w"],
    classes: Integer[np.ndarray, " k"],
    settings: dict[str, Any],
) -> UInt8[np.ndarray, "h w"]:
    """Labels of the pixels whose class or background is sure; `IGNORE_INDEX` elsewhere.

    Args:
        photo: RGB, 0..255.
        scores: Normalised CAMs of the present classes, in [0, 1]; without any, all is background.
        classes: Foreground class of each score, 0-based.
        settings: What `choose_settings` gave.
    """
    if not len(classes):
        return np.zeros(scores.shape[1:], np.uint8)
    foreground, background = (
        labels_of(
            refine(
                photo,
                hard_unary(scores, threshold=threshold, confidence=settings["confidence"]),
                settings["crf"],
            ),
            classes,
        )
        for threshold in (settings["foreground"], settings["background"])
    )
    return merge_labels(foreground, background)


def merge_labels(
    foreground: UInt8[np.ndarray, "h w"], background: UInt8[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "h w"]:
    """One map of two: a class where the first says so, 0 where both say 0, else `IGNORE_INDEX`."""
    unsure = (foreground == 0) & (background != 0)
    return np.where(unsure, IGNORE_INDEX, foreground).astype(np.uint8)
