"""Photos and label masks as arrays, and one clear line for each file that is not one.

Photos come as people have them: rotated by EXIF, grey, CMYK, 16 bit, with alpha. Everything becomes
8-bit RGB as a viewer shows it; colour profiles are ignored. Masks are PNGs whose pixel value is the
label.
"""

from __future__ import annotations

import contextlib
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

from wsss_core.errors import DataError
from wsss_core.records import TaggedPhoto

# Formats whose decoders only decode: PIL's EPS, for one, starts ghostscript. JPEG covers the MPO of
# phones.
_FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM", "JPEG2000")
# What PIL's decoders raise on broken files, found by flipping and cutting bytes of every format.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    MemoryError,  # a damaged JPEG 2000 may ask for any number of tiles
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
PICTURE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".jp2"}
)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to the turn that makes the picture upright."""


def read_photo(path: Path, *, side_px: int | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels of a photo as a viewer shows it: upright by EXIF, RGB, 0..255.

    Transparent pixels lie on white. 16-bit grey is scaled by its full range, not clipped. Of
    several frames the first counts.

    Args:
        path: The file.
        side_px: Enough for both sides: a larger JPEG may be decoded at a half, fourth or eighth.

    Raises:
        DataError: For a missing, broken or oversized file; one line that names it.
    """
    with _open_picture(path) as picture:
        if side_px is not None:
            picture.draft(None, (side_px, side_px))
        picture.load()
        turn = _UPRIGHT.get(_orientation(picture))
        upright = picture if turn is None else picture.transpose(turn)
        return np.array(_to_rgb(upright))


def read_pixels(photo: TaggedPhoto) -> UInt8[np.ndarray, "h w 3"]:
    """The photo as every stage sees it: `read_photo`, no larger than its data set allows.

    Raises:
        DataError: As `read_photo`.
    """
    if photo.seen_size is None:
        return read_photo(photo.path)
    height, width = photo.seen_size
    pixels = read_photo(photo.path, side_px=2 * max(height, width))
    return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))


def pixel_size(photo: TaggedPhoto) -> tuple[int, int]:
    """(height, width) of what `read_pixels` gives.

    Raises:
        DataError: As `photo_size`.
    """
    return photo_size(photo.path) if photo.seen_size is None else photo.seen_size


def mask_at_size(
    mask: UInt8[np.ndarray, "h w"], size: tuple[int, int]
) -> UInt8[np.ndarray, "height width"]:
    """The labels at another (height, width): each pixel takes the one at its centre."""
    if mask.shape == size:
        return mask
    resized: UInt8[np.ndarray, "height width"] = np.array(
        Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST)
    )
    return resized


def photo_size(path: Path) -> tuple[int, int]:
    """(height, width) of what `read_photo` gives, from the header alone where the format allows.

    Raises:
        DataError: As `read_photo`; a file that is cut off behind its header passes.
    """
    with _open_picture(path) as picture:
        width, height = picture.size
        # PIL has already swapped the size of a TIFF.
        sideways = picture.format != "TIFF" and _orientation(picture) >= 5
        return (width, height) if sideways else (height, width)


def read_mask(path: Path) -> UInt8[np.ndarray, "h w"]:
    """The labels of a mask: the palette index, or the grey value, of each pixel.

    Raises:
        DataError: For a missing or broken file, or one whose pixels are not labels; one line that
            names it.
    """
    with _open_picture(path) as picture:
        if picture.format != "PNG":
            raise DataError(
                f"{path} is a {picture.format} file; a mask must be a PNG, which keeps labels exact"
            )
        if picture.mode not in ("P", "L", "1"):
            raise DataError(
                f"{path} holds {picture.mode} pixels; a mask must be a palette or 8-bit grey PNG "
                "whose pixel value is the label (0 background, 1.. classes, 255 ignored)"
            )
        return np.array(picture).astype(np.uint8)


def write_mask(path: Path, mask: np.ndarray) -> None:
    """Write labels as a PNG in VOC's colours, and its folder; same labels give same bytes.

    Args:
        path: Where to.
        mask: Labels, uint8 of shape (H, W).

    Raises:
        ValueError: For any other array.
    """
    if mask.dtype != np.uint8 or mask.ndim != 2:
        raise ValueError(
            f"mask is {mask.dtype} of shape {mask.shape}; expected uint8 of shape (H, W)"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(mask)
    picture.putpalette(voc_palette())
    picture.save(path, format="PNG", optimize=False, compress_level=6)


def voc_palette() -> list[int]:
    """VOC's colours as 256 x (red, green, blue), 0..255.

    Bits 0, 1, 2 of the label go to bit 7 of red, green, blue, bits 3, 4, 5 to bit 6, and so on (VOC
    devkit, VOClabelcolormap.m).
    """
    return [
        sum((label >> (3 * place + channel) & 1) << (7 - place) for place in range(8))
        for label in range(256)
        for channel in range(3)
    ]


@contextlib.contextmanager
def _open_picture(path: Path) -> Iterator[Image.Image]:
    """Open a picture; what PIL says about it, now or while it is used, becomes a `DataError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # the size limit is checked here; the rest is EXIF gossip
            with Image.open(path, formats=_FORMATS) as picture:
                _check_size(picture)
                yield picture
    except DataError:
        raise
    except _DECODE_ERRORS as error:
        raise DataError(f"{path} {_explain(path, error)}") from None


def _check_size(picture: Image.Image) -> None:
    # PIL itself warns above its limit and refuses only above twice that.
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and picture.width * picture.height > limit:
        raise Image.DecompressionBombError


def _explain(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "does not exist; check the name, or take it off the list"
    if isinstance(error, Image.DecompressionBombError):
        megapixels = (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
        return f"has more than {megapixels} megapixels; store it smaller"
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be opened ({error.strerror}); check it and its permissions"
    if path.stat().st_size == 0:
        return "is empty; copy it again, or remove it"
    if isinstance(error, UnidentifiedImageError):
        return "is not a picture that can be read; store it as JPEG or PNG, or remove it"
    if "truncated" in str(error).lower():
        return "is cut off; copy it again, or remove it"
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"cannot be decoded ({reason}); store it again as 8-bit JPEG or PNG, or remove it"


def _orientation(picture: Image.Image) -> int:
    """EXIF orientation, 1..8; 1 (upright) where it is absent or unreadable."""
    try:
        value = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except _DECODE_ERRORS:
        return 1  # the pixels may still be sound
    return value if isinstance(value, int) and value in _UPRIGHT else 1


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise ValueError("floating-point grey values")
    if picture.mode.startswith("I"):
        values = np.array(picture).astype(np.int64)
        least = 256 if picture.format == "TIFF" and picture.mode == "I" else 0  # 8 bits in 32
        if values.min() < 0 or not least <= values.max() <= 65535:
            raise ValueError("32-bit grey values")
        picture = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
