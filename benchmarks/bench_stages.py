"""Seconds a photo in each stage of a round, on random pictures.

python -m benchmarks.bench_stages [--size 320]
"""

from __future__ import annotations

import argparse
import functools

import numpy as np
import torch
from torch import Tensor

from benchmarks.record import time_calls, write_record
from wsss_core.config import CausalConfig, ClassifierConfig, CrfConfig, SegmenterConfig
from wsss_core.expansion.crf import refine, soft_unary
from wsss_core.models.backbones import freeze, set_training_mode
from wsss_core.models.classifier import multilabel_loss
from wsss_core.models.segmenter import Segmenter, segmentation_loss
from wsss_core.stages.cams import class_activation_maps
from wsss_core.stages.classifier import ContextClassifier, build_classifier
from wsss_core.stages.predictions import segment_photos_of_size
from wsss_core.stages.segmenter import build_segmenter

SUITE, CLASSES, BATCH = "stages", 8, 8


def build_plain_classifier() -> ContextClassifier:
    """A lite0 classifier as round 0 trains it, blocks 1 and 2 and BatchNorm frozen."""
    settings = ClassifierConfig(pretrained=False)
    model = build_classifier(
        settings,
        CausalConfig(context="none"),
        CLASSES,
        confounders=None,
        x_m_rms=1.0,
        seed=0,
        pretrained=False,
    )
    freeze(model.classifier.backbone, until=2, batch_norm=True)
    set_training_mode(model, batch_norm_frozen=True)
    return model


def bench_training_steps(crop_px: int) -> None:
    """Forward and backward of both nets, contiguous against channels_last in one run."""
    tags = torch.randint(0, 2, (BATCH, CLASSES)).float()
    labels = torch.randint(0, CLASSES + 1, (BATCH, crop_px, crop_px))
    for layout in (torch.contiguous_format, torch.channels_last):
        name = str(layout).removeprefix("torch.")
        photos = torch.randn(BATCH, 3, crop_px, crop_px).to(memory_format=layout)
        classifier = build_plain_classifier().to(memory_format=layout)
        segmenter = build_segmenter(SegmenterConfig(), CLASSES + 1, pretrained=False)
        segmenter = segmenter.to(memory_format=layout)

        calls = {
            "classifier": functools.partial(_classify, classifier, photos, tags),
            "segmenter": functools.partial(_segment, segmenter, photos, labels),
        }
        for what, call in calls.items():
            figures = time_calls(call)
            a_photo = {"a_photo_s": figures["median_s"] / BATCH, "layout": name, "px": crop_px}
            write_record(SUITE, f"train {what}", figures | a_photo)


def _classify(model: ContextClassifier, photos: Tensor, tags: Tensor) -> None:
    multilabel_loss(model(photos), tags).backward()  # type: ignore[no-untyped-call]


def _segment(model: Segmenter, photos: Tensor, labels: Tensor) -> None:
    scores = model(photos)
    segmentation_loss(scores, labels, ignore_index=255, class_balanced=False).backward()  # type: ignore[no-untyped-call]


def bench_inference(size: tuple[int, int]) -> None:
    """CAM at IRNet's four scales with flips, prediction with a flip, the CRF: one photo each."""
    photo = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    classifier = build_plain_classifier().eval()
    segmenter = build_segmenter(SegmenterConfig(), CLASSES + 1, pretrained=False).eval()
    scores = np.random.default_rng(1).random((2, *size), np.float32)
    calls = {
        "cam, 4 scales": lambda: class_activation_maps(
            classifier, photo[None], None, scales=(1.0, 0.5, 1.5, 2.0)
        ),
        "cam, 1 scale": lambda: class_activation_maps(classifier, photo[None], None, scales=(1.0,)),
        "predict": lambda: segment_photos_of_size(segmenter, photo[None], scales=(1.0,), flip=True),
        "crf, 3 labels": lambda: refine(photo, soft_unary(scores, threshold=0.2), CrfConfig()),
    }
    for name, call in calls.items():
        write_record(SUITE, name, {**time_calls(call), "px": list(size)})


def main() -> None:
    """Run all measurements of the suite."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=320, help="long side of the photo, in pixels")
    size = parser.parse_args().size
    torch.manual_seed(0)
    bench_training_steps(crop_px=224)
    torch.set_num_threads(1)
    bench_inference((size * 3 // 4, size))


if __name__ == "__main__":
    main()
