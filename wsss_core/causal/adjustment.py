"""The back-door sum itself, without NWGM: a pass for each confounder, probabilities averaged.

    p_k   = sum_i P(c_i) sigmoid(s_k(X, f(X, c_i)))     Eq. 1; weights are P(c) alone, never alpha
    CAM_k = ReLU(sum_i P(c_i) map_k(X, f(X, c_i)))

NWGM puts sigmoid(s_k(X, sum_i P(c_i) f(X, c_i))) in the place of p_k. Two approximations lie
between: the normalised geometric mean sigmoid(E[s]) for the arithmetic one, and s(E[f]) for E[s(f)]
(exact where s is affine in f). `nwgm_gap` measures both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from wsss_core.seeding import torch_generator


def marginal_logits(
    logits: Float[Tensor, "m b n"], *, weights: Float[Tensor, " m"]
) -> Float[Tensor, "b n"]:
    """Log odds of sum_i w_i sigmoid(s_i): what a BCE on logits needs for a loss on the marginal.

    Args:
        logits: s of each photo and class under each of m confounders.
        weights: Of the confounders, sum to 1; a confounder of weight 0 has no say.
    """
    with torch.autocast(logits.device.type, enabled=False):
        log_weights = weights.log()[:, None, None]
        present = torch.logsumexp(log_weights + F.logsigmoid(logits), dim=0)
        absent = torch.logsumexp(log_weights + F.logsigmoid(-logits), dim=0)
        return present - absent


def draw_confounders(
    prior: Float[Tensor, " n"], *, num: int, seed: int, epoch: int, photo_id: str
) -> Int64[Tensor, " {num}"]:
    """`num` indices drawn from P(c) with replacement; a pure function of its arguments.

    A photo's own draw, from a generator of its own: it depends neither on the batch nor on where a
    training was resumed, and no other draw depends on it.
    """
    generator = torch_generator(seed, "confounders", epoch, photo_id)
    return torch.multinomial(prior, num, replacement=True, generator=generator)


def nwgm_gap(
    logits: Float[Tensor, "m b n"], one_pass: Float[Tensor, "b n"], *, prior: Float[Tensor, " m"]
) -> dict[str, float]:
    """How far NWGM is from the sum it stands for, on some photos; all 0 for a dead context.

    Args:
        logits: s(X, f(X, c_i)) under every confounder.
        one_pass: s(X, sum_i P(c_i) f(X, c_i)), what NWGM computes.
        prior: P(c_i).

    Returns:
        Means over photos and classes, in probabilities: `adjustment/mean_gap`, arithmetic against
        geometric mean; `adjustment/inside_gap`, sigmoid(E[s(f)]) against sigmoid(s(E[f])). And
        `adjustment/logit_spread`, the deviation of s between the confounders.
    """
    each, weights = logits.double(), prior.double()[:, None, None]
    mean = (weights * each).sum(0)
    arithmetic, geometric = (weights * each.sigmoid()).sum(0), mean.sigmoid()
    spread = (weights * (each - mean).square()).sum(0).sqrt()
    return {
        "adjustment/mean_gap": float((arithmetic - geometric).abs().mean()),
        "adjustment/inside_gap": float((geometric - one_pass.double().sigmoid()).abs().mean()),
        "adjustment/logit_spread": float(spread.mean()),
    }
