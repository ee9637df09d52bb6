"""Functions that tests send to worker processes; they must be importable there."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

import numpy as np

from wsss_core.errors import InputError


def describe(shard: int) -> tuple[int, int, int]:
    import torch

    return shard, os.getpid(), torch.get_num_threads()


def fail(shard: int) -> int:
    raise ValueError(f"shard {shard} is bad")


def refuse(shard: int) -> int:
    raise InputError(f"shard {shard} cannot be read")


def touch(path: Path) -> None:
    path.touch()


def die(shard: int) -> int:
    os._exit(9)


def sleep_long(shard: int, folder: Path) -> int:
    (folder / f"{os.getpid()}.pid").touch()
    time.sleep(60)
    return shard


def count_faults(_shard):
    """Page faults of taking and giving back 64 MB ten times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        np.ones(8_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
