"""A study's end point as a picture: each arm less the control, every seed, the 95 % interval.

A plain SVG without a script, written beside the tables and made of the same cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from wsss_core.evaluation.paired import student_interval

LABELS, PLOT = 170, 430  # px: the arms' names, the axis
ROW, MARGIN = 26, 34  # px: height of a row, and above and below all
_STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_INK, _GAIN = "#202020", "#0072b2"


def draw_differences(differences: Mapping[str, Sequence[float]], *, title: str) -> str:
    """An SVG: a row an arm, from top to bottom as given.

    Args:
        differences: Points, a value a seed, by arm.
        title: What is compared with what.
    """
    intervals = {arm: student_interval(values) for arm, values in differences.items()}
    ends = [0.0, *(value for values in differences.values() for value in values)]
    ends += [end for i in intervals.values() if i is not None for end in (i.low, i.high)]
    step = next((s for s in _STEPS if (max(ends) - min(ends)) / s <= 10), _STEPS[-1])
    first, last = min(ends) // step, -(-max(ends) // step)
    last = max(last, first + 1)
    bottom = MARGIN + ROW * len(differences)

    def across(value: float) -> float:
        return round(LABELS + PLOT * (value / step - first) / (last - first), 1)

    parts = [f'<text x="{LABELS}" y="16" font-weight="bold">{escape(title)}</text>']
    for tick in range(int(first), int(last) + 1):
        x, label = across(tick * step), f"{tick * step:+g}" if tick else "0"
        parts.append(
            f'<path d="M{x} {MARGIN - 6}V{bottom}" stroke="{_INK if tick == 0 else "#ddd"}"/>'
            f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{label}</text>'
        )
    for number, (arm, values) in enumerate(differences.items()):
        y = MARGIN + ROW * number + ROW // 2
        parts.append(f'<text x="0" y="{y + 4}">{escape(arm)}</text>')
        parts += [
            f'<circle cx="{across(value)}" cy="{y + 7}" r="2" fill="#999"/>' for value in values
        ]
        interval = intervals[arm]
        if interval is not None:
            line = f"M{across(interval.low)} {y - 2}H{across(interval.high)}"
            parts.append(
                f'<path d="{line}" stroke="{_GAIN}" stroke-width="2"/>'
                f'<circle cx="{across(interval.mean)}" cy="{y - 2}" r="4" fill="{_GAIN}"/>'
            )
    width, height = LABELS + PLOT + 30, bottom + MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12" fill="{_INK}">'
        f'<rect width="{width}" height="{height}" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )
