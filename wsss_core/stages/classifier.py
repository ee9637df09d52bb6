"""Stage `classifier`: train it on the photo and, from round 1 on, its context map (step 1)."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import default_collate

from wsss_core.causal.adjustment import draw_confounders, marginal_logits, nwgm_gap
from wsss_core.causal.confounders import ConfounderSet
from wsss_core.causal.intervention import (
    UniformIntervention,
    build_context,
    context_report,
    derangement,
    place_context,
    root_mean_square,
    say_dead,
)
from wsss_core.causal.pasting import CLASSIFIER_SHARE
from wsss_core.config import CausalConfig, ClassifierConfig, Config
from wsss_core.data.images import read_pixels
from wsss_core.data.transforms import crop_photo, draw_crop, normalise, resize_photo, scaled_size
from wsss_core.models.backbones import build_backbone, freeze, set_training_mode
from wsss_core.models.classifier import (
    Classifier,
    initialise_head,
    initialise_slices,
    multilabel_loss,
)
from wsss_core.records import Manifest, TaggedPhoto
from wsss_core.seeding import derive_seed, torch_generator
from wsss_core.stages.stage import Job, Stage
from wsss_core.stages.training import Pasting, draw_picture, machine_of, plan_pasting
from wsss_core.store import Measured
from wsss_core.training.distributed import sum_over_ranks
from wsss_core.training.loop import Batch, Trainable, train
from wsss_core.workers import one_thread

WEIGHTS, DESCRIPTION = "classifier.safetensors", "classifier.json"
CONFOUNDERS, CAUSAL, X_M = "confounders.safetensors", "causal.json", "x_m.safetensors"

PASS_CELLS = 16384
"""Feature cells that are passed on at a time under `exact`, photos and confounders together.

