"""The random walk against the dense matrix squared, and what has to hold on any boundary map.

Float32 against the matrix, on noise, smooth maps and edges of photos up to 64 x 64 cells: the
largest difference we saw was 4e-5 of the largest score.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import random_walk as oracle
from wsss_core.errors import InputError
from wsss_core.expansion import random_walk
from wsss_core.expansion.random_walk import power_terms, propagate


def draw_noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def draw_smooth(*shape, seed=0):
    """Noise of a third of the size, enlarged: blobs, as CAMs and boundaries of a net have them."""
    *maps, height, width = shape
    coarse = draw_noise(1, math.prod(maps), height // 3 + 2, width // 3 + 2, seed=seed)
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return fine.reshape(shape)


def expected(seeds, boundary, **settings):
    return oracle.propagate(seeds.double().numpy(), boundary.double().numpy(), **settings)


def assert_near(found, reference, *, share):
    """Off by no more than a share of the largest score."""
    assert np.abs(found.numpy() - reference).max() <= share * reference.max()


@pytest.mark.parametrize("draw", [draw_noise, draw_smooth])
@pytest.mark.parametrize("strength", [1.0, 0.3, 0.05])
def test_propagate__equals_the_squared_matrix(draw, strength):
    seeds, boundary = draw_smooth(3, 11, 14), strength * draw(11, 14, seed=1)
    found, reference = propagate(seeds, boundary), expected(seeds, boundary)
    assert_near(found, reference, share=1e-4)
    assert np.array_equal(found.argmax(0), reference.argmax(0))
    assert_near(propagate(seeds.double(), boundary), reference, share=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"radius": 2}, {"radius": 3}, {"radius": 7}, {"beta": 0}, {"beta": 1}, {"beta": 2.5}]
    + [{"log2_steps": steps} for steps in (0, 1, 2, 5, 11)],
    ids=str,
)
def test_propagate__settings_mean_what_the_oracle_says(settings):
    seeds, boundary = draw_noise(2, 7, 9), 0.4 * draw_noise(7, 9, seed=1)
    reference = expected(seeds, boundary, **settings)
    assert_near(propagate(seeds.double(), boundary, **settings), reference, share=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (1, 12), (12, 1), (2, 2), (3, 4), (4, 13), (2, 20)])
def test_propagate__thin_maps_and_maps_below_the_radius(size):
    seeds, boundary = draw_noise(2, *size), 0.3 * draw_noise(*size, seed=1)
    assert_near(propagate(seeds, boundary), expected(seeds, boundary), share=1e-4)


def test_propagate__from_a_single_cell():
    seeds, boundary = torch.zeros(1, 11, 14), 0.3 * draw_smooth(11, 14)
    seeds[0, 2, 12] = 1
    assert_near(propagate(seeds, boundary), expected(seeds, boundary), share=1e-4)


def test_propagate__two_cells_by_hand():
    """A = [[1, 1/4], [1/4, 1]], both columns sum to 5/4, the seed at the second cell is halved."""
    found = propagate(
        torch.tensor([[[3.0, 0.0]]]), torch.tensor([[0.0, 0.5]]), beta=2, log2_steps=0
    )
    assert found[0, 0].tolist() == pytest.approx([2.4, 0.6])


def test_propagate__constant_without_boundaries_stays():
    found = propagate(torch.full((2, 40, 50), 0.7), torch.zeros(40, 50))
    assert found.numpy() == pytest.approx(0.7, abs=1e-6)


@settings(max_examples=10)
@given(st.integers(0, 2**31), st.integers(2, 7))
def test_propagate__constant_under_its_factor_stays_on_any_map(seed, radius):
    """The row vector of ones is T's own; under A x with columns normalised it is not."""
    boundary = 0.6 * draw_noise(9, 13, seed=seed).double()
    found = propagate((1 / (1 - boundary))[None], boundary, radius=radius)
    assert found.numpy() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("turn", [lambda maps: maps, lambda maps: maps.mT])
def test_propagate__wall_parts_two_regions(turn):
    """One cell thick suffices for any radius: every line between the sides crosses it."""
    seeds, boundary = draw_noise(2, 9, 15), 0.4 * draw_noise(9, 15, seed=1)
    boundary[:, 7] = 1
    seeds[:, :, 8:] = 0
    found = turn(propagate(turn(seeds), turn(boundary), radius=6))
    assert not found[:, :, 7:].any()
    alone = turn(propagate(turn(seeds[..., :7]), turn(boundary[:, :7]), radius=6))
    assert torch.allclose(found[..., :7], alone, atol=1e-6)


@settings(max_examples=10)
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 12))
def test_propagate__turned_maps_are_walked_alike(seed, height, width):
    seeds = draw_noise(3, height, width, seed=seed)
    boundary = 0.5 * draw_noise(height, width, seed=seed + 1)
    found = propagate(seeds, boundary)
    for turn in (lambda maps: maps.flip(-1), lambda maps: maps.flip(-2), lambda maps: maps.mT):
        assert torch.allclose(propagate(turn(seeds), turn(boundary)), turn(found), atol=2e-5)
    assert torch.equal(propagate(seeds[[2, 0, 1]], boundary), found[[2, 0, 1]])


@pytest.mark.parametrize("on_cuda", [False, True])
def test_propagate__batch_equals_photo_by_photo(monkeypatch, on_cuda):
    monkeypatch.setattr(random_walk, "_launches_cost", lambda maps: on_cuda)
    seeds, boundary = draw_noise(3, 2, 9, 12), 0.5 * draw_noise(3, 9, 12, seed=1)
    singles = torch.stack([propagate(s, b) for s, b in zip(seeds, boundary, strict=True)])
    assert torch.equal(propagate(seeds, boundary), singles)


