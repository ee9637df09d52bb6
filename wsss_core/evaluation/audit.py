"""Does a class answer for its company? Leaks, the gap that company makes, and a picture of both.

    leak(i <- j) = share of i's mass on j's true pixels, over the photos tagged i and j
    gap(i)       = IoU of i over the photos where it is alone - IoU where it has company

A mass is whatever puts a class somewhere: its rectified CAM, or the pixels that a mask gives it.
Counts are summed over photos before they are divided, as in `confusion`; pixels whose truth is
`IGNORE_INDEX` are left out. In scenes it is also known which pixels are stuff that comes with the
object, and which part of the object shows the canvas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Float64, Int64, Integer
from PIL import Image, ImageDraw, ImageFont
from pydantic import BaseModel, ConfigDict

from wsss_core.evaluation.confusion import ratio
from wsss_core.evaluation.report import optional
from wsss_core.records import IGNORE_INDEX

MIN_PHOTOS = 5
"""Photos that a pair must share before it is named among the worst: one photo is an anecdote."""

WORST_PAIRS = 5
SHOWN_CLASSES = 24  # a larger matrix cannot be read; the worst classes are shown
WORDS = {"cam": "CAM", "pseudo": "pseudo-mask", "seg": "segmented area"}

_CELL_PX, _GAP_PX, _LINE_PX, _BAR_PX, _NAME_PX = 26, 12, 14, 120, 110
_PAPER, _INK, _GRID = (255, 255, 255), (32, 32, 32), (228, 228, 228)
_LEAK, _ALONE, _COMPANY = (200, 40, 30), (90, 130, 190), (230, 150, 50)


class Leaks:
    """Running counts of leak(i <- j) for one kind of mass over n classes."""

    def __init__(self, num_classes: int) -> None:
        shape = (num_classes, num_classes)
        self._on, self._of = np.zeros(shape), np.zeros(shape)
        self.photos: Int64[np.ndarray, "n n"] = np.zeros(shape, np.int64)

    def add(self, tags: Sequence[int], masses: Float[np.ndarray, "k labels"]) -> None:
        """Count a photo.

        Args:
            tags: Its foreground classes, 0-based.
            masses: `mass_by_label` of each tag, in the same order.
        """
        for i, mass in zip(tags, masses, strict=True):
            for j in tags:
                if i != j:
                    self._on[i, j] += mass[j + 1]
                    self._of[i, j] += mass.sum()
                    self.photos[i, j] += 1

    def matrix(self) -> Float64[np.ndarray, "n n"]:
        """leak(i <- j), rows i, in [0, 1]; NaN where no photo shows both or i has no mass."""
        return ratio(self._on, self._of)

    def overall(self) -> float:
        """Over all pairs, the share of i's mass in photos of i and j that is on j; NaN for no pair.

        A class with two companions counts once with each, so its leaks are averaged, not added.
        """
        return float(ratio(self._on.sum(), self._of.sum()))


class Gaps:
    """Running counts of each class's IoU alone and in company."""

    def __init__(self, num_classes: int) -> None:
        self._alone, self._company = np.zeros((2, 3, num_classes))

    def add(self, tags: Sequence[int], counts: Int64[np.ndarray, "3 labels"]) -> None:
        """Count a photo by its `class_counts`."""
        total = self._alone if len(tags) == 1 else self._company
        for tag in tags:
            total[:, tag] += counts[:, tag + 1]

    def alone(self) -> Float64[np.ndarray, " n"]:
        """IoU of each class over the photos tagged with it alone; NaN if there are none."""
        return _iou(self._alone)

    def company(self) -> Float64[np.ndarray, " n"]:
        """IoU of each class over the photos tagged with it and another; NaN if there are none."""
        return _iou(self._company)

    def overall(self) -> float:
        """Mean of alone - company over the classes that have both; NaN if none has."""
        gaps = self.alone() - self.company()
        return float(ratio(np.nansum(gaps), np.sum(~np.isnan(gaps))))


@dataclass
class Shares:
    """A running share: of a whole, how much was the part."""

    part: float = 0.0
    whole: float = 0.0

    def add(self, part: float, whole: float) -> None:
        """Count a photo."""
        self.part, self.whole = self.part + part, self.whole + whole

    def value(self) -> float:
        """In [0, 1]; NaN if there was no whole."""
        return float(ratio(self.part, self.whole))


def class_counts(confusion: Int64[np.ndarray, "k k"]) -> Int64[np.ndarray, "3 k"]:
    """Hit, true and predicted pixels of each label: what an IoU is made of, and may be summed."""
    return np.stack([confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)])


