import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.oracles import causal as oracle
from wsss_core.causal.confounders import (
    ConfounderSet,
    average_class_masks,
    class_shares,
    complete_confounders,
    mean_pairwise_cosine,
    squash,
    tag_prior,
)
from wsss_core.errors import DataError, InputError, StoreError

small = settings(max_examples=30, deadline=None, derandomize=True)


def confounder_set(n=3, size=4, seed=0):
    random = np.random.default_rng(seed)
    return ConfounderSet(
        c=random.random((n, size, size), np.float32),
        counts=np.arange(n),
        prior=np.full(n, 1 / n, np.float32),
    )


# --- squash ---------------------------------------------------------------------------------


def test_squash__multiples_are_block_means():
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    expected = [[(0 + 1 + 2 + 6 + 7 + 8) / 6, 6.5], [16.0, 18.5]]
    expected[0][1] = (3 + 4 + 5 + 9 + 10 + 11) / 6
    expected[1] = [(12 + 13 + 14 + 18 + 19 + 20) / 6, (15 + 16 + 17 + 21 + 22 + 23) / 6]
    np.testing.assert_array_equal(squash(values, size=2), np.float32(expected))


def test_squash__a_straddling_pixel_counts_by_its_area():
    # three pixels in two cells: the middle one lies half in each
    row = np.float32([[1.0, 0.5, 0.0]])
    np.testing.assert_allclose(squash(row, size=2)[0], [(1 + 0.25) / 1.5, 0.25 / 1.5], rtol=1e-6)


def test_squash__a_smaller_picture_becomes_blocks():
    values = np.float32([[0.25, 1.0]])
    expected = [[0.25, 0.25, 1, 1]] * 4
    np.testing.assert_array_equal(squash(values, size=4), np.float32(expected))
    np.testing.assert_array_equal(squash(np.float32([[0.5]]), size=3), np.full((3, 3), 0.5))


@small
@given(
    values=hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
        elements=st.floats(0, 1, width=32),
    ),
    size=st.integers(1, 7),
)
def test_squash__equals_the_oracle_and_keeps_the_mean(values, size):
    before = values.copy()
    found = squash(values, size=size)
    np.testing.assert_allclose(found, oracle.squashed(values, size), atol=1e-6)
    np.testing.assert_allclose(found.mean(), values.mean(), atol=1e-6)
    assert found.dtype == np.float32
    assert found.min() >= 0
    assert found.max() <= 1
    np.testing.assert_array_equal(values, before)


@pytest.mark.parametrize("shape", [(320, 213), (333, 500), (31, 33), (1, 1), (1000, 7)])
def test_squash__a_constant_stays_exactly_constant(shape):
    np.testing.assert_array_equal(squash(np.ones(shape, np.float32), size=32), np.ones((32, 32)))


# --- class_shares ---------------------------------------------------------------------------


def test_class_shares__only_a_class_s_own_pixels_and_only_tagged_classes():
    mask = np.uint8([[1, 1, 3, 255], [1, 0, 2, 255]])
    shares = class_shares(mask, tags=(0, 2), size=2)
    np.testing.assert_array_equal(shares, np.float32([[[1, 0], [0.5, 0]], [[0, 0.5], [0, 0]]]))
    np.testing.assert_array_equal(mask, [[1, 1, 3, 255], [1, 0, 2, 255]])


def test_class_shares__an_untagged_photo_has_no_map():
    assert class_shares(np.zeros((5, 4), np.uint8), tags=(), size=3).shape == (0, 3, 3)


def test_class_shares__the_highest_class_is_not_void():
    # class 253 is painted 254; 255 is void whatever the tags say
    mask = np.uint8([[254, 255]])
    np.testing.assert_array_equal(class_shares(mask, tags=(253,), size=1), [[[0.5]]])


# --- average_class_masks --------------------------------------------------------------------


def shares_of(masks, tags, size):
    return [(t, class_shares(m, tags=t, size=size)) for m, t in zip(masks, tags, strict=True)]


