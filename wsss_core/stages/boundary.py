"""Stage `boundary`: the boundary network trained on the confident labels (IRNet)."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float32, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wsss_core.config import BoundaryConfig
from wsss_core.data.transforms import normalise, resize_photo, scaled_size
from wsss_core.expansion.affinity import affinity_loss, count_pairs
from wsss_core.models.backbones import build_backbone, set_training_mode
from wsss_core.models.boundary import STRIDE_PX, BoundaryNet, initialise_branches
from wsss_core.records import Manifest, TaggedPhoto
from wsss_core.seeding import derive_seed, torch_generator
from wsss_core.stages.stage import Job, Stage
from wsss_core.stages.training import crop_with_labels, machine_of, read_picture
from wsss_core.store import Measured
from wsss_core.training.distributed import sum_over_ranks
from wsss_core.training.loop import Batch, Trainable, train

WEIGHTS, DESCRIPTION = "boundary.safetensors", "boundary.json"
OUTPUT_STRIDE = 16  # irn: layer4 keeps the stride of layer3


def build_boundary_net(settings: BoundaryConfig, *, pretrained: bool, seed: int = 0) -> BoundaryNet:
    """An untrained boundary network."""
    backbone = build_backbone(
        settings.backbone,
        pretrained=pretrained,
        output_stride=OUTPUT_STRIDE,
        seed=derive_seed(seed, "trunk"),
    )
    net = BoundaryNet(backbone)
    initialise_branches(net, torch_generator(seed, "branches"))
    return net


def load_boundary_net(folder: Path) -> BoundaryNet:
    """The trained boundary network of an artifact, in evaluation mode on CPU."""
    description = json.loads((folder / DESCRIPTION).read_text())
    settings = BoundaryConfig.model_validate(description["boundary"])
    net = build_boundary_net(settings, pretrained=False)
    net.load_state_dict(load_file(folder / WEIGHTS))
    return net.eval()


@torch.inference_mode()
def boundary_maps(
    net: BoundaryNet, photos: UInt8[np.ndarray, "b h w 3"], *, scales: Sequence[float] = (1.0,)
) -> Float32[Tensor, "b h4 w4"]:
    """Boundary probabilities of equally sized photos at stride 4, on the network's device.

    The mean over scales of the sigmoid of the mean logit of photo and mirrored photo; irn
    (make_sem_seg_labels.py) has the one scale 1. Photos are padded with their mean colour, to whole
    cells before they are mirrored, so that both views have the same cells, and then to what the
    trunk divides; nothing is cut off.

    Args:
        net: In evaluation mode.
        photos: RGB, 0..255, of any size.
        scales: Of the photos' sides.
    """
    device = next(net.parameters()).device
    cells = [-(-side // STRIDE_PX) for side in photos.shape[1:3]]
    maps = []
    for scale in scales:
        size = scaled_size(photos.shape[1:3], scale, multiple=1)
        resized = torch.stack([resize_photo(photo, size) for photo in photos])
        views = _pad_to(normalise(resized), STRIDE_PX)
        height, width = views.shape[-2] // STRIDE_PX, views.shape[-1] // STRIDE_PX
        views = _pad_to(torch.cat([views, views.flip(-1)]), OUTPUT_STRIDE)
        logits = net(views.to(device, memory_format=torch.channels_last)).float()
        plain, mirrored = logits[:, :height, :width].chunk(2)
        found = ((plain + mirrored.flip(-1)) / 2).sigmoid()
        maps.append(F.interpolate(found[None], cells, mode="bilinear", align_corners=False)[0])
    return torch.stack(maps).mean(dim=0)


def _pad_to(views: Tensor, multiple: int) -> Tensor:
    height, width = views.shape[-2:]
    return F.pad(views, (0, -width % multiple, 0, -height % multiple))


def _write(out: Path, job: Job, *, data: Manifest, labels: Manifest) -> Measured:
    settings: BoundaryConfig = job.settings
    net = build_boundary_net(settings, pretrained=settings.pretrained, seed=job.seed)
    history = train(
        Trainable(
            "expansion.irn.boundary",  # where its settings are, for messages
            net,
            net.new_parameters(),
            functools.partial(_loss, radius=settings.radius),
            functools.partial(set_training_mode, batch_norm_frozen=True),
        ),
        items=job.work.dataset(data).splits["train"],
        view=functools.partial(
            _view, labels=job.work.folder(labels), settings=settings, seed=job.seed
        ),
        config=settings.training,
        seed=job.seed,
        machine=machine_of(job),
    )
    save_file({name: t.contiguous() for name, t in net.state_dict().items()}, out / WEIGHTS)
    description = {"boundary": settings.model_dump(mode="json")}
    (out / DESCRIPTION).write_text(json.dumps(description, sort_keys=True))
    return Measured(
        {"boundary/loss": history[-1]["loss"], "boundary/skipped": history[-1]["skipped"]},
        history,
    )


def _view(
    photo: TaggedPhoto, epoch: int, *, labels: Path, settings: BoundaryConfig, seed: int
) -> Batch:
    picture = read_picture(photo, labels)
    pixels, full = crop_with_labels(
        picture, epoch, training=settings.training, seed=seed, photo_id=photo.id
    )
    return {"photo": pixels, "labels": shrink_labels(full)}


def shrink_labels(labels: Tensor) -> Tensor:
    """Labels (H,W) at the cells (ceil(H/4), ceil(W/4)) of the boundary map, nearest, uint8."""
    size = [-(-side // STRIDE_PX) for side in labels.shape]
    return F.interpolate(labels.to(torch.uint8)[None, None], size, mode="nearest-exact")[0, 0]


def _loss(model: nn.Module, batch: Batch, *, radius: int) -> Tensor | None:
    labels: Tensor = batch["labels"]
    counts = sum_over_ranks(count_pairs(labels, radius=radius))
    if not counts.any():
        return None
    boundary = model(batch["photo"]).float().sigmoid()
    return affinity_loss(boundary, labels, radius=radius, counts=counts)


train_boundary = Stage(
    "boundary", _write, lambda config: config.expansion.irn.boundary, seeded=True
)
