"""SGD with IRNet's schedule: every rate falls as (1 - step / steps) ** power.

Source: irn misc/torchutils.py.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from wsss_core.config import TrainingConfig


def build_optimizer(
    trunk: Iterable[nn.Parameter], new: Iterable[nn.Parameter], config: TrainingConfig
) -> torch.optim.SGD:
    """SGD over two groups, the second at `head_rate_ratio` times the first's rate.

    irn passes its weight decay in SGD's momentum place; here each value goes where its name says,
    and `momentum: 0.0001` reproduces irn.

    Args:
        trunk: Pretrained parameters; frozen ones are left out.
        new: Parameters that start from a random draw or from zero.
        config: Rates, momentum and decay.
    """
    groups = [
        {"params": [p for p in trunk if p.requires_grad], "lr": config.learning_rate},
        {"params": list(new), "lr": config.learning_rate * config.head_rate_ratio},
    ]
    for group in groups:
        group["base_rate"] = group["lr"]
    return torch.optim.SGD(
        groups,
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )


def poly_factor(step: int, *, steps: int, power: float) -> float:
    """Share of the first rate at 0-based `step` of `steps`."""
    return float((1.0 - step / steps) ** power)


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to `factor` times what it began with."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_rate"] * factor
