import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call
from torch.nn import functional as F

from tests.oracles import causal as oracle
from wsss_core.causal.confounders import ConfounderSet
from wsss_core.causal.intervention import (
    Intervention,
    SegMaskContext,
    UniformIntervention,
    build_context,
    context_report,
    derangement,
    place_context,
    root_mean_square,
    say_dead,
    shuffle_cells,
)
from wsss_core.config import CausalConfig
from wsss_core.errors import InputError

small = settings(max_examples=25, deadline=None, derandomize=True)
SCALES = ["n", "paper"]


def confounder_set(n=3, size=4, seed=0, prior=None):
    random = np.random.default_rng(seed)
    prior = np.full(n, 1 / n) if prior is None else np.asarray(prior)
    return ConfounderSet(
        c=random.random((n, size, size), np.float32),
        counts=np.ones(n, np.int64),
        prior=prior.astype(np.float32),
    )


def photos(num, size=4, seed=1, dtype=torch.float32):
    return torch.rand(num, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def awake(module, std=1.0, seed=2):
    """The module with weights so large that alpha is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)
    return module


def causal_settings(**changes):
    return CausalConfig(context_size=4, **changes)


def blobs(num, size, seed):
    """One soft round blob a map, somewhere in the middle."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    centres, widths = random.uniform(0.25, 0.75, (num, 2)), random.uniform(0.08, 0.25, num)
    maps = [
        np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * w**2))
        for (cy, cx), w in zip(centres, widths, strict=True)
    ]
    return np.stack(maps).astype(np.float32)


# --- alpha and M ----------------------------------------------------------------------------


def two_confounders():
    """n = 2, one cell a side: W1 X_m = (0.5, 1), W2 c_1 = (2, 0), W2 c_2 = (1, 0)."""
    module_set = ConfounderSet(
        c=np.float32([[[1.0]], [[0.5]]]), counts=np.array([1, 1]), prior=np.float32([0.25, 0.75])
    )
    weights = {"w1": torch.tensor([[1.0], [2.0]]), "w2": torch.tensor([[2.0], [0.0]])}
    return module_set, weights, torch.tensor([[[0.5]]])


def test_intervention__hand_counted_with_two_confounders():
    confounders, weights, x_m = two_confounders()
    module = Intervention(confounders, scale="paper", seed=0)
    module.load_state_dict(weights)
    # logits 0.5*2/sqrt(2) and 0.5*1/sqrt(2): their difference is 1/(2 sqrt(2))
    first = 1 / (1 + math.exp(-0.5 / math.sqrt(2)))
    torch.testing.assert_close(module.alpha(x_m), torch.tensor([[first, 1 - first]]))
    m = 0.25 * first * 1.0 + 0.75 * (1 - first) * 0.5
    torch.testing.assert_close(module(x_m), torch.tensor([[[[m]]]]))
    # scale n: twice that, over the RMS of 0.25*1 + 0.75*0.5
    scaled = Intervention(confounders, scale="n", seed=0)
    scaled.load_state_dict(weights)
    torch.testing.assert_close(scaled(x_m), torch.tensor([[[[2 * m / 0.625]]]]))


@small
@given(
    n=st.integers(1, 4),
    size=st.integers(1, 4),
    seed=st.integers(0, 999),
    scale=st.sampled_from(SCALES),
)
def test_intervention__equals_the_oracle_in_float64(n, size, seed, scale):
    random = np.random.default_rng(seed)
    prior = random.dirichlet(np.ones(n)).astype(np.float32)
    confounders = confounder_set(n, size, seed, prior)
    module = awake(Intervention(confounders, scale=scale, seed=seed), seed=seed).double()
    x_m = photos(2, size, seed, torch.float64)
    c = confounders.c.reshape(n, -1).astype(np.float64)
    w1, w2 = module.w1.detach().numpy(), module.w2.detach().numpy()
    alphas, maps = module.alpha(x_m).detach().numpy(), module(x_m).detach().numpy()
    for photo, found_alpha, found_map in zip(x_m.numpy(), alphas, maps, strict=True):
        expected = oracle.alpha(photo.ravel(), c, w1, w2)
        np.testing.assert_allclose(found_alpha, expected, rtol=1e-10)
        m = oracle.context_map(expected, c, prior.astype(np.float64), scale)
        np.testing.assert_allclose(found_map.ravel(), m, rtol=1e-10)


