"""The intervention: the context map M of a photo, its controls, and its way into a crop.

    alpha_i(X) = softmax_i((W1 X_m)^T (W2 c_i) / sqrt(n))    one softmax over all n classes
    f(X, c_i)  = g alpha_i(X) c_i                            scale `paper`: g = 1; `n`: see `gain`
    M          = sum_i P(c_i) f(X, c_i)                      adjustment `nwgm`: Eq. 1 in one pass

W1 and W2 are n x s*s and learned with the classifier through its loss (CONTA issues #11 and #13,
answered by its author); N(0, 0.02) by default, as in the VC R-CNN head the authors started from.
CONTA's public code holds none of this. Another adjustment needs f(X, c_i) itself, before the sum:
`terms`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from wsss_core.causal.confounders import COSINE_THRESHOLD, ConfounderSet, mean_pairwise_cosine
from wsss_core.config import CausalConfig
from wsss_core.errors import InputError
from wsss_core.seeding import torch_generator

Scale = Literal["n", "paper"]

_REPORT_PHOTOS = 1024  # photos whose M is held at a time by `context_report`


class UniformIntervention(nn.Module):
    """M with every confounder weighed the same: alpha = 1/n whatever the photo shows.

    Nothing is learned. The confounders are no part of the state dict: they belong to the round, and
    weights of the former round must not bring theirs along.

    Attributes:
        c: Class-average masks, n x s*s.
        prior: P(c_i).
        gain: g. Under `scale: n` it is n over the RMS of the uniform-alpha M, which then has RMS 1:
            from a zero slice under SGD an n times smaller M would learn n^2 slower.
    """

    c: Tensor
    prior: Tensor

    def __init__(self, confounders: ConfounderSet, *, scale: Scale) -> None:
        super().__init__()
        self.num_classes, self.size = confounders.num_classes, confounders.size
        c = torch.from_numpy(confounders.c.reshape(self.num_classes, -1).copy())
        prior = torch.from_numpy(confounders.prior.copy())
        self.register_buffer("c", c, persistent=False)
        self.register_buffer("prior", prior, persistent=False)
        self.gain = 1.0
        if scale == "n":
            uniform_m = prior.double() @ c.double()  # sum_i P(c_i) n (1/n) c_i
            self.gain = self.num_classes * _inverse(root_mean_square(uniform_m))

    def alpha(self, x_m: Float[Tensor, "b s s"]) -> Float[Tensor, "b n"]:
        """Weight of each confounder for each photo; rows sum to 1."""
        return self.c.new_full((len(x_m), self.num_classes), 1 / self.num_classes)

    def terms(self, x_m: Float[Tensor, "b s s"]) -> Float[Tensor, "b n s s"]:
        """f(X, c_i): what each confounder alone would show; M is their mean under P(c)."""
        c = self.c.view(self.num_classes, self.size, self.size)
        return self.gain * self.alpha(x_m)[:, :, None, None] * c

    def forward(self, x_m: Float[Tensor, "b s s"]) -> Float[Tensor, "b 1 s s"]:
        """M of each photo, in the canonical frame; not negative."""
        with torch.autocast(x_m.device.type, enabled=False):
            m = (self.gain * self.alpha(x_m) * self.prior) @ self.c
        return m.view(-1, 1, self.size, self.size)


class Intervention(UniformIntervention):
    """M with confounders weighed by the photo: alpha from scaled dot products of X_m and c_i.

    Attributes:
        w1: W1, n x s*s, acts on X_m.
        w2: W2, n x s*s, acts on c_i.
    """

    def __init__(
        self, confounders: ConfounderSet, *, scale: Scale, seed: int, std: float = 0.02
    ) -> None:
        """Draw W1 and W2 from a generator of their own: no other layer's start depends on them."""
        super().__init__(confounders, scale=scale)
        generator = torch_generator(seed, "intervention")
        self.w1 = nn.Parameter(torch.randn(self.c.shape, generator=generator) * std)
        self.w2 = nn.Parameter(torch.randn(self.c.shape, generator=generator) * std)

    def alpha(self, x_m: Float[Tensor, "b s s"]) -> Float[Tensor, "b n"]:
        """Weight of each confounder for each photo; rows sum to 1, differentiable to W1 and W2.

        Never in half precision: bf16 rounds by 0.4 %, about as much as M differs between photos at
        the start.
        """
        with torch.autocast(x_m.device.type, enabled=False):
            query = x_m.flatten(1) @ self.w1.T
            key = self.c @ self.w2.T
            return torch.softmax(query @ key.T / self.num_classes**0.5, dim=1)