def mass_by_label(
    weights: Float[np.ndarray, "k h w"],
    truth: Integer[np.ndarray, "h w"],
    *,
    num_labels: int,
) -> Float64[np.ndarray, "k {num_labels}"]:
    """How much of each map lies on the pixels of each label.

    Args:
        weights: Not negative.
        truth: Label of each pixel, below `num_labels`, or `IGNORE_INDEX`: not counted.
        num_labels: Number of labels, background included.
    """
    counted = truth != IGNORE_INDEX
    labels = truth[counted].astype(np.int64)
    masses = np.zeros((len(weights), num_labels))
    for mass, weight in zip(masses, weights, strict=True):
        mass[:] = np.bincount(labels, weights=weight[counted], minlength=num_labels)
    return masses


class Audit(BaseModel):
    """What an audit found on one split; a number that does not exist is None.

    Attributes:
        split: The split's name.
        photos: Photos counted, those with a true mask.
        classes: Foreground names, the order of every row and column.
        pairs: Photos tagged i and j.
        leaks: leak(i <- j) by kind of mass (`cam`, `pseudo`, `seg`), rows i.
        alone: IoU of each class where it is alone, by kind of mask.
        company: The same where it has company.
        overall: Flat numbers of the whole split: `leak_<kind>`, `gap_<kind>`, and in scenes
            `stuff_<kind>`, `stuff_untied_<kind>`, `part_<kind>`, `object_<kind>`.
        worst: The pairs that leak most, in words.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    split: str
    photos: int
    classes: tuple[str, ...]
    pairs: list[list[int]]
    leaks: dict[str, list[list[float | None]]]
    alone: dict[str, list[float | None]]
    company: dict[str, list[float | None]]
    overall: dict[str, float | None]
    worst: list[str]

    def metrics(self) -> dict[str, float]:
        """`audit/leak_cam` and so on; `audit_<split>/...` for a split that is not trained on."""
        prefix = "audit" if self.split == "train" else f"audit_{self.split}"
        return {f"{prefix}/{name}": v for name, v in self.overall.items() if v is not None}


@dataclass(frozen=True)
class Counts:
    """Everything that is counted for one kind of mass.

    Attributes:
        leaks: On the company.
        gaps: None for a kind without labels, a CAM.
        scenes: Shares that only a known graph can give, by name.
    """

    leaks: Leaks
    gaps: Gaps | None
    scenes: dict[str, Shares] = field(default_factory=dict)


def build_audit(
    counts: Mapping[str, Counts], *, classes: Sequence[str], split: str, photos: int
) -> Audit:
    """Turn counts into an audit.

    Args:
        counts: By kind of mass, at least one.
        classes: Foreground names.
        split: The split's name.
        photos: Photos behind the counts.
    """
    overall: dict[str, float] = {}
    for kind, count in counts.items():
        overall[f"leak_{kind}"] = count.leaks.overall()
        if count.gaps is not None:
            overall[f"gap_{kind}"] = count.gaps.overall()
        overall |= {f"{name}_{kind}": shares.value() for name, shares in count.scenes.items()}
    gaps = {kind: count.gaps for kind, count in counts.items() if count.gaps is not None}
    pairs = next(iter(counts.values())).leaks.photos
    leaks = {kind: count.leaks.matrix() for kind, count in counts.items()}
    return Audit(
        split=split,
        photos=photos,
        classes=tuple(classes),
        pairs=pairs.tolist(),
        leaks={kind: [_optionals(row) for row in matrix] for kind, matrix in leaks.items()},
        alone={kind: _optionals(gap.alone()) for kind, gap in gaps.items()},
        company={kind: _optionals(gap.company()) for kind, gap in gaps.items()},
        overall={name: optional(value) for name, value in overall.items()},
        worst=name_worst(leaks, pairs, classes=classes),
    )


def name_worst(
    leaks: Mapping[str, Float[np.ndarray, "n n"]],
    pairs: Int64[np.ndarray, "n n"],
    *,
    classes: Sequence[str],
) -> list[str]:
    """The pairs that leak most, worst first, in words; those of fewer photos are left out."""
    found = [
        (leak, kind, i, j)
        for kind, matrix in leaks.items()
        for (i, j), leak in np.ndenumerate(matrix)
        if pairs[i, j] >= MIN_PHOTOS and leak > 0  # false for NaN too
    ]
    found.sort(key=lambda item: -item[0])
    return [
        f"{100 * leak:.0f} % of the {WORDS[kind]} of {classes[i]} lies on {classes[j]} "
        f"({pairs[i, j]} photos)"
        for leak, kind, i, j in found[:WORST_PAIRS]
    ]


def name_drops(drops: Sequence[Sequence[Shares]], *, classes: Sequence[str]) -> list[str]:
    """The pairs whose class i loses most where j is blurred, worst first, in words.

    Args:
        drops: Running means of the lost probability; rows i, columns j.
        classes: Foreground names.
    """
    found = [
        (drop.value(), int(drop.whole), i, j)
        for i, row in enumerate(drops)
        for j, drop in enumerate(row)
        if i != j and drop.whole >= MIN_PHOTOS and drop.part > 0
    ]
    found.sort(key=lambda item: -item[0])
    return [
        f"{classes[i]} loses {100 * drop:.0f} points of probability where {classes[j]} is blurred "
        f"({photos} photos)"
        for drop, photos, i, j in found[:WORST_PAIRS]
    ]


def draw_audit(audit: Audit, *, title: str) -> Image.Image:
    """One picture: a matrix of leaks for each kind of mass, bars of IoU, the worst pairs in words.

    Rows are the class that leaks, columns its company by number. The bars are those of the first
    kind that has labels.
    """
    shown = _choose_classes(audit)
    kinds, side = list(audit.leaks), len(shown) * _CELL_PX
    bars_kind = next(iter(audit.alone), None)
    top = 2 * _GAP_PX + 2 * _LINE_PX
    width = _NAME_PX + _GAP_PX + len(kinds) * (side + _GAP_PX) + _BAR_PX + 2 * _GAP_PX
    words = [*audit.worst] or ["no pair of classes leaks"]
    width = max(width, 620)
    page = Image.new("RGB", (width, top + side + 2 * _GAP_PX + _LINE_PX * len(words)), _PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default()
    draw.text((_GAP_PX, _GAP_PX // 2), title, _INK, font)
    for row, i in enumerate(shown):
        text = f"{i + 1} {audit.classes[i]}"
        draw.text((_GAP_PX, top + row * _CELL_PX + 7), text[:18], _INK, font)
    left = _NAME_PX + _GAP_PX
    for kind in kinds:
        _draw_matrix(draw, audit, kind, shown=shown, place=(left, top))
        left += side + _GAP_PX
    if bars_kind is not None:
        _draw_bars(draw, audit, bars_kind, shown=shown, place=(left, top))
    for line, text in enumerate(words):
        draw.text((_GAP_PX, top + side + _GAP_PX + line * _LINE_PX), text, _INK, font)
    return page


def _draw_matrix(
    draw: ImageDraw.ImageDraw,
    audit: Audit,
    kind: str,
    *,
    shown: Sequence[int],
    place: tuple[int, int],
) -> None:
    """Cells as dark as the leak, with its per cent; pairs that no photo shows stay white."""
    left, top = place
    font = ImageFont.load_default()
    draw.text((left, top - 2 * _LINE_PX - 4), f"leak of {WORDS[kind]}, %", _INK, font)
    for column, j in enumerate(shown):
        draw.text((left + column * _CELL_PX + 8, top - _LINE_PX), str(j + 1), _INK, font)
        for row, i in enumerate(shown):
            x, y = left + column * _CELL_PX, top + row * _CELL_PX
            leak = audit.leaks[kind][i][j]
            fill = _PAPER if leak is None else _fade(_LEAK, min(1.0, 2 * leak))
            draw.rectangle((x, y, x + _CELL_PX - 2, y + _CELL_PX - 2), fill, _GRID)
            if leak is not None:
                draw.text((x + 6, y + 7), f"{100 * leak:.0f}", _INK, font)


def _draw_bars(
    draw: ImageDraw.ImageDraw,
    audit: Audit,
    kind: str,
    *,
    shown: Sequence[int],
    place: tuple[int, int],
) -> None:
    """IoU of each class alone and in company, two bars a row; the frame ends at 1."""
    left, top = place
    font = ImageFont.load_default()
    draw.text((left, top - 2 * _LINE_PX - 4), f"IoU of {WORDS[kind]}", _INK, font)
    draw.text((left, top - _LINE_PX), "alone", _ALONE, font)
    draw.text((left + 40, top - _LINE_PX), "in company", _COMPANY, font)
    for row, i in enumerate(shown):
        y = top + row * _CELL_PX
        draw.rectangle((left, y, left + _BAR_PX, y + _CELL_PX - 2), None, _GRID)
        values = ((audit.alone[kind][i], _ALONE), (audit.company[kind][i], _COMPANY))
        for line, (value, colour) in enumerate(values):
            if value is not None:
                down = y + 2 + line * 11
                draw.rectangle((left, down, left + round(_BAR_PX * value), down + 9), colour)


def _choose_classes(audit: Audit) -> list[int]:
    """At most `SHOWN_CLASSES` classes, those in the worst leaks, in their own order."""
    matrices = [
        np.array(matrix, float).reshape(len(audit.classes), -1) for matrix in audit.leaks.values()
    ]
    worst = np.nan_to_num(np.max([np.nan_to_num(m) for m in matrices], axis=0))
    rank = np.maximum(worst.max(axis=0), worst.max(axis=1))
    return sorted(np.argsort(-rank, kind="stable")[:SHOWN_CLASSES].tolist())


def _fade(colour: tuple[int, int, int], strength: float) -> tuple[int, int, int]:
    red, green, blue = (round(255 + (part - 255) * strength) for part in colour)
    return red, green, blue


def _iou(counts: Float64[np.ndarray, "3 n"]) -> Float64[np.ndarray, " n"]:
    hits, true, guess = counts
    return ratio(hits, true + guess - hits)


def _optionals(values: np.ndarray) -> list[float | None]:
    return [optional(value) for value in values]
