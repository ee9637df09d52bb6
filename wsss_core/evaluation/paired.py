"""How sure a difference between two arms is: over seeds by Student's t, over photos by bootstrap.

Arms are compared in pairs, seed by seed and draw by draw, so what both share cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Integer
from scipy.special import stdtrit

from wsss_core.evaluation.confusion import ratio
from wsss_core.seeding import numpy_generator

BOOTSTRAP_DRAWS = 400
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean difference and where the true one lies with probability `LEVEL`.

    Attributes:
        mean: Of the differences; or one mean divided by another.
        low: Lower end.
        high: Upper end.
    """

    mean: float
    low: float
    high: float


def student_interval(differences: Sequence[float]) -> Interval | None:
    """Student's t interval of the mean of paired differences; None for fewer than two."""
    return ratio_interval(differences, [1.0] * len(differences))


def ratio_interval(values: Sequence[float], divisors: Sequence[float]) -> Interval | None:
    """Fieller's interval of a mean divided by another, both over the same seeds.

    The ratios r that the seeds do not refute, those for which Student's t interval of
    values - r * divisors holds zero (Fieller 1954), or the range about them. It is lopsided where
    the divisors are not sure themselves, and without an end where they may be zero. A mean of
    ratios would be ruled by the seed whose divisor is nearest to zero.

    Returns:
        None for fewer than two, or divisors that are zero in the mean. Ends are infinite where the
        divisors' own interval holds zero.
    """
    num, divisor = len(values), float(np.mean(divisors)) if len(divisors) else 0.0
    if num < 2 or not divisor:
        return None
    value = float(np.mean(values))
    spread = np.cov(np.asarray([values, divisors], np.float64))
    spread *= float(stdtrit(num - 1, (1 + LEVEL) / 2)) ** 2 / num
    # (value - r divisor)^2 <= t^2 / n Var(values - r divisors), a quadratic in r
    square = divisor**2 - spread[1, 1]
    if square <= 0:
        return Interval(value / divisor, -np.inf, np.inf)
    middle = (value * divisor - spread[0, 1]) / square
    reach = max(middle**2 - (value**2 - spread[0, 0]) / square, 0.0) ** 0.5
    return Interval(value / divisor, middle - reach, middle + reach)


def bootstrap_interval(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Interval | None:
    """Percentile interval of an arm less another over photos, averaged over seeds.

    Args:
        pairs: For each seed the scores of both arms under the same draws of photos, as
            `bootstrap_miou` gives them.

    Returns:
        None without draws, or where the arms have other numbers of them.
    """
    if not pairs or len({len(side) for pair in pairs for side in pair}) != 1 or not pairs[0][0]:
        return None
    draws = np.asarray(pairs, np.float64)
    differences = (draws[:, 0] - draws[:, 1]).mean(axis=0)
    low, high = np.quantile(differences, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(differences.mean()), float(low), float(high))


def bootstrap_miou(
    counts: Integer[np.ndarray, "p 3 k"], *, draws: int = BOOTSTRAP_DRAWS
) -> Float64[np.ndarray, " {draws}"]:
    """The mIoU of photos drawn with replacement, as many as there are.

    Which photos are drawn depends on their number alone: the same for every arm of a study.

    Args:
        counts: Hit, true and predicted pixels of each label in each photo.
        draws: How often.
    """
    num_photos, _, num_labels = counts.shape
    generator = numpy_generator(0, "bootstrap", num_photos)
    drawn = generator.multinomial(num_photos, np.full(num_photos, 1 / num_photos), size=draws)
    hits, true, guess = np.moveaxis(
        (drawn.astype(np.float64) @ counts.reshape(num_photos, -1)).reshape(draws, 3, num_labels),
        1,
        0,
    )
    iou = ratio(hits, true + guess - hits)
    return ratio(np.nansum(iou, axis=1), np.sum(~np.isnan(iou), axis=1))
