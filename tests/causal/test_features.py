"""Prototypes as confounders: against a loop, and what they are made of."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.oracles import causal as oracle
from wsss_core.causal.features import (
    CHANNELS,
    FeatureIntervention,
    average_prototypes,
    feature_report,
    pool_by_class,
)

PRIOR = np.float32([0.5, 0.3, 0.2])


def unit(z):
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)


def build(n=3, width=5, scale="n", seed=0, z=None):
    z = unit(np.random.default_rng(1).normal(size=(n, width))) if z is None else z
    prior = PRIOR if n == 3 else np.full(n, 1 / n, np.float32)
    return FeatureIntervention(z, prior, scale=scale, seed=seed)


def draw_features(width=5, seed=2):
    return torch.randn(2, width, 2, 3, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_features__equal_the_oracle():
    module, x = build(scale="paper").double(), draw_features().double()
    weights = [w.numpy() for w in (module.query, module.key, module.value)]
    for photo, found in zip(x.numpy(), module(x), strict=True):
        expected = oracle.feature_context(photo, module.z.numpy(), PRIOR.astype(float), *weights)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


@torch.no_grad()
def test_features__m_is_the_prior_mean_of_its_terms():
    module, x = build(), draw_features()
    every = torch.arange(3)[:, None].expand(3, 2)
    terms = module.terms(x, every)
    assert terms.shape == (3, 2, CHANNELS, 2, 3)
    mean = (torch.from_numpy(PRIOR)[:, None, None, None, None] * terms).sum(0)
    torch.testing.assert_close(mean, module(x))
    chosen = module.terms(x, torch.tensor([[2, 0]]))[0]
    torch.testing.assert_close(chosen, torch.stack([terms[2, 0], terms[0, 1]]))


@torch.no_grad()
def test_features__alpha_asks_at_every_position():
    module, x = build(), draw_features()
    alpha = module.alpha(x)
    torch.testing.assert_close(alpha.sum(1), torch.ones(2, 2, 3))
    assert alpha.std(dim=(2, 3)).min() > 0.01
    torch.testing.assert_close(module.alpha(x.flip(-1)), alpha.flip(-1))  # it moves with the photo
    torch.testing.assert_close(module.mean_alpha, alpha.mean(dim=(2, 3)))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module.alpha(x), alpha)


@torch.no_grad()
def test_features__equal_prototypes_leave_alpha_no_say():
    z = unit(np.ones((4, 5)))
    module = build(n=4, z=z, scale="paper")
    m = module(draw_features())
    expected = (module.value @ module.z[0]) / 4
    torch.testing.assert_close(m, expected[None, :, None, None].expand_as(m))


@torch.no_grad()
@pytest.mark.parametrize("n", [3, 20])
def test_features__scale_n_has_unit_amplitude_at_uniform_alpha(n):
    module = build(n=n)
    with_zero_query = build(n=n)
    with_zero_query.query.zero_()
    m = with_zero_query(draw_features())
    assert m.square().mean().sqrt().item() == pytest.approx(1, rel=1e-4)
    assert module.gain == with_zero_query.gain


def test_features__class_never_seen_adds_nothing_and_nothing_is_nan():
    z = unit(np.random.default_rng(0).normal(size=(3, 5)))
    z[1] = 0
    terms = build(z=z).terms(draw_features(), torch.tensor([[1, 1]]))
    assert not terms.any()
    empty = build(z=np.zeros((3, 5), np.float32))
    assert not empty(draw_features()).any()


def test_features__draw_from_a_generator_of_their_own():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, other = build(seed=7), build(seed=8)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.query, build(seed=7).query)
    assert not torch.equal(first.query, other.query)
    assert set(first.state_dict()) == {"query", "key", "value"}


def test_pool_by_class__mean_over_what_it_covers():
    features = torch.tensor([[[1.0, 3.0]], [[0.0, 8.0]]])
    shares = torch.tensor([[[1.0, 1.0]], [[0.25, 0.75]], [[0.0, 0.0]]])
    expected = torch.tensor([[2.0, 4.0], [2.5, 6.0], [0.0, 0.0]])
    torch.testing.assert_close(pool_by_class(features, shares), expected)


def test_average_prototypes__photos_without_the_class_do_not_count():
    pooled = [
        ((0, 1), np.float32([[3, 0], [0, 5]])),
        ((0,), np.float32([[0, 4]])),
        ((0,), np.float32([[0, 0]])),
    ]
    z = average_prototypes(pooled, num_classes=3, channels=2)
    np.testing.assert_allclose(z, [[0.6, 0.8], [0, 1], [0, 0]], rtol=1e-6)
    assert z.dtype == np.float32


def test_feature_report__hand_counted():
    z = torch.tensor([[1.0, 0], [0.6, 0.8], [0, 0], [0, 1.0]])
    alpha = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.75, 0.25, 0, 0]])
    report = feature_report(z, alpha)
    assert report["context/cosine"] == pytest.approx((0.6 + 0 + 0.8) / 3)
    assert report["context/alpha_spread"] == pytest.approx((0.5 + 0 + 1 + 1) / 4)
    assert feature_report(z[:1], alpha[:, :1])["context/cosine"] == 1


def test_features__loss_reaches_all_three_maps():
    module = build()
    F.mse_loss(module(draw_features()), torch.ones(2, CHANNELS, 2, 3)).backward()
    assert all(bool(p.grad.any()) for p in module.parameters())
