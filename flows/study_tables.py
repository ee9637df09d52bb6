"""Tables and picture of a study, made of its cells alone."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from flows.forest import draw_differences
from flows.study import (
    Cell,
    Cells,
    Check,
    Study,
    find_cells,
    list_missing,
    refuse_strangers,
    write_text,
)
from wsss_core.causal.intervention import say_dead
from wsss_core.config import CausalConfig, parse_config
from wsss_core.errors import DataError
from wsss_core.evaluation.paired import (
    Interval,
    bootstrap_interval,
    ratio_interval,
    student_interval,
)

TABLES, PICTURE = "tables.md", "differences.svg"
_RAW = ("context/", "adjustment/", "confounders/")  # ratios that are no scores


def write_tables(study: Study, folder: Path) -> str:
    """Write the tables and the picture of the cells that are there; returns the tables.

    Raises:
        DataError: As `find_cells`.
        StoreError: If they are not there yet and cannot be written.
    """
    cells = find_cells(study, folder)
    text = "\n\n".join(build_tables(study, cells))
    for name, made in ((TABLES, f"{text}\n"), (PICTURE, build_picture(study, cells))):
        if _read(folder / name) != made:
            write_text(folder / name, made)
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
    refuse_strangers(study, folder, cells)
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


def _quoted_tables(page: str, name: str) -> list[str]:
    """What follows each mark of a study on a page, up to an empty line."""
    parts = re.split(rf"<!--\s*table\s+{re.escape(name)}\s*-->[ \t]*\n", page)[1:]
    return [part.partition("\n\n")[0].strip("\n") for part in parts]


def _read(path: Path) -> str:
    return path.read_text() if path.is_file() else ""
