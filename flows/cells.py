"""The Prefect flow that computes the cells of a study, one run after the other, over one store."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from prefect import flow

from flows.conta import conta_flow
from flows.environment import locate_data, resolve_home
from flows.plan import check_backbones
from flows.runs import Round, Run, StageName, read_run
from flows.study import Cell, Study, find_cells, list_missing, write_cell
from wsss_core.errors import ContaError, DataError
from wsss_core.evaluation.paired import bootstrap_miou
from wsss_core.observe import ConsoleRecorder
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
    home, recorder = resolve_home(), ConsoleRecorder()
    missing = list_missing(study, find_cells(study, folder))
    for arm, seed in missing:
        check_backbones(study.config(arm, seed))
    for number, (arm, seed) in enumerate(missing, start=1):
        recorder.note(f"cell {number} of {len(missing)}: arm {arm}, seed {seed}")
        config = locate_data(study.config(arm, seed, data=data))
        until = cast("StageName | None", study.until)
        name = conta_flow(config, until, study.rounds)
        run = read_run(home, name)
        if run is None:
            raise ContaError(f"the record of run {name} cannot be read; start the study again")
        write_cell(folder, take_cell(study, run, Workspace(home), arm=arm, seed=seed))
        find_cells(study, folder)  # of other data than its fellows: said now, not after the last
    return len(missing)


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
        versions=next(iter(last.manifests.values())).versions,
    )


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
