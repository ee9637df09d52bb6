"""A segmenter with random weights: as good as a trained one for what is not about scores."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file

from wsss_core.config import SegmenterConfig
from wsss_core.stages.segmenter import DESCRIPTION, WEIGHTS, build_segmenter
from wsss_core.store import Measured

CLASSES = ("cat", "dog", "horse")


def write_segmenter(out, *, head="deeplabv2"):
    """Fill the folder of a `segmenter` artifact; its masks are not of one class alone."""
    settings = SegmenterConfig(pretrained=False, head=head)
    model = build_segmenter(settings, len(CLASSES) + 1, pretrained=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weights in model.head.named_parameters():
            if name.endswith("weight") and weights.ndim == 4:
                weights.copy_(torch.randn(weights.shape, generator=generator))
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, out / WEIGHTS)
    description = {"segmenter": settings.model_dump(mode="json"), "classes": CLASSES}
    (out / DESCRIPTION).write_text(json.dumps(description))
    return Measured()
