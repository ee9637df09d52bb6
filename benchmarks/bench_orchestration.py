"""What Prefect and MLflow cost beside the stages: a whole run, and a run that has nothing to do.

python -m benchmarks.bench_orchestration [--recipe recipes/scenes_smoke.yaml] [--pairs 3]

Every arm is a fresh process in a fresh home, timed from its start to its end. `conta run` brings
its own Prefect server; the direct arm calls the same stages in the same order by hand. The run with
nothing to do is a second `conta run` beside a `conta ui`. Targets: 3 % and 15 s; 10 s.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.record import write_record

SUITE = "orchestration"
ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "scenes.yaml"
CONTA = [sys.executable, "-m", "flows.cli"]
NOTHING_TO_DO = 3


def call_stages(recipe: Path, home: Path) -> None:
    """Do the rounds of a recipe without Prefect's engine and MLflow; prints what to subtract.

    The rounds are written in terms of Prefect's tasks, so Prefect is imported here too; that is not
    part of calling the stages.
    """
    started = time.perf_counter()
    import prefect.results
    import prefect.tasks  # noqa: F401

    imported_s = time.perf_counter() - started
    from flows.rounds import open_truth, run_rounds
    from tasks.policy import stage_of
    from wsss_core.config import Config, load_recipe
    from wsss_core.records import Manifest
    from wsss_core.stages.data import index_truth
    from wsss_core.stages.scenes import make_scenes
    from wsss_core.stages.stage import Workspace

    config = load_recipe(recipe)
    work = Workspace(home, runtime=config.runtime)
    data = make_scenes(config, work)
    masks = index_truth(config, work, data=data)
    truth = open_truth(config, work, data, masks)

    class Direct:
        def begin_round(self, number: int, settings: Config) -> None:
            self.settings = settings

        def __call__(self, task: Any, *, config: Config | None = None, **inputs: Any) -> Manifest:
            return stage_of(task)(config or self.settings, work, data=data, **inputs)

    run_rounds(config, truth, Direct())
    print(json.dumps({"imported_s": imported_s}))


def time_direct(recipe: Path, home: Path) -> float:
    """Seconds of the direct arm, without the import of Prefect."""
    command = [sys.executable, "-m", "benchmarks.bench_orchestration"]
    command += ["--recipe", str(recipe), "--direct", str(home)]
    started = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    seconds = time.perf_counter() - started
    return seconds - json.loads(done.stdout.splitlines()[-1])["imported_s"]


def time_conta(recipe: Path, home: Path) -> float:
    """Seconds of `conta run`."""
    started = time.perf_counter()
    subprocess.run(
        [*CONTA, "run", str(recipe)],
        check=True,
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "CONTA_HOME": str(home)},
    )
    return time.perf_counter() - started


def time_nothing(recipe: Path, home: Path) -> list[float]:
    """Seconds of each `conta run` of a finished run, beside a live `conta ui`."""
    environment = {**os.environ, "CONTA_HOME": str(home)}
    with subprocess.Popen(
        [*CONTA, "ui"], stdout=subprocess.DEVNULL, cwd=ROOT, env=environment
    ) as pages:
        try:
            while not (home / "ui.json").exists():
                if pages.poll() is not None:
                    raise SystemExit("conta ui ended by itself")
                time.sleep(0.2)
            return [time_conta(recipe, home) for _ in range(NOTHING_TO_DO)]
        finally:
            pages.terminate()


def count_stages(home: Path) -> int:
    """Artifacts of a home's runs: both arms have to have made the same."""
    return len(list((home / "store").glob("*/[!.]*/manifest.json")))


def main() -> None:
    """Run the pairs, then the runs with nothing to do in the last home."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--direct", type=Path, metavar="HOME", help="be the direct arm")
    options = parser.parse_args()
    if options.direct is not None:
        call_stages(options.recipe, options.direct)
        return
    with tempfile.TemporaryDirectory(prefix="conta-bench-") as scratch:
        direct, conta = [], []
        for number in range(options.pairs):
            homes = [Path(scratch) / f"direct-{number}", Path(scratch) / f"conta-{number}"]
            for arm in (0, 1) if number % 2 == 0 else (1, 0):  # a drift hits both arms
                if arm == 0:
                    direct.append(time_direct(options.recipe, homes[0]))
                else:
                    conta.append(time_conta(options.recipe, homes[1]))
            assert count_stages(homes[0]) == count_stages(homes[1])
        nothing = time_nothing(options.recipe, homes[1])
    middle = statistics.median(direct)
    over = statistics.median(c - d for c, d in zip(conta, direct, strict=True))
    what = {"recipe": options.recipe.stem, "repeats": float(options.pairs)}
    figures = {"direct_s": direct, "conta_s": conta, "over_s": over}
    write_record(SUITE, "whole run", what | figures | {"allowed_s": 0.03 * middle + 15.0})
    median = {"median_s": statistics.median(nothing), "each_s": nothing, "allowed_s": 10.0}
    write_record(SUITE, "nothing to do", what | median)


if __name__ == "__main__":
    main()
