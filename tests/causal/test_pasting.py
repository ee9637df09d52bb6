"""Pasting: by hand on pictures of two colours, and what holds for any masks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsss_core.causal.pasting import Picture, bare, paste

small = settings(max_examples=40, deadline=None, derandomize=True)
RED, BLUE = (200, 10, 10), (10, 10, 200)


def plain(height, width, colour):
    return np.full((height, width, 3), colour, np.uint8)


def mask_of(height, width, **boxes):
    """A mask with label k in the box (top, bottom, left, right) given as k_<number>."""
    mask = np.zeros((height, width), np.uint8)
    for name, (top, bottom, left, right) in boxes.items():
        mask[top:bottom, left:right] = int(name.removeprefix("label_"))
    return mask


def paste_red_on_blue(
    mask, tags, *, onto_mask=None, onto_tags=(2,), size=(40, 40), onto_size=None, seed=0
):
    onto_size = onto_size or size
    if onto_mask is None:
        onto_mask = np.zeros(onto_size, np.uint8)
    made = paste(
        Picture(plain(*size, RED), mask, tags),
        Picture(plain(*onto_size, BLUE), onto_mask, onto_tags),
        random=np.random.default_rng(seed),
    )
    return None if made is None else (made.photo, made.mask, made.tags)


def test_paste__the_object_alone_at_its_size_somewhere_inside():
    mask = mask_of(40, 40, label_1=(4, 14, 6, 26))
    mask[4, 6] = 0  # a corner that is no object stays with the context
    places = set()
    for seed in range(20):
        picture, labels, tags = paste_red_on_blue(mask, (0,), seed=seed)
        assert tags == (0, 2)
        red = (picture == RED).all(axis=2)
        assert ((picture == BLUE).all(axis=2) | red).all()
        assert red.sum() == 10 * 20 - 1
        assert np.array_equal(labels, red)  # label 1, and background as the context had none
        rows, columns = np.nonzero(red)
        assert (np.ptp(rows), np.ptp(columns)) == (9, 19)
        assert not red[rows.min(), columns.min()]
        places.add((rows.min(), columns.min()))
    assert len(places) > 15


def test_paste__keeps_the_size_relative_to_the_long_side_and_shrinks_what_does_not_fit():
    mask = mask_of(40, 20, label_1=(0, 20, 0, 10))
    picture, _, _ = paste_red_on_blue(mask, (0,), size=(40, 20), onto_size=(80, 100))
    red = (picture == RED).all(axis=2)
    assert red.any(axis=1).sum() == pytest.approx(20 * 2.5, abs=2)
    assert red.any(axis=0).sum() == pytest.approx(10 * 2.5, abs=2)
    tall = mask_of(40, 20, label_1=(0, 40, 0, 10))
    picture, _, _ = paste_red_on_blue(tall, (0,), size=(40, 20), onto_size=(30, 100))
    assert (picture == RED).all(axis=2).any(axis=1).sum() >= 28  # 100 px would be asked for
    assert picture.shape == (30, 100, 3)


def test_paste__one_object_of_the_tagged_ones_alone():
    mask = mask_of(40, 40, label_1=(0, 10, 0, 10), label_2=(20, 32, 0, 12), label_3=(0, 9, 20, 29))
    areas = set()
    for seed in range(30):
        picture, labels, tags = paste_red_on_blue(mask, (0, 1), onto_tags=(), seed=seed)
        area = int((picture == RED).all(axis=2).sum())
        assert tags == ((0,) if area == 100 else (1,))
        assert set(np.unique(labels)) == {0, tags[0] + 1}
        areas.add(area)
    assert areas == {100, 144}  # never label 3, which is no tag


@pytest.mark.parametrize("share", [0.0, 0.005, 0.7])
def test_paste__nothing_where_the_mask_is_noise_or_the_whole_picture(share):
    mask = np.zeros((40, 40), np.uint8)
    mask.flat[: int(share * mask.size)] = 1
    assert paste_red_on_blue(mask, (0,)) is None


def test_paste__a_hidden_object_loses_its_tag_and_an_unseen_one_keeps_it():
    mask = mask_of(10, 20, label_1=(0, 10, 0, 11))  # 11 of 20 columns, whose place is 0..9
    kept, lost = 0, 0
    onto_mask = mask_of(10, 20, label_2=(0, 10, 0, 6))
    for seed in range(40):
        picture, labels, tags = paste_red_on_blue(
            mask, (0,), onto_mask=onto_mask, onto_tags=(1, 2), size=(10, 20), seed=seed
        )
        hidden = (picture[:, :6] == RED).all(axis=2).mean()
        assert np.array_equal(labels == 1, (picture == RED).all(axis=2))
        assert np.array_equal(labels == 2, (onto_mask == 2) & (labels != 1))
        assert tags == ((0, 2) if hidden > 2 / 3 else (0, 1, 2))  # class 2 has no mask at all
        kept, lost = kept + (1 in tags), lost + (1 not in tags)
    assert kept > 5
    assert lost > 5


@small
@given(
    seed=st.integers(0, 9999),
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    onto_size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
)
def test_paste__any_masks_give_a_picture_of_the_contexts_size_or_none(seed, size, onto_size):
    random = np.random.default_rng(seed)
    mask = random.integers(0, 4, size).astype(np.uint8)
    onto_mask = random.integers(0, 4, onto_size).astype(np.uint8)
    arguments = {"size": size, "onto_mask": onto_mask, "onto_size": onto_size, "seed": seed}
    result = paste_red_on_blue(mask, (0, 2), onto_tags=(1,), **arguments)
    if result is not None:
        picture, labels, tags = result
        assert (picture.shape, labels.shape) == ((*onto_size, 3), onto_size)
        assert set(tags) in ({0}, {2}, {0, 1}, {1, 2})
        again, _, _ = paste_red_on_blue(mask, (0, 2), onto_tags=(1,), **arguments)
        assert np.array_equal(picture, again)


def test_bare__covers_objects_and_their_edges_with_the_photos_own_background():
    """Red fades out beyond its mask, as true objects do; nothing reddish and no tag is left."""
    photo, mask = plain(50, 100, BLUE), mask_of(50, 100, label_1=(20, 30, 40, 60))
    photo[18:32, 38:62] = (100, 10, 100)
    photo[20:30, 40:60] = RED
    photo[:, :, 1] = np.arange(50)[:, None]  # every row is known by its green
    seen = set()
    for seed in range(5):
        made = bare(Picture(photo, mask, (0,)), random=np.random.default_rng(seed))
        assert made.tags == ()
        assert not made.mask.any()
        assert (made.photo[:, :, (0, 2)] == (BLUE[0], BLUE[2])).all()
        away = np.ones(mask.shape, bool)
        away[16:34, 36:64] = False  # 4 % of the long side beyond the mask
        assert np.array_equal(made.photo[away], photo[away])
        seen.add(made.photo.tobytes())
    assert len(seen) == 5
    assert photo[25, 50].tolist() == [200, 25, 10]  # the photo itself is left as it was


@pytest.mark.parametrize(
    ("mask", "tags"),
    [
        (mask_of(40, 40, label_1=(0, 3, 0, 4)), (0,)),  # under a hundredth: where is the object?
        (mask_of(40, 40, label_1=(4, 20, 4, 20)), (0, 1)),  # nor is the second anywhere
        (mask_of(40, 40, label_1=(0, 34, 0, 38)), (0,)),  # hardly any background to cover it with
    ],
)
def test_bare__nothing_where_an_object_would_stay_in_sight(mask, tags):
    context = Picture(plain(40, 40, BLUE), mask, tags)
    assert bare(context, random=np.random.default_rng(0)) is None
