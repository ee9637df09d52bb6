"""One Prefect task a stage; `config` and `work` come first, and only what follows is hashed.

Long stages are called directly, not submitted: only a task in the main thread can be interrupted.
"""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.policy import stage_task
from wsss_core.config import Config
from wsss_core.records import Manifest
from wsss_core.stages.audit import audit_masks as _audit_masks
from wsss_core.stages.audit import audit_segmenter as _audit_segmenter
from wsss_core.stages.audit_blur import audit_blur as _audit_blur
from wsss_core.stages.boundary import train_boundary as _train_boundary
from wsss_core.stages.boundary_labels import label_boundaries as _label_boundaries
from wsss_core.stages.calibrate import calibrate_seeds as _calibrate_seeds
from wsss_core.stages.calibrate import calibrate_walk as _calibrate_walk
from wsss_core.stages.cams import make_cams as _make_cams
from wsss_core.stages.classifier import train_classifier as _train_classifier
from wsss_core.stages.confounders import update_confounders as _update_confounders
from wsss_core.stages.context_panels import draw_context as _draw_context
from wsss_core.stages.data import index_data as _index_data
from wsss_core.stages.data import index_truth as _index_truth
from wsss_core.stages.masks import expand_masks as _expand_masks
from wsss_core.stages.masks import truth_masks as _truth_masks
from wsss_core.stages.panels import draw_panels as _draw_panels
from wsss_core.stages.predictions import segment_photos as _segment_photos
from wsss_core.stages.predictions import test_segmenter as _test_segmenter
from wsss_core.stages.scenes import make_scenes as _make_scenes
from wsss_core.stages.scores import check_tags as _check_tags
from wsss_core.stages.scores import score_cams as _score_cams
from wsss_core.stages.scores import score_masks as _score_masks
from wsss_core.stages.scores import score_segmenter as _score_segmenter
from wsss_core.stages.segmenter import train_segmenter as _train_segmenter
from wsss_core.stages.stage import Workspace
from wsss_core.stages.tag_scores import score_classifier as _score_classifier


@task(name="dataset", cache_policy=NO_CACHE)
def index_data(config: Config, work: Workspace) -> Manifest:
    """Photos, tags and splits of the user's folder, hashed anew in every run."""
    return _index_data(config, work)


@task(name="truth", cache_policy=NO_CACHE)
def index_truth(config: Config, work: Workspace, *, data: Manifest) -> Manifest | None:
    """The masks that scores compare with; None if there are none."""
    return _index_truth(config, work, data=data)


@stage_task(_make_scenes)
def make_scenes(config: Config, work: Workspace) -> Manifest:
    """Photos, tags and truth of every split, generated from the known graph."""
    return _make_scenes(config, work)


@stage_task(_train_classifier)
def train_classifier(
    config: Config,
    work: Workspace,
    *,
    data: Manifest,
    confounders: Manifest | None,
    x_m: Manifest | None,
    pasted: Manifest | None,
    context: str | None,
    start: Manifest | None,
) -> Manifest:
    """The multi-label classifier of this round.

    Without `confounders` and `pasted` (the pseudo-masks that objects are cut out by; `context` says
    where they are put) that of round 0.
    """
    return _train_classifier(
        config,
        work,
        data=data,
        confounders=confounders,
        x_m=x_m,
        pasted=pasted,
        context=context,
        start=start,
    )


@stage_task(_make_cams)
def make_cams(
    config: Config,
    work: Workspace,
    *,
    data: Manifest,
    classifier: Manifest | None,
    x_m: Manifest | None,
) -> Manifest:
    """Class activation maps of the training photos."""
    return _make_cams(config, work, data=data, classifier=classifier, x_m=x_m)


@stage_task(_label_boundaries)
def label_boundaries(
    config: Config, work: Workspace, *, data: Manifest, cams: Manifest | None
) -> Manifest:
    """Confident labels of the training photos, for the boundary network."""
    return _label_boundaries(config, work, data=data, cams=cams)


@stage_task(_train_boundary)
def train_boundary(
    config: Config, work: Workspace, *, data: Manifest, labels: Manifest
) -> Manifest:
    """The boundary network of this round."""
    return _train_boundary(config, work, data=data, labels=labels)


@stage_task(_calibrate_seeds)
def calibrate_seeds(
    config: Config,
    work: Workspace,
    *,
    data: Manifest,
    classifier: Manifest,
    cams: Manifest,
    x_m: Manifest | None,
) -> Manifest:
    """The background's score of the seeds, chosen without truth."""
    return _calibrate_seeds(config, work, data=data, classifier=classifier, cams=cams, x_m=x_m)


@stage_task(_calibrate_walk)
def calibrate_walk(
    config: Config,
    work: Workspace,
    *,
    data: Manifest,
    classifier: Manifest,
    cams: Manifest,
    x_m: Manifest | None,
    boundary: Manifest,
) -> Manifest:
    """Reach and background of the random walk, chosen without truth."""
    return _calibrate_walk(
        config, work, data=data, classifier=classifier, cams=cams, x_m=x_m, boundary=boundary
    )


@stage_task(_expand_masks)
def expand_masks(
    config: Config,
    work: Workspace,
    *,
    data: Manifest,
    cams: Manifest | None,
    boundary: Manifest | None,
) -> Manifest:
    """Pseudo-masks of the training photos."""
    return _expand_masks(config, work, data=data, cams=cams, boundary=boundary)