def test_average_class_masks__over_photos_tagged_i_alone():
    masks = [np.uint8([[1, 0]]), np.uint8([[1, 1]]), np.uint8([[2, 2]])]
    tags = [(0,), (0, 1), (1,)]
    c, counts = average_class_masks(shares_of(masks, tags, 2), num_classes=2, size=2)
    # class 0: two photos are tagged; class 1: two, in one of which it was not found
    np.testing.assert_array_equal(c[0], [[1, 0.5], [1, 0.5]])
    np.testing.assert_array_equal(c[1], [[0.5, 0.5], [0.5, 0.5]])
    np.testing.assert_array_equal(counts, [2, 1])


def test_average_class_masks__photos_without_the_tag_change_nothing():
    tagged = [((0,), np.full((1, 2, 2), 0.5, np.float32))]
    other = [((1,), np.ones((1, 2, 2), np.float32))] * 9
    alone, _ = average_class_masks(tagged, num_classes=2, size=2)
    crowded, _ = average_class_masks(tagged + other, num_classes=2, size=2)
    np.testing.assert_array_equal(alone[0], crowded[0])


def test_average_class_masks__a_class_nobody_tagged_is_zero_not_nan():
    c, counts = average_class_masks([], num_classes=2, size=3)
    np.testing.assert_array_equal(c, np.zeros((2, 3, 3)))
    np.testing.assert_array_equal(counts, [0, 0])


@small
@given(data=st.data(), size=st.integers(1, 4))
def test_average_class_masks__equals_the_oracle(data, size):
    num_classes = 3
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), max_size=5))
    labels = st.sampled_from([0, 1, 2, 3, 255])
    masks = [data.draw(hnp.arrays(np.uint8, shape, elements=labels)) for shape in shapes]
    subsets = st.sets(st.integers(0, num_classes - 1)).map(lambda s: tuple(sorted(s)))
    tags = [data.draw(subsets) for _ in masks]
    c, counts = average_class_masks(
        shares_of(masks, tags, size), num_classes=num_classes, size=size
    )
    expected = oracle.class_average_masks(masks, tags, num_classes, size)
    np.testing.assert_allclose(c, expected, atol=1e-6)
    for k in range(num_classes):
        pairs = zip(masks, tags, strict=True)
        assert counts[k] == sum(k in t and bool((m == k + 1).any()) for m, t in pairs)
    assert (c.dtype, counts.dtype) == (np.float32, np.int64)
    assert 0 <= c.min() <= c.max() <= 1


# --- complete_confounders -------------------------------------------------------------------


def flat(*values):
    return np.stack([np.full((2, 2), value, np.float32) for value in values])


@pytest.mark.parametrize(
    ("former", "pseudo", "expected"),
    [
        (None, None, (0.5, 0, 0, 0)),
        (flat(0.1, 0.2, 0, 0), None, (0.5, 0.2, 0, 0)),
        (None, flat(0.1, 0.3, 0.4, 0), (0.5, 0.3, 0.4, 0)),
        (flat(0.1, 0.2, 0, 0), flat(0.1, 0.3, 0.4, 0), (0.5, 0.2, 0.4, 0)),
    ],
)
def test_complete_confounders__former_first_then_pseudo_masks(former, pseudo, expected):
    c, counts = flat(0.5, 0, 0, 0), np.array([3, 0, 0, 0])
    found = complete_confounders(c, counts=counts, former=former, pseudo=pseudo)
    np.testing.assert_array_equal(found, flat(*expected))
    np.testing.assert_array_equal(c, flat(0.5, 0, 0, 0))
    np.testing.assert_array_equal(counts, [3, 0, 0, 0])


# --- tag_prior ------------------------------------------------------------------------------


def test_tag_prior__kinds():
    tags = [(0,), (0, 2), (0,)]
    np.testing.assert_array_equal(
        tag_prior(tags, num_classes=4, kind="uniform"), np.float32([0.25] * 4)
    )
    frequency = tag_prior(tags, num_classes=4, kind="frequency")
    np.testing.assert_array_equal(frequency, np.float32([0.75, 0, 0.25, 0]))
    assert frequency.dtype == np.float32


@small
@given(
    tags=st.lists(st.sets(st.integers(0, 79)).map(tuple), max_size=20).filter(any),
    kind=st.sampled_from(["uniform", "frequency"]),
)
def test_tag_prior__sums_to_one(tags, kind):
    prior = tag_prior(tags, num_classes=80, kind=kind)
    assert abs(prior.astype(np.float64).sum() - 1) < 1e-6
    assert prior.min() >= 0


