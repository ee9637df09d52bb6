"""Runs on disk: what was asked, what each round made, how it ended, and who is at work on it now.

A run is the folder `CONTA_HOME/runs/<name>-<8 hex>/`; the digits are a hash of all settings that
change a round's result and of the data's content. How many rounds, where to stop, the device and
the place of the data folder are not in it: asking for one more round goes on with the same run.
`run.json` can always be made again from the store, so losing it loses no compute.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, PrivateAttr

from flows import locks
from wsss_core.config import Config
from wsss_core.errors import InputError, StoreError
from wsss_core.records import Manifest
from wsss_core.store import write_atomically

AS_ASKED, GOES_ON = ", as asked", "goes on as "
"""End or beginning of the reason of a run that stopped because it was told to."""
_RECORD, _LOCK, _LOG = "run.json", "lock", "run.log"
_OURS = ("flows", "tasks", "wsss_core")  # Python's default level would drop what they note

StageName = Literal[
    "classifier",
    "cams",
    "boundary_labels",
    "boundary",
    "masks",
    "segmenter",
    "predictions",
    "test",
    "confounders",
]
MAIN_STAGES = get_args(StageName)
"""Names of the stages that a round is made of; the others look at what these made."""

TABLE_METRICS = (
    ("CAM", "cam/miou"),
    ("pseudo-mask", "pseudo/miou"),
    ("tag agreement", "tag_agreement"),
)
"""Columns of the round table beside those of each scored split: title and metric."""

TABLE_UNITS = (
    "mIoU in percent, background included: CAMs, pseudo-masks, the segmenter on each list."
)
"""What a page says above a table of rounds."""


class Review(BaseModel):
    """What a person decided after a round (`review: true`).

    Attributes:
        answers: How many were given; who stopped a run may be asked again.
        goes_on: Whether the rounds after it may be done, and need no second question.
        threshold: The seeds.threshold of the run that goes on in this one's place; None: the same.
    """

    model_config = ConfigDict(extra="forbid")

    answers: int = 0
    goes_on: bool = False
    threshold: float | None = None


class Round(BaseModel):
    """What one round made.

    Attributes:
        round: Its number; 0 is the round without a context map.
        manifests: By stage name, or `stage/split` for a stage that is called for several splits.
        seconds: Compute that this round added; what it shares with an earlier round counts there.
        former: What the start before made and this one has not come to; kept from the store's gc.
        review: What a person said to it.
    """

    model_config = ConfigDict(extra="forbid")

    round: int
    manifests: dict[str, Manifest] = {}
    seconds: float = 0.0
    former: dict[str, Manifest] = {}
    review: Review = Review()

    @property
    def metrics(self) -> dict[str, float]:
        """The flat metrics of all its stages, and `seconds`."""
        merged = {"seconds": self.seconds}
        for manifest in self.manifests.values():
            merged |= manifest.metrics
        return merged


class UnderWay(BaseModel):
    """The stage that a run is at, or stopped at.

    Attributes:
        round: Number of the round.
        label: The stage, with its split if it has one.
        stage: Name of the stage, and with `key` the artifact that it makes.
        key: See `stage`.
    """

    model_config = ConfigDict(extra="forbid")

    round: int
    label: str
    stage: str
    key: str


class Run(BaseModel):
    """What `run.json` says.

    Attributes:
        name: Name of the folder.
        status: `running` also means: died, if nobody holds the lock.
        reason: Why it ended, one line; empty when it finished.
        config: The resolved settings of the latest start.
        data: Content digest of the data.
        data_root: Folder of the user's photos; None for scenes.
        shared: Manifests that belong to no round, by stage: `scenes` or `dataset`, and `truth`;
            `train` is the training part of the first.
        rounds: From 0 on.
        under_way: Where it is or stopped; None before the first stage and once it is finished.
        started_ms: Wall clock of the latest start, ms since 1970.
        finished_ms: Wall clock of its end.
        prefect_run: Id of the latest flow run.
        prefect_url: Its page.
        mlflow_run: Id of the parent run.
        mlflow_url: Its page.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    status: Literal["running", "finished", "stopped", "failed"] = "running"
    reason: str = ""
    config: dict[str, Any]
    data: str
    data_root: str | None = None
    shared: dict[str, Manifest] = {}
    rounds: list[Round] = []
    under_way: UnderWay | None = None
    started_ms: int
    finished_ms: int | None = None
    prefect_run: str | None = None
    prefect_url: str | None = None
    mlflow_run: str | None = None
    mlflow_url: str | None = None
    _finished: list[Round] | None = PrivateAttr(None)

    @property
    def photos(self) -> Manifest:
        """The photos it learns from, indexed or drawn."""
        return self.shared.get("scenes") or self.shared["dataset"]

    @property
    def as_asked(self) -> bool:
        """Whether it came to where it was told to stop, or goes on under another name."""
        ends = self.reason.startswith(GOES_ON) or self.reason.endswith(AS_ASKED)
        return self.status == "stopped" and ends

    def start_round(self, number: int) -> None:
        """A fresh record of a round in the place of a former one."""
        before = self.rounds[number : number + 1]
        former = {name: made for b in before for name, made in (b.former | b.manifests).items()}
        review = before[0].review if before else Review()
        self.rounds[number : number + 1] = [Round(round=number, former=former, review=review)]

    def keep(self, number: int, label: str, manifest: Manifest) -> None:
        """Note what a stage of a round made."""
        target = self.rounds[number]
        known = {
            (former.stage, former.key)
            for earlier in self.rounds[: number + 1]
            for former in earlier.manifests.values()
        }
        if (manifest.stage, manifest.key) not in known:
            target.seconds = round(target.seconds + manifest.seconds, 3)
        target.manifests[label] = manifest
        target.former.pop(label, None)

    def go_beyond(self) -> None:
        """Know that this start does what the one that finished had not done."""
        self._finished = None

    def restore(self) -> None:
        """Be finished again, if it was before this start and this start only looked it through."""
        if self._finished is not None:
            self.status, self.reason, self.under_way = "finished", "", None
            self.rounds = self._finished

    def finish(self) -> None:
        """Leave nothing open: every stage of every round was come to."""
        self.status, self.under_way = "finished", None
        for entry in self.rounds:
            entry.former.clear()


