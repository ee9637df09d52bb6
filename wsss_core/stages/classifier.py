"""Stage `classifier`: train it on the photo and, from round 1 on, its context map (step 1)."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wsss_core.causal.confounders import ConfounderSet
from wsss_core.causal.intervention import (
    build_context,
    context_report,
    derangement,
    place_context,
    root_mean_square,
)
from wsss_core.config import CausalConfig, ClassifierConfig, Config
from wsss_core.data.images import read_photo
from wsss_core.data.transforms import crop_photo, draw_crop
from wsss_core.models.backbones import build_backbone, freeze, set_training_mode
from wsss_core.models.classifier import Classifier, initialise_head, multilabel_loss
from wsss_core.records import Manifest, TaggedPhoto
from wsss_core.seeding import derive_seed, torch_generator
from wsss_core.stages.stage import Job, Stage
from wsss_core.store import Measured
from wsss_core.training.loop import Batch, Machine, Trainable, train

WEIGHTS, DESCRIPTION = "classifier.safetensors", "classifier.json"
CONFOUNDERS, CAUSAL, X_M = "confounders.safetensors", "causal.json", "x_m.safetensors"


class ContextClassifier(nn.Module):
    """The classifier with the intervention that makes its context map; W1 and W2 train with it.

    Attributes:
        classifier: Trunk, slices, class layer.
        intervention: Maps X_m (B,s,s) to M (B,1,s,s); None in round 0.
    """

    def __init__(self, classifier: Classifier, intervention: nn.Module | None) -> None:
        super().__init__()
        self.classifier = classifier
        self.intervention = intervention

    def forward(
        self, photos: Tensor, x_m: Tensor | None = None, affine: Tensor | None = None
    ) -> Tensor:
        """Logits (B,n); `affine` (B,2,3) says where the views lie in the whole pictures."""
        return self.class_maps(photos, x_m, affine).float().mean(dim=(2, 3))

    def class_maps(self, photos: Tensor, x_m: Tensor | None, affine: Tensor | None) -> Tensor:
        """Unrectified class maps (B,n,h,w)."""
        if self.intervention is None or x_m is None or affine is None:
            return self.classifier.class_maps(photos)
        context_map = self.intervention(x_m)
        return self.classifier.class_maps(
            photos, lambda size: place_context(context_map, affine=affine, size=size)
        )

    def new_parameters(self) -> list[nn.Parameter]:
        """Everything without pretrained weights: class layer, context slices, W1 and W2."""
        own = [] if self.intervention is None else list(self.intervention.parameters())
        return self.classifier.new_parameters() + own


def build_classifier(
    settings: ClassifierConfig,
    causal: CausalConfig,
    num_classes: int,
    *,
    confounders: ConfounderSet | None,
    x_m_rms: float,
    seed: int,
    pretrained: bool,
) -> ContextClassifier:
    """An untrained classifier; without confounders the plain one of round 0.

    The head and the context parameters draw from generators of their own, so every arm starts from
    the same head.
    """
    backbone = build_backbone(
        settings.backbone,
        pretrained=pretrained,
        output_stride=settings.output_stride,
        seed=derive_seed(seed, "trunk"),
    )
    intervention = (
        None
        if confounders is None
        else build_context(causal, confounders, seed=derive_seed(seed, "context"), x_m_rms=x_m_rms)
    )
    fusion = causal.fusion if intervention is not None else None
    classifier = Classifier(backbone, num_classes=num_classes, fusion=fusion)
    initialise_head(classifier, torch_generator(seed, "head"))
    return ContextClassifier(classifier, intervention)


def load_classifier(folder: Path) -> ContextClassifier:
    """The trained classifier of an artifact, in evaluation mode, on CPU."""
    description = json.loads((folder / DESCRIPTION).read_text())
    confounders = (
        ConfounderSet.load(folder / CONFOUNDERS) if (folder / CONFOUNDERS).is_file() else None
    )
    model = build_classifier(
        ClassifierConfig.model_validate(description["classifier"]),
        CausalConfig.model_validate(description["causal"]),
        description["num_classes"],
        confounders=confounders,
        x_m_rms=description["x_m_rms"],
        seed=description["seed"],
        pretrained=False,
    )
    model.load_state_dict(load_file(folder / WEIGHTS))
    return model.eval()


def photo_contexts(
    photos: Sequence[TaggedPhoto], classifier: Path, x_m: Path | None
) -> Sequence[Float32[np.ndarray, "s s"] | None]:
    """The X_m that a trained classifier is shown with each photo of a split; None for a plain one.

    Args:
        photos: The split, sorted by id.
        classifier: Its artifact, which says which context it was trained with.
        x_m: A predictions artifact of that split; None in round 0.
    """
    if x_m is None:
        return [None] * len(photos)
    description = json.loads((classifier / DESCRIPTION).read_text())
    causal = CausalConfig.model_validate(description["causal"])
    return list(_context_inputs(x_m, causal, seed=description["seed"]).numpy())


def _context_inputs(folder: Path, causal: CausalConfig, *, seed: int) -> Tensor:
    """X_m of the photos of a split, (N,s,s); another photo's under `shuffled_photo`."""
    x_m: Tensor = load_file(folder / X_M)["x_m"]
    if causal.context != "shuffled_photo":
        return x_m
    return x_m[derangement(len(x_m), seed=derive_seed(seed, "derangement"))]


