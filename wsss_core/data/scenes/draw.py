"""From a scene to its picture, its truth and the role of each pixel.

Shapes: H, W are the picture's size in pixels, a square. Colours and covers are float32 in [0, 1].
"""

from __future__ import annotations

import colorsys
import functools
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from wsss_core.data.scenes.graph import Pose, Scene
from wsss_core.data.scenes.shapes import (
    CANVAS_SURFACES,
    CLASS_TEXTURE_CONTRAST,
    CLASS_TEXTURES,
    STUFF_SURFACES,
    Hsv,
    Plane,
    Points,
    outline_class,
    weave_texture,
)

ROLES = ("background", "object", "part", "company", "stuff")
"""What a pixel is in the graph: the canvas; i; the part of i that shows the canvas; j; k. The index is the map's id."""

PART_RATIO = 0.25
MIN_STUFF_CONTACT_RATIO = 0.35  # of the object's outline; the company may hide some of it afterwards

Region: TypeAlias = NDArray[np.bool_]
Photo: TypeAlias = NDArray[np.float32]

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


@dataclass(frozen=True)
class DrawnScene:
    """A finished scene.

    Attributes:
        photo: uint8 (H, W, 3), RGB.
        truth: uint8 (H, W): 0 background, else class + 1. No pixel is void.
        roles: uint8 (H, W), indices of `ROLES`.
        layers: What lies under each other.
    """

    photo: NDArray[np.uint8]
    truth: NDArray[np.uint8]
    roles: NDArray[np.uint8]
    layers: Layers


def draw_scene(scene: Scene, *, size_px: int) -> DrawnScene:
    """Draw a scene; equal scenes of equal size give equal pixels."""
    layers = lay_out_scene(scene, size_px=size_px)
    truth = np.zeros((size_px, size_px), np.uint8)
    roles = np.where(layers.stuff, np.uint8(ROLES.index("stuff")), truth)
    for who in _back_to_front(scene):
        if who == "object":
            truth[layers.object] = scene.object + 1
            roles[layers.object] = ROLES.index("object")
            roles[layers.part] = ROLES.index("part")
        elif scene.company is not None:
            truth[layers.company] = scene.company + 1
            roles[layers.company] = ROLES.index("company")
    photo = (255 * _paint(scene, layers) + 0.5).astype(np.uint8)
    return DrawnScene(photo, truth, roles, layers)


def lay_out_scene(scene: Scene, *, size_px: int) -> Layers:
    """Find a place for everything: the object first, then its part and stuff, then the company around them."""
    outline = outline_class(scene.object, pose=scene.object_pose, centre=scene.centre)
    object_cover = _cover_polygon(outline, size_px)
    shape = object_cover >= 0.5
    part = _choose_part(scene, shape)
    stuff, stuff_cover = _choose_stuff(scene, shape)
    company_cover = None
    if scene.company is not None:
        spot = _choose_company_spot(scene, outline, stuff)
        company_cover = _cover_polygon(
            outline_class(scene.company, pose=scene.company_pose, centre=spot), size_px
        )
    return Layers(object_cover, company_cover, part, stuff, stuff_cover)


def touch_ratio(shape: Region, other: Region) -> float:
    """Share of the outline pixels of `shape` that have one of `other` beside them (four neighbours, in the frame)."""
    outline = shape & _grow(~shape)
    return float((outline & _grow(other)).sum() / max(outline.sum(), 1))


def _back_to_front(scene: Scene) -> tuple[str, str]:
    return ("object", "company") if scene.look.company_in_front else ("company", "object")


# Layout


def _cover_polygon(outline: Points, size_px: int) -> Plane:
    fine = Image.new("L", (_SUPERSAMPLING * size_px,) * 2)
    # PIL puts integer coordinates at pixel centres
    corners = outline * _SUPERSAMPLING * size_px - 0.5
    ImageDraw.Draw(fine).polygon([(float(x), float(y)) for x, y in corners], fill=255)
    return np.asarray(fine.reduce(_SUPERSAMPLING), np.float32) / 255


def _choose_part(scene: Scene, shape: Region) -> Region:
    """The quarter of the object that lies farthest to one side, behind a wavy border."""
    x, y = _coordinates(len(shape))
    angle = scene.look.part_direction
    reach = np.cos(angle) * x + np.sin(angle) * y
    reach = reach + 0.02 * _smooth_noise(scene.generator("part border"), len(shape), (8, 8))
    return _highest(reach, shape, round(PART_RATIO * shape.sum()))


