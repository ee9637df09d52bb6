"""Stage `score_classifier`: mAP and F1 of the classifier on a split it never saw, from tags."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from wsss_core.data.transforms import normalise, resize_photo, scaled_size
from wsss_core.evaluation.classification import score_tags
from wsss_core.records import Manifest, TaggedPhoto
from wsss_core.stages.classifier import ContextClassifier, load_classifier, photo_contexts
from wsss_core.stages.shards import read_batches, split_shards
from wsss_core.stages.stage import Job, Stage
from wsss_core.store import Measured
from wsss_core.workers import map_shards

BATCH_PHOTOS = 4
WHOLE = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))


@torch.inference_mode()
def tag_probabilities(
    model: ContextClassifier, photos: np.ndarray, x_m: Tensor | None
) -> Float32[np.ndarray, "b n"]:
    """Probability of each tag for equally sized whole photos, at their own size.

    Args:
        model: Trained classifier in evaluation mode.
        photos: (B,H,W,3) uint8.
        x_m: (B,s,s), or None in round 0.
    """
    device = next(model.parameters()).device
    target = scaled_size((photos.shape[1], photos.shape[2]), 1.0, multiple=16)
    views = torch.stack([normalise(resize_photo(photo, target)) for photo in photos]).to(device)
    affine = torch.tensor([WHOLE] * len(photos), device=device)
    contexts = None if x_m is None else x_m.to(device)
    probabilities: Float32[np.ndarray, "b n"] = (
        model(views, contexts, affine).sigmoid().cpu().numpy()
    )
    return probabilities


def _write(
    out: Path,
    job: Job,
    *,
    data: Manifest,
    classifier: Manifest,
    split: str,
    x_m: Manifest | None = None,
) -> Measured:
    dataset = job.work.dataset(data)
    photos = dataset.splits[split]
    folder = job.work.folder(classifier)
    contexts = photo_contexts(photos, folder, None if x_m is None else job.work.folder(x_m))
    device = job.work.device()
    shard = functools.partial(_score_shard, folder=folder, device=str(device))
    rows = map_shards(
        shard,
        split_shards(list(zip(photos, contexts, strict=True))),
        workers=1 if device.type == "cuda" else job.work.runtime.workers,
        recorder=job.work.recorder,
        what=f"classify {split}",
    )
    probabilities = np.concatenate(list(rows))
    tagged = np.zeros(probabilities.shape, bool)
    for row, photo in zip(tagged, photos, strict=True):
        row[list(photo.tags)] = True
    known = tagged.any(axis=1)  # a photo of an unseen split may come without tags
    report = score_tags(probabilities[known], tagged[known], classes=dataset.classes)
    (out / "report.json").write_text(report.model_dump_json(indent=1))
    return Measured(report.metrics("classifier"))


def _score_shard(
    items: Sequence[tuple[TaggedPhoto, np.ndarray | None]], *, folder: Path, device: str
) -> Float32[np.ndarray, "b n"]:
    model = _load(folder, device)
    rows: dict[int, np.ndarray] = {}
    for positions, pixels in read_batches([photo for photo, _ in items], batch_size=BATCH_PHOTOS):
        contexts = [c for c in (items[p][1] for p in positions) if c is not None]
        x_m = torch.from_numpy(np.stack(contexts)) if contexts else None
        rows |= dict(zip(positions, tag_probabilities(model, pixels, x_m), strict=True))
    return np.stack([rows[position] for position in range(len(items))])


@functools.lru_cache(maxsize=1)
def _load(folder: Path, device: str) -> ContextClassifier:
    return load_classifier(folder).to(device)


score_classifier = Stage("score_classifier", _write, lambda config: {})
