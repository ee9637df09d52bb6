"""The segmenter: DeepLab v2 as CONTA uses it, or DeepLab v3+."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss_core.models.backbones import Backbone


class AsppSum(nn.Module):
    """DeepLab v2's pyramid: four dilated 3x3 class layers, summed; rates 6-12-18-24 at stride 8."""

    def __init__(self, in_channels: int, num_classes: int, *, output_stride: int) -> None:
        super().__init__()
        rates = [rate * 8 // output_stride for rate in (6, 12, 18, 24)]
        self.layers = nn.ModuleList(
            nn.Conv2d(in_channels, num_classes, 3, padding=rate, dilation=rate) for rate in rates
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        """Class scores (B,K,h,w) at the output stride."""
        return torch.stack([layer(features[-1]) for layer in self.layers]).sum(dim=0)


class AsppDecoder(nn.Module):
    """DeepLab v3+: pyramid and image pooling at the output stride, joined with block 2.

    A sixteenth of the trunk's channels wide, 128 for a ResNet: the paper's 256 would cost a small
    trunk more than itself.
    """

    def __init__(
        self, in_channels: int, low_channels: int, num_classes: int, *, output_stride: int
    ) -> None:
        super().__init__()
        width = max(64, in_channels // 128 * 8)  # whole groups of the GroupNorm
        rates = [rate * 8 // output_stride for rate in (12, 24, 36)]
        self.branches = nn.ModuleList(
            [_conv(in_channels, width, 1), *(_conv(in_channels, width, 3, rate) for rate in rates)]
        )
        self.pool = _conv(in_channels, width, 1)
        self.project = _conv(width * 5, width, 1)
        self.low = _conv(low_channels, 48, 1)
        self.join = nn.Sequential(_conv(width + 48, width, 3, 1), nn.Conv2d(width, num_classes, 1))

    def forward(self, features: list[Tensor]) -> Tensor:
        """Class scores (B,K,h,w) at the stride of block 2."""
        top, low = features[-1], features[1]
        pooled = self.pool(top.mean(dim=(2, 3), keepdim=True)).expand(-1, -1, *top.shape[-2:])
        joined = self.project(
            torch.cat([*(branch(top) for branch in self.branches), pooled], dim=1)
        )
        joined = F.interpolate(joined, size=low.shape[-2:], mode="bilinear", align_corners=False)
        return self.join(torch.cat([joined, self.low(low)], dim=1))


class Segmenter(nn.Module):
    """Trunk and head; `num_classes` counts the background."""

    def __init__(self, backbone: Backbone, *, num_classes: int, head: str) -> None:
        super().__init__()
        self.backbone = backbone
        shape = backbone.shape
        self.head: nn.Module = (
            AsppSum(shape.channels[-1], num_classes, output_stride=shape.output_stride)
            if head == "deeplabv2"
            else AsppDecoder(
                shape.channels[-1],
                shape.channels[1],
                num_classes,
                output_stride=shape.output_stride,
            )
        )

    def forward(self, photos: Tensor) -> Tensor:
        """Class scores (B,K,h,w) of normalised photos (B,3,H,W), smaller than the photo."""
        return self.head(self.backbone(photos))

    def new_parameters(self) -> list[nn.Parameter]:
        """Parameters without pretrained weights."""
        return list(self.head.parameters())


def segmentation_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    ignore_index: int,
    class_balanced: bool,
    counts: Tensor | None = None,
) -> Tensor:
    """Cross-entropy over labelled pixels, scores upsampled bilinearly to the labels.

    Args:
        scores: (B,K,h,w).
        labels: (B,H,W), classes 0..K-1 or `ignore_index`.
        ignore_index: Label of pixels that never count.
        class_balanced: Mean over background pixels plus mean over foreground pixels (DSRG), halved
            to keep the scale of the plain mean.
        counts: `count_labels` of the whole batch, where this is a slice of it: the slices' losses
            then sum to the batch's. None: this is all.
    """
    if counts is None:
        counts = count_labels(labels, ignore_index=ignore_index)
    full = F.interpolate(scores, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    losses = F.cross_entropy(full, labels, ignore_index=ignore_index, reduction="none")
    if not class_balanced:
        return losses.sum() / counts.sum()
    foreground = (labels > 0) & (labels != ignore_index)
    sums = torch.stack([losses[mask].sum() for mask in (labels == 0, foreground)])
    return (sums / counts.clamp(min=1)).sum() / counts.count_nonzero()


def count_labels(labels: Tensor, *, ignore_index: int) -> Tensor:
    """Numbers of background and of foreground pixels, (2,)."""
    background, ignored = (labels == 0).sum(), (labels == ignore_index).sum()
    return torch.stack([background, labels.numel() - background - ignored])


def initialise_new_layers(segmenter: Segmenter, generator: torch.Generator) -> None:
    """Draw the head from its own generator: v2 as kazuto, N(0, 0.01), v3+ by Kaiming's rule."""
    small = isinstance(segmenter.head, AsppSum)
    with torch.no_grad():
        for module in segmenter.head.modules():
            if isinstance(module, nn.Conv2d):
                deviation = 0.01 if small else (2.0 / module.weight[0].numel()) ** 0.5
                module.weight.copy_(
                    torch.randn(module.weight.shape, generator=generator) * deviation
                )
                if module.bias is not None:
                    module.bias.zero_()


def _conv(in_channels: int, out_channels: int, kernel: int, rate: int = 1) -> nn.Sequential:
    padding = rate if kernel == 3 else 0
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, padding=padding, dilation=rate, bias=False),
        nn.GroupNorm(8, out_channels),
        nn.ReLU(inplace=True),
    )
