import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.oracles import scores as oracle
from wsss_core.errors import DataError
from wsss_core.evaluation.confusion import confusion_matrix, mean_iou
from wsss_core.evaluation.threshold import (
    THRESHOLDS,
    build_curve,
    confusion_by_threshold,
    count_scores,
)

K = 4
small = settings(max_examples=40, deadline=None, derandomize=True)
truths = arrays(np.uint8, (4, 5), elements=st.sampled_from([0, 1, 2, 3, 255]))
# scores that equal a threshold must come out as background
levels = st.sampled_from(list(np.float32([0, 0.25, 0.3, 0.5, 0.6, 0.75, 1])))
cams = arrays(np.float32, (2, 4, 5), elements=levels)
classes = np.array([0, 2])


def count(cam, truth, thresholds):
    best = classes[cam.argmax(0)] + 1
    return count_scores(cam.max(0), best, truth, thresholds=thresholds, num_classes=K)


def test_confusion_by_threshold__counted_by_hand():
    score = np.float32([[0.1, 0.5, 0.9]])
    best = np.array([[1, 1, 2]])
    truth = np.array([[0, 1, 1]], np.uint8)
    thresholds = np.array([0.05, 0.5, 0.95])
    counts = count_scores(score, best, truth, thresholds=thresholds, num_classes=3)
    assert confusion_by_threshold(counts).tolist() == [
        [[0, 1, 0], [0, 1, 1], [0, 0, 0]],
        [[1, 0, 0], [1, 0, 1], [0, 0, 0]],
        [[1, 0, 0], [2, 0, 0], [0, 0, 0]],
    ]


@small
@given(photos=st.lists(st.tuples(cams, truths), min_size=1, max_size=3))
def test_confusion_by_threshold__equals_naive_loop(photos):
    thresholds = np.array([0.01, 0.25, 0.3, 0.31, 0.6, 0.99])
    fast = confusion_by_threshold(sum(count(cam, truth, thresholds) for cam, truth in photos))
    for index, threshold in enumerate(thresholds.astype(np.float32)):
        naive = sum(
            confusion_matrix(oracle.label_map(cam, classes, threshold), truth, num_classes=K)
            for cam, truth in photos
        )
        assert (fast[index] == naive).all()


def test_count_scores__photo_without_classes():
    truth = np.array([[0, 1, 255]], np.uint8)
    nothing = np.zeros((1, 3), np.float32)
    counts = count_scores(
        nothing, np.zeros((1, 3), np.int64), truth, thresholds=THRESHOLDS, num_classes=2
    )
    assert (confusion_by_threshold(counts) == [[1, 0], [1, 0]]).all()


def test_count_scores__other_size():
    with pytest.raises(DataError, match="p7: the mask is 3x1 px, its truth 1x1 px"):
        count_scores(
            np.zeros((1, 3), np.float32),
            np.zeros((1, 3), np.int64),
            np.zeros((1, 1), np.uint8),
            thresholds=THRESHOLDS,
            num_classes=2,
            name="p7",
        )


def test_build_curve__best_is_the_lowest_of_equals():
    score = np.float32([[0.2, 0.8]])
    truth = np.array([[0, 1]], np.uint8)
    counts = count_scores(score, np.array([[1, 1]]), truth, thresholds=THRESHOLDS, num_classes=2)
    confusions = confusion_by_threshold(counts)
    curve = build_curve(confusions, thresholds=THRESHOLDS)
    assert curve.miou_oracle == 1
    assert curve.threshold_oracle == pytest.approx(0.2)
    assert curve.miou == mean_iou(confusions).tolist()
    assert len(curve.thresholds) == 99


def test_build_curve__nothing_counted():
    curve = build_curve(np.zeros((99, 2, 2), np.int64), thresholds=THRESHOLDS)
    assert (curve.miou_oracle, curve.threshold_oracle) == (None, None)
