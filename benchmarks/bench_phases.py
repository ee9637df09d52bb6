"""A training step with dilated depthwise convolutions by phases, and as PyTorch has them.

python -m benchmarks.bench_phases [--size 256]
"""

from __future__ import annotations

import argparse
import functools

import torch
from torch import Tensor, nn

from benchmarks.bench_stages import CLASSES, build_plain_classifier
from benchmarks.record import time_calls, write_record
from wsss_core.config import SegmenterConfig
from wsss_core.models.backbones import freeze, set_training_mode
from wsss_core.models.classifier import multilabel_loss
from wsss_core.models.phases import PhasedConv2d
from wsss_core.models.segmenter import segmentation_loss
from wsss_core.stages.segmenter import build_segmenter
from wsss_core.workers import keep_memory

SUITE, BATCH = "phases", 10


def undo_phases(net: nn.Module) -> nn.Module:
    """Every `PhasedConv2d` as PyTorch's own again."""
    for module in net.modules():
        if isinstance(module, PhasedConv2d):
            module.__class__ = nn.Conv2d  # type: ignore[assignment]
    return net


def build_plain_segmenter() -> nn.Module:
    """A lite0 DeepLab v3+ as recipes train it, block 1 and BatchNorm frozen."""
    settings = SegmenterConfig(head="deeplabv3plus", pretrained=False)
    model = build_segmenter(settings, CLASSES + 1, pretrained=False)
    freeze(model.backbone, until=1, batch_norm=True)
    set_training_mode(model, batch_norm_frozen=True)
    return model


def classify(model: nn.Module, photos: Tensor) -> None:
    """Forward, loss and backward."""
    loss = multilabel_loss(model(photos, None, None), torch.ones(len(photos), CLASSES))
    loss.backward()  # type: ignore[no-untyped-call]


def segment(model: nn.Module, photos: Tensor) -> None:
    """Forward, loss and backward."""
    labels = torch.zeros((len(photos), *photos.shape[2:]), dtype=torch.long)
    loss = segmentation_loss(model(photos), labels, ignore_index=255, class_balanced=False)
    loss.backward()  # type: ignore[no-untyped-call]


def main() -> None:
    """Run all measurements of the suite."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=256, help="side of a crop, in pixels")
    size_px = parser.parse_args().size
    keep_memory()
    photos = torch.randn(BATCH, 3, size_px, size_px).to(memory_format=torch.channels_last)
    for name, build, step in (
        ("classifier", build_plain_classifier, classify),
        ("segmenter", build_plain_segmenter, segment),
    ):
        nets = {"by phases": build(), "as PyTorch has it": undo_phases(build())}
        base = None
        for way, net in nets.items():
            net = net.to(memory_format=torch.channels_last)
            figures = time_calls(functools.partial(step, net, photos))
            base = base or figures["median_s"]
            facts = {"ratio": figures["median_s"] / base, "px": size_px, "batch": BATCH}
            write_record(SUITE, f"{name}, {way}", figures | facts)


if __name__ == "__main__":
    main()
