"""How a stage tells the world about its progress, without knowing who listens."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

logger = logging.getLogger(__name__)


@runtime_checkable
class Recorder(Protocol):
    """Receives progress and scalars of a running stage; tasks give it a Prefect and MLflow face."""

    def progress(self, what: str, done: int, total: int) -> None:
        """Report that `done` of `total` units of `what` are finished."""

    def scalars(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Report the scalars of training epoch `step` (0-based) of `stage`."""

    def note(self, message: str) -> None:
        """Report one line a user should see (a rebuilt artifact, a photo that was skipped)."""


class SilentRecorder:
    """Keeps nothing; for tests and library use."""

    def progress(self, what: str, done: int, total: int) -> None:
        """Ignore."""

    def scalars(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Ignore."""

    def note(self, message: str) -> None:
        """Ignore."""


class ConsoleRecorder:
    """Writes to stderr: one redrawn line on a terminal, else a line every `every_s` s at most."""

    def __init__(self, every_s: float = 15.0) -> None:
        self._terminal = sys.stderr.isatty()
        self._every_s = 0.2 if self._terminal else every_s
        self._started: dict[str, float] = {}
        self._last_s = 0.0

    def progress(self, what: str, done: int, total: int) -> None:
        """Draw or print `what done/total, time left`."""
        now = time.monotonic()
        started = self._started.setdefault(what, now)
        if done < total and now - self._last_s < self._every_s:
            return
        self._last_s = now
        left = (now - started) * (total - done) / done if done else 0.0
        line = f"  {what} {done}/{total}" + (f", {left:.0f} s left" if 0 < done < total else "")
        if self._terminal:
            _write(f"\r\x1b[2K{line}" + ("\n" if done >= total else ""))
        else:
            _write(line + "\n")
        if done >= total:
            self._started.pop(what, None)

    def scalars(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Print one line an epoch."""
        figures = "  ".join(
            f"{name} {value:.4g}" for name, value in values.items() if name != "epoch"
        )
        self.note(f"  {stage} epoch {step}: {figures}")

    def note(self, message: str) -> None:
        """Print the line."""
        _write(("\r\x1b[2K" if self._terminal else "") + message + "\n")


def _write(text: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that was closed ends no run
        sys.stderr.write(text)
        sys.stderr.flush()
