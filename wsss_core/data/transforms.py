"""Geometry: how a photo, its labels and its context map are resized, flipped and cropped together.

Augmentation is a pure function of (seed, epoch, photo id): no worker owns a random state, so a
resumed or differently loaded epoch sees the same pixels. The whole picture's normalised
coordinates, [-1, 1] with align_corners=False, are the common frame; a crop is described by the 2x3
affine that maps its own coordinates into it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from wsss_core.records import IGNORE_INDEX
from wsss_core.seeding import numpy_generator

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Crop:
    """One random view of a photo.

    Attributes:
        height_px, width_px: Size the whole picture is resized to.
        flip: Whether it is then mirrored.
        top_px, left_px: Corner of the crop in the resized picture; negative where the canvas is
            larger.
        side_px: Side of the square crop.
    """

    height_px: int
    width_px: int
    flip: bool
    top_px: int
    left_px: int
    side_px: int

    def affine(self) -> Tensor:
        """The 2x3 map from the crop's normalised coordinates to the whole picture's; x, then y."""
        x_scale, x_shift = _axis(self.side_px, self.left_px, self.width_px)
        y_scale, y_shift = _axis(self.side_px, self.top_px, self.height_px)
        sign = -1.0 if self.flip else 1.0
        return torch.tensor([[sign * x_scale, 0.0, sign * x_shift], [0.0, y_scale, y_shift]])


def _axis(side: int, start: int, whole: int) -> tuple[float, float]:
    return side / whole, (side + 2 * start) / whole - 1.0


def draw_crop(
    size: tuple[int, int],
    *,
    long_side_px: tuple[int, int],
    crop_px: int,
    seed: int,
    epoch: int,
    photo_id: str,
) -> Crop:
    """The crop of a photo in an epoch: random long side, flip and corner (irn train_cam).

    Args:
        size: Height and width of the photo.
        long_side_px: Range of the long side after the resize, both ends included.
        crop_px: Side of the crop; a smaller picture is placed at random on the canvas.
        seed: The stage's seed.
        epoch: 0-based.
        photo_id: Name of the photo.
    """
    random = numpy_generator(seed, "crop", epoch, photo_id)
    ratio = random.integers(long_side_px[0], long_side_px[1] + 1) / max(size)
    height, width = (max(1, round(side * ratio)) for side in size)
    flip = bool(random.random() < 0.5)
    top, left = (_draw_corner(random, side, crop_px) for side in (height, width))
    return Crop(height, width, flip, top, left, crop_px)


def _draw_corner(random: np.random.Generator, side: int, crop: int) -> int:
    low, high = sorted((0, side - crop))
    return int(random.integers(low, high + 1))


def crop_photo(photo: UInt8[np.ndarray, "h w 3"], crop: Crop) -> Tensor:
    """The view as a normalised photo (3,side,side); zeros, the mean colour, outside the picture."""
    resized = resize_photo(photo, (crop.height_px, crop.width_px))
    return _place(normalise(resized), crop, fill=0)


def crop_labels(labels: UInt8[np.ndarray, "h w"], crop: Crop) -> Tensor:
    """The same view of a label map, nearest, int64 (side,side); `IGNORE_INDEX` outside of it."""
    size = (crop.height_px, crop.width_px)
    resized = _resize(torch.from_numpy(labels)[None], size, "nearest-exact")
    return _place(resized.long(), crop, fill=IGNORE_INDEX)[0]


def resize_photo(photo: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]) -> Tensor:
    """A photo resized bilinearly with antialiasing, uint8 (3,H,W)."""
    tensor = torch.from_numpy(np.ascontiguousarray(photo)).permute(2, 0, 1)
    if tuple(tensor.shape[-2:]) == size:
        return tensor
    return _resize(tensor, size, "bilinear")


def normalise(photo: Tensor) -> Tensor:
    """A uint8 photo (...,3,H,W) as float32 with ImageNet's mean and deviation taken out."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (photo.float() / 255.0 - mean) / std


def scaled_size(size: tuple[int, int], scale: float, *, multiple: int) -> tuple[int, int]:
    """`size` times `scale`, each side rounded to a positive multiple: feature cells tile it."""
    height, width = (max(multiple, round(side * scale / multiple) * multiple) for side in size)
    return height, width


def _resize(picture: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    # imported here: it takes seconds, and a run that has everything in the store resizes nothing
    import torchvision.transforms.v2.functional as tvf
    from torchvision.transforms import InterpolationMode

    # antialiased by default where the mode can; the module has no __all__
    resized: Tensor = tvf.resize(  # type: ignore[attr-defined]
        picture, list(size), InterpolationMode(mode)
    )
    return resized


def _place(picture: Tensor, crop: Crop, *, fill: int) -> Tensor:
    if crop.flip:
        picture = picture.flip(-1)
    side = crop.side_px
    canvas = torch.full((picture.shape[0], side, side), fill, dtype=picture.dtype)
    top, left = max(crop.top_px, 0), max(crop.left_px, 0)
    part = picture[:, top : top + side, left : left + side]
    y, x = max(-crop.top_px, 0), max(-crop.left_px, 0)
    canvas[:, y : y + part.shape[1], x : x + part.shape[2]] = part
    return canvas
