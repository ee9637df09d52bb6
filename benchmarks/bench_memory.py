"""What a stage's work spends with and without `keep_memory`, and `release_memory` after each shard.

python -m benchmarks.bench_memory [--photos 8]
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import resource
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.bench_stages import build_plain_classifier
from benchmarks.record import write_record
from wsss_core.models.backbones import set_training_mode
from wsss_core.models.classifier import multilabel_loss
from wsss_core.stages.cams import class_activation_maps
from wsss_core.workers import keep_memory, release_memory

SUITE, HEIGHT_PX, WIDTH_PX, BATCH = "memory", 240, 320, 4


def make_cams(photos: int) -> None:
    """CAMs at the scales of the voc_animals recipe, four photos at a time."""
    model = build_plain_classifier().eval().to(memory_format=torch.channels_last)
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH, HEIGHT_PX, WIDTH_PX, 3), np.uint8)
    for _ in range(max(1, photos // BATCH)):
        class_activation_maps(model, pixels, None, scales=(1.0, 1.5, 2.0))


def make_cams_of_shards(shards: int, *, release: bool) -> None:
    """CAMs of shards as photos come: four lying, four standing, and one of a size of its own."""
    model = build_plain_classifier().eval().to(memory_format=torch.channels_last)
    for shard in range(shards):
        odd = (1, HEIGHT_PX + 8 * shard, WIDTH_PX - 8 * shard)
        for shape in ((BATCH, HEIGHT_PX, WIDTH_PX), (BATCH, WIDTH_PX, HEIGHT_PX), odd):
            pixels = np.zeros((*shape, 3), np.uint8)
            class_activation_maps(model, pixels, None, scales=(1.0, 1.5, 2.0))
        if release:
            release_memory()


def train_classifier(photos: int) -> None:
    """Training steps of 16 crops of 256 px."""
    model = build_plain_classifier().to(memory_format=torch.channels_last)
    set_training_mode(model, batch_norm_frozen=True)
    views = torch.randn(16, 3, 256, 256).to(memory_format=torch.channels_last)
    tags = torch.ones(16, 8)
    for _ in range(max(1, photos // 4)):
        multilabel_loss(model(views), tags).backward()  # type: ignore[no-untyped-call]


def spend(work: Callable[[int], None], photos: int, *, keep: bool) -> dict[str, float]:
    """What a fresh process spends on some work, after having done a part of it once."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_spend, (work, photos, keep))


def _spend(work: Callable[[int], None], photos: int, keep: bool) -> dict[str, float]:
    torch.set_num_threads(1)
    if keep:
        keep_memory()
    work(BATCH)
    before = resource.getrusage(resource.RUSAGE_SELF)
    work(photos)
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "user_s": after.ru_utime - before.ru_utime,
        "system_s": after.ru_stime - before.ru_stime,
        "page_faults": float(after.ru_minflt - before.ru_minflt),
        "peak_mb": after.ru_maxrss / 1024,
    }


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--photos", type=int, default=8)
    photos: int = parser.parse_args().photos
    for work in (make_cams, train_classifier):
        with_, without = (spend(work, photos, keep=keep) for keep in (True, False))
        ratio = (without["user_s"] + without["system_s"]) / (with_["user_s"] + with_["system_s"])
        figures = {"photos": photos, "cpu_ratio": ratio, "with": with_, "without": without}
        write_record(SUITE, work.__name__, figures)
    released, kept = (
        spend(functools.partial(make_cams_of_shards, release=release), photos, keep=True)
        for release in (True, False)
    )
    ratio = kept["peak_mb"] / released["peak_mb"]
    figures = {"shards": photos, "peak_ratio": ratio, "released": released, "kept": kept}
    write_record(SUITE, "release", figures)


if __name__ == "__main__":
    main()
