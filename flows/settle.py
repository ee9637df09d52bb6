"""Tell Prefect and MLflow the truth about runs whose process is gone.

A killed process tells nobody, so its flow run, its task runs and its MLflow runs stay at Running
for ever. Each start in a home, and `conta ui`, closes those of the dead: the kernel has dropped
their lock or, on another host, the heartbeat stopped five minutes ago.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

from httpx import HTTPError
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.runtime import flow_run
from prefect.states import Crashed

from flows import locks, runs
from flows.house import await_collection
from flows.patience import ask_once
from flows.unfinished import dead_starts, describe_death, is_dead, start_path
from tasks.tracking import close_dead
from wsss_core.errors import BusyError

logger = logging.getLogger(__name__)

_DIED = "its process ended without a word"
_SILENT = "no Prefect server answered as it ended; what it computed is kept"


@contextlib.contextmanager
def announce_start(home: Path, *, note: Callable[[str], None]) -> Iterator[None]:
    """Let others see that this flow run lives, from before it knows which run it is.

    Args:
        home: CONTA_HOME.
        note: Hears for whom the start has to wait.
    """
    path = start_path(home, str(flow_run.id))
    with locks.hold(path, f"flow run {flow_run.id}"):
        try:
            await_collection(home, note=note)
            yield
        finally:
            # a silent server never hears how this ended: the next start will tell it
            if _prefect_answers():
                path.unlink(missing_ok=True)


def settle_dead(home: Path, *, note: Callable[[str], None]) -> None:
    """Close what dead processes left open in this home's records, in Prefect and in MLflow.

    What cannot be reached now is left for the next start.

    Args:
        home: CONTA_HOME.
        note: Gets one line a run that had died.
    """
    for start in dead_starts(home):
        why = _SILENT if locks.read_holder(start) is None else _DIED
        if _close_flow_run(start.name, why):
            start.unlink(missing_ok=True)
    for run in runs.list_runs(home):
        if is_dead(home, run):
            with contextlib.suppress(BusyError):
                if not _settle_run(home, run.name, note):
                    return  # nobody answers, and each further question would wait as long


def _settle_run(home: Path, name: str, note: Callable[[str], None]) -> bool:
    """Close one; False if Prefect or MLflow could not be told."""
    died, why = locks.read_holder(runs.lock_path(home, name)), describe_death(home, name)
    with runs.hold_run(home, name):
        run = runs.read_run(home, name)
        if run is None or run.status != "running":
            return True
        ended_ms = run.started_ms if died is None else int(1000 * died.seen_s)
        told = run.prefect_run is None or _close_flow_run(run.prefect_run, why)
        if not (told and close_dead(run.config["name"], name, ended_ms)):
            return False
        run.status, run.reason, run.finished_ms = "failed", why, ended_ms
        runs.save_run(home, run)
    note(f"run {name} had died: {why}; its records say so now")
    return True


def _prefect_answers() -> bool:
    with ask_once(), get_client(sync_client=True) as client:
        return client.api_healthcheck() is None


def _close_flow_run(flow_run_id: str, why: str) -> bool:
    """Mark a flow run and its tasks as crashed where they are not over; False if nobody answers."""
    try:
        number = UUID(flow_run_id)
    except ValueError:  # a file that somebody put there
        return True
    try:
        with get_client(sync_client=True) as client:
            dead = client.read_flow_run(number)
            ours = str(dead.id) == flow_run.id  # a retry: its earlier tasks alone are dead
            _close_tasks(client, dead.id, before=dead.run_count if ours else None, why=why)
            state = dead.state
            if not ours and state is not None and (state.is_running() or state.is_cancelling()):
                client.set_flow_run_state(dead.id, Crashed(message=why), force=True)
    except ObjectNotFound:  # another server's
        return True
    except (HTTPError, OSError, PrefectException, ValueError) as error:
        logger.warning("flow run %s died, and Prefect could not be told: %s", flow_run_id, error)
        return False
    return True


def _close_tasks(
    client: SyncPrefectClient, flow_run_id: UUID, *, before: int | None, why: str
) -> None:
    chosen = FlowRunFilter.model_validate({"id": {"any_": [flow_run_id]}})
    for task_run in client.read_task_runs(flow_run_filter=chosen):
        earlier = before is None or task_run.flow_run_run_count < before
        if earlier and task_run.state is not None and not task_run.state.is_final():
            client.set_task_run_state(task_run.id, Crashed(message=why), force=True)
