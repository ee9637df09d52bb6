"""A round's pseudo-masks in VOC's layout, for other toolboxes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from wsss_core.data.document import INDEX_FILE
from wsss_core.data.images import mask_at_size, read_mask, write_mask
from wsss_core.data.labels import BACKGROUND, LABELS_FILE
from wsss_core.errors import InputError, StoreError
from wsss_core.records import Manifest
from wsss_core.stages.stage import Workspace
from wsss_core.store import read_index

_MARK = ".exported"


def check_folder(out: Path, *, mark: str, names: Iterable[str | Path], by: str) -> None:
    """Refuse to write masks where somebody's photos, masks or class list are.

    Args:
        out: The folder; need not exist.
        mark: File that says that all that is in there came from the same command.
        names: What would be written, relative to it.
        by: The command.

    Raises:
        InputError: If it is a file, holds photos (in there masks count as true), or holds one of
            `names` without the mark.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a folder for the masks")
    if any((out / name).exists() for name in ("tags.csv", "JPEGImages", "VOCdevkit")):
        raise InputError(f"{out} holds photos; in there masks count as true; give another folder")
    if (out / mark).exists():
        return
    there = next((out / name for name in names if (out / name).exists()), None)
    if there is not None:
        raise InputError(
            f"{there} may not be of `{by}`, for {mark} is not beside it; give another folder for "
            "the masks"
        )


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
        InputError: If `out` is a file, holds photos, or holds masks or lists of another origin.
        StoreError: If the store or `out` fails.
    """
    source = work.store.open(masks)
    document = json.loads((work.store.open(data) / INDEX_FILE).read_text())
    sizes = {entry["id"]: entry["size"] for entry in document["photos"] if "size" in entry}
    files = {
        name: file for name, file in sorted(read_index(source).items()) if file.endswith(".png")
    }
    targets = {name: Path("SegmentationClass") / file for name, file in files.items()}
    lists = Path("ImageSets") / "Segmentation" / "train.txt"
    written: list[str | Path] = [LABELS_FILE, lists, *targets.values()]
    check_folder(out, mark=_MARK, names=written, by="conta export masks")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / _MARK).touch()
        for done, (name, file) in enumerate(files.items(), 1):
            target = out / targets[name]
            target.parent.mkdir(parents=True, exist_ok=True)
            if name in sizes:  # seen smaller
                height, width = sizes[name]
                write_mask(target, mask_at_size(read_mask(source / file), (height, width)))
            else:
                shutil.copyfile(source / file, target)
            work.recorder.progress("export masks", done, len(files))
        (out / LABELS_FILE).write_text("\n".join([BACKGROUND, *document["classes"]]) + "\n")
        (out / lists).parent.mkdir(parents=True, exist_ok=True)
        (out / lists).write_text("".join(f"{name}\n" for name in files))
    except OSError as error:
        raise StoreError(
            f"{error.filename or out} cannot be written ({error.strerror or error}); "
            "give another folder for the masks"
        ) from error
    return len(files)
