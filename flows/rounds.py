"""CONTA's rounds, as its algorithm box.

The box is written once and read twice: the flow gives it a step that computes, `flows.plan` one
that only looks what is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from prefect import Task

from tasks import stages
from wsss_core.config import Config
from wsss_core.data.labels import TRAIN
from wsss_core.errors import DataError
from wsss_core.records import Manifest
from wsss_core.stages.calibrate import adopt_seeds, adopt_walk, is_open
from wsss_core.stages.data import find_scored, training_part
from wsss_core.stages.stage import Workspace


class Step(Protocol):
    """What the box does with a stage of this run's data."""

    def begin_round(self, number: int, config: Config) -> None:
        """Enter a round; what follows belongs to it and is done by these settings."""

    def __call__(
        self,
        task: Task[..., Manifest],
        *,
        config: Config | None = None,
        **inputs: Manifest | str | None,
    ) -> Manifest:
        """The artifact of a stage; a manifest of the data is added to its inputs.

        Args:
            task: The stage's.
            config: In the place of the round's settings, with what was calibrated filled in.
            inputs: What the stage works on.
        """


@dataclass
class Made:
    """What a round leaves to the next; before round 0, nothing.

    Attributes:
        classifier: None too if seeds or masks come from a folder or from truth.
        segmenter: Always there after a round.
        predictions: Its masks of the training photos, and their X_m.
        val_predictions: The same for the photos that the classifier is scored on.
        confounders: None without a context.
        pasted: The pseudo-masks that the next classifier's objects are cut out by; None but under
            context `pasted` and its variants.
    """

    classifier: Manifest | None = None
    segmenter: Manifest | None = None
    predictions: Manifest | None = None
    val_predictions: Manifest | None = None
    confounders: Manifest | None = None
    pasted: Manifest | None = None

    @property
    def x_m(self) -> Manifest | None:
        """The X_m that the next classifier sees; None without a context map."""
        return None if self.confounders is None else self.predictions


@dataclass(frozen=True)
class Truth:
    """True masks, for the scores of those splits that have some.

    Attributes:
        masks: What `index_truth` gave.
        splits: Those of which at least one photo has a mask.
    """

    masks: Manifest
    splits: frozenset[str]


@dataclass(frozen=True)
class Data:
    """The photos of a run.

    Attributes:
        whole: Every list.
        train: The training list, for all that works on it alone.
    """

    whole: Manifest
    train: Manifest

    @classmethod
    def of(cls, whole: Manifest, work: Workspace) -> Data:
        """Both of one data manifest."""
        return cls(whole, training_part(whole, work))

    def behind(self, inputs: Mapping[str, object]) -> Manifest:
        """What a stage with these inputs works on: the whole if it names another list."""
        return self.train if inputs.get("split", TRAIN) == TRAIN else self.whole


def open_truth(
    config: Config, work: Workspace, data: Manifest, masks: Manifest | None
) -> Truth | None:
    """What true masks there are, and whether they are enough.

    Args:
        config: The settings.
        work: Where the data are.
        data: The photos.
        masks: What `index_truth` gave.

    Raises:
        DataError: If true masks are to teach and the training photos have none.
    """
    truth = None if masks is None else Truth(masks, find_scored(work, data, masks))
    if config.supervision == "truth" and truth_of(truth, "train") is None:
        raise DataError(
            f"supervision 'truth' needs true masks of the training photos, and "
            f"{work.data_root(data)} has none; add them or set supervision: tags"
        )
    return truth


def truth_of(truth: Truth | None, split: str) -> Manifest | None:
    """The true masks if they can score a split."""
    return truth.masks if truth is not None and split in truth.splits else None


def score_what_is_there(config: Config, splits: Iterable[str]) -> Config:
    """The settings without the val lists that this data lacks: own photos may come without any."""
    val = tuple(split for split in config.data.val if split in splits)
    return config.model_copy(update={"data": config.data.model_copy(update={"val": val})})


def run_rounds(config: Config, truth: Truth | None, step: Step) -> None:
    """Rounds 0..T, or fewer if `evaluation.stop_stability` says that masks no longer change.

    Without a context and from the same start (`causal.context: none`, `classifier.init: imagenet`)
    the later rounds ask round 0's questions again and have its answers from the store. The fully
    supervised twin has one round.
    """
    enough = config.evaluation.stop_stability
    made = Made()
    for number in range(config.rounds + 1 if config.supervision == "tags" else 1):
        settings = config.at_round(number)
        step.begin_round(number, settings)
        made, stability = run_round(settings, truth, step, made)
        if enough is not None and stability is not None and stability >= enough:
            return


