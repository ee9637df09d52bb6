"""What a data set holds and everything that is wrong with it, before any compute is spent."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from wsss_core.config import DataConfig
from wsss_core.data.images import PICTURE_SUFFIXES, read_photo
from wsss_core.data.index import unique_photos
from wsss_core.data.labels import TRAIN, TagRow, read_tag_table
from wsss_core.data.photos import TAGS_FILE
from wsss_core.data.source import detect_source, find_overlaps, gather_source
from wsss_core.data.truth import TruthMasks
from wsss_core.errors import DataError
from wsss_core.observe import Recorder
from wsss_core.records import Dataset, TaggedPhoto

_NAMED = 5  # photos named in a warning about many


@dataclass(frozen=True)
class DataReport:
    """The counts of a data set, and what a person should mend or know.

    Attributes:
        source: The layout it was read as.
        classes: Foreground classes.
        num_photos: Photos of each split.
        num_masks: Photos of each split that have a mask.
        tagged: Photos of each class, by split.
        company: Training photos that both classes of a pair are in; pairs that occur.
        alone: Training photos with no other class, by class.
        faults: What stops a run; one line each.
        warnings: What a run can do with, but its user should know; one line each.
    """

    source: str
    classes: tuple[str, ...]
    num_photos: Mapping[str, int]
    num_masks: Mapping[str, int]
    tagged: Mapping[str, Mapping[str, int]]
    company: Mapping[tuple[str, str], int]
    alone: Mapping[str, int]
    faults: tuple[str, ...]
    warnings: tuple[str, ...]

    def lines(self) -> list[str]:
        """The report as text for a terminal."""
        splits = list(self.num_photos)
        labels = [f"{label} {name}" for label, name in enumerate(self.classes, start=1)]
        width = max((len(name) for name in (*labels, "masks")), default=0)
        columns = [*splits, "alone"]

        def row(name: str, numbers: Sequence[object]) -> str:
            cells = [f"{n:>{max(len(c), 7)}}" for n, c in zip(numbers, columns, strict=False)]
            return f"{name:<{width}} {' '.join(cells)}"

        lines = [f"layout {self.source}, {len(self.classes)} classes", row("", columns)]
        lines += [row("photos", list(self.num_photos.values()))]
        lines += [row("masks", list(self.num_masks.values()))]
        lines += [
            row(
                label,
                [*(self.tagged[split].get(name, 0) for split in splits), self.alone.get(name, 0)],
            )
            for label, name in zip(labels, self.classes, strict=True)
        ]
        pairs = sorted(self.company.items(), key=lambda item: (-item[1], item[0]))
        if pairs:
            together = ", ".join(f"{a}+{b} {count}" for (a, b), count in pairs)
            lines.append(f"company in train: {together}")
        lines += [f"warning: {text}" for text in self.warnings]
        lines += [f"fault: {text}" for text in self.faults]
        lines.append(f"faults: {len(self.faults)}, warnings: {len(self.warnings)}")
        return lines


def check_data(config: DataConfig, root: Path, recorder: Recorder) -> DataReport:
    """Look at everything below `root`: tables, lists, each photo and each mask. No fault stops it.

    Args:
        config: Settings of the data; source `scenes`, which needs no check, stands for the layout
            that is found.
        root: The folder of the data.
        recorder: Hears of the progress.
    """
    if config.source == "scenes":
        config = config.model_copy(update={"source": detect_source(root)})
    faults: list[str] = []
    try:
        dataset = gather_source(config, root, recorder, fault=faults.append)
    except DataError as error:  # a download that failed
        faults.append(str(error))
        dataset = Dataset((), {TRAIN: ()})
    photos, truth = unique_photos(dataset), TruthMasks.of(root)
    for done, photo in enumerate(photos, start=1):
        faults += _check_photo(photo, truth, num_classes=len(dataset.classes))
        recorder.progress("checking photos", done, len(photos))
    names = dataset.classes
    trained = [[names[tag] for tag in photo.tags] for photo in dataset.splits[TRAIN]]
    company = Counter(pair for tags in trained for pair in combinations(tags, 2))
    alone = Counter(tags[0] for tags in trained if len(tags) == 1)
    num_masks = {
        split: sum(truth.path(photo.id) is not None for photo in members)
        for split, members in dataset.splits.items()
    }
    warnings = [
        *_warn_of_company(names, trained),
        *_warn_of_case(names),
        *find_overlaps(dataset),
        *_warn_of_masks(dataset, num_masks),
        *_warn_of_files(config, root, truth),
    ]
    return DataReport(
        source=config.source,
        classes=names,
        num_photos={split: len(members) for split, members in dataset.splits.items()},
        num_masks=num_masks,
        tagged={
            split: Counter(names[tag] for photo in members for tag in photo.tags)
            for split, members in dataset.splits.items()
        },
        company=company,
        alone=alone,
        faults=tuple(faults),
        warnings=tuple(warnings),
    )


def _check_photo(photo: TaggedPhoto, truth: TruthMasks, *, num_classes: int) -> list[str]:
    try:
        read_photo(photo.path)
        if truth.path(photo.id) is not None:
            truth.read(photo, num_classes=num_classes)
    except DataError as error:
        return [str(error)]
    return []


def _warn_of_company(classes: Sequence[str], trained: Sequence[Sequence[str]]) -> list[str]:
    """What the tags of the training photos cannot teach."""
    warnings = []
    for name in classes if trained else ():
        photos = [tags for tags in trained if name in tags]
        if not photos:
            warnings.append(f"class {name!r} is in no training photo; it cannot be learned")
            continue
        if len(photos) == len(trained):
            warnings.append(
                f"class {name!r} is in every training photo; nothing tells it from the background, "
                "add photos without it"
            )
            continue
        company = Counter(other for tags in photos for other in tags if other != name)
        always = [other for other, count in company.items() if count == len(photos)]
        if always:
            warnings.append(
                f"class {name!r} is never without {' and '.join(map(repr, sorted(always)))} "
                f"({len(photos)} training photos); tags cannot tell them apart"
            )
        elif min(len(tags) for tags in photos) > 1:
            other, count = company.most_common(1)[0]
            warnings.append(
                f"class {name!r} is never alone ({len(photos)} training photos, {count} with "
                f"{other!r}); tags can hardly tell it from its company"
            )
    return warnings


def _warn_of_case(classes: Sequence[str]) -> list[str]:
    spellings: dict[str, list[str]] = {}
    for name in classes:
        spellings.setdefault(name.lower(), []).append(name)
    return [
        f"classes {' and '.join(map(repr, names))} differ in case alone; are they one class?"
        for names in spellings.values()
        if len(names) > 1
    ]


def _warn_of_masks(dataset: Dataset, num_masks: Mapping[str, int]) -> list[str]:
    return [
        f"{len(photos) - num_masks[split]} of the {len(photos)} photos of {split!r} have no mask; "
        "scores leave them out"
        for split, photos in dataset.splits.items()
        if any(num_masks.values()) and num_masks[split] < len(photos)
    ]


def _warn_of_files(config: DataConfig, root: Path, truth: TruthMasks) -> list[str]:
    """What lies in a person's folder and belongs to no row of the tag table."""
    if config.source != "photos":  # VOC has photos and masks that are on no list
        return []
    tags = root / (config.tags or TAGS_FILE)
    rows = read_tag_table(tags, fault=lambda _: None)
    if not rows:  # a fault says so, and every file would be named here
        return []
    return [*_warn_of_stray_masks(rows, truth), *_warn_of_untagged(rows, tags, root)]


