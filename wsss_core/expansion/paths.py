"""Pairs of nearby pixels and the boundaries between them (Ahn et al. 2019, IRNet).

An offset (dy, dx) stands for all pairs of pixels that lie so far apart inside the picture: on a map
of h x w those are h - |dy| times w - |dx| pairs, each at its own place of the maps below. A pair
with one end outside does not exist; nothing is padded.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from wsss_core.errors import InputError

Offset = tuple[int, int]
"""(dy, dx) from the first pixel of a pair to the second, dy >= 0."""


def half_plane_offsets(radius: int) -> list[Offset]:
    """Offsets of all pairs with dx^2 + dy^2 < radius^2, each pair once (irn misc/indexing.py).

    Row by row: 34 for a radius of 5, 152 for one of 10.

    Raises:
        InputError: If the radius is below 2, where no pixel has a neighbour.
    """
    if radius < 2:
        raise InputError(f"radius is {radius}; give at least 2, the least that reaches a neighbour")
    reach = range(-radius + 1, radius)
    return [
        (dy, dx)
        for dy in range(radius)
        for dx in reach
        if (dy, dx) > (0, 0) and dy * dy + dx * dx < radius * radius
    ]


def line_of(offset: Offset) -> list[Offset]:
    """Steps (y, x) from a pair's first pixel to each pixel on its line, both ends included.

    On the line are the pixels of the pair's bounding box less than 1 away from it (irn
    misc/indexing.py).
    """
    dy, dx = offset
    columns = range(min(dx, 0), max(dx, 0) + 1)
    return [
        (y, x) for y in range(dy + 1) for x in columns if (dy * x - dx * y) ** 2 < dy * dy + dx * dx
    ]


def pair_ends(
    maps: Shaped[Tensor, "*b h w"], offset: Offset
) -> tuple[Shaped[Tensor, "*b h2 w2"], Shaped[Tensor, "*b h2 w2"]]:
    """Views of the maps at the first and at the second pixel of each pair."""
    return _at(maps, (0, 0), offset), _at(maps, offset, offset)


def path_maximum(boundary: Float[Tensor, "*b h w"], offset: Offset) -> Float[Tensor, "*b h2 w2"]:
    """The strongest boundary on the line of each pair, laid out as `pair_ends` lays them out.

    Differentiable once: the gradient goes to the pixel that holds the maximum, of equal ones to the
    first. What the backward pass keeps is the result alone, not every pixel of every line.
    """
    maximum: Tensor = _PathMaximum.apply(boundary, offset)
    return maximum


class _PathMaximum(torch.autograd.Function):
    """A running maximum over shifted views."""

    @staticmethod
    def forward(ctx: Any, boundary: Tensor, offset: Offset) -> Tensor:
        first, *others = line_of(offset)
        maximum = _at(boundary, first, offset).clone()
        for step in others:
            torch.maximum(maximum, _at(boundary, step, offset), out=maximum)
        ctx.save_for_backward(boundary, maximum)
        ctx.offset = offset
        return maximum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        boundary, maximum = ctx.saved_tensors
        total, left = torch.zeros_like(boundary), gradient.clone()
        for step in line_of(ctx.offset):
            winners = _at(boundary, step, ctx.offset) == maximum
            _at(total, step, ctx.offset).add_(left * winners)
            left.masked_fill_(winners, 0)
        return total, None


def _at(maps: Tensor, step: Offset, offset: Offset) -> Tensor:
    """View of the maps one step from the first pixel of each pair of an offset."""
    dy, dx = offset
    height, width = maps.shape[-2] - dy, maps.shape[-1] - abs(dx)
    top, left = step[0], step[1] + max(0, -dx)
    return maps[..., top : top + max(0, height), left : left + max(0, width)]