def _write(
    out: Path,
    job: Job,
    *,
    data: Manifest,
    confounders: Manifest | None = None,
    x_m: Manifest | None = None,
    start: Manifest | None = None,
) -> Measured:
    settings: ClassifierConfig = job.settings
    dataset = job.work.dataset(data)
    photos, num_classes = dataset.splits["train"], len(dataset.classes)
    causal, confounder_set, contexts = CausalConfig(context="none"), None, None
    if confounders is not None and x_m is not None:
        folder = job.work.folder(confounders)
        causal = CausalConfig.model_validate_json((folder / CAUSAL).read_text())
        confounder_set = ConfounderSet.load(folder / CONFOUNDERS)
        contexts = _context_inputs(job.work.folder(x_m), causal, seed=job.seed)
    rms = 1.0 if contexts is None else root_mean_square(contexts)
    model = build_classifier(
        settings,
        causal,
        num_classes,
        confounders=confounder_set,
        x_m_rms=rms,
        seed=job.seed,
        pretrained=settings.pretrained,
    )
    if start is not None:
        load_start(model, job.work.folder(start), stage=start.stage)
    freeze(model.classifier.backbone, until=settings.freeze_until, batch_norm=settings.freeze_bn)
    history = train(
        Trainable(
            "classifier",
            model,
            model.new_parameters(),
            _loss,
            functools.partial(set_training_mode, batch_norm_frozen=settings.freeze_bn),
        ),
        items=list(enumerate(photos)),
        view=functools.partial(
            _view, settings=settings, seed=job.seed, num_classes=num_classes, contexts=contexts
        ),
        config=settings.training,
        seed=job.seed,
        machine=Machine(
            device=job.work.device(),
            amp=job.amp,
            threads=job.work.runtime.threads,
            scratch=job.scratch,
            recorder=job.work.recorder,
        ),
    )
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, out / WEIGHTS)
    if confounder_set is not None and model.intervention is not None:
        confounder_set.save(out / CONFOUNDERS)
    description = {
        "classifier": settings.model_dump(mode="json"),
        "causal": causal.model_dump(mode="json"),
        "num_classes": num_classes,
        "x_m_rms": rms,
        "seed": job.seed,
    }
    (out / DESCRIPTION).write_text(json.dumps(description, sort_keys=True))
    metrics = {"classifier/loss": history[-1]["loss"], "classifier/skipped": history[-1]["skipped"]}
    if model.intervention is not None and contexts is not None:
        metrics |= context_report(model.intervention, contexts)
        metrics["context/rms_ratio"] = model.classifier.context_rms_ratio()
    return Measured(metrics, history)


def load_start(model: ContextClassifier, folder: Path, *, stage: str) -> None:
    """Start from the former round's classifier (whole) or segmenter (trunk), not from ImageNet."""
    if stage == "segmenter":
        weights = load_file(folder / "segmenter.safetensors")
        trunk = {
            n.removeprefix("backbone."): t for n, t in weights.items() if n.startswith("backbone.")
        }
        model.classifier.backbone.load_state_dict(trunk)
        return
    weights = load_file(folder / WEIGHTS)
    own = model.state_dict()  # the former round's net may have no slices and no W1, W2 yet
    model.load_state_dict(own | {name: t for name, t in weights.items() if name in own})


def _view(
    item: tuple[int, TaggedPhoto],
    epoch: int,
    *,
    settings: ClassifierConfig,
    seed: int,
    num_classes: int,
    contexts: Tensor | None,
) -> Batch:
    index, photo = item
    pixels = read_photo(photo.path)
    crop = draw_crop(
        pixels.shape[:2],
        long_side_px=settings.training.long_side_px,
        crop_px=settings.training.crop_px,
        seed=seed,
        epoch=epoch,
        photo_id=photo.id,
    )
    tags = torch.zeros(num_classes)
    tags[list(photo.tags)] = 1.0
    batch: Batch = {"photo": crop_photo(pixels, crop), "tags": tags}
    if contexts is not None:
        batch |= {"x_m": contexts[index], "affine": crop.affine()}
    return batch


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(batch["photo"], batch.get("x_m"), batch.get("affine"))
    return multilabel_loss(logits, batch["tags"])


def _settings(config: Config) -> ClassifierConfig:
    # Where a later round starts is an input of its own (`start`): round 0 is the same whatever
    # `init` says.
    return config.classifier.model_copy(update={"init": "imagenet"})


train_classifier = Stage("classifier", _write, _settings, seeded=True)
