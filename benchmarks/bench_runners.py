"""Seconds of the expansion stage over each of Prefect's task runners, and whether bytes agree.

python -m benchmarks.bench_runners [--photos 480] [--size 320]

Each figure is one whole stage in one process tree: the workers' start, the shards, the store. The
CAMs are bumps on generated scenes. Targets: two dask workers at least 1.6 times as fast as one, and
one digest for all.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.record import write_record
from flows import servers
from flows.environment import set_defaults
from wsss_core.config import Config, RuntimeConfig, parse_config
from wsss_core.records import Manifest
from wsss_core.seeds.cam import Cam, seed_size, write_cam
from wsss_core.stages.masks import expand_masks
from wsss_core.stages.scenes import make_scenes
from wsss_core.stages.stage import Job, Stage, Workspace
from wsss_core.store import Measured

SUITE = "runners"
ARMS = [("none", 1), ("none", 2), ("thread", 2), ("process", 2), ("dask", 1), ("dask", 2)]


def _write_bumps(out: Path, job: Job, *, data: Manifest) -> Measured:
    """A bump a tag, with a clear middle."""
    random = np.random.default_rng(0)
    size = job.settings["size"]
    y, x = np.mgrid[: seed_size((size, size))[0], : seed_size((size, size))[1]] / (size / 4)
    for photo in job.work.dataset(data).splits["train"]:
        centres = random.uniform(0.2, 0.8, (len(photo.tags), 2))
        bumps = [np.exp(-((y - v) ** 2 + (x - u) ** 2) / 0.02) for v, u in centres]
        cam = Cam(np.array(photo.tags), np.stack(bumps).astype(np.float32), (size, size))
        write_cam(out / f"{photo.id}.npz", cam)
    return Measured()


def expand_over_runners(config: Config, home: Path) -> None:
    """Time every arm on the same CAMs; the masks are removed in between."""
    from tasks.runners import choose_shard_map

    base = Workspace(home)
    data = make_scenes(config, base)
    bumps = Stage("cams", _write_bumps, lambda config: {"size": config.data.scenes.size_px})
    cams = bumps(config, base, data=data)
    digests, seconds = set(), {}
    for runner, workers in ARMS:
        runtime = RuntimeConfig.model_validate({"runner": runner, "workers": workers})
        work = replace(base, runtime=runtime, shard_map=choose_shard_map(home, runtime))
        started = time.perf_counter()
        masks = expand_masks(config, work, data=data, cams=cams)
        seconds[runner, workers] = time.perf_counter() - started
        digests.add(masks.digest)
        shutil.rmtree(work.folder(masks))
        shutil.rmtree(home / "scratch" / "masks")  # it keeps finished shards
        print(f"{runner} {workers}: {seconds[runner, workers]:.1f} s", file=sys.stderr)
    write_record(
        SUITE,
        "masks crf",
        {
            "seconds": {f"{runner} {n}": round(s, 2) for (runner, n), s in seconds.items()},
            "dask_ratio": round(seconds["dask", 1] / seconds["dask", 2], 2),
            "digests": len(digests),
            "photos": config.data.scenes.photos,
            "px": config.data.scenes.size_px,
        },
    )


def main() -> None:
    """Run the suite on a Prefect server of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=int, default=480)
    parser.add_argument("--size", type=int, default=320, help="side of a scene, in pixels")
    options = parser.parse_args()
    scenes = {"photos": options.photos, "val_photos": 8, "size_px": options.size}
    config = parse_config({"data": {"source": "scenes", "scenes": scenes}})
    os.environ.setdefault("PREFECT_LOGGING_TO_API_ENABLED", "false")  # no flow run to log to
    with tempfile.TemporaryDirectory(prefix="conta-bench-") as folder:
        set_defaults(Path(folder))
        server = servers.open_prefect(Path(folder))
        try:
            server.wait_ready()
            expand_over_runners(config, Path(folder))
        finally:
            servers.close_prefect(server)


if __name__ == "__main__":
    main()