class SegMaskContext(nn.Module):
    """The control `seg_mask`: the classifier sees X_m itself, divided by one constant."""

    def __init__(self, *, divisor: float) -> None:
        """Keep 1 / `divisor`; a divisor of 0 (every X_m is empty) leaves X_m as it is."""
        super().__init__()
        self.gain = _inverse(divisor)

    def forward(self, x_m: Float[Tensor, "b s s"]) -> Float[Tensor, "b 1 s s"]:
        """X_m as one channel."""
        return self.gain * x_m[:, None]


def build_context(
    settings: CausalConfig, confounders: ConfounderSet | None, *, seed: int, x_m_rms: float
) -> UniformIntervention | SegMaskContext | None:
    """What turns X_m into the context channel under `settings`; None where there is no channel.

    `shuffled_photo` builds what `conta` does: the loader hands each photo another's X_m, by
    `derangement`. Under `pasted` and its variants the photo itself is changed (`pasting`).

    Args:
        settings: `context` chooses the module; `scale` its amplitude; `attention_std` the start of
            W1 and W2.
        confounders: The set of the last round; None in round 0, which is the plain baseline.
        seed: Seed of the stage; W1, W2 and permutations draw from generators derived from it.
        x_m_rms: `root_mean_square` of X_m over the training photos, whichever photos are looked at
            later; only `seg_mask` uses it.

    Raises:
        InputError: If the confounders have another size than `settings.context_size`.
    """
    if confounders is None:
        return None
    if confounders.size != settings.context_size:
        raise InputError(
            f"the confounders have {confounders.size} cells a side, causal.context_size is "
            f"{settings.context_size}; rebuild them or change the setting"
        )
    scale, std = settings.scale, settings.attention_std
    match settings.context:
        case "none" | "pasted" | "pasted_bare" | "pasted_own":
            return None
        case "seg_mask":
            return SegMaskContext(divisor=x_m_rms if scale == "n" else 1.0)
        case "uniform_alpha":
            return UniformIntervention(confounders, scale=scale)
        case "shuffled_cells":
            shuffled = shuffle_cells(confounders, seed=seed)
            return Intervention(shuffled, scale=scale, seed=seed, std=std)
        case "conta" | "shuffled_photo":
            return Intervention(confounders, scale=scale, seed=seed, std=std)


def shuffle_cells(confounders: ConfounderSet, *, seed: int) -> ConfounderSet:
    """The control `shuffled_cells`: each c_i keeps its values and loses its places.

    One permutation a class, the same in every round. Permuting the classes instead would change
    nothing: M is a sum.
    """
    generator = torch_generator(seed, "shuffled_cells")
    c = confounders.c.copy()
    for class_map in c:
        order = torch.randperm(class_map.size, generator=generator).numpy()
        class_map[:] = class_map.ravel()[order].reshape(class_map.shape)
    return ConfounderSet(c=c, counts=confounders.counts, prior=confounders.prior)


def derangement(num_photos: int, *, seed: int) -> Int64[Tensor, " n"]:
    """For each photo the index of another one: one random cycle, so nothing stays in place.

    Raises:
        InputError: For fewer than two photos: none has another.
    """
    if num_photos < 2:
        raise InputError(
            f"context shuffled_photo needs another photo, but there is {num_photos}; "
            "add photos or choose another causal.context"
        )
    cycle = torch.randperm(num_photos, generator=torch_generator(seed, "derangement"))
    other = torch.empty_like(cycle)
    other[cycle] = cycle.roll(1)
    return other


def place_context(
    context_map: Float[Tensor, "b 1 s s"],
    *,
    affine: Float[Tensor, "b 2 3"],
    size: tuple[int, int],
) -> Float[Tensor, "b 1 h w"]:
    """M as it lies below a crop's feature map; zero outside the picture.

    Bilinear between cell centres and constant in the outer half of a border cell, as `grid_sample`
    with border padding. Where one output cell spans several of the frame's (32 -> 14 for a whole
    photo) the triangle of the interpolation is widened to that span, as in antialiased resizing:
    cells are averaged, not skipped. Two small matrix products a photo, so no photo's result depends
    on its batch, and gradients repeat on CUDA, where those of `grid_sample` do not.

    Args:
        context_map: M in the canonical frame.
        affine: Maps normalised output coordinates (x, y) to those of the whole picture, -1 and 1
            being the outer edges (`align_corners=False`), as `affine_grid` reads it. Crop, resize
            and flip only: the entries that would shear or rotate are not read.
        size: (h, w) of the feature map.
    """
    affine = affine.to(context_map)
    with torch.autocast(context_map.device.type, enabled=False):
        columns = _sampling_weights(affine[:, 0, 0], affine[:, 0, 2], size[1], context_map.shape[3])
        rows = _sampling_weights(affine[:, 1, 1], affine[:, 1, 2], size[0], context_map.shape[2])
        return (rows @ context_map[:, 0] @ columns.mT)[:, None]


def root_mean_square(values: Float[Tensor, ...]) -> float:
    """sqrt(mean of squares) over every entry; the constant a context channel is divided by."""
    norm = torch.linalg.vector_norm(values.detach(), dtype=torch.float64)
    return float(norm) / values.numel() ** 0.5


