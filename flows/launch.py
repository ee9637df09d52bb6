"""Starting a run from a terminal: environment and server first, what is slow to import after."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flows import runs, servers
from flows.environment import set_defaults
from wsss_core.config import Config
from wsss_core.errors import ContaError, InputError

if TYPE_CHECKING:
    from flows.plan import Planned
    from flows.study import Study

STAGES = runs.MAIN_STAGES
"""What `until` may name."""


def execute(config: Config, *, home: Path, until: str | None = None) -> runs.Run:
    """Do a run, or what is missing of it, with progress on stderr.

    Args:
        config: The settings; `data.root` says where the photos are.
        home: CONTA_HOME.
        until: Stop in round 0 after the stages of this name; one of `STAGES`.

    Returns:
        The run as it ended.

    Raises:
        ContaError: One line for the user, with the path of the log once there is one.
    """
    if until is not None and until not in STAGES:
        raise InputError(f"no stage {until!r} to stop after; there are: {', '.join(STAGES)}")
    config = locate_data(config)
    set_defaults(home)
    server = servers.open_prefect(home)  # comes up while torch is imported
    try:
        from flows.conta import conta_flow

        server.wait_ready()
        with _ending_politely():
            name = conta_flow(config, until)
    finally:
        servers.close_prefect(server)
    run = runs.read_run(home, name)
    if run is None:
        raise ContaError(f"the record of run {name} cannot be read; run the same command again")
    return run


def execute_study(study: Study, *, home: Path, folder: Path, data: Path | None) -> int:
    """Compute the cells of a study that are missing, with progress on stderr; returns how many.

    Args:
        study: The study.
        home: CONTA_HOME.
        folder: Of its cells.
        data: Folder of the photos, where the recipe needs one.

    Raises:
        ContaError: As `execute`; the cells that are done stay.
    """
    set_defaults(home)
    server = servers.open_prefect(home)
    try:
        from flows.cells import study_flow

        server.wait_ready()
        with _ending_politely():
            return study_flow(study, folder, data)
    finally:
        servers.close_prefect(server)


def plan(config: Config, *, home: Path) -> list[Planned]:
    """Each call of each stage: found in the store, or missing and why. Computes nothing.

    The data are indexed, if they are a folder; scenes that were never made make everything a miss.
    """
    config = locate_data(config)
    set_defaults(home)
    from flows.plan import plan_run

    return plan_run(config, home)


def locate_data(config: Config) -> Config:
    """The settings with an absolute `data.root`.

    Raises:
        InputError: If there is no such folder, or none was given where one is needed.
    """
    if config.data.source == "scenes":
        return config
    if config.data.root is None:
        raise InputError(
            f"source {config.data.source!r} needs the folder of its photos; give it with --data DIR"
        )
    root = config.data.root.absolute()
    if not root.is_dir() and not config.data.download:
        raise InputError(f"no folder at {root}; give the one of your photos with --data DIR")
    return config.model_copy(update={"data": config.data.model_copy(update={"root": root})})


@contextlib.contextmanager
def _ending_politely() -> Iterator[None]:
    """Let SIGTERM end the run as Ctrl-C does, so that its record says so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def _exit(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)
