"""The judge of thresholds, before a classifier that counts the bright pixels of an object."""

import numpy as np
import pytest

from wsss_core.evaluation.evidence import Evidence, gather_evidence, mean_evidence

SIDE = 40
GRID = np.arange(1, 19) / 20


def scene():
    """A textured square of 16 x 16 on grey, and a score that is 0.5 on its rim and falls off."""
    photo = np.full((SIDE, SIDE, 3), 128, np.uint8)
    checker = np.indices((16, 16)).sum(0) % 2 * 255
    photo[12:28, 12:28] = checker[..., None]
    away = np.abs(np.indices((SIDE, SIDE)) - 19.5).max(0) - 7.5  # 0 on the square's rim
    score = np.clip(0.5 - away / 20, 0, 1)
    return photo, score[None]


def texture(views):
    """The share of the square's texture that is sharp: blurring takes it away."""
    steps = np.abs(np.diff(views[..., 0].astype(float), axis=2)).sum((1, 2))
    whole = np.abs(np.diff(scene()[0][..., 0].astype(float), axis=1)).sum()
    return np.clip(steps / whole, 0, 1)[:, None] * np.array([[0.0, 1.0]])


def test_gather_evidence__counts_by_hand():
    photo, score = scene()
    rows = gather_evidence(photo, score, np.array([1]), texture, thresholds=[0.01, 0.49, 0.99])
    kept, removed, area = rows[0]
    assert area == pytest.approx([(score > 0.01).mean(), (16 / 40) ** 2, 0])
    assert kept[0] > 0.99
    assert kept[1] > 0.9  # the whole square, and nothing else
    assert kept[2] < 0.1
    assert removed[1] < 0.1
    assert removed[2] == 1


def test_evidence__is_most_where_the_object_ends():
    photo, score = scene()
    rows = gather_evidence(photo, score, np.array([1]), texture, thresholds=GRID.tolist())
    threshold, most = mean_evidence(rows, thresholds=GRID.tolist()).best()
    assert threshold == pytest.approx(0.45, abs=0.03)  # the last grid point below the rim's
    assert most == pytest.approx(2 - 2 * 0.16, abs=0.2)


def test_gather_evidence__a_pixel_is_one_classs_alone():
    photo, score = scene()
    two = np.concatenate([score, score / 2])
    rows = gather_evidence(photo, two, np.array([0, 1]), texture, thresholds=[0.1])
    assert rows[1, 2, 0] == 0
    assert rows[0, 2, 0] == (score > 0.1).mean()


def test_best__between_grid_points_by_a_parabola():
    grid = np.array([0.1, 0.2, 0.3])
    value = 1 - (grid - 0.22) ** 2
    zero = np.zeros(3)
    threshold, most = Evidence(grid, value - 1, zero, zero).best()
    assert threshold == pytest.approx(0.22)
    assert most == pytest.approx(1)


def test_best__at_the_end_of_the_grid_stays_there():
    grid, zero = np.array([0.1, 0.2, 0.3]), np.zeros(3)
    assert Evidence(grid, np.array([0.1, 0.2, 0.4]), zero, zero).best() == (0.3, 1.4)
