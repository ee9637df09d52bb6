"""What the stages that train share: the machine of a job, a photo's crop and its labels."""

from __future__ import annotations

from pathlib import Path

from jaxtyping import Float32, Integer
from torch import Tensor

from wsss_core.config import TrainingConfig
from wsss_core.data.images import read_mask, read_photo
from wsss_core.data.transforms import crop_labels, crop_photo, draw_crop
from wsss_core.records import TaggedPhoto
from wsss_core.stages.stage import Job
from wsss_core.training.loop import Machine


def machine_of(job: Job) -> Machine:
    """Where a job trains, as its workspace says."""
    return Machine(
        device=job.work.device(),
        amp=job.amp,
        threads=job.work.runtime.threads,
        scratch=job.scratch,
        recorder=job.work.recorder,
        num_devices=job.work.runtime.devices,
    )


def crop_with_labels(
    photo: TaggedPhoto, epoch: int, *, masks: Path, training: TrainingConfig, seed: int
) -> tuple[Float32[Tensor, "3 c c"], Integer[Tensor, "c c"]]:
    """A random crop of a photo and of `<photo id>.png`; a function of seed, epoch and photo."""
    pixels = read_photo(photo.path)
    crop = draw_crop(
        pixels.shape[:2],
        long_side_px=training.long_side_px,
        crop_px=training.crop_px,
        seed=seed,
        epoch=epoch,
        photo_id=photo.id,
    )
    return crop_photo(pixels, crop), crop_labels(read_mask(masks / f"{photo.id}.png"), crop)
