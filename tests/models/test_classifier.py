"""The classifier: the context joins without touching the pretrained network, and is learned."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from wsss_core.models.backbones import Backbone, BackboneShape, build_backbone, freeze
from wsss_core.models.classifier import (
    Classifier,
    initialise_head,
    initialise_slices,
    multilabel_loss,
)
from wsss_core.seeding import torch_generator

FUSIONS = ["block2", "block3", "block4", "block5", "head", "all"]


@pytest.fixture(scope="module")
def photos():
    return torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def build(fusion, *, seed=0):
    """A classifier whose trunk is the same for every fusion."""
    backbone = build_backbone(
        "mobilenetv3_small_100", pretrained=False, output_stride=16, seed=seed
    )
    classifier = Classifier(backbone, num_classes=3, fusion=fusion)
    initialise_head(classifier, torch_generator(7, "head"))
    return classifier.eval()


def ramp(size):
    """A context that differs from cell to cell and photo to photo."""
    height, width = size
    values = torch.linspace(-1, 2, 2 * height * width)
    return values.view(2, 1, height, width)


@pytest.mark.parametrize("fusion", FUSIONS)
@torch.no_grad()
def test_classifier__zero_slice_is_the_plain_network_bit_for_bit(fusion, photos):
    plain, fused = build(None), build(fusion)
    assert torch.equal(fused(photos, ramp), plain(photos))
    assert torch.equal(fused.class_maps(photos, ramp), plain.class_maps(photos))
    assert torch.equal(fused(photos), plain(photos))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_classifier__context_slice_learns_behind_a_frozen_trunk(fusion, photos):
    classifier = build(fusion)
    freeze(classifier.backbone, until=5, batch_norm=True)
    multilabel_loss(classifier(photos, ramp), torch.ones(2, 3)).backward()

    grads = [part.conv.weight.grad for part in classifier.slices]
    assert len(grads) == (4 if fusion == "all" else 1)
    assert all(grad is not None and bool(grad.any()) for grad in grads)
    assert all(p.grad is None for p in classifier.backbone.parameters())


@pytest.mark.parametrize("fusion", FUSIONS)
def test_classifier__gradient_reaches_the_context_behind_a_frozen_block(fusion, photos):
    classifier = build(fusion)
    freeze(classifier.backbone, until=5, batch_norm=True)
    for part in classifier.slices:
        nn.init.normal_(part.conv.weight, std=0.1)
    context = ramp((6, 6)).clone().requires_grad_()

    def at(size):
        return nn.functional.interpolate(context, size=size)

    classifier(photos, at).sum().backward()
    assert bool(context.grad.any())


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("fusion", ["block5", "all"])
@torch.no_grad()
def test_classifier__slice_is_the_concatenation_of_photo_and_context(fusion, kernel):
    """conv([X ; M]; [W ; w_m]) = conv(X; W) + conv(M; w_m), also at stride 2."""
    generator = torch.Generator().manual_seed(1)
    blocks = [nn.Conv2d(3, 3, kernel, 2, kernel // 2, bias=False) for _ in range(5)]
    classifier = Classifier(
        Backbone(list(blocks), BackboneShape((3,) * 5, 32)), num_classes=2, fusion=fusion
    )
    x = torch.randn(2, 3, 64, 64, generator=generator)
    parts = {id(part): part for part in classifier.slices}
    for part in parts.values():
        part.conv.weight.copy_(torch.randn(part.conv.weight.shape, generator=generator))

    wide, fused = x, range(1, 5) if fusion == "all" else [4]
    slices = iter(classifier.slices)
    for index, block in enumerate(blocks):
        if index in fused:
            weight = torch.cat([block.weight, next(slices).conv.weight], dim=1)
            wide = torch.cat([wide, ramp(tuple(wide.shape[-2:]))], dim=1)
            wide = nn.functional.conv2d(wide, weight, stride=2, padding=kernel // 2)
        else:
            wide = block(wide)
    expected = classifier.head(wide)
    assert torch.allclose(classifier.class_maps(x, ramp), expected, atol=1e-5)


def test_classifier__slice_of_a_strided_1x1_convolution_learns():
    """As resnetv2's; a strided conv_m of one channel would corrupt the heap where there is AVX2."""
    blocks = [nn.Conv2d(3, 8, 1), *(nn.Conv2d(8, 8, 1, stride=2) for _ in range(4))]
    classifier = Classifier(
        Backbone(list(blocks), BackboneShape((8,) * 5, 16)), num_classes=2, fusion="all"
    ).to(memory_format=torch.channels_last)
    photos = torch.randn(2, 3, 96, 96).to(memory_format=torch.channels_last)

    def nhwc_ramp(size):
        height, width = size
        return ramp(size).as_strided((2, 1, height, width), (height * width, 1, width, 1))

    for _ in range(20):
        classifier(photos, nhwc_ramp).sum().backward()
    assert all(bool(part.conv.weight.grad.any()) for part in classifier.context_slices())


@torch.no_grad()
def test_classifier__context_is_asked_for_at_the_size_of_the_fused_map(photos):
    sizes = []

    def spy(size):
        sizes.append(size)
        return torch.zeros(2, 1, *size)

    build("all")(photos, spy)
    assert sizes == [(12, 12), (12, 12), (6, 6), (3, 3)]


