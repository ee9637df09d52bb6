"""From a scene to its picture, its truth and the role of each pixel.

Colours and covers are float32 in [0, 1]; H, W are the picture's size in pixels, a square.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from wsss_core.data.scenes.graph import Pose, Scene
from wsss_core.data.scenes.layout import Layers, lay_out_scene
from wsss_core.data.scenes.planes import Plane, blur, coordinates, smooth_noise
from wsss_core.data.scenes.shapes import (
    CANVAS_SURFACES,
    CLASS_TEXTURE_CONTRAST,
    CLASS_TEXTURES,
    STUFF_SURFACES,
    Hsv,
    weave_texture,
)

ROLES = ("background", "object", "part", "company", "stuff")
"""What a pixel is: canvas; i; the part of i that shows the canvas; j; k. The id is its place."""

Photo: TypeAlias = NDArray[np.float32]


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


def _back_to_front(scene: Scene) -> tuple[str, str]:
    return ("object", "company") if scene.look.company_in_front else ("company", "object")


def _paint(scene: Scene, layers: Layers) -> Photo:
    """The picture in [0, 1], (H, W, 3)."""
    size_px = len(layers.part)
    canvas = _paint_canvas(scene, size_px)
    photo = _blend(canvas, _paint_stuff(scene, size_px), layers.stuff_cover)
    for who in _back_to_front(scene):
        if who == "object":
            body = _paint_class(scene, scene.object, scene.object_pose, size_px)
            mirror = blur(layers.part.astype(np.float32), 0.6)
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
    x, y = coordinates(size_px)
    woven = weave_texture(
        surface.texture, x=x, y=y, noise=smooth_noise(generator, size_px, surface.texture.grain)
    )
    height = 1 - y + slope * (x - 0.5) + 0.1 * smooth_noise(generator, size_px, (4, 4))
    return _mix(surface.dark, surface.light, 0.7 * height + 0.35 * (woven - 0.2), hue)


def _paint_stuff(scene: Scene, size_px: int) -> Photo:
    surface = STUFF_SURFACES[scene.stuff]
    generator = scene.generator("stuff paint")
    hue = generator.uniform(-0.02, 0.02)
    x, y = coordinates(size_px)
    woven = weave_texture(
        surface.texture,
        x=x + np.float32(generator.random()),
        y=y + np.float32(generator.random()),
        noise=smooth_noise(generator, size_px, surface.texture.grain),
    )
    return _mix(surface.dark, surface.light, woven, hue)


def _paint_class(scene: Scene, index: int, pose: Pose, size_px: int) -> Photo:
    x, y = coordinates(size_px)
    cos, sin = np.float32(np.cos(pose.rotation)), np.float32(np.sin(pose.rotation))
    texture = CLASS_TEXTURES[index]
    generator = scene.generator("object paint" if index == scene.object else "company paint")
    noise = smooth_noise(generator, size_px, texture.grain)
    woven = weave_texture(texture, x=cos * x + sin * y, y=cos * y - sin * x, noise=noise)
    brightness = 1 + 2 * CLASS_TEXTURE_CONTRAST * (woven - 0.5) + 0.03 * noise
    return _rgb(pose.hsv) * brightness[..., None]


def _put_solid(photo: Photo, body: Photo, cover: Plane, scene: Scene) -> Photo:
    """Lay a body on the photo, rounded by light from one side, with a shadow on the other."""
    size_px = len(cover)
    light_x, light_y = np.cos(scene.look.light_direction), np.sin(scene.look.light_direction)
    dome = blur(cover, 0.045 * size_px)
    slope_y, slope_x = np.gradient(dome * 0.045 * size_px)
    shade = 1 - 0.9 * scene.look.light * (light_x * slope_x + light_y * slope_y)
    rim = 1 - 0.3 * np.clip(1.7 - 2 * blur(cover, 0.012 * size_px), 0, 1)
    step = 0.03 * size_px
    shadow = _shift(dome, -round(step * light_x), -round(step * light_y))
    ground = photo * (1 - 0.4 * shadow[..., None])
    return _blend(ground, body * (shade * rim)[..., None], cover)


def _expose(photo: Photo, scene: Scene) -> Photo:
    """Exposure, contrast, lens blur and sensor noise."""
    look = scene.look
    photo = (photo - 0.5) * look.contrast + 0.5 + look.exposure
    photo = blur(photo, max(look.blur * len(photo), 0.05))
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
    low, high = (_rgb(((hsv[0] + hue) % 1, *hsv[1:])) for hsv in (dark, light))
    return np.clip(low + share[..., None] * (high - low), 0, 1)


def _rgb(hsv: Hsv) -> Plane:
    return np.array(colorsys.hsv_to_rgb(*hsv), np.float32)
