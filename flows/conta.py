"""The Prefect flow: index the data, hold the run, do its rounds, report each of them."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from uuid import UUID

from prefect import Task, flow
from prefect.client.orchestration import get_client
from prefect.runtime import deployment, flow_run

from flows import runs
from flows.cost import check_cost
from flows.environment import locate_data, open_home
from flows.gpu import device_id, turn_on_gpu
from flows.patience import pass_over_events
from flows.plan import (
    check_data,
    check_settings,
    cut_plan,
    fetch_weights,
    label_call,
    plan_rounds,
)
from flows.progress import FlowRecorder
from flows.report import publish_report, write_report
from flows.review import ChangedError, ask_reviewer, check_reviewer
from flows.rounds import Data, Truth, open_truth, run_rounds, score_what_is_there
from flows.runs import Run, StageName, UnderWay
from flows.settle import announce_start, settle_dead
from tasks import stages
from tasks.policy import stage_of
from tasks.runners import choose_shard_map
from tasks.tracking import Tracker
from wsss_core.config import Config, lay_over, parse_config
from wsss_core.errors import ContaError, StoreError
from wsss_core.records import Manifest
from wsss_core.stages.stage import Workspace
from wsss_core.store import library_versions

logger = logging.getLogger(__name__)


@flow(name="conta")
def conta_flow(config: Config, until: StageName | None = None, until_round: int = 0) -> str:
    """Train from tags to masks, round after round; what is there is taken from the store.

    The home is CONTA_HOME, the folder of the photos `config.data.root`.

    Args:
        config: The settings; `wsss_core/config.py` has the source of every default.
        until: Stop after the stages of this name.
        until_round: In this round.

    Returns:
        Name of the run.
    """
    pass_over_events()
    config = _complete(config)
    check_reviewer(config)
    home, recorder, config = open_home(), FlowRecorder(), locate_data(config)
    with announce_start(home, note=recorder.note):
        settle_dead(home, note=recorder.note)
        shard_map = choose_shard_map(home, config.runtime)
        work = Workspace(home, config.data.root, config.runtime, recorder, shard_map)
        check_settings(config)
        data, truth = index(config, work)
        check_data(config, work.dataset(data))
        stop = None if until is None else (until, until_round)
        while True:
            name, changed = _compute(config, work, data, truth, stop=stop)
            if changed is None:
                return name
            config = changed


def _complete(config: Config) -> Config:
    """The settings of a deployed run, where its start gave a part of them.

    Prefect replaces the parameter `config` as a whole: what a start by its API does not name would
    be conta's default, and scenes would be drawn in the place of somebody's photos.
    """
    given = deployment.parameters.get("config", {})
    if deployment.id is None or given.keys() >= Config.model_fields.keys():  # as the form gives
        return config
    with get_client(sync_client=True) as client:
        deployed = client.read_deployment(UUID(deployment.id)).parameters.get("config", {})
    return lay_over(parse_config(deployed), given)


def _compute(
    config: Config,
    work: Workspace,
    data: Manifest,
    truth: Truth | None,
    *,
    stop: tuple[str, int] | None,
) -> tuple[str, Config | None]:
    """Do a run; returns its name, and the settings of the one that goes on in its place, if any."""
    scored = score_what_is_there(config, work.dataset(data).splits)
    planned = plan_rounds(scored, work, data, truth, verify=False)
    if stop is not None:
        planned = cut_plan(planned, *stop)
    fetch_weights(scored, {row.name for row in planned if not row.hit})
    with work_on_run(config, work, data, None if truth is None else truth.masks) as (run, tracker):
        for split in ("train", *scored.data.val):
            if truth is not None and split not in truth.splits:
                work.recorder.note(f"no photo of {split} has a true mask, so it is not scored")
        cost = check_cost(planned, scored, work, data)
        if cost is not None:
            work.recorder.note(cost)
        step = Computing(scored, work, data, run=run, tracker=tracker, stop=stop)
        with contextlib.nullcontext() if cost is None else _turn(work):
            try:
                run_rounds(scored, truth, step)
            except _StoppedError as stopped:
                run.status, run.reason = "stopped", str(stopped)
            except ChangedError as changed:
                after = changed.settings(config)
                goes_on = f"{runs.GOES_ON}{runs.name_run(after, data)} with {changed}"
                run.status, run.reason = "stopped", goes_on
                work.recorder.note(f"run {run.name} {goes_on}")
                return run.name, after
            step.end_round()
    return run.name, None


def _turn(work: Workspace) -> contextlib.AbstractContextManager[object]:
    """Let deployed runs share a GPU one after the other; who starts by hand sees what is free."""
    device = work.device()
    if device.type == "cpu" or deployment.id is None:
        return contextlib.nullcontext()
    num = work.runtime.devices
    indices = range(num) if num > 1 else [device.index or 0]
    with contextlib.ExitStack() as turns:
        # in the same order in every run, whatever it sees: no two wait for each other
        for index in sorted(indices, key=device_id):
            turns.enter_context(turn_on_gpu(index, note=work.recorder.note))
        return turns.pop_all()


def index(config: Config, work: Workspace) -> tuple[Manifest, Truth | None]:
    """The data, and its true masks if there are any.

    Raises:
        DataError: If true masks are to teach and there are none.
    """
    source = stages.make_scenes if config.data.source == "scenes" else stages.index_data
    data = source(config, work)
    masks = stages.index_truth(config, work, data=data)
    return data, open_truth(config, work, data, masks)


class Computing:
    """The step that computes: one task, its record, its scores in MLflow, a line for the user."""

    def __init__(
        self,
        config: Config,
        work: Workspace,
        data: Manifest,
        *,
        run: Run,
        tracker: Tracker,
        stop: tuple[str, int] | None,
    ) -> None:
        self._config, self._work, self._data = config, work, Data.of(data, work)
        run.shared["train"] = self._data.train
        self._run, self._tracker = run, tracker
        self._until, self._last_round = stop or ("", 0)
        self._round = -1
        self._num_cached = 0
        self._enough = False

    def begin_round(self, number: int, config: Config) -> None:
        """End the round before, have it reviewed if that is asked for, and enter the next."""
        report = self.end_round()
        if self._enough:
            raise _StoppedError(f"after {self._until}{runs.AS_ASKED}")
        if config.review and report is not None:
            self._ask(self._run.rounds[number - 1], report, config)
        self._config = config
        self._round, self._num_cached = number, 0
        self._run.start_round(number)

    def __call__(
        self,
        task: Task[..., Manifest],
        *,
        config: Config | None = None,
        **inputs: Manifest | str | None,
    ) -> Manifest:
        """The artifact of a stage, computed or found."""
        if self._enough and task.name in runs.MAIN_STAGES and task.name != self._until:
            raise _StoppedError(f"after {self._until}{runs.AS_ASKED}")
        label = label_call(task.name, inputs)
        config = config or self._config
        data = self._data.behind(inputs)
        key = stage_of(task).key(config, data=data, **inputs)
        former = self._run.rounds[self._round].former.get(label)
        if former is None or former.key != key or not self._work.store.peek(former.stage, key):
            self._run.go_beyond()
        place = UnderWay(round=self._round, label=label, stage=task.name, key=key)
        self._run.under_way = place
        runs.save_run(self._work.home, self._run)
        named = task.with_options(task_run_name=f"{label} {self._round}")
        began_ms = time.time_ns() // 1_000_000
        made = named(config, self._work, data=data, **inputs)
        self._keep(label, made, computed=made.finished_ms >= began_ms)
        reached = task.name == self._until and self._round >= self._last_round
        self._enough = self._enough or reached
        return made

    def end_round(self) -> str | None:
        """Report the round that is on, if one is; returns the report."""
        if self._round < 0:
            return None
        entry, recorder = self._run.rounds[self._round], self._work.recorder
        num = len(entry.manifests)
        recorder.note(f"round {entry.round}: {self._num_cached} of {num} stages were there")
        drawn, panel = entry.manifests.get("draw_panels"), None
        if drawn is not None and self._config.tracking.panels == "all":
            panel = self._work.folder(drawn) / "panel.png"
        report = write_report(self._run, entry, panel)
        publish_report(report)
        self._round = -1
        return report

    def _ask(self, entry: runs.Round, report: str, config: Config) -> None:
        """Wait for what a person says to a round, unless it was said before or is in the settings.

        Raises:
            _StoppedError: If they say so.
            ChangedError: If the next rounds are to have another threshold.
        """
        review, following = entry.review, entry.round + 1
        if not (review.goes_on or following in config.threshold_changes):
            self._run.go_beyond()
            self._run.status = "stopped"
            self._run.reason = f"waits for a review of round {entry.round}"
            runs.save_run(self._work.home, self._run)
            answer = ask_reviewer(self._run, entry, report, threshold=config.seeds.threshold)
            review.answers += 1
            review.goes_on, review.threshold = answer.goes_on, answer.threshold
            self._run.status, self._run.reason = "running", ""
            runs.save_run(self._work.home, self._run)
            if not review.goes_on:
                raise _StoppedError(f"after round {entry.round}, by who reviewed it")
        if review.threshold is not None:
            self._run.go_beyond()
            raise ChangedError(following, review.threshold)

    def _keep(self, label: str, made: Manifest, *, computed: bool) -> None:
        self._run.keep(self._round, label, made)
        runs.save_run(self._work.home, self._run)
        self._tracker.sync(self._round, label, made, self._work.folder(made))
        if computed:
            self._work.recorder.note(f"round {self._round}  {label:<24} {made.seconds:6.1f} s")
            return
        self._num_cached += 1
        changed = {
            name: f"{name} {version}"
            for name, version in made.versions.items()
            if library_versions().get(name) != version
        }
        if changed:
            # said, not keyed: a new library version must not cost a week of compute
            logger.warning("%s %s was made with %s", label, made.key, ", ".join(changed.values()))


class _StoppedError(Exception):
    """What the user asked for is done; says why."""


@contextlib.contextmanager
def work_on_run(
    config: Config, work: Workspace, data: Manifest, truth: Manifest | None
) -> Iterator[tuple[Run, Tracker]]:
    """Hold the run of these settings and data, log to it, and note in the end how it ended.

    Raises:
        BusyError: If another process works on it.
    """
    home, name = work.home, runs.name_run(config, data)
    with runs.hold_run(home, name), runs.log_run(home, name) as log:
        run = runs.open_run(home, name, config, data, truth)
        run.prefect_run, run.prefect_url = _introduce(name)
        work.recorder.note(f"run {name}, log {log}")
        tracker = _open_tracker(config, run, data, work)
        runs.save_run(home, run)
        ended_well = False
        try:
            yield run, tracker
            ended_well = True
        except ContaError as error:
            run.status, run.reason = "failed", str(error)
            logger.exception("failed")
            error.args = (f"{error}; log: {log}",)
            raise
        except Exception as error:
            run.status, run.reason = "failed", f"{type(error).__name__}: {error}"
            logger.exception("failed by a fault of conta")
            raise ContaError(f"{run.reason}; log: {log}") from error
        except BaseException as signal:
            if run.status == "running":
                run.status, run.reason = "stopped", type(signal).__name__
            raise
        finally:
            try:
                runs.close_run(home, run)
            except StoreError:
                if ended_well:
                    raise
                logger.exception("its record does not say how it ended")
            finally:
                tracker.close("finished" if run.as_asked else run.status)


def _introduce(name: str) -> tuple[str | None, str | None]:
    """Give the flow run the run's name; its id and its page."""
    if flow_run.id is None:
        return None, None
    with get_client(sync_client=True) as client:
        client.update_flow_run(flow_run.id, name=name)
    return str(flow_run.id), flow_run.ui_url


def _open_tracker(config: Config, run: Run, data: Manifest, work: Workspace) -> Tracker:
    tracker = Tracker(config, name=run.name, home=work.home, note=work.recorder.note)
    run.mlflow_run, run.mlflow_url = tracker.run_id, tracker.url
    links = {
        "prefect.url": run.prefect_url or "",
        "conta.log": str(runs.log_path(work.home, run.name)),
    }
    tracker.describe(config, data, links)
    return tracker
