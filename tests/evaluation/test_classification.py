import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import scores as oracle
from wsss_core.evaluation.classification import average_precision, f1_score, score_tags

small = settings(max_examples=40, deadline=None, derandomize=True)
ranked = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=20)


def test_average_precision__counted_by_hand():
    scores = np.array([0.9, 0.8, 0.7, 0.6])
    positive = np.array([True, False, True, False])
    assert average_precision(scores, positive) == pytest.approx((1 + 2 / 3) / 2)


def test_average_precision__ties_share_a_rank():
    scores = np.array([0.9, 0.5, 0.5, 0.1])
    positive = np.array([False, True, False, True])
    assert average_precision(scores, positive) == pytest.approx((1 / 3 + 2 / 4) / 2)


@pytest.mark.parametrize("num", [0, 3])
def test_average_precision__no_positive(num):
    assert np.isnan(average_precision(np.zeros(num), np.zeros(num, bool)))


@small
@given(ranked)
def test_average_precision__equals_slow_oracle(pairs):
    scores = np.array([score / 6 for score, _ in pairs])
    positive = np.array([flag for _, flag in pairs])
    if positive.any():
        expected = oracle.average_precision(scores, positive)
        assert average_precision(scores, positive) == pytest.approx(expected, rel=1e-12)


@small
@given(ranked, st.randoms())
def test_average_precision__order_of_photos_is_nothing(pairs, random):
    shuffled = random.sample(pairs, len(pairs))
    first, second = (
        average_precision(
            np.array([score / 6 for score, _ in some]), np.array([flag for _, flag in some])
        )
        for some in (pairs, shuffled)
    )
    np.testing.assert_allclose(first, second, rtol=1e-12)


def test_f1_score__counted_by_hand():
    guessed = np.array([[1, 1, 0], [0, 1, 0]], bool)
    tagged = np.array([[1, 0, 0], [1, 1, 0]], bool)
    assert f1_score(guessed, tagged) == pytest.approx(2 * 2 / (3 + 3))
    np.testing.assert_allclose(f1_score(guessed, tagged, axis=0), [2 / 3, 2 / 3, np.nan])


def test_score_tags__class_without_photo_is_named():
    probabilities = np.array([[0.9, 0.2, 0.1], [0.4, 0.7, 0.2]])
    tagged = np.array([[True, False, False], [True, True, False]])
    report = score_tags(probabilities, tagged, classes=("cat", "dog", "cow"))
    assert report.map == 1
    assert report.absent == ("cow",)
    assert report.ap == {"cat": 1, "dog": 1, "cow": None}
    assert report.f1 == pytest.approx((2 / 3 + 1) / 2)
    assert report.f1_micro == pytest.approx(4 / 5)
    assert set(report.metrics("classifier")) == {
        "classifier/map",
        "classifier/f1",
        "classifier/f1_micro",
        "classifier/ap/cat",
        "classifier/ap/dog",
    }
