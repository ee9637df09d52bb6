"""Masks of anybody's photos; one that cannot be read costs one line, not the rest.

Not a stage: nothing is stored or keyed, and the photos need no tags.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image
from torch.nn import functional

from wsss_core.config import SegmenterConfig, SegmenterTestConfig
from wsss_core.data.images import photo_size, read_photo, write_mask
from wsss_core.data.labels import LABELS_FILE
from wsss_core.data.transforms import resize_photo
from wsss_core.errors import DataError, InputError, StoreError, TooLargeError
from wsss_core.evaluation.panels import overlay as lay_over
from wsss_core.observe import Recorder
from wsss_core.stages.export import check_folder
from wsss_core.stages.predictions import refine_prediction, segment_photo
from wsss_core.stages.segmenter import DESCRIPTION, load_segmenter

PHOTO_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".mpo", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".jp2", ".heic"}
)
"""Files of a folder taken for photos. HEIC cannot be read, and its owner is told so."""
OVERLAY_FOLDER = "overlay"
_MARK = ".predicted"  # in a folder of masks, so that they are not taken for photos later
LIMIT_PX = 50_000_000
"""Most pixels of a photo that comes over a network; those of a phone have 12 to 50 million."""


class Predictor:
    """A trained segmenter, and how it is asked.

    Attributes:
        labels: Names of the mask's values, background first.
    """

    def __init__(self, folder: Path, *, test: SegmenterTestConfig, device: torch.device) -> None:
        model, classes = load_segmenter(folder)
        self.labels = ("background", *classes)
        self._model = model.to(device).to(memory_format=torch.channels_last)
        self._test = test
        self._limit_px = trained_long_side_px(folder)

    def segment(self, photo: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w"]:
        """Labels at the photo's size; the segmenter sees it no larger than it was trained on."""
        size = (photo.shape[0], photo.shape[1])
        ratio = min(1.0, self._limit_px / max(size))
        seen = resize_photo(photo, (max(1, round(size[0] * ratio)), max(1, round(size[1] * ratio))))
        small = seen.permute(1, 2, 0).contiguous().numpy()
        scales, flip = self._test.scales, self._test.flip
        probabilities = segment_photo(self._model, small, scales=scales, flip=flip)
        if self._test.crf:
            probabilities = refine_prediction(small, probabilities, self._test.crf_params)
        return label_at_size(probabilities, size)

    def segment_file(self, photo: bytes, *, limit_px: int) -> bytes:
        """The palette PNG of a photo that came as a file's content.

        Args:
            photo: JPEG, PNG or whatever else `read_photo` takes.
            limit_px: Most pixels that it may have, found in its head.

        Raises:
            TooLargeError: If it has more.
            DataError: If it is no photo that can be read; one line.
        """
        with tempfile.TemporaryDirectory() as folder:
            path, mask = Path(folder) / "photo", Path(folder) / "mask.png"
            path.write_bytes(photo)
            try:
                _check_size(path, limit_px)
                pixels = read_photo(path)
            except TooLargeError:
                raise
            except DataError as error:
                bomb = isinstance(error.__context__, Image.DecompressionBombError)
                kind = TooLargeError if bomb else DataError
                raise kind(str(error).replace(str(path), "the photo")) from None
            write_mask(mask, self.segment(pixels))
            return mask.read_bytes()


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
    predictor: Predictor,
    recorder: Recorder,
    out: Path,
    overlay: bool = False,
) -> Predicted:
    """Write a palette mask of its own upright size for each photo, and the class list `labels.txt`.

    Args:
        photos: One photo, or a folder that is searched with its subfolders.
        predictor: What segments them.
        recorder: Hears of each failure as it happens.
        out: Folder of the masks; photos keep their relative names.
        overlay: Also write the masks laid over their photos, as JPEG below `out/overlay`.

    Raises:
        InputError: If there is no photo, or the masks would come among photos, or overwrite masks
            or a class list of another origin.
        StoreError: If `out` fails.
    """
    targets = _name_masks(photos, out)
    check_folder(out, mark=_MARK, names=[LABELS_FILE, *targets.values()], by="conta predict")
    masks, failures = [], []
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / _MARK).touch()
        (out / LABELS_FILE).write_text("\n".join(predictor.labels) + "\n")
        for done, (photo, target) in enumerate(targets.items(), 1):
            try:
                pixels = read_photo(photo)
            except DataError as error:
                failures.append(str(error))
                recorder.note(f"skipped: {error}")
            else:
                mask = predictor.segment(pixels)
                _write_whole(out / target, mask)
                masks.append(out / target)
                if overlay:
                    _write_overlay(out / OVERLAY_FOLDER / target, pixels, mask)
            recorder.progress("predict", done, len(targets))
    except OSError as error:
        raise StoreError(
            f"{error.filename or out} cannot be written ({error.strerror or error}); "
            "give another folder for the masks"
        ) from error
    return Predicted(tuple(masks), tuple(failures))


def _check_size(photo: Path, limit_px: int) -> None:
    height, width = photo_size(photo)
    if height * width > limit_px:
        raise TooLargeError(
            f"the photo has {height * width / 1e6:.1f} megapixels, {limit_px / 1e6:g} are allowed; "
            "send it smaller"
        )


def _name_masks(photos: Path, out: Path) -> dict[Path, Path]:
    """The photos, sorted, and the relative path of each one's mask."""
    if not photos.exists():
        raise InputError(f"{photos} does not exist; give a photo or a folder of photos")
    root = photos if photos.is_dir() else photos.parent
    above = photos.is_dir() and root.resolve().is_relative_to(out.resolve())
    if above or out.resolve() == root.resolve():
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
    """Its photos, without true masks (`masks/*.png`) and without what was predicted before."""
    marked = {mark.parent.resolve() for mark in folder.rglob(_MARK)}
    # photos may lie beside masks: somebody's `-o` was the folder that was to be segmented next
    masks = {(folder / "masks").resolve(), *marked}
    made = {out.resolve(), *(place / OVERLAY_FOLDER for place in marked)}
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in PHOTO_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and made.isdisjoint(path.resolve().parents)
        and (path.suffix != ".png" or masks.isdisjoint(path.resolve().parents))
    )


def trained_long_side_px(folder: Path) -> int:
    """The longest side at which the segmenter of a folder was trained."""
    description = json.loads((folder / DESCRIPTION).read_text())
    return SegmenterConfig.model_validate(description["segmenter"]).training.long_side_px[1]


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
