"""Square planes of numbers that layout and painting share: coordinates, smooth noise, blur."""

from __future__ import annotations

import functools
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Plane: TypeAlias = NDArray[np.float32]
Region: TypeAlias = NDArray[np.bool_]


@functools.cache
def coordinates(size_px: int) -> tuple[Plane, Plane]:
    """(x, y) of each pixel's centre in shares of the side, each (H, W)."""
    ticks = (np.arange(size_px, dtype=np.float32) + 0.5) / size_px
    return np.tile(ticks, (size_px, 1)), np.tile(ticks[:, None], (1, size_px))


def smooth_noise(generator: np.random.Generator, size_px: int, grain: tuple[int, int]) -> Plane:
    """Noise of mean 0 and deviation about 1 in `grain` cells across and down."""
    grid = generator.standard_normal(grain[::-1]).astype(np.float32)
    picture = Image.fromarray(grid).resize((size_px, size_px), Image.Resampling.BICUBIC)
    return np.asarray(picture, np.float32) * np.float32(1.3)


def blur(values: NDArray[np.float32], deviation_px: float) -> NDArray[np.float32]:
    """Gaussian blur of a square plane or photo over its first two axes; the border is not darkened.

    By sums of shifted copies: a matrix product would start BLAS threads, whose waiting for each
    other costs more than the work.
    """
    reach = int(np.ceil(3 * deviation_px))
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation_px) ** 2)
    taps = (taps / taps.sum()).astype(np.float32)
    for _ in range(2):
        beside = [(reach, reach)] + [(0, 0)] * (values.ndim - 1)
        padded = np.pad(values, beside, mode="edge")
        blurred = np.zeros_like(values)
        for shift, tap in enumerate(taps):
            blurred += tap * padded[shift : shift + len(values)]
        values = blurred.swapaxes(0, 1)
    return values
