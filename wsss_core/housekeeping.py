"""What lies in a home, and what of it nobody needs any more.

An artifact is needed while a run refers to it. Scratch is needed until its artifact is published,
and only by the run that stopped there. What a process is writing right now is never touched.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from wsss_core.store import UNFINISHED, Store, scratch_folder

Key = tuple[str, str]
"""Stage and key of an artifact."""


@dataclass(frozen=True)
class Roots:
    """What is needed.

    Attributes:
        artifacts: Artifacts that runs refer to.
        scratch: Keys at which unfinished runs stopped; None if that is not known of all.
    """

    artifacts: frozenset[Key]
    scratch: frozenset[Key] | None


@dataclass(frozen=True)
class Garbage:
    """A folder that nobody needs.

    Attributes:
        path: The folder.
        num_bytes: Its size.
        why: In a few words.
    """

    path: Path
    num_bytes: int
    why: str


def kept_epochs(home: Path, stage: str, key: str) -> int:
    """How many epochs of a training its checkpoint holds; 0 for a stage without one."""
    try:
        state = json.loads((scratch_folder(home, stage, key) / "checkpoint.json").read_text())
        return len(state["history"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def folder_bytes(folder: Path) -> int:
    """Size of all files below a folder, or of a file; what vanishes meanwhile counts nothing."""
    if not folder.is_dir():
        return _file_bytes(folder)
    return sum(
        _file_bytes(Path(place) / name) for place, _, names in os.walk(folder) for name in names
    )


def find_garbage(home: Path, roots: Roots) -> list[Garbage]:
    """Everything in store and scratch that is not needed, in the order of its path."""
    found = [*_stored_garbage(home, roots), *_scratch_garbage(home, roots)]
    return [Garbage(path, folder_bytes(path), why) for path, why in sorted(found)]


def remove_garbage(garbage: Garbage) -> None:
    """Remove a folder; a death on the way leaves no half artifact, only other garbage."""
    path = garbage.path
    if not path.name.startswith(UNFINISHED):
        path = path.rename(path.with_name(f"{UNFINISHED}{path.name}"))
    shutil.rmtree(path)


def _stored_garbage(home: Path, roots: Roots) -> Iterator[tuple[Path, str]]:
    store = Store(home / "store")
    for folder in store.root.glob("*/*/"):
        stage, key = folder.parent.name, _key_of(folder)
        if store.writer(stage, key) is not None:
            continue
        if folder.name.startswith(UNFINISHED):
            yield folder, "left by a process that died"
        elif (stage, key) not in roots.artifacts:
            yield folder, "no run refers to it"


def _scratch_garbage(home: Path, roots: Roots) -> Iterator[tuple[Path, str]]:
    store = Store(home / "store")
    for folder in (home / "scratch").glob("*/*/"):
        stage, key = folder.parent.name, _key_of(folder)
        if store.writer(stage, key) is not None:
            continue
        if store.peek(stage, key) is not None:
            yield folder, "its artifact is published"
        elif roots.scratch is not None and (stage, key) not in roots.scratch:
            yield folder, "no run stopped there"


def _key_of(folder: Path) -> str:
    return folder.name.removeprefix(UNFINISHED).partition("@")[0]


def _file_bytes(path: Path) -> int:
    try:
        known = path.lstat()
    except OSError:
        return 0
    return known.st_size // known.st_nlink  # a shard's file is the artifact's too
