"""Stages that write a line where the real ones work for hours, under their names."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace

from PIL import Image

from tasks import stages as real
from tasks.policy import StagePolicy
from wsss_core.stages.stage import Stage
from wsss_core.store import Measured

NUM_PHOTOS = 3


@dataclass
class Toys:
    """What the toys did.

    Attributes:
        calls: Names of the stages whose `write` ran, in order.
        errors: What the next call of a stage raises, once.
        with_truth: Photos that have a true mask; p0 alone is on the list val.
    """

    calls: list[str] = field(default_factory=list)
    errors: dict[str, BaseException] = field(default_factory=dict)
    with_truth: tuple[str, ...] = tuple(f"p{i}" for i in range(NUM_PHOTOS))

    def take_calls(self):
        taken, self.calls[:] = list(self.calls), []
        return taken


def install(monkeypatch):
    """Put a toy behind every task; returns what they do."""
    toys = Toys()
    for name in list(vars(real)):
        policy = getattr(getattr(real, name), "cache_policy", None)
        if isinstance(policy, StagePolicy):
            toy = replace(policy.stage, write=_writer(toys, policy.stage.name))
            monkeypatch.setattr(policy, "stage", toy)
            monkeypatch.setattr(real, f"_{name}", toy)
    truth = Stage("truth", _writer(toys, "truth"), lambda config: {})
    monkeypatch.setattr(real, "_index_truth", truth)
    return toys


def _writer(toys, stage):
    def write(out, job, **inputs):
        toys.calls.append(f"{stage}/{inputs['split']}" if "split" in inputs else stage)
        if stage in toys.errors:
            raise toys.errors.pop(stage)
        known = {n: getattr(value, "digest", value) for n, value in sorted(inputs.items())}
        text = json.dumps([stage, str(job.settings), known])
        (out / "what.txt").write_text(text)
        if stage in ("draw_panels", "draw_context"):
            name = "panel.png" if stage == "draw_panels" else "context.png"
            Image.effect_noise((64, 48), 50).save(out / name)
        if stage == "scenes":
            _write_photos(out)
        if stage == "truth":
            (out / "truth.json").write_text(json.dumps(dict.fromkeys(toys.with_truth, "")))
        score = int(hashlib.sha256(text.encode()).hexdigest()[:4], 16) / 65536
        return Measured(
            {metric.format(**inputs): score for metric in _METRICS.get(stage, ())},
            [{"epoch": e, "loss": 1.0 / (e + 1)} for e in range(2)] if stage in _NETS else [],
        )

    return write


_NETS = ("classifier", "boundary", "segmenter")
_METRICS = {
    "score_classifier": ("classifier/map",),
    "calibrate_seeds": ("calibrate_seeds/threshold",),
    "score_cams": ("cam/miou",),
    "score_masks": ("pseudo/miou",),
    "score_segmenter": ("seg_{split}/miou",),
    "check_tags": ("tag_agreement", "stability"),
}


def _write_photos(out):
    ids = [f"p{i}" for i in range(NUM_PHOTOS)]
    for photo_id in ids:
        Image.new("RGB", (40, 30)).save(out / f"{photo_id}.png")
    photos = [{"id": i, "file": f"{i}.png", "sha256": "", "tags": [0]} for i in ids]
    document = {"classes": ["cat"], "photos": photos, "splits": {"train": ids[1:], "val": ids[:1]}}
    (out / "dataset.json").write_text(json.dumps(document))
