"""Reading `dataset.json`. `data.index` writes it; what is imported here is in every stage's key."""

from __future__ import annotations

import json
from pathlib import Path

from wsss_core.records import Dataset, TaggedPhoto

INDEX_FILE = "dataset.json"


def read_dataset(text: str, root: Path) -> Dataset:
    """The photos and tags that a text says, its files below `root`."""
    document = json.loads(text)
    photos = {
        entry["id"]: TaggedPhoto(
            entry["id"],
            root / entry["file"],
            tuple(entry["tags"]),
            tuple(entry["seen_size"]) if "seen_size" in entry else None,
        )
        for entry in document["photos"]
    }
    splits = {name: tuple(photos[i] for i in ids) for name, ids in document["splits"].items()}
    return Dataset(tuple(document["classes"]), splits)