def test_propagate__product_for_cuda_equals_the_loop(monkeypatch):
    seeds, boundary = draw_noise(3, 2, 9, 12), 0.5 * draw_noise(3, 9, 12, seed=1)
    looped = propagate(seeds, boundary)
    monkeypatch.setattr(random_walk, "_launches_cost", lambda maps: True)
    assert torch.allclose(propagate(seeds, boundary), looped, atol=1e-5)


@pytest.mark.gpu
def test_propagate__cuda_equals_cpu():
    seeds, boundary = draw_noise(4, 2, 40, 50), 0.5 * draw_noise(4, 40, 50, seed=1)
    found = propagate(seeds.cuda(), boundary.cuda())
    assert found.is_cuda
    assert torch.allclose(found.cpu(), propagate(seeds, boundary), atol=1e-5)


@pytest.mark.parametrize("beta", [10, 1e4])
def test_propagate__extreme_boundaries_stay_finite(beta):
    seeds = torch.ones(1, 6, 8)
    assert not propagate(seeds, torch.ones(6, 8), beta=beta).any()
    boundary = torch.ones(6, 8)
    boundary[2, 3] = 0  # alone behind walls it has but its self loop
    found = propagate(seeds, boundary, beta=beta)
    assert found.nonzero().tolist() == [[0, 2, 3]]
    assert found[0, 2, 3].item() == pytest.approx(1)
    nearly = propagate(seeds, torch.full((6, 8), 1 - 1e-7), beta=beta)
    assert nearly.isfinite().all()


def test_propagate__photo_without_a_class():
    assert propagate(torch.zeros(0, 5, 6), torch.zeros(5, 6)).shape == (0, 5, 6)


def test_propagate__dtype_and_inputs():
    seeds, boundary = draw_noise(1, 5, 6), draw_noise(5, 6).requires_grad_()
    before = seeds.clone(), boundary.detach().clone()
    found = propagate(seeds, boundary)
    assert not found.requires_grad
    assert torch.equal(seeds, before[0])
    assert torch.equal(boundary, before[1])
    assert found.dtype == torch.float32
    assert propagate(seeds.half(), boundary.half()).dtype == torch.float32
    assert propagate(seeds.double(), boundary).dtype == torch.float64


@pytest.mark.parametrize("num_steps", [1, 2, 3, 8, 64, 256, 1024])
def test_power_terms__add_up_to_the_power(num_steps):
    terms = power_terms(num_steps)
    at = np.linspace(-1, 1, 1001)
    polynomial = sum(w * np.cos(degree * np.arccos(at)) for degree, w in terms.items())
    assert polynomial == pytest.approx(at**num_steps, abs=2e-6)
    assert sum(terms.values()) == pytest.approx(1, abs=1e-14)


def test_power_terms__are_binomials_and_few():
    assert power_terms(4) == pytest.approx({0: 3 / 8, 2: 4 / 8, 4: 1 / 8})
    for degree, weight in power_terms(256).items():
        exact = math.comb(256, (256 - degree) // 2) / 2**255 / (1 if degree else 2)
        assert weight == pytest.approx(exact, rel=1e-5)
    assert max(power_terms(256)) == 78


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 4, 5), (4, 6)), "seeds have shape (2, 4, 5), the boundary (4, 6)"),
        (((2, 4, 5), (3, 4, 5)), "seeds have shape (2, 4, 5), the boundary (3, 4, 5)"),
        (((3, 2, 4, 5), (4, 5)), "seeds have shape (3, 2, 4, 5), the boundary (4, 5)"),
        (((4, 5), (4, 5)), "seeds have shape (4, 5), the boundary (4, 5)"),
        (((2, 0, 5), (0, 5)), "seeds have shape (2, 0, 5), the boundary (0, 5)"),
    ],
)
def test_propagate__shapes_that_contradict(shapes, message):
    with pytest.raises(InputError) as caught:
        propagate(torch.zeros(shapes[0]), torch.zeros(shapes[1]))
    assert str(caught.value) == (
        f"{message}; expected (k, h, w) and (h, w), or (b, k, h, w) and (b, h, w)"
    )


@pytest.mark.parametrize(
    ("low", "high", "spans"),
    [(-0.5, 1.0, "-0.5..1"), (0.0, 1.25, "0..1.25"), (0.0, np.nan, "nan..nan")],
)
def test_propagate__boundary_that_is_no_probability(low, high, spans):
    boundary = torch.tensor([[low, high]])
    with pytest.raises(InputError) as caught:
        propagate(torch.zeros(1, 1, 2), boundary)
    assert str(caught.value) == f"boundary spans {spans}; expected probabilities in 0..1"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"radius": 1}, "radius is 1; give at least 2, the least that reaches a neighbour"),
        ({"radius": 0}, "radius is 0; give at least 2, the least that reaches a neighbour"),
        ({"beta": -1}, "beta is -1; expected 0 or more"),
        ({"beta": math.nan}, "beta is nan; expected 0 or more"),
        ({"log2_steps": -1}, "log2_steps is -1; expected 0 or more"),
    ],
)
def test_propagate__settings_out_of_range(settings, message):
    with pytest.raises(InputError) as caught:
        propagate(torch.zeros(1, 2, 2), torch.zeros(2, 2), **settings)
    assert str(caught.value) == message


def test_propagate__seeds_that_are_not_finite():
    with pytest.raises(InputError) as caught:
        propagate(torch.tensor([[[0.0, math.inf]]]), torch.zeros(1, 2))
    assert str(caught.value) == "seeds hold NaN or infinity; expected finite scores"
