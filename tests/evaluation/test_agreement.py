import numpy as np
import pytest

from wsss_core.evaluation.agreement import compare_tags, find_classes

CLASSES = ("cat", "dog", "cow")


def test_find_classes__one_percent_of_the_photo():
    mask = np.zeros((10, 20), np.uint8)
    mask[0, :2] = 1  # exactly 1 %
    mask[1, :1] = 2  # speckle
    mask[2, :5] = 255
    assert find_classes(mask, num_classes=4).tolist() == [True, False, False]


def test_find_classes__nothing_is_never_found():
    mask = np.zeros((1, 1), np.uint8)
    assert find_classes(mask, num_classes=3, least_ratio=0.0).tolist() == [False, False]


def test_compare_tags__counted_by_hand():
    found = np.array([[1, 1, 0], [1, 0, 0]], bool)
    tagged = np.array([[1, 0, 0], [1, 1, 0]], bool)
    report = compare_tags(found, tagged, classes=CLASSES, stability=0.75)
    assert (report.precision, report.recall) == (2 / 3, 2 / 3)
    assert report.precision_by_class == {"cat": 1, "dog": 0, "cow": None}
    assert report.recall_by_class == {"cat": 1, "dog": 0, "cow": None}
    assert report.metrics() == {
        "tag_agreement": pytest.approx(2 / 3),
        "tag_agreement/precision": 2 / 3,
        "tag_agreement/recall": 2 / 3,
        "stability": 0.75,
    }


def test_compare_tags__nothing_found():
    report = compare_tags(np.zeros((2, 3), bool), np.eye(2, 3, dtype=bool), classes=CLASSES)
    assert report.metrics() == {"tag_agreement": 0, "tag_agreement/recall": 0}
    assert report.precision is None
