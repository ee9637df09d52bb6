"""What can be said of masks without pixel truth: do they fit the tags, do they still change.

A class counts as found in a photo when it covers at least `FOUND_RATIO` of it. Agreement compares
found classes with tags, over all (photo, class) pairs. Stability is the mIoU between two rounds'
masks (`confusion.mean_iou`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Integer
from pydantic import BaseModel, ConfigDict

from wsss_core.evaluation.classification import f1_score
from wsss_core.evaluation.confusion import ratio
from wsss_core.evaluation.report import by_name, flat_metrics, optional

FOUND_RATIO = 0.01
"""Smallest share of a photo's pixels that counts as having found a class; less is speckle."""


class TagAgreement(BaseModel):
    """Whether the masks hold the tagged classes and only these; a missing score is None.

    Attributes:
        photos: Photos counted.
        f1: Harmonic mean of precision and recall of all (photo, class) pairs; in [0, 1].
        precision: Share of the found pairs that are tagged: only these.
        recall: Share of the tagged pairs that are found: all of them.
        precision_by_class: The same a class.
        recall_by_class: The same a class.
        stability: mIoU between these masks and the last round's, which count as truth; None in
            round 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    photos: int
    f1: float | None
    precision: float | None
    recall: float | None
    precision_by_class: dict[str, float | None]
    recall_by_class: dict[str, float | None]
    stability: float | None = None

    def metrics(self) -> dict[str, float]:
        """`tag_agreement`, its `/precision` and `/recall`, `stability`; missing ones left out."""
        parts = {"precision": self.precision, "recall": self.recall}
        metrics = flat_metrics(parts, prefix="tag_agreement")
        whole = {"tag_agreement": self.f1, "stability": self.stability}
        return metrics | {name: value for name, value in whole.items() if value is not None}


def find_classes(
    mask: Integer[np.ndarray, "h w"], *, num_classes: int, least_ratio: float = FOUND_RATIO
) -> Bool[np.ndarray, " c"]:
    """Which foreground classes a mask holds.

    Args:
        mask: Label of each pixel, or `IGNORE_INDEX`, of no class but part of the photo.
        num_classes: Number of classes, background included; c = num_classes - 1.
        least_ratio: Share of the photo a class must cover, in [0, 1].
    """
    area = np.bincount(mask.ravel(), minlength=num_classes)[1:num_classes]
    return (area > 0) & (area >= least_ratio * mask.size)


def compare_tags(
    found: Bool[np.ndarray, "n c"],
    tagged: Bool[np.ndarray, "n c"],
    *,
    classes: Sequence[str],
    stability: float | None = None,
) -> TagAgreement:
    """Agreement of found classes with tags.

    Args:
        found: Classes in each photo's mask, from `find_classes`.
        tagged: Classes the photo is tagged with.
        classes: Foreground names.
        stability: mIoU against the last round's masks, if there was one.
    """
    hits = found & tagged
    return TagAgreement(
        photos=len(tagged),
        f1=optional(f1_score(found, tagged)),
        precision=optional(ratio(hits.sum(), found.sum())),
        recall=optional(ratio(hits.sum(), tagged.sum())),
        precision_by_class=by_name(classes, ratio(hits.sum(0), found.sum(0))),
        recall_by_class=by_name(classes, ratio(hits.sum(0), tagged.sum(0))),
        stability=stability,
    )
