"""Functions that tests send to worker processes; they must be importable there."""

from __future__ import annotations

import os
import time
from pathlib import Path


def describe(shard: int) -> tuple[int, int, int]:
    import torch

    return shard, os.getpid(), torch.get_num_threads()


def fail(shard: int) -> int:
    raise ValueError(f"shard {shard} is bad")


def die(shard: int) -> int:
    os._exit(9)


def sleep_long(shard: int, folder: Path) -> int:
    (folder / f"{os.getpid()}.pid").touch()
    time.sleep(60)
    return shard
