"""One way to time and to write down: warm-up, device sync, median and quartiles, what it ran on."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from wsss_core.store import library_versions


def time_calls(
    call: Callable[[], object], *, repeats: int = 5, warm_up: int = 1
) -> dict[str, float]:
    """Seconds a call: median and quartiles of `repeats` calls after `warm_up` uncounted ones."""
    seconds = []
    for index in range(warm_up + repeats):
        started = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if index >= warm_up:
            seconds.append(time.perf_counter() - started)
    low, middle, high = statistics.quantiles(seconds, n=4)
    return {"median_s": middle, "q1_s": low, "q3_s": high, "repeats": float(repeats)}


def write_record(suite: str, name: str, figures: dict[str, Any]) -> None:
    """Print one measurement as a line of JSON."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    record = {
        "suite": suite,
        "name": name,
        **figures,
        "commit": commit or "unknown",
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
        "versions": library_versions(),
    }
    print(json.dumps(record))
