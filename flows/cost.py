"""What a run takes of disk and time; said before anything is computed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flows.plan import Planned
from wsss_core.config import Config, TrainingConfig
from wsss_core.data.images import pixel_size
from wsss_core.errors import InputError
from wsss_core.records import Manifest, TaggedPhoto
from wsss_core.stages.stage import Workspace


@dataclass(frozen=True)
class Cost:
    """What the missing artifacts of a run take, roughly.

    Attributes:
        num_bytes: On the disk of CONTA_HOME, checkpoints included.
        seconds: On two CPU cores.
    """

    num_bytes: float
    seconds: float


# Relative to EfficientNet-Lite0: multiply-adds at 224 px (0.4, 4.1, 7.8 G), size of the weights.
_BACKBONES = {"lite0": (1.0, 15e6), "resnet50": (10.0, 102e6), "resnet101": (19.0, 178e6)}
_STEP_S = 0.047  # a training step's share of a photo, lite0, 224 px crop, two cores
_FORWARD_RATIO = 1 / 3  # a pass forwards, of a training step
_CRF_S = 0.09  # a photo of 320 px in two processes
_WALK_S = 0.01  # the same: IRNet's walk with two classes, its network apart
_SCORE_S = 0.01
_CAM_BYTES, _MASK_BYTES = 0.2, 0.06  # a pixel of the photo, as measured on VOC-like photos
_COPIES = 5  # artifact, and twice a checkpoint of weights and momentum


def estimate_cost(
    rows: Sequence[Planned], config: Config, *, photos: Mapping[str, int], side_px: float
) -> Cost:
    """What the misses among `rows` take.

    Args:
        rows: What `plan_rounds` gave.
        config: The settings.
        photos: Number of photos of each split.
        side_px: Side of a typical photo.
    """
    costs = [
        _call_cost(row.stage, config, photos=photos, side_px=side_px) for row in rows if not row.hit
    ]
    return Cost(sum(cost.num_bytes for cost in costs), sum(cost.seconds for cost in costs))


def _call_cost(label: str, config: Config, *, photos: Mapping[str, int], side_px: float) -> Cost:
    name, _, split = label.partition("/")
    len_train = photos.get("train", 0)
    num, pixels = photos.get(split, 0) if split else len_train, side_px**2
    forward_s = _STEP_S * _FORWARD_RATIO * pixels / 224**2
    if name == "classifier":
        return _training_cost(config.classifier.backbone, config.classifier.training, num)
    if name == "segmenter":
        return _training_cost(config.segmenter.backbone, config.segmenter.training, num)
    if name == "boundary":
        boundary = config.expansion.irn.boundary
        return _training_cost(boundary.backbone, boundary.training, num)
    if name == "cams":
        views = 2 * sum(scale**2 for scale in config.seeds.scales)
        weight = _BACKBONES.get(config.classifier.backbone, (10.0, 0.0))[0]
        return Cost(num * pixels * _CAM_BYTES, num * views * forward_s * weight)
    if name in ("predictions", "test"):
        weight = _BACKBONES.get(config.segmenter.backbone, (10.0, 0.0))[0]
        x_m = 4 * config.causal.context_size**2
        return Cost(num * (pixels * _MASK_BYTES + x_m), num * 2 * forward_s * weight)
    if name in ("masks", "boundary_labels"):
        photo_s = _expansion_s(name, config, pixels=pixels, forward_s=forward_s)
        return Cost(num * pixels * _MASK_BYTES, num * photo_s)
    return Cost(1e5, num * _SCORE_S)


def _expansion_s(name: str, config: Config, *, pixels: float, forward_s: float) -> float:
    """Seconds for the label map of one photo."""
    area = pixels / 320**2
    if name == "boundary_labels":
        return 2 * _CRF_S * area
    if config.expansion.method == "irn":
        irn = config.expansion.irn
        views = 2 * sum(scale**2 for scale in irn.scales)
        weight = _BACKBONES.get(irn.boundary.backbone, (10.0, 0.0))[0]
        crfs = (irn.refine_seeds + irn.refine) * _CRF_S
        return views * forward_s * weight + (_WALK_S + crfs) * area
    return _CRF_S * area if config.expansion.method == "crf" else _SCORE_S


def _training_cost(backbone: str, training: TrainingConfig, num: int) -> Cost:
    weight, num_bytes = _BACKBONES.get(backbone, (10.0, 150e6))
    step_s = _STEP_S * weight * training.crop_px**2 / 224**2
    return Cost(num_bytes * _COPIES, num * training.epochs * step_s)


def check_cost(
    rows: Sequence[Planned], config: Config, work: Workspace, data: Manifest
) -> str | None:
    """A line that says what the run takes; None if everything is there.

    Raises:
        InputError: If the disk has not that much left.
    """
    if all(row.hit for row in rows):
        return None
    splits = work.dataset(data).splits
    some = splits["train"][:: max(1, len(splits["train"]) // 20)]
    sides = [_side_px(photo) for photo in some]
    counts = {name: len(photos) for name, photos in splits.items()}
    cost = estimate_cost(
        rows, config, photos=counts, side_px=sum(sides) / len(sides) if sides else 0
    )
    free = shutil.disk_usage(work.home).free
    if cost.num_bytes > free:
        raise InputError(
            f"the run needs about {cost.num_bytes / 1e9:.1f} GB, but {work.home} has only "
            f"{free / 1e9:.1f} GB free; free some, or set CONTA_HOME to a folder on another disk"
        )
    misses = sum(not row.hit for row in rows)
    on_cpu = work.device().type == "cpu"
    spent = f"about {_duration(cost.seconds)} on two cores, " if on_cpu else ""
    return (
        f"{misses} of {len(rows)} stages to compute: {spent}"
        f"about {cost.num_bytes / 1e6:.0f} MB of {free / 1e9:.0f} GB free"
    )


def _side_px(photo: TaggedPhoto) -> float:
    height, width = pixel_size(photo)
    return float(height * width) ** 0.5


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes / 60:.1f} h" if minutes >= 90 else f"{max(minutes, 1):.0f} min"
