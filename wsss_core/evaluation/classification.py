"""How well a classifier finds the tags of photos: average precision and F1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Float64
from pydantic import BaseModel, ConfigDict

from wsss_core.evaluation.confusion import ratio
from wsss_core.evaluation.report import by_name, flat_metrics, optional


class TagReport(BaseModel):
    """Scores of a multi-label classifier; a score that does not exist is None.

    Attributes:
        photos: Photos scored.
        map: Mean of `ap` over the classes that have one; in [0, 1].
        f1: Mean of the classes' F1 at probability 0.5 (macro), over classes tagged or predicted at
            least once.
        f1_micro: F1 of all (photo, class) pairs together.
        ap: Average precision by class.
        absent: Classes no photo is tagged with, left out of `map`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    photos: int
    map: float | None
    f1: float | None
    f1_micro: float | None
    ap: dict[str, float | None]
    absent: tuple[str, ...]

    def metrics(self, prefix: str) -> dict[str, float]:
        """Flat: `classifier/map`, `/f1`, `/f1_micro`, `/ap/<class>`; missing ones are left out."""
        named = {"map": self.map, "f1": self.f1, "f1_micro": self.f1_micro}
        named |= {f"ap/{name}": value for name, value in self.ap.items()}
        return flat_metrics(named, prefix=prefix)


def score_tags(
    probabilities: Float[np.ndarray, "n c"],
    tagged: Bool[np.ndarray, "n c"],
    *,
    classes: Sequence[str],
) -> TagReport:
    """Score predicted tags.

    Args:
        probabilities: In [0, 1], one column a foreground class.
        tagged: Whether the photo has the tag.
        classes: Name of each column.
    """
    ap = np.array(
        [
            average_precision(column, truth)
            for column, truth in zip(probabilities.T, tagged.T, strict=True)
        ]
    )
    guessed = probabilities >= 0.5
    found = ~np.isnan(ap)
    per_class = f1_score(guessed, tagged, axis=0)
    return TagReport(
        photos=len(tagged),
        map=optional(ratio(np.nansum(ap), found.sum())),
        f1=optional(ratio(np.nansum(per_class), np.sum(~np.isnan(per_class)))),
        f1_micro=optional(f1_score(guessed, tagged)),
        ap=by_name(classes, ap),
        absent=tuple(name for name, present in zip(classes, found, strict=True) if not present),
    )


def average_precision(scores: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> float:
    """Area under the precision-recall steps, without interpolation.

    Without ties it is the mean, over the positives, of the precision at their rank. Equal scores
    are one step, so the order of photos never matters.

    Args:
        scores: Higher means more likely.
        positive: The truth.

    Returns:
        In (0, 1]; NaN if nothing is positive.
    """
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last_of_ties = np.append(ranked[1:] != ranked[:-1], True)[: len(ranked)]
    hits = np.cumsum(positive[order])[last_of_ties]
    precision = hits / (np.flatnonzero(last_of_ties) + 1)
    gained = np.diff(hits, prepend=0)
    return float(ratio(np.sum(precision * gained), positive.sum()))


def f1_score(
    guessed: Bool[np.ndarray, "*n"], positive: Bool[np.ndarray, "*n"], *, axis: int | None = None
) -> Float64[np.ndarray, "*out"]:
    """2 TP / (2 TP + FP + FN), over all or along an axis; NaN where nothing is guessed or true."""
    hits = np.sum(guessed & positive, axis=axis)
    return ratio(2 * hits, np.sum(guessed, axis=axis) + np.sum(positive, axis=axis))
