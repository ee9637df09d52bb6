"""The segmenter: shapes, atrous rates, and a loss that never looks at ignored pixels."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wsss_core.models.backbones import build_backbone
from wsss_core.models.segmenter import (
    AsppSum,
    Segmenter,
    count_labels,
    initialise_new_layers,
    segmentation_loss,
)
from wsss_core.seeding import torch_generator

IGNORED = 255


def build(head, output_stride=16, num_classes=4):
    backbone = build_backbone(
        "mobilenetv3_small_100", pretrained=False, output_stride=output_stride
    )
    segmenter = Segmenter(backbone, num_classes=num_classes, head=head)
    initialise_new_layers(segmenter, torch_generator(3, "head"))
    return segmenter


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("head", ["deeplabv2", "deeplabv3plus"])
@torch.no_grad()
def test_segmenter__scores_at_the_stride_of_its_head(head, output_stride):
    scores = build(head, output_stride).eval()(torch.zeros(2, 3, 32, 64))
    stride = output_stride if head == "deeplabv2" else 4
    assert scores.shape == (2, 4, 32 // stride, 64 // stride)


@pytest.mark.parametrize(("output_stride", "rates"), [(8, [6, 12, 18, 24]), (16, [3, 6, 9, 12])])
def test_aspp_sum__rates_are_kazutos_scaled_to_the_stride(output_stride, rates):
    pyramid = AsppSum(8, 3, output_stride=output_stride)
    assert [layer.dilation for layer in pyramid.layers] == [(rate, rate) for rate in rates]
    assert all(layer.bias is not None for layer in pyramid.layers)


@torch.no_grad()
def test_aspp_sum__is_the_sum_of_its_layers():
    pyramid = AsppSum(8, 3, output_stride=16)
    x = torch.randn(1, 8, 5, 7)
    expected = sum(layer(x) for layer in pyramid.layers)
    assert torch.allclose(pyramid([x]), expected, atol=1e-6)


def test_segmenter__new_parameters_are_the_head():
    segmenter = build("deeplabv3plus")
    assert {id(p) for p in segmenter.new_parameters()} == {
        id(p) for p in segmenter.head.parameters()
    }


def test_segmenter__new_heads_have_no_batch_norm():
    """GroupNorm alone: `freeze_bn` speaks of ImageNet's statistics, which a new layer has not."""
    for head in ("deeplabv2", "deeplabv3plus"):
        kinds = {type(module).__name__ for module in build(head).head.modules()}
        assert "BatchNorm2d" not in kinds


@pytest.mark.parametrize("head", ["deeplabv2", "deeplabv3plus"])
def test_initialise_new_layers__is_a_pure_function_of_its_generator(head):
    torch.manual_seed(0)
    first = build(head).head.state_dict()
    torch.manual_seed(1)
    second = build(head).head.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_initialise_new_layers__v2_is_normal_with_deviation_one_hundredth():
    weights = torch.cat([layer.weight.flatten() for layer in build("deeplabv2").head.layers])
    assert weights.std().item() == pytest.approx(0.01, rel=0.02)
    assert all(not layer.bias.any() for layer in build("deeplabv2").head.layers)


def cross_entropy(scores, labels):
    """-log softmax of each pixel's label; (K,H,W) and (H,W), numpy."""
    shifted = scores - scores.max(axis=0)
    log_sums = np.log(np.exp(shifted).sum(axis=0))
    picked = np.take_along_axis(shifted, np.minimum(labels, len(scores) - 1)[None], axis=0)[0]
    return log_sums - picked


def loss_of(scores, labels, *, class_balanced=False):
    return segmentation_loss(
        torch.tensor(scores)[None],
        torch.tensor(labels)[None],
        ignore_index=IGNORED,
        class_balanced=class_balanced,
    ).item()


labels_and_seed = st.tuples(
    st.lists(st.sampled_from([0, 1, 2, IGNORED]), min_size=12, max_size=12).filter(
        lambda labels: any(label != IGNORED for label in labels)
    ),
    st.integers(0, 2**31),
)


