"""What a method of expansion is: seeds of some photos in, a score of every label and pixel out.

A module is a `Method` if it has the two functions below; `stages/masks.py` lists those there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, Float32, Integer, UInt8
from torch import Tensor

from wsss_core.config import Config


@dataclass(frozen=True)
class Seeded:
    """One photo and its seeds.

    Attributes:
        photo: (H,W,3) RGB, 0..255.
        classes: (k,) foreground classes present, 0-based, ascending; k may be 0.
        cam: (k, ceil(H/4), ceil(W/4)) class activation maps in [0, 1], as stored.
        scores: (k,H,W) the same at the photo's size.
        boundary: (ceil(H/4), ceil(W/4)) in [0, 1], on the device to compute on; None without a
            boundary network.
    """

    photo: UInt8[np.ndarray, "H W 3"]
    classes: Integer[np.ndarray, " k"]
    cam: Float32[np.ndarray, "k h w"]
    scores: Float32[np.ndarray, "k H W"]
    boundary: Float32[Tensor, "h w"] | None = None


@dataclass(frozen=True)
class Expanded:
    """What became of a photo's seeds.

    Attributes:
        scores: (k+1,H,W), background first; the largest is the pixel's label.
        failed: Whether the method gave up and these are the seeds as they were.
    """

    scores: Float32[np.ndarray, "k+1 H W"]
    failed: bool = False


class Method(Protocol):
    """A way from seeds to pseudo-masks; implemented by modules."""

    def choose_settings(self, config: Config) -> dict[str, Any]:
        """The settings that `expand` gets, and that its masks' key depends on."""

    def expand(self, seeded: Sequence[Seeded], settings: dict[str, Any]) -> list[Expanded]:
        """Label scores of photos of one size, in their order."""


def add_background(
    scores: Float[np.ndarray, "k h w"], *, threshold: float
) -> Float32[np.ndarray, "k+1 h w"]:
    """The scores behind a background whose score is `threshold` at every pixel."""
    background = np.full((1, *scores.shape[1:]), threshold, np.float32)
    return np.concatenate([background, np.asarray(scores, np.float32)])


def labels_of(
    scores: Float[np.ndarray, "k+1 h w"], classes: Integer[np.ndarray, " k"]
) -> UInt8[np.ndarray, "h w"]:
    """Mask labels of the largest score: 0 background, class + 1 elsewhere; a tie goes down."""
    names = np.concatenate([[0], np.asarray(classes) + 1]).astype(np.uint8)
    return names[scores.argmax(axis=0)]
