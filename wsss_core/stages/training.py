"""What the stages that train share: the machine of a job, a photo's crop and its labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float32, Integer
from torch import Tensor

from wsss_core.causal.pasting import BARE, BARE_SHARE, OWN, Picture, bare, paste
from wsss_core.config import TrainingConfig
from wsss_core.data.images import read_mask, read_pixels
from wsss_core.data.transforms import crop_labels, crop_photo, draw_crop
from wsss_core.records import Manifest, TaggedPhoto
from wsss_core.seeding import numpy_generator
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


@dataclass(frozen=True)
class Pasting:
    """Where the objects of a list of photos are put; see `pasting`.

    Attributes:
        context: `pasted` draws another photo's context; `pasted_bare` takes its objects out of half
            of them; `pasted_own` keeps the photo's.
        photos: Of which it is drawn.
        masks: Folder of `<photo id>.png`, by which objects are cut out.
        share: Of the photos that are changed.
    """

    context: str
    photos: Sequence[TaggedPhoto]
    masks: Path
    share: float


def plan_pasting(
    job: Job,
    photos: Sequence[TaggedPhoto],
    masks: Manifest | None,
    *,
    context: str | None,
    share: float,
) -> Pasting | None:
    """Pasting by an artifact of masks; None without a context, or before there are any."""
    if masks is None or context is None:
        return None
    return Pasting(context, photos, job.work.folder(masks), share)


def read_picture(photo: TaggedPhoto, masks: Path) -> Picture:
    """A photo with its `<photo id>.png`."""
    return Picture(read_pixels(photo), read_mask(masks / f"{photo.id}.png"), photo.tags)


def draw_picture(photo: TaggedPhoto, epoch: int, *, pasting: Pasting, seed: int) -> Picture:
    """A photo as it is, or one of its objects before a context as `pasting` says.

    A function of seed, epoch and photo. A photo whose masks are of no use is seen as it is.

    Args:
        photo: Gives the object.
        epoch: Counted from 0.
        pasting: What is drawn.
        seed: Of the stage.
    """
    random = numpy_generator(seed, "paste", epoch, photo.id)
    picture = read_picture(photo, pasting.masks)
    if random.random() >= pasting.share:
        return picture
    other = pasting.photos[int(random.integers(len(pasting.photos)))]
    onto = picture if pasting.context == OWN else read_picture(other, pasting.masks)
    if pasting.context == BARE and random.random() < BARE_SHARE:
        onto = bare(onto, random=random) or onto
    return paste(picture, onto, random=random) or picture


def crop_with_labels(
    picture: Picture, epoch: int, *, training: TrainingConfig, seed: int, photo_id: str
) -> tuple[Float32[Tensor, "3 c c"], Integer[Tensor, "c c"]]:
    """A random crop of a photo and of its mask; a function of seed, epoch and photo id."""
    crop = draw_crop(
        picture.mask.shape,
        long_side_px=training.long_side_px,
        crop_px=training.crop_px,
        seed=seed,
        epoch=epoch,
        photo_id=photo_id,
    )
    return crop_photo(picture.photo, crop), crop_labels(picture.mask, crop)
