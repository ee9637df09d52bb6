"""Random walk of seeds on the boundary map of a photo (Ahn et al. 2019, IRNet).

    A_ij = (1 - max of the boundary between i and j)^beta    pairs nearer than the radius; A_ii = 1
    T    = A D^-1,  d_j = sum_i A_ij                         columns sum to 1
    x'   = (x * (1 - boundary)) T^(2^log2_steps)             x a ROW vector: a constant stays itself

irn (step/make_sem_seg_labels.py) squares the dense T, (hw)^2 entries, eight times. Here x T^N is a
sum of Chebyshev polynomials: T is similar to the symmetric D^-1/2 A D^-1/2, so its spectrum lies in
[-1, 1], where

    s^N = 2^(1-N) sum of binom(N, (N-k)/2) T_k(s) over k = N, N-2, .. >= 0    (half of it for k = 0)

and degrees beyond sqrt(2 N ln(2 / tolerance)) or so carry nothing. The 256 steps of irn come down
to 78 products with a sparse T: T_k+1 = 2 T_k T - T_k-1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from wsss_core.errors import InputError
from wsss_core.expansion.paths import half_plane_offsets, pair_ends, path_maximum

TOLERANCE = 1e-6
"""Share of the Chebyshev terms that is dropped; float32 rounds no finer."""


@torch.no_grad()
def propagate(
    seeds: Float[Tensor, "*b k h w"],
    boundary: Float[Tensor, "*b h w"],
    *,
    radius: int = 5,
    beta: float = 10,
    log2_steps: int = 8,
) -> Float[Tensor, "*b k h w"]:
    """Scores of each class after 2^log2_steps steps of the walk, not normalised; no gradient.

    Linear in the seeds. What a wall of boundary 1 parts stays apart. On CUDA a batch needs memory
    for (2 radius - 1)^2 copies of its seeds.

    Args:
        seeds: CAMs of the present classes, of a photo or of a batch of one size.
        boundary: Probability of a boundary at each cell, in [0, 1].
        radius: Pairs are nearer than this, in cells; irn walks with 5.
        beta: Power of the affinity, not negative; irn's 10.
        log2_steps: Squarings of T, not negative; irn's `exp_times`, 8.

    Returns:
        On the seeds' device, as float32 or, for seeds of float64, float64.

    Raises:
        InputError: If the shapes contradict each other or a value is out of its range.
    """
    _check(seeds, boundary, radius=radius, beta=beta, log2_steps=log2_steps)
    dtype = torch.promote_types(seeds.dtype, torch.float32)
    boundary = boundary.to(seeds.device, dtype)
    seeds = seeds.to(dtype) * (1 - boundary).unsqueeze(-3)
    num_steps = 2**log2_steps
    if seeds.ndim == 3:
        return _walk(seeds[None], boundary[None], radius, beta, num_steps)[0]
    # Photo by photo on a CPU: the maps of one stay in the cache of its core.
    photos = len(seeds) if seeds.is_cuda else 1
    parts = zip(torch.split(seeds, photos), torch.split(boundary, photos), strict=True)
    return torch.cat([_walk(*part, radius, beta, num_steps) for part in parts])


def power_terms(num_steps: int, *, tolerance: float = TOLERANCE) -> dict[int, float]:
    """Weights by degree k of the Chebyshev polynomials T_k that add up to s^num_steps on [-1, 1].

    The highest degrees, together no more than `tolerance` of the weight, are left out, and the
    others are scaled to add up to 1, so that nothing is lost at s = 1.
    """
    terms, degree, weight = [], num_steps % 2, 1.0
    while degree <= num_steps and weight > 1e-18:
        terms.append((degree, weight if degree else weight / 2))
        weight *= (num_steps - degree) / (num_steps + degree + 2)
        degree += 2
    spare = tolerance * sum(weight for _, weight in terms)
    while spare >= terms[-1][1]:
        spare -= terms.pop()[1]
    total = sum(weight for _, weight in terms)
    return {degree: weight / total for degree, weight in terms}


def _walk(
    seeds: Float[Tensor, "b k h w"],
    boundary: Float[Tensor, "b h w"],
    radius: int,
    beta: float,
    num_steps: int,
) -> Float[Tensor, "b k h w"]:
    """The seeds times T^num_steps.

    Maps lie flat in rows of `stride` cells, so that one slice shows every cell its neighbour at an
    offset: the cells beyond the width, which also come before the next row's first, stay empty.
    """
    height, width = boundary.shape[1:]
    stride = width + radius - 1
    margin = (radius - 1) * (stride + 1)
    twice_t = 2 * _transition_weights(boundary, radius, beta)
    even = F.pad(F.pad(seeds, (0, radius - 1)).flatten(2), (margin, margin))
    odd = torch.zeros_like(even)
    inside = slice(margin, margin + height * stride)
    to_odd = _Recurrence(even, odd[..., inside], twice_t, stride)
    to_even = _Recurrence(odd, even[..., inside], twice_t, stride)

    terms = power_terms(num_steps)
    walked = terms.get(0, 0.0) * even[..., inside]
    for degree in range(1, max(terms) + 1):
        polynomial = to_odd() if degree % 2 else to_even()
        if degree == 1:
            polynomial /= 2  # T_1 = 2 T_0 T - T_-1, and T_-1 is T_1
        if degree in terms:
            walked.add_(polynomial, alpha=terms[degree])
    return walked.view(*seeds.shape[:3], stride)[..., :width]


def _transition_weights(
    boundary: Float[Tensor, "b h w"], radius: int, beta: float
) -> Float[Tensor, "b side side n"]:
    """T_ij at (row of i - row of j, column of i - column of j, j), the centre of `side` being 0."""
    batch, height, width = boundary.shape
    reach, side = radius - 1, 2 * radius - 1
    weights = boundary.new_zeros(batch, side, side, height, width + reach)
    weights[:, reach, reach, :, :width] = 1
    # The power is monotone, so that of the strongest boundary is the least power on the line.
    impassable = -((1 - boundary) ** beta)
    for dy, dx in half_plane_offsets(radius):
        affinity = -path_maximum(impassable, (dy, dx))
        first, second = pair_ends(weights[..., :width], (dy, dx))
        first[:, reach + dy, reach + dx] = affinity
        second[:, reach - dy, reach - dx] = affinity
    weights /= weights.sum((1, 2), keepdim=True).clamp(min=1)  # at least the self loop's
    # What rounding leaves of a column's sum of 1 would grow with the steps.
    rest = 1 - weights.sum((1, 2), dtype=torch.float64)
    weights[:, reach, reach, :, :width] += rest[..., :width]
    return weights.flatten(3)


class _Recurrence:
    """T_k+1 = 2 T_k T - T_k-1 in place: target <- source (2 T) - target."""

    def __init__(self, source: Tensor, target: Tensor, twice_t: Tensor, stride: int) -> None:
        """Lay a view of the source at every offset; nothing is copied.

        Args:
            source: (b,k,margin + n + margin), flat maps.
            target: (b,k,n), flat maps.
            twice_t: (b,side,side,n), weights at each offset.
            stride: Cells from a row of the source to the next.
        """
        side = twice_t.shape[1]
        windows = source.unfold(2, target.shape[2], 1).unfold(2, side, stride).movedim(4, 3)
        self._target, self._windows, self._weights = target, windows, twice_t[:, None]
        reach = side // 2
        self._pairs = [
            (windows[:, :, y, x], self._weights[:, :, y, x])
            for y in range(side)
            for x in range(side)
            if (y - reach) ** 2 + (x - reach) ** 2 < (reach + 1) ** 2
        ]

    def __call__(self) -> Tensor:
        if _launches_cost(self._target):
            product = (self._windows * self._weights).sum((2, 3))
            return torch.sub(product, self._target, out=self._target)
        self._target.neg_()
        for neighbours, weights in self._pairs:
            self._target.addcmul_(neighbours, weights)
        return self._target


def _launches_cost(maps: Tensor) -> bool:
    """Whether starting an operation takes longer than doing it, as it does on CUDA."""
    return maps.is_cuda


def _check(seeds: Tensor, boundary: Tensor, *, radius: int, beta: float, log2_steps: int) -> None:
    matching = (*seeds.shape[:-3], *seeds.shape[-2:]) == boundary.shape
    if seeds.ndim not in (3, 4) or not matching or not boundary.numel():
        raise InputError(
            f"seeds have shape {tuple(seeds.shape)}, the boundary {tuple(boundary.shape)}; "
            "expected (k, h, w) and (h, w), or (b, k, h, w) and (b, h, w)"
        )
    low, high = float(boundary.min()), float(boundary.max())
    if not (low >= 0 and high <= 1):
        raise InputError(f"boundary spans {low:g}..{high:g}; expected probabilities in 0..1")
    if not seeds.isfinite().all():
        raise InputError("seeds hold NaN or infinity; expected finite scores")
    half_plane_offsets(radius)
    for name, value in (("beta", beta), ("log2_steps", log2_steps)):
        if not value >= 0:
            raise InputError(f"{name} is {value}; expected 0 or more")
