"""What teaches the boundary network: pairs of cells that should, or should not, be alike.

Source: irn net/resnet50_irn.py (AffinityDisplacementLoss) and step/train_irn.py. A pair's affinity
is 1 - the strongest boundary on the line between its cells. Unlike irn, which builds pair labels in
the loader and leaves out pairs near the border, all pairs of the map count, and what they teach is
read off the label map offset by offset.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor
from torch.autograd.function import once_differentiable

from wsss_core.expansion.paths import Offset, half_plane_offsets, pair_ends, path_maximum
from wsss_core.records import IGNORE_INDEX

_EPSILON = 1e-5  # inside every logarithm and below every fraction (irn)


def affinity_loss(
    boundary: Float[Tensor, "b h w"],
    labels: Integer[Tensor, "b h w"],
    *,
    radius: int,
    counts: Integer[Tensor, " kinds"] | None = None,
) -> Float[Tensor, ""] | None:
    """IRNet's affinity loss: 1/2 * ((background + foreground) / 2 + negative).

    Each term is the mean of -log(affinity) over the pairs of background and over those of one
    class, and of -log(1 - affinity) over those of two labels. The 1/2 in front stands in irn beside
    the displacement terms; it is kept, so that irn's rates apply. All offsets' gradients are summed
    on the way forward: the memory is that of one offset, however many there are.

    Args:
        boundary: Probability of a boundary in each cell, in [0, 1].
        labels: Confident labels: 0 background, class + 1, `IGNORE_INDEX`.
        radius: Pairs of cells nearer than this count.
        counts: `count_pairs` of the whole batch, where this is a slice of it: the slices' losses
            then sum to the batch's. None: this is all.

    Returns:
        A scalar; None if no pair has two confident labels.
    """
    if counts is None:
        counts = count_pairs(labels, radius=radius)
    if not counts.any():
        return None
    offsets = half_plane_offsets(radius)
    weights = boundary.new_tensor([0.25, 0.25, 0.5]) / (counts.to(boundary.dtype) + _EPSILON)
    loss: Tensor = _AffinityLoss.apply(boundary, labels, weights, offsets)
    return loss


def count_pairs(labels: Integer[Tensor, "b h w"], *, radius: int) -> Integer[Tensor, " kinds"]:
    """Numbers of pairs of background, of one class, and of two labels."""
    return torch.stack(
        [
            torch.stack([kind.sum() for kind in _pair_kinds(labels, offset)])
            for offset in half_plane_offsets(radius)
        ]
    ).sum(dim=0)


class _AffinityLoss(torch.autograd.Function):
    """The sum over offsets; value and gradient are found together."""

    @staticmethod
    def forward(
        ctx: Any, boundary: Tensor, labels: Tensor, weights: Tensor, offsets: list[Offset]
    ) -> Tensor:
        leaf = boundary.detach().requires_grad_()
        total, gradient = boundary.new_zeros(()), torch.zeros_like(boundary)
        for offset in offsets:
            with torch.enable_grad():
                part = _offset_loss(leaf, labels, weights, offset)
            gradient += torch.autograd.grad(part, leaf)[0]
            total += part.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return outer * gradient, None, None, None


def _offset_loss(boundary: Tensor, labels: Tensor, weights: Tensor, offset: Offset) -> Tensor:
    background, foreground, negative = _pair_kinds(labels, offset)
    strongest = path_maximum(boundary, offset)
    likelihood = torch.where(negative, strongest, 1 - strongest)
    weight = background * weights[0] + foreground * weights[1] + negative * weights[2]
    return -(weight * (likelihood + _EPSILON).log()).sum()


def _pair_kinds(
    labels: Tensor, offset: Offset
) -> tuple[Bool[Tensor, "b h2 w2"], Bool[Tensor, "b h2 w2"], Bool[Tensor, "b h2 w2"]]:
    """Which pairs are both background, both of one class, of two labels; unsure ones are none."""
    first, second = pair_ends(labels, offset)
    sure = (first != IGNORE_INDEX) & (second != IGNORE_INDEX)
    same = sure & (first == second)
    return same & (first == 0), same & (first != 0), sure & (first != second)
