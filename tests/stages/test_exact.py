"""The classifier under exact adjustment, on a tiny net: against enumeration, and beside NWGM."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.oracles import causal as oracle
from wsss_core.causal.confounders import ConfounderSet
from wsss_core.causal.intervention import Intervention, UniformIntervention, place_context
from wsss_core.models.backbones import Backbone, BackboneShape
from wsss_core.models.classifier import Classifier, multilabel_loss
from wsss_core.records import TaggedPhoto
from wsss_core.stages import classifier as stage
from wsss_core.stages.cams import class_activation_maps
from wsss_core.stages.classifier import ContextClassifier, gap_report

FUSIONS = ["block2", "block4", "block5", "head", "all"]
PRIOR = (0.5, 0.3, 0.2)
AFFINE = torch.tensor([[[0.7, 0, 0.1], [0, 0.8, -0.2]], [[-1.0, 0, 0], [0, 1.0, 0]]])


class Residual(nn.Module):
    """A block with a way round its first convolution, as ResNet's."""

    def __init__(self, channels, stride):
        super().__init__()
        self.first = nn.Conv2d(channels[0], channels[1], 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels[1])
        self.second = nn.Conv2d(channels[1], channels[1], 3, 1, 1, bias=False)
        self.round = nn.Conv2d(channels[0], channels[1], 1, bias=False)
        self.stride = stride  # picks cells before the 1x1: a strided one corrupts the heap

    def forward(self, x):
        around = self.round(x[:, :, :: self.stride, :: self.stride])
        return torch.relu(self.second(torch.relu(self.norm(self.first(x)))) + around)


def confounder_set(n=3, prior=PRIOR, same=False):
    c = np.random.default_rng(0).random((n, 4, 4), np.float32)
    return ConfounderSet(
        c=c[[0] * n] if same else c, counts=np.ones(n, np.int64), prior=np.float32(prior)
    )


