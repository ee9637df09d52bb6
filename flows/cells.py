"""The Prefect flow that computes the cells of a study, one run after the other, over one store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from prefect import flow

from flows.conta import conta_flow, index
from flows.environment import locate_data, open_home
from flows.plan import (
    Planned,
    check_data,
    check_settings,
    cut_plan,
    fetch_weights,
    plan_rounds,
)
from flows.progress import FlowRecorder
from flows.rounds import Truth, score_what_is_there
from flows.runs import Round, Run, StageName, read_run
from flows.study import (
    Cell,
    Cells,
    Study,
    cell_path,
    find_cells,
    find_other_data,
    list_missing,
    stage_of_score,
    write_cell,
)
from wsss_core.config import Config
from wsss_core.errors import ContaError, DataError
from wsss_core.evaluation.paired import bootstrap_miou
from wsss_core.observe import ConsoleRecorder
from wsss_core.records import Manifest
from wsss_core.stages.audit import read_photo_counts
from wsss_core.stages.stage import Workspace

_SPLIT = "seg_"


@flow(name="study")
def study_flow(study: Study, folder: Path, data: Path | None = None) -> int:
    """Compute the cells that are missing; each is kept as soon as it is done.

    Args:
        study: The study.
        folder: Of its cells.
        data: Folder of the photos, where the recipe needs one.

    Returns:
        How many were computed.
    """
    home, recorder = open_home(), ConsoleRecorder()
    found = find_cells(study, folder)
    missing = list_missing(study, found)
    configs = {cell: locate_data(study.config(*cell, data=data)) for cell in missing}
    _check_all(study, configs, found, home, folder)  # the last arm's fault before the first's cell
    for number, ((arm, seed), config) in enumerate(configs.items(), start=1):
        recorder.note(f"cell {number} of {len(missing)}: arm {arm}, seed {seed}")
        until = cast("StageName | None", study.until)
        name = conta_flow(config, until, study.rounds)
        run = read_run(home, name)
        if run is None:
            raise ContaError(f"the record of run {name} cannot be read; start the study again")
        _check_same_data(found, config, run.data, folder)
        found[arm, seed] = take_cell(study, run, Workspace(home), arm=arm, seed=seed)
        write_cell(folder, found[arm, seed])
    return len(missing)


def _check_all(
    study: Study, cells: Mapping[tuple[str, int], Config], found: Cells, home: Path, folder: Path
) -> None:
    """Refuse what a run would refuse, and what would not come to a cell that compares."""
    indexed: dict[str, tuple[Manifest, Truth | None]] = {}
    for (arm, _), config in cells.items():
        check_settings(config)
        work = Workspace(home, config.data.root, config.runtime, FlowRecorder())
        asked = config.model_dump_json(include={"data", "supervision"})
        if asked not in indexed:
            indexed[asked] = index(config, work)
        data, truth = indexed[asked]
        check_data(config, work.dataset(data))
        _check_same_data(found, config, data.digest, folder)
        scored = score_what_is_there(config, work.dataset(data).splits)
        rows = plan_rounds(scored, work, data, truth, verify=False)
        if study.until is not None:
            rows = cut_plan(rows, study.until, study.rounds)
        _check_endpoint(study, arm, rows)
        missing = {row.name for row in rows if not row.hit}
        if missing:
            work.device()
        fetch_weights(scored, missing)


def _check_endpoint(study: Study, arm: str, rows: Sequence[Planned]) -> None:
    """Refuse an end point of a stage that the last round does not come to."""
    label = stage_of_score(study.endpoint)
    last = [row for row in rows if row.round == study.rounds]
    if not any(label in (row.stage, row.name) for row in last):
        raise DataError(
            f"arm {arm!r} of study {study.name}: {study.endpoint!r} is of the stage {label!r}, and "
            f"round {study.rounds} has none; add the true masks or the list that it needs, stop "
            "later (until), or choose another endpoint, as tag_agreement, which needs no masks"
        )


def _check_same_data(found: Cells, config: Config, digest: str, folder: Path) -> None:
    other = find_other_data(found, config, digest)
    if other is not None:
        root = config.data.root
        source = "what scenes are drawn today" if root is None else root
        former = "" if root is None else "give the former folder by --data, or "
        raise DataError(
            f"{source} is not the data that {cell_path(folder, *other)} was made of, so they would "
            f"not compare; {former}keep the cells elsewhere by --out"
        )


def take_cell(study: Study, run: Run, work: Workspace, *, arm: str, seed: int) -> Cell:
    """What a study keeps of a run that is done.

    Args:
        study: The study.
        run: The run of this arm and seed.
        work: Where its artifacts are.
        arm: Name of the arm.
        seed: The seed.

    Raises:
        DataError: If the run lacks the round or the end point that the study compares.
    """
    rounds = run.rounds[: study.rounds + 1]  # the run may have gone further for another study
    last = rounds[-1]
    if len(rounds) <= study.rounds or study.endpoint not in last.metrics:
        raise DataError(
            f"run {run.name} has no {study.endpoint} in round {study.rounds}: its last round is "
            f"{last.round} and has {', '.join(sorted(last.metrics)) or 'no metrics'}; "
            "change the study's endpoint or rounds"
        )
    return Cell(
        arm=arm,
        seed=seed,
        stop=study.stop,
        config=run.config | {"data": run.config["data"] | {"root": None}},
        data=run.data,
        rounds=[
            {name: float(f"{v:.6g}") for name, v in entry.metrics.items() if name.count("/") < 2}
            for entry in rounds
        ],
        endpoint=study.endpoint,
        bootstrap=_bootstrap(study.endpoint, last, work),
        artifacts={label: made.digest for label, made in sorted(last.manifests.items())},
        code=_stamp_code(rounds, work),
        versions=next(iter(last.manifests.values())).versions,
    )


def _stamp_code(rounds: Sequence[Round], work: Workspace) -> dict[str, str]:
    """The code of each stage; a run's rounds have the same."""
    made = {m.stage: m for entry in rounds for m in entry.manifests.values()}
    stamps = {stage: work.store.code_stamp(manifest) for stage, manifest in sorted(made.items())}
    return {stage: stamp for stage, stamp in stamps.items() if stamp is not None}


def _bootstrap(endpoint: str, last: Round, work: Workspace) -> list[float]:
    """Draws of an end point that is the mIoU of masks; none for any other."""
    kind, _, metric = endpoint.partition("/")
    split = kind.removeprefix(_SPLIT)
    label = "audit" if kind == "pseudo" else f"audit_segmenter/{split}"
    if metric != "miou" or label not in last.manifests:
        return []
    counts = read_photo_counts(work.folder(last.manifests[label]))
    if counts is None:
        return []
    return [round(float(score), 5) for score in bootstrap_miou(counts)]
