"""Geometry: a crop, its labels and its affine speak of the same pixels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from wsss_core.causal.intervention import place_context
from wsss_core.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Crop,
    crop_labels,
    crop_photo,
    draw_crop,
    normalise,
    resize_photo,
    scaled_size,
)

IGNORED = 255

small_crops = st.builds(
    lambda height, width, flip, side, top, left: Crop(
        height, width, flip, round(top * (height - side)), round(left * (width - side)), side
    ),
    st.integers(1, 15),
    st.integers(1, 15),
    st.booleans(),
    st.integers(1, 24),
    st.floats(0, 1),
    st.floats(0, 1),
)


def sample(picture, crop):
    """A picture (h,w) seen through the crop's affine by nearest `grid_sample`; 0 outside."""
    side = crop.side_px
    grid = F.affine_grid(crop.affine()[None], [1, 1, side, side], align_corners=False)
    found = F.grid_sample(
        picture[None, None].double(), grid.double(), mode="nearest", align_corners=False
    )
    return found[0, 0]


@given(small_crops)
def test_crop_labels__affine_finds_the_same_pixels(crop):
    """Every pixel of the picture has its own number; padding and flips included."""
    count = crop.height_px * crop.width_px
    labels = np.arange(count, dtype=np.uint8).reshape(crop.height_px, crop.width_px)
    found = crop_labels(labels, crop)
    assert found.shape == (crop.side_px, crop.side_px)
    assert found.dtype == torch.int64
    expected = sample(torch.from_numpy(labels) + 1.0, crop).long() - 1
    assert torch.equal(found, torch.where(expected < 0, IGNORED, expected))


@given(small_crops, st.integers(0, 2**31))
def test_crop_photo__unresized_pixels_are_those_of_the_affine(crop, seed):
    shape = (crop.height_px, crop.width_px, 3)
    photo = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    found = crop_photo(photo, crop)
    expected = torch.stack(
        [sample(plane, crop) for plane in normalise(resize_photo(photo, shape[:2]))]
    )
    assert torch.allclose(found.double(), expected, atol=1e-6)


@settings(deadline=None, max_examples=25)
@given(st.integers(20, 60), st.integers(20, 60), st.integers(0, 2**31))
def test_crop_photo__resized_ramp_keeps_its_place(height, width, seed):
    """Red tells x and green y of the original: the crop shows what the affine points at."""
    y, x = np.mgrid[:height, :width]
    photo = np.stack([4 * x, 4 * y, 0 * x], axis=-1).astype(np.uint8)
    crop = draw_crop(
        (height, width), long_side_px=(24, 90), crop_px=40, seed=seed, epoch=0, photo_id="a"
    )
    found = crop_photo(photo, crop)
    deviation, mean = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_STD, IMAGENET_MEAN))
    colours = (found * deviation + mean) * 255

    grid = F.affine_grid(crop.affine()[None], [1, 1, 40, 40], align_corners=False)[0]
    at_x, at_y = ((grid[..., k] + 1) / 2 * size - 0.5 for k, size in ((0, width), (1, height)))
    # away from the picture's edge, where interpolation would have to invent pixels
    margin = 1 + max(height / crop.height_px, width / crop.width_px)
    inside = (at_x > margin) & (at_x < width - 1 - margin)
    inside &= (at_y > margin) & (at_y < height - 1 - margin)
    for plane, at in ((colours[0], at_x), (colours[1], at_y)):
        wrong = (plane - 4 * at)[inside].abs()
        assert not wrong.numel() or wrong.max() < 1.5


@settings(deadline=None, max_examples=25)
@given(st.booleans(), st.integers(0, 2**31))
def test_crop__context_map_lies_below_its_pixels(flip, seed):
    """A ramp as context, placed through the affine, shows each crop pixel's own whole-picture x."""
    random = np.random.default_rng(seed)
    height, width, side = random.integers(20, 60, 3)
    top, left = (
        int(random.integers(*sorted((0, s - side)), endpoint=True)) for s in (height, width)
    )
    crop = Crop(int(height), int(width), flip, top, left, int(side))
    cells = torch.arange(32.0).expand(1, 1, 32, 32)  # column number
    placed = place_context(cells, affine=crop.affine()[None], size=(int(side), int(side)))[0, 0]

    columns = np.arange(side) + left
    if flip:
        columns = width - 1 - columns
    rows = np.arange(side) + top
    expected = ((columns + 0.5) * 32 / width - 0.5).clip(0, 31)
    inside = np.outer((rows >= 0) & (rows < height), (columns >= 0) & (columns < width))
    wrong = np.abs(placed.numpy() - expected)[inside]
    # where a pixel spans several cells the border averages inwards, by half a cell at most
    assert wrong.max(initial=0) < 0.5
    assert not placed.numpy()[~inside].any()


def test_crop_photo__flip_by_hand():
    photo = np.zeros((2, 3, 3), np.uint8)
    photo[0, 0] = 255
    plain = crop_photo(photo, Crop(2, 3, False, 0, -1, 4))
    flipped = crop_photo(photo, Crop(2, 3, True, 0, -1, 4))
    white = (1 - IMAGENET_MEAN[0]) / IMAGENET_STD[0]
    assert plain[0, 0, 1].item() == pytest.approx(white)
    assert flipped[0, 0, 3].item() == pytest.approx(white)
    assert not plain[:, :, 0].any()
    assert not plain[:, 2:].any()


