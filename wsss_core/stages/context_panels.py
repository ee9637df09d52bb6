"""Stage `draw_context`: what the classifier of a later round was shown beside its photos.

`context.png` holds X_m and M of the photos that `panel.png` shows, `confounders.png` the c_i.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from wsss_core.causal.confounders import ConfounderSet
from wsss_core.causal.intervention import UniformIntervention
from wsss_core.data.images import read_pixels
from wsss_core.evaluation.panels import PanelRow, draw_panel, draw_sheet, shade, spread_evenly
from wsss_core.records import Manifest, TaggedPhoto
from wsss_core.stages.classifier import CONFOUNDERS, load_classifier, photo_contexts
from wsss_core.stages.stage import Job, Stage
from wsss_core.store import Measured

CONTEXT, SHEET = "context.png", "confounders.png"
MAP_PX = 128  # a drawn c_i; a multiple of the usual 32 cells


def _write(out: Path, job: Job, *, data: Manifest, classifier: Manifest, x_m: Manifest) -> Measured:
    dataset = job.work.dataset(data)
    folder = job.work.folder(classifier)
    photos = {photo.id: photo for photo in dataset.splits["train"]}
    fields = photo_contexts(list(photos.values()), folder, job.work.folder(x_m))
    context = load_classifier(folder).intervention
    given = dict(zip(photos, fields, strict=True))
    chosen = spread_evenly(list(photos), num=job.settings)
    rows = [
        _row(photos[photo_id], field, context, classes=dataset.classes)
        for photo_id, field in ((photo_id, given[photo_id]) for photo_id in chosen)
        if field is not None and context is not None
    ]
    if rows:
        title = "what the classifier was shown"
        draw_panel(rows, names=(), title=title).save(out / CONTEXT)
    if isinstance(context, UniformIntervention):  # `seg_mask` has confounders and ignores them
        _draw_confounders(folder / CONFOUNDERS, classes=dataset.classes).save(out / SHEET)
    return Measured()


def _row(
    photo: TaggedPhoto, field: np.ndarray, context: torch.nn.Module, *, classes: Sequence[str]
) -> PanelRow:
    """Photo, X_m, and M as bright as its own largest."""
    pixels = read_pixels(photo)
    with torch.inference_mode():
        m = context(torch.from_numpy(field)[None])[0, 0].numpy()
    size = (pixels.shape[0], pixels.shape[1])
    tags = ", ".join(classes[tag] for tag in photo.tags)
    return PanelRow(
        caption=f"{photo.id}   tags: {tags}   largest M {m.max():.3g}",
        photo=pixels,
        cells={"X_m": shade(field, size, top=1.0), "M": shade(m, size)},
        labels=frozenset(),
    )


def _draw_confounders(path: Path, *, classes: Sequence[str]) -> Image.Image:
    confounders = ConfounderSet.load(path)
    top = float(confounders.c.max())
    sheet = {
        f"{name}  {c.max():.2f}": shade(c, (MAP_PX, MAP_PX), top=top)
        for name, c in zip(classes, confounders.c, strict=True)
    }
    return draw_sheet(sheet, title=f"confounders c_i; white is {top:.2f}")


draw_context = Stage("draw_context", _write, lambda config: config.evaluation.panel_photos)
