"""Starting a run from a terminal: environment and server first, what is slow to import after."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from flows import runs, servers
from flows.environment import locate_data, set_defaults
from flows.locks import find_holder
from wsss_core.config import Config, parse_config
from wsss_core.errors import BusyError, ContaError, DataError, InputError, SettingsError

if TYPE_CHECKING:
    from flows.plan import Planned
    from flows.study import Study


def execute(
    config: Config, *, home: Path, until: str | None = None, former: runs.Run | None = None
) -> runs.Run:
    """Do a run, or what is missing of it, with progress on stderr.

    Args:
        config: The settings; `data.root` says where the photos are.
        home: CONTA_HOME.
        until: Stop in round 0 after the stages of this name; one of `runs.MAIN_STAGES`.
        former: The run that this has to be.

    Returns:
        The run as it ended.

    Raises:
        ContaError: One line for the user, with the path of the log once there is one.
    """
    _check_until(until, config)
    config = locate_data(config)
    set_defaults(home)
    server = servers.open_prefect(home)  # comes up while torch is imported
    with _served_by(server):
        from flows.conta import conta_flow

        if former is not None:
            check_same(former, config, home)
        _prepare_new_home(server)
        server.wait_ready()
        with _ending_politely():
            name = conta_flow(config, cast("runs.StageName | None", until))
    run = runs.read_run(home, name)
    if run is None:
        raise ContaError(f"the record of run {name} cannot be read; run the same command again")
    return run


def resume(run: runs.Run, *, home: Path) -> runs.Run:
    """Finish a run by the settings and the data folder that its latest start had.

    Returns:
        The run as it ended.

    Raises:
        ContaError: If it is at work, its settings mean nothing to this version, or its data are
            gone or changed; else as `execute`.
    """
    holder = find_holder(runs.lock_path(home, run.name))
    if holder is not None:
        raise BusyError(f"run {run.name} is at work in {holder}; wait for it or stop it")
    try:
        config = parse_config(run.config)
    except SettingsError as error:
        raise SettingsError(
            f"run {run.name} was made by another version of conta ({error}); "
            "start it again by its recipe"
        ) from None
    check_data_root(run, config.data.root)
    return execute(config, home=home, former=run)


def check_data_root(run: runs.Run, root: Path | None) -> None:
    """Say so if the folder of a run's photos is not there any more."""
    if root is not None and not root.is_dir():
        raise DataError(
            f"the data of run {run.name} were in {root}, which is gone; put them back, or continue "
            "by `conta run RECIPE --data DIR` with the folder where they are now"
        )


def deploy(
    recipes: Sequence[Config], *, home: Path, cron: str | None, say: Callable[[str], None]
) -> None:
    """Serve recipes to Prefect's pages until Ctrl-C.

    Args:
        recipes: Their settings.
        home: CONTA_HOME.
        cron: When each starts by itself; None for by hand alone.
        say: Gets each line for the user.

    Raises:
        InputError: If there is no server that stays, or the arguments make no deployment.
    """
    located = [locate_data(config) for config in recipes]
    set_defaults(home)
    servers.join_prefect(home)
    from flows.conta import conta_flow
    from flows.deploy import serve_recipes

    serve_recipes(conta_flow, located, home=home, cron=cron, say=say)


def check_same(former: runs.Run, config: Config, home: Path) -> None:
    """Make sure that the settings and the data of a run still are what they were.

    Raises:
        InputError: If they would make another run.
    """
    from wsss_core.stages.data import index_data
    from wsss_core.stages.stage import Workspace

    data = former.shared.get("scenes")  # nothing outside the home can change these
    if data is None:
        data = index_data(config, Workspace(home, config.data.root, config.runtime))
    if data.digest != former.data:
        raise DataError(
            f"the data in {config.data.root} changed since run {former.name}, so it cannot be "
            "finished; put them back, or start a new run by `conta run RECIPE`"
        )
    if runs.name_run(config, data) != former.name:
        raise InputError(
            f"run {former.name} was made by another version of conta, to which its settings meant "
            "another run; start it again by its recipe"
        )


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
    from flows.study import find_cells, list_missing

    for arm, seed in list_missing(study, find_cells(study, folder)):
        config = locate_data(study.config(arm, seed, data=data))
        try:
            _check_until(study.until, config)
        except InputError as error:
            raise InputError(f"arm {arm!r} of study {study.name}: {error}") from None
    set_defaults(home)
    server = servers.open_prefect(home)
    with _served_by(server):
        from flows.cells import study_flow

        _prepare_new_home(server)
        server.wait_ready()
        with _ending_politely():
            return study_flow(study, folder, data)


def plan(config: Config, *, home: Path, until: str | None = None) -> list[Planned]:
    """Each call of each stage: found in the store, or missing and why. Computes nothing.

    The data are indexed, if they are a folder; scenes that were never made make everything a miss.

    Raises:
        ContaError: For what `execute` would refuse, as far as the data are there to tell. Not for a
            device that is not here: the run may be meant for another machine.
    """
    _check_until(until, config)
    config = locate_data(config)
    set_defaults(home)
    from flows.plan import plan_run

    return plan_run(config, home, until)


def _prepare_new_home(server: servers.Server) -> None:
    """While a server makes its database, for seconds, do what the run would stop for later."""
    if server.turn is None:
        return
    from tasks.tracking import FAULTS, make_database

    with contextlib.suppress(*FAULTS):  # the run opens it again, and says what is wrong
        make_database(os.environ["MLFLOW_TRACKING_URI"])
    import timm  # noqa: F401


@contextlib.contextmanager
def _served_by(server: servers.Server) -> Iterator[None]:
    """Name the server when it is gone, and close it in the end if it is ours."""
    from httpx import HTTPError

    logging.raiseExceptions = False  # else Prefect tells of each lost log past every handler
    try:
        yield
    except HTTPError as error:
        raise ContaError(
            f"the Prefect server at {server.url} answers no more ({error}); run the same command "
            "again, what was computed is kept"
        ) from error
    finally:
        servers.close_prefect(server)


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


def _check_until(until: str | None, config: Config) -> None:
    """Refuse a stage that does not exist, or that by these settings no data would lead to."""
    if until is None:
        return
    if until not in runs.MAIN_STAGES:
        known = ", ".join(runs.MAIN_STAGES)
        raise InputError(f"no stage {until!r} to stop after; there are: {known}")
    if until.startswith("boundary") and config.expansion.method != "irn":
        raise InputError(
            f"stage {until} belongs to expansion.method irn, but it is "
            f"{config.expansion.method!r}; change that, or stop after another stage"
        )
    if until == "confounders" and not config.causal.has_map:
        raise InputError(
            f"causal.context {config.causal.context!r} finds no confounders; "
            "stop after another stage"
        )
