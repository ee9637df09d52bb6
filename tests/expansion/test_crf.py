"""The dense CRF against brute force on 16x16, and the unaries that enter it.

pydensecrf's permutohedral lattice only approximates the kernels. Over 20 pictures a case we saw,
between its marginals and those of brute force after one step: a mean difference of 0.0061 at most,
the largest one 0.31; after ten steps 96 % of equal labels at least. Where every pixel has another
colour and the colour kernel is wide, the lattice itself is off by 0.02; that case is left out.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles import crf as oracle
from wsss_core.config import CrfConfig, SegmenterTestConfig
from wsss_core.expansion.crf import hard_unary, refine, soft_unary
from wsss_core.expansion.method import labels_of

SIDE = 16
SETTINGS = {
    "irn": CrfConfig(),
    "segmenter_test": SegmenterTestConfig().crf_params,
    "gaussian alone": CrfConfig(bilateral_compat=0),
    "bilateral alone": CrfConfig(gaussian_compat=0),
    "wide colours": CrfConfig(bilateral_srgb=13, bilateral_sxy=20),
}


def draw_square(seed):
    """A noisy square on a noisy ground; class 0 scores roughly inside it, class 1 hardly at all."""
    random = np.random.default_rng(seed)
    photo = np.zeros((SIDE, SIDE, 3)) + random.integers(40, 100, 3)
    photo[4:12, 3:11] = random.integers(120, 220, 3)
    photo = (photo + random.normal(0, 4, photo.shape)).clip(0, 255).astype(np.uint8)
    scores = random.random((2, SIDE, SIDE)).astype(np.float32) * 0.2
    scores[0, 5:11, 4:10] += 0.5
    return photo, scores


def draw_noise(seed):
    """No two pixels alike: every label hangs on its own unary and its nearest neighbours."""
    random = np.random.default_rng(seed)
    photo = random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    return photo, random.random((2, SIDE, SIDE)).astype(np.float32) * 0.4


CASES = [
    (name, draw)
    for name in SETTINGS
    for draw in (draw_square, draw_noise)
    if (name, draw) != ("wide colours", draw_noise)
]


@pytest.mark.parametrize(("name", "draw"), CASES)
def test_refine__one_step_is_near_brute_force(name, draw):
    config = SETTINGS[name].model_copy(update={"iterations": 1})
    for seed in range(3):
        photo, scores = draw(seed)
        unary = soft_unary(scores, threshold=0.15)
        found = refine(photo, unary, config)
        difference = np.abs(found - oracle.refine(photo, unary, **config.model_dump()))
        assert difference.mean() < 0.007
        assert difference.max() < 0.35


@pytest.mark.parametrize(("name", "draw"), CASES)
def test_refine__labels_are_those_of_brute_force(name, draw):
    config = SETTINGS[name]
    for seed in range(3):
        photo, scores = draw(seed)
        unary = soft_unary(scores, threshold=0.15)
        found = refine(photo, unary, config).argmax(axis=0)
        expected = oracle.refine(photo, unary, **config.model_dump()).argmax(axis=0)
        assert np.mean(found == expected) > 0.95


def test_refine__follows_the_colours_to_the_edge():
    photo = np.zeros((SIDE, SIDE, 3), np.uint8)
    photo[:, 8:] = 200
    scores = np.full((1, SIDE, SIDE), 0.1, np.float32)  # below the background's 0.15
    scores[0, 4:12, 10:14] = 0.9  # but for a seed inside the right half
    marginals = refine(photo, soft_unary(scores, threshold=0.15), CrfConfig(bilateral_sxy=20))
    labels = labels_of(marginals, np.array([6]))
    assert (labels[:, :8] == 0).all()
    assert (labels[4:12, 8:] == 7).mean() > 0.9


def test_refine__marginals_sum_to_one_and_inputs_stay():
    photo, scores = draw_square(0)
    unary = soft_unary(scores, threshold=0.15)
    kept = photo.copy(), unary.copy()
    marginals = refine(photo, unary, CrfConfig())
    assert marginals.shape == unary.shape
    assert marginals.dtype == np.float32
    assert marginals.sum(axis=0) == pytest.approx(np.ones((SIDE, SIDE)), abs=1e-5)
    assert np.array_equal(photo, kept[0])
    assert np.array_equal(unary, kept[1])


def test_refine__without_kernels_the_unary_stays():
    photo, scores = draw_noise(0)
    unary = soft_unary(scores, threshold=0.15)
    found = refine(photo, unary, CrfConfig(gaussian_compat=0, bilateral_compat=0))
    assert found == pytest.approx(unary, abs=1e-5)


def test_refine__rows_and_columns_of_a_wide_photo_keep_their_places():
    photo = np.zeros((6, 20, 3), np.uint8)
    scores = np.zeros((1, 6, 20), np.float32)
    scores[0, 4:, 15:] = 0.9
    labels = refine(photo, soft_unary(scores, threshold=0.15), CrfConfig(bilateral_compat=0))
    assert labels.shape == (2, 6, 20)
    assert labels[1, 5, 18] > 0.5 > labels[1, 0, 2]


score_lists = st.lists(st.floats(0, 1, width=32), min_size=12, max_size=12)


@given(score_lists, st.sampled_from([0.05, 0.15, 0.5]))
def test_soft_unary__sums_to_one_and_keeps_the_winner(values, threshold):
    scores = np.array(values, np.float32).reshape(3, 2, 2)
    unary = soft_unary(scores, threshold=threshold)
    assert unary.shape == (4, 2, 2)
    assert unary.sum(axis=0) == pytest.approx(np.ones((2, 2)), rel=1e-5)
    assert unary.min() > 0
    stacked = np.concatenate([np.full((1, 2, 2), threshold, np.float32), scores])
    best = np.take_along_axis(stacked, unary.argmax(axis=0)[None], axis=0)[0]
    assert best == pytest.approx(stacked.max(axis=0), abs=1e-6)


def test_soft_unary__by_hand():
    unary = soft_unary(np.array([[[0.0, 0.849]]], np.float32), threshold=0.149)
    assert unary[:, 0, 0] == pytest.approx([0.15 / 0.151, 0.001 / 0.151])
    assert unary[:, 0, 1] == pytest.approx([0.15, 0.85])


@given(score_lists, st.sampled_from([0.5, 0.7, 0.9]))
def test_hard_unary__winner_has_the_confidence_and_the_others_share_the_rest(values, confidence):
    scores = np.array(values, np.float32).reshape(3, 2, 2)
    unary = hard_unary(scores, threshold=0.15, confidence=confidence)
    assert unary.sum(axis=0) == pytest.approx(np.ones((2, 2)), rel=1e-5)
    winner = np.where(scores.max(axis=0) > np.float32(0.15), scores.argmax(axis=0) + 1, 0)
    for y in range(2):
        for x in range(2):
            rest = [(1 - confidence) / 3] * 3
            expected = np.insert(rest, winner[y, x], confidence)
            assert unary[:, y, x] == pytest.approx(expected, rel=1e-5)


def test_labels_of__names_the_classes_of_a_photo():
    marginals = np.array([[[0.8, 0.1, 0.2]], [[0.1, 0.6, 0.2]], [[0.1, 0.3, 0.6]]])
    labels = labels_of(marginals, np.array([3, 19]))
    assert labels.tolist() == [[0, 4, 20]]
    assert labels.dtype == np.uint8
