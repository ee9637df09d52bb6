"""Which segmenter photos are given to: a round's, or the champion of the home."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flows.environment import set_defaults
from flows.runs import Round, Run, find_round
from wsss_core.config import Config, parse_config
from wsss_core.errors import InputError
from wsss_core.observe import Recorder

if TYPE_CHECKING:
    from wsss_core.stages.predict import Predictor

CHAMPION = "champion"
LABEL_FREE = "tag_agreement"
"""What rounds are compared by when no photo of a val list has a true mask."""
_ABOUT_SEGMENTER = ("score_segmenter", "check_tags")


@dataclass(frozen=True)
class Choice:
    """A round, and why.

    Attributes:
        round: The round.
        reason: One line for the user.
    """

    round: Round
    reason: str


def load_predictor(home: Path, model: str) -> tuple[str, Predictor]:
    """The segmenter that `RUN[:ROUND]` or `champion` means, and its full name.

    Raises:
        InputError: If there is no such run, round or champion.
        StoreError: If its files were removed or changed.
    """
    if model == CHAMPION:
        return _load_champion(home)
    run, chosen = find_round(home, model)
    from wsss_core.stages.predict import Predictor
    from wsss_core.stages.stage import Workspace

    work = Workspace(home)
    folder = work.store.open(chosen.manifests["segmenter"])
    test = _read_settings(run).segmenter_test
    return f"{run.name}:{chosen.round}", Predictor(folder, test=test, device=work.device())


def promote(
    home: Path, model: str, *, metric: str | None, recorder: Recorder, say: Callable[[str], None]
) -> None:
    """Make a round's segmenter the champion of the home.

    Args:
        home: CONTA_HOME.
        model: `RUN:ROUND`, or `RUN` for its best round.
        metric: What the best round has most of; None for the mIoU on the first val list, or, where
            that was not scored, for `tag_agreement`.
        recorder: Hears of what could not be written.
        say: Gets the lines for the user.

    Raises:
        InputError: If there is no such run, round or metric.
        StoreError: If the segmenter was removed or changed.
        ContaError: If MLflow fails.
    """
    run, last = find_round(home, model)
    named = ":" in model
    if named and metric is not None:
        raise InputError(
            f"{model} names a round, so --metric {metric} has no choice; leave one out"
        )
    if not run.mlflow_run:
        raise InputError(
            f"run {run.name} is not in MLflow, for that failed; give its `conta run` again, which "
            "copies it"
        )
    config = _read_settings(run)
    chosen = Choice(last, "named by hand") if named else choose_round(run, config, metric)
    set_defaults(home)
    from tasks import tracking
    from wsss_core.stages.package import write_package
    from wsss_core.stages.stage import Workspace

    entry = chosen.round
    folder = Workspace(home).store.open(entry.manifests["segmenter"])
    version = tracking.promote(
        tracking.Candidate(
            run=run.name,
            round=entry.round,
            mlflow_run=run.mlflow_run,
            segmenter=entry.manifests["segmenter"],
            scores=[made for made in entry.manifests.values() if made.stage in _ABOUT_SEGMENTER],
            dataset=(config.name, run.data),
            reason=chosen.reason,
        ),
        lambda out: write_package(folder, out, test=config.segmenter_test, recorder=recorder),
    )
    say(f"round {entry.round} of {run.name} is champion, version {version}: {chosen.reason}")


def choose_round(run: Run, config: Config, metric: str | None) -> Choice:
    """The round with the highest score; of equal ones the earliest.

    Raises:
        InputError: If no round has such a score.
    """
    entries = [entry for entry in run.rounds if "segmenter" in entry.manifests]
    found = {key for entry in entries for key in entry.metrics} - {"seconds"}
    val = [f"seg_{split}/miou" for split in config.data.val]
    free = metric is None and found.isdisjoint(val)
    name = metric or next((key for key in val if key in found), LABEL_FREE)
    scored = [entry for entry in entries if name in entry.metrics]
    if not scored:
        known = sorted(key for key in found if "/iou/" not in key)
        raise InputError(
            f"no round of {run.name} has a metric {name!r}; there are: {', '.join(known)}"
        )
    best = max(scored, key=lambda entry: entry.metrics[name])
    reason = f"{name} {best.metrics[name]:.4f}, the highest of {_count(len(scored), 'round')}"
    if free:
        reason += "; it needs no true masks, and none of a val list were there"
    return Choice(best, reason)


def _read_settings(run: Run) -> Config:
    """What a segmenter is used by; how it was trained may mean nothing to this version any more."""
    return parse_config({part: run.config[part] for part in ("name", "data", "segmenter_test")})


def _load_champion(home: Path) -> tuple[str, Predictor]:
    set_defaults(home)
    from tasks import tracking
    from wsss_core.stages.package import open_package
    from wsss_core.stages.stage import Workspace

    with tempfile.TemporaryDirectory() as folder:
        champion = tracking.fetch_champion(Path(folder))
        if champion is None:
            raise InputError(f"{home} has no champion yet; make one by `conta promote RUN`")
        name = f"champion (version {champion.version}, {champion.run}:{champion.round})"
        return name, open_package(champion.folder, device=Workspace(home).device())


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