def run_round(
    config: Config, truth: Truth | None, step: Step, former: Made
) -> tuple[Made, float | None]:
    """One round: classify with the context map, make seeds, expand them, segment, find confounders.

    Args:
        config: The settings of this round.
        truth: True masks for the scores; None without any.
        step: What is done with each stage.
        former: What the round before left.

    Returns:
        What this round leaves, and the mIoU between its masks and the former round's if both exist.
    """
    made, train_truth = Made(), truth_of(truth, "train")
    if config.supervision == "truth":
        cams, masks = None, step(stages.truth_masks, truth=train_truth)
    else:
        made.classifier, cams, masks = make_masks(config, train_truth, step, former)
        if made.classifier is not None:
            step(stages.audit_blur, classifier=made.classifier, x_m=former.x_m, masks=masks)
    context = share = None
    if former.pasted is not None and config.causal.segmenter_share:
        context, share = config.causal.segmenter_context, str(config.causal.segmenter_share)
    made.segmenter = step(stages.train_segmenter, masks=masks, context=context, share=share)
    made.predictions = step(stages.segment_photos, segmenter=made.segmenter, split="train")
    tags = step(stages.check_tags, predictions=made.predictions, before=former.predictions)
    seen = made.predictions
    step(stages.draw_panels, truth=train_truth, cams=cams, masks=masks, predictions=seen)
    if made.classifier is not None and former.confounders is not None:
        step(stages.draw_context, classifier=made.classifier, x_m=former.x_m)
    score_segmenter(config, truth, step, made)
    if config.causal.pastes:
        made.pasted = masks
    elif config.causal.has_map and config.supervision == "tags":
        find_confounders(config, step, former, made, masks)
    return made, tags.metrics.get("stability")


def make_masks(
    config: Config, truth: Manifest | None, step: Step, former: Made
) -> tuple[Manifest | None, Manifest | None, Manifest]:
    """From tags to pseudo-masks: the classifier, its CAMs, the masks grown from them."""
    classifier = cams = boundary = None
    confounders, x_m = former.confounders, former.x_m
    starts = {"imagenet": None, "previous": former.classifier, "segmenter": former.segmenter}
    if config.expansion.method != "folder":
        if config.seeds.method != "folder":
            start = starts[config.classifier.init]
            classifier = step(
                stages.train_classifier,
                confounders=confounders,
                x_m=x_m,
                pasted=former.pasted,
                context=None if former.pasted is None else config.causal.context,
                start=start,
            )
            val_x_m = former.val_predictions
            for split in config.data.val[:1]:
                step(stages.score_classifier, classifier=classifier, x_m=val_x_m, split=split)
        cams = step(stages.make_cams, classifier=classifier, x_m=x_m)
        if config.seeds.threshold == "auto":
            chosen = step(stages.calibrate_seeds, classifier=classifier, cams=cams, x_m=x_m)
            config = adopt_seeds(config, chosen)
        if truth is not None:
            step(stages.score_cams, config=config, truth=truth, cams=cams)
        if config.expansion.method == "irn":
            labels = step(stages.label_boundaries, config=config, cams=cams)
            boundary = step(stages.train_boundary, labels=labels)
            if is_open(config.expansion.irn):
                chosen = step(
                    stages.calibrate_walk,
                    config=config,
                    classifier=classifier,
                    cams=cams,
                    x_m=x_m,
                    boundary=boundary,
                )
                config = adopt_walk(config, chosen)
    masks = step(stages.expand_masks, config=config, cams=cams, boundary=boundary)
    if truth is not None:
        step(stages.score_masks, truth=truth, masks=masks)
        step(stages.audit_masks, truth=truth, cams=cams, masks=masks)
    return classifier, cams, masks


def find_confounders(config: Config, step: Step, former: Made, made: Made, masks: Manifest) -> None:
    """What the next classifier adjusts for, and the X_m of the photos that it is scored on."""
    made.confounders = step(
        stages.update_confounders,
        predictions=made.predictions,
        masks=masks,
        former=former.confounders,
    )
    for split in config.data.val[:1]:
        made.val_predictions = step(stages.segment_photos, segmenter=made.segmenter, split=split)


def score_segmenter(config: Config, truth: Truth | None, step: Step, made: Made) -> None:
    """What the segmenter is worth on the training photos and on every val split with true masks."""
    for split in ("train", *config.data.val):
        masks = truth_of(truth, split)
        if masks is None:
            continue
        found = made.predictions
        if split != "train":
            found = step(stages.test_segmenter, segmenter=made.segmenter, split=split)
        step(stages.score_segmenter, truth=masks, predictions=found, split=split)
        step(stages.audit_segmenter, truth=masks, predictions=found, split=split)
