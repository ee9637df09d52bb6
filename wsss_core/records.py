"""The small frozen records that travel between rooms, stages and tasks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

IGNORE_INDEX = 255  # VOC paints object borders and void regions with this label


@dataclass(frozen=True)
class TaggedPhoto:
    """One photo and what a person said is in it; never its pixel truth.

    Attributes:
        id: Name inside the dataset, the file's relative path without suffix; sorts the shards.
        path: The photo's file.
        tags: Foreground classes present, 0-based and ascending (mask label = tag + 1).
        seen_size: (height, width) at which every stage sees it; None: the file's own.
    """

    id: str
    path: Path
    tags: tuple[int, ...]
    seen_size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Dataset:
    """Class names and the tagged photos of each split.

    Attributes:
        classes: Foreground class names; the mask label of `classes[k]` is k + 1, 0 is background.
        splits: Photos of each split, sorted by id. `train` always exists.
    """

    classes: tuple[str, ...]
    splits: dict[str, tuple[TaggedPhoto, ...]]


class Manifest(BaseModel):
    """What a finished stage hands on: which artifact, and what was measured while it was made.

    Attributes:
        stage: Name of the stage, the first folder below `store/`.
        key: Hash of everything that decides the content; the second folder.
        digest: Hash of the content itself; what the keys of later stages depend on.
        count: Number of files in the artifact.
        index_sha256: Hash of the artifact's own `index.jsonl` (id, file, sha256 of each file).
        metrics: Flat names to numbers, e.g. `pseudo/miou` in [0, 1]. NaN is never stored.
        history: Scalars a training epoch, in order (`{"epoch": 0, "loss": ...}`).
        finished_ms: Wall clock when it was made, ms since 1970.
        seconds: How long it took to make.
        versions: Library versions at that time.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    key: str
    digest: str
    count: int
    index_sha256: str
    metrics: dict[str, float] = {}
    history: list[dict[str, float]] = []
    finished_ms: int
    seconds: float
    versions: dict[str, str] = {}
