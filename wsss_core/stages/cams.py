"""Stage `cams`: class activation maps of the training photos, over scales and flips (step 2)."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wsss_core.config import Config
from wsss_core.data.images import photo_size
from wsss_core.data.transforms import normalise, resize_photo, scaled_size
from wsss_core.errors import DataError, InputError
from wsss_core.records import Manifest, TaggedPhoto
from wsss_core.seeds.cam import (
    Cam,
    normalise_cam,
    read_cam,
    resize_cam,
    seed_size,
    sum_scales,
    write_cam,
)
from wsss_core.stages.classifier import ContextClassifier, load_classifier, photo_contexts
from wsss_core.stages.resume import write_shards
from wsss_core.stages.shards import naming, read_batches
from wsss_core.stages.stage import Job, Stage
from wsss_core.store import Content, Measured

BATCH_PHOTOS = 4


class _Held(threading.local):
    """The classifier that a thread has at hand."""

    at: tuple[Path, str] | None = None
    model: ContextClassifier


_held = _Held()


@dataclass(frozen=True)
class _Shown:
    """A photo and the X_m beside it."""

    photo: TaggedPhoto
    x_m: np.ndarray | None

    @property
    def id(self) -> str:
        return self.photo.id


def _write(
    out: Path,
    job: Job,
    *,
    data: Manifest,
    classifier: Manifest | None,
    x_m: Manifest | None = None,
) -> Measured:
    photos = job.work.dataset(data).splits["train"]
    content: Content | None = job.settings["folder"]
    if content is not None:
        return _adopt(out, job, photos, content.folder)
    if classifier is None:
        raise InputError("there is no classifier to make CAMs with; train one, or set seeds.folder")
    model = job.work.folder(classifier)
    contexts = photo_contexts(photos, model, None if x_m is None else job.work.folder(x_m))
    device = str(job.work.device())
    write_shards(
        functools.partial(_write_shard, folder=model, scales=job.settings["scales"], device=device),
        [_Shown(*item) for item in zip(photos, contexts, strict=True)],
        out=out,
        job=job,
        what="cams",
        device=device,
    )
    return Measured()


def _write_shard(
    items: Sequence[_Shown], *, out: Path, folder: Path, scales: tuple[float, ...], device: str
) -> int:
    """Write the CAMs of a shard; returns their number."""
    model = _load(folder, device)
    for positions, pixels in read_batches([item.photo for item in items], batch_size=BATCH_PHOTOS):
        batch = [items[position] for position in positions]
        with naming("photos", [item.id for item in batch]):
            contexts = [item.x_m for item in batch if item.x_m is not None]
            x_m = torch.from_numpy(np.stack(contexts)) if contexts else None
            maps = class_activation_maps(model, pixels, x_m, scales=scales)
            for item, photo_maps in zip(batch, maps, strict=True):
                tags = np.array(item.photo.tags, np.int64)
                cam = normalise_cam(photo_maps[tags])
                size = (pixels.shape[1], pixels.shape[2])
                write_cam(out / f"{item.id}.npz", Cam(tags, cam.numpy(), size))
    return len(items)


def _load(folder: Path, device: str) -> ContextClassifier:
    """The classifier of this thread: a model holds its batch's context while it looks."""
    if _held.at != (folder, device):
        _held.model = load_classifier(folder).to(device).to(memory_format=torch.channels_last)
        _held.at = (folder, device)
    return _held.model


@torch.inference_mode()
def class_activation_maps(
    model: ContextClassifier, photos: np.ndarray, x_m: Tensor | None, *, scales: Sequence[float]
) -> Tensor:
    """Rectified class maps of equally sized photos, summed over scales and flips; no maximum taken.

    Args:
        model: Trained classifier in evaluation mode.
        photos: (B,H,W,3) uint8.
        x_m: (B,s,s), or None in round 0. The context map is resized and flipped with the photo.
        scales: Photo sizes relative to the original; each side is rounded to a multiple of 16 px.

    Returns:
        (B,n,ceil(H/4),ceil(W/4)) float32 on CPU, >= 0.
    """
    device = next(model.parameters()).device
    size = (photos.shape[1], photos.shape[2])
    whole = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    mirrored = torch.tensor([[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    num = len(photos)
    affine = torch.stack([whole] * num + [mirrored] * num).to(device)
    contexts = None if x_m is None else torch.cat([x_m, x_m]).to(device)

    def maps_at(scale: float) -> Tensor:
        target = scaled_size(size, scale, multiple=16)
        views = torch.stack([normalise(resize_photo(photo, target)) for photo in photos])
        views = torch.cat([views, views.flip(-1)]).to(device, memory_format=torch.channels_last)
        maps = model.class_maps(views, contexts, affine).float().relu()
        return maps[:num] + maps[num:].flip(-1)

    return sum_scales(maps_at, scales, size).cpu()


def _adopt(out: Path, job: Job, photos: Sequence[TaggedPhoto], folder: Path) -> Measured:
    """Anybody's CAMs: read, checked against tags and photo size, stored as ours."""
    for done, photo in enumerate(photos, start=1):
        path = folder / f"{photo.id}.npz"
        cam, size = read_cam(path), photo_size(photo.path)
        if cam.size not in (size, photo.seen_size):
            raise DataError(f"{path} is for a photo of {cam.size}, its photo is {size}")
        if tuple(cam.classes) != photo.tags:
            raise DataError(
                f"{path} holds classes {list(map(int, cam.classes))}; expected the photo's tags, "
                f"ascending: {list(photo.tags)}"
            )
        if photo.seen_size not in (None, cam.size):
            cells = resize_cam(cam.cam, seed_size(photo.seen_size))
            cam = Cam(cam.classes, cells, photo.seen_size)
        write_cam(out / f"{photo.id}.npz", cam)
        job.work.recorder.progress("cams from folder", done, len(photos))
    return Measured()


def _settings(config: Config) -> dict[str, Any]:
    # the threshold is not among them: it makes masks of CAMs
    seeds = config.seeds
    folder = None if seeds.folder is None else Content(seeds.folder)
    return {"scales": seeds.scales, "folder": folder}


make_cams = Stage("cams", _write, _settings)
