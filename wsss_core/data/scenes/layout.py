"""Where everything in a scene stands, before one thing hides another."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from wsss_core.data.scenes.graph import Scene
from wsss_core.data.scenes.planes import Plane, Region, coordinates, smooth_noise
from wsss_core.data.scenes.shapes import Points, outline_class

PART_RATIO = 0.25
MIN_STUFF_CONTACT_RATIO = 0.37  # of the object's outline; the company may hide a quarter of it
MAX_HIDDEN_STUFF_RATIO = 0.25  # of the stuff, and of its contact with the object, by the company
OVERLAP_RATIOS = (0.02, 0.2)  # share of a touching company that lies on or under the object
COMPANY_MARGIN = 0.14  # of the side, which the company's centre keeps from the frame

_SUPERSAMPLING = 4
_COARSE = 64  # cells a side of the grid on which a spot for the company is sought


@dataclass(frozen=True)
class Layers:
    """Where everything is before one hides the other, inside the frame.

    Attributes:
        object_cover: Share of each pixel that i covers, (H, W).
        company_cover: That of j; None without company.
        part: Pixels of i that show the canvas.
        stuff: Pixels of k; never on i.
        stuff_cover: How opaque k is, (H, W).
    """

    object_cover: Plane
    company_cover: Plane | None
    part: Region
    stuff: Region
    stuff_cover: Plane

    @property
    def object(self) -> Region:
        """Pixels of i."""
        return self.object_cover >= 0.5

    @property
    def company(self) -> Region:
        """Pixels of j; none without company."""
        if self.company_cover is None:
            return np.zeros_like(self.part)
        return self.company_cover >= 0.5


def lay_out_scene(scene: Scene, *, size_px: int) -> Layers:
    """Find a place for everything: the object, then its part and stuff, then the company."""
    outline = outline_class(scene.object, pose=scene.object_pose, centre=scene.centre)
    object_cover = _cover_polygon(outline, size_px)
    shape = object_cover >= 0.5
    part = _choose_part(scene, shape)
    stuff, stuff_cover = _choose_stuff(scene, shape)
    company_cover = None
    if scene.company is not None:
        spot = _choose_company_spot(scene, scene.company, outline=outline, stuff=stuff)
        company_cover = _cover_polygon(
            outline_class(scene.company, pose=scene.company_pose, centre=spot), size_px
        )
    return Layers(object_cover, company_cover, part, stuff, stuff_cover)


def touch_ratio(shape: Region, other: Region) -> float:
    """Share of the pixels on the outline of `shape` that lie on or beside `other`.

    Beside means four neighbours; where the frame cuts the shape is no outline.
    """
    outline = shape & _grow(~shape)
    return float((outline & _grow(other)).sum() / max(outline.sum(), 1))


def _cover_polygon(outline: Points, size_px: int) -> Plane:
    fine = Image.new("L", (_SUPERSAMPLING * size_px,) * 2)
    # PIL puts integer coordinates at pixel centres
    corners = outline * _SUPERSAMPLING * size_px - 0.5
    ImageDraw.Draw(fine).polygon([(float(x), float(y)) for x, y in corners], fill=255)
    return np.asarray(fine.reduce(_SUPERSAMPLING), np.float32) / np.float32(255)


def _choose_part(scene: Scene, shape: Region) -> Region:
    """The quarter of the object that lies farthest to one side, behind a wavy border."""
    x, y = coordinates(len(shape))
    angle = scene.look.part_direction
    reach = np.cos(angle) * x + np.sin(angle) * y
    reach = reach + 0.02 * smooth_noise(scene.generator("part border"), len(shape), (8, 8))
    return _highest(reach, shape, round(PART_RATIO * shape.sum()))


def _choose_stuff(scene: Scene, shape: Region) -> tuple[Region, Plane]:
    """A ragged patch beside the object, `stuff_ratio` of its area, nearer until enough touches."""
    x, y = coordinates(len(shape))
    ragged = smooth_noise(scene.generator("stuff border"), len(shape), (7, 7))
    radius = np.sqrt(scene.object_pose.area / np.pi)
    angle = scene.look.stuff_direction
    count = round(scene.look.stuff_ratio * shape.sum())
    for distance in (0.9, 0.6, 0.3, 0.0):
        middle_x = scene.centre[0] + distance * radius * np.cos(angle)
        middle_y = scene.centre[1] + distance * radius * np.sin(angle)
        nearness = 0.12 * ragged - np.hypot(x - middle_x, y - middle_y) / radius
        chosen = _highest(nearness, ~shape, count)
        if touch_ratio(shape, chosen) >= MIN_STUFF_CONTACT_RATIO:
            break
    threshold = nearness[chosen].min()
    softness = 2 / (radius * len(shape))  # the border fades over two pixels
    return chosen, np.clip((nearness - threshold) / softness + 0.5, 0, 1)


def _choose_company_spot(
    scene: Scene, company: int, *, outline: Points, stuff: Region
) -> tuple[float, float]:
    """One of all spots where the company touches, or clears, the object and leaves stuff in sight.

    The overlap of two silhouettes at every spot is a correlation, done by FFT on a coarse grid.
    """
    middle = (0.5 + 0.5 / _COARSE,) * 2
    silhouette = outline_class(company, pose=scene.company_pose, centre=middle)
    visitor = _cover_polygon(silhouette, _COARSE) >= 0.5
    overlap = functools.partial(_overlap_everywhere, visitor=visitor)
    shape = _cover_polygon(outline, _COARSE) >= 0.5
    surroundings = _grow(_grow(shape))
    if scene.touches:
        low, high = OVERLAP_RATIOS
        share = overlap(shape) / visitor.sum()
        violation = np.maximum(low - share, 0) + np.maximum(share - high, 0)
    else:
        violation = overlap(surroundings)
    patch = np.asarray(Image.fromarray(stuff).resize((_COARSE, _COARSE)), bool)
    for region in (patch, patch & surroundings):
        hidden = overlap(region) / max(region.sum(), 1)
        violation = violation + np.maximum(hidden - MAX_HIDDEN_STUFF_RATIO, 0)
    margin = round(COMPANY_MARGIN * _COARSE)
    inside = violation[margin:-margin, margin:-margin]
    allowed = np.argwhere(inside <= inside.min())  # all without violation, or the least bad
    row, column = allowed[int(scene.look.company_spot * len(allowed))] + margin
    return (float(column) + 0.5) / _COARSE, (float(row) + 0.5) / _COARSE


def _overlap_everywhere(shape: Region, *, visitor: Region) -> NDArray[np.float64]:
    """Cells of `shape` that `visitor`, drawn about the middle, covers when moved to each cell."""
    double = (2 * _COARSE,) * 2  # zero padding, so nothing wraps round
    spectrum = np.fft.rfft2(shape, double) * np.conj(np.fft.rfft2(visitor, double))
    overlap = np.rint(np.fft.irfft2(spectrum, double))
    return np.roll(overlap, _COARSE // 2, axis=(0, 1))[:_COARSE, :_COARSE]


def _highest(score: Plane, among: Region, count: int) -> Region:
    """The `count` pixels of `among` with the highest score."""
    candidates = np.flatnonzero(among)
    order = np.argsort(-score.ravel()[candidates], kind="stable")
    chosen = np.zeros(among.size, bool)
    chosen[candidates[order[:count]]] = True
    return chosen.reshape(among.shape)


def _grow(region: Region) -> Region:
    """The region and its four neighbours."""
    grown = region.copy()
    grown[1:] |= region[:-1]
    grown[:-1] |= region[1:]
    grown[:, 1:] |= region[:, :-1]
    grown[:, :-1] |= region[:, 1:]
    return grown