@small
@given(seed=st.integers(0, 999), std=st.sampled_from([0.0, 0.02, 1.0, 30.0]))
def test_alpha__rows_sum_to_one_and_are_shares(seed, std):
    module = awake(Intervention(confounder_set(5), scale="n", seed=0), std, seed)
    alpha = module.alpha(photos(3, seed=seed))
    torch.testing.assert_close(alpha.sum(1), torch.ones(3))
    assert alpha.min() >= 0
    assert alpha.max() <= 1


@pytest.mark.parametrize("prior", [[0.5, 0.3, 0.2], None])
@pytest.mark.parametrize("scale", SCALES)
def test_intervention__is_the_prior_mean_of_its_terms(prior, scale):
    confounders = confounder_set(prior=prior)
    x_m = photos(3)
    for module in (
        awake(Intervention(confounders, scale=scale, seed=0)),
        UniformIntervention(confounders, scale=scale),
    ):
        terms = module.terms(x_m)
        assert terms.shape == (3, 3, 4, 4)
        weights = torch.from_numpy(confounders.prior)[None, :, None, None]
        torch.testing.assert_close((weights * terms).sum(1, keepdim=True), module(x_m))


@pytest.mark.parametrize("scale", SCALES)
def test_intervention__one_confounder_is_its_own_map(scale):
    confounders = confounder_set(n=1)
    module = awake(Intervention(confounders, scale=scale, seed=0))
    x_m = photos(2)
    torch.testing.assert_close(module.alpha(x_m), torch.ones(2, 1))
    c = torch.from_numpy(confounders.c)
    expected = c / root_mean_square(c) if scale == "n" else c
    torch.testing.assert_close(module(x_m), expected.expand(2, 1, 4, 4))


@small
@given(seed=st.integers(0, 999), scale=st.sampled_from(SCALES))
def test_intervention__equal_confounders_leave_alpha_no_say(seed, scale):
    plain = confounder_set(n=4, seed=seed)
    same = ConfounderSet(c=plain.c[[0] * 4], counts=plain.counts, prior=plain.prior)
    x_m = photos(3, seed=seed)
    learned = awake(Intervention(same, scale=scale, seed=0), 10.0, seed)
    torch.testing.assert_close(learned(x_m), UniformIntervention(same, scale=scale)(x_m))


@small
@given(order=st.permutations(range(4)), scale=st.sampled_from(SCALES))
def test_intervention__permuting_classes_changes_nothing(order, scale):
    plain = confounder_set(n=4, prior=[0.1, 0.2, 0.3, 0.4])
    order = list(order)
    moved = ConfounderSet(c=plain.c[order], counts=plain.counts[order], prior=plain.prior[order])
    x_m = photos(3)
    before = awake(Intervention(plain, scale=scale, seed=0))
    after = awake(Intervention(moved, scale=scale, seed=0))
    torch.testing.assert_close(before.alpha(x_m)[:, order], after.alpha(x_m))
    torch.testing.assert_close(before(x_m), after(x_m))


def test_intervention__zero_weights_are_the_uniform_control():
    confounders, x_m = confounder_set(prior=[0.5, 0.3, 0.2]), photos(3)
    learned = awake(Intervention(confounders, scale="n", seed=0), std=0.0)
    torch.testing.assert_close(learned(x_m), UniformIntervention(confounders, scale="n")(x_m))


