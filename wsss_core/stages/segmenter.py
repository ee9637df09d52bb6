"""Stage `segmenter`: train it on the pseudo-masks, from ImageNet every round (step 3)."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wsss_core.config import SegmenterConfig
from wsss_core.models.backbones import build_backbone, freeze, set_training_mode
from wsss_core.models.segmenter import (
    Segmenter,
    count_labels,
    initialise_new_layers,
    segmentation_loss,
)
from wsss_core.records import IGNORE_INDEX, Manifest, TaggedPhoto
from wsss_core.seeding import derive_seed, torch_generator
from wsss_core.stages.stage import Job, Stage
from wsss_core.stages.training import (
    Pasting,
    crop_with_labels,
    draw_picture,
    machine_of,
    plan_pasting,
    read_picture,
)
from wsss_core.store import Measured
from wsss_core.training.distributed import sum_over_ranks
from wsss_core.training.loop import Batch, Trainable, train

WEIGHTS, DESCRIPTION = "segmenter.safetensors", "segmenter.json"


def build_segmenter(
    settings: SegmenterConfig, num_labels: int, *, pretrained: bool, seed: int = 0
) -> Segmenter:
    """An untrained segmenter; `num_labels` counts the background."""
    backbone = build_backbone(
        settings.backbone,
        pretrained=pretrained,
        output_stride=settings.output_stride,
        seed=derive_seed(seed, "trunk"),
    )
    model = Segmenter(backbone, num_classes=num_labels, head=settings.head)
    initialise_new_layers(model, torch_generator(seed, "head"))
    return model


def load_segmenter(folder: Path) -> tuple[Segmenter, tuple[str, ...]]:
    """The trained segmenter of an artifact, in evaluation mode on CPU, and its classes' names."""
    description = json.loads((folder / DESCRIPTION).read_text())
    settings = SegmenterConfig.model_validate(description["segmenter"])
    model = build_segmenter(settings, len(description["classes"]) + 1, pretrained=False)
    model.load_state_dict(load_file(folder / WEIGHTS))
    return model.eval(), tuple(description["classes"])


def _write(
    out: Path,
    job: Job,
    *,
    data: Manifest,
    masks: Manifest,
    context: str | None = None,
    share: str | None = None,
) -> Measured:
    settings: SegmenterConfig = job.settings
    dataset = job.work.dataset(data)
    photos = dataset.splits["train"]
    model = build_segmenter(
        settings, len(dataset.classes) + 1, seed=job.seed, pretrained=settings.pretrained
    )
    freeze(model.backbone, until=settings.freeze_until, batch_norm=settings.freeze_bn)
    history = train(
        Trainable(
            "segmenter",
            model,
            model.new_parameters(),
            functools.partial(_loss, class_balanced=settings.class_balanced),
            functools.partial(set_training_mode, batch_norm_frozen=settings.freeze_bn),
        ),
        items=photos,
        view=functools.partial(
            _view,
            masks=job.work.folder(masks),
            settings=settings,
            seed=job.seed,
            pasting=plan_pasting(job, photos, masks, context=context, share=float(share or 1)),
        ),
        config=settings.training,
        seed=job.seed,
        machine=machine_of(job),
    )
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, out / WEIGHTS)
    description = {"segmenter": settings.model_dump(mode="json"), "classes": dataset.classes}
    (out / DESCRIPTION).write_text(json.dumps(description, sort_keys=True))
    return Measured(
        {"segmenter/loss": history[-1]["loss"], "segmenter/skipped": history[-1]["skipped"]},
        history,
    )


def _view(
    photo: TaggedPhoto,
    epoch: int,
    *,
    masks: Path,
    settings: SegmenterConfig,
    seed: int,
    pasting: Pasting | None = None,
) -> Batch:
    if pasting is None:
        picture = read_picture(photo, masks)
    else:
        picture = draw_picture(photo, epoch, pasting=pasting, seed=seed)
    pixels, labels = crop_with_labels(
        picture, epoch, training=settings.training, seed=seed, photo_id=photo.id
    )
    return {"photo": pixels, "labels": labels}


def _loss(model: nn.Module, batch: Batch, *, class_balanced: bool) -> Tensor | None:
    labels: Tensor = batch["labels"]
    counts = sum_over_ranks(count_labels(labels, ignore_index=IGNORE_INDEX))
    if not counts.any():
        return None
    return segmentation_loss(
        model(batch["photo"]),
        labels,
        ignore_index=IGNORE_INDEX,
        class_balanced=class_balanced,
        counts=counts,
    )


train_segmenter = Stage("segmenter", _write, lambda config: config.segmenter, seeded=True)
