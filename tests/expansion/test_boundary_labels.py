"""Confident labels: the merge by hand, and both thresholds without a CRF's kernels."""

import numpy as np
import pytest

from wsss_core.config import CrfConfig, parse_config
from wsss_core.expansion.boundary_labels import choose_settings, label_confidently, merge_labels

NO_KERNELS = CrfConfig(gaussian_compat=0, bilateral_compat=0)


def test_merge_labels__by_hand():
    foreground = np.array([[3, 3, 0, 0, 5]], np.uint8)
    background = np.array([[3, 0, 3, 0, 3]], np.uint8)
    assert merge_labels(foreground, background).tolist() == [[3, 3, 255, 0, 5]]
    assert merge_labels(foreground, background).dtype == np.uint8


def settings(**irn):
    config = parse_config({"expansion": {"irn": irn, "crf": NO_KERNELS.model_dump()}})
    return choose_settings(config)


def test_label_confidently__between_the_thresholds_nothing_is_said():
    scores = np.array([[[0.0, 0.04, 0.06, 0.29, 0.31, 1.0]], [[0.0, 0.0, 0.2, 0.0, 0.4, 0.0]]])
    photo = np.zeros((1, 6, 3), np.uint8)
    labels = label_confidently(photo, scores, np.array([4, 6]), settings())
    assert labels.tolist() == [[0, 0, 255, 255, 7, 5]]
    labels = label_confidently(photo, scores, np.array([4, 6]), settings(foreground=0.15))
    assert labels.tolist() == [[0, 0, 7, 5, 7, 5]]


def test_label_confidently__photo_without_a_class_is_background():
    photo, scores = np.zeros((2, 3, 3), np.uint8), np.zeros((0, 2, 3), np.float32)
    labels = label_confidently(photo, scores, np.zeros(0, np.int64), settings())
    assert labels.tolist() == [[0, 0, 0], [0, 0, 0]]
    assert labels.dtype == np.uint8


def test_label_confidently__the_crf_follows_the_colours():
    """Half of a bright square is seeded: its other half, unsure by the seeds, becomes sure."""
    photo = np.zeros((24, 24, 3), np.uint8)
    photo[6:18, 6:18] = 200
    scores = np.zeros((1, 24, 24), np.float32)
    scores[0, 6:18, 6:18], scores[0, 6:18, 6:13] = 0.1, 0.8
    config = parse_config({"expansion": {"crf": {"bilateral_sxy": 20}}})
    labels = label_confidently(photo, scores, np.array([0]), choose_settings(config))
    without = label_confidently(photo, scores, np.array([0]), settings())
    assert (without[6:18, 13:18] == 255).all()
    assert (labels[6:18, 13:18] == 1).mean() > 0.9
    assert (labels[:4] == 0).all()


def test_choose_settings__of_irns_code():
    found = choose_settings(parse_config({}))
    assert (found["foreground"], found["background"], found["confidence"]) == (0.30, 0.05, 0.7)
    assert found["crf"] == CrfConfig()


@pytest.mark.parametrize(
    ("pair", "threshold", "found"),
    [
        (("auto", "auto"), 0.45, (0.55, 0.35)),
        ((0.3, "auto"), 0.45, (0.3, 0.3)),
        (("auto", 0.3), 0.1, (0.3, 0.3)),
        (("auto", 0.05), 0.2, (0.3, 0.05)),
    ],
)
def test_choose_settings__auto_stops_at_the_number_beside_it(pair, threshold, found):
    irn = dict(zip(("foreground", "background"), pair, strict=True))
    config = parse_config({"seeds": {"threshold": threshold}, "expansion": {"irn": irn}})
    chosen = choose_settings(config)
    assert (chosen["foreground"], chosen["background"]) == found


@pytest.mark.parametrize("name", ["threshold", "radius", "beta"])
def test_choose_settings__knows_nothing_of_the_walk(name):
    assert name not in choose_settings(parse_config({}))
