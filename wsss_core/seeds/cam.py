"""Class activation maps: summing over scales, normalising, storing, labelling."""

from __future__ import annotations

import functools
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Integer, UInt8
from torch import Tensor

from wsss_core.errors import DataError

STRIDE_PX = 4
"""Photo pixels a side of a stored CAM's cell; full size is recomputed."""

# What numpy raises on files that are no npz, or hold arrays of another kind
_NO_CAM = (OSError, EOFError, ValueError, TypeError, KeyError, zipfile.BadZipFile)

MapsAt = Callable[[float], Tensor]
"""Gives a batch's class maps (B,n,h,w) at a scale: views rectified, flips turned back, added."""


@dataclass(frozen=True)
class Cam:
    """The stored seeds of one photo.

    Attributes:
        classes: (k,) foreground class indices, 0-based, ascending: the photo's tags.
        cam: (k, ceil(H/4), ceil(W/4)) in [0, 1], each class divided by its own maximum.
        size: (H, W) of the photo, in pixels.
    """

    classes: Integer[np.ndarray, " k"]
    cam: Float[np.ndarray, "k h w"]
    size: tuple[int, int]


def seed_size(size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a photo's stored CAM."""
    return -(-size[0] // STRIDE_PX), -(-size[1] // STRIDE_PX)


def sum_scales(
    maps_at: MapsAt, scales: Sequence[float], size: tuple[int, int]
) -> Float32[Tensor, "b n h w"]:
    """Rectified class maps summed over scales at stride 4 (irn make_cam.py: `cam`).

    Args:
        maps_at: Gives the maps of one scale.
        scales: Photo sizes relative to the original; at least one.
        size: (H, W) of the photos, in pixels.
    """
    target = seed_size(size)
    maps = (
        F.interpolate(maps_at(scale), size=target, mode="bilinear", align_corners=False)
        for scale in scales
    )
    return functools.reduce(torch.add, maps)


def normalise_cam(maps: Float[Tensor, "k h w"]) -> Float[Tensor, "k h w"]:
    """Each class divided by its own maximum + 1e-5 (irn make_cam.py); in [0, 1]."""
    return maps / (maps.amax(dim=(-2, -1), keepdim=True) + 1e-5)


def upsample_cam(
    cam: Float[np.ndarray, "k h w"], size: tuple[int, int]
) -> Float32[np.ndarray, "k H W"]:
    """A stored CAM at the photo's full size, bilinear.

    As in irn, a cell is taken for 4 x 4 pixels and what lies beyond the photo is cropped, though
    `sum_scales` spreads the cells over the photo: where a side is no multiple of 4, up to 3 px
    apart at its far end.
    """
    full = resize_cam(cam, (cam.shape[1] * STRIDE_PX, cam.shape[2] * STRIDE_PX))
    return full[:, : size[0], : size[1]]


def resize_cam(
    cam: Float[np.ndarray, "k h w"], size: tuple[int, int]
) -> Float32[np.ndarray, "k H W"]:
    """A CAM on another grid of cells, bilinear."""
    tensor = torch.from_numpy(np.ascontiguousarray(cam, dtype=np.float32))[None]
    resized: Float32[np.ndarray, "k H W"] = F.interpolate(
        tensor, size=size, mode="bilinear", align_corners=False
    )[0].numpy()
    return resized


def label_map(
    scores: Float[np.ndarray, "k H W"], classes: Integer[np.ndarray, " k"], *, threshold: float
) -> UInt8[np.ndarray, "H W"]:
    """Class of each pixel by argmax against a constant background score.

    Args:
        scores: In [0, 1], at the photo's size.
        classes: Foreground class of each score, 0-based.
        threshold: Score of the background.

    Returns:
        Labels: 0 background, class + 1 elsewhere. A tie with the background is background.
    """
    if not len(classes):
        return np.zeros(scores.shape[1:], np.uint8)
    best = scores.argmax(axis=0)
    labels = (np.asarray(classes)[best] + 1).astype(np.uint8)
    labels[scores.max(axis=0) <= threshold] = 0
    return labels


def write_cam(path: Path, cam: Cam) -> None:
    """Store as npz without object arrays: `classes`, `cam` float16, `size`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        path,
        classes=np.asarray(cam.classes, np.int64),
        cam=np.asarray(cam.cam, np.float16),
        size=np.asarray(cam.size, np.int64),
    )


def read_cam(path: Path) -> Cam:
    """The seeds of one photo, checked.

    Raises:
        DataError: If the file is missing, broken, or does not hold what `Cam` says.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            classes, cam = data["classes"].astype(np.int64), data["cam"].astype(np.float32)
            height, width = map(int, data["size"])
        expected = (len(classes), *seed_size((height, width)))
    except FileNotFoundError:
        raise DataError(f"no CAM at {path}; every photo of the list needs one") from None
    except _NO_CAM as error:
        raise DataError(
            f"{path} is no CAM file ({' '.join(str(error).split())}); "
            "expected arrays classes, cam, size"
        ) from None
    if cam.shape != expected:
        raise DataError(f"{path}: cam has shape {cam.shape}; expected {expected}")
    if cam.size and not (cam.min() >= 0 and cam.max() <= 1):  # false for NaN too
        raise DataError(f"{path}: cam spans {cam.min()}..{cam.max()}; expected values in 0..1")
    return Cam(classes, cam, (height, width))
