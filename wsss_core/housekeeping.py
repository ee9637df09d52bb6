"""What lies in a home beside the runs: artifacts and scratch."""

from __future__ import annotations

import json
from pathlib import Path


def scratch_folder(home: Path, stage: str, key: str) -> Path:
    """Where a stage keeps its checkpoints until its artifact is published."""
    return home / "scratch" / stage / key


def kept_epochs(home: Path, stage: str, key: str) -> int:
    """How many epochs of a training its checkpoint holds; 0 for a stage without one."""
    try:
        state = json.loads((scratch_folder(home, stage, key) / "checkpoint.json").read_text())
        return len(state["history"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
