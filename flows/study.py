"""Studies: arms against one control over seeds, one JSON a finished cell, tables made of cells.

A cell is one arm under one seed. Its file is small and meant to be committed: the settings it was
made with, the scores of its rounds, and bootstrap draws of its end point. The tables need nothing
else, so anybody can make them again without the store.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from flows.forest import draw_differences
from flows.runs import MAIN_STAGES
from wsss_core.causal.intervention import say_dead
from wsss_core.config import CausalConfig, Config, load_recipe, parse_config
from wsss_core.errors import DataError, SettingsError
from wsss_core.evaluation.paired import (
    Interval,
    bootstrap_interval,
    ratio_interval,
    student_interval,
)
from wsss_core.store import write_atomically

TABLES, PICTURE = "tables.md", "differences.svg"
_RAW = ("context/", "adjustment/", "confounders/")  # ratios that are no scores
_SCORE = re.compile(
    r"(cam|pseudo|seg_[^/]+)/(miou|miou_core|miou_oracle)|classifier/(map|f1|f1_micro)"
    r"|audit(_[^/]+)?/\w+|tag_agreement(/\w+)?|stability"
)
_MADE_BY = {
    "classifier": "classifier",
    "cam": "cams",
    "pseudo": "masks",
    "audit": "masks",
    "seg_train": "predictions",
    "tag_agreement": "predictions",
    "stability": "predictions",
}
ArmName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_+.-]{0,40}$")]


class Check(BaseModel):
    """What the cells have to show before the study may be believed.

    Attributes:
        what: In words.
        of: Arm and metric: the mean over seeds, in the last round.
        less: What is taken off, likewise.
        over: What it is divided by, likewise.
        over_less: What is taken off that, likewise.
        low: Least value that holds; scores are shares of 1.
        high: Largest value that holds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    what: str
    of: tuple[str, str]
    less: tuple[str, str] | None = None
    over: tuple[str, str] | None = None
    over_less: tuple[str, str] | None = None
    low: float | None = None
    high: float | None = None

    def places(self) -> tuple[tuple[str, str] | None, ...]:
        """`of`, `less`, `over` and `over_less`."""
        return self.of, self.less, self.over, self.over_less


class Study(BaseModel):
    """What a study file says.

    Attributes:
        name: Folder of its cells, and their experiment in MLflow.
        recipe: What every arm starts from; in the file relative to its folder.
        seeds: One cell of every arm each.
        seeded: Settings that take the seed's value.
        rounds: Rounds after round 0; the last one is compared.
        until: Stop in the last round after this stage; None goes to its end.
        settings: What every arm changes in the recipe, dotted names.
        arms: What each arm changes beyond that.
        against: The arm that the others are compared with.
        endpoint: The one metric that the study was planned for.
        metrics: Further columns.
        checks: What has to hold, in a table of their own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,40}$")
    recipe: Path
    seeds: tuple[int, ...] = Field(min_length=1)
    seeded: tuple[str, ...] = Field(("seed",), min_length=1)
    rounds: int = Field(1, ge=0, le=20)
    until: str | None = None
    settings: dict[str, Any] = {}
    arms: dict[ArmName, dict[str, Any]] = Field(min_length=1)
    against: str
    endpoint: str = "pseudo/miou"
    metrics: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()

    @model_validator(mode="after")
    def _names_exist(self) -> Study:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {list(self.seeds)} names one twice, it would count twice")
        if self.against not in self.arms:
            raise ValueError(f"against: {self.against!r} is no arm; there are {list(self.arms)}")
        if self.until is not None and self.until not in MAIN_STAGES:
            raise ValueError(f"until: no stage {self.until!r}; there are {list(MAIN_STAGES)}")
        if not _SCORE.fullmatch(self.endpoint):
            raise ValueError(
                f"endpoint: {self.endpoint!r} is no score; some are pseudo/miou, cam/miou_oracle, "
                "classifier/map, seg_val/miou and audit/leak_cam"
            )
        made_by = _MADE_BY.get(self.endpoint.partition("/")[0], "test")
        if self.until and MAIN_STAGES.index(self.until) < MAIN_STAGES.index(made_by):
            raise ValueError(
                f"until: {self.until!r} stops before {self.endpoint!r} is known; set it to "
                f"{made_by!r}"
            )
        for check in self.checks:
            for arm, _ in filter(None, check.places()):
                if arm not in self.arms:
                    raise ValueError(f"checks: {arm!r} is no arm; there are {list(self.arms)}")
        return self

    def config(self, arm: str, seed: int, *, data: Path | None = None) -> Config:
        """The settings of a cell.

        Args:
            arm: Name of the arm.
            seed: Value of every setting in `seeded`.
            data: Folder of the photos, where the recipe needs one.

        Raises:
            SettingsError: For an unknown name or a value out of range.
        """
        changes = {"name": self.name, "rounds": self.rounds, **self.settings, **self.arms[arm]}
        changes |= dict.fromkeys(self.seeded, seed)
        if data is not None:
            changes["data.root"] = str(data)
        texts = [f"{name}={json.dumps(value)}" for name, value in changes.items()]
        try:
            return load_recipe(self.recipe, texts)
        except SettingsError as error:
            raise SettingsError(f"arm {arm!r} of study {self.name}: {error}") from None

    @property
    def stop(self) -> str | None:
        """Where the flow stops, as its `until`."""
        return None if self.until is None else f"{self.until}:{self.rounds}"


class Cell(BaseModel):
    """What one arm gave under one seed.

    Attributes:
        arm: Name of the arm.
        seed: The seed.
        stop: Where the study asked it to stop.
        config: The resolved settings.
        data: Content digest of the data.
        rounds: Flat metrics of each round, those of single classes left out.
        endpoint: The study's, which `bootstrap` is of; empty in cells of 0.1.0.
        bootstrap: The end point of the last round under draws of photos; empty if the artifacts
            hold no counts of single photos.
        artifacts: Content digest of what each stage of the last round made.
        code: Hash of the code behind each stage; cells of 0.1.0 say nothing of it.
        versions: Of the libraries.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    arm: str
    seed: int
    stop: str | None
    config: dict[str, Any]
    data: str
    rounds: list[dict[str, float]] = Field(min_length=1)
    endpoint: str = ""
    bootstrap: list[float] = []
    artifacts: dict[str, str] = {}
    code: dict[str, str] = {}
    versions: dict[str, str] = {}