def _choose_stuff(scene: Scene, shape: Region) -> tuple[Region, Plane]:
    """A ragged patch beside the object: exactly `stuff_ratio` of its area, nearer until enough of it touches."""
    x, y = _coordinates(len(shape))
    ragged = _smooth_noise(scene.generator("stuff border"), len(shape), (7, 7))
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


def _choose_company_spot(scene: Scene, outline: Points, stuff: Region) -> tuple[float, float]:
    """One of all spots where the company touches (or clears) the object and leaves the stuff's contact in sight.

    The overlap of the two silhouettes at every spot at once is a correlation, done by FFT on a coarse grid.
    """
    if scene.company is None:
        raise AssertionError("no company to place")
    middle = (0.5 + 0.5 / _COARSE,) * 2
    company = outline_class(scene.company, pose=scene.company_pose, centre=middle)
    shape = _cover_polygon(outline, _COARSE) >= 0.5
    visitor = _cover_polygon(company, _COARSE) >= 0.5
    patch = np.asarray(Image.fromarray(stuff).resize((_COARSE, _COARSE)), bool)
    contact = patch & _grow(_grow(shape))
    hidden = _overlap_everywhere(contact, visitor) / max(contact.sum(), 1)
    violation = np.maximum(hidden - 0.35, 0)
    if scene.touches:
        overlap = _overlap_everywhere(shape, visitor) / visitor.sum()
        violation += np.maximum(0.02 - overlap, 0) + np.maximum(overlap - 0.2, 0)
    else:
        violation += _overlap_everywhere(_grow(_grow(shape)), visitor)
    margin = round(0.14 * _COARSE)
    inside = np.full_like(violation, np.inf)
    inside[margin:-margin, margin:-margin] = violation[margin:-margin, margin:-margin]
    allowed = np.flatnonzero(inside <= inside.min())
    row, column = divmod(int(allowed[int(scene.look.company_spot * len(allowed))]), _COARSE)
    return (column + 0.5) / _COARSE, (row + 0.5) / _COARSE


def _overlap_everywhere(shape: Region, visitor: Region) -> NDArray[np.float64]:
    """Cells of `shape` that `visitor`, drawn about the middle cell, would cover with its middle at each cell."""
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


# Paint


def _paint(scene: Scene, layers: Layers) -> Photo:
    """The picture in [0, 1], (H, W, 3)."""
    size_px = len(layers.part)
    canvas = _paint_canvas(scene, size_px)
    photo = _blend(canvas, _paint_stuff(scene, size_px), layers.stuff_cover)
    for who in _back_to_front(scene):
        if who == "object":
            body = _paint_class(scene, scene.object, scene.object_pose, size_px)
            mirror = _blur(layers.part.astype(np.float32), 0.6)
            body = _blend(body, canvas[:, ::-1], mirror)
            photo = _put_solid(photo, body, layers.object_cover, scene)
        elif scene.company is not None and layers.company_cover is not None:
            body = _paint_class(scene, scene.company, scene.company_pose, size_px)
            photo = _put_solid(photo, body, layers.company_cover, scene)
    return _expose(photo, scene)


def _paint_canvas(scene: Scene, size_px: int) -> Photo:
    surface = CANVAS_SURFACES[scene.canvas]
    generator = scene.generator("canvas paint")
    slope, hue = generator.uniform(-0.25, 0.25), generator.uniform(-0.03, 0.03)
    x, y = _coordinates(size_px)
    woven = weave_texture(
        surface.texture, x=x, y=y, noise=_smooth_noise(generator, size_px, surface.texture.grain)
    )
    height = 1 - y + slope * (x - 0.5) + 0.1 * _smooth_noise(generator, size_px, (4, 4))
    return _mix(surface.dark, surface.light, 0.7 * height + 0.35 * (woven - 0.2), hue)


def _paint_stuff(scene: Scene, size_px: int) -> Photo:
    surface = STUFF_SURFACES[scene.stuff]
    generator = scene.generator("stuff paint")
    hue = generator.uniform(-0.02, 0.02)
    x, y = _coordinates(size_px)
    woven = weave_texture(
        surface.texture,
        x=x + np.float32(generator.random()),
        y=y + np.float32(generator.random()),
        noise=_smooth_noise(generator, size_px, surface.texture.grain),
    )
    return _mix(surface.dark, surface.light, woven, hue)