def name_run(config: Config, data: Manifest) -> str:
    """The name under which these settings on this data are always found again."""
    text = f"{config.digest()} {data.digest}"
    return f"{config.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def run_folder(home: Path, name: str) -> Path:
    """The folder of a run."""
    return home / "runs" / name


def log_path(home: Path, name: str) -> Path:
    """The log of a run: one JSON object a line."""
    return run_folder(home, name) / _LOG


def save_run(home: Path, run: Run) -> None:
    """Write `run.json`; a reader never sees half of it.

    Raises:
        StoreError: If the disk does not take it.
    """
    path = run_folder(home, run.name) / _RECORD
    try:
        write_atomically(path, run.model_dump_json(indent=1).encode())
    except OSError as error:
        raise StoreError(
            f"{path} cannot be written ({error.strerror}); free space or mend its permissions, and "
            "run the same command again"
        ) from error


def open_run(home: Path, name: str, config: Config, data: Manifest, truth: Manifest | None) -> Run:
    """The record of a run that starts now, with the rounds of its former starts."""
    former = read_run(home, name)
    run = Run(
        name=name,
        config=config.model_dump(mode="json"),
        data=data.digest,
        data_root=None if config.data.root is None else str(config.data.root),
        shared={made.stage: made for made in (data, truth) if made is not None},
        rounds=[] if former is None else former.rounds,
        under_way=None if former is None else former.under_way,
        started_ms=time.time_ns() // 1_000_000,
    )
    same = former is not None and former.config.get("rounds") == config.rounds
    if former is not None and same and former.status == "finished":
        run._finished = [entry.model_copy(deep=True) for entry in former.rounds]
    save_run(home, run)
    return run


def close_run(home: Path, run: Run) -> None:
    """Write down how a run ended; `running` becomes `finished`."""
    if run.status == "running":
        run.finish()
    elif run.status == "stopped":
        run.restore()
    run.finished_ms = time.time_ns() // 1_000_000
    save_run(home, run)


def read_run(home: Path, name: str) -> Run | None:
    """What `run.json` says; None without one that can be read."""
    try:
        return Run.model_validate_json((run_folder(home, name) / _RECORD).read_text())
    except (OSError, ValueError):
        return None


def say_no_runs(home: Path) -> str:
    """The answer to whoever asks for the runs of a home that has none."""
    return f"no runs in {home}; start one with: conta run recipes/scenes.yaml"


def list_runs(home: Path) -> list[Run]:
    """All runs of a home, the latest started first."""
    folder = home / "runs"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    runs = [run for run in (read_run(home, name) for name in names) if run is not None]
    return sorted(runs, key=lambda run: run.started_ms, reverse=True)


