"""Stages `calibrate_seeds` and `calibrate_walk`: what `auto` means, from tags alone.

They ask the classifier that made the CAMs how much of a photo its tags need; see
`evaluation.evidence`. `calibration.json` holds the curves. What was chosen takes the place of
`auto` in the settings of the stages that follow, so that their keys hold the number.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, UInt8

from wsss_core.config import Config, IrnConfig
from wsss_core.data.images import read_pixels
from wsss_core.evaluation.evidence import Evidence, gather_evidence, mean_evidence
from wsss_core.evaluation.panels import spread_evenly
from wsss_core.expansion import irn
from wsss_core.expansion.method import Seeded
from wsss_core.models.boundary import BoundaryNet
from wsss_core.records import Manifest, TaggedPhoto
from wsss_core.seeds.cam import read_cam, upsample_cam
from wsss_core.stages.boundary import boundary_maps, load_boundary_net
from wsss_core.stages.classifier import ContextClassifier, load_classifier, photo_contexts
from wsss_core.stages.shards import split_shards
from wsss_core.stages.stage import Job, Stage
from wsss_core.stages.tag_scores import tag_probabilities
from wsss_core.store import Measured
from wsss_core.workers import map_shards

CALIBRATION = "calibration.json"
THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 15))
BETAS, LOG2_STEPS = (5.0, 10.0, 20.0), (6, 8)
SEED_PHOTOS, WALK_PHOTOS = 96, 48  # the curves are means over them
SHARD_PHOTOS = 8

Items = Sequence[tuple[TaggedPhoto, np.ndarray | None]]


def _write_seeds(
    out: Path,
    job: Job,
    *,
    data: Manifest,
    classifier: Manifest,
    cams: Manifest,
    x_m: Manifest | None = None,
) -> Measured:
    rows = _judge_photos(
        job,
        data,
        x_m,
        classifier=classifier,
        cams=cams,
        boundary=None,
        walks=[],
    )
    evidence = mean_evidence(rows[0], thresholds=THRESHOLDS)
    threshold, most = evidence.best()
    chosen = {"threshold": round(threshold, 3)}
    _write_curves(out, chosen, [({}, evidence)])
    return Measured(
        {"calibrate_seeds/threshold": chosen["threshold"], "calibrate_seeds/evidence": most}
    )


def _write_walk(
    out: Path,
    job: Job,
    *,
    data: Manifest,
    classifier: Manifest,
    cams: Manifest,
    boundary: Manifest,
    x_m: Manifest | None = None,
) -> Measured:
    fixed: dict[str, Any] = job.settings
    walks = [
        {**fixed, "beta": beta, "log2_steps": steps, "threshold": 0.5}
        for beta, steps in itertools.product(
            BETAS if fixed["beta"] == "auto" else (fixed["beta"],),
            LOG2_STEPS if fixed["log2_steps"] == "auto" else (fixed["log2_steps"],),
        )
    ]
    rows = _judge_photos(
        job,
        data,
        x_m,
        classifier=classifier,
        cams=cams,
        boundary=boundary,
        walks=walks,
    )
    curves = [
        (
            {name: walk[name] for name in ("beta", "log2_steps")},
            mean_evidence(row, thresholds=THRESHOLDS),
        )
        for walk, row in zip(walks, rows, strict=True)
    ]
    given = fixed["threshold"]
    best = [
        evidence.best()
        if given == "auto"
        else (given, float(np.interp(given, evidence.thresholds, evidence.total)))
        for _, evidence in curves
    ]
    winner = max(range(len(best)), key=lambda index: best[index][1])
    threshold, most = best[winner]
    chosen = {**curves[winner][0], "threshold": round(threshold, 3) if given == "auto" else given}
    _write_curves(out, chosen, curves)
    metrics = {f"calibrate_walk/{name}": float(value) for name, value in chosen.items()}
    return Measured(metrics | {"calibrate_walk/evidence": most})


def adopt_seeds(config: Config, calibration: Manifest) -> Config:
    """The settings with the calibrated `seeds.threshold`; unchanged before it is there."""
    found = calibration.metrics.get("calibrate_seeds/threshold")
    if found is None:
        return config
    seeds = config.seeds.model_copy(update={"threshold": found})
    return config.model_copy(update={"seeds": seeds})


def adopt_walk(config: Config, calibration: Manifest) -> Config:
    """The settings with the calibrated walk; unchanged before it is there."""
    found = {
        name: calibration.metrics.get(f"calibrate_walk/{name}")
        for name in ("beta", "log2_steps", "threshold")
    }
    if found["beta"] is None or found["log2_steps"] is None:
        return config
    found["log2_steps"] = int(found["log2_steps"])
    walk = config.expansion.irn.model_copy(update=found)
    expansion = config.expansion.model_copy(update={"irn": walk})
    return config.model_copy(update={"expansion": expansion})


def is_open(settings: IrnConfig) -> bool:
    """Whether the walk waits for `calibrate_walk`."""
    return "auto" in (settings.beta, settings.log2_steps, settings.threshold)


def _judge_photos(
    job: Job,
    data: Manifest,
    x_m: Manifest | None,
    *,
    classifier: Manifest,
    cams: Manifest,
    boundary: Manifest | None,
    walks: Sequence[dict[str, Any]],
) -> Float64[np.ndarray, "w m 3 t"]:
    """The evidence of some photos' seeds, or of their walked seeds under each of `walks`."""
    photos = job.work.dataset(data).splits["train"]
    folder = job.work.folder(classifier)
    contexts = photo_contexts(photos, folder, None if x_m is None else job.work.folder(x_m))
    num = SEED_PHOTOS if boundary is None else WALK_PHOTOS
    chosen = set(spread_evenly([photo.id for photo in photos], num=num))
    items = [item for item in zip(photos, contexts, strict=True) if item[0].id in chosen]
    device = job.work.device()
    rows = map_shards(
        functools.partial(
            _judge,
            cams=job.work.folder(cams),
            classifier=folder,
            boundary=None if boundary is None else job.work.folder(boundary),
            walks=walks,
            device=str(device),
        ),
        split_shards(items, size=SHARD_PHOTOS),
        workers=1 if device.type == "cuda" else job.work.runtime.workers,
        recorder=job.work.recorder,
        what="calibrate seeds" if boundary is None else "calibrate walk",
    )
    return np.concatenate(list(rows), axis=1)


