"""Dilated depthwise convolutions, trained as the plain ones that they are.

Under dilation d a cell of the output sees input cells of its own phase alone: those whose row and
column are the same modulo d. So it is a plain convolution of each of the d * d phases. The result
is the same up to the last bits; on a CPU its gradients are several times cheaper, for oneDNN has
fast kernels for those of plain depthwise convolutions alone (docs/performance.md).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class PhasedConv2d(nn.Conv2d):
    """A convolution that works phase by phase while it trains on a CPU; elsewhere as it is."""

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Conv2d`; (B,C,H,W) to (B,C,H,W)."""
        if not self.training or x.device.type != "cpu":
            return super().forward(x)
        dilation, (height, width) = self.dilation[0], x.shape[-2:]
        if height % dilation or width % dilation:  # zeros, as the padding beyond them
            x = F.pad(x, (0, -width % dilation, 0, -height % dilation))
        padding = (self.kernel_size[0] // 2, self.kernel_size[1] // 2)
        phases = F.conv2d(
            split_phases(x, dilation=dilation),
            self.weight,
            self.bias,
            padding=padding,
            groups=self.groups,
        )
        return merge_phases(phases, dilation=dilation)[:, :, :height, :width]


def phase_dilated(net: nn.Module) -> None:
    """Make each dilated depthwise convolution that keeps its input's size a `PhasedConv2d`.

    It has no state of its own, so names, weights and random numbers stay what they were.
    """
    for module in net.modules():
        if type(module) is nn.Conv2d and _fits(module):
            module.__class__ = PhasedConv2d


def split_phases(x: Tensor, *, dilation: int) -> Tensor:
    """(B,C,H,W) to (d*d*B,C,H/d,W/d), phase after phase; channels last in memory.

    H and W are multiples of d.
    """
    batch, channels, height, width = x.shape
    rows, columns = height // dilation, width // dilation
    # (B, row, its phase, column, its phase, C)
    cells = x.permute(0, 2, 3, 1).reshape(batch, rows, dilation, columns, dilation, channels)
    phases = cells.permute(2, 4, 0, 1, 3, 5).reshape(-1, rows, columns, channels)
    return phases.permute(0, 3, 1, 2)


def merge_phases(phases: Tensor, *, dilation: int) -> Tensor:
    """(d*d*B,C,h,w) to (B,C,d*h,d*w): the inverse of `split_phases`."""
    _, channels, rows, columns = phases.shape
    # (phase of rows, of columns, B, row, column, C)
    cells = phases.permute(0, 2, 3, 1).reshape(dilation, dilation, -1, rows, columns, channels)
    x = cells.permute(2, 3, 0, 4, 1, 5).reshape(-1, rows * dilation, columns * dilation, channels)
    return x.permute(0, 3, 1, 2)


def _fits(conv: nn.Conv2d) -> bool:
    (height, width), (down, right) = conv.kernel_size, conv.dilation
    return (
        conv.groups == conv.in_channels == conv.out_channels
        and down == right > 1
        and height % 2 == width % 2 == 1
        and conv.stride == (1, 1)
        and conv.padding == (down * (height // 2), right * (width // 2))
        and conv.padding_mode == "zeros"
    )