def find_run(home: Path, text: str) -> Run:
    """The run that a name, the unique beginning of one, or `latest` means.

    Raises:
        InputError: If it means none or several.
    """
    runs = list_runs(home)
    if not runs:
        raise InputError(f"no run in {home}; start one with `conta run RECIPE`, or set CONTA_HOME")
    if text == "latest":
        return runs[0]
    matches = [run for run in runs if run.name == text] or [
        run for run in runs if run.name.startswith(text)
    ]
    if len(matches) == 1:
        return matches[0]
    names = ", ".join(run.name for run in (matches or runs)[:8])
    kind = "several runs begin" if matches else "no run begins"
    raise InputError(f"{kind} with {text!r}; choose one of: {names}")


def find_round(home: Path, text: str, *, stage: str = "segmenter") -> tuple[Run, Round]:
    """The round that `RUN:ROUND` means; after `RUN` alone the last one that has what is asked for.

    Args:
        home: CONTA_HOME.
        text: What the user wrote.
        stage: Whose artifact the round must have: `segmenter` or `masks`.

    Raises:
        InputError: If there is no such run or round.
    """
    name, colon, number = text.partition(":")
    run = find_run(home, name)
    known = {str(entry.round): entry for entry in run.rounds if stage in entry.manifests}
    if not known:
        what = {"segmenter": "trained segmenter", "masks": "pseudo-masks"}[stage]
        raise InputError(f"run {run.name} has no {what} yet; finish it with `conta run`")
    if not colon:
        return run, list(known.values())[-1]
    if number not in known:
        raise InputError(f"run {run.name} has no round {number!r}; it has {', '.join(known)}")
    return run, known[number]


def lock_path(home: Path, name: str) -> Path:
    """The lock of a run; see `flows.locks`."""
    return run_folder(home, name) / _LOCK


def hold_run(home: Path, name: str) -> contextlib.AbstractContextManager[None]:
    """Be the only process at work on a run.

    Raises:
        BusyError: If another live process is.
    """
    return locks.hold(lock_path(home, name), f"run {name}")


@contextlib.contextmanager
def log_run(home: Path, name: str) -> Iterator[Path]:
    """Write what any library logs from here on to the run's log."""
    path = log_path(home, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(_JsonLines())
    root = logging.getLogger()
    root.addHandler(handler)
    for name in _OURS:
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        yield path
    finally:
        root.removeHandler(handler)
        with contextlib.suppress(OSError):  # a full disk takes no last line, and is said elsewhere
            handler.close()


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(record.created)),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def compare_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row a round: `run`, `round` and the flat `metrics`."""
    return [
        {"run": run.name, "round": entry.round, "metrics": entry.metrics}
        for run in runs
        for entry in run.rounds
    ]


def round_table(run: Run) -> str:
    """Rounds down, scores across, in percent; a score that was not made is a dash."""
    table = _align(_cells(compare_rows([run]), first=("round",)))
    return f"{table}\nuses truth: the segmenter saw true masks" if _uses_truth(run) else table


def compare_table(runs: Sequence[Run]) -> str:
    """The rounds of several runs, run after run."""
    return _align(compare_cells(runs))


def compare_cells(runs: Sequence[Run]) -> list[list[str]]:
    """The cells of `compare_table`, its head first."""
    marked = {run.name: mark_run(run) for run in runs}
    named = [row | {"run": marked[row["run"]]} for row in compare_rows(runs)]
    return _cells(named, first=("run", "round"))


def mark_run(run: Run) -> str:
    """The name of a run, and whether it used truth: no score stands without that."""
    return f"{run.name} (uses truth)" if _uses_truth(run) else run.name


def _uses_truth(run: Run) -> bool:
    return run.config.get("supervision") == "truth"


def markdown_table(run: Run) -> str:
    """The round table for a page."""
    head, *body = _cells(compare_rows([run]), first=("round",))
    lines = [head, ["---:"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def score_columns(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Title and metric of every score that a table of these rows has."""
    found = dict.fromkeys(name for row in rows for name in row["metrics"])
    scored = [
        (name.removeprefix("seg_").removesuffix("/miou"), name)
        for name in found
        if name.startswith("seg_") and name.endswith("/miou")
    ]
    return [*TABLE_METRICS[:2], *scored, *TABLE_METRICS[2:]]


def _align(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def _cells(rows: Sequence[dict[str, Any]], *, first: Sequence[str]) -> list[list[str]]:
    columns = score_columns(rows)
    lines = [[*first, *(title for title, _ in columns), "seconds"]]
    for row in rows:
        metrics = row["metrics"]
        scores = [f"{100 * metrics[name]:.1f}" if name in metrics else "-" for _, name in columns]
        lines.append([*(str(row[name]) for name in first), *scores, f"{metrics['seconds']:.0f}"])
    return lines
