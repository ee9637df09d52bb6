"""The exact back-door sum: against a loop, at extreme logits, and its gap to NWGM."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import causal as oracle
from wsss_core.causal.adjustment import draw_confounders, marginal_logits, nwgm_gap
from wsss_core.models.classifier import multilabel_loss

small = settings(max_examples=25, deadline=None, derandomize=True)
SKEWED = torch.tensor([0.5, 0.3, 0.2])


def draw_logits(num=3, photos=2, classes=4, seed=0, std=3.0):
    generator = torch.Generator().manual_seed(seed)
    shape = (num, photos, classes)
    return std * torch.randn(shape, generator=generator, dtype=torch.float64)


@small
@given(num=st.integers(1, 5), seed=st.integers(0, 999), std=st.sampled_from([0.0, 1.0, 10.0]))
def test_marginal_logits__are_the_mean_probability_of_the_oracle(num, seed, std):
    prior = np.random.default_rng(seed).dirichlet(np.ones(num))
    logits = draw_logits(num, seed=seed, std=std)
    found = marginal_logits(logits, weights=torch.from_numpy(prior)).sigmoid()
    expected = oracle.marginal_probability(logits.numpy(), prior)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def test_marginal_logits__give_the_loss_of_the_mean_probability():
    logits, tags = draw_logits(), torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0]]).double()
    p = oracle.marginal_probability(logits.numpy(), SKEWED.numpy())
    likelihood = np.where(tags.numpy() == 1, p, 1 - p)
    loss = multilabel_loss(marginal_logits(logits, weights=SKEWED.double()), tags)
    assert loss.item() == pytest.approx(-np.log(likelihood).mean(), rel=1e-6)


def test_marginal_logits__stay_finite_where_probabilities_round_to_0_and_1():
    logits = torch.tensor([[[-200.0, 200.0]], [[-300.0, 300.0]]], requires_grad=True)
    found = marginal_logits(logits, weights=torch.tensor([0.5, 0.5]))
    # the larger of two: log(0.5 e^-200 + 0.5 e^-300) = -200 - log 2
    expected = torch.tensor([[-200 - math.log(2), 200 + math.log(2)]])
    torch.testing.assert_close(found.detach(), expected)
    found.sum().backward()
    torch.testing.assert_close(logits.grad[:, 0], torch.tensor([[1.0, 1.0], [0.0, 0.0]]))


def test_marginal_logits__equal_logits_are_their_own_mean():
    one = draw_logits(num=1).float()
    found = marginal_logits(one.expand(3, -1, -1), weights=SKEWED)
    torch.testing.assert_close(found, one[0])


def test_marginal_logits__confounder_of_weight_0_has_no_say():
    logits = draw_logits().requires_grad_()
    weights = torch.tensor([0.4, 0.0, 0.6]).double()
    found = marginal_logits(logits, weights=weights)
    torch.testing.assert_close(found, marginal_logits(logits[[0, 2]], weights=weights[[0, 2]]))
    found.sum().backward()
    assert bool(torch.isfinite(logits.grad).all())
    assert not logits.grad[1].any()


def test_marginal_logits__gradcheck():
    logits = draw_logits(std=1.0).requires_grad_()
    weights = SKEWED.double() / SKEWED.double().sum()
    assert torch.autograd.gradcheck(lambda s: marginal_logits(s, weights=weights), logits)


def test_draw_confounders__follow_the_prior_and_touch_no_other_draw():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    draws = torch.stack(
        [
            draw_confounders(SKEWED, num=3, seed=1, epoch=epoch, photo_id=f"p{photo}")
            for epoch in range(10)
            for photo in range(100)
        ]
    )
    assert torch.equal(torch.get_rng_state(), state)
    shares = torch.bincount(draws.flatten(), minlength=3) / draws.numel()
    torch.testing.assert_close(shares, SKEWED, atol=0.03, rtol=0)
    assert (draws[:, 0] == draws[:, 1]).float().mean() == pytest.approx(0.38, abs=0.05)


def test_draw_confounders__are_a_function_of_seed_epoch_and_photo():
    uniform = torch.full((50,), 0.02)

    def drawn(seed=0, epoch=0, photo_id="a"):
        return draw_confounders(uniform, num=4, seed=seed, epoch=epoch, photo_id=photo_id)

    assert torch.equal(drawn(), drawn())
    for other in (drawn(seed=1), drawn(epoch=1), drawn(photo_id="b")):
        assert not torch.equal(drawn(), other)


def test_nwgm_gap__hand_counted():
    # one photo, one class: odds 1 and 9 under two equal confounders, odds 2 in one pass
    logits = torch.tensor([1.0, 9.0]).log()[:, None, None]
    gap = nwgm_gap(logits, torch.tensor([[2.0]]).log(), prior=torch.tensor([0.5, 0.5]))
    arithmetic, geometric, one_pass = (0.5 + 0.9) / 2, 3 / 4, 2 / 3
    assert gap == pytest.approx(
        {
            "adjustment/mean_gap": geometric - arithmetic,
            "adjustment/inside_gap": geometric - one_pass,
            "adjustment/logit_spread": math.log(9) / 2,
        },
        rel=1e-6,
    )


def test_nwgm_gap__none_where_the_context_is_dead():
    one = draw_logits(num=1)
    gap = nwgm_gap(one.expand(3, -1, -1), one[0], prior=SKEWED)
    assert list(gap.values()) == pytest.approx([0, 0, 0], abs=1e-6)
