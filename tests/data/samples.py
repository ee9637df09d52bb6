"""Small data sets on disk for the tests of the data room."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from wsss_core.data.images import write_mask


def corner_photo(height=6, width=10):
    """Red in the upper left quarter, black elsewhere; (H, W, 3)."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = [250, 20, 20]
    return pixels


def save_photo(path: Path, pixels=None, *, orientation=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    picture = Image.fromarray(corner_photo() if pixels is None else pixels)
    picture.save(path, exif=exif, **options)


def save_bomb(path: Path, side: int):
    """A PNG of a few bytes that says it is side x side pixels."""

    def chunk(name, body):
        checksum = zlib.crc32(name + body)
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)


def make_folder(root: Path, rows, *, lists=None, labels=None):
    """A photos folder from `{filename: tags}`; every file is a picture of its own."""
    root.mkdir(parents=True, exist_ok=True)
    for number, filename in enumerate(rows):
        save_photo(root / filename, corner_photo(6 + number, 10))
    text = "filename,tags\n" + "".join(f"{name},{tags}\n" for name, tags in rows.items())
    (root / "tags.csv").write_text(text)
    for name, entries in (lists or {}).items():
        (root / f"{name}.txt").write_text("\n".join(entries) + "\n")
    if labels is not None:
        (root / "labels.txt").write_text("\n".join(labels) + "\n")
    return root


def make_devkit(root: Path, tags, *, train, val=(), labels=("cat", "dog", "sofa"), xml=False):
    """A devkit from `{id: tags}` with masks of zeros."""
    for folder in ("ImageSets/Segmentation", "Annotations"):
        (root / folder).mkdir(parents=True)
    for number, (photo, names) in enumerate(tags.items()):
        save_photo(root / "JPEGImages" / f"{photo}.jpg", corner_photo(6 + number, 10))
        write_mask(
            root / "SegmentationClass" / f"{photo}.png", np.zeros((6 + number, 10), np.uint8)
        )
        if xml:
            objects = "".join(
                f"<object><name>{name}</name><part><name>head</name></part></object>"
                for name in names.split()
            )
            document = f"<annotation><source><name>flickr</name></source>{objects}</annotation>"
            (root / "Annotations" / f"{photo}.xml").write_text(document)
    if not xml:
        rows = "".join(f"{photo}.jpg,{names},1\n" for photo, names in tags.items())
        (root / "image_tags.csv").write_text("filename,tags,fine\n" + rows)
    if labels is not None:
        (root / "labels.txt").write_text("\n".join(("background", *labels)) + "\n")
    for name, photos in (("train", train), ("val", val)):
        (root / "ImageSets/Segmentation" / f"{name}.txt").write_text("\n".join(photos) + "\n")
    return root


class RecordingRecorder:
    """Keeps what it hears."""

    def __init__(self):
        self.passes, self.notes = [], []

    def progress(self, what, done, total):
        self.passes.append((what, done, total))

    def scalars(self, stage, step, values):
        raise AssertionError("data has no scalars")

    def note(self, message):
        self.notes.append(message)