def _judge(
    items: Items,
    *,
    cams: Path,
    classifier: Path,
    boundary: Path | None,
    walks: Sequence[dict[str, Any]],
    device: str,
) -> Float64[np.ndarray, "w m 3 t"]:
    model = _load(classifier, device)
    net = None if boundary is None else _load_boundary(boundary, device)
    rows: list[list[np.ndarray]] = []
    for photo, context in items:
        pixels, cam = read_pixels(photo), read_cam(cams / f"{photo.id}.npz")
        scores = upsample_cam(cam.cam, cam.size)
        expanded = [scores]
        if net is not None:
            edges = boundary_maps(net, pixels[None], scales=walks[0]["scales"])[0]
            seeded = Seeded(pixels, cam.classes, cam.cam, scores, edges)
            start, _ = irn.choose_start(seeded, walks[0])  # the same for every walk
            seeded = replace(seeded, cam=start)
            expanded = [
                irn.expand([seeded], walk | {"refine_seeds": None})[0].scores[1:] for walk in walks
            ]
        judge = functools.partial(_probabilities, model=model, context=context)
        rows.append(
            [
                gather_evidence(pixels, planes, cam.classes, judge, thresholds=THRESHOLDS)
                for planes in expanded
            ]
        )
    return np.stack([np.concatenate(column) for column in zip(*rows, strict=True)])


def _probabilities(
    views: UInt8[np.ndarray, "b h w 3"], *, model: ContextClassifier, context: np.ndarray | None
) -> np.ndarray:
    x_m = None if context is None else torch.from_numpy(np.stack([context] * len(views)))
    return tag_probabilities(model, views, x_m)


def _write_curves(
    out: Path, chosen: dict[str, Any], curves: Sequence[tuple[dict[str, Any], Evidence]]
) -> None:
    document = {
        "chosen": chosen,
        "thresholds": THRESHOLDS,
        "curves": [
            settings
            | {
                name: getattr(evidence, name).round(4).tolist()
                for name in ("kept", "removed", "area")
            }
            for settings, evidence in curves
        ],
    }
    (out / CALIBRATION).write_text(json.dumps(document, indent=1) + "\n")


@functools.lru_cache(maxsize=1)
def _load(folder: Path, device: str) -> ContextClassifier:
    return load_classifier(folder).to(device).to(memory_format=torch.channels_last)


@functools.lru_cache(maxsize=1)
def _load_boundary(folder: Path, device: str) -> BoundaryNet:
    return load_boundary_net(folder).to(device).to(memory_format=torch.channels_last)


def _walk_settings(config: Config) -> dict[str, Any]:
    """The walk with the seeds it starts from; what a CRF does after it is not judged."""
    return {**irn.choose_settings(config), "refine": None}


calibrate_seeds = Stage("calibrate_seeds", _write_seeds, lambda config: {})
calibrate_walk = Stage("calibrate_walk", _write_walk, _walk_settings)
