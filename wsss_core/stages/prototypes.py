"""Stage `prototypes`: each class's mean feature in one frozen trunk, for context `features`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float32
from safetensors.numpy import save_file

from wsss_core.causal.features import average_prototypes, pool_by_class
from wsss_core.config import Config
from wsss_core.data.images import read_mask, read_photo
from wsss_core.data.transforms import normalise, resize_photo, scaled_size
from wsss_core.models.backbones import build_backbone
from wsss_core.models.classifier import Classifier
from wsss_core.records import Manifest, TaggedPhoto
from wsss_core.seeding import derive_seed
from wsss_core.stages.classifier import PROTOTYPES
from wsss_core.stages.stage import Job, Stage
from wsss_core.store import Measured


def _write(
    out: Path, job: Job, *, data: Manifest, predictions: Manifest, masks: Manifest
) -> Measured:
    settings: dict[str, Any] = job.settings
    dataset = job.work.dataset(data)
    photos, num = dataset.splits["train"], len(dataset.classes)
    backbone = build_backbone(
        settings["backbone"],
        pretrained=settings["pretrained"],
        output_stride=settings["output_stride"],
        seed=derive_seed(job.seed, "trunk"),
    )
    trunk = Classifier(backbone, num_classes=1, fusion=settings["fusion"])
    trunk = trunk.to(job.work.device()).eval()
    channels = trunk.context_slices()[0].channels_in

    def average(folder: Path, what: str) -> Float32[np.ndarray, "n c"]:
        pooled = _pool(photos, folder, trunk, job, what)
        return average_prototypes(pooled, num_classes=num, channels=channels)

    z = average(job.work.folder(predictions), "average features")
    unseen = ~z.any(axis=1)
    if unseen.any():
        z[unseen] = average(job.work.folder(masks), "average features of pseudo-masks")[unseen]
    save_file({"z": z}, out / PROTOTYPES)
    return Measured({"prototypes/unseen": float((~z.any(axis=1)).sum())})


def _pool(
    photos: Sequence[TaggedPhoto], folder: Path, trunk: Classifier, job: Job, what: str
) -> Iterator[tuple[tuple[int, ...], Float32[np.ndarray, "k c"]]]:
    device = next(trunk.parameters()).device
    for done, photo in enumerate(photos, 1):
        pixels, mask = read_photo(photo.path), read_mask(folder / f"{photo.id}.png")
        target = scaled_size((pixels.shape[0], pixels.shape[1]), 1.0, multiple=16)
        with torch.inference_mode():
            view = normalise(resize_photo(pixels, target))[None].to(device)
            features = trunk.fused_features(view)[0].float().cpu()
        own = torch.from_numpy(mask)[None] == torch.tensor(photo.tags).view(-1, 1, 1) + 1
        shares = F.adaptive_avg_pool2d(own.float(), (features.shape[1], features.shape[2]))
        yield photo.tags, pool_by_class(features, shares).numpy()
        job.work.recorder.progress(what, done, len(photos))


def _settings(config: Config) -> dict[str, Any]:
    return {
        "backbone": config.classifier.backbone,
        "pretrained": config.classifier.pretrained,
        "output_stride": config.classifier.output_stride,
        "fusion": config.causal.fusion,
    }


average_features = Stage("prototypes", _write, _settings, seeded=True)