@stage_task(_truth_masks)
def truth_masks(config: Config, work: Workspace, *, data: Manifest, truth: Manifest) -> Manifest:
    """True masks in the place of pseudo-masks, for the fully supervised twin."""
    return _truth_masks(config, work, data=data, truth=truth)


@stage_task(_train_segmenter)
def train_segmenter(
    config: Config,
    work: Workspace,
    *,
    data: Manifest,
    masks: Manifest,
    context: str | None,
    share: str | None,
) -> Manifest:
    """The segmenter of this round; `context` says where objects of a `share` of photos go."""
    return _train_segmenter(config, work, data=data, masks=masks, context=context, share=share)


@stage_task(_segment_photos)
def segment_photos(
    config: Config, work: Workspace, *, data: Manifest, segmenter: Manifest, split: str
) -> Manifest:
    """What the segmenter sees in a split, as masks and as the next round's X_m."""
    return _segment_photos(config, work, data=data, segmenter=segmenter, split=split)


@stage_task(_test_segmenter)
def test_segmenter(
    config: Config, work: Workspace, *, data: Manifest, segmenter: Manifest, split: str
) -> Manifest:
    """Masks of a split by the settings that scores are made with."""
    return _test_segmenter(config, work, data=data, segmenter=segmenter, split=split)


@stage_task(_update_confounders)
def update_confounders(
    config: Config,
    work: Workspace,
    *,
    data: Manifest,
    predictions: Manifest,
    masks: Manifest,
    former: Manifest | None,
) -> Manifest:
    """The confounder set that the next round's classifier adjusts for."""
    return _update_confounders(
        config, work, data=data, predictions=predictions, masks=masks, former=former
    )


@stage_task(_score_classifier)
def score_classifier(
    config: Config,
    work: Workspace,
    *,
    data: Manifest,
    classifier: Manifest,
    x_m: Manifest | None,
    split: str,
) -> Manifest:
    """Mean average precision and F1 of the classifier on the tags of a split."""
    return _score_classifier(config, work, data=data, classifier=classifier, x_m=x_m, split=split)


@stage_task(_score_cams)
def score_cams(
    config: Config, work: Workspace, *, data: Manifest, truth: Manifest | None, cams: Manifest
) -> Manifest:
    """Mean IoU of the seeds."""
    return _score_cams(config, work, data=data, truth=truth, cams=cams)


@stage_task(_score_masks)
def score_masks(
    config: Config, work: Workspace, *, data: Manifest, truth: Manifest | None, masks: Manifest
) -> Manifest:
    """Mean IoU of the pseudo-masks."""
    return _score_masks(config, work, data=data, truth=truth, masks=masks)


@stage_task(_score_segmenter)
def score_segmenter(
    config: Config,
    work: Workspace,
    *,
    data: Manifest,
    truth: Manifest | None,
    predictions: Manifest,
    split: str,
) -> Manifest:
    """Mean IoU of the segmenter on a split."""
    return _score_segmenter(
        config, work, data=data, truth=truth, predictions=predictions, split=split
    )


@stage_task(_audit_masks)
def audit_masks(
    config: Config,
    work: Workspace,
    *,
    data: Manifest,
    truth: Manifest,
    cams: Manifest | None,
    masks: Manifest,
) -> Manifest:
    """How much of each class's CAM and pseudo-mask lies on its company."""
    return _audit_masks(config, work, data=data, truth=truth, cams=cams, masks=masks)


@stage_task(_audit_segmenter)
def audit_segmenter(
    config: Config,
    work: Workspace,
    *,
    data: Manifest,
    truth: Manifest,
    predictions: Manifest,
    split: str,
) -> Manifest:
    """The same of the segmenter on a split."""
    return _audit_segmenter(
        config, work, data=data, truth=truth, predictions=predictions, split=split
    )


@stage_task(_audit_blur)
def audit_blur(
    config: Config,
    work: Workspace,
    *,
    data: Manifest,
    classifier: Manifest,
    x_m: Manifest | None,
    masks: Manifest,
) -> Manifest:
    """What each class's score loses where its company is blurred; needs no truth."""
    return _audit_blur(config, work, data=data, classifier=classifier, x_m=x_m, masks=masks)


@stage_task(_check_tags)
def check_tags(
    config: Config,
    work: Workspace,
    *,
    data: Manifest,
    predictions: Manifest,
    before: Manifest | None,
) -> Manifest:
    """Agreement of masks and tags, and of two rounds' masks; needs no truth."""
    return _check_tags(config, work, data=data, predictions=predictions, before=before)


@stage_task(_draw_panels)
def draw_panels(
    config: Config,
    work: Workspace,
    *,
    data: Manifest,
    truth: Manifest | None,
    cams: Manifest | None,
    masks: Manifest,
    predictions: Manifest,
) -> Manifest:
    """One picture of the same photos every round, and the list of the worst."""
    return _draw_panels(
        config, work, data=data, truth=truth, cams=cams, masks=masks, predictions=predictions
    )


@stage_task(_draw_context)
def draw_context(
    config: Config, work: Workspace, *, data: Manifest, classifier: Manifest, x_m: Manifest
) -> Manifest:
    """Pictures of the context map M and of the confounder set of a later round."""
    return _draw_context(config, work, data=data, classifier=classifier, x_m=x_m)