def test_intervention__w1_acts_on_the_photo_and_w2_on_the_confounders():
    module = awake(Intervention(confounder_set(), scale="n", seed=0))
    swapped = awake(Intervention(confounder_set(), scale="n", seed=0))
    swapped.load_state_dict({"w1": module.w2.detach(), "w2": module.w1.detach()})
    x_m = photos(2)
    assert not torch.allclose(module.alpha(x_m), swapped.alpha(x_m), atol=1e-3)


@pytest.mark.parametrize("context", ["conta", "uniform_alpha", "shuffled_cells", "shuffled_photo"])
def test_scale__n_gives_every_variant_unit_amplitude(context):
    confounders = confounder_set(n=20, prior=np.arange(20) / 190)
    module = build_context(causal_settings(context=context), confounders, seed=0, x_m_rms=1.0)
    assert root_mean_square(module(photos(50))) == pytest.approx(1, abs=0.01)
    paper = build_context(
        causal_settings(context=context, scale="paper"), confounders, seed=0, x_m_rms=1.0
    )
    assert paper.gain == 1
    torch.testing.assert_close(module(photos(2)) / module.gain, paper(photos(2)))


def test_scale__empty_confounders_give_an_empty_map_not_nan():
    empty = ConfounderSet(
        c=np.zeros((2, 4, 4), np.float32),
        counts=np.zeros(2, np.int64),
        prior=np.float32([0.5, 0.5]),
    )
    assert not Intervention(empty, scale="n", seed=0)(photos(2)).any()
    assert not SegMaskContext(divisor=0.0)(torch.zeros(2, 4, 4)).any()


def test_intervention__gradcheck():
    confounders = confounder_set(n=3, size=2, prior=[0.5, 0.3, 0.2])
    module = awake(Intervention(confounders, scale="n", seed=0)).double()
    x_m = photos(2, 2, dtype=torch.float64).requires_grad_()

    def context(x_m, w1, w2):
        return functional_call(module, {"w1": w1, "w2": w2}, x_m)

    assert torch.autograd.gradcheck(context, (x_m, module.w1, module.w2))


def test_intervention__a_map_s_loss_reaches_w1_and_w2_alone():
    module = Intervention(confounder_set(), scale="n", seed=0)
    x_m = photos(2)
    before = x_m.clone()
    (module(x_m) * photos(2, seed=5)[:, None]).sum().backward()
    assert [name for name, _ in module.named_parameters()] == ["w1", "w2"]
    assert module.w1.grad.abs().max() > 0
    assert module.w2.grad.abs().max() > 0
    torch.testing.assert_close(x_m, before, rtol=0, atol=0)


def test_intervention__can_learn_to_tell_photos_apart():
    # two photos, two confounders: weights exist that give each photo its own map
    c = np.zeros((2, 4, 4), np.float32)
    c[0, :2], c[1, 2:] = 1, 1
    confounders = ConfounderSet(c=c, counts=np.array([1, 1]), prior=np.float32([0.5, 0.5]))
    module = Intervention(confounders, scale="paper", seed=0)
    x_m = torch.from_numpy(c)
    target = 0.5 * x_m[:, None]
    optimiser = torch.optim.SGD(module.parameters(), lr=1.0, momentum=0.9)
    for _ in range(200):
        optimiser.zero_grad()
        (module(x_m) - target).square().mean().backward()
        optimiser.step()
    assert module.alpha(x_m).diagonal().min() > 0.9
    assert context_report(module, x_m)["context/alpha_spread"] > 0.8


def test_intervention__half_precision_never_reaches_it():
    module = Intervention(confounder_set(n=20, size=8), scale="n", seed=0)
    x_m = photos(4, 8)
    affine = torch.tensor([[[0.7, 0, 0.1], [0, 0.6, -0.2]]]).expand(4, 2, 3)
    plain = place_context(module(x_m), affine=affine, size=(5, 5))
    with torch.autocast("cpu", torch.bfloat16):
        halved = place_context(module(x_m), affine=affine, size=(5, 5))
        halved_terms = module.terms(x_m)
    assert halved.dtype == torch.float32
    assert torch.equal(plain, halved)
    assert torch.equal(module.terms(x_m), halved_terms)


