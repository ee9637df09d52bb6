"""The picture of a study: dots, intervals and zero where the numbers are."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from flows.forest import LABELS, PLOT, draw_differences
from wsss_core.evaluation.paired import student_interval

SVG = "{http://www.w3.org/2000/svg}"


def draw(values: dict[str, list[float]], title: str = "") -> ElementTree.Element:
    return ElementTree.fromstring(draw_differences(values, title=title))  # noqa: S314 - our own


def read_axis(picture: ElementTree.Element) -> tuple[float, float]:
    """Pixels of zero and of a point, from the ticks' labels."""
    ticks = {}
    for text in picture.iter(f"{SVG}text"):
        if text.get("text-anchor") == "middle":
            ticks[float(text.text)] = float(text.get("x"))
    (a, x_a), *_, (b, x_b) = ticks.items()
    point = (x_b - x_a) / (b - a)
    return x_a - a * point, point


def test_draw_differences__marks_lie_where_the_numbers_are():
    values = {"conta": [0.1, 0.4, -0.2], "pasted": [4.0, 6.5, 5.0]}
    picture = draw(values, "a < b")
    zero, point = read_axis(picture)
    circles = [(float(c.get("cx")), c.get("r") == "4") for c in picture.iter(f"{SVG}circle")]
    seeds = [(x - zero) / point for x, is_mean in circles if not is_mean]
    assert seeds == pytest.approx([*values["conta"], *values["pasted"]], abs=0.02)
    means = [(x - zero) / point for x, is_mean in circles if is_mean]
    assert means == pytest.approx([0.1, 31 / 6], abs=0.02)
    lines = [p.get("d") for p in picture.iter(f"{SVG}path") if "H" in p.get("d")]
    for line, numbers in zip(lines, values.values(), strict=True):
        ends = [float(end) for end in re.fullmatch(r"M([\d.]+) \d+H([\d.]+)", line).groups()]
        interval = student_interval(numbers)
        expected = [interval.low, interval.high]
        assert [(end - zero) / point for end in ends] == pytest.approx(expected, abs=0.02)
        assert LABELS <= ends[0] < ends[1] <= LABELS + PLOT
    assert "a < b" in [text.text for text in picture.iter(f"{SVG}text")]


@pytest.mark.parametrize("values", [{}, {"one": []}, {"one": [0.0]}, {"far": [-80.0, 90.0]}])
def test_draw_differences__odd_values_give_a_whole_picture(values):
    picture = draw(values)
    height = float(picture.get("height"))
    assert all(0 < float(c.get("cy")) < height for c in picture.iter(f"{SVG}circle"))
    assert [text.text for text in picture.iter(f"{SVG}text")].count("0") == 1
