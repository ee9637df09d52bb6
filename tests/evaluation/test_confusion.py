import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.oracles import scores as oracle
from wsss_core.errors import DataError
from wsss_core.evaluation.confusion import (
    class_iou,
    class_precision,
    class_recall,
    confusion_matrix,
    mean_iou,
)

K = 4
small = settings(max_examples=40, deadline=None, derandomize=True)
labels = st.sampled_from([0, 1, 2, 3, 255])
maps = arrays(np.uint8, (5, 7), elements=labels)

PREDICTED = np.array([[0, 1, 1], [0, 2, 0]], np.uint8)
TRUTH = np.array([[0, 1, 0], [1, 2, 255]], np.uint8)


def test_confusion_matrix__counted_by_hand():
    counts = confusion_matrix(PREDICTED, TRUTH, num_classes=K)
    assert counts.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert counts.dtype == np.int64


def test_class_iou__absent_class_is_nan():
    iou = class_iou(confusion_matrix(PREDICTED, TRUTH, num_classes=K))
    np.testing.assert_array_equal(iou, [1 / 3, 1 / 3, 1, np.nan])


def test_mean_iou__absent_class_is_left_out():
    counts = confusion_matrix(PREDICTED, TRUTH, num_classes=K)
    assert mean_iou(counts) == pytest.approx((1 / 3 + 1 / 3 + 1) / 3)
    assert mean_iou(counts, labels=[0, 2, 3]) == pytest.approx((1 / 3 + 1) / 2)


def test_mean_iou__class_only_predicted_counts_as_zero():
    truth = np.zeros((2, 3), np.uint8)
    predicted = np.array([[0, 0, 0], [0, 0, 3]], np.uint8)
    counts = confusion_matrix(predicted, truth, num_classes=K)
    assert mean_iou(counts) == pytest.approx((5 / 6 + 0) / 2)
    assert np.isnan(class_recall(counts)[3])
    assert class_precision(counts)[3] == 0


def test_class_precision__over_and_under_activation():
    truth = np.array([[1, 1, 0], [2, 2, 0]], np.uint8)
    predicted = np.array([[1, 1, 1], [2, 0, 0]], np.uint8)
    counts = confusion_matrix(predicted, truth, num_classes=3)
    assert class_precision(counts).tolist() == [1 / 2, 2 / 3, 1]
    assert class_recall(counts).tolist() == [1 / 2, 1, 1 / 2]


def test_mean_iou__everything_void():
    truth = np.full((2, 3), 255, np.uint8)
    counts = confusion_matrix(PREDICTED, truth, num_classes=K)
    assert counts.sum() == 0
    assert np.isnan(mean_iou(counts))


def test_mean_iou__empty_masks():
    empty = np.zeros((2, 3), np.uint8)
    assert mean_iou(confusion_matrix(empty, empty, num_classes=K)) == 1
    assert mean_iou(confusion_matrix(empty, TRUTH, num_classes=K)) == pytest.approx(2 / 5 / 3)


def test_confusion_matrix__predicted_void_is_background():
    predicted = np.array([[255, 1]], np.uint8)
    counts = confusion_matrix(predicted, np.array([[0, 1]], np.uint8), num_classes=2)
    assert counts.tolist() == [[1, 0], [0, 1]]
    assert predicted[0, 0] == 255


def test_confusion_matrix__other_size():
    with pytest.raises(DataError, match=r"^dog/7: the mask is 2x3 px, its truth 3x2 px"):
        confusion_matrix(PREDICTED.T, TRUTH, num_classes=K, name="dog/7")


@pytest.mark.parametrize(("which", "found"), [("mask", 9), ("truth", 9)])
def test_confusion_matrix__stray_label(which, found):
    stray = TRUTH.copy()
    stray[0, 0] = found
    pair = (stray, TRUTH) if which == "mask" else (TRUTH, stray)
    with pytest.raises(DataError, match=rf"^a: the {which} holds label 9; expected 0\.\.3 or 255"):
        confusion_matrix(*pair, num_classes=K, name="a")


def test_confusion_matrix__more_pixels_than_int32():
    counts = confusion_matrix(TRUTH, TRUTH, num_classes=K) * 2**40
    assert mean_iou(counts) == 1


@small
@given(predicted=maps, truth=maps)
def test_confusion_matrix__ignored_pixels_never_count(predicted, truth):
    counts = confusion_matrix(predicted, truth, num_classes=K)
    assert counts.sum() == (truth != 255).sum()
    other = np.where(truth == 255, 77, predicted)
    assert (confusion_matrix(other, truth, num_classes=K) == counts).all()


@small
@given(predicted=maps, truth=maps, order=st.permutations(range(1, K)))
def test_class_iou__permuting_classes_permutes_iou(predicted, truth, order):
    renamed = np.arange(256)
    renamed[1:K] = order
    iou = class_iou(confusion_matrix(predicted, truth, num_classes=K))
    moved = class_iou(confusion_matrix(renamed[predicted], renamed[truth], num_classes=K))
    np.testing.assert_array_equal(moved[renamed[:K]], iou)


@small
@given(pairs=st.lists(st.tuples(maps, maps), min_size=1, max_size=3))
def test_mean_iou__equals_slow_oracle(pairs):
    counts = sum(confusion_matrix(*pair, num_classes=K) for pair in pairs)
    expected = [np.nan if v is None else v for v in oracle.iou_by_class(pairs, K)]
    np.testing.assert_allclose(class_iou(counts), expected, rtol=1e-15)
    if counts.sum():
        assert mean_iou(counts) == pytest.approx(oracle.mean_iou(pairs, K), rel=1e-14)
