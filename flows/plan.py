"""What a run would find in the store, what it would have to compute, and why."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import Task

from flows.rounds import Data, Truth, open_truth, run_rounds, score_what_is_there
from flows.runs import MAIN_STAGES
from tasks import stages
from tasks.policy import stage_of
from wsss_core.config import Config
from wsss_core.data.labels import BACKGROUND, TRAIN
from wsss_core.data.scenes.graph import CUT_EDGES
from wsss_core.errors import InputError, SettingsError
from wsss_core.evaluation.report import core_labels
from wsss_core.models.backbones import build_backbone, check_backbone
from wsss_core.models.classifier import fused_blocks
from wsss_core.observe import ConsoleRecorder
from wsss_core.records import Dataset, Manifest
from wsss_core.stages.boundary import OUTPUT_STRIDE
from wsss_core.stages.data import index_data, index_truth
from wsss_core.stages.stage import Stage, Workspace

Inputs = Mapping[str, Manifest | str | None]


@dataclass(frozen=True)
class Planned:
    """One call of a stage.

    Attributes:
        round: Number of the round; None for the data.
        stage: Name of the stage, with its split if it has one.
        hit: Whether the store has the artifact.
        reason: Why not.
    """

    round: int | None
    stage: str
    hit: bool
    reason: str = ""

    @property
    def name(self) -> str:
        """The stage without its split."""
        return self.stage.partition("/")[0]

    def __str__(self) -> str:
        """A line for a list."""
        where = "data   " if self.round is None else f"round {self.round}"
        return f"{where}  {self.stage:<24}  " + ("hit" if self.hit else f"miss: {self.reason}")


class Planner:
    """A step of the rounds that computes nothing.

    Attributes:
        rows: One for each call so far.
        verify: Whether hits are hashed, as the run will do, and misses are explained.
    """

    def __init__(self, config: Config, work: Workspace, data: Manifest, *, verify: bool) -> None:
        self.rows: list[Planned] = []
        self.verify = verify
        self._config, self._work, self._data = config, work, Data.of(data, work)
        self._round = 0

    def begin_round(self, number: int, config: Config) -> None:
        """Enter a round."""
        self._round, self._config = number, config

    def __call__(
        self,
        task: Task[..., Manifest],
        *,
        config: Config | None = None,
        **inputs: Manifest | str | None,
    ) -> Manifest:
        """The artifact if it is there, else a stand-in that makes a miss of all that follow."""
        stage = stage_of(task)
        every: Inputs = {"data": self._data.behind(inputs), **inputs}
        found, reason = self._look(stage, config or self._config, every)
        label = label_call(stage.name, every)
        self.rows.append(Planned(self._round, label, found is not None, reason))
        return found or _missing(label)

    def _look(self, stage: Stage, config: Config, inputs: Inputs) -> tuple[Manifest | None, str]:
        awaited = [
            value.stage
            for value in inputs.values()
            if isinstance(value, Manifest) and not value.key
        ]
        if awaited:
            return None, f"follows {', '.join(dict.fromkeys(awaited))}"
        if self.verify:
            found, problem = stage.find(config, self._work, **inputs)
        else:
            key = stage.key(config, **inputs)
            found, problem = self._work.store.peek(stage.name, key), None
        if found is not None or not self.verify:
            return found, ""
        asked = stage.question(config, **inputs)
        return None, problem or explain_miss(asked, self._work.store.questions(stage.name))


def label_call(name: str, inputs: Inputs) -> str:
    """`stage`, or `stage/split` for one that is called for several splits."""
    return f"{name}/{inputs['split']}" if "split" in inputs else name


def plan_rounds(
    config: Config, work: Workspace, data: Manifest, truth: Truth | None, *, verify: bool
) -> list[Planned]:
    """Every call of every round, in order."""
    planner = Planner(config, work, data, verify=verify)
    run_rounds(config, truth, planner)
    return planner.rows


def plan_run(config: Config, home: Path, until: str | None = None) -> list[Planned]:
    """Every call of a run, its data first; those that `until` leaves out are left out."""
    rows = _plan_all(config, home)
    return rows if until is None else cut_plan(rows, until)


def cut_plan(rows: Sequence[Planned], until: str, last_round: int = 0) -> list[Planned]:
    """The calls up to where a run stops.

    Args:
        rows: Every call of every round.
        until: Name of the stage that it stops after.
        last_round: The first round that it may stop in.

    Raises:
        InputError: If no such round has the stage, so that it would go on to its end.
    """
    there = [row for row in rows if row.round is not None and row.round >= last_round]
    begun = next((rows.index(row) for row in there if row.name == until), None)
    if begun is None:
        names = {row.name: None for row in there if row.name in MAIN_STAGES}
        raise InputError(
            f"from round {last_round} on this run has no stage {until!r} to stop after; "
            f"it has: {', '.join(names) or 'none'}"
        )
    later = set(MAIN_STAGES) - {until}
    ends = (n for n in range(begun, len(rows)) if rows[n].name in later)
    return list(rows[: next(ends, len(rows))])


def _check_backbones(config: Config) -> None:
    """Look up what only a later stage would build.

    Raises:
        InputError: For a backbone that cannot be built as the settings ask.
    """
    fused = fused_blocks(config.causal.fusion) if config.rounds and config.causal.has_map else ()
    classifier, segmenter = config.classifier, config.segmenter
    check_backbone(
        classifier.backbone,
        pretrained=classifier.pretrained,
        output_stride=classifier.output_stride,
        fused=fused,
    )
    check_backbone(
        segmenter.backbone,
        pretrained=segmenter.pretrained,
        output_stride=segmenter.output_stride,
    )
    if config.expansion.method == "irn":
        boundary = config.expansion.irn.boundary
        check_backbone(
            boundary.backbone, pretrained=boundary.pretrained, output_stride=OUTPUT_STRIDE
        )


def fetch_weights(config: Config, stages: Collection[str]) -> None:
    """Load the ImageNet weights that some stages will, while nothing is computed yet.

    Args:
        config: The settings.
        stages: Names of the stages that are to be computed.

    Raises:
        InputError: For weights that cannot be had, or are not what their name says.
    """
    classifier, segmenter = config.classifier, config.segmenter
    boundary = config.expansion.irn.boundary
    trunks = {
        "classifier": (classifier.backbone, classifier.pretrained, classifier.output_stride),
        "boundary": (boundary.backbone, boundary.pretrained, OUTPUT_STRIDE),
        "segmenter": (segmenter.backbone, segmenter.pretrained, segmenter.output_stride),
    }
    for name, pretrained, stride in {trunks[stage] for stage in trunks.keys() & set(stages)}:
        if pretrained and name != "lite0":  # whose weights are in a package
            build_backbone(name, pretrained=True, output_stride=stride)


def check_data(config: Config, dataset: Dataset) -> None:
    """Refuse settings that the data cannot answer before the first stage needs them.

    Raises:
        SettingsError: For a core class that is none, or a photo alone whose context is to be
            another's.
    """
    core_labels(config.data.core_classes, names=[BACKGROUND, *dataset.classes])
    if config.causal.context != "shuffled_photo" or not config.rounds:
        return
    for split in ("train", *config.data.val[:1]):
        if len(dataset.splits.get(split, ())) == 1:
            raise SettingsError(
                f"causal.context 'shuffled_photo' needs another photo, but list {split!r} has one; "
                "add photos, or choose another context"
            )


def check_settings(config: Config) -> None:
    """Refuse what settings alone show, and only a later stage would come upon.

    Raises:
        InputError: As `_check_backbones`.
        SettingsError: For a val list that scenes have not.
    """
    _check_backbones(config)
    for name in config.data.val if config.data.source == "scenes" else ():
        if name not in CUT_EDGES:
            known = ", ".join(split for split in CUT_EDGES if split != TRAIN)
            raise SettingsError(f"data.val: scenes have no list {name!r}; they have: {known}")


def _plan_all(config: Config, home: Path) -> list[Planned]:
    check_settings(config)
    work = Workspace(home, config.data.root, config.runtime, ConsoleRecorder())
    if config.data.source == "scenes":
        stage = stage_of(stages.make_scenes)
        data, problem = stage.find(config, work)
        reason = problem or explain_miss(stage.question(config), work.store.questions(stage.name))
        if data is None:
            known = Truth(_missing("truth"), frozenset({"train", *config.data.val}))
            rows = plan_rounds(config, work, _missing("scenes"), known, verify=True)
            return [Planned(None, "scenes", False, reason), *rows]
    else:
        data = index_data(config, work)
    check_data(config, work.dataset(data))
    masks = index_truth(config, work, data=data)
    truth = open_truth(config, work, data, masks)
    config = score_what_is_there(config, work.dataset(data).splits)
    rows = plan_rounds(config, work, data, truth, verify=True)
    return [Planned(None, data.stage, True), *rows]


def explain_miss(asked: Mapping[str, Any], known: Sequence[Mapping[str, Any]]) -> str:
    """Which settings, modules or inputs set a question apart from the nearest that has an answer.

    Args:
        asked: What `Stage.question` gave.
        known: The questions of the artifacts that exist, the latest first.
    """
    differences = [_differences(asked, former) for former in known]
    if not differences:
        return "never made"
    nearest = min(differences, key=len)
    shown = "; ".join(nearest[:3]) + (f"; {len(nearest) - 3} more" if len(nearest) > 3 else "")
    return shown or "its artifact was made by another version of the store"


def _differences(asked: Mapping[str, Any], former: Mapping[str, Any]) -> list[str]:
    ours, theirs = (dict(_leaves(question)) for question in (asked, former))
    return [
        _describe(name, theirs.get(name), ours.get(name))
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]


def _describe(name: tuple[str, ...], before: object, now: object) -> str:
    part, rest = name[0], ".".join(name[1:])
    if part == "code":
        return f"module {name[1]} changed"
    if part == "inputs":
        return f"input {rest} changed"
    return f"{rest or part}: {json.dumps(before)} -> {json.dumps(now)}"


def _leaves(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _leaves(item, (*path, str(name)))
    else:
        yield path, value


def _missing(label: str) -> Manifest:
    return Manifest(
        stage=label, key="", digest="", count=0, index_sha256="", finished_ms=0, seconds=0
    )
