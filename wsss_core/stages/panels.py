"""Stage `draw_panels`: `panel.png`, the same photos every round, and `worst.json`.

Worst means lowest mIoU of the segmenter on the photo itself; without truth, lowest agreement with
the tags.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wsss_core.data.images import read_mask, read_pixels
from wsss_core.data.labels import BACKGROUND
from wsss_core.evaluation.agreement import find_classes
from wsss_core.evaluation.classification import f1_score
from wsss_core.evaluation.confusion import confusion_matrix, mean_iou
from wsss_core.evaluation.panels import (
    PanelRow,
    draw_panel,
    heat,
    overlay,
    rank_worst,
    spread_evenly,
)
from wsss_core.evaluation.report import optional
from wsss_core.records import Manifest, TaggedPhoto
from wsss_core.seeds.cam import read_cam
from wsss_core.stages.scores import IndexedTruth, best_scores, open_truth
from wsss_core.stages.stage import Job, Stage
from wsss_core.store import Measured

PANEL, WORST = "panel.png", "worst.json"


@dataclass(frozen=True)
class _Sources:
    """Where the columns come from; None for what this run does not have."""

    cams: Path | None
    masks: Path
    predictions: Path
    truth: IndexedTruth | None

    def true_mask(self, photo: TaggedPhoto) -> np.ndarray | None:
        if self.truth is None or photo.id not in self.truth.ids:
            return None
        return self.truth.read(photo)


def _write(
    out: Path,
    job: Job,
    *,
    data: Manifest,
    truth: Manifest | None = None,
    cams: Manifest | None = None,
    masks: Manifest,
    predictions: Manifest,
) -> Measured:
    dataset = job.work.dataset(data)
    names = (BACKGROUND, *dataset.classes)
    photos = {photo.id: photo for photo in dataset.splits["train"]}
    indexed = open_truth(job, data=data, truth=truth)
    sources = _Sources(
        None if cams is None else job.work.folder(cams),
        job.work.folder(masks),
        job.work.folder(predictions),
        indexed if indexed.ids & photos.keys() else None,
    )
    chosen = spread_evenly(list(photos), num=job.settings["panel_photos"])
    rows = [_row(photos[photo_id], sources, names=names) for photo_id in chosen]
    title = f"{len(rows)} of {len(photos)} training photos"
    draw_panel(rows, names=names, title=title).save(out / PANEL)
    worst = _find_worst(job, list(photos.values()), sources, names=names)
    (out / WORST).write_text(json.dumps(worst, indent=1) + "\n")
    return Measured()


def _row(photo: TaggedPhoto, sources: _Sources, *, names: Sequence[str]) -> PanelRow:
    pixels = read_pixels(photo)
    layers: dict[str, np.ndarray | None] = {
        "pseudo-mask": read_mask(sources.masks / f"{photo.id}.png"),
        "segmenter": read_mask(sources.predictions / f"{photo.id}.png"),
    }
    if sources.truth is not None:
        layers["truth"] = sources.true_mask(photo)
    cells: dict[str, np.ndarray | None] = {}
    if sources.cams is not None:
        cells["CAM"] = heat(pixels, *best_scores(read_cam(sources.cams / f"{photo.id}.npz")))
    for name, mask in layers.items():
        cells[name] = None if mask is None else overlay(pixels, mask)
    shown = [np.unique(mask).tolist() for mask in layers.values() if mask is not None]
    tags = [tag + 1 for tag in photo.tags]
    return PanelRow(
        caption=f"{photo.id}   tags: {', '.join(names[label] for label in tags) or 'none'}",
        photo=pixels,
        cells=cells,
        labels=frozenset(tags).union(*shown),
    )


def _find_worst(
    job: Job, photos: Sequence[TaggedPhoto], sources: _Sources, *, names: Sequence[str]
) -> dict[str, Any]:
    measure = _miou if sources.truth is not None else _tag_agreement
    scores: dict[str, dict[str, float | None]] = {}
    for done, photo in enumerate(photos, 1):
        scores[photo.id] = measure(photo, sources, names)
        job.work.recorder.progress("find the worst photos", done, len(photos))
    segmenter = {
        name: score["segmenter"] for name, score in scores.items() if score["segmenter"] is not None
    }
    tags = {photo.id: [names[tag + 1] for tag in photo.tags] for photo in photos}
    return {
        "measure": "miou" if sources.truth is not None else "tag_agreement",
        "split": "train",
        "photos": [
            {"id": name, "tags": tags[name], **scores[name]}
            for name in rank_worst(segmenter, num=job.settings["worst_photos"])
        ],
    }


def _miou(photo: TaggedPhoto, sources: _Sources, names: Sequence[str]) -> dict[str, float | None]:
    """Each mask's mIoU on one photo, over the classes in it; None without truth."""
    true = sources.true_mask(photo)
    folders = {"segmenter": sources.predictions, "pseudo": sources.masks}
    if true is None:
        return dict.fromkeys(folders)
    return {
        what: optional(
            mean_iou(
                confusion_matrix(
                    read_mask(folder / f"{photo.id}.png"),
                    true,
                    num_classes=len(names),
                    name=photo.id,
                )
            )
        )
        for what, folder in folders.items()
    }


def _tag_agreement(
    photo: TaggedPhoto, sources: _Sources, names: Sequence[str]
) -> dict[str, float | None]:
    """F1 of the classes the segmenter finds in a photo against its tags; None without both."""
    mask = read_mask(sources.predictions / f"{photo.id}.png")
    found = find_classes(mask, num_classes=len(names))
    tagged = np.zeros_like(found)
    tagged[list(photo.tags)] = True
    return {"segmenter": optional(f1_score(found, tagged))}


draw_panels = Stage(
    "draw_panels",
    _write,
    lambda config: {
        "panel_photos": config.evaluation.panel_photos,
        "worst_photos": config.evaluation.worst_photos,
    },
)
