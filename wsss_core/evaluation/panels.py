"""Pictures of a round: photos beside their CAM, pseudo-mask, segmenter and truth.

Colours are VOC's palette. Everything here is deterministic: the same photos, in the same order, in
every round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Integer, UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps

from wsss_core.data.images import voc_palette
from wsss_core.errors import DataError

CELL_PX = 256  # five cells and their gaps stay below 1600 px
GAP_PX = 8
LINE_PX = 18
PAPER, INK = (255, 255, 255), (32, 32, 32)
HEAT_OPACITY = 0.8  # at score 1; the photo stays visible
COLOURS = np.array(voc_palette(), np.uint8).reshape(256, 3)


@dataclass(frozen=True)
class PanelRow:
    """What is drawn of one photo.

    Attributes:
        caption: One short line above the row.
        photo: RGB.
        cells: Column name to RGB picture of the photo's size, or None to leave the cell empty.
        labels: Mask labels that occur in the row, for the legend.
    """

    caption: str
    photo: UInt8[np.ndarray, "h w 3"]
    cells: Mapping[str, UInt8[np.ndarray, "h w 3"] | None]
    labels: frozenset[int]


def spread_evenly(ids: Sequence[str], *, num: int) -> list[str]:
    """At most `num` ids, spread over the sorted list from its first to its last."""
    ordered = sorted(ids)
    places = np.linspace(0, len(ordered) - 1, min(num, len(ordered))).round().astype(int)
    return [ordered[place] for place in places]


def overlay(
    photo: UInt8[np.ndarray, "h w 3"], mask: Integer[np.ndarray, "_ _"], *, opacity: float = 0.6
) -> UInt8[np.ndarray, "h w 3"]:
    """Lay a mask's colours over its photo; background stays as it is.

    Args:
        photo: RGB.
        mask: Label of each pixel, 0..255 (255 in VOC's cream).
        opacity: Weight of the colour, in [0, 1].

    Raises:
        DataError: If the sizes differ.
    """
    if mask.shape != photo.shape[:2]:
        raise DataError(
            f"a mask of {mask.shape[1]}x{mask.shape[0]} px cannot lie over a photo of "
            f"{photo.shape[1]}x{photo.shape[0]} px; give the mask of this photo"
        )
    return _blend(photo, COLOURS[mask], np.where(mask > 0, opacity, 0.0))


def heat(
    photo: UInt8[np.ndarray, "h w 3"],
    score: Float[np.ndarray, "h w"],
    best: Integer[np.ndarray, "h w"],
) -> UInt8[np.ndarray, "h w 3"]:
    """Lay a CAM over a grey photo: the best class's colour, as strong as its score.

    Args:
        photo: RGB.
        score: Score of the best class, in [0, 1].
        best: Its mask label.
    """
    grey = np.asarray(ImageOps.grayscale(Image.fromarray(photo)))
    return _blend(np.stack([grey] * 3, axis=-1), COLOURS[best], HEAT_OPACITY * np.clip(score, 0, 1))


def draw_panel(rows: Sequence[PanelRow], *, names: Sequence[str], title: str) -> Image.Image:
    """One picture of all rows: title, column names, cells, legend of the classes that occur.

    Args:
        rows: At least one; all with the same columns.
        names: Name of each label, background first.
        title: One line on top.
    """
    columns = ["photo", *rows[0].cells]
    width = len(columns) * (CELL_PX + GAP_PX) + GAP_PX
    heights = [max(1, _fit(row.photo).height) for row in rows]
    legend = _legend_places(rows, names=names, width=width)
    top = GAP_PX + 2 * LINE_PX
    bottom = top + sum(height + LINE_PX + GAP_PX for height in heights)
    page = Image.new("RGB", (width, bottom + (legend[-1][2] + LINE_PX if legend else 0)), PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default()
    draw.text((GAP_PX, GAP_PX), title, INK, font)
    for index, column in enumerate(columns):
        draw.text((_left(index), GAP_PX + LINE_PX), column, INK, font)
    for row, height in zip(rows, heights, strict=True):
        draw.text((GAP_PX, top), row.caption, INK, font)
        for index, cell in enumerate([row.photo, *row.cells.values()]):
            if cell is not None:
                page.paste(_fit(cell), (_left(index), top + LINE_PX))
        top += height + LINE_PX + GAP_PX
    for label, left, down in legend:
        red, green, blue = (int(part) for part in COLOURS[label])
        draw.rectangle((left, bottom + down, left + 10, bottom + down + 10), (red, green, blue))
        draw.text((left + 14, bottom + down), names[label], INK, font)
    return page


def shade(
    field: Float[np.ndarray, "a b"], size: tuple[int, int], *, top: float | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """A map over the whole picture in grey, its cells as blocks; black is 0.

    Args:
        field: Not negative; its cells cover the picture evenly.
        size: (H, W) to draw it at, in pixels.
        top: The value that is white; None for the map's own largest.
    """
    white = max(float(field.max()) if top is None else top, 1e-12)
    grey = (np.clip(field / white, 0, 1) * 255).round().astype(np.uint8)
    picture = Image.fromarray(grey).resize((size[1], size[0]), Image.Resampling.NEAREST)
    return np.asarray(picture.convert("RGB"))


def draw_sheet(
    pictures: Mapping[str, UInt8[np.ndarray, "h w 3"]], *, title: str, columns: int = 5
) -> Image.Image:
    """Pictures of one size in a grid, each below its name.

    Args:
        pictures: At least one; name to RGB.
        title: One line on top.
        columns: Pictures a row.
    """
    columns = min(columns, len(pictures))
    height, width, _ = next(iter(pictures.values())).shape
    rows = -(-len(pictures) // columns)
    size = (
        GAP_PX + columns * (width + GAP_PX),
        GAP_PX + LINE_PX + rows * (LINE_PX + height + GAP_PX),
    )
    page = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default()
    draw.text((GAP_PX, GAP_PX), title, INK, font)
    for index, (name, picture) in enumerate(pictures.items()):
        left = GAP_PX + index % columns * (width + GAP_PX)
        top = GAP_PX + LINE_PX + index // columns * (LINE_PX + height + GAP_PX)
        draw.text((left, top), name, INK, font)
        page.paste(Image.fromarray(picture), (left, top + LINE_PX))
    return page


def rank_worst(scores: Mapping[str, float], *, num: int) -> list[str]:
    """The `num` ids of lowest score, worst first, ties by id; NaN is no score."""
    scored = [(score, name) for name, score in scores.items() if not np.isnan(score)]
    return [name for _, name in sorted(scored)[:num]]


def _blend(below: np.ndarray, colour: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    weight = opacity[..., None].astype(np.float32)
    return (below * (1 - weight) + colour * weight).round().astype(np.uint8)


def _fit(picture: np.ndarray) -> Image.Image:
    return ImageOps.contain(Image.fromarray(picture), (CELL_PX, CELL_PX))


def _left(column: int) -> int:
    return GAP_PX + column * (CELL_PX + GAP_PX)


def _legend_places(
    rows: Sequence[PanelRow], *, names: Sequence[str], width: int
) -> list[tuple[int, int, int]]:
    """(label, left, down) of each legend entry, wrapped at the page's width."""
    font = ImageFont.load_default()
    places, left, down = [], GAP_PX, 0
    for label in sorted(frozenset().union(*(row.labels for row in rows))):
        if not 0 < label < len(names):
            continue
        wide = int(font.getlength(names[label])) + 14 + 2 * GAP_PX
        if left > GAP_PX and left + wide > width:
            left, down = GAP_PX, down + LINE_PX
        places.append((label, left, down))
        left += wide
    return places