Behind block 5 a cell keeps about 0.1 MB for the gradient (28 thousand floats in lite0). A fixed
number, for batches decide the last bits.
"""

GAP_PHOTOS = 32
"""Training photos on which the gap between NWGM and the exact sum is measured."""


class ContextClassifier(nn.Module):
    """The classifier with the intervention that makes its context map; W1 and W2 train with it.

    Attributes:
        classifier: Trunk, slices, class layer.
        intervention: Maps X_m (B,s,s) to M (B,1,s,s); None in round 0.
        exact: Whether the confounders are summed over behind the network; else inside it (NWGM).
    """

    def __init__(
        self, classifier: Classifier, intervention: nn.Module | None, *, exact: bool = False
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.intervention = intervention
        self.exact = exact

    def forward(
        self,
        photos: Tensor,
        x_m: Tensor | None = None,
        affine: Tensor | None = None,
        draw: Tensor | None = None,
    ) -> Tensor:
        """Logits (B,n); under `exact` the log odds of the mean probability.

        Args:
            photos: (B,3,H,W), normalised.
            x_m: (B,s,s).
            affine: (B,2,3), where the views lie in the whole pictures.
            draw: (B,k), confounders that stand for all of them under `exact`; None sums over all.
        """
        if not self.exact or x_m is None or affine is None:
            return self.class_maps(photos, x_m, affine).float().mean(dim=(2, 3))
        each = self.logits_by_confounder(photos, x_m, affine, draw)
        drawn = each.new_full((len(each),), 1 / len(each))
        return marginal_logits(each, weights=self.confounders.prior if draw is None else drawn)

    def class_maps(self, photos: Tensor, x_m: Tensor | None, affine: Tensor | None) -> Tensor:
        """Unrectified class maps (B,n,h,w); under `exact` their mean under P(c)."""
        if self.exact and x_m is not None and affine is not None:
            total, rest = photos.new_zeros(()), self.confounders.prior
            for maps in self.maps_by_confounder(photos, x_m, affine):
                weights, rest = rest[: len(maps)], rest[len(maps) :]
                total = total + (weights[:, None, None, None, None] * maps.float()).sum(0)
            return total
        return self.one_pass_maps(photos, x_m, affine)

    def one_pass_maps(self, photos: Tensor, x_m: Tensor | None, affine: Tensor | None) -> Tensor:
        """Class maps (B,n,h,w) under M, the mean of the contexts: NWGM."""
        if self.intervention is None or x_m is None or affine is None:
            return self.classifier.class_maps(photos)
        context_map = self.intervention(x_m)
        return self.classifier.class_maps(
            photos, lambda size: place_context(context_map, affine=affine, size=size)
        )

    def logits_by_confounder(
        self, photos: Tensor, x_m: Tensor, affine: Tensor, draw: Tensor | None = None
    ) -> Tensor:
        """Logits (n,B,n) under each f(X, c_i) alone; (k,B,n) under those of `draw`."""
        maps = self.maps_by_confounder(photos, x_m, affine, draw)
        return torch.cat([part.float().mean(dim=(3, 4)) for part in maps])

    def maps_by_confounder(
        self, photos: Tensor, x_m: Tensor, affine: Tensor, draw: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Class maps (m,B,n,h,w), as many confounders at a time as `PASS_CELLS` admits.

        What no context changes runs once. Where there are several passes they keep nothing for the
        gradient and are computed again, so that memory is that of one.
        """
        terms = self.confounders.terms(x_m)
        if draw is not None:
            terms = terms.take_along_dim(draw[:, :, None, None], dim=1)
        features = self.classifier.begin(photos)
        cells = len(photos) * features.shape[-2] * features.shape[-1]
        parts = torch.split(terms.transpose(0, 1), max(1, PASS_CELLS // cells))
        for part in parts:
            if len(parts) > 1 and torch.is_grad_enabled():
                yield checkpoint(self._finish, features, part, affine, use_reentrant=False)
            else:
                yield self._finish(features, part, affine)

    def _finish(self, features: Tensor, contexts: Tensor, affine: Tensor) -> Tensor:
        """Class maps (m,B,n,h,w) behind `begin`, under contexts (m,B,s,s)."""
        num, batch, side, _ = contexts.shape
        flat, places = contexts.reshape(num * batch, 1, side, side), affine.repeat(num, 1, 1)
        maps = self.classifier.finish(
            features,
            lambda size: place_context(flat, affine=places, size=size),
            num_contexts=num,
        )
        return maps.reshape(num, batch, *maps.shape[1:])

    @property
    def confounders(self) -> UniformIntervention:
        """The intervention as the confounders that are summed over: c, P(c), f(X, c_i)."""
        if not isinstance(self.intervention, UniformIntervention):
            raise TypeError("this classifier has no confounders to sum over")
        return self.intervention

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
    intervention = None
    if confounders is not None:
        own = derive_seed(seed, "context")
        intervention = build_context(causal, confounders, seed=own, x_m_rms=x_m_rms)
    if intervention is not None:
        intervention.gain *= causal.amplitude
    fusion = causal.fusion if intervention is not None else None
    classifier = Classifier(backbone, num_classes=num_classes, fusion=fusion)
    initialise_head(classifier, torch_generator(seed, "head"))
    if causal.slice_init == "random":
        initialise_slices(classifier, torch_generator(seed, "slices"))
    exact = causal.adjustment == "exact" and intervention is not None
    return ContextClassifier(classifier, intervention, exact=exact)


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
    pasted: Manifest | None = None,
    context: str | None = None,
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
    draw = None
    if model.exact and confounder_set is not None and causal.exact_samples is not None:
        prior = torch.from_numpy(confounder_set.prior)
        draw = functools.partial(draw_confounders, prior, num=causal.exact_samples, seed=job.seed)
    view = functools.partial(
        _view,
        settings=settings,
        seed=job.seed,
        num_classes=num_classes,
        contexts=contexts,
        draw=draw,
        pasting=plan_pasting(job, photos, pasted, context=context, share=CLASSIFIER_SHARE),
    )
    history = train(
        Trainable(
            "classifier",
            model,
            model.new_parameters(),
            _loss,
            functools.partial(set_training_mode, batch_norm_frozen=settings.freeze_bn),
        ),
        items=list(enumerate(photos)),
        view=view,
        config=settings.training,
        seed=job.seed,
        machine=machine_of(job),
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
        seen = [view(item, 0) for item in enumerate(photos[: settings.training.batch_size])]
        metrics["context/rms_ratio"] = context_ratio(model, default_collate(seen))
        if dead := say_dead(metrics, context=causal.context):
            job.work.recorder.note(
                f"the context {causal.context} is dead: {dead}, so this round says nothing of it"
            )
        if isinstance(model.intervention, UniformIntervention):
            with one_thread():
                metrics |= gap_report(model.to(job.work.device()), photos, contexts)
    return Measured(metrics, history)


@torch.inference_mode()
def context_ratio(model: ContextClassifier, batch: Batch) -> float:
    """`Classifier.context_rms_ratio` on a batch of views, which is a training's first.

    What the training itself saw last is gone where another process trained, or an earlier start.
    Under `exact` it is that of the single contexts, however many pass at a time (RMS over parts).
    """
    model.eval()  # a training that was finished before this start has not set any mode
    views = batch["photo"], batch["x_m"], batch["affine"], batch.get("draw")
    if not model.exact:
        model(*views)
        return model.classifier.context_rms_ratio()
    parts = [
        (len(maps), model.classifier.context_rms_ratio() ** 2)
        for maps in model.maps_by_confounder(*views)
    ]
    return float((sum(n * square for n, square in parts) / sum(n for n, _ in parts)) ** 0.5)


@torch.inference_mode()
def gap_report(
    model: ContextClassifier, photos: Sequence[TaggedPhoto], contexts: Tensor
) -> dict[str, float]:
    """`nwgm_gap` on at most `GAP_PHOTOS` whole photos, spread over the list: the same every round.

    Args:
        model: Trained under either adjustment; its mode is kept.
        photos: Training photos.
        contexts: X_m of each, (N,s,s).
    """
    device, training = next(model.parameters()).device, model.training
    affine = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]], device=device)
    each, one_pass = [], []
    prior = model.confounders.prior.cpu()
    model.eval()
    for index in range(0, len(photos), -(-len(photos) // GAP_PHOTOS)):
        pixels = read_pixels(photos[index])
        target = scaled_size((pixels.shape[0], pixels.shape[1]), 1.0, multiple=16)
        view = normalise(resize_photo(pixels, target))[None].to(device)
        x_m = contexts[index : index + 1].to(device)
        each.append(model.logits_by_confounder(view, x_m, affine).cpu())
        one_pass.append(model.one_pass_maps(view, x_m, affine).float().mean(dim=(2, 3)).cpu())
    model.train(training)
    return nwgm_gap(torch.cat(each, dim=1), torch.cat(one_pass), prior=prior)


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
    draw: Callable[..., Tensor] | None = None,
    pasting: Pasting | None = None,
) -> Batch:
    index, photo = item
    if pasting is None:
        pixels, classes = read_pixels(photo), photo.tags
    else:
        picture = draw_picture(photo, epoch, pasting=pasting, seed=seed)
        pixels, classes = picture.photo, picture.tags
    crop = draw_crop(
        pixels.shape[:2],
        long_side_px=settings.training.long_side_px,
        crop_px=settings.training.crop_px,
        seed=seed,
        epoch=epoch,
        photo_id=photo.id,
    )
    tags = torch.zeros(num_classes)
    tags[list(classes)] = 1.0
    batch: Batch = {"photo": crop_photo(pixels, crop), "tags": tags}
    if contexts is not None:
        batch |= {"x_m": contexts[index], "affine": crop.affine()}
    if draw is not None:
        batch["draw"] = draw(epoch=epoch, photo_id=photo.id)
    return batch


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(batch["photo"], batch.get("x_m"), batch.get("affine"), batch.get("draw"))
    share = len(logits) / sum_over_ranks(logits.new_full((), len(logits)))
    return multilabel_loss(logits, batch["tags"]) * share


def _settings(config: Config) -> ClassifierConfig:
    # Where a later round starts is an input of its own (`start`): round 0 is the same whatever
    # `init` says.
    return config.classifier.model_copy(update={"init": "imagenet"})


train_classifier = Stage("classifier", _write, _settings, seeded=True)
