"""Runs that have not come to their end: where each stopped, when and why."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from flows import runs
from flows.locks import find_holder, read_holder
from flows.runs import Run
from wsss_core.housekeeping import kept_epochs


@dataclass(frozen=True)
class Stop:
    """How a run stands that is not finished.

    Attributes:
        name: Of the run.
        state: `running`, `died`, `stopped` or `failed`.
        where: Round and stage, with the epochs of a training that need not be repeated.
        why: The reason that it gave, or what is known of its process.
        when_s: When it stopped, or the last sign of life; seconds since 1970.
    """

    name: str
    state: str
    where: str
    why: str
    when_s: float


def list_unfinished(home: Path) -> list[Stop]:
    """The runs of a home that did not come to their end, the latest started first."""
    known = runs.list_runs(home)
    return [describe_stop(home, r) for r in known if r.status != "finished" and not r.as_asked]


def describe_stop(home: Path, run: Run) -> Stop:
    """How an unfinished run stands."""
    lock = runs.lock_path(home, run.name)
    holder, died = find_holder(lock), read_holder(lock)
    where = describe_place(home, run)
    if holder is not None:
        return Stop(run.name, "running", where, str(holder), holder.seen_s)
    if run.status == "running":
        seen_s = run.started_ms / 1000 if died is None else died.seen_s
        return Stop(run.name, "died", where, describe_death(home, run.name), seen_s)
    return Stop(run.name, run.status, where, run.reason, (run.finished_ms or 0) / 1000)


def is_dead(home: Path, run: Run) -> bool:
    """Whether a run's record says `running` and nobody is."""
    return run.status == "running" and find_holder(runs.lock_path(home, run.name)) is None


def start_path(home: Path, flow_run_id: str) -> Path:
    """The lock that a flow run holds from before it knows which run it is."""
    return home / "starts" / flow_run_id


def dead_starts(home: Path) -> list[Path]:
    """The locks of the flow runs that never came to an end and have no living process."""
    folder = start_path(home, "")
    known = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in known if find_holder(path) is None]


def describe_death(home: Path, name: str) -> str:
    """What is known of the process of a run that died."""
    died = read_holder(runs.lock_path(home, name))
    return f"its process ended without a word ({died or 'host and pid are not known'})"


def describe_place(home: Path, run: Run) -> str:
    """Round and stage that a run is at or stopped at."""
    place = run.under_way
    if place is None:
        return f"round {run.rounds[-1].round}" if run.rounds else "before round 0"
    epochs = kept_epochs(home, place.stage, place.key)
    kept = f", {epochs} epochs done" if epochs else ""
    return f"round {place.round}, {place.label}{kept}"


def unfinished_table(home: Path) -> str:
    """One line a run, and how to go on."""
    stops, known = list_unfinished(home), runs.list_runs(home)
    asked = sum(run.as_asked for run in known)
    if not stops:
        rest = f", {asked} of them where they were told to stop" if asked else ""
        return f"every run in {home} is finished{rest}" if known else runs.say_no_runs(home)
    cells = [(s.name, s.state, s.where, f"{_clock(s.when_s)}  {s.why}") for s in stops]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    idle = [stop.name for stop in stops if stop.state != "running"]
    return "\n".join([*lines, *([f"\nfinish one: conta resume {idle[0]}"] if idle else [])])


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
