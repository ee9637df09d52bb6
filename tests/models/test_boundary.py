"""The boundary network: one logit a cell of four pixels, and a trunk that nothing moves."""

import pytest
import torch
import torch.nn.functional as F

from wsss_core.models.backbones import build_backbone
from wsss_core.models.boundary import BoundaryNet, initialise_branches
from wsss_core.seeding import torch_generator


def build(name="mobilenetv3_small_100"):
    net = BoundaryNet(build_backbone(name, pretrained=False, output_stride=16))
    initialise_branches(net, torch_generator(3, "branches"))
    return net


@pytest.fixture(scope="module")
def net():
    return build()


@pytest.mark.parametrize("size", [(64, 64), (32, 48), (50, 67), (16, 16)])
@torch.no_grad()
def test_boundary_net__one_logit_a_cell(net, size):
    assert net(torch.zeros(2, 3, *size)).shape == (2, -(-size[0] // 4), -(-size[1] // 4))


@pytest.mark.parametrize("name", ["lite0", "resnet18"])
@torch.no_grad()
def test_boundary_net__block_1_at_stride_2_or_4(name):
    """Blocks finer than a cell are averaged over it; the others enter their branch as they are."""
    net, photos = build(name), torch.randn(1, 3, 64, 96)
    entered = []
    for branch in net.branches:
        branch.register_forward_hook(lambda _, inputs, __: entered.append(inputs[0]))
    assert net(photos).shape == (1, 16, 24)
    for tap, found in zip(net.backbone(photos), entered, strict=True):
        fine = tap.shape[-1] == 48
        assert torch.allclose(found, F.avg_pool2d(tap, 2) if fine else tap, atol=1e-5)
    assert net.backbone(photos)[0].shape[-1] in (24, 48)


@torch.no_grad()
def test_boundary_net__is_the_sum_of_its_branches(net):
    photos = torch.randn(2, 3, 32, 32)
    expected = net.join.bias.view(1, 1, 1)
    for index, tap in enumerate(net.backbone(photos)):
        tap = F.avg_pool2d(tap, 2) if tap.shape[-1] == 16 else tap
        convolution, norm, _ = net.branches[index]
        features = F.group_norm(F.conv2d(tap, convolution.weight), 4, norm.weight, norm.bias).relu()
        full = F.interpolate(features, size=(8, 8), mode="bilinear", align_corners=False)
        weight = net.join.weight[:, 32 * index : 32 * (index + 1)]
        expected = expected + F.conv2d(full, weight)[:, 0]
    assert torch.allclose(net(photos), expected, atol=1e-5)


def test_boundary_net__trunk_evaluates_and_has_no_gradient():
    net = build().train()
    assert net.branches.training
    assert not any(module.training for module in net.backbone.modules())
    before = {name: tensor.clone() for name, tensor in net.backbone.state_dict().items()}
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is None for parameter in net.backbone.parameters())
    assert all(parameter.grad is not None for parameter in net.new_parameters())
    assert all(torch.equal(before[n], t) for n, t in net.backbone.state_dict().items())


def test_boundary_net__new_parameters_are_all_but_the_trunks(net):
    trunk = {id(parameter) for parameter in net.backbone.parameters()}
    new = [id(parameter) for parameter in net.new_parameters()]
    assert len(new) == len(set(new)) == 5 * 3 + 2
    assert trunk | set(new) == {id(parameter) for parameter in net.parameters()}
    assert not trunk & set(new)


def test_initialise_branches__is_a_pure_function_of_its_generator():
    torch.manual_seed(0)
    first = build()
    torch.manual_seed(1)
    second = build()
    for one, other in zip(first.new_parameters(), second.new_parameters(), strict=True):
        assert torch.equal(one, other)
    assert first.join.weight.abs().max() <= 160**-0.5
    assert first.join.weight.abs().max() > 0.9 * 160**-0.5
    assert first.join.bias.item() == 0
