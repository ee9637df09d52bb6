"""Runs that are started from Prefect's pages, by hand or by a schedule.

`conta deploy` is the short way: it serves recipes from this machine until Ctrl-C. Work pools, for
several machines, are in `deployments/prefect.yaml`.
"""

from __future__ import annotations

import asyncio
import shlex
import signal
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.schedules import CronSchedule
from prefect.deployments.runner import RunnerDeployment
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.flows import Flow
from prefect.runner import Runner
from prefect.types.entrypoint import EntrypointType
from pydantic import ValidationError

from flows.environment import HEARTBEAT_S
from wsss_core.config import Config
from wsss_core.errors import InputError

DEAD_S = 3 * HEARTBEAT_S
"""How long a flow run may say nothing."""

_LOOK_S = 5
_STOP_S = 5
"""What a run has to end by itself, and Prefect to hear that it did."""

AUTOMATION = "conta: runs of dead machines are crashed"


def serve_recipes(
    conta_flow: Flow[..., str],
    recipes: Sequence[Config],
    *,
    home: Path,
    cron: str | None,
    say: Callable[[str], None],
) -> None:
    """Serve a deployment for each recipe, one run at a time, until Ctrl-C.

    Args:
        conta_flow: The flow.
        recipes: Their settings fill the run form; `data.root` is absolute.
        home: CONTA_HOME, absolute; the runs get it from this process.
        cron: When each of them starts by itself; None for by hand alone.
        say: Gets each line for the user.

    Raises:
        InputError: If `cron` means nothing, or two recipes have one name.
    """
    names = [config.name for config in recipes]
    if len(set(names)) < len(names):
        raise InputError(f"several recipes are called {max(names, key=names.count)}; rename one")

    def make() -> list[RunnerDeployment]:
        return [make_deployment(conta_flow, config, home=home, cron=cron) for config in recipes]

    made = make()
    watch_for_dead_machines()
    when = "by hand" if cron is None else f"by hand and at {cron!r}"
    say(f"served from this terminal, to be started {when}: {', '.join(names)}")
    start = f"prefect deployment run {shlex.quote(f'conta/{names[0]}')}"
    say(f'start one on Prefect\'s page, or by: eval "$(conta env)" && {start}')
    say("Ctrl-C ends it")
    while True:
        try:
            _serve(made)
        except (httpx.HTTPError, ExceptionGroup, RuntimeError) as error:
            if not _lost_the_server(error):
                raise
            say(
                "Prefect's server does not answer. A run that was at work has ended, its epochs "
                "are kept; this goes on as soon as the server is back"
            )
            time.sleep(_LOOK_S)
            while not _answers():
                time.sleep(_LOOK_S)
            say("Prefect's server is back: served as before")
            made = make()
        else:
            return


def _serve(made: Sequence[RunnerDeployment]) -> None:
    """Start their runs, one at a time, until Ctrl-C or SIGTERM."""
    runner = _Runner(pause_on_shutdown=False, limit=1)
    for deployment in made:
        runner.add_deployment(deployment)
    former = signal.getsignal(signal.SIGTERM)
    try:
        asyncio.run(runner.start())
    except KeyboardInterrupt:
        return
    except (asyncio.CancelledError, Exception):
        if not runner.terminated:
            raise
    finally:  # the runner's own handler would outlive it
        signal.signal(signal.SIGTERM, former)


class _Runner(Runner):
    """Prefect's, but SIGTERM ends it as Ctrl-C does, and a run may write down that it stopped.

    Prefect's own ends the run's process at once, and on its page the run goes on for ever.
    """

    terminated = False
    _main: asyncio.Task[Any] | None = None

    async def start(self, run_once: bool = False, webserver: bool | None = None) -> None:
        self._main = asyncio.current_task()
        await super().start(run_once, webserver)

    def handle_sigterm(self, *_: Any, **__: Any) -> None:
        if self._main is not None:
            self.terminated = True
            self._main.get_loop().call_soon_threadsafe(self._main.cancel)

    async def __aexit__(self, *raised: Any) -> None:
        try:
            await self._end_runs()
        finally:
            await super().__aexit__(*raised)

    async def _end_runs(self) -> None:
        """Have runs that are at work end by themselves, and Prefect hear of it."""
        started = self._process_manager
        if not self.terminated:  # a terminal's Ctrl-C has reached them too
            await _wait(self.has_slots_available)
        await _wait(lambda: self.has_slots_available() or bool(started.flow_run_ids()))
        for number in started.flow_run_ids():
            await started.kill(number)  # SIGTERM, and thirty seconds
        await _wait(self.has_slots_available)


async def _wait(done: Callable[[], bool]) -> None:
    end = time.monotonic() + _STOP_S
    while not done() and time.monotonic() < end:
        await asyncio.sleep(0.1)


def _lost_the_server(error: Exception) -> bool:
    """Whether Prefect's runner ended because its server did not answer."""
    if isinstance(error, ExceptionGroup):
        return all(map(_lost_the_server, error.exceptions))
    if isinstance(error, httpx.HTTPStatusError):  # a proxy before it answers in its place
        return error.response.is_server_error
    return isinstance(error, httpx.TransportError) or "error threshold" in str(error)


def _answers() -> bool:
    with get_client(sync_client=True) as client:
        return client.api_healthcheck() is None


def make_deployment(
    conta_flow: Flow[..., str], config: Config, *, home: Path, cron: str | None
) -> RunnerDeployment:
    """The deployment of a recipe.

    Raises:
        InputError: If `cron` means nothing.
    """
    try:
        schedule = None if cron is None else CronSchedule(cron=cron)
    except ValidationError:
        raise InputError(
            f"--cron {cron!r} is no schedule; write minute, hour, day, month and weekday, "
            "such as '0 2 * * *' for two at night"
        ) from None
    deployment = conta_flow.to_deployment(
        name=config.name,
        parameters={"config": config.model_dump(mode="json")},
        schedules=None if schedule is None else [schedule],
        description=f"Settings of the recipe `{config.name}`; results in `{home}`.",
        tags=["conta"],
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    # outside of an event loop it answers at once; its type says both
    return cast("RunnerDeployment", deployment)


def watch_for_dead_machines() -> None:
    """Have the server mark a flow run that fell silent as crashed, for nobody else is left to."""
    trigger = EventTrigger(
        posture=Posture.Proactive,
        after={"prefect.flow-run.heartbeat"},
        expect={"prefect.flow-run.*"},
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related={"prefect.resource.role": "flow", "prefect.resource.name": "conta"},
        for_each={"prefect.resource.id"},
        threshold=1,
        within=timedelta(seconds=DEAD_S),
    )
    crash = ChangeFlowRunState(
        state=StateType.CRASHED, message=f"no sign of life for {DEAD_S} s; its machine may be dead"
    )
    with get_client(sync_client=True) as client:
        if not client.read_automations_by_name(AUTOMATION):
            automation = AutomationCore(name=AUTOMATION, trigger=trigger, actions=[crash])
            client.create_automation(automation)