def test_intervention__starts_near_uniform():
    """n=20, 32x32, N(0, 0.02): alpha is 2 % off 1/n on average and 11 % at most."""
    confounders = ConfounderSet(
        c=blobs(20, 32, seed=0), counts=np.ones(20, np.int64), prior=np.full(20, 0.05, np.float32)
    )
    module = Intervention(confounders, scale="paper", seed=0)
    x_m = torch.from_numpy(blobs(200, 32, seed=1))
    alpha = module.alpha(x_m).detach()
    assert (alpha * 20 - 1).abs().mean() < 0.03
    assert (alpha * 20 - 1).abs().max() < 0.15
    report = context_report(module, x_m)
    assert 0.0005 < report["context/m_spread"] < 0.015
    assert 0.0005 < report["context/alpha_spread"] < 0.1
    assert report["context/alpha_entropy"] > 0.99


def test_intervention__draws_from_its_own_generator():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = Intervention(confounder_set(), scale="n", seed=7)
    second = Intervention(confounder_set(seed=9), scale="n", seed=7)
    other = Intervention(confounder_set(), scale="n", seed=8)
    shuffle_cells(confounder_set(), seed=1)
    derangement(9, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.w1, second.w1)
    assert torch.equal(first.w2, second.w2)
    assert not torch.equal(first.w1, first.w2)
    assert not torch.equal(first.w1, other.w1)


def test_intervention__initial_deviation():
    module = Intervention(confounder_set(n=20, size=32), scale="n", seed=0)
    assert module.w1.shape == module.w2.shape == (20, 1024)
    for weight in (module.w1, module.w2):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.03)
        assert abs(float(weight.detach().mean())) < 0.001
    wide = Intervention(confounder_set(n=20, size=32), scale="n", seed=0, std=0.1)
    torch.testing.assert_close(wide.w1, 5 * module.w1)
    torch.testing.assert_close(wide.w2, 5 * module.w2)


def test_intervention__former_weights_do_not_bring_their_confounders():
    former = Intervention(confounder_set(seed=0), scale="n", seed=0)
    fresh = Intervention(confounder_set(seed=1), scale="n", seed=1)
    expected = fresh.c.clone()
    fresh.load_state_dict(former.state_dict())
    assert torch.equal(fresh.w1, former.w1)
    assert torch.equal(fresh.c, expected)


# --- controls -------------------------------------------------------------------------------


def test_build_context__what_each_name_builds():
    def built(context, confounders):
        return build_context(causal_settings(context=context), confounders, seed=3, x_m_rms=0.5)

    confounders = confounder_set()
    names = ["none", "seg_mask", "shuffled_photo", "shuffled_cells", "uniform_alpha", "conta"]
    modules = {name: built(name, confounders) for name in names}
    assert modules["none"] is None
    assert built("conta", None) is None
    for name in names[1:]:
        assert modules[name](photos(2)).shape == (2, 1, 4, 4)
    assert torch.equal(modules["conta"](photos(2)), modules["shuffled_photo"](photos(2)))
    assert not torch.equal(modules["conta"](photos(2)), modules["shuffled_cells"](photos(2)))
    assert torch.equal(modules["conta"].w1, modules["shuffled_cells"].w1)
    assert not list(modules["uniform_alpha"].parameters())
    assert not list(modules["seg_mask"].parameters())


