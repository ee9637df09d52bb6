"""A folder of what people really have: photos of every kind, and files that claim to be photos."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

GOOD = {
    # name: (height, width) as a viewer shows it
    "portrait.jpg": (60, 40),
    "grey.png": (33, 47),
    "print.jpg": (40, 56),
    "deep.png": (37, 41),
    "glass.png": (48, 32),
    "dot.png": (1, 1),
}
BAD = ("cut.jpg", "bomb.png", "letter.jpg")


def write_odd_photos(folder: Path) -> None:
    """Write all of `GOOD` and `BAD`, and a text file that nobody takes for a photo."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 4), np.uint8)

    def picture(name: str, channels: int) -> Image.Image:
        height, width = GOOD[name]
        values = pixels[:height, :width, :channels]
        return Image.fromarray(values[:, :, 0] if channels == 1 else np.ascontiguousarray(values))

    rotated = Image.Exif()
    rotated[ExifTags.Base.Orientation] = 6  # held upright: stored as 60 wide, 40 high
    Image.fromarray(pixels[:40, :60, :3].copy()).save(folder / "portrait.jpg", exif=rotated)
    picture("grey.png", 1).save(folder / "grey.png")
    picture("print.jpg", 3).convert("CMYK").save(folder / "print.jpg")
    deep = np.random.default_rng(1).integers(0, 65536, GOOD["deep.png"], np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    picture("glass.png", 4).save(folder / "glass.png")
    picture("dot.png", 3).save(folder / "dot.png")
    whole = (folder / "print.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "bomb.png").write_bytes(_bomb(side=30_000))
    (folder / "letter.jpg").write_text("Dear committee, please find no picture here.\n")
    (folder / "notes.txt").write_text("not a photo, and does not say it is\n")


def _bomb(side: int) -> bytes:
    """A PNG of some hundred bytes that claims side x side grey pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * (side + 1)))
        + chunk(b"IEND", b"")
    )
