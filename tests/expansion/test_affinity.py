"""The affinity loss against brute force over all pairs of a small map."""

import math

import numpy as np
import pytest
import torch

from tests.oracles import boundary as oracle
from wsss_core.expansion.affinity import affinity_loss, count_pairs

IGNORED = 255


def draw(seed, size):
    """Two maps of boundaries and of labels 0..2, a fifth of them ignored, in patches."""
    random = np.random.default_rng(seed)
    boundary = random.uniform(0.02, 0.98, (2, *size))
    coarse = random.choice([0, 0, 1, 2, IGNORED], (2, -(-size[0] // 3), -(-size[1] // 3)))
    labels = coarse.repeat(3, axis=1).repeat(3, axis=2)[:, : size[0], : size[1]]
    return boundary, labels.astype(np.uint8)


def value_and_gradient(boundary, labels, radius):
    leaf = torch.tensor(boundary, requires_grad=True)
    loss = affinity_loss(leaf, torch.tensor(labels), radius=radius)
    loss.backward()
    return loss.item(), leaf.grad.numpy()


@pytest.mark.parametrize(
    ("size", "radius"), [((12, 12), 10), ((12, 12), 5), ((5, 14), 4), ((3, 3), 10)]
)
def test_affinity_loss__value_and_gradient_of_every_pair(size, radius):
    boundary, labels = draw(radius, size)
    value, gradient = value_and_gradient(boundary, labels, radius)
    expected, expected_gradient = oracle.affinity_loss(boundary, labels, radius=radius)
    assert value == pytest.approx(expected, rel=1e-9)
    assert gradient == pytest.approx(expected_gradient, rel=1e-9, abs=1e-12)
    assert np.abs(gradient).max() > 1e-3


def test_affinity_loss__gradient_equals_finite_differences():
    boundary, labels = (maps[:1] for maps in draw(0, (4, 5)))
    assert torch.autograd.gradcheck(
        lambda maps: affinity_loss(3 * maps, torch.tensor(labels), radius=3) ** 2,
        torch.tensor(boundary / 3, requires_grad=True),
    )


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, 0], -math.log(0.3) / 4),
        ([2, 2], -math.log(0.3) / 4),
        ([0, 2], -math.log(0.7) / 2),
        ([1, 2], -math.log(0.7) / 2),
        ([0, 0, 1], -math.log(0.3) / 4 - math.log(0.9) / 2),  # 0-1; 1-2 and 0-2
        ([0, 0, IGNORED], -math.log(0.3) / 4),
    ],
)
def test_affinity_loss__by_hand(labels, expected):
    """Boundaries 0.2, 0.7, 0.9 in a row; pairs reach their neighbour and the next but one."""
    boundary = torch.tensor([[[0.2, 0.7, 0.9][: len(labels)]]], dtype=torch.float64)
    loss = affinity_loss(boundary, torch.tensor([[labels]]), radius=3)
    assert loss.item() == pytest.approx(expected, abs=1e-4)


def test_affinity_loss__no_pair_with_two_labels():
    boundary = torch.full((2, 4, 4), 0.5)
    labels = torch.full((2, 4, 4), IGNORED)
    assert affinity_loss(boundary, labels, radius=5) is None
    labels[:, 0, 0] = 1  # one cell has no partner
    assert affinity_loss(boundary, labels, radius=5) is None
    labels[0, 3, 3] = 1  # sqrt(18) < 5 away
    assert affinity_loss(boundary, labels, radius=5) is not None
    assert affinity_loss(boundary, labels, radius=4) is None


def test_affinity_loss__slices_of_a_batch_sum_to_its_loss():
    """The second photo has pairs of one kind alone, the third none."""
    torch.manual_seed(0)
    boundary = torch.rand(3, 6, 7, dtype=torch.float64)
    labels = torch.randint(0, 3, (3, 6, 7))
    labels[1], labels[2] = 2, 255
    counts = count_pairs(labels, radius=4)
    parts = [
        affinity_loss(boundary[k : k + 1], labels[k : k + 1], radius=4, counts=counts)
        for k in range(3)
    ]
    whole = affinity_loss(boundary, labels, radius=4)
    assert parts[2] == 0
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-12)


def test_affinity_loss__extreme_boundaries_stay_finite():
    labels = torch.tensor([[[0, 0, 1, 1]]], dtype=torch.uint8)
    for value in (0.0, 1.0):
        boundary = torch.full((1, 1, 4), value, requires_grad=True)
        loss = affinity_loss(boundary, labels, radius=4)
        loss.backward()
        assert loss.item() < -math.log(1e-5)
        assert torch.isfinite(boundary.grad).all()


def test_affinity_loss__keeps_one_map_for_the_way_back():
    """What autograd would keep of 152 offsets is gigabytes for irn's batch."""
    boundary = torch.rand(2, 6, 7, requires_grad=True)
    loss = affinity_loss(boundary, torch.zeros(2, 6, 7, dtype=torch.uint8), radius=5)
    assert [tensor.shape for tensor in loss.grad_fn.saved_tensors] == [(2, 6, 7)]
    assert type(loss.grad_fn.next_functions[0][0]).__name__ == "AccumulateGrad"
