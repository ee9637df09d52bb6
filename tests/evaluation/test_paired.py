import numpy as np
import pytest

from tests.oracles import scores as oracle
from wsss_core.evaluation.audit import class_counts
from wsss_core.evaluation.confusion import confusion_matrix
from wsss_core.evaluation.paired import (
    bootstrap_interval,
    bootstrap_miou,
    ratio_interval,
    student_interval,
)


def test_student_interval__as_in_the_tables():
    # t(0.975, 4) = 2.776; the deviation of 1..5 is sqrt(2.5)
    found = student_interval([1, 2, 3, 4, 5])
    reach = 2.7764451 * 2.5**0.5 / 5**0.5
    assert (found.mean, found.low, found.high) == pytest.approx((3, 3 - reach, 3 + reach))
    # t(0.975, 1) = 12.706
    assert student_interval([0.0, 2.0]).high == pytest.approx(1 + 12.7062047)
    assert student_interval([1.0]) is None
    assert student_interval([]) is None


def test_ratio_interval__of_two_means():
    values, divisors = np.array([5.0, 3.0, 4.0]), np.array([20.0, 21.0, 17.0])
    found = ratio_interval(values, divisors)
    assert found.mean == pytest.approx(12 / 58)
    for end in (found.low, found.high):  # where the differences' own interval just holds zero
        rest = student_interval(values - end * divisors)
        assert min(abs(rest.low), abs(rest.high)) == pytest.approx(0, abs=1e-9)
    assert found.high - found.mean > found.mean - found.low > 0
    open_ended = ratio_interval([5, 3], [1, 3])  # 2 +- 12.7: the divisor may be zero
    assert (open_ended.low, open_ended.mean, open_ended.high) == (-np.inf, 2.0, np.inf)
    exact = ratio_interval([2.0, 2.5, 2.25], [4.0, 5.0, 4.5])
    assert (exact.low, exact.mean, exact.high) == pytest.approx((0.5, 0.5, 0.5))
    assert ratio_interval([1.0], [2.0]) is None
    assert ratio_interval([1.0, 2.0], [1.0, -1.0]) is None
    assert ratio_interval([], []) is None


def test_student_interval__covers_the_mean_as_often_as_it_says():
    random = np.random.default_rng(0)
    intervals = [student_interval(random.normal(0.3, 2, 5)) for _ in range(2000)]
    covered = np.mean([interval.low <= 0.3 <= interval.high for interval in intervals])
    assert covered == pytest.approx(0.95, abs=0.015)


def test_ratio_interval__covers_where_the_divisor_is_as_unsure_as_the_value():
    random = np.random.default_rng(0)
    pairs = random.normal((6, 8), (3, 5), (2000, 7, 2))
    intervals = [ratio_interval(values, divisors) for values, divisors in pairs.swapaxes(1, 2)]
    for missed in ([i.low > 0.75 for i in intervals], [i.high < 0.75 for i in intervals]):
        assert np.mean(missed) == pytest.approx(0.025, abs=0.01)  # on either side alike


def draw_masks(seed, flaw):
    """Masks of 40 photos that err on a share of the pixels, and their truths."""
    random = np.random.default_rng(seed)
    truths = random.integers(0, 3, (40, 6, 6))
    wrong = random.random(truths.shape) < flaw
    return np.where(wrong, 0, truths), truths


def counts_of(masks, truths):
    pairs = zip(masks, truths, strict=True)
    return np.stack([class_counts(confusion_matrix(*pair, num_classes=4)) for pair in pairs])


def test_bootstrap_miou__is_spread_about_the_score():
    masks, truths = draw_masks(0, 0.3)
    found = bootstrap_miou(counts_of(masks, truths))
    score = oracle.mean_iou(list(zip(masks, truths, strict=True)), 4)
    assert found.shape == (400,)
    assert found.mean() == pytest.approx(score, abs=0.005)
    assert 0.001 < found.std() < 0.05


def test_bootstrap_miou__one_photo_is_always_drawn():
    masks, truths = draw_masks(0, 0.3)
    found = bootstrap_miou(counts_of(masks[:1], truths[:1]), draws=3)
    assert found == pytest.approx([oracle.mean_iou([(masks[0], truths[0])], 4)] * 3)


def test_bootstrap_interval__same_draws_for_both_arms():
    masks, truths = draw_masks(0, 0.3)
    better, _ = draw_masks(0, 0.2)  # the same pixels are drawn, fewer of them are wrong
    arms = [bootstrap_miou(counts_of(m, truths)).tolist() for m in (better, masks)]
    found = bootstrap_interval([(arms[0], arms[1])])
    assert 0 < found.low < found.mean < found.high
    assert found.high - found.low < 2 * 1.96 * np.std(arms[0])  # what both share cancels
    same = bootstrap_interval([(arms[0], arms[0])])
    assert (same.low, same.mean, same.high) == (0, 0, 0)


def test_bootstrap_interval__nothing_to_draw_from():
    assert bootstrap_interval([]) is None
    assert bootstrap_interval([([], [])]) is None
    assert bootstrap_interval([([0.1], [0.1, 0.2])]) is None