def test_build_context__seg_mask_shows_the_prediction_itself():
    x_m = photos(40)
    rms = root_mean_square(x_m)
    scaled = build_context(
        causal_settings(context="seg_mask"), confounder_set(), seed=0, x_m_rms=rms
    )
    torch.testing.assert_close(scaled(x_m), x_m[:, None] / rms)
    assert root_mean_square(scaled(x_m)) == pytest.approx(1)
    paper = build_context(
        causal_settings(context="seg_mask", scale="paper"), confounder_set(), seed=0, x_m_rms=rms
    )
    assert torch.equal(paper(x_m), x_m[:, None])


def test_build_context__uniform_alpha_ignores_the_photo():
    confounders = confounder_set(prior=[0.5, 0.3, 0.2])
    module = build_context(
        causal_settings(context="uniform_alpha", scale="paper"), confounders, seed=0, x_m_rms=1.0
    )
    maps = module(photos(3))
    expected = torch.from_numpy((confounders.prior[:, None, None] * confounders.c).sum(0)) / 3
    torch.testing.assert_close(maps, expected.expand(3, 1, 4, 4))
    assert context_report(module, photos(3))["context/m_spread"] == pytest.approx(0, abs=1e-6)


def test_build_context__confounders_of_another_size():
    with pytest.raises(InputError, match=r"8 cells a side, causal\.context_size is 4"):
        build_context(causal_settings(), confounder_set(size=8), seed=0, x_m_rms=1.0)


@small
@given(seed=st.integers(0, 999))
def test_shuffle_cells__keeps_every_class_s_values(seed):
    plain = confounder_set(n=3, size=4, seed=seed)
    before = plain.c.copy()
    shuffled = shuffle_cells(plain, seed=seed)
    for was, now in zip(plain.c, shuffled.c, strict=True):
        np.testing.assert_array_equal(np.sort(was, axis=None), np.sort(now, axis=None))
        assert not np.array_equal(was, now)
    np.testing.assert_array_equal(plain.c, before)
    np.testing.assert_array_equal(shuffled.prior, plain.prior)
    np.testing.assert_array_equal(shuffle_cells(plain, seed=seed).c, shuffled.c)


def test_shuffle_cells__one_permutation_a_class():
    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(1, 8, 8)
    twins = ConfounderSet(
        c=np.concatenate([ramp, ramp]), counts=np.ones(2, np.int64), prior=np.float32([0.5, 0.5])
    )
    first, second = shuffle_cells(twins, seed=0).c
    assert not np.array_equal(first, second)


@small
@given(num_photos=st.integers(2, 60), seed=st.integers(0, 999))
def test_derangement__every_photo_gets_another_and_each_is_used_once(num_photos, seed):
    other = derangement(num_photos, seed=seed)
    assert sorted(other.tolist()) == list(range(num_photos))
    assert not (other == torch.arange(num_photos)).any()
    assert torch.equal(other, derangement(num_photos, seed=seed))


def test_derangement__depends_on_the_seed():
    assert not torch.equal(derangement(50, seed=0), derangement(50, seed=1))


@pytest.mark.parametrize("num_photos", [0, 1])
def test_derangement__one_photo_has_no_other(num_photos):
    with pytest.raises(InputError, match=f"there is {num_photos}"):
        derangement(num_photos, seed=0)


# --- place_context --------------------------------------------------------------------------


def affines(*rows):
    """Scale x, shift x, scale y, shift y of each photo."""
    return torch.stack([torch.tensor([[a, 0.0, b], [0.0, c, d]]) for a, b, c, d in rows])


IDENTITY = (1.0, 0.0, 1.0, 0.0)
FLIP = (-1.0, 0.0, 1.0, 0.0)


@pytest.mark.parametrize("cells", [4, 32])
def test_place_context__whole_picture_and_its_mirror_are_exact(cells):
    m = photos(2, cells)[:, None]
    found = place_context(m, affine=affines(IDENTITY, FLIP), size=(cells, cells))
    assert torch.equal(found[0], m[0])
    assert torch.equal(found[1], m[1].flip(-1))


