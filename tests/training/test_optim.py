"""The schedule and the optimiser: each value lands where its name says."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.oracles import schedule as oracle
from wsss_core.config import TrainingConfig
from wsss_core.training.optim import build_optimizer, poly_factor, set_rates


@pytest.mark.parametrize("power", [0.9, 1.0, 2.0])
def test_poly_factor__every_step_of_a_run(power):
    steps = 37
    found = [poly_factor(step, steps=steps, power=power) for step in range(steps)]
    expected = [oracle.poly_rate(1, step=k, steps=steps, power=power) for k in range(steps)]
    assert found == pytest.approx(expected, rel=1e-12)
    assert found[0] == 1.0
    assert found[-1] > 0


def test_poly_factor__half_way_by_hand():
    assert poly_factor(5, steps=10, power=0.9) == pytest.approx(0.5358867)


def build(*, momentum=0.9, weight_decay=1e-4, frozen=False):
    trunk, new = nn.Parameter(torch.tensor([1.0, -2.0])), nn.Parameter(torch.tensor([0.5]))
    trunk.requires_grad_(not frozen)
    config = TrainingConfig(
        learning_rate=0.1, head_rate_ratio=10, momentum=momentum, weight_decay=weight_decay
    )
    return trunk, new, build_optimizer([trunk], [new], config)


def test_build_optimizer__new_layers_train_at_ten_times_the_rate():
    _, _, optimizer = build()
    set_rates(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.5])
    set_rates(optimizer, 0.1)  # of the first rate, not of the last
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.1])


def test_build_optimizer__frozen_parameters_are_left_out():
    trunk, new, optimizer = build(frozen=True)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == 1
    assert held[0] is new
    assert trunk.grad is None


@given(
    momentum=st.sampled_from([0.0, 1e-4, 0.5, 0.9]),
    weight_decay=st.sampled_from([0.0, 1e-4, 0.1]),
    power=st.sampled_from([0.9, 1.5]),
)
def test_build_optimizer__three_steps_equal_sgd_by_hand(momentum, weight_decay, power):
    """The loss a . w^2 / 2 has the gradient a w; momentum in decay's place would differ."""
    slopes = np.array([0.3, 2.0])
    trunk, new, optimizer = build(momentum=momentum, weight_decay=weight_decay)
    rates = [oracle.poly_rate(1, step=k, steps=3, power=power) for k in range(3)]
    for step in range(3):
        set_rates(optimizer, poly_factor(step, steps=3, power=power))
        optimizer.zero_grad()
        (torch.tensor(slopes, dtype=torch.float32) * trunk.square() / 2).sum().backward()
        (new * 3.0).sum().backward()
        optimizer.step()

    options = {"momentum": momentum, "weight_decay": weight_decay}
    expected = oracle.sgd(
        [1.0, -2.0], lambda w, _: slopes * w, rates=[0.1 * r for r in rates], **options
    )
    assert trunk.detach().numpy() == pytest.approx(expected[-1], rel=1e-5)
    expected = oracle.sgd([0.5], lambda w, _: np.array([3.0]), rates=rates, **options)
    assert new.detach().numpy() == pytest.approx(expected[-1], rel=1e-5)


def test_build_optimizer__irns_swapped_argument_is_a_setting():
    """irn's SGD(groups, lr, weight_decay) puts 1e-4 in momentum's place; its groups decay too."""
    _, _, ours = build(momentum=1e-4, weight_decay=1e-4)
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": 0.1, "weight_decay": 1e-4}]
    irn = torch.optim.SGD(groups, 0.1, 1e-4)
    for name in ("momentum", "weight_decay", "dampening", "nesterov"):
        assert {group[name] for group in ours.param_groups} == {irn.param_groups[0][name]}
