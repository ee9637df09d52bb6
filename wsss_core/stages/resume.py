"""Shard work that a kill does not undo.

Each shard writes into a folder of its own in the job's scratch, and a record of its files' hashes
last. A later call of the same job takes every shard whose files are still those, and computes the
others. Files are linked into the artifact, not moved: a kill before it is published costs nothing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from wsss_core.records import TaggedPhoto
from wsss_core.stages.shards import split_shards
from wsss_core.stages.stage import Job
from wsss_core.store import file_sha256, write_atomically
from wsss_core.workers import map_shards

_RECORD = ".shard.json"


def write_shards(
    write: Callable[..., Any],
    photos: Sequence[TaggedPhoto],
    *,
    out: Path,
    job: Job,
    workers: int,
    what: str,
) -> list[Any]:
    """Fill `out` with what `write` makes of each shard of the photos.

    Args:
        write: `write(shard, out=folder)`: writes the shard's files below the folder and returns a
            JSON value; a function of a module, or a `functools.partial` of one.
        photos: Whose files are to be written.
        out: The artifact's folder.
        job: Whose scratch keeps the shards.
        workers: Number of processes.
        what: Names the work in the progress.

    Returns:
        What `write` returned, shard by shard.
    """
    shards = split_shards(photos)
    folders = [job.scratch / "shards" / _name(shard) for shard in shards]
    records = {folder: record for folder in folders if (record := _read_whole(folder)) is not None}
    if records:
        job.work.recorder.note(f"{what} goes on after {len(records)} of {len(shards)} shards")
    waiting = [
        (folder, shard)
        for folder, shard in zip(folders, shards, strict=True)
        if folder not in records
    ]
    made = map_shards(
        functools.partial(_write_whole, write=write, below=job.scratch / "shards"),
        [shard for _, shard in waiting],
        workers=workers,
        recorder=job.work.recorder,
        what=what,
    )
    records |= {folder: record for (folder, _), record in zip(waiting, made, strict=True)}
    for folder in folders:
        for file in records[folder]["sha256"]:
            _link(folder / file, out / file)
    return [records[folder]["result"] for folder in folders]


def _name(shard: Sequence[TaggedPhoto]) -> str:
    return hashlib.sha256("\n".join(photo.id for photo in shard).encode()).hexdigest()[:16]


def _write_whole(
    shard: Sequence[TaggedPhoto], *, write: Callable[..., Any], below: Path
) -> dict[str, Any]:
    folder = below / _name(shard)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    result = write(shard, out=folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
    record = {"result": result, "sha256": hashes}
    write_atomically(folder / _RECORD, json.dumps(record).encode())
    return record


def _read_whole(folder: Path) -> dict[str, Any] | None:
    """The shard's record, if every file is as it was written."""
    try:
        record: dict[str, Any] = json.loads((folder / _RECORD).read_text())
        hashes = record["sha256"].items()
        sound = all(file_sha256(folder / file) == sha256 for file, sha256 in hashes)
    except (OSError, ValueError):
        return None
    return record if sound else None


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links, or scratch on another one
        shutil.copyfile(source, target)
