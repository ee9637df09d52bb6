"""Seconds a photo from seeds to pseudo-masks: confident labels, boundary net, walk, CRF.

python -m benchmarks.bench_expansion [--size 320] [--crop 224] [--photos 8]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.record import time_calls, write_record
from wsss_core.config import BoundaryConfig, Config
from wsss_core.expansion import boundary_labels, crf, irn
from wsss_core.expansion.affinity import affinity_loss
from wsss_core.expansion.method import Seeded
from wsss_core.seeds.cam import seed_size, upsample_cam
from wsss_core.stages.boundary import boundary_maps, build_boundary_net

SUITE, CLASSES = "expansion", np.array([2, 7])


def draw_seeded(size: tuple[int, int], *, num: int) -> list[Seeded]:
    """Photos of random pixels with the seeds of two classes: bumps with a clear middle."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[: seed_size(size)[0], : seed_size(size)[1]] / seed_size(size)[1]
    made = []
    for _ in range(num):
        centres = random.uniform(0.2, 0.7, (2, 2))
        bumps = [np.exp(-((y - v) ** 2 + (x - u) ** 2) / 0.02) for v, u in centres]
        cam = np.stack(bumps).astype(np.float32)
        photo = random.integers(0, 256, (*size, 3), dtype=np.uint8)
        made.append(Seeded(photo, CLASSES, cam, upsample_cam(cam, size)))
    return made


def bench_training_step(*, crop_px: int, num: int) -> None:
    """Frozen trunk, edge branch and affinity loss of a batch, forward and backward; the loss alone.

    On as many threads as PyTorch takes by itself.
    """
    net = build_boundary_net(BoundaryConfig(), pretrained=False).train()
    net = net.to(memory_format=torch.channels_last)
    photos = torch.randn(num, 3, crop_px, crop_px).to(memory_format=torch.channels_last)
    side = -(-crop_px // 4)
    # patches of 8 cells: background twice, two classes, unsure
    patches = torch.tensor([0, 0, 1, 2, 255], dtype=torch.uint8)[
        torch.randint(5, (num, -(-side // 8), -(-side // 8)))
    ]
    labels = patches.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :side, :side]
    boundary = torch.rand(num, side, side)
    radius = BoundaryConfig().radius

    def step() -> None:
        loss = affinity_loss(net(photos).sigmoid(), labels, radius=radius)
        assert loss is not None
        loss.backward()  # type: ignore[no-untyped-call]

    calls: dict[str, Callable[[], object]] = {
        "train boundary": step,
        "affinity loss alone": lambda: affinity_loss(boundary, labels, radius=radius),
    }
    for name, call in calls.items():
        figures = time_calls(call)
        write_record(
            SUITE, name, {**figures, "a_photo_s": figures["median_s"] / num, "px": crop_px}
        )


def bench_masks(size: tuple[int, int], *, num: int) -> None:
    """Confident labels and both ways to masks, on one thread as the stages' workers have it."""
    net, config = build_boundary_net(BoundaryConfig(), pretrained=False).eval(), Config()
    net = net.to(memory_format=torch.channels_last)
    seeded = draw_seeded(size, num=num)
    pixels = np.stack([photo.photo for photo in seeded])

    def label() -> None:
        settings = boundary_labels.choose_settings(config)
        for photo in seeded:
            boundary_labels.label_confidently(photo.photo, photo.scores, CLASSES, settings)

    def walk() -> None:
        maps = boundary_maps(net, pixels)
        walkers = [
            Seeded(photo.photo, CLASSES, photo.cam, photo.scores, edges)
            for photo, edges in zip(seeded, maps, strict=True)
        ]
        irn.expand(walkers, irn.choose_settings(config))

    calls: dict[str, Callable[[], object]] = {
        "boundary labels": label,
        "boundary maps": lambda: boundary_maps(net, pixels),
        "masks irn": walk,
        "masks crf": lambda: crf.expand(seeded, crf.choose_settings(config)),
    }
    for name, call in calls.items():
        figures = time_calls(call)
        write_record(
            SUITE, name, {**figures, "a_photo_s": figures["median_s"] / num, "px": list(size)}
        )


def main() -> None:
    """Run all measurements of the suite."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=320, help="long side of the photo, in pixels")
    parser.add_argument("--crop", type=int, default=224, help="side of a training crop, in pixels")
    parser.add_argument("--photos", type=int, default=8, help="photos a batch")
    options = parser.parse_args()
    torch.manual_seed(0)
    bench_training_step(crop_px=options.crop, num=options.photos)
    torch.set_num_threads(1)
    bench_masks((options.size * 3 // 4, options.size), num=options.photos)


if __name__ == "__main__":
    main()
