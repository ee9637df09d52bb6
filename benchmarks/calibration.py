"""How near thresholds chosen without truth come to those that truth would choose.

python -m benchmarks.calibration RUN --data DIR [--round 0] [--method crf] [--thresholds 0.2 auto]

Expands the CAMs of one round of a run at every threshold of a grid, `auto` among them, and prints
the pseudo-masks' mIoU. The best of the grid is an oracle: it is printed here and used nowhere. What
it makes stays in the store, so a second call is quick.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.record import write_record
from flows.environment import resolve_home
from flows.runs import Run, find_run
from wsss_core.config import Config, parse_config
from wsss_core.observe import ConsoleRecorder
from wsss_core.stages.boundary import train_boundary
from wsss_core.stages.boundary_labels import label_boundaries
from wsss_core.stages.calibrate import adopt_seeds, adopt_walk, calibrate_seeds, calibrate_walk
from wsss_core.stages.masks import expand_masks
from wsss_core.stages.scores import score_masks
from wsss_core.stages.stage import Workspace

Expand = Callable[[float | None], tuple[Config, dict[str, float]]]
"""From a threshold, None for `auto`, to the settings it gives and the metrics of its masks."""


def expander(method: str, run: Run, work: Workspace, *, number: int) -> Expand:
    """What expands the CAMs of a run's round of that number by a method."""
    made = run.rounds[number].manifests if 0 <= number < len(run.rounds) else {}
    if not {"classifier", "cams"} <= made.keys():
        sys.exit(f"run {run.name} has no classifier with CAMs in round {number}; give another")
    of_round = parse_config(run.config).at_round(number).model_dump(mode="json")
    tree = of_round | {"expansion": of_round["expansion"] | {"method": method}}
    base = parse_config(tree)
    data = run.shared["scenes" if "scenes" in run.shared else "dataset"]
    photos = {"data": data, "cams": made["cams"]}
    former = run.rounds[number - 1].manifests if number else {}
    # as `Made.x_m` of the flow
    x_m = former["predictions/train"] if "confounders" in former else None
    judged = photos | {"classifier": made["classifier"], "x_m": x_m}
    boundary = None
    if base.seeds.threshold == "auto":
        base = adopt_seeds(base, calibrate_seeds(base, work, **judged))
        tree["seeds"] = base.seeds.model_dump(mode="json")
    if method == "irn":
        if "auto" in (base.expansion.irn.beta, base.expansion.irn.log2_steps):
            sys.exit("this run chose beta or log2_steps itself; give a run where they are numbers")
        labels = label_boundaries(base, work, **photos)
        boundary = train_boundary(base, work, data=data, labels=labels)

    def with_threshold(threshold: float | str) -> Config:
        group = tree["seeds"] if method == "crf" else tree["expansion"]["irn"]
        group["threshold"] = threshold
        return parse_config(tree)

    def expand(threshold: float | None) -> tuple[Config, dict[str, float]]:
        if threshold is not None:
            config = with_threshold(threshold)
        elif method == "crf":
            config = adopt_seeds(base, calibrate_seeds(base, work, **judged))
        else:
            auto = with_threshold("auto")
            config = adopt_walk(auto, calibrate_walk(auto, work, **judged, boundary=boundary))
        masks = expand_masks(config, work, **photos, boundary=boundary)
        scores = score_masks(config, work, data=data, truth=run.shared["truth"], masks=masks)
        return config, scores.metrics

    return expand


def main() -> None:
    """Score every threshold of the grid, and the one chosen without truth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="a run with truth masks, or `latest`")
    parser.add_argument("--data", type=Path, help="folder of its photos")
    parser.add_argument("--method", choices=("crf", "irn"), default="crf")
    parser.add_argument("--round", type=int, default=0)
    grid = [0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, None]
    parser.add_argument("--thresholds", nargs="+", type=read_threshold, default=grid)
    options = parser.parse_args()
    run = find_run(resolve_home(), options.run)
    runtime = parse_config(run.config).runtime
    work = Workspace(resolve_home(), options.data, runtime, ConsoleRecorder())
    expand = expander(options.method, run, work, number=options.round)
    scores = {
        value: expand(value)[1]["pseudo/miou"] for value in options.thresholds if value is not None
    }
    record = {"run": run.name, "round": options.round, "miou": scores}
    if scores:
        best = max(scores, key=scores.__getitem__)
        record |= {"oracle_threshold": best, "oracle_miou": scores[best]}
    if None in options.thresholds:
        config, auto = expand(None)
        chosen = {"threshold": config.seeds.threshold}
        if options.method == "irn":
            chosen = config.expansion.irn.model_dump(include={"threshold", "beta", "log2_steps"})
        record |= {"auto": chosen, "auto_miou": auto["pseudo/miou"]}
    write_record("calibration", options.method, record)


def read_threshold(text: str) -> float | None:
    """A number; None for `auto`."""
    try:
        return None if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from None


if __name__ == "__main__":
    main()