def build(fusion="block5", *, exact=True, confounders=None, kind=Intervention, seed=0, awake=True):
    """Random weights everywhere, context slices included; equal for equal seeds."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        channels = [(3, 4), (4, 5), (5, 6), (6, 7), (7, 8)]
        blocks = [
            Residual(pair, stride) for pair, stride in zip(channels, (2, 1, 2, 1, 1), strict=True)
        ]
        shape = BackboneShape(tuple(out for _, out in channels), 4)
        classifier = Classifier(Backbone(blocks, shape), num_classes=3, fusion=fusion)
        nn.init.normal_(classifier.head.weight)
        for part in classifier.slices:
            if awake:
                nn.init.normal_(part.conv.weight)
    confounders = confounders or confounder_set()
    own = {} if kind is UniformIntervention else {"seed": 3}
    intervention = kind(confounders, scale="n", **own)
    for weight in intervention.parameters():
        nn.init.normal_(weight, generator=torch.Generator().manual_seed(4))
    return ContextClassifier(classifier, intervention, exact=exact).eval()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, 3, 24, 24, generator=generator),
        torch.rand(2, 4, 4, generator=generator),
        AFFINE,
    )


def enumerated(model, batch):
    """Class maps under each f(X, c_i), one whole pass of the whole net a confounder."""
    photos, x_m, affine = batch
    maps = []
    for i in range(model.intervention.num_classes):

        def at(size, i=i):
            term = model.intervention.terms(x_m)[:, i : i + 1]
            return place_context(term, affine=affine, size=size)

        maps.append(model.classifier.class_maps(photos, at))
    return torch.stack(maps)


@pytest.mark.parametrize("fusion", FUSIONS)
@torch.no_grad()
def test_exact__equals_enumeration(fusion, batch):
    model = build(fusion)
    each = enumerated(model, batch)
    expected = oracle.marginal_probability(each.mean(dim=(3, 4)).double().numpy(), PRIOR)
    np.testing.assert_allclose(model(*batch).sigmoid().numpy(), expected, rtol=1e-4)
    maps = sum(p * part for p, part in zip(PRIOR, each, strict=True))
    torch.testing.assert_close(model.class_maps(*batch), maps, rtol=1e-4, atol=1e-4)
    one_pass = build(fusion, exact=False)
    assert (one_pass(*batch).sigmoid() - model(*batch).sigmoid()).abs().max() > 1e-3


@pytest.mark.parametrize("fusion", ["block2", "block5", "head"])
def test_exact__parts_and_recomputation_change_nothing(fusion, batch, monkeypatch):
    """One pass that keeps everything against a pass a confounder that is computed again."""
    tags = torch.tensor([[1.0, 0, 0], [0, 1, 1]])
    losses, grads = [], []
    for cells in (10**9, 1):
        monkeypatch.setattr(stage, "PASS_CELLS", cells)
        model = build(fusion)
        loss = multilabel_loss(model(*batch), tags)
        loss.backward()
        losses.append(loss.item())
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-5, msg=name)
        assert bool(grad.any()), name  # trunk, slice, W1 and W2 are all reached


def test_exact__what_no_context_changes_runs_once(batch, monkeypatch):
    monkeypatch.setattr(stage, "PASS_CELLS", 1)
    model, calls = build("block4"), []
    for number, block in enumerate(model.classifier.backbone.blocks, start=1):
        block.register_forward_hook(lambda *_, number=number: calls.append(number))
    with torch.no_grad():
        model(*batch)
    assert calls == [1, 2, 3, *[4, 5] * 3]


@torch.no_grad()
def test_exact__is_nwgm_where_every_confounder_gives_the_same_logit(batch):
    same = confounder_set(same=True)
    exact, nwgm = (
        build(exact=e, confounders=same, kind=UniformIntervention) for e in (True, False)
    )
    torch.testing.assert_close(exact(*batch), nwgm(*batch), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        exact.class_maps(*batch), nwgm.class_maps(*batch), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("exact", [True, False])
@torch.no_grad()
def test_slice_at_zero__is_the_plain_network(exact, batch):
    asleep = build(exact=exact, awake=False)
    plain = ContextClassifier(build(awake=False).classifier, None).eval()
    found, expected = asleep(*batch), plain(batch[0])
    if exact:  # log p - log(1 - p) is not the logit's own bits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(found, expected)


@torch.no_grad()
def test_geometric_mean__is_nwgm_where_the_logit_is_affine_in_m(batch):
    """sigmoid(sum_c P(c) s(X, f(X, c))) = sigmoid(s(X, sum_c P(c) f(X, c)))."""
    prior = torch.tensor(PRIOR)[:, None, None]
    for fusion, affine_in_m in (("head", True), ("block5", False)):
        model = build(fusion, exact=False)
        geometric = (prior * model.logits_by_confounder(*batch)).sum(0).sigmoid()
        same = torch.allclose(geometric, model(*batch).sigmoid(), atol=1e-5)
        assert same == affine_in_m


@pytest.mark.parametrize(
    ("n", "same", "equal"), [(1, True, True), (3, True, True), (3, False, False)]
)
@torch.no_grad()
def test_conta__is_uniform_alpha_where_alpha_cannot_matter(n, same, equal, batch):
    """One class, or equal confounders under a uniform P(c); whatever W1 and W2 are."""
    confounders = confounder_set(n, prior=[1 / n] * n, same=same)
    conta, uniform = (
        build(exact=False, confounders=confounders, kind=kind)
        for kind in (Intervention, UniformIntervention)
    )
    assert torch.allclose(conta(*batch), uniform(*batch), rtol=1e-4, atol=1e-4) == equal


@torch.no_grad()
def test_draw__stands_for_all_confounders(batch):
    model = build()
    each = model.logits_by_confounder(*batch)
    draw = torch.tensor([[2, 2], [0, 1]])
    probabilities = model(*batch, draw).sigmoid()
    torch.testing.assert_close(probabilities[0], each[2, 0].sigmoid())
    torch.testing.assert_close(probabilities[1], each[:2, 1].sigmoid().mean(0))


def test_cams__are_rectified_after_the_mean_over_confounders():
    photo = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    model, x_m = build(), torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(2))
    found = class_activation_maps(model, photo, x_m, scales=(1.0,))
    nwgm = class_activation_maps(build(exact=False), photo, x_m, scales=(1.0,))
    assert found.shape == nwgm.shape == (1, 3, 8, 8)
    assert not torch.allclose(found, nwgm, rtol=0.05)

    def rectified_before(photos, x_m, affine):
        with torch.no_grad():
            each = enumerated(model, (photos, x_m, affine)).relu()
        return sum(p * part for p, part in zip(PRIOR, each, strict=True))

    def rectified_after(photos, x_m, affine):
        with torch.no_grad():
            each = enumerated(model, (photos, x_m, affine))
        return sum(p * part for p, part in zip(PRIOR, each, strict=True))

    slow = build(exact=False)
    slow.class_maps = rectified_after
    expected = class_activation_maps(slow, photo, x_m, scales=(1.0,))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    slow.class_maps = rectified_before
    other = class_activation_maps(slow, photo, x_m, scales=(1.0,))
    assert not torch.allclose(found, other, rtol=0.01)


@pytest.mark.parametrize("exact", [True, False])
def test_gap_report__for_nets_trained_either_way(exact, tmp_path, monkeypatch):
    from PIL import Image

    photos = []
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 24, 3), dtype=np.uint8)
        path = tmp_path / f"{number}.png"
        Image.fromarray(pixels).save(path)
        photos.append(TaggedPhoto(str(number), path, (0,)))
    x_m = torch.rand(5, 4, 4, generator=torch.Generator().manual_seed(3))
    model = build(exact=exact).train()
    report = gap_report(model, photos, x_m)
    assert model.training
    assert min(report.values()) > 1e-4
    assert gap_report(build("head", exact=exact), photos, x_m)[
        "adjustment/inside_gap"
    ] == pytest.approx(0, abs=1e-6)
    monkeypatch.setattr(stage, "GAP_PHOTOS", 2)
    chosen = gap_report(model, [photos[0], photos[3]], x_m[[0, 3]])
    assert gap_report(model, photos, x_m) == pytest.approx(chosen)


def test_confounders__classifier_without_any():
    with pytest.raises(TypeError, match="no confounders to sum over"):
        _ = ContextClassifier(build().classifier, None).confounders