def _paint_class(scene: Scene, index: int, pose: Pose, size_px: int) -> Photo:
    x, y = _coordinates(size_px)
    cos, sin = np.float32(np.cos(pose.rotation)), np.float32(np.sin(pose.rotation))
    texture = CLASS_TEXTURES[index]
    generator = scene.generator("object paint" if index == scene.object else "company paint")
    noise = _smooth_noise(generator, size_px, texture.grain)
    woven = weave_texture(texture, x=cos * x + sin * y, y=cos * y - sin * x, noise=noise)
    brightness = 1 + 2 * CLASS_TEXTURE_CONTRAST * (woven - 0.5) + 0.03 * noise
    return np.float32(colorsys.hsv_to_rgb(*pose.hsv)) * brightness[..., None]


def _put_solid(photo: Photo, body: Photo, cover: Plane, scene: Scene) -> Photo:
    """Lay a body on the photo, rounded by light from one side, with a shadow on the other."""
    size_px = len(cover)
    light_x, light_y = np.cos(scene.look.light_direction), np.sin(scene.look.light_direction)
    dome = _blur(cover, 0.045 * size_px)
    slope_y, slope_x = np.gradient(dome * 0.045 * size_px)
    shade = 1 - 0.9 * scene.look.light * (light_x * slope_x + light_y * slope_y)
    rim = 1 - 0.3 * np.clip(1.7 - 2 * _blur(cover, 0.012 * size_px), 0, 1)
    step = 0.03 * size_px
    shadow = _shift(dome, -round(step * light_x), -round(step * light_y))
    ground = photo * (1 - 0.4 * shadow[..., None])
    return _blend(ground, body * (shade * rim)[..., None], cover)


def _expose(photo: Photo, scene: Scene) -> Photo:
    """Exposure, contrast, lens blur and sensor noise."""
    look = scene.look
    photo = (photo - 0.5) * look.contrast + 0.5 + look.exposure
    photo = _blur(photo, max(look.blur * len(photo), 0.05))
    grain = scene.generator("noise").standard_normal(photo.shape, dtype=np.float32)
    return np.clip(photo + look.noise * grain, 0, 1)


def _shift(plane: Plane, right: int, down: int) -> Plane:
    """The plane moved by whole pixels; its border is drawn out into what comes free."""
    place = np.arange(len(plane))
    rows, columns = (np.clip(place - by, 0, len(plane) - 1) for by in (down, right))
    return plane[rows[:, None], columns]


def _blend(under: Photo, over: Photo, cover: Plane) -> Photo:
    return under + cover[..., None] * (over - under)


def _mix(dark: Hsv, light: Hsv, share: Plane, hue: float) -> Photo:
    """Colours from `dark` to `light`, both turned by `hue`, as `share` goes from 0 to 1."""
    low, high = (
        np.float32(colorsys.hsv_to_rgb((hsv[0] + hue) % 1, *hsv[1:])) for hsv in (dark, light)
    )
    return np.clip(low + share[..., None] * (high - low), 0, 1)


def _smooth_noise(
    generator: np.random.Generator, size_px: int, grain: tuple[int, int]
) -> Plane:
    """Noise of mean 0 and deviation about 1 in `grain` cells across and down."""
    grid = generator.standard_normal(grain[::-1]).astype(np.float32)
    picture = Image.fromarray(grid).resize((size_px, size_px), Image.Resampling.BICUBIC)
    return np.asarray(picture, np.float32) * np.float32(1.3)


def _blur(values: NDArray[np.float32], deviation_px: float) -> NDArray[np.float32]:
    """Gaussian blur of a square plane or photo; the frame's border is not darkened."""
    place = np.arange(len(values), dtype=np.float32)
    kernel = np.exp(-0.5 * ((place[:, None] - place) / np.float32(deviation_px)) ** 2)
    kernel /= kernel.sum(axis=1, keepdims=True)
    return np.moveaxis(np.tensordot(kernel, np.tensordot(kernel, values, (1, 0)), (1, 1)), 0, 1)


@functools.cache
def _coordinates(size_px: int) -> tuple[Plane, Plane]:
    """(x, y) of each pixel's centre in shares of the side, each (H, W)."""
    ticks = (np.arange(size_px, dtype=np.float32) + 0.5) / size_px
    x, y = np.meshgrid(ticks, ticks)
    return x, y
