import numpy as np
import pytest

from wsss_core.errors import DataError
from wsss_core.evaluation.panels import (
    PanelRow,
    draw_panel,
    heat,
    overlay,
    rank_worst,
    spread_evenly,
)

NAMES = ("background", "cat", "dog", "cow")
GREY = np.full((2, 3, 3), 100, np.uint8)


def test_overlay__background_stays_and_colours_are_voc():
    mask = np.array([[0, 1, 255], [2, 0, 0]], np.uint8)
    painted = overlay(GREY, mask, opacity=0.5)
    assert painted[0, 0].tolist() == [100, 100, 100]
    assert painted[0, 1].tolist() == [114, 50, 50]  # label 1 is (128, 0, 0)
    assert painted[1, 0].tolist() == [50, 114, 50]  # label 2 is (0, 128, 0)
    assert painted[0, 2].tolist() == [162, 162, 146]  # 255 is (224, 224, 192)
    assert painted.dtype == np.uint8
    assert (GREY == 100).all()


def test_overlay__other_size():
    with pytest.raises(DataError, match="mask of 2x3 px cannot lie over a photo of 3x2 px"):
        overlay(GREY, np.zeros((3, 2), np.uint8))


def test_heat__as_strong_as_the_score():
    score = np.array([[0, 0.5, 1], [0, 0, 0]], np.float32)
    painted = heat(GREY, score, np.ones((2, 3), np.int64))
    assert painted[0].tolist() == [[100, 100, 100], [111, 60, 60], [122, 20, 20]]


def test_spread_evenly__first_and_last_and_sorted():
    ids = [f"p{i}" for i in range(9, -1, -1)]
    assert spread_evenly(ids, num=4) == ["p0", "p3", "p6", "p9"]
    assert spread_evenly(ids, num=1) == ["p0"]
    assert spread_evenly(ids[:2], num=8) == ["p8", "p9"]
    assert spread_evenly([], num=8) == []


def test_rank_worst__ties_by_id_and_nan_left_out():
    scores = {"b": 0.2, "a": 0.2, "c": 0.1, "d": float("nan"), "e": 0.9}
    assert rank_worst(scores, num=3) == ["c", "a", "b"]
    assert rank_worst(scores, num=9) == ["c", "a", "b", "e"]


def test_draw_panel__size_and_empty_cell():
    photo = np.zeros((40, 80, 3), np.uint8)
    cells = {"CAM": photo, "pseudo-mask": photo, "segmenter": photo, "truth": None}
    row = PanelRow("p1   tags: cat", photo, cells, frozenset({0, 1, 3, 255}))
    page = draw_panel([row, row], names=NAMES, title="2 of 9 training photos")
    assert page.width <= 1600
    again = draw_panel([row, row], names=NAMES, title="2 of 9 training photos")
    assert page.tobytes() == again.tobytes()
    colours = {colour for _, colour in page.getcolors(maxcolors=page.width * page.height)}
    assert {(128, 0, 0), (128, 128, 0)} <= colours  # legend of cat and cow
    assert (0, 128, 0) not in colours  # dog does not occur


def test_draw_panel__many_classes_wrap():
    photo = np.zeros((10, 10, 3), np.uint8)
    names = ("background", *[f"a rather long class name {k}" for k in range(30)])
    few = draw_panel([PanelRow("", photo, {}, frozenset({1}))], names=names, title="")
    many = draw_panel([PanelRow("", photo, {}, frozenset(range(31)))], names=names, title="")
    assert many.width == few.width
    assert many.height > few.height
