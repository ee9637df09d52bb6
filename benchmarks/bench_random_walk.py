"""Seconds a photo of IRNet's random walk, beside the dense matrix squared eight times.

python -m benchmarks.bench_random_walk [--plot]

`--plot` also draws docs/img/random_walk.png: seconds against cells, both forms.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.record import time_calls, write_record
from wsss_core.expansion.paths import half_plane_offsets, pair_ends, path_maximum
from wsss_core.expansion.random_walk import propagate

SUITE, RADIUS, BETA, LOG2_STEPS = "random_walk", 5, 10, 8
PHOTO = (94, 125)  # 375 x 500 px at stride 4
LARGEST = (160, 160)  # 640 x 640 px, as in COCO
SIZES = ((32, 32), (48, 48), (64, 64), PHOTO, LARGEST)
DENSE_SIZES = SIZES[:3]  # 64 x 64 cells are 16.8 million entries and 1.1 TFLOP
PLOT = Path(__file__).parents[1] / "docs" / "img" / "random_walk.png"

Walk = Callable[[Tensor, Tensor], Tensor]


def draw_photo(cells: tuple[int, int], classes: int) -> tuple[Tensor, Tensor]:
    """Seeds and boundaries of blobs: most cells are passable, some hardly."""
    torch.manual_seed(0)
    coarse = torch.rand(1, classes + 1, cells[0] // 8 + 2, cells[1] // 8 + 2)
    maps = torch.nn.functional.interpolate(coarse, cells, mode="bilinear")[0]
    return maps[:classes], maps[classes] ** 4


def walk_dense(seeds: Tensor, boundary: Tensor) -> Tensor:
    """The walk with all (hw)^2 entries of T, squared, as in irn."""
    numbers = torch.arange(boundary.numel()).view(boundary.shape)
    transition = torch.eye(boundary.numel())
    for offset in half_plane_offsets(RADIUS):
        first, second = pair_ends(numbers, offset)
        affinity = (1 - path_maximum(boundary, offset)) ** BETA
        transition[first, second] = transition[second, first] = affinity
    transition /= transition.sum(0)
    for _ in range(LOG2_STEPS):
        transition = transition @ transition
    return ((seeds * (1 - boundary)).flatten(1) @ transition).view_as(seeds)


def bench_sizes() -> list[tuple[int, float]]:
    """Two classes at every size; returns (cells, seconds) on one thread."""
    seconds = []
    for size in SIZES:
        for threads in (2, 1):
            torch.set_num_threads(threads)
            figures = time_calls(functools.partial(propagate, *draw_photo(size, 2)))
            write_record(SUITE, "walk", {**figures, "cells": list(size), "classes": 2})
        seconds.append((size[0] * size[1], figures["median_s"]))
    return seconds


def bench_classes() -> None:
    """One photo with 1 to 6 classes, on one thread."""
    torch.set_num_threads(1)
    for classes in range(1, 7):
        figures = time_calls(functools.partial(propagate, *draw_photo(PHOTO, classes)))
        write_record(SUITE, "walk", {**figures, "cells": list(PHOTO), "classes": classes})


def bench_dense() -> list[tuple[int, float]]:
    """Both forms side by side on one thread, and how far apart they come out."""
    torch.set_num_threads(1)
    seconds = []
    for size in DENSE_SIZES:
        photo = draw_photo(size, 2)
        dense = time_calls(functools.partial(walk_dense, *photo), repeats=2, warm_up=0)
        ours = time_calls(functools.partial(propagate, *photo))
        reference, found = walk_dense(*photo), propagate(*photo)
        compared = {
            "cells": list(size),
            "classes": 2,
            "walk_s": ours["median_s"],
            "ratio": dense["median_s"] / ours["median_s"],
            "difference": float((found - reference).abs().max() / reference.max()),
            "same_argmax": float((found.argmax(0) == reference.argmax(0)).float().mean()),
        }
        write_record(SUITE, "dense", dense | compared)
        seconds.append((size[0] * size[1], dense["median_s"]))
    return seconds


def bench_memory() -> None:
    """Peak of a fresh process, and how much of it came with the walk."""
    spawn = multiprocessing.get_context("spawn")
    for name, walk, size in (("walk", propagate, LARGEST), ("dense", walk_dense, DENSE_SIZES[-1])):
        for classes in (2, 6):
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                figures = pool.submit(measure_peak, walk, size, classes).result()
            figures |= {"cells": list(size), "classes": classes}
            write_record(SUITE, f"memory of {name}", figures)


def measure_peak(walk: Walk, size: tuple[int, int], classes: int) -> dict[str, object]:
    """MB of this process at its largest, and by how much a walk raised it; Linux only."""
    torch.set_num_threads(1)
    walk(*draw_photo((8, 8), classes))
    before = read_peak_mb()
    walk(*draw_photo(size, classes))
    after = read_peak_mb()
    return {"peak_mb": after, "rise_mb": after - before}


def read_peak_mb() -> float:
    """Largest resident size so far; unlike `ru_maxrss` it is not the parent's after a spawn."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def bench_cuda() -> None:
    """A batch on the GPU."""
    for photos in (1, 16):
        seeds, boundary = (maps.cuda() for maps in draw_photo(PHOTO, 2))
        batch = seeds.expand(photos, -1, -1, -1), boundary.expand(photos, -1, -1)
        figures = time_calls(functools.partial(propagate, *batch))
        a_photo = {"a_photo_s": figures["median_s"] / photos, "photos": photos}
        write_record(SUITE, "walk on cuda", figures | a_photo | {"cells": list(PHOTO)})


def plot(walk: list[tuple[int, float]], dense: list[tuple[int, float]]) -> None:
    """Seconds a photo against cells; measured points only."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.loglog(*zip(*dense, strict=True), "s-", label="dense, 8 squarings")
    axes.loglog(*zip(*walk, strict=True), "o-", label="Chebyshev, 78 sparse products")
    axes.axvline(PHOTO[0] * PHOTO[1], color="grey", linestyle=":", label="photo of 375 x 500 px")
    axes.set(xlabel="cells of the boundary map", ylabel="seconds a photo, one thread")
    axes.grid(which="major", alpha=0.3)
    axes.legend()
    figure.savefig(PLOT, dpi=120)


def main() -> None:
    """Run all measurements of the suite."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", action="store_true", help=f"draw {PLOT.name} into docs/img")
    wanted = parser.parse_args()
    if torch.cuda.is_available():
        bench_cuda()
    walk = bench_sizes()
    bench_classes()
    dense = bench_dense()
    if Path("/proc").exists():
        bench_memory()
    if wanted.plot:
        plot(walk, dense)


if __name__ == "__main__":
    main()
