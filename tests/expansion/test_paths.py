import pytest
import torch

from wsss_core.errors import InputError
from wsss_core.expansion.paths import half_plane_offsets, line_of, pair_ends, path_maximum


def draw(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_half_plane_offsets__each_pair_once():
    assert half_plane_offsets(2) == [(0, 1), (1, -1), (1, 0), (1, 1)]
    for radius, count in ((5, 34), (10, 152)):  # irn: 34 paths at radius 5
        offsets = half_plane_offsets(radius)
        both = {*offsets, *[(-dy, -dx) for dy, dx in offsets]}
        assert (len(offsets), len(both)) == (count, 2 * count)
        assert (0, radius - 1) in offsets
        assert (0, radius) not in offsets


@pytest.mark.parametrize("radius", [-1, 0, 1])
def test_half_plane_offsets__radius_without_neighbours(radius):
    with pytest.raises(InputError) as caught:
        half_plane_offsets(radius)
    assert str(caught.value) == (
        f"radius is {radius}; give at least 2, the least that reaches a neighbour"
    )


@pytest.mark.parametrize(
    ("offset", "line"),
    [
        ((0, 2), [(0, 0), (0, 1), (0, 2)]),
        ((2, 2), [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2)]),
        ((1, -2), [(0, -2), (0, -1), (0, 0), (1, -2), (1, -1), (1, 0)]),  # 2 / sqrt(5) away
        ((1, 3), [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)]),
        ((3, 3), [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (3, 2), (3, 3)]),
    ],
)
def test_line_of__hand_counted(offset, line):
    assert line_of(offset) == line


def test_line_of__same_pixels_from_either_end():
    for dy, dx in half_plane_offsets(10):
        line = line_of((dy, dx))
        assert sorted((dy - y, dx - x) for y, x in line) == line


def test_pair_ends__are_views_one_offset_apart():
    maps = torch.arange(12).reshape(3, 4)
    first, second = pair_ends(maps, (1, -2))
    assert first.tolist() == [[2, 3], [6, 7]]
    assert second.tolist() == [[4, 5], [8, 9]]
    assert first.data_ptr() == maps[0, 2].data_ptr()


def test_path_maximum__equals_a_loop_over_pairs():
    boundary = draw(2, 7, 9)
    for dy, dx in half_plane_offsets(5):
        found = path_maximum(boundary, (dy, dx))
        expected = [
            [
                [max(plane[y + v, x + u] for v, u in line_of((dy, dx))) for x in columns(9, dx)]
                for y in range(7 - dy)
            ]
            for plane in boundary
        ]
        assert found.tolist() == expected


def columns(width, dx):
    return range(max(0, -dx), width - max(0, dx))


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 9), (2, 3)])
def test_path_maximum__map_smaller_than_the_offset_has_no_pairs(shape):
    boundary = draw(2, *shape).requires_grad_()
    maximum = path_maximum(boundary, (3, -4))
    assert maximum.numel() == 0
    maximum.sum().backward()
    assert not boundary.grad.any()


@pytest.mark.parametrize("offset", [(0, 1), (2, 3), (3, -1), (1, -4)])
def test_path_maximum__gradient_equals_finite_differences(offset):
    boundary = draw(2, 5, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda maps: path_maximum(maps, offset), boundary)


def test_path_maximum__gradient_of_a_tie_goes_to_the_first():
    boundary = torch.ones(1, 3, requires_grad=True)
    (5 * path_maximum(boundary, (0, 2))).sum().backward()
    assert boundary.grad.tolist() == [[5, 0, 0]]
