"""Data in the layout of the PASCAL VOC devkit, with tags from a csv or from its XML."""

from __future__ import annotations

import shutil
import unicodedata
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path

from wsss_core.config import DataConfig
from wsss_core.data.images import PICTURE_SUFFIXES
from wsss_core.data.labels import (
    LABELS_FILE,
    TRAIN,
    VOC_CLASSES,
    Fault,
    Listed,
    TagRow,
    find_file,
    number_tags,
    photo_id,
    read_labels,
    read_list,
    read_tag_table,
    refuse,
    split_names,
)
from wsss_core.errors import DataError
from wsss_core.observe import Recorder
from wsss_core.records import Dataset, TaggedPhoto

TAGS_FILE = "image_tags.csv"
ANNOTATIONS = "Annotations"

_DEVKIT = Path("VOCdevkit/VOC2012")


def read_voc(
    config: DataConfig, root: Path, recorder: Recorder, *, fault: Fault = refuse
) -> Dataset:
    """The photos on the lists `config.train` and `config.val`; those that train have a tag.

    Classes are those of the label list, or VOC's 20 where there is none. Tags come from the csv,
    where an unknown class is a fault, or from the names of the objects in `Annotations/<id>.xml`
    ("difficult" ones too), where objects that are not on the label list do not count: so a label
    list may choose some of VOC's classes.
    """
    folder = find_devkit(root)
    if folder is None and config.download:
        folder = _download(root, recorder)
    if folder is None:
        fault(
            f"{root} holds no JPEGImages folder; give the folder of a VOC devkit, or set "
            "data.download=true for VOC 2012"
        )
        return Dataset((), {TRAIN: ()})
    classes = _read_classes(config, folder, root, fault=fault)
    files = _list_photos(folder / "JPEGImages", fault=fault)
    lists = {
        split: _read_list(folder, name, files, fault=fault)
        for split, name in split_names(config).items()
    }
    rows = _read_tags(config, folder, root, lists, classes, recorder, fault=fault)
    for photo in lists[TRAIN]:
        if photo in rows and not rows[photo].names:
            fault(
                f"{rows[photo].where}: training photo {photo!r} has no tag of the label list; add "
                f"one, or take it off the list {config.train!r}"
            )
    tags = {
        photo: number_tags(row.names, classes=classes, where=row.where, fault=fault)
        for photo, row in rows.items()
    }
    return Dataset(
        classes,
        {
            split: tuple(
                TaggedPhoto(photo, files[photo], tags.get(photo, ())) for photo in sorted(listed)
            )
            for split, listed in lists.items()
        },
    )


def find_devkit(root: Path) -> Path | None:
    """The folder with `JPEGImages`: `root` or the VOC2012 below it; None if there is none."""
    for folder in (root, root / _DEVKIT, root / _DEVKIT.name):
        if (folder / "JPEGImages").is_dir():
            return folder
    return None


def _download(root: Path, recorder: Recorder) -> Path:
    """Fetch VOC 2012 (2 GB, MD5 checked) by torchvision; it appears in `root` once whole."""
    from torchvision.datasets import VOCSegmentation  # seconds to import, and seldom needed

    scratch = root / ".download"
    recorder.note(f"downloading VOC 2012 (2 GB) into {root}")
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        VOCSegmentation(str(scratch), year="2012", image_set="train", download=True)
        (root / _DEVKIT).parent.mkdir(exist_ok=True)
        (scratch / _DEVKIT).replace(root / _DEVKIT)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"VOC 2012 could not be downloaded into {root} ({reason}); try again, or unpack "
            "VOCtrainval there yourself"
        ) from error
    shutil.rmtree(scratch, ignore_errors=True)
    return root / _DEVKIT


def _read_classes(config: DataConfig, folder: Path, root: Path, *, fault: Fault) -> tuple[str, ...]:
    path = _beside_or_above(config.labels, folder, root)
    if path.exists() or config.labels != LABELS_FILE:
        return read_labels(path, fault=fault)
    return VOC_CLASSES


def _beside_or_above(name: str, folder: Path, root: Path) -> Path:
    """Where a file of the user's is: beside JPEGImages, or in the folder that holds the devkit."""
    return root / name if (root / name).exists() else folder / name


def _list_photos(folder: Path, *, fault: Fault) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in PICTURE_SUFFIXES or not path.is_file():
            continue
        photo = unicodedata.normalize("NFC", path.stem)  # as lists and tables are read
        if photo in files:
            fault(f"{path} and {files[photo].name} share the id {photo!r}; keep one")
        files[photo] = path
    return files


def _read_list(
    folder: Path, name: str, files: Mapping[str, Path], *, fault: Fault
) -> dict[str, Listed]:
    """The listed photos that exist, by id."""
    lists = folder / "ImageSets" / "Segmentation"
    path = lists / f"{name}.txt"
    if not path.exists():
        there = ", ".join(sorted(other.stem for other in lists.glob("*.txt"))) or "no list"
        fault(
            f"{path} does not exist; set data.train and data.val to lists that are there ({there})"
        )
        return {}
    listed: dict[str, Listed] = {}
    for entry in read_list(path, fault=fault):
        photo = entry.name if entry.name in files else photo_id(entry.name)
        if photo in files:
            listed[photo] = entry
        else:
            fault(
                f"{entry.where}: no photo {entry.name!r} in {folder / 'JPEGImages'}; add it, or "
                "delete the line"
            )
    return listed


def _read_tags(
    config: DataConfig,
    folder: Path,
    root: Path,
    lists: Mapping[str, Mapping[str, Listed]],
    classes: Sequence[str],
    recorder: Recorder,
    *,
    fault: Fault,
) -> dict[str, TagRow]:
    """The tags of the listed photos by id, and of any others the csv names."""
    wanted = {photo: entry for listed in lists.values() for photo, entry in listed.items()}
    csv = _beside_or_above(config.tags or TAGS_FILE, folder, root)
    no_csv = config.tags is None and not csv.exists() and (folder / ANNOTATIONS).is_dir()
    if config.tags == ANNOTATIONS or no_csv:
        return _read_annotations(folder, wanted, classes, recorder, fault=fault)
    table = read_tag_table(csv, fault=fault)
    rows = {row.id: row for row in table}
    for photo, entry in wanted.items():
        if table and photo not in rows:
            fault(
                f"{entry.where}: photo {photo!r} has no row in {csv}; add one, or delete the line"
            )
    return rows


def _read_annotations(
    folder: Path,
    wanted: Mapping[str, Listed],
    classes: Sequence[str],
    recorder: Recorder,
    *,
    fault: Fault,
) -> dict[str, TagRow]:
    rows = {}
    for done, photo in enumerate(sorted(wanted), start=1):
        path = find_file(folder / ANNOTATIONS, f"{photo}.xml")
        try:
            tree = ET.parse(path)  # noqa: S314  expat stops entity bombs since 2.4.1
        except FileNotFoundError:
            fault(
                f"{wanted[photo].where}: photo {photo!r} has no {path}; add it, or delete the line"
            )
        except (OSError, ET.ParseError) as error:
            fault(f"{path} cannot be read as XML ({error}); copy it again")
        else:
            # An object's parts (head, hand) have names too, one level deeper.
            names = dict.fromkeys(
                unicodedata.normalize("NFC", node.text or "").strip()
                for node in tree.iterfind("object/name")
            )
            known = tuple(name for name in names if name in classes)
            rows[photo] = TagRow(str(path), f"{photo}.jpg", known)
        recorder.progress("reading annotations", done, len(wanted))
    return rows
