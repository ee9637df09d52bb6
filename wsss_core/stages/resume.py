"""Shard work that a kill does not undo.

Each shard becomes a folder in the job's scratch, complete or not there, with a record of its files'
hashes. A later call of the same job takes every shard whose files are still those, and computes the
others, wherever `Workspace.shard_map` has them computed. Files are linked into the artifact, not
moved: a kill before it is published costs nothing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from wsss_core.stages.shards import naming, split_shards
from wsss_core.stages.stage import Job
from wsss_core.store import file_sha256, write_atomically
from wsss_core.workers import map_shards

_RECORD, _RESULT = ".shard.json", ".result.npy"


class Named(Protocol):
    """A photo, or a photo with what a stage needs beside it."""

    @property
    def id(self) -> str:
        """The photo's."""


Item = TypeVar("Item", bound=Named)


def write_shards(
    write: Callable[..., Any],
    items: Sequence[Item],
    *,
    out: Path,
    job: Job,
    what: str,
    device: str = "cpu",
) -> list[np.ndarray]:
    """Fill `out` with what `write` makes of each shard of the photos.

    Args:
        write: `write(shard, out=folder)`: writes the shard's files below the folder and returns a
            number or an array; a function of a module, or a `functools.partial` of one.
        items: The photos whose files are to be written, in the order of their ids.
        out: The artifact's folder.
        job: Whose scratch keeps the shards.
        what: Names the work in the progress.
        device: What `write` computes on; shards of a GPU stay in this process, one by one.

    Returns:
        What `write` returned, shard by shard.

    Raises:
        ContaError: What `write` raised, with the shard in its message; an OSError stays one.
    """
    shards, below = split_shards(items), job.scratch / "shards"
    folders = [below / _name(shard) for shard in shards]
    whole = [_is_whole(folder) for folder in folders]
    if any(whole):
        job.work.recorder.note(f"{what} goes on after {sum(whole)} of {len(shards)} shards")
    on_cpu = device == "cpu"
    compute = job.work.shard_map if on_cpu else map_shards
    for _ in compute(
        functools.partial(_write_whole, write=write, below=below),
        [shard for shard, done in zip(shards, whole, strict=True) if not done],
        workers=job.work.runtime.workers if on_cpu else 1,
        recorder=job.work.recorder,
        what=what,
    ):
        pass
    for folder in folders:
        for file in _read_hashes(folder):
            if file != _RESULT:
                _link(folder / file, out / file)
    return [np.load(folder / _RESULT, allow_pickle=False) for folder in folders]


def _name(shard: Sequence[Named]) -> str:
    return hashlib.sha256("\n".join(item.id for item in shard).encode()).hexdigest()[:16]


def _write_whole(shard: Sequence[Named], *, write: Callable[..., Any], below: Path) -> None:
    """Write a shard's folder; if another process writes the same one, the first stands."""
    folder, unfinished = below / _name(shard), below / f".{uuid.uuid4().hex}"
    unfinished.mkdir(parents=True)
    try:
        with naming("shard", [f"{shard[0].id} to {shard[-1].id}"]):
            result = write(shard, out=unfinished)
        np.save(unfinished / _RESULT, np.asarray(result), allow_pickle=False)
        files = sorted(path for path in unfinished.rglob("*") if path.is_file())
        hashes = {path.relative_to(unfinished).as_posix(): file_sha256(path) for path in files}
        write_atomically(unfinished / _RECORD, json.dumps({"sha256": hashes}).encode())
        if not _is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # written meanwhile
                unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _read_hashes(folder: Path) -> dict[str, str]:
    hashes: dict[str, str] = json.loads((folder / _RECORD).read_text())["sha256"]
    return hashes


def _is_whole(folder: Path) -> bool:
    """Whether the shard is there, and every file of it as it was written."""
    try:
        hashes = _read_hashes(folder)
        return _RESULT in hashes and all(
            file_sha256(folder / file) == sha256 for file, sha256 in hashes.items()
        )
    except (OSError, ValueError):
        return False


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links, or scratch on another one
        shutil.copyfile(source, target)
