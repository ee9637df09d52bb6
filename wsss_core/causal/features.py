"""Prototypes as confounders: what a class looks like, asked for at every position (`features`).

    z_i           = L2-normalised mean feature of class i, from one frozen ImageNet trunk
    alpha_i(p)    = softmax_i(<q(x_p), k(z_i)> / sqrt(d))     one softmax over all n classes
    f(X, z_i)(p)  = g alpha_i(p) v(z_i)                       scale `paper`: g = 1; `n`: see `gain`
    M(p)          = sum_i P(z_i) f(X, z_i)(p)

x_p are the features that enter the fused convolution; M has d channels there and is added to what
the convolution gives through a 1x1 that is zero at the start. The form is that of IBMIL (CVPR
2023); CONTA's own confounders are masks and know no appearance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from wsss_core.causal.intervention import Scale, root_mean_square
from wsss_core.seeding import torch_generator

CHANNELS = 128
"""d, of queries, keys and values (IBMIL: 128)."""


class FeatureIntervention(nn.Module):
    """M of d channels from prototypes, weighed position by position.

    The prototypes are no part of the state dict, for they belong to the round. The three maps are
    drawn so that what they give has about unit variance.

    Attributes:
        z: Prototypes, (n,C), rows of norm 1, or 0 for a class that was never seen.
        prior: P(z_i).
        gain: g. Under `scale: n` it is n over the RMS of the uniform-alpha M at the start.
        mean_alpha: alpha of the last batch, (B,n), mean over positions.
    """

    z: Tensor
    prior: Tensor

    def __init__(
        self,
        prototypes: Float32[np.ndarray, "n c"],
        prior: Float32[np.ndarray, " n"],
        *,
        scale: Scale,
        seed: int,
    ) -> None:
        """Draw q, k and v from a generator of their own."""
        super().__init__()
        self.num_classes, channels = prototypes.shape
        self.register_buffer("z", torch.from_numpy(prototypes.copy()), persistent=False)
        self.register_buffer("prior", torch.from_numpy(prior.copy()), persistent=False)
        generator = torch_generator(seed, "features")

        def draw(std: float) -> nn.Parameter:
            return nn.Parameter(std * torch.randn((CHANNELS, channels), generator=generator))

        self.query, self.key, self.value = draw(channels**-0.5), draw(1.0), draw(1.0)
        self.mean_alpha = torch.zeros(0, self.num_classes)
        self.gain = 1.0
        if scale == "n":
            rms = root_mean_square(self.prior @ (self.z @ self.value.T))
            self.gain = self.num_classes / rms if rms > 0 else float(self.num_classes)

    def alpha(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n h w"]:
        """Weight of each prototype at each position; sums to 1 over n. Never in half precision."""
        with torch.autocast(x.device.type, enabled=False):
            queries = torch.einsum("bchw,dc->bdhw", x.to(self.query), self.query)
            logits = torch.einsum("bdhw,nd->bnhw", queries, self.z @ self.key.T)
            alpha = torch.softmax(logits / CHANNELS**0.5, dim=1)
        self.mean_alpha = alpha.detach().mean(dim=(2, 3))
        return alpha

    def terms(
        self, x: Float[Tensor, "b c h w"], which: Int64[Tensor, "m b"]
    ) -> Float[Tensor, "m b d h w"]:
        """f(X, z_i) of the prototypes that `which` names for each photo."""
        alpha = self.alpha(x)
        photos = torch.arange(len(x), device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            values = self.z @ self.value.T
        return self.gain * alpha[photos, which][:, :, None] * values[which][..., None, None]

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        """M at each position of the features that enter the fused convolution."""
        weights = self.gain * self.alpha(x) * self.prior[:, None, None]
        with torch.autocast(x.device.type, enabled=False):
            return torch.einsum("bnhw,nd->bdhw", weights, self.z @ self.value.T)


def feature_report(z: Float[Tensor, "n c"], mean_alpha: Float[Tensor, "b n"]) -> dict[str, float]:
    """Is the context alive? As `context_report`, of prototypes.

    Args:
        z: Prototypes.
        mean_alpha: Of some photos, mean over positions.

    Returns:
        `context/cosine`: mean cosine of all pairs of prototypes; `context/alpha_spread`: mean over
        classes of alpha's deviation between photos over its mean.
    """
    seen = z[z.any(dim=1)].double()
    pairs = (seen @ seen.T)[*torch.triu_indices(len(seen), len(seen), offset=1)]
    alpha = mean_alpha.double()
    spread = alpha.std(dim=0, correction=0) / alpha.mean(dim=0)
    cosine = float(pairs.mean()) if len(pairs) else 1.0
    return {"context/cosine": cosine, "context/alpha_spread": float(spread.mean())}


def pool_by_class(
    features: Float[Tensor, "c h w"], shares: Float[Tensor, "k h w"]
) -> Float[Tensor, "k c"]:
    """Mean feature of each class in a photo; 0 for one that covers nothing.

    Args:
        features: Of the whole photo.
        shares: How much of each cell each class covers, in [0, 1].
    """
    weights = shares / shares.sum(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    return torch.einsum("khw,chw->kc", weights, features)


def average_prototypes(
    pooled: Iterable[tuple[Sequence[int], Float32[np.ndarray, "k c"]]],
    *,
    num_classes: int,
    channels: int,
) -> Float32[np.ndarray, "n {channels}"]:
    """z_i: mean over photos of the class's mean feature, of norm 1; 0 for a class without any.

    Args:
        pooled: Tags and `pool_by_class` of each training photo; rows of 0 are photos that do not
            show the class and do not count.
        num_classes: n, foreground classes.
        channels: C.
    """
    total = np.zeros((num_classes, channels))
    for tags, means in pooled:
        for tag, mean in zip(tags, means, strict=True):
            total[tag] += mean
    norms = np.linalg.norm(total, axis=1, keepdims=True)  # a mean and a sum point the same way
    return (total / np.maximum(norms, 1e-12)).astype(np.float32)