@settings(deadline=None, max_examples=40)
@given(labels_and_seed)
def test_segmentation_loss__is_the_mean_over_labelled_pixels(drawn):
    labels, seed = np.array(drawn[0]).reshape(3, 4), drawn[1]
    scores = np.random.default_rng(seed).normal(0, 2, (3, 3, 4))
    expected = cross_entropy(scores, labels)[labels != IGNORED].mean()
    assert loss_of(scores, labels) == pytest.approx(expected, rel=1e-9)


@settings(deadline=None, max_examples=40)
@given(labels_and_seed, st.booleans())
def test_segmentation_loss__scores_below_ignored_pixels_never_count(drawn, class_balanced):
    labels, seed = np.array(drawn[0]).reshape(3, 4), drawn[1]
    random = np.random.default_rng(seed)
    scores = random.normal(0, 2, (3, 3, 4))
    other = np.where(labels == IGNORED, random.normal(0, 9, scores.shape), scores)
    assert loss_of(scores, labels, class_balanced=class_balanced) == pytest.approx(
        loss_of(other, labels, class_balanced=class_balanced), rel=1e-12
    )


@settings(deadline=None, max_examples=40)
@given(labels_and_seed)
def test_segmentation_loss__class_balanced_halves_background_and_foreground(drawn):
    labels, seed = np.array(drawn[0]).reshape(3, 4), drawn[1]
    scores = np.random.default_rng(seed).normal(0, 2, (3, 3, 4))
    losses = cross_entropy(scores, labels)
    groups = [losses[labels == 0], losses[(labels > 0) & (labels != IGNORED)]]
    expected = np.mean([group.mean() for group in groups if group.size])
    assert loss_of(scores, labels, class_balanced=True) == pytest.approx(expected, rel=1e-9)


def test_segmentation_loss__class_balanced_by_hand():
    """Three background pixels at log 2, one foreground pixel at log 4, one ignored."""
    half, quarter = [0.0, 0.0, -1e9, -1e9], [0.0, 0.0, 0.0, 0.0]
    scores = np.array([half, half, half, quarter, [9.0, -9.0, 3.0, 1.0]]).T[:, None]
    labels = np.array([[0, 0, 0, 3, IGNORED]])
    plain = (3 * np.log(2) + np.log(4)) / 4
    balanced = (np.log(2) + np.log(4)) / 2
    assert loss_of(scores, labels) == pytest.approx(plain)
    assert loss_of(scores, labels, class_balanced=True) == pytest.approx(balanced)


@settings(deadline=None, max_examples=40)
@given(labels_and_seed, st.booleans(), st.integers(1, 3))
def test_segmentation_loss__slices_of_a_batch_sum_to_its_loss(drawn, class_balanced, cut):
    """Four photos of three pixels; a slice may have no label at all."""
    labels = torch.tensor(drawn[0]).reshape(4, 1, 3)
    scores = torch.tensor(np.random.default_rng(drawn[1]).normal(0, 2, (4, 3, 1, 3)))
    options = {"ignore_index": IGNORED, "class_balanced": class_balanced}
    whole = segmentation_loss(scores, labels, **options)
    counts = count_labels(labels, ignore_index=IGNORED)
    parts = [
        segmentation_loss(scores[part], labels[part], counts=counts, **options)
        for part in (slice(cut), slice(cut, None))
    ]
    assert counts.tolist() == [drawn[0].count(0), 12 - drawn[0].count(0) - drawn[0].count(IGNORED)]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-9)


def test_segmentation_loss__scores_are_enlarged_to_the_labels():
    """Two score cells over four pixels: bilinear weights 1, 3/4, 1/4, 0 between cell centres."""
    scores = np.array([[[0.0, 0.0]], [[4.0, -4.0]]])
    labels = np.array([[1, 1, 1, 1]])
    logits = np.array([4.0, 2.0, -2.0, -4.0])
    assert loss_of(scores, labels) == pytest.approx(np.log1p(np.exp(-logits)).mean())
