"""Masks of anybody's photos; one that cannot be read costs one line, not the rest.

Not a stage: nothing is stored or keyed, and the photos need no tags.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image
from torch import nn
from torch.nn import functional

from wsss_core.config import SegmenterConfig, SegmenterTestConfig
from wsss_core.data.images import read_photo, write_mask
from wsss_core.data.transforms import resize_photo
from wsss_core.errors import DataError, InputError, StoreError
from wsss_core.evaluation.panels import overlay as lay_over
from wsss_core.records import Manifest
from wsss_core.stages.predictions import refine_prediction, segment_photo
from wsss_core.stages.segmenter import DESCRIPTION, load_segmenter
from wsss_core.stages.stage import Workspace

PHOTO_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".mpo", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".jp2", ".heic"}
)
"""Files of a folder taken for photos. HEIC cannot be read, and its owner is told so."""
OVERLAY_FOLDER = "overlay"


@dataclass(frozen=True)
class Predicted:
    """What became of the photos.

    Attributes:
        masks: Files written.
        failures: One line for each photo that has no mask.
    """

    masks: tuple[Path, ...]
    failures: tuple[str, ...]


def predict_folder(
    photos: Path,
    *,
    segmenter: Manifest,
    test: SegmenterTestConfig,
    work: Workspace,
    out: Path,
    overlay: bool = False,
) -> Predicted:
    """Write a palette mask of its own upright size for each photo, and the class list `labels.txt`.

    Args:
        photos: One photo, or a folder that is searched with its subfolders.
        segmenter: Manifest of a trained segmenter.
        test: Scales, flip and CRF.
        work: Store, device and recorder; each failure is noted as it happens.
        out: Folder of the masks; photos keep their relative names.
        overlay: Also write the masks laid over their photos, as JPEG below `out/overlay`.

    Raises:
        InputError: If there is no photo, or the masks would overwrite the photos.
        StoreError: If the store or `out` fails.
    """
    targets = _name_masks(photos, out)
    folder = work.store.open(segmenter)
    model, classes = load_segmenter(folder)
    model.to(work.device()).to(memory_format=torch.channels_last)
    limit_px = _trained_long_side_px(folder)
    masks, failures = [], []
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "labels.txt").write_text("\n".join(["background", *classes]) + "\n")
        for done, (photo, target) in enumerate(targets.items(), 1):
            try:
                pixels = read_photo(photo)
            except DataError as error:
                failures.append(str(error))
                work.recorder.note(f"skipped: {error}")
            else:
                mask = _segment(model, pixels, test=test, limit_px=limit_px)
                _write_whole(out / target, mask)
                masks.append(out / target)
                if overlay:
                    _write_overlay(out / OVERLAY_FOLDER / target, pixels, mask)
            work.recorder.progress("predict", done, len(targets))
    except OSError as error:
        raise StoreError(
            f"{error.filename or out} cannot be written ({error.strerror or error})"
        ) from error
    return Predicted(tuple(masks), tuple(failures))


def _name_masks(photos: Path, out: Path) -> dict[Path, Path]:
    """The photos, sorted, and the relative path of each one's mask."""
    if not photos.exists():
        raise InputError(f"{photos} does not exist; give a photo or a folder of photos")
    root = photos if photos.is_dir() else photos.parent
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a folder for the masks")
    if out.resolve() == root.resolve():
        raise InputError(f"{out} holds the photos themselves; give another folder for the masks")
    found = _photos_below(photos, out) if photos.is_dir() else [photos]
    if not found:
        raise InputError(f"no photo in {photos}; looked for {' '.join(sorted(PHOTO_SUFFIXES))}")
    names = [path.relative_to(root) for path in found]
    stems = Counter(name.with_suffix("") for name in names)
    # cat.jpg and cat.png cannot both become cat.png
    masks = [
        name.with_suffix(".png")
        if stems[name.with_suffix("")] == 1
        else name.with_name(f"{name.name}.png")
        for name in names
    ]
    return dict(zip(found, masks, strict=True))


def _photos_below(folder: Path, out: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in PHOTO_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not path.resolve().is_relative_to(out.resolve())
    )


def _trained_long_side_px(folder: Path) -> int:
    description = json.loads((folder / DESCRIPTION).read_text())
    return SegmenterConfig.model_validate(description["segmenter"]).training.long_side_px[1]


def _segment(
    model: nn.Module, photo: UInt8[np.ndarray, "h w 3"], *, test: SegmenterTestConfig, limit_px: int
) -> UInt8[np.ndarray, "h w"]:
    """Labels at the photo's size; the segmenter sees it no larger than it was trained on."""
    size = (photo.shape[0], photo.shape[1])
    ratio = min(1.0, limit_px / max(size))
    seen = resize_photo(photo, (max(1, round(size[0] * ratio)), max(1, round(size[1] * ratio))))
    small = seen.permute(1, 2, 0).contiguous().numpy()
    probabilities = segment_photo(model, small, scales=test.scales, flip=test.flip)
    if test.crf:
        probabilities = refine_prediction(small, probabilities, test.crf_params)
    return label_at_size(probabilities, size)


def label_at_size(
    probabilities: Float32[np.ndarray, "k h w"], size: tuple[int, int]
) -> UInt8[np.ndarray, "height width"]:
    """The best label of each pixel after bilinear resizing; class by class, to save memory."""
    best = torch.full(size, -1.0)
    labels = torch.zeros(size, dtype=torch.uint8)
    for label, plane in enumerate(torch.from_numpy(probabilities)):
        full = functional.interpolate(
            plane[None, None], size=size, mode="bilinear", align_corners=False
        )[0, 0]
        labels[full > best] = label
        best = torch.maximum(best, full)
    mask: UInt8[np.ndarray, "height width"] = labels.numpy()
    return mask


def _write_whole(path: Path, mask: UInt8[np.ndarray, "h w"]) -> None:
    scratch = path.with_name(f".{path.name}.tmp")
    write_mask(scratch, mask)
    scratch.replace(path)


def _write_overlay(
    path: Path, photo: UInt8[np.ndarray, "h w 3"], mask: UInt8[np.ndarray, "h w"]
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(lay_over(photo, mask)).save(path.with_suffix(".jpg"), quality=90)