Cells = Mapping[tuple[str, int], Cell]
"""Cells by arm and seed."""


def load_study(path: Path) -> Study:
    """Read a study file.

    Raises:
        SettingsError: For a missing file, broken YAML or a fault in it or in an arm; one line.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise SettingsError(
            f"no study at {path}; those that ship are in recipes/studies/"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        fault = " ".join(str(error).split())
        raise SettingsError(f"{path} cannot be read as YAML: {fault}") from None
    if isinstance(tree, dict) and "arms" not in tree and "against" not in tree:
        raise SettingsError(f"{path} has no arms, so it is no study; a recipe: conta run {path}")
    try:
        study = Study.model_validate(tree)
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, item['loc']))}: {item['msg']}".removeprefix(": Value error, ")
            for item in error.errors()
        ]
        raise SettingsError(f"{path}: {'; '.join(faults)}") from None
    study = study.model_copy(update={"recipe": path.parent / study.recipe})
    for arm in study.arms:  # a typo in the last arm is said before the first one is computed
        refusal = _refuse(study, study.config(arm, study.seeds[0]))
        if refusal is not None:
            raise SettingsError(f"arm {arm!r} of study {study.name}: {refusal}")
    _refuse_copies(study)
    return study


def _refuse(study: Study, config: Config) -> str | None:
    """Why a run of these settings would not come to what the study compares."""
    if config.supervision == "truth" and study.rounds:
        return "the fully supervised twin has one round; set rounds: 0"
    if config.rounds != study.rounds:
        return f"rounds {config.rounds}: the study has {study.rounds}; remove it here"
    if config.evaluation.stop_stability is not None:
        return "evaluation.stop_stability may end it before the last round; set it to null"
    return None


def _refuse_copies(study: Study) -> None:
    """Two cells of the same settings are one training, and would count as two."""
    first: dict[str, str] = {}
    for seed in study.seeds:
        for arm in study.arms:
            name = f"arm {arm!r}, seed {seed}"
            other = first.setdefault(study.config(arm, seed).digest(), name)
            if other != name:
                raise SettingsError(
                    f"study {study.name}: {other} and {name} have the same settings; change an "
                    "arm, or name in `seeded` what the seeds should change"
                )


def cell_path(folder: Path, arm: str, seed: int) -> Path:
    """The file of a cell."""
    return folder / f"{arm}-{seed}.json"


def write_cell(folder: Path, cell: Cell) -> None:
    """Keep a finished cell; a reader never sees half of it."""
    text = json.dumps(cell.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"
    write_atomically(cell_path(folder, cell.arm, cell.seed), text.encode())


def find_cells(study: Study, folder: Path) -> dict[tuple[str, int], Cell]:
    """The cells of a study that are there and were made with the settings it asks for today.

    A setting that did not exist when a cell was made counts as its default.

    Raises:
        DataError: For a broken cell, or two that ask for the same data and were made of different.
    """
    found: dict[tuple[str, int], Cell] = {}
    for arm in study.arms:
        for seed in study.seeds:
            path = cell_path(folder, arm, seed)
            cell = _read_cell(path)
            if cell is None or not _answers(cell, study, arm, seed):
                continue
            other = find_other_data(found, parse_config(cell.config), cell.data)
            if other is not None:
                raise DataError(
                    f"{path} and {cell_path(folder, *other)} were made of different data, so they "
                    "do not compare; remove the one of the data you do not mean and run the study "
                    "again"
                )
            found[arm, seed] = cell
    return found


def find_other_data(cells: Cells, config: Config, digest: str) -> tuple[str, int] | None:
    """Arm and seed of a cell of the same data settings that was made of other data.

    Args:
        cells: Those that are there.
        config: Settings of a further one.
        digest: Of its data.
    """
    asked = config.data.model_dump_json(exclude={"root"})
    for place, cell in cells.items():
        if cell.data == digest:
            continue
        if parse_config(cell.config).data.model_dump_json(exclude={"root"}) == asked:
            return place
    return None


def list_missing(study: Study, cells: Cells) -> list[tuple[str, int]]:
    """Arm and seed of what is not done; seed by seed, so that arms find what they share."""
    return [(arm, seed) for seed in study.seeds for arm in study.arms if (arm, seed) not in cells]


def write_tables(study: Study, folder: Path) -> str:
    """Write the tables and the picture of the cells that are there; returns the tables."""
    cells = find_cells(study, folder)
    text = "\n\n".join(build_tables(study, cells))
    write_atomically(folder / TABLES, f"{text}\n".encode())
    write_atomically(folder / PICTURE, build_picture(study, cells).encode())
    return text


def verify(study: Study, folder: Path, *, findings: Path) -> str:
    """The tables made anew from the cells, after they were found equal to those written down.

    Args:
        study: The study.
        folder: Of its cells and its `tables.md`.
        findings: A page that may quote tables: what follows a line `<!-- table NAME -->` up to the
            next empty line.

    Raises:
        DataError: If a cell is missing, if a metric or a check has no number, or if a table says
            something else than the cells.
    """
    cells = find_cells(study, folder)
    missing = list_missing(study, cells)
    if missing:
        arm, seed = missing[0]
        raise DataError(
            f"{len(missing)} of {len(study.arms) * len(study.seeds)} cells of {study.name} are "
            f"missing, the first is arm {arm}, seed {seed}; run the study without --verify"
        )
    for check in study.checks:
        if len(_found(study, cells, check)) < len(study.seeds):
            names = ", ".join(metric for _, metric in filter(None, check.places()))
            raise DataError(
                f"check {check.what!r} of {study.name} finds no number under some seed; correct "
                f"the names it has: {names}"
            )
    for metric in (study.endpoint, *study.metrics):
        if not any(metric in cell.rounds[-1] for cell in cells.values()):
            raise DataError(f"metrics of {study.name}: no cell has {metric!r}; correct its name")
    blocks = build_tables(study, cells)
    text = "\n\n".join(blocks)
    for name, made in ((TABLES, f"{text}\n"), (PICTURE, build_picture(study, cells))):
        if _read(folder / name) != made:
            raise DataError(
                f"{folder / name} is not what the cells give; run the study without --verify"
            )
    for quoted in _quoted_tables(_read(findings), study.name):
        if quoted not in blocks:
            first = quoted.partition("\n")[0]
            raise DataError(
                f"a table of {study.name} in {findings} is not what the cells give (it begins "
                f"{first!r}); copy it from {folder / TABLES}"
            )
    return text


def build_tables(study: Study, cells: Cells) -> list[str]:
    """The end point with its intervals, the means of the other metrics, the checks; Markdown."""
    tables = [_endpoint_table(study, cells), *_metric_tables(study, cells)]
    return [*tables, _check_table(study, cells)] if study.checks else tables


def build_picture(study: Study, cells: Cells) -> str:
    """The end point of every arm less the control, in points; SVG."""
    name = study.endpoint
    rows = {
        arm: [100 * value for value in _differences(study, cells, arm, name)]
        for arm in study.arms
        if arm != study.against
    }
    return draw_differences(
        rows, title=f"{name}, round {study.rounds}, less {study.against}: points, 95 % over seeds"
    )


def _endpoint_table(study: Study, cells: Cells) -> str:
    name = study.endpoint
    last = f"{name}, round {study.rounds}"
    head = ["arm", "seeds", last, f"less {study.against}", "95 %, seeds", "95 %, photos"]
    rows = [_start_row(study, cells)] if study.rounds else []
    for arm in study.arms:
        scores = _scores(study, cells, arm, name)
        marks = _dead(cells, arm), _unpaired(study, cells, arm), _recoded(study, cells, arm)
        row = [_marked(arm, *marks), str(len(scores)), _mean(scores.values(), name)]
        if arm != study.against:
            differences = _differences(study, cells, arm, name)
            row += [
                _signed(_average(differences), name),
                _interval(student_interval(differences), name),
                _interval(_photo_interval(study, cells, arm), name),
            ]
        rows.append(row)
    return _markdown(head, rows)


def _start_row(study: Study, cells: Cells) -> list[str]:
    first = [
        cell.rounds[0][study.endpoint]
        for (arm, _), cell in cells.items()
        if arm == study.against and study.endpoint in cell.rounds[0]
    ]
    return ["round 0", str(len(first)), _mean(first, study.endpoint)]


def _metric_tables(study: Study, cells: Cells) -> list[str]:
    """Means, and in brackets the paired difference with half its 95 % interval over seeds."""
    if not study.metrics:
        return []
    rows = []
    for arm in study.arms:
        row = [_marked(arm, _dead(cells, arm))]
        for name in study.metrics:
            text = _mean(_scores(study, cells, arm, name).values(), name)
            interval = student_interval(_differences(study, cells, arm, name))
            if arm != study.against and interval is not None:
                reach = _number(interval.high - interval.mean, name)
                text += f" ({_signed(interval.mean, name)} ± {reach})"
            row.append(text)
        rows.append(row)
    return [_markdown(["arm", *study.metrics], rows)]


def _marked(arm: str, *marks: str) -> str:
    text = "; ".join(filter(None, marks))
    return f"{arm} ({text})" if text else arm


def _dead(cells: Cells, arm: str) -> str:
    """Says under how many seeds a context was dead: such an arm is no test of it."""
    reasons = [
        say_dead(cell.rounds[-1], context=cell.config["causal"]["context"])
        for (name, _), cell in cells.items()
        if name == arm
    ]
    dead = len(list(filter(None, reasons)))
    part = "" if dead == len(reasons) else f": {dead} of {len(reasons)}"
    return f"context dead{part}" if dead else ""


def _unpaired(study: Study, cells: Cells, arm: str) -> str:
    """Says under how many seeds round 0 is not the control's though nothing asks for another.

    So it is where the code or the machine changed between the two cells: the difference then holds
    the noise of two trainings, not of one.
    """
    pairs = [
        (cells[arm, seed], cells[study.against, seed])
        for seed in study.seeds
        if (arm, seed) in cells and (study.against, seed) in cells
    ]
    odd = sum(_start(ours) == _start(theirs) and _differ(ours, theirs) for ours, theirs in pairs)
    return f"another round 0: {odd} of {len(pairs)}" if odd else ""


def _recoded(study: Study, cells: Cells, arm: str) -> str:
    """Says that a stage's code is not the same in all cells of an arm and its control.

    The change need not move a number, but nobody has looked.
    """
    stamps = defaultdict(set)
    for (name, _), cell in cells.items():
        if name in (arm, study.against):
            for label, stamp in cell.code.items():
                stamps[label].add(stamp)
    changed = [label for label, found in stamps.items() if len(found) > 1]
    return f"code changed: {', '.join(sorted(changed))}" if changed else ""


def _start(cell: Cell) -> str:
    """The settings that round 0 depends on: those that only later rounds read are left out."""
    config = parse_config(cell.config)
    start = config.classifier.model_copy(update={"init": "imagenet"})
    changes = {"causal": CausalConfig(), "classifier": start, "threshold_changes": {}}
    return config.model_copy(update=changes).digest()


def _differ(ours: Cell, theirs: Cell) -> bool:
    shared = ours.rounds[0].keys() & theirs.rounds[0].keys() - {"seconds"}
    return any(
        ours.rounds[0][name] != theirs.rounds[0][name]
        for name in shared
        if not name.startswith("confounders/")  # already of the next round's context
    )


def _check_table(study: Study, cells: Cells) -> str:
    rows = [[check.what, *_judge(check, _found(study, cells, check))] for check in study.checks]
    return _markdown(["check", "found", "95 %, seeds", "asked", "holds"], rows)


def _found(study: Study, cells: Cells, check: Check) -> list[tuple[float, float]]:
    """What a check looks at and what it is divided by, for each seed that has all the scores."""
    columns = [
        dict.fromkeys(study.seeds, default) if place is None else _scores(study, cells, *place)
        for place, default in zip(check.places(), (0.0, 0.0, 1.0, 0.0), strict=True)
    ]
    rows = [
        [column[seed] for column in columns]
        for seed in study.seeds
        if all(seed in column for column in columns)
    ]
    return [(of - less, over - over_less) for of, less, over, over_less in rows]


def _judge(check: Check, found: Sequence[tuple[float, float]]) -> tuple[str, str, str, str]:
    """The value and its interval, what was asked, whether the value holds.

    `-` without a score, and where the divisor is not above 0: of a gap that is none nothing is
    closed, and two losses would look like a gain.
    """

    def text(bound: float) -> str:
        return f"{bound:.2f}" if check.over else _number(bound, check.of[1])

    low, high = ("" if bound is None else text(bound) for bound in (check.low, check.high))
    asked = f"{low} .. {high}".strip()
    values, divisors = [value for value, _ in found], [divisor for _, divisor in found]
    if sum(divisors) <= 0:
        return "-", "-", asked, "-"
    mean, interval = sum(values) / sum(divisors), ratio_interval(values, divisors)
    reach = "-" if interval is None else f"{text(interval.low)} .. {text(interval.high)}"
    least = -math.inf if check.low is None else check.low
    most = math.inf if check.high is None else check.high
    return text(mean), reach, asked, "yes" if least <= mean <= most else "no"


def _scores(study: Study, cells: Cells, arm: str, name: str) -> dict[int, float]:
    """A metric of the last round by seed, where there is one."""
    return {
        seed: cells[arm, seed].rounds[-1][name]
        for seed in study.seeds
        if (arm, seed) in cells and name in cells[arm, seed].rounds[-1]
    }


def _differences(study: Study, cells: Cells, arm: str, name: str) -> list[float]:
    ours = _scores(study, cells, arm, name)
    theirs = _scores(study, cells, study.against, name)
    return [score - theirs[seed] for seed, score in ours.items() if seed in theirs]


def _photo_interval(study: Study, cells: Cells, arm: str) -> Interval | None:
    """Over all seeds that the difference is of; None if one of them has draws of something else."""
    pairs = [
        (cells[arm, seed], cells[study.against, seed])
        for seed in study.seeds
        if (arm, seed) in cells and (study.against, seed) in cells
    ]
    if any(study.endpoint != cell.endpoint for pair in pairs for cell in pair):
        return None
    return bootstrap_interval([(ours.bootstrap, theirs.bootstrap) for ours, theirs in pairs])


def _average(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else None


def _mean(values: Iterable[float], name: str) -> str:
    average = _average(values)
    return "-" if average is None else _number(average, name)


def _number(value: float, name: str) -> str:
    """Scores in percent, ratios and seconds as they are."""
    if name.startswith(_RAW):
        return f"{value:.3g}"
    return f"{value:.0f}" if name.startswith("seconds") else f"{100 * value:.1f}"


def _signed(value: float | None, name: str) -> str:
    if value is None:
        return "-"
    return ("" if value < 0 else "+") + _number(value, name)


def _interval(interval: Interval | None, name: str) -> str:
    if interval is None:
        return "-"
    return f"{_signed(interval.low, name)} .. {_signed(interval.high, name)}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    filled = [[*row, *[""] * (len(head) - len(row))] for row in rows]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *filled]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _read_cell(path: Path) -> Cell | None:
    try:
        return Cell.model_validate_json(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise DataError(f"{path} is no cell of a study; remove it, or take it from git") from None


def _answers(cell: Cell, study: Study, arm: str, seed: int) -> bool:
    try:
        made_with = parse_config(cell.config)
    except SettingsError:  # a setting of then does not exist any more
        return False
    asked = study.config(arm, seed)
    return (cell.stop, made_with.rounds, len(cell.rounds) - 1, made_with.digest()) == (
        study.stop,
        asked.rounds,
        study.rounds,
        asked.digest(),
    )


def _quoted_tables(page: str, name: str) -> list[str]:
    """What follows each mark of a study on a page, up to an empty line."""
    parts = re.split(rf"<!--\s*table\s+{re.escape(name)}\s*-->[ \t]*\n", page)[1:]
    return [part.partition("\n\n")[0].strip("\n") for part in parts]


def _read(path: Path) -> str:
    return path.read_text() if path.is_file() else ""