def test_affine__whole_picture_is_the_identity_and_the_flip_mirrors_x():
    assert torch.equal(Crop(8, 8, False, 0, 0, 8).affine(), torch.eye(2, 3))
    assert torch.equal(Crop(8, 8, True, 0, 0, 8).affine(), torch.tensor([[-1.0, 0, 0], [0, 1, 0]]))


def test_affine__right_half_by_hand():
    """The right half of a 4 x 8 picture spans 0..1 of its -1..1."""
    affine = Crop(4, 8, False, 0, 4, 4).affine()
    assert torch.allclose(affine, torch.tensor([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]]))


def draw(size=(100, 60), *, seed=1, epoch=2, photo_id="cat"):
    return draw_crop(
        size, long_side_px=(32, 64), crop_px=48, seed=seed, epoch=epoch, photo_id=photo_id
    )


def test_draw_crop__is_pure_in_seed_epoch_and_photo():
    np.random.seed(0)  # noqa: NPY002 - the global generator must not matter
    torch.manual_seed(0)
    first = draw()
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    assert draw() == first
    others = {draw(seed=2), draw(epoch=3), draw(photo_id="dog")}
    assert first not in others
    assert len(others) == 3


@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 2**31))
def test_draw_crop__covers_the_canvas_or_lies_inside_the_picture(height, width, seed):
    crop = draw((height, width), seed=seed)
    long = max(crop.height_px, crop.width_px)
    assert 32 <= long <= 64
    ratio = long / max(height, width)
    assert crop.height_px == pytest.approx(max(1, height * ratio), abs=1)
    assert crop.width_px == pytest.approx(max(1, width * ratio), abs=1)
    for side, start in ((crop.height_px, crop.top_px), (crop.width_px, crop.left_px)):
        assert min(0, side - 48) <= start <= max(0, side - 48)


def test_draw_crop__both_ends_of_the_range_and_both_flips_occur():
    crops = [draw((64, 64), seed=seed) for seed in range(400)]
    assert {32, 64} <= {crop.height_px for crop in crops}
    assert 150 < sum(crop.flip for crop in crops) < 250
    tops = {crop.top_px for crop in crops if crop.height_px == 40}
    assert min(tops) >= -8
    assert max(tops) <= 0


@given(st.integers(1, 3000), st.floats(0.1, 4), st.sampled_from([1, 16, 32]))
def test_scaled_size__nearest_positive_multiple(side, scale, multiple):
    height, width = scaled_size((side, 2 * side), scale, multiple=multiple)
    for found, wanted in ((height, side * scale), (width, 2 * side * scale)):
        assert found % multiple == 0
        assert found >= multiple
        assert found == multiple or abs(found - wanted) <= multiple / 2 + 1e-9


def test_scaled_size__a_voc_photo_at_irns_scales():
    sizes = [scaled_size((375, 500), scale, multiple=16) for scale in (0.5, 1.0, 1.5, 2.0)]
    assert sizes == [
        (192, 256),
        (368, 496),
        (560, 752),
        (752, 992),
    ]  # 62.5 cells: a half goes to the even number


def test_normalise__by_hand():
    photo = torch.tensor([0, 255], dtype=torch.uint8).expand(3, 1, 2)
    found = normalise(photo)
    for channel in range(3):
        expected = [
            -IMAGENET_MEAN[channel] / IMAGENET_STD[channel],
            (1 - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel],
        ]
        assert found[channel, 0].tolist() == pytest.approx(expected, abs=1e-6)


def test_resize_photo__own_size_is_the_photo():
    photo = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(resize_photo(photo, (5, 7)).permute(1, 2, 0).numpy(), photo)


def test_resize_photo__shrinking_averages_a_checkerboard():
    """Antialiased: each pixel becomes grey; without, a third of the size would pick pixels."""
    board = (np.indices((30, 30)).sum(axis=0) % 2 * 255).astype(np.uint8)
    small = resize_photo(np.stack([board] * 3, axis=-1), (10, 10)).float()
    assert small[:, 1:-1, 1:-1].sub(127.5).abs().max() < 20


def test_crop_labels__no_label_is_invented():
    labels = np.array([[0, 5], [255, 9]], np.uint8)
    found = crop_labels(labels, Crop(7, 7, False, 0, 0, 7))
    assert set(found.unique().tolist()) == {0, 5, 9, 255}


def test_crop_labels__resized_picks_the_pixel_below_the_cell_centre():
    """Centres (k + 1/2) 3/5 of five cells over three pixels: 0.3, 0.9, 1.5, 2.1, 2.7."""
    labels = np.array([[4, 5, 6]], np.uint8)
    found = crop_labels(labels, Crop(5, 5, False, 0, 0, 5))
    assert found[0].tolist() == [4, 4, 5, 6, 6]
    assert crop_labels(labels, Crop(5, 5, True, 0, 0, 5))[0].tolist() == [6, 6, 5, 4, 4]
