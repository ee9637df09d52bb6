"""A person's own photos: a folder with `tags.csv`.

Beside it may be `labels.txt`, lists of photos (`train.txt`, `val.txt`) and `masks/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wsss_core.config import DataConfig
from wsss_core.data.labels import (
    BACKGROUND,
    LABELS_FILE,
    TRAIN,
    Fault,
    TagRow,
    check_class_count,
    find_file,
    number_tags,
    read_labels,
    read_list,
    read_tag_table,
    refuse,
    split_names,
)
from wsss_core.records import Dataset, TaggedPhoto

TAGS_FILE = "tags.csv"


def read_photos(config: DataConfig, root: Path, *, fault: Fault = refuse) -> Dataset:
    """The photos that the tag table names, each with at least one tag.

    Classes are those of the label list, or else the sorted tags. Without a list `train`, every
    photo that is on no val list trains; without a list `val` there is no such split. A list of any
    other name is one that a setting asks for, so it has to be there.
    """
    rows = read_tag_table(root / (config.tags or TAGS_FILE), fault=fault)
    classes = _read_classes(config, root, rows, fault=fault)
    photos: dict[str, TaggedPhoto] = {}
    for row in rows:
        if not row.names:
            fault(
                f"{row.where}: {row.filename!r} has no tag; write what is in it, or delete the row"
            )
        tags = number_tags(row.names, classes=classes, where=row.where, fault=fault)
        path = find_file(root, row.filename)
        if path.is_file():
            photos[row.id] = TaggedPhoto(row.id, path, tags)
        else:
            fault(f"{row.where}: no photo {row.filename!r} in {root}; add it, or delete the row")
    lists = _read_lists(config, root, rows, fault=fault)
    if config.train not in lists:
        lists[config.train] = set(photos).difference(*lists.values())
    return Dataset(
        classes,
        {
            split: tuple(photos[photo] for photo in sorted(lists[name] & set(photos)))
            for split, name in split_names(config).items()
            if name in lists
        },
    )


def _read_classes(
    config: DataConfig, root: Path, rows: Sequence[TagRow], *, fault: Fault
) -> tuple[str, ...]:
    labels = root / config.labels
    if labels.exists() or config.labels != LABELS_FILE:
        return read_labels(labels, fault=fault)
    classes = tuple(sorted({name for row in rows for name in row.names} - {BACKGROUND}))
    if classes:
        check_class_count(classes, where=str(root / (config.tags or TAGS_FILE)), fault=fault)
    return classes


def _read_lists(
    config: DataConfig, root: Path, rows: Sequence[TagRow], *, fault: Fault
) -> dict[str, set[str]]:
    """The photo ids of each list that is there."""
    ids = {row.filename: row.id for row in rows} | {row.id: row.id for row in rows}
    lists: dict[str, set[str]] = {}
    for split, name in split_names(config).items():
        path = root / f"{name}.txt"
        if not path.exists() and split == name and name in (TRAIN, *DataConfig().val):
            continue  # the default, so not asked for
        lists[name] = set()
        for entry in read_list(path, fault=fault):
            if entry.name in ids:
                lists[name].add(ids[entry.name])
            else:
                fault(
                    f"{entry.where}: {entry.name!r} is not in the tag table; add a row, or delete "
                    "the line"
                )
    return lists
