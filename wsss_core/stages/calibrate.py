"""Stage `calibrate_seeds`: the background's score of the CAMs, chosen by tags alone.

It asks the classifier that made them how much of a photo its tags need; see `evaluation.evidence`.
`calibration.json` holds the whole curve.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64, UInt8

from wsss_core.data.images import read_photo
from wsss_core.evaluation.evidence import gather_evidence, mean_evidence
from wsss_core.evaluation.panels import spread_evenly
from wsss_core.records import Manifest, TaggedPhoto
from wsss_core.seeds.cam import read_cam, upsample_cam
from wsss_core.stages.classifier import ContextClassifier, load_classifier, photo_contexts
from wsss_core.stages.shards import split_shards
from wsss_core.stages.stage import Job, Stage
from wsss_core.stages.tag_scores import tag_probabilities
from wsss_core.store import Measured
from wsss_core.workers import map_shards

CALIBRATION = "calibration.json"
THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 15))
NUM_PHOTOS = 96  # the curve is a mean over them
SHARD_PHOTOS = 8


def _write(
    out: Path,
    job: Job,
    *,
    data: Manifest,
    classifier: Manifest,
    cams: Manifest,
    x_m: Manifest | None = None,
) -> Measured:
    photos = job.work.dataset(data).splits["train"]
    folder = job.work.folder(classifier)
    contexts = photo_contexts(photos, folder, None if x_m is None else job.work.folder(x_m))
    chosen = set(spread_evenly([photo.id for photo in photos], num=NUM_PHOTOS))
    items = [item for item in zip(photos, contexts, strict=True) if item[0].id in chosen]
    device = job.work.device()
    rows = map_shards(
        functools.partial(
            _judge, cams=job.work.folder(cams), classifier=folder, device=str(device)
        ),
        split_shards(items, size=SHARD_PHOTOS),
        workers=1 if device.type == "cuda" else job.work.runtime.workers,
        recorder=job.work.recorder,
        what="calibrate seeds",
    )
    evidence = mean_evidence(np.concatenate(list(rows)), thresholds=THRESHOLDS)
    threshold, most = evidence.best()
    document = {
        "threshold": round(threshold, 3),
        "photos": len(items),
        "thresholds": THRESHOLDS,
        "kept": evidence.kept.round(4).tolist(),
        "removed": evidence.removed.round(4).tolist(),
        "area": evidence.area.round(4).tolist(),
    }
    (out / CALIBRATION).write_text(json.dumps(document, indent=1) + "\n")
    return Measured({"calibration/threshold": round(threshold, 3), "calibration/evidence": most})


def _judge(
    items: Sequence[tuple[TaggedPhoto, np.ndarray | None]],
    *,
    cams: Path,
    classifier: Path,
    device: str,
) -> Float64[np.ndarray, "m 3 t"]:
    model = _load(classifier, device)
    rows = [np.zeros((0, 3, len(THRESHOLDS)))]
    for photo, context in items:
        cam = read_cam(cams / f"{photo.id}.npz")
        rows.append(
            gather_evidence(
                read_photo(photo.path),
                upsample_cam(cam.cam, cam.size),
                cam.classes,
                functools.partial(_probabilities, model=model, context=context),
                thresholds=THRESHOLDS,
            )
        )
    return np.concatenate(rows)


def _probabilities(
    views: UInt8[np.ndarray, "b h w 3"], *, model: ContextClassifier, context: np.ndarray | None
) -> np.ndarray:
    x_m = None if context is None else torch.from_numpy(np.stack([context] * len(views)))
    return tag_probabilities(model, views, x_m)


@functools.lru_cache(maxsize=1)
def _load(folder: Path, device: str) -> ContextClassifier:
    return load_classifier(folder).to(device).to(memory_format=torch.channels_last)


def read_threshold(folder: Path) -> float:
    """The threshold that a calibration artifact chose."""
    threshold: float = json.loads((folder / CALIBRATION).read_text())["threshold"]
    return threshold


calibrate_seeds = Stage("calibrate_seeds", _write, lambda config: {})
