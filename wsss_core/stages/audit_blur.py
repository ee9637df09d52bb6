"""Stage `audit_blur`: does the classifier need j to see i? The audit's twin that needs no truth.

    drop(i <- j) = P(i) of a photo - P(i) of the photo with j's pseudo-mask blurred

over training photos tagged i and j. Blurring i's own mask says how large a drop can be expected. It
holds `blur.json` and feeds no later stage.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from PIL import Image, ImageFilter

from wsss_core.data.images import read_mask, read_pixels
from wsss_core.evaluation.audit import Shares, name_drops
from wsss_core.evaluation.report import optional
from wsss_core.records import Manifest
from wsss_core.stages.classifier import load_classifier, photo_contexts
from wsss_core.stages.stage import Job, Stage
from wsss_core.stages.tag_scores import tag_probabilities
from wsss_core.store import Measured
from wsss_core.workers import one_thread

BLUR = "blur.json"
MAX_PHOTOS = 128
"""Photos with company that are looked at, spread over the list."""

BLUR_RATIO = 1 / 8
"""Deviation of the blur, of the photo's long side: of an object a faint spot of colour stays."""


def blur_region(
    photo: UInt8[np.ndarray, "h w 3"], region: Bool[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "h w 3"]:
    """The photo with a region out of focus; the rest keeps its pixels."""
    deviation = BLUR_RATIO * max(photo.shape[:2])
    blurred = Image.fromarray(photo).filter(ImageFilter.GaussianBlur(deviation))
    return np.where(region[:, :, None], np.asarray(blurred), photo)


def _write(
    out: Path,
    job: Job,
    *,
    data: Manifest,
    classifier: Manifest,
    masks: Manifest,
    x_m: Manifest | None = None,
) -> Measured:
    dataset, folder = job.work.dataset(data), job.work.folder(classifier)
    photos = dataset.splits["train"]
    contexts = photo_contexts(photos, folder, None if x_m is None else job.work.folder(x_m))
    company = [item for item in zip(photos, contexts, strict=True) if len(item[0].tags) > 1]
    chosen = company[:: max(1, -(-len(company) // MAX_PHOTOS))]
    model = load_classifier(folder).to(job.work.device())
    num = len(dataset.classes)
    drops = [[Shares() for _ in range(num)] for _ in range(num)]
    with one_thread():
        for done, (photo, context) in enumerate(chosen, 1):
            pixels, mask = read_pixels(photo), read_mask(job.work.folder(masks) / f"{photo.id}.png")
            seen = [tag for tag in photo.tags if (mask == tag + 1).any()]
            views = np.stack([pixels, *(blur_region(pixels, mask == tag + 1) for tag in seen)])
            shown = None if context is None else torch.from_numpy(np.stack([context] * len(views)))
            whole, *blurred = tag_probabilities(model, views, shown)
            for j, probabilities in zip(seen, blurred, strict=True):
                for i in photo.tags:
                    drops[i][j].add(float(whole[i] - probabilities[i]), 1)
            job.work.recorder.progress("audit by blurring", done, len(chosen))
    own, others = Shares(), Shares()
    for i, row in enumerate(drops):
        for j, drop in enumerate(row):
            (own if i == j else others).add(drop.part, drop.whole)
    document = {
        "photos": len(chosen),
        "classes": dataset.classes,
        "drops": [[optional(drop.value()) for drop in row] for row in drops],
        "worst": name_drops(drops, classes=dataset.classes),
    }
    (out / BLUR).write_text(json.dumps(document, indent=1) + "\n")
    return Measured({"audit/blur_company": others.value(), "audit/blur_own": own.value()})


audit_blur = Stage("audit_blur", _write, lambda config: {})
