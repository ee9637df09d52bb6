"""Stage `prototypes`: what classes, and groups of background, look like to one frozen trunk.

`prototypes.safetensors` holds z of the classes, for context `features`. Under `causal.clusters` the
rows of the background's groups follow, with `maps`, their c_j, and `counts`, the photos that show
each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float32
from safetensors.numpy import save_file

from wsss_core.causal.clusters import Clusters, find_clusters
from wsss_core.causal.confounders import average_class_masks, squash
from wsss_core.causal.features import average_prototypes, pool_by_class
from wsss_core.config import Config
from wsss_core.data.images import read_mask, read_photo
from wsss_core.data.transforms import normalise, resize_photo, scaled_size
from wsss_core.models.backbones import build_backbone
from wsss_core.models.classifier import Classifier
from wsss_core.records import Manifest, TaggedPhoto
from wsss_core.seeding import derive_seed
from wsss_core.stages.classifier import PROTOTYPES
from wsss_core.stages.shards import split_shards
from wsss_core.stages.stage import Job, Stage
from wsss_core.store import Measured
from wsss_core.workers import map_shards

SAMPLE_PHOTOS, SAMPLE_CELLS = 512, 32
"""The groups are found on that many photos, spread over the list, and cells of each."""

T = TypeVar("T")
Pooled = tuple[Sequence[int], np.ndarray]
"""Which confounders a photo shows, and what was taken of it for each."""
Load = Callable[[], Classifier]


def _write(
    out: Path, job: Job, *, data: Manifest, predictions: Manifest, masks: Manifest
) -> Measured:
    settings: dict[str, Any] = job.settings
    dataset = job.work.dataset(data)
    photos, num = dataset.splits["train"], len(dataset.classes)
    load = functools.partial(
        _load_trunk,
        **settings["trunk"],
        seed=derive_seed(job.seed, "trunk"),
        device=str(job.work.device()),
    )
    channels = load().context_slices()[0].channels_in

    def average(folder: Path, what: str) -> Float32[np.ndarray, "n c"]:
        pooled = _map(functools.partial(_pool, folder=folder, load=load), photos, job, what)
        return average_prototypes(pooled, num_classes=num, channels=channels)

    seen = job.work.folder(predictions)
    z = average(seen, "average features")
    unseen = ~z.any(axis=1)
    if unseen.any():
        z[unseen] = average(job.work.folder(masks), "average features of pseudo-masks")[unseen]
    arrays, metrics = {"z": z}, {"prototypes/unseen": float((~z.any(axis=1)).sum())}
    if settings["clusters"]:
        groups, maps, counts = _cluster(photos, seen, load, job)
        metrics["prototypes/clusters"] = float(len(groups))
        arrays |= {"z": np.concatenate([z, groups.prototypes()]), "maps": maps, "counts": counts}
    save_file(arrays, out / PROTOTYPES)
    return Measured(metrics)


def _cluster(
    photos: Sequence[TaggedPhoto], folder: Path, load: Load, job: Job
) -> tuple[Clusters, np.ndarray, np.ndarray]:
    """The groups of the background, their c_j and the photos that show each."""
    settings: dict[str, Any] = job.settings
    some = photos[:: max(1, -(-len(photos) // SAMPLE_PHOTOS))]
    sample = functools.partial(_sample, folder=folder, load=load)
    cells = np.concatenate(list(_map(sample, some, job, "sample background")))
    find = functools.partial(find_clusters, num=settings["clusters"], seed=job.seed)
    recorder = job.work.recorder
    # one shard is computed here, with one thread
    (groups,) = map_shards(find, [cells], workers=1, recorder=recorder, what="find clusters")
    locate = functools.partial(
        _locate, folder=folder, load=load, groups=groups, size=settings["context_size"]
    )
    maps, counts = average_class_masks(
        _map(locate, photos, job, "locate clusters"),
        num_classes=len(groups),
        size=settings["context_size"],
    )
    return groups, maps, counts


def _map(
    function: Callable[[Sequence[TaggedPhoto]], list[T]],
    photos: Sequence[TaggedPhoto],
    job: Job,
    what: str,
) -> Iterator[T]:
    """What `function` gives of each photo, shard by shard."""
    workers = 1 if job.work.device().type == "cuda" else job.work.runtime.workers
    shards, recorder = split_shards(photos), job.work.recorder
    for rows in map_shards(function, shards, workers=workers, recorder=recorder, what=what):
        yield from rows


def _pool(photos: Sequence[TaggedPhoto], *, folder: Path, load: Load) -> list[Pooled]:
    """The mean feature of each tagged class, (t,C)."""
    rows: list[Pooled] = []
    for photo in photos:
        features, mask = _features(photo, load()), read_mask(folder / f"{photo.id}.png")
        own = torch.from_numpy(mask)[None] == torch.tensor(photo.tags).view(-1, 1, 1) + 1
        shares = F.adaptive_avg_pool2d(own.float(), (features.shape[1], features.shape[2]))
        rows.append((photo.tags, pool_by_class(torch.from_numpy(features), shares).numpy()))
    return rows


def _sample(photos: Sequence[TaggedPhoto], *, folder: Path, load: Load) -> list[np.ndarray]:
    """Features of some background cells, spread over the photo, (m,C)."""
    rows = []
    for photo in photos:
        features = _features(photo, load())
        cells = features[:, _background(photo, folder, features.shape[1:])].T
        rows.append(cells[:: max(1, -(-len(cells) // SAMPLE_CELLS))])
    return rows


def _locate(
    photos: Sequence[TaggedPhoto], *, folder: Path, load: Load, groups: Clusters, size: int
) -> list[Pooled]:
    """The cells of each group that the photo shows, in the canonical frame, (g,s,s)."""
    rows: list[Pooled] = []
    for photo in photos:
        features = _features(photo, load())
        cells = groups.assign(features, _background(photo, folder, features.shape[1:]))
        shown = np.flatnonzero(cells.any(axis=(1, 2)))
        rows.append((tuple(shown.tolist()), squash(cells[shown], size=size)))
    return rows


def _background(photo: TaggedPhoto, folder: Path, size: tuple[int, ...]) -> Bool[np.ndarray, "h w"]:
    """Cells that the segmenter calls background by more than half."""
    mask = torch.from_numpy(read_mask(folder / f"{photo.id}.png"))
    share = F.adaptive_avg_pool2d((mask == 0).float()[None], (size[0], size[1]))[0]
    return (share > 0.5).numpy()


@torch.inference_mode()
def _features(photo: TaggedPhoto, trunk: Classifier) -> Float32[np.ndarray, "c h w"]:
    """What enters the fused convolution, of the whole photo."""
    pixels = read_photo(photo.path)
    target = scaled_size((pixels.shape[0], pixels.shape[1]), 1.0, multiple=16)
    view = normalise(resize_photo(pixels, target))[None].to(next(trunk.parameters()).device)
    return trunk.fused_features(view)[0].float().cpu().numpy()


@functools.lru_cache(maxsize=1)
def _load_trunk(
    *, backbone: str, pretrained: bool, output_stride: int, fusion: str, seed: int, device: str
) -> Classifier:
    built = build_backbone(backbone, pretrained=pretrained, output_stride=output_stride, seed=seed)
    return Classifier(built, num_classes=1, fusion=fusion).to(device).eval()


def _settings(config: Config) -> dict[str, Any]:
    causal = config.causal
    return {
        "trunk": {
            "backbone": config.classifier.backbone,
            "pretrained": config.classifier.pretrained,
            "output_stride": config.classifier.output_stride,
            # where M joins at several depths, the one that CONTA found best
            "fusion": "block5" if causal.fusion == "all" else causal.fusion,
        },
        "clusters": causal.clusters,
        "context_size": causal.context_size if causal.clusters else None,
    }


average_features = Stage("prototypes", _write, _settings, seeded=True)
