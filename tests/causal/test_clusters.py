"""Groups of background: against planted ones and a loop, and what becomes of them."""

import numpy as np
import pytest
import torch

from wsss_core.causal.clusters import Clusters, find_clusters

CORNERS = np.float32([[0, 0, 5], [9, 0, 5], [0, 9, 5]])


def draw_cells(num=60, seed=0):
    """(cells, true group of each): three clouds, and a channel that never changes."""
    random = np.random.default_rng(seed)
    groups = random.integers(0, 3, num)
    noise = random.normal(size=(num, 3)) * [0.3, 0.3, 0]
    return (CORNERS[groups] + noise).astype(np.float32), groups


@pytest.mark.parametrize("seed", range(4))
def test_find_clusters__finds_the_planted_groups(seed):
    cells, groups = draw_cells()
    found = find_clusters(cells, num=3, seed=seed)
    near = found.assign(cells.T[:, :, None], np.ones((60, 1), bool)).argmax(axis=0)[:, 0]
    for group in range(3):
        assert len(set(near[groups == group])) == 1
        own = near[groups == group][0]
        mean = cells[groups == group].mean(axis=0)
        z = found.prototypes()[own]
        np.testing.assert_allclose(z, mean / np.linalg.norm(mean), rtol=1e-5)
    assert len(set(near)) == 3


def test_find_clusters__rests_where_no_cell_would_change():
    """Each centre is the mean of the cells that are nearest to it, by a loop."""
    random = np.random.default_rng(1)
    cells = random.normal(size=(80, 4)).astype(np.float32) * np.float32([1, 10, 0.1, 3])
    found = find_clusters(cells, num=5, seed=0)
    points = (cells - cells.mean(axis=0, dtype=np.float64)) / cells.std(axis=0, dtype=np.float64)
    near = [int(np.argmin([((p - c) ** 2).sum() for c in found.centres])) for p in points]
    assert set(near) == set(range(5))
    for group, centre in enumerate(found.centres):
        members = [p for p, n in zip(points, near, strict=True) if n == group]
        np.testing.assert_allclose(centre, np.mean(members, axis=0), atol=1e-9)


def test_find_clusters__a_channel_counts_by_its_own_spread():
    random = np.random.default_rng(2)
    side = np.repeat([-1.0, 1.0], 30)
    loud = random.normal(size=60) * 100
    cells = np.stack([loud, side + random.normal(size=60) * 0.01], axis=1).astype(np.float32)
    stretched = cells * np.float32([1, 1000])
    one, other = (find_clusters(c, num=4, seed=0) for c in (cells, stretched))
    np.testing.assert_allclose(one.centres, other.centres, rtol=1e-3, atol=1e-3)


def test_find_clusters__is_a_function_of_its_seed_alone():
    cells, _ = draw_cells(seed=3)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = find_clusters(cells, num=6, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(first.centres, find_clusters(cells, num=6, seed=1).centres)
    assert not np.array_equal(first.centres, find_clusters(cells, num=6, seed=2).centres)


def test_find_clusters__no_more_groups_than_cells_that_differ():
    cells = np.float32([[0, 0], [1, 1], [0, 0]])
    assert len(find_clusters(cells, num=5, seed=0)) == 2
    empty = find_clusters(np.zeros((0, 2), np.float32), num=5, seed=0)
    assert len(empty) == 0
    assert empty.prototypes().shape == (0, 2)
    assert empty.assign(np.zeros((2, 3, 4), np.float32), np.ones((3, 4), bool)).shape == (0, 3, 4)


def test_assign__background_alone_is_somebodys():
    clusters = Clusters(np.zeros(1), np.full(1, 2.0), np.array([[-1.0], [1.0]]))
    features = np.float32([[[-3, 3, 0], [5, -1, 1]]])
    background = np.array([[True, True, True], [False, True, False]])
    groups = clusters.assign(features, background)
    assert groups.tolist() == [
        [[1, 0, 1], [0, 1, 0]],  # 0 is as near to both: the first
        [[0, 1, 0], [0, 0, 0]],
    ]


def test_prototypes__are_mean_features_of_norm_1():
    clusters = Clusters(np.array([1.0, 1]), np.array([2.0, 3]), np.array([[1.0, 1], [-0.5, 2]]))
    np.testing.assert_allclose(clusters.prototypes(), [[0.6, 0.8], [0, 1]], rtol=1e-6)