def test_tag_prior__refuses_what_it_cannot_count():
    with pytest.raises(DataError, match="no training photo has a tag"):
        tag_prior([(), ()], num_classes=2, kind="frequency")
    for tag in (2, -1):
        with pytest.raises(DataError, match=rf"tagged {tag}; expected a class in 0..1"):
            tag_prior([(0,), (tag,)], num_classes=2, kind="frequency")


# --- mean_pairwise_cosine -------------------------------------------------------------------


def test_mean_pairwise_cosine__hand_counted():
    c = np.float32([[[1, 0], [0, 0]], [[0, 1], [0, 0]], [[1, 1], [0, 0]]])
    assert mean_pairwise_cosine(c) == pytest.approx((0 + 2 * 0.5**0.5) / 3)
    assert mean_pairwise_cosine(c * np.float32(0.1)) == pytest.approx((2 * 0.5**0.5) / 3)
    assert mean_pairwise_cosine(c[:2]) == 0
    assert mean_pairwise_cosine(np.stack([c[2], c[2] / 2])) == pytest.approx(1)


def test_mean_pairwise_cosine__empty_maps_are_left_out():
    c = np.float32([[[1, 0], [0, 0]], [[0, 0], [0, 0]], [[1, 1], [0, 0]]])
    assert mean_pairwise_cosine(c) == pytest.approx(0.5**0.5)
    assert mean_pairwise_cosine(c[:2]) == 1
    assert mean_pairwise_cosine(np.zeros((3, 2, 2), np.float32)) == 1


# --- ConfounderSet --------------------------------------------------------------------------


def test_confounder_set__round_trip_with_equal_bytes(tmp_path):
    confounders = confounder_set()
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    confounders.save(first)
    loaded = ConfounderSet.load(first)
    loaded.save(second)
    assert first.read_bytes() == second.read_bytes()
    for name in ("c", "counts", "prior"):
        found, expected = getattr(loaded, name), getattr(confounders, name)
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == expected.dtype
    assert (loaded.num_classes, loaded.size) == (3, 4)


def test_confounder_set__a_transposed_view_is_saved_as_it_reads(tmp_path):
    plain = confounder_set()
    turned = ConfounderSet(c=plain.c.transpose(0, 2, 1), counts=plain.counts, prior=plain.prior)
    turned.save(tmp_path / "c")
    np.testing.assert_array_equal(ConfounderSet.load(tmp_path / "c").c, turned.c)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("c", np.zeros((3, 4, 5), np.float32), r"shape \(3, 4, 5\); expected \(n, s, s\)"),
        ("c", np.zeros((0, 4, 4), np.float32), r"expected \(n, s, s\)"),
        ("c", np.zeros((3, 4, 4)), "c of a confounder set is float64; expected float32"),
        ("c", np.full((3, 4, 4), 1.5, np.float32), r"spans 1.5..1.5; expected values in 0..1"),
        ("c", np.full((3, 4, 4), np.nan, np.float32), r"expected values in 0..1"),
        ("counts", np.zeros(2, np.int64), r"counts of .* shape \(2,\); expected \(3,\)"),
        ("prior", np.zeros((3, 1), np.float32), r"prior of .* shape \(3, 1\); expected \(3,\)"),
        ("prior", np.full(3, 0.5, np.float32), "prior sums to 1.5"),
        ("prior", np.float32([1.5, -0.5, 0]), "expected shares that sum to 1"),
    ],
)
def test_confounder_set__refuses(name, value, message):
    good = confounder_set()
    parts = {part: getattr(good, part) for part in ("c", "counts", "prior")}
    with pytest.raises(InputError, match=message):
        ConfounderSet(**{**parts, name: value})


def test_confounder_set__a_damaged_or_missing_file_is_one_line(tmp_path):
    damaged = tmp_path / "damaged.safetensors"
    confounder_set().save(damaged)
    damaged.write_bytes(damaged.read_bytes()[:-8])
    for path in (damaged, tmp_path / "missing.safetensors"):
        with pytest.raises(StoreError, match="run its round again") as caught:
            ConfounderSet.load(path)
        assert "\n" not in str(caught.value)
