"""An exact training step against an NWGM step, by fusion, and with two confounders drawn.

python -m benchmarks.bench_adjustment [--size 224] [--batch 16] [--classes 8]
"""

from __future__ import annotations

import argparse
import functools

import numpy as np
import torch

from benchmarks.record import time_calls, write_record
from wsss_core.causal.confounders import ConfounderSet
from wsss_core.config import CausalConfig, ClassifierConfig
from wsss_core.models.backbones import freeze, set_training_mode
from wsss_core.models.classifier import multilabel_loss
from wsss_core.stages.classifier import ContextClassifier, build_classifier
from wsss_core.training.loop import Batch
from wsss_core.workers import keep_memory

SUITE, CONTEXT_CELLS = "adjustment", 32


def build_steps(fusion: str, *, num_classes: int) -> dict[str, ContextClassifier]:
    """A lite0 classifier under each adjustment, blocks 1 and 2 and BatchNorm frozen."""
    random = np.random.default_rng(0)
    confounders = ConfounderSet(
        c=random.random((num_classes, CONTEXT_CELLS, CONTEXT_CELLS), np.float32),
        counts=np.ones(num_classes, np.int64),
        prior=np.full(num_classes, 1 / num_classes, np.float32),
    )
    models = {}
    for adjustment in ("nwgm", "exact"):
        model = build_classifier(
            ClassifierConfig(pretrained=False),
            CausalConfig.model_validate({"adjustment": adjustment, "fusion": fusion}),
            num_classes,
            confounders=confounders,
            x_m_rms=1.0,
            seed=0,
            pretrained=False,
        )
        freeze(model.classifier.backbone, until=2, batch_norm=True)
        set_training_mode(model, batch_norm_frozen=True)
        models[adjustment] = model.to(memory_format=torch.channels_last)
    return models


def draw_batch(size_px: int, *, batch: int, num_classes: int) -> Batch:
    """Random photos with tags, X_m, whole-photo views and two confounders each."""
    whole = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    photos = torch.randn(batch, 3, size_px, size_px)
    return {
        "photo": photos.to(memory_format=torch.channels_last),
        "tags": torch.randint(0, 2, (batch, num_classes)).float(),
        "x_m": torch.rand(batch, CONTEXT_CELLS, CONTEXT_CELLS),
        "affine": whole.expand(batch, 2, 3),
        "draw": torch.randint(0, num_classes, (batch, 2)),
    }


def step(model: ContextClassifier, batch: Batch, *, drawn: bool) -> None:
    """Forward, loss and backward."""
    draw = batch["draw"] if drawn else None
    logits = model(batch["photo"], batch["x_m"], batch["affine"], draw)
    multilabel_loss(logits, batch["tags"]).backward()  # type: ignore[no-untyped-call]


def bench_fusion(fusion: str, batch: Batch, *, num_classes: int) -> None:
    """The three steps side by side; ratios are to NWGM's in the same run."""
    models = build_steps(fusion, num_classes=num_classes)
    calls = {
        "nwgm": functools.partial(step, models["nwgm"], batch, drawn=False),
        "exact": functools.partial(step, models["exact"], batch, drawn=False),
        "exact, 2 drawn": functools.partial(step, models["exact"], batch, drawn=True),
    }
    base = None
    for name, call in calls.items():
        figures = time_calls(call)
        base = base or figures["median_s"]
        facts = {"ratio_to_nwgm": figures["median_s"] / base, "classes": num_classes}
        facts |= {"px": batch["photo"].shape[-1], "batch": len(batch["photo"])}
        write_record(SUITE, f"{fusion}: {name}", figures | facts)


def main() -> None:
    """Run all measurements of the suite."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=224, help="side of the crops, in pixels")
    parser.add_argument("--batch", type=int, default=16, help="photos a step")
    parser.add_argument("--classes", type=int, default=8, help="n, confounders of the sum")
    given = parser.parse_args()
    keep_memory()  # as every stage does
    torch.manual_seed(0)
    batch = draw_batch(given.size, batch=given.batch, num_classes=given.classes)
    for fusion in ("head", "block5"):
        bench_fusion(fusion, batch, num_classes=given.classes)


if __name__ == "__main__":
    main()
