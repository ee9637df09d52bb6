"""When a task runs: the store decides, Prefect's record follows.

Prefect calls a task only if no result record lies under its key. Before it looks, the policy here
looks into the store: for a sound artifact it writes the record, so the task shows as Cached; for
none or a damaged one it lets the record expire, so the task runs and rebuilds. Records are small
copies of manifests that may be lost or stale at any time.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ParamSpec

from prefect import Task, task
from prefect.cache_policies import CachePolicy
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.results import ResultStore, get_result_store

from wsss_core.config import Config
from wsss_core.housekeeping import kept_epochs
from wsss_core.records import Manifest
from wsss_core.stages.stage import Stage, Workspace

P = ParamSpec("P")

RETRY_DELAYS_S = [5.0, 60.0]
_LONG_AGO: Any = datetime(2000, 1, 1, tzinfo=UTC)  # Prefect asks for a type of its own
_TRANSIENT = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET})


@dataclass(kw_only=True)
class StagePolicy(CachePolicy):
    """A task's key is its stage's key, whatever the flow, the round, the device or the folder.

    Attributes:
        stage: The stage whose artifact the task returns.
    """

    stage: Stage

    def compute_key(
        self,
        task_ctx: TaskRunContext,
        inputs: dict[str, Any],
        flow_parameters: dict[str, Any],
        **_: Any,
    ) -> str | None:
        """The key, after the record under it was brought in line with the store.

        An error in here would only make Prefect run the task uncached. Nothing is lost by that: the
        task's body asks the store the same question, and there the error stops the run.
        """
        config: Config = inputs["config"]
        work: Workspace = inputs["work"]
        manifests = {name: inputs[name] for name in inputs if name not in ("config", "work")}
        asked = self.stage.key(config, **manifests)
        key = f"{self.stage.name}-{asked}"
        found, _problem = self.stage.find(config, work, **manifests)
        _settle_record(get_result_store(), key, found)
        if found is None:
            _tell_wait(self.stage.name, asked, work)
        return key


def stage_task(stage: Stage) -> Callable[[Callable[P, Manifest]], Task[P, Manifest]]:
    """Make a function that calls `stage` its Prefect task."""
    return task(
        name=stage.name,
        cache_policy=StagePolicy(stage=stage),
        persist_result=True,
        result_serializer="json",
        retries=len(RETRY_DELAYS_S),
        retry_delay_seconds=RETRY_DELAYS_S,
        retry_condition_fn=may_pass,
    )


def stage_of(made: Task[..., Manifest]) -> Stage:
    """The stage behind a task that `stage_task` made."""
    policy = made.cache_policy
    if not isinstance(policy, StagePolicy):
        raise TypeError(f"task {made.name!r} has no stage; make it with `stage_task`")
    return policy.stage


def may_pass(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Whether a failure may pass by itself: never bad input, a diverged loss or a full disk."""
    error = state.data
    return isinstance(error, OSError) and error.errno in _TRANSIENT


def _tell_wait(stage: str, key: str, work: Workspace) -> None:
    """Say for whom the task is about to wait, if another run is making the same artifact."""
    writer = work.store.writer(stage, key)
    if writer is not None:
        epochs = kept_epochs(work.home, stage, key)
        far = f", {epochs} epochs so far" if epochs else ""
        work.recorder.note(f"waiting for {stage}: {writer}, is making it{far}")


def _settle_record(records: ResultStore, key: str, found: Manifest | None) -> None:
    if found is not None:
        records.write(key=key, obj=found)
    elif records.exists(key):
        stale = records.read(key).result
        records.write(key=key, obj=stale, expiration=_LONG_AGO)
