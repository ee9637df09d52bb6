"""Stage `scenes`: generated pictures in a person's place; its manifest is the data manifest."""

from __future__ import annotations

from pathlib import Path

from wsss_core.data.scenes import write_scenes
from wsss_core.stages.stage import Job, Stage
from wsss_core.store import Measured


def _write(out: Path, job: Job) -> Measured:
    write_scenes(out, job.settings, job.work.recorder)
    return Measured()


# Unseeded: the generator has a seed of its own, so runs of different seeds share their scenes.
make_scenes = Stage("scenes", _write, lambda config: config.data.scenes)
