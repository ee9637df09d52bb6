"""Stage `confounders`: the segmenter's masks averaged a class, for the next round (step 4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from wsss_core.causal.confounders import (
    COSINE_THRESHOLD,
    ConfounderSet,
    average_class_masks,
    class_shares,
    complete_confounders,
    mean_pairwise_cosine,
    tag_prior,
)
from wsss_core.config import CausalConfig
from wsss_core.data.images import read_mask
from wsss_core.observe import Recorder
from wsss_core.records import Manifest, TaggedPhoto
from wsss_core.stages.classifier import CAUSAL, CONFOUNDERS
from wsss_core.stages.stage import Job, Stage
from wsss_core.store import Measured


def _write(
    out: Path,
    job: Job,
    *,
    data: Manifest,
    predictions: Manifest,
    masks: Manifest,
    former: Manifest | None = None,
) -> Measured:
    causal: CausalConfig = job.settings
    dataset = job.work.dataset(data)
    photos, num = dataset.splits["train"], len(dataset.classes)

    def average(folder: Path, what: str) -> tuple[np.ndarray, np.ndarray]:
        shares = _shares(photos, folder, causal.context_size, job.work.recorder, what)
        return average_class_masks(shares, num_classes=num, size=causal.context_size)

    means, counts = average(job.work.folder(predictions), "average masks")
    unseen = bool((counts == 0).any())
    before = ConfounderSet.load(job.work.folder(former) / CONFOUNDERS).c if former else None
    pseudo = average(job.work.folder(masks), "average pseudo-masks")[0] if unseen else None
    classes = complete_confounders(means, counts=counts, former=before, pseudo=pseudo)
    tags = [photo.tags for photo in photos]
    prior = tag_prior(tags, num_classes=num, kind=causal.prior)
    confounders = ConfounderSet(c=classes, counts=counts, prior=prior)
    confounders.save(out / CONFOUNDERS)
    (out / CAUSAL).write_text(causal.model_dump_json())
    cosine = mean_pairwise_cosine(confounders.c)
    if cosine > COSINE_THRESHOLD:
        job.work.recorder.note(
            f"the class-average masks are nearly one (mean cosine {cosine:.3f} > "
            f"{COSINE_THRESHOLD}): alpha cannot matter, the context map tells photos apart no more"
        )
    metrics = {
        "confounders/cosine": cosine,
        "confounders/unseen": float((counts == 0).sum()),
    }
    return Measured(metrics)


def _shares(
    photos: Sequence[TaggedPhoto], folder: Path, size: int, recorder: Recorder, what: str
) -> Iterator[tuple[tuple[int, ...], Float32[np.ndarray, "k s s"]]]:
    for done, photo in enumerate(photos, start=1):
        mask = read_mask(folder / f"{photo.id}.png")
        yield photo.tags, class_shares(mask, tags=photo.tags, size=size)
        recorder.progress(what, done, len(photos))


update_confounders = Stage("confounders", _write, lambda config: config.causal)
