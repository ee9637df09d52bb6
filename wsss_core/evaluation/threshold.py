"""mIoU of CAMs at many background thresholds, from one look at each photo.

A pixel is its best class where that class scores above the threshold, else background. The best
class does not depend on the threshold, so a histogram of the score by (true label, best label)
holds every threshold's confusion matrix.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float64, Int64, Integer
from pydantic import BaseModel, ConfigDict

from wsss_core.evaluation.confusion import check_labels, mean_iou, select_counted
from wsss_core.evaluation.report import optional

THRESHOLDS = np.arange(1, 100) / 100
"""0.01 to 0.99, the grid of the curve."""


class ThresholdCurve(BaseModel):
    """The mIoU at each threshold. The best was chosen on truth: shown beside the score, never used.

    Attributes:
        thresholds: Background scores, ascending.
        miou: mIoU at each of them, None where no pixel was counted.
        miou_oracle: The best of them.
        threshold_oracle: Where it was; the lowest such threshold.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    thresholds: list[float]
    miou: list[float | None]
    miou_oracle: float | None
    threshold_oracle: float | None


def count_scores(
    score: Float[np.ndarray, "_ _"],
    best: Integer[np.ndarray, "_ _"],
    truth: Integer[np.ndarray, "_ _"],
    *,
    thresholds: Float64[np.ndarray, " m"],
    num_classes: int,
    name: str = "cam",
) -> Int64[np.ndarray, "k k b"]:
    """Count pixels by (true label, best label, number of thresholds below the score).

    Args:
        score: Score of the best present class, in [0, 1].
        best: Its mask label, in [1, num_classes); anything where the score is 0.
        truth: Label of each pixel; `IGNORE_INDEX` is not counted.
        thresholds: Ascending. Compared in the dtype of `score`; a score equal to it is background.
        num_classes: Number of classes, background included.
        name: The photo, for messages.

    Returns:
        Counts to be summed over photos for `confusion_by_threshold`; b = m + 1.

    Raises:
        DataError: If sizes differ or a label is out of range.
    """
    true, (level, label) = select_counted(truth, score, best, name=name)
    check_labels(true, num_classes=num_classes, name=f"{name}: the truth")
    check_labels(label, num_classes=num_classes, name=f"{name}: the CAM")
    num_bins = len(thresholds) + 1
    below = np.searchsorted(thresholds.astype(score.dtype), level, side="left")
    flat = np.bincount(
        (true * num_classes + label) * num_bins + below, minlength=num_classes**2 * num_bins
    )
    return flat.reshape(num_classes, num_classes, num_bins)


def confusion_by_threshold(counts: Int64[np.ndarray, "k k b"]) -> Int64[np.ndarray, "m k k"]:
    """The confusion matrix at every threshold, from the sum of `count_scores`."""
    background = np.cumsum(counts, axis=-1)[..., :-1]
    confusion = counts.sum(axis=-1, keepdims=True) - background
    confusion[:, 0] += background.sum(axis=1)
    return np.moveaxis(confusion, -1, 0)


def build_curve(
    confusions: Int64[np.ndarray, "m k k"], *, thresholds: Float64[np.ndarray, " m"]
) -> ThresholdCurve:
    """The mIoU at each threshold, and the best on truth."""
    miou = mean_iou(confusions)
    best = None if np.isnan(miou).all() else int(np.nanargmax(miou))
    return ThresholdCurve(
        thresholds=thresholds.tolist(),
        miou=[optional(value) for value in miou],
        miou_oracle=None if best is None else float(miou[best]),
        threshold_oracle=None if best is None else float(thresholds[best]),
    )