def _warn_of_stray_masks(rows: Sequence[TagRow], truth: TruthMasks) -> list[str]:
    """Pictures that look like masks and are of no tagged photo."""
    used = {unicodedata.normalize("NFC", str(truth.path(row.id))) for row in rows}
    stray = sorted(
        path.relative_to(folder.parent).as_posix()
        for folder in truth.folders
        for path in folder.rglob("*")
        if path.suffix.lower() in PICTURE_SUFFIXES
        and path.is_file()
        and not path.name.startswith(".")  # a Mac puts ._a.png beside a.png
        and unicodedata.normalize("NFC", str(path)) not in used
    )
    if not stray:
        return []
    return [
        f"{len(stray)} masks belong to no photo; a mask has its photo's name and subfolder, and "
        f"ends in .png: {_name_some(stray)}"
    ]


def _name_some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def _warn_of_untagged(rows: Sequence[TagRow], tags: Path, root: Path) -> list[str]:
    """Pictures that the tag table does not name."""
    named = {row.filename for row in rows}
    files = (
        path.relative_to(root)
        for path in root.rglob("*")
        if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file()
    )
    rest = sorted(
        file.as_posix()
        for file in files
        if file.parts[0] != "masks" and not any(part.startswith(".") for part in file.parts)
    )
    untagged = [file for file in rest if unicodedata.normalize("NFC", file) not in named]
    if not untagged:
        return []
    shown = _name_some(untagged)
    return [f"{len(untagged)} photos have no row in {tags} and are not used: {shown}"]
