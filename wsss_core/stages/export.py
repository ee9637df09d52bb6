"""A round's pseudo-masks in VOC's layout, for other toolboxes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from wsss_core.data.document import INDEX_FILE
from wsss_core.data.images import mask_at_size, read_mask, write_mask
from wsss_core.errors import InputError, StoreError
from wsss_core.records import Manifest
from wsss_core.stages.stage import Workspace
from wsss_core.store import read_index


def export_masks(masks: Manifest, *, data: Manifest, work: Workspace, out: Path) -> int:
    """Write the masks of an artifact, each as large as its photo; the list is written last.

    Writes `SegmentationClass/<photo id>.png` (VOC palette), `labels.txt` (background first) and
    `ImageSets/Segmentation/train.txt` (the photo ids that have a mask). Photos are not copied.

    Args:
        masks: Manifest of pseudo-masks or predictions.
        data: Manifest of the photos they belong to.
        work: Whose store holds both.
        out: Folder to write to; an earlier export of the same photos is replaced.

    Returns:
        Number of masks.

    Raises:
        InputError: If `out` is a file, or holds photos: in there masks count as true.
        StoreError: If the store or `out` fails.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a folder for the masks")
    if any((out / name).exists() for name in ("tags.csv", "JPEGImages", "VOCdevkit")):
        raise InputError(f"{out} holds photos; in there masks count as true; give another folder")
    source = work.store.open(masks)
    document = json.loads((work.store.open(data) / INDEX_FILE).read_text())
    sizes = {entry["id"]: entry["size"] for entry in document["photos"] if "size" in entry}
    files = {
        name: file for name, file in sorted(read_index(source).items()) if file.endswith(".png")
    }
    try:
        for done, (name, file) in enumerate(files.items(), 1):
            target = out / "SegmentationClass" / file
            target.parent.mkdir(parents=True, exist_ok=True)
            if name in sizes:  # seen smaller
                height, width = sizes[name]
                write_mask(target, mask_at_size(read_mask(source / file), (height, width)))
            else:
                shutil.copyfile(source / file, target)
            work.recorder.progress("export masks", done, len(files))
        (out / "labels.txt").write_text("\n".join(["background", *document["classes"]]) + "\n")
        lists = out / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / "train.txt").write_text("".join(f"{name}\n" for name in files))
    except OSError as error:
        raise StoreError(
            f"{error.filename or out} cannot be written ({error.strerror or error})"
        ) from error
    return len(files)
