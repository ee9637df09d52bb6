"""What a seed is worth to the classifier itself: a judge of thresholds that needs no truth.

Blur a photo outside of a class's seed, and its tag should survive: the seed suffices. Blur it
inside instead, and the tag should go: the seed is necessary. A larger seed does both better, so its
area is taken off both:

    evidence = (p_kept - area) + (1 - p_removed - area)

Too high a threshold loses parts that the tag needs, too low a one pays for background; the best one
lies between. The score of a mask against its pixels is never looked at. Insertion and deletion of
evidence are known from the study of saliency maps (Petsiuk et al. 2018, RISE); the price of area is
ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64, Integer, UInt8
from PIL import Image, ImageFilter

BLUR_SHARE = 0.1
"""Deviation of the blur that hides, as a share of the photo's longer side."""

Probabilities = Callable[[UInt8[np.ndarray, "b h w 3"]], Float[np.ndarray, "b n"]]
"""Probability of each tag for equally sized photos."""


@dataclass(frozen=True)
class Evidence:
    """Means over photos and tags at each threshold.

    Attributes:
        thresholds: (T,) ascending, in (0, 1).
        kept: (T,) probability of the tag when only the seed is sharp.
        removed: (T,) probability of the tag when only the rest is sharp.
        area: (T,) share of the photo that the seed covers.
    """

    thresholds: Float64[np.ndarray, " t"]
    kept: Float64[np.ndarray, " t"]
    removed: Float64[np.ndarray, " t"]
    area: Float64[np.ndarray, " t"]

    @property
    def total(self) -> Float64[np.ndarray, " t"]:
        """The evidence at each threshold, at most 2."""
        return self.kept - self.removed + 1 - 2 * self.area

    def best(self) -> tuple[float, float]:
        """The threshold of most evidence, between grid points by a parabola, and that evidence."""
        total = self.total
        peak = int(total.argmax())
        if not 0 < peak < len(total) - 1:
            return float(self.thresholds[peak]), float(total[peak])
        below, at, above = total[peak - 1 : peak + 2]
        bend = below - 2 * at + above
        shift = 0.0 if bend == 0 else 0.5 * (below - above) / bend
        step = self.thresholds[peak + 1] - self.thresholds[peak]
        return float(self.thresholds[peak] + shift * step), float(
            at - 0.25 * (below - above) * shift
        )


def gather_evidence(
    photo: UInt8[np.ndarray, "h w 3"],
    scores: Float[np.ndarray, "k h w"],
    classes: Integer[np.ndarray, " k"],
    probabilities: Probabilities,
    *,
    thresholds: Sequence[float],
) -> Float64[np.ndarray, "k 3 t"]:
    """Kept, removed and area of each class's seed at each threshold, for one photo.

    A class's seed is where its score is above the threshold and above every other class's.

    Args:
        photo: RGB.
        scores: Of the photo's tags, in [0, 1].
        classes: The tags, 0-based.
        probabilities: The classifier.
        thresholds: T of them, ascending.
    """
    hidden = _blur(photo)
    winner = scores.argmax(axis=0)
    rows = np.zeros((len(classes), 3, len(thresholds)))
    for place, label in enumerate(classes):
        score = np.where(winner == place, scores[place], 0.0)
        seeds = [score > threshold for threshold in thresholds]
        views = [_show(photo, hidden, seed) for seed in seeds]
        views += [_show(photo, hidden, ~seed) for seed in seeds]
        found = probabilities(np.stack(views))[:, label]
        rows[place, 0], rows[place, 1] = np.split(found.astype(np.float64), 2)
        rows[place, 2] = [seed.mean() for seed in seeds]
    return rows


def mean_evidence(rows: Float64[np.ndarray, "m 3 t"], *, thresholds: Sequence[float]) -> Evidence:
    """The means over all seeds of all photos."""
    kept, removed, area = rows.mean(axis=0)
    return Evidence(np.asarray(thresholds, np.float64), kept, removed, area)


def _blur(photo: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    radius = BLUR_SHARE * max(photo.shape[:2])
    return np.asarray(Image.fromarray(photo).filter(ImageFilter.GaussianBlur(radius)))


def _show(
    photo: UInt8[np.ndarray, "h w 3"],
    hidden: UInt8[np.ndarray, "h w 3"],
    seed: Bool[np.ndarray, "h w"],
) -> UInt8[np.ndarray, "h w 3"]:
    return np.where(seed[..., None], photo, hidden)
