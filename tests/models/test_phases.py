"""Dilated depthwise convolutions: phase by phase they are what PyTorch's own are."""

import pytest
import torch
from torch import nn

from wsss_core.models.backbones import build_backbone
from wsss_core.models.phases import PhasedConv2d, merge_phases, phase_dilated, split_phases


def depthwise(kernel=3, dilation=2, channels=5, **changes):
    padding = dilation * (kernel // 2)
    settings = {"padding": padding, "dilation": dilation, "groups": channels, "bias": False}
    return nn.Conv2d(channels, channels, kernel, **(settings | changes))


@pytest.mark.parametrize("dilation", [2, 3])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [(12, 18), (7, 10)])
@pytest.mark.parametrize("bias", [False, True])
def test_phased_conv__values_and_gradients_are_those_of_the_dilated_one(
    kernel, dilation, size, bias
):
    torch.manual_seed(0)
    conv = depthwise(kernel, dilation, bias=bias).double()
    x = torch.randn(2, 5, *size, dtype=torch.double)
    results = []
    for phased in (False, True):
        if phased:
            phase_dilated(nn.Sequential(conv))
            assert type(conv) is PhasedConv2d
        seen = x.clone().requires_grad_()
        y = conv(seen)
        wanted = [seen, *conv.parameters()]
        results.append((y, *torch.autograd.grad((y * y.detach().cos()).sum(), wanted)))
    for theirs, ours in zip(*results, strict=True):
        assert theirs.shape == ours.shape
        torch.testing.assert_close(ours, theirs)


def test_split_phases__a_phase_holds_every_nth_row_and_column():
    x = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    phases = split_phases(x, dilation=2)
    assert torch.equal(phases[2:4], x[:, :, 0::2, 1::2])
    assert torch.equal(phases[4:6], x[:, :, 1::2, 0::2])
    assert phases.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(merge_phases(phases, dilation=2), x)


@pytest.mark.parametrize(
    "other",
    [
        depthwise(dilation=1),
        depthwise(stride=2),
        depthwise(padding=0),
        depthwise(groups=1),
        depthwise(padding_mode="reflect"),
    ],
)
def test_phase_dilated__leaves_other_convolutions_alone(other):
    phase_dilated(nn.Sequential(other))
    assert type(other) is nn.Conv2d


def test_build_backbone__the_dilated_blocks_of_lite0_train_by_phases():
    backbone = build_backbone("lite0", pretrained=False, output_stride=16)
    phased = [m for m in backbone.modules() if isinstance(m, PhasedConv2d)]
    assert [m.kernel_size for m in phased] == [(5, 5)] * 3 + [(3, 3)]
    x = torch.randn(1, 3, 72, 104)
    backbone.train()
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    trained = backbone(x)[-1]
    assert torch.allclose(trained, backbone.eval()(x)[-1], atol=1e-5)
