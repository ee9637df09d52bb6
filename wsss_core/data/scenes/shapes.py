"""What classes, stuffs and canvases look like: silhouettes and textures, in the graph's order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from wsss_core.data.scenes.graph import Pose
from wsss_core.data.scenes.planes import Plane

Points: TypeAlias = NDArray[np.float64]
Hsv: TypeAlias = tuple[float, float, float]

CLASS_TEXTURE_CONTRAST = 0.12
"""How strongly a class's own texture shows, of its colour's brightness: the knob of difficulty."""

_STEP = 0.5 * np.pi


def _crown() -> list[tuple[float, float]]:
    turns = np.linspace(0.72 * np.pi, 2.28 * np.pi, 40)
    radius = 0.72 * (1 + 0.1 * np.cos(5 * turns))
    crown = [(r * np.cos(t), r * np.sin(t) - 0.4) for r, t in zip(radius, turns, strict=True)]
    return [(-0.2, 1.15), (-0.17, 0.2), *crown, (0.17, 0.2), (0.2, 1.15)]


def _fish() -> list[tuple[float, float]]:
    turns = np.linspace(0.13 * np.pi, 1.87 * np.pi, 40)
    body = [(0.85 * np.cos(t) - 0.25, 0.55 * np.sin(t)) for t in turns]
    fin = [(-0.45, -0.52), (-0.2, -0.82), (0.15, -0.72), (0.12, -0.48)]
    before = [p for p in body if p[1] > 0 or p[0] < -0.5]
    after = [p for p in body if p[1] < 0 and p[0] > 0.15]
    return [*before, *fin, *after, (1.1, -0.6), (0.92, 0.0), (1.1, 0.6)]


def _star() -> list[tuple[float, float]]:
    turns = np.arange(10) * np.pi / 5 - _STEP
    radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.5)
    return [(r * np.cos(t), r * np.sin(t)) for r, t in zip(radius, turns, strict=True)]


# fmt: off
_OUTLINES: tuple[list[tuple[float, float]], ...] = (
    [(-.75, .95), (-.75, -.1), (-1.05, -.1), (0, -1.05), (.35, -.74), (.35, -1.0), (.65, -1.0),
     (.65, -.46), (1.05, -.1), (.75, -.1), (.75, .95)],
    _crown(),
    [(-1.1, .4), (-.75, .95), (.75, .95), (1.1, .4), (.1, .4), (.1, .22), (.85, .22),
     (.05, -1.15), (-.65, .22), (-.08, .22), (-.08, .4)],
    _fish(),
    [(-1.15, .8), (-.08, -.85), (-.15, -1.0), (0, -.92), (.15, -1.0), (.08, -.85), (1.15, .8),
     (.36, .8), (0, -.05), (-.36, .8)],
    [(-.27, 1.15), (-.27, .5), (-.75, .5), (-.95, .3), (-.95, -.3), (-.6, -.3), (-.6, .12),
     (-.27, .12), (-.27, -.9), (0, -1.15), (.27, -.9), (.27, -.12), (.6, -.12), (.6, -.6),
     (.95, -.6), (.95, .05), (.75, .26), (.27, .26), (.27, 1.15)],
    [(0, -1.25), (.32, -.75), (.36, .3), (.8, .8), (.75, 1.1), (.3, .8), (0, .9), (-.3, .8),
     (-.75, 1.1), (-.8, .8), (-.36, .3), (-.32, -.75)],
    _star(),
)
# fmt: on


@dataclass(frozen=True)
class Texture:
    """A pattern that repeats.

    Attributes:
        weave: One of the names in `weave_texture`.
        frequency: Repeats along the picture's side.
        angle: Direction of the repeats, radians.
        warp: How far noise bends them, in repeats.
        grain: Cells of that noise across and down the picture.
    """

    weave: str
    frequency: float
    angle: float = 0.0
    warp: float = 0.0
    grain: tuple[int, int] = (8, 8)


@dataclass(frozen=True)
class Surface:
    """A texture between two colours, each (hue, saturation, value)."""

    texture: Texture
    dark: Hsv
    light: Hsv


CLASS_TEXTURES = (
    Texture("bricks", 16),
    Texture("clouds", 0, grain=(26, 26)),
    Texture("stripes", 12, _STEP),
    Texture("scales", 14),
    Texture("stripes", 10),
    Texture("dots", 16),
    Texture("checks", 9),
    Texture("stripes", 11, 0.25 * np.pi),
)

CANVAS_SURFACES = (
    Surface(Texture("clouds", 0, grain=(70, 14)), (0.29, 0.6, 0.4), (0.22, 0.5, 0.75)),
    Surface(Texture("crests", 10, _STEP, 0.8, (5, 12)), (0.57, 0.65, 0.5), (0.5, 0.35, 0.85)),
    Surface(Texture("crests", 6, 0.35 * np.pi, 0.5, (5, 5)), (0.08, 0.5, 0.68), (0.12, 0.35, 0.93)),
    Surface(Texture("stars", 7, 0.4, 0.2, (9, 9)), (0.72, 0.6, 0.22), (0.67, 0.4, 0.6)),
)
"""Bottom and top of each canvas; its texture plays about the gradient between them."""

STUFF_SURFACES = (
    Surface(Texture("dots", 15, 0.3, 0.25), (0.36, 0.6, 0.35), (0.94, 0.65, 0.95)),
    Surface(Texture("clouds", 0, grain=(20, 20)), (0.04, 0.8, 0.35), (0.1, 0.85, 0.9)),
    Surface(Texture("crests", 12, 0.35 * np.pi, 0.5), (0.52, 0.45, 0.6), (0.5, 0.04, 1.0)),
    Surface(Texture("stripes", 14, 0.0, 0.5, (4, 14)), (0.45, 0.8, 0.22), (0.28, 0.75, 0.6)),
    Surface(Texture("bricks", 11, 0.2, 0.08), (0.06, 0.6, 0.2), (0.07, 0.5, 0.55)),
    Surface(Texture("scales", 13, 0.0, 0.2), (0.6, 0.08, 0.25), (0.1, 0.08, 0.85)),
    Surface(Texture("clouds", 0, grain=(12, 30)), (0.98, 0.9, 0.2), (0.08, 0.95, 1.0)),
    Surface(Texture("checks", 10, 0.25 * np.pi, 0.12), (0.8, 0.5, 0.5), (0.74, 0.15, 1.0)),
)


def outline_class(index: int, *, pose: Pose, centre: tuple[float, float]) -> Points:
    """The silhouette of a class in a pose: a closed polygon in shares of the side, (n, 2).

    Its area is exactly `pose.area`, so the size of an object says nothing about its class.
    """
    points = _round_corners(np.array(_OUTLINES[index], dtype=np.float64))
    phase_x, phase_y, depth_x, depth_y = pose.bend
    points += np.stack(
        [
            depth_x * np.sin(2.2 * points[:, 1] + phase_x),
            depth_y * np.sin(2.2 * points[:, 0] + phase_y),
        ],
        axis=1,
    )
    points *= (np.sqrt(pose.stretch), 1 / np.sqrt(pose.stretch))
    if pose.mirrored:
        points[:, 0] *= -1
    cos, sin = np.cos(pose.rotation), np.sin(pose.rotation)
    points = points @ np.array([[cos, sin], [-sin, cos]])
    area, centroid = _measure_polygon(points)
    return (points - centroid) * np.sqrt(pose.area / area) + centre


def weave_texture(texture: Texture, *, x: Plane, y: Plane, noise: Plane) -> Plane:
    """The value of a texture at each pixel, in [0, 1].

    Args:
        texture: Which.
        x: Horizontal coordinate of each pixel, in shares of the side.
        y: Vertical coordinate.
        noise: Smooth noise of mean 0 and deviation about 1.
    """
    cos, sin = np.cos(texture.angle), np.sin(texture.angle)
    u = texture.frequency * (cos * x + sin * y) + texture.warp * noise
    v = texture.frequency * (cos * y - sin * x) + texture.warp * noise[::-1, ::-1]
    turn = np.float32(2 * np.pi)
    match texture.weave:
        case "stripes":
            woven = 0.5 + 0.5 * np.sin(turn * u)
        case "crests":
            woven = 1 - 2 * np.abs(u - np.floor(u) - 0.5) ** 0.6 / 0.5**0.6 * 0.5
        case "checks":
            woven = 0.5 + 0.5 * np.tanh(3 * np.sin(turn * u) * np.sin(turn * v))
        case "dots":
            woven = _fade(_lattice_distance(u, v), near=0.22, far=0.36)
        case "stars":
            woven = 0.3 + 0.15 * np.tanh(noise) + 0.8 * _fade(_lattice_distance(u, v), 0.05, 0.13)
        case "scales":
            woven = 1 - 1.6 * _lattice_distance(u, v)
        case "bricks":
            row = np.floor(v)
            across = np.abs((0.5 * u + 0.5 * row) % 1 - 0.5)
            woven = _fade(np.maximum(2 * across - 0.12, 2 * np.abs(v - row - 0.5)), 0.7, 0.9)
        case _:
            woven = 0.5 + 0.5 * np.tanh(1.2 * noise)
    return woven.astype(np.float32)


def _lattice_distance(u: Plane, v: Plane) -> Plane:
    """Distance to the nearest point of a grid whose odd rows are shifted by half a step."""
    row = np.floor(v)
    across = (u + 0.5 * (row % 2)) % 1 - 0.5
    return np.sqrt(across**2 + (v - row - 0.5) ** 2)


def _fade(distance: Plane, near: float, far: float) -> Plane:
    return np.clip((far - distance) / (far - near), 0, 1)


def _round_corners(points: Points) -> Points:
    """Cut every corner at an eighth of its edges, twice (Chaikin)."""
    for _ in range(2):
        ahead = np.roll(points, -1, axis=0)
        points = np.stack(
            [0.875 * points + 0.125 * ahead, 0.125 * points + 0.875 * ahead], axis=1
        ).reshape(-1, 2)
    return points


def _measure_polygon(points: Points) -> tuple[float, Points]:
    """Area and centroid of a simple polygon (shoelace formula)."""
    ahead = np.roll(points, -1, axis=0)
    cross = points[:, 0] * ahead[:, 1] - ahead[:, 0] * points[:, 1]
    doubled = cross.sum()
    return abs(doubled) / 2, ((points + ahead) * cross[:, None]).sum(axis=0) / (3 * doubled)