@torch.no_grad()
def test_classifier__context_of_one_batch_does_not_stay_for_the_next(photos):
    classifier = build("block5")
    nn.init.ones_(classifier.slices[0].conv.weight)
    before = classifier(photos)
    assert not torch.equal(classifier(photos, ramp), before)
    assert torch.equal(classifier(photos), before)

    def broken(_size):
        raise RuntimeError("no context")

    with pytest.raises(RuntimeError, match="no context"):
        classifier(photos, broken)
    maps = classifier.head(classifier.backbone(photos)[-1])  # a look at the trunk alone
    assert torch.equal(maps.mean(dim=(2, 3)), before)


@torch.no_grad()
def test_classifier__logit_is_the_mean_of_the_class_map(photos):
    classifier = build(None)
    maps = classifier.class_maps(photos)
    assert maps.shape == (2, 3, 3, 3)
    assert torch.allclose(classifier(photos), maps.mean(dim=(2, 3)))
    # irn pools the features first and then classifies: the same, for the class layer is linear
    pooled = classifier.backbone(photos)[-1].mean(dim=(2, 3))
    expected = pooled @ classifier.head.weight[:, :, 0, 0].T
    assert torch.allclose(classifier(photos), expected, atol=1e-5)


@torch.no_grad()
def test_classifier__logit_is_a_float32_mean_under_autocast(photos):
    classifier = build(None)
    with torch.autocast("cpu", torch.bfloat16):
        assert classifier.class_maps(photos).dtype == torch.bfloat16
        assert classifier(photos).dtype == torch.float32


def test_classifier__slices_leave_the_names_of_trunk_and_head_alone():
    plain, fused = build(None).state_dict(), build("all").state_dict()
    assert set(fused) - set(plain) == {f"slices.{k}.conv.weight" for k in range(4)}
    assert set(plain) < set(fused)


@pytest.mark.parametrize("fusion", [None, *FUSIONS])
def test_new_parameters__are_the_head_and_the_slices(fusion):
    classifier = build(fusion)
    new = {id(p) for p in classifier.new_parameters()}
    trunk = {id(p) for p in classifier.backbone.parameters()}
    assert new.isdisjoint(trunk)
    assert new | trunk == {id(p) for p in classifier.parameters()}


@torch.no_grad()
def test_context_rms_ratio__counts_what_the_slice_adds(photos):
    classifier = build("block5")
    assert classifier.context_rms_ratio() == 0.0
    classifier(photos, ramp)
    assert classifier.context_rms_ratio() == 0.0  # a zero slice adds nothing

    conv, part = classifier.backbone.first_convolution(5), classifier.slices[0]
    nn.init.constant_(part.conv.weight, 0.5)
    seen = {}
    handle = conv.register_forward_hook(lambda _m, inputs, output: seen.update(x=inputs[0]))
    classifier(photos, ramp)
    handle.remove()
    photo = nn.functional.conv2d(seen["x"], conv.weight)
    added = 0.5 * ramp((3, 3)).expand(-1, conv.out_channels, -1, -1)
    expected = float((added.square().mean() / photo.square().mean()).sqrt())
    assert classifier.context_rms_ratio() == pytest.approx(expected, rel=1e-4)


def test_context_rms_ratio__plain_classifier_has_none():
    assert build(None).context_rms_ratio() == 0.0


def test_initialise_head__every_arm_and_trunk_starts_from_the_same_one():
    heads = [build(fusion, seed=seed).head.weight for fusion, seed in ((None, 0), ("all", 1))]
    assert torch.equal(*heads)
    assert heads[0].abs().max().item() <= heads[0].shape[1] ** -0.5
    assert heads[0].std().item() == pytest.approx((heads[0].shape[1] * 3) ** -0.5, rel=0.1)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_initialise_slices__as_a_convolution_that_is_one_channel_wider(fusion):
    """PyTorch's own draw of the wider convolution: the same bound and deviation; nothing else."""
    one, again, plain = build(fusion), build(fusion), build(fusion)
    for classifier in (one, again):
        initialise_slices(classifier, torch_generator(3, "slices"))
    for mine, twin in zip(one.context_slices(), again.context_slices(), strict=True):
        weight = mine.conv.weight.detach()
        wider = nn.Conv2d(mine.channels_in + 1, weight.shape[0], weight.shape[2:], bias=False)
        assert torch.equal(weight, twin.conv.weight)
        assert weight.abs().max() <= wider.weight.abs().max() * 1.05
        assert float(weight.square().mean()) == pytest.approx(
            float(wider.weight.detach().square().mean()), rel=0.9 if weight.numel() < 50 else 0.3
        )
    for name, weight in plain.state_dict().items():
        assert (".conv.weight" in name and name.startswith("slices")) or torch.equal(
            weight, one.state_dict()[name]
        )


def test_multilabel_loss__two_photos_by_hand():
    logits, tags = torch.tensor([[0.0, 0.0], [3.0, -1.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    first = 0.5 * 0.5  # P(tags | photo) = product of sigmoid(s) or sigmoid(-s)
    second = sigmoid(3.0) * sigmoid(-1.0)
    expected = -(np.log(first) + np.log(second)) / 2 / 2  # mean over photos, over n = 2 classes
    assert multilabel_loss(logits, tags).item() == pytest.approx(expected, rel=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31))
def test_multilabel_loss__is_minus_log_likelihood_over_n(num_photos, num_classes, seed):
    random = np.random.default_rng(seed)
    logits = random.normal(0, 3, (num_photos, num_classes))
    tags = random.integers(0, 2, (num_photos, num_classes))
    likelihood = np.prod(1 / (1 + np.exp(-np.where(tags == 1, logits, -logits))), axis=1)
    expected = -np.log(likelihood).mean() / num_classes
    found = multilabel_loss(torch.tensor(logits), torch.tensor(tags, dtype=torch.float64))
    assert found.item() == pytest.approx(expected, rel=1e-9)