@pytest.mark.parametrize("size", [(14, 14), (5, 9), (40, 33), (1, 1)])
def test_place_context__flipping_the_crop_mirrors_the_result(size):
    m = photos(1, 32)[:, None]
    crop, mirrored = affines((0.5, 0.2, 0.4, -0.3)), affines((-0.5, 0.2, 0.4, -0.3))
    found = place_context(m, affine=crop, size=size)
    torch.testing.assert_close(place_context(m, affine=mirrored, size=size), found.flip(-1))


def test_place_context__a_crop_box_is_that_part():
    m = photos(1, 8)[:, None]
    # cells 2..5 across and 4..7 down
    box = affines((0.5, -0.0, 0.5, 0.5))
    found = place_context(m, affine=box, size=(4, 4))
    assert torch.equal(found, m[:, :, 4:, 2:6])
    wide = affines((0.5, -0.5, 1.0, 0.0))
    assert torch.equal(place_context(m, affine=wide, size=(8, 4)), m[:, :, :, :4])


def test_place_context__zero_outside_the_picture():
    m = torch.ones(1, 1, 4, 4)
    # the picture fills the left upper quarter of the canvas
    canvas = affines((2.0, 1.0, 2.0, 1.0))
    found = place_context(m, affine=canvas, size=(8, 8))
    expected = torch.zeros(1, 1, 8, 8)
    expected[..., :4, :4] = 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert not place_context(m, affine=affines((0.1, 5.0, 0.1, 0.0)), size=(3, 3)).any()


def test_place_context__each_photo_by_its_own_affine():
    m = photos(3, 8)[:, None]
    boxes = affines(FLIP, (0.5, 0.1, 0.25, -0.3), (2.0, 0.3, 1.5, 0.0))
    together = place_context(m, affine=boxes, size=(7, 5))
    for i in range(3):
        alone = place_context(m[i : i + 1], affine=boxes[i : i + 1], size=(7, 5))
        torch.testing.assert_close(together[i : i + 1], alone)


@small
@given(
    zoom=st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)),
    shift=st.tuples(st.floats(-1, 1), st.floats(-1, 1)),
    flip=st.booleans(),
    seed=st.integers(0, 99),
)
def test_place_context__equals_the_oracle_and_grid_sample_where_nothing_shrinks(
    zoom, shift, flip, seed
):
    m = photos(1, 6, seed, torch.float64)[:, None]
    sign = -1.0 if flip else 1.0
    box = affines((sign * zoom[0], shift[0], zoom[1], shift[1])).double()
    size = (6, 7)
    found = place_context(m, affine=box, size=size)
    expected = oracle.placed(m[0, 0].numpy(), box[0].numpy(), size)
    np.testing.assert_allclose(found[0, 0].numpy(), expected, atol=1e-9)
    grid = F.affine_grid(box, [1, 1, *size], align_corners=False)
    sampled = F.grid_sample(m, grid, padding_mode="border", align_corners=False)
    inside = (grid.abs() < 1 - 1e-6).all(-1)[:, None]
    torch.testing.assert_close(found[inside], sampled[inside], rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [(14, 14), (7, 20), (10, 32), (3, 5)])
