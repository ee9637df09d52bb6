"""The pixel truth of photos: for scores alone.

Nothing that is trained depends on it, but for `supervision: truth`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from wsss_core.data.images import mask_at_size, photo_size, read_mask
from wsss_core.data.labels import find_file
from wsss_core.data.voc import find_devkit
from wsss_core.errors import DataError
from wsss_core.records import IGNORE_INDEX, TaggedPhoto


@dataclass(frozen=True)
class TruthMasks:
    """Where the masks of a data set are.

    Attributes:
        folders: Where `<photo id>.png` may be, the first that has it counts; none of them need
            exist.
    """

    folders: tuple[Path, ...]

    @classmethod
    def of(cls, root: Path) -> TruthMasks:
        """The masks beside a data set: `SegmentationClass/` (voc, scenes) and `masks/` (photos)."""
        return cls(((find_devkit(root) or root) / "SegmentationClass", root / "masks"))

    def path(self, photo_id: str) -> Path | None:
        """The mask file of a photo; None if it has none."""
        paths = (find_file(folder, f"{photo_id}.png") for folder in self.folders)
        return next((path for path in paths if path.is_file()), None)

    def read(self, photo: TaggedPhoto, *, num_classes: int) -> UInt8[np.ndarray, "h w"]:
        """The labels of a photo's mask, 0..num_classes or 255, at the size the photo is seen at.

        Args:
            photo: The photo; its file's upright size must be the mask's.
            num_classes: Number of foreground classes.

        Raises:
            DataError: If there is no mask, or it is broken, of another size, or holds a label
                beyond the classes.
        """
        path = self.path(photo.id)
        if path is None:
            places = " or ".join(str(folder) for folder in self.folders)
            raise DataError(
                f"no mask {photo.id}.png in {places}; add it, or take the photo off the list"
            )
        mask, size = read_mask(path), photo_size(photo.path)
        if mask.shape != size:
            raise DataError(
                f"{path} is {mask.shape[1]} x {mask.shape[0]} px, its photo {size[1]} x {size[0]} "
                "px; make the mask as large as the photo is shown"
            )
        stray = mask[(mask > num_classes) & (mask != IGNORE_INDEX)]
        if stray.size:
            raise DataError(
                f"{path} holds label {stray[0]}; expected 0..{num_classes} or {IGNORE_INDEX}: "
                "check the label list"
            )
        return mask_at_size(mask, photo.seen_size or size)