@torch.no_grad()
def context_report(context: nn.Module, x_m: Float[Tensor, "b s s"]) -> dict[str, float]:
    """Is the context alive? Where the spreads stay near 0, a run has not tested the method.

    Args:
        context: What `build_context` returned.
        x_m: X_m of the photos to look at, on the module's device.

    Returns:
        `context/m_spread`: mean over cells of M's deviation between photos, over M's mean. With
        confounders also `context/cosine`: their mean pairwise cosine; `context/alpha_spread`: mean
        over classes of alpha's deviation between photos over its mean; `context/alpha_entropy`: the
        mean entropy of alpha over the entropy of 1/n.
    """
    maps = _Moments()
    alphas = _Moments()
    entropies = _Moments()
    for part in torch.split(x_m, _REPORT_PHOTOS):
        maps.add(context(part))
        if isinstance(context, UniformIntervention):
            alpha = context.alpha(part)
            alphas.add(alpha)
            entropies.add(torch.special.entr(alpha).sum(1))
    report = {"context/m_spread": _ratio(float(maps.std().mean()), float(maps.mean().mean()))}
    if isinstance(context, UniformIntervention):
        c = context.c.view(context.num_classes, context.size, context.size).cpu().numpy()
        report["context/cosine"] = mean_pairwise_cosine(c)
        spread = alphas.std() / alphas.mean().clamp(min=torch.finfo(torch.float64).tiny)
        report["context/alpha_spread"] = float(spread.mean())
        most = math.log(context.num_classes)
        report["context/alpha_entropy"] = float(entropies.mean()) / most if most else 1.0
    return report


DEAD_RMS_RATIO, DEAD_SPREAD = 0.01, 0.005
"""Below the first the network hardly hears the context; below the second, M's spread at the start
of a training, it hears the same for every photo."""


def say_dead(metrics: Mapping[str, float], *, context: str) -> str | None:
    """Why a trained classifier has not tested its context; None if it has, or had none.

    Args:
        metrics: Those of `context_report`, and `context/rms_ratio`.
        context: `causal.context`; under `uniform_alpha` M is the same for every photo on purpose.
    """
    ratio, spread = metrics.get("context/rms_ratio"), metrics.get("context/m_spread")
    cosine = metrics.get("context/cosine")
    if ratio is not None and ratio < DEAD_RMS_RATIO:
        return (
            f"it adds {100 * ratio:.2g} % of what the photo adds (causal.amplitude 30 makes it "
            "heard, with W1 and W2 also causal.attention_std 0.1)"
        )
    if spread is not None and spread < DEAD_SPREAD and context != "uniform_alpha":
        return (
            f"its map differs between photos by {100 * spread:.2g} % of its size (alpha deviates "
            "more under causal.attention_std 0.1)"
        )
    if cosine is not None and cosine > COSINE_THRESHOLD and context != "uniform_alpha":
        return f"its classes look alike (mean cosine {cosine:.3f}), so alpha cannot matter"
    return None


class _Moments:
    """Running mean and standard deviation over the first axis, in float64."""

    def __init__(self) -> None:
        self._count = 0
        self._sum = torch.zeros((), dtype=torch.float64)
        self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        values = values.double().cpu()
        self._count += len(values)
        self._sum = self._sum + values.sum(0)
        self._squares = self._squares + values.square().sum(0)

    def mean(self) -> Tensor:
        return self._sum / self._count

    def std(self) -> Tensor:
        return (self._squares / self._count - self.mean().square()).clamp(min=0).sqrt()


def _sampling_weights(
    scale: Float[Tensor, " b"], shift: Float[Tensor, " b"], num_out: int, num_cells: int
) -> Float[Tensor, "b out cells"]:
    """Weight of each frame cell in each output cell along one axis; rows sum to 1, or 0 outside."""
    cells = functools.partial(torch.arange, dtype=scale.dtype, device=scale.device)
    centres = (2 * cells(num_out) + 1) / num_out - 1
    at = scale[:, None] * centres + shift[:, None]
    position = ((at + 1) * num_cells - 1) / 2  # 0 is the centre of the first cell
    reach = (scale.abs() * num_cells / num_out).clamp(min=1)
    distance = (position[:, :, None] - cells(num_cells)).abs()
    weights = (1 - distance / reach[:, None, None]).clamp(min=0)
    # Inside the picture the nearest cell is within half a cell, so the clamp acts outside alone.
    weights = weights / weights.sum(2, keepdim=True).clamp(min=0.5)
    return weights * (at.abs() <= 1)[:, :, None]


def _inverse(value: float) -> float:
    """1 / value; 1 for an empty context channel, which stays zero."""
    return 1 / value if value > 0 else 1.0


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
