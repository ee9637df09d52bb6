"""The boundary network: IRNet's edge branch on a frozen trunk (irn net/resnet50_irn.py).

IRNet's other branch, the displacement field, serves its instance step and shares no trained layer
with this one; it is left out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss_core.models.backbones import Backbone

STRIDE_PX = 4
"""Photo pixels a side of a cell of the boundary map."""

_WIDTH, _GROUPS = 32, 4  # channels a block, GroupNorm (irn)


class BoundaryNet(nn.Module):
    """Five blocks of a trunk that never trains, each brought to 32 channels, and one logit a cell.

    Attributes:
        backbone: The trunk; always in evaluation mode and without gradient.
        branches: One for each block: 1x1 convolution, GroupNorm, ReLU.
        join: 1x1 convolution of all branches to the logit.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False).eval()
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, _WIDTH, 1, bias=False),
                nn.GroupNorm(_GROUPS, _WIDTH),
                nn.ReLU(inplace=True),
            )
            for channels in backbone.shape.channels
        )
        self.join = nn.Conv2d(_WIDTH * len(self.branches), 1, 1)

    def forward(self, photos: Tensor) -> Tensor:
        """Boundary logits (B, ceil(H/4), ceil(W/4)) of normalised photos (B,3,H,W)."""
        height, width = (-(-side // STRIDE_PX) for side in photos.shape[-2:])
        with torch.no_grad():
            # a tap finer than a cell is averaged before its branch, which is four times cheaper
            taps = [
                _resize(tap, (height, width)) if tap.shape[-1] > width else tap
                for tap in self.backbone(photos)
            ]
        parts = [
            _resize(branch(tap), (height, width))
            for branch, tap in zip(self.branches, taps, strict=True)
        ]
        logits: Tensor = self.join(torch.cat(parts, dim=1))[:, 0]
        return logits

    def train(self, mode: bool = True) -> BoundaryNet:
        """Switch the branches; the trunk keeps evaluating."""
        super().train(mode)
        self.backbone.eval()
        return self

    def new_parameters(self) -> list[nn.Parameter]:
        """Parameters that train: all but the trunk's."""
        return [*self.branches.parameters(), *self.join.parameters()]


def initialise_branches(net: BoundaryNet, generator: torch.Generator) -> None:
    """Draw weights as PyTorch does, U(-1, 1) / sqrt(inputs), from their own generator; bias 0."""
    for module in [*net.branches.modules(), net.join]:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, a=5**0.5, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(maps.shape[-2:]) == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