def test_place_context__a_smaller_map_is_averaged_as_antialiased_resizing_does(size):
    m = photos(2, 32, dtype=torch.float64)[:, None]
    found = place_context(m, affine=affines(IDENTITY, IDENTITY), size=size)
    expected = F.interpolate(m, size, mode="bilinear", antialias=True, align_corners=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_place_context__no_cell_is_skipped():
    # every cell of the frame moves some output cell, also at 32 -> 5
    for cells in range(0, 1024, 37):
        m = torch.zeros(1, 1, 32, 32)
        m.view(-1)[cells] = 1
        assert place_context(m, affine=affines(IDENTITY), size=(5, 5)).sum() > 0


def test_place_context__gradcheck_and_inputs_unchanged():
    m = photos(2, 4, dtype=torch.float64)[:, None].requires_grad_()
    box = affines((0.6, 0.2, -0.8, 0.1), (1.5, 0.0, 1.2, 0.3))
    before = box.clone()
    assert torch.autograd.gradcheck(lambda m: place_context(m, affine=box, size=(3, 5)), m)
    assert torch.equal(box, before)


# --- context_report -------------------------------------------------------------------------


def test_context_report__hand_counted():
    class Fixed(UniformIntervention):
        def alpha(self, x_m):
            return torch.tensor([[0.25, 0.75], [0.75, 0.25]])

    c = np.float32([[[1, 0], [0, 0]], [[1, 1], [0, 0]]])
    confounders = ConfounderSet(c=c, counts=np.ones(2, np.int64), prior=np.float32([0.5, 0.5]))
    report = context_report(Fixed(confounders, scale="paper"), torch.zeros(2, 2, 2))
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2)
    # M of the photos: (0.5, 0.375) and (0.5, 0.125) in the upper cells, 0 below
    expected = {
        "context/alpha_spread": 0.25 / 0.5,
        "context/alpha_entropy": entropy,
        "context/m_spread": (0.125 / 4) / ((0.5 + 0.25) / 4),
        "context/cosine": 0.5**0.5,
    }
    assert report == pytest.approx(expected)
    assert all(type(value) is float for value in report.values())


def test_context_report__seg_mask_has_no_alpha():
    x_m = torch.ones(2, 2, 2)
    x_m[0, :, 0] = 0
    report = context_report(SegMaskContext(divisor=0.5), x_m)
    assert report == pytest.approx({"context/m_spread": 0.25 / 0.75})


def test_context_report__many_photos_go_in_parts(monkeypatch):
    module, x_m = awake(Intervention(confounder_set(), scale="n", seed=0)), photos(11)
    whole = context_report(module, x_m)
    monkeypatch.setattr("wsss_core.causal.intervention._REPORT_PHOTOS", 3)
    assert context_report(module, x_m) == pytest.approx(whole)
    alpha = module.alpha(x_m).detach().double()
    spread = (alpha.std(0, correction=0) / alpha.mean(0)).mean()
    assert whole["context/alpha_spread"] == pytest.approx(float(spread))


@pytest.mark.parametrize("n", [1, 2])
def test_context_report__never_nan(n):
    empty = ConfounderSet(
        c=np.zeros((n, 4, 4), np.float32),
        counts=np.zeros(n, np.int64),
        prior=np.full(n, 1 / n, np.float32),
    )
    report = context_report(Intervention(empty, scale="n", seed=0), photos(2))
    assert all(math.isfinite(value) for value in report.values())


@pytest.mark.parametrize(
    ("context", "ratio", "spread", "cosine", "said"),
    [
        ("conta", 0.0002, 0.3, 0.5, "it adds 0.02 % of what the photo adds"),
        ("conta", 0.05, 0.002, 0.5, "its map differs between photos by 0.2 % of its size"),
        ("conta", 0.05, 0.3, 0.96, "its classes look alike (mean cosine 0.960), so alpha cannot"),
        ("conta", 0.05, 0.3, 0.94, None),
        ("seg_mask", 0.05, 0.3, None, None),
        ("uniform_alpha", 0.05, 0.0, 0.96, None),
        ("uniform_alpha", 0.0, 0.0, 0.5, "it adds 0 % of what the photo adds"),
        ("none", None, None, None, None),
    ],
)
def test_say_dead__hand_made(context, ratio, spread, cosine, said):
    metrics = {
        "context/rms_ratio": ratio,
        "context/m_spread": spread,
        "context/cosine": cosine,
    }
    metrics = {name: value for name, value in metrics.items() if value is not None}
    found = say_dead(metrics, context=context)
    assert found == said or (found and said and found.startswith(said))
