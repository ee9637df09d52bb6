"""A trained segmenter as a file that other programs run: `torch.export` (pt2) and ONNX.

What is exported has the arithmetic around the network in it: it takes RGB of 0..255 and gives class
probabilities at the photo's size, so that whoever runs it needs nothing of ours but a resize.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from jaxtyping import Float32
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional

from wsss_core.data.transforms import IMAGENET_MEAN, IMAGENET_STD

MULTIPLE_PX = 16
"""Photo sides are multiples of this, as `conta predict` makes them."""
EXAMPLE_SHAPE = (2, 3, 64, 96)  # a batch of one would be taken for a constant

_MOST = 512  # of MULTIPLE_PX a side: 8192 px


class PhotoSegmenter(nn.Module):
    """From photos to class probabilities, one scale, no flip.

    Attributes:
        network: A copy of the segmenter.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = _fix_padding(copy.deepcopy(network))
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1))

    def forward(self, photos: Float32[Tensor, "b 3 h w"]) -> Float32[Tensor, "b k h w"]:
        """Probabilities of background and classes; sides are multiples of `MULTIPLE_PX`.

        Args:
            photos: RGB, 0..255.
        """
        scores = self.network((photos / 255.0 - self.mean) / self.std)
        full = functional.interpolate(
            scores, size=photos.shape[-2:], mode="bilinear", align_corners=False
        )
        return full.softmax(dim=1)


def trace(segmenter: PhotoSegmenter) -> ExportedProgram:
    """The program of a segmenter in evaluation mode, for any batch and any size.

    Raises:
        Exception: Whatever `torch.export` raises where a backbone decides by its data.
    """
    rows, columns = (Dim(name, min=1, max=_MOST) for name in ("rows", "columns"))
    shapes = {0: Dim("batch", min=1, max=256), 2: MULTIPLE_PX * rows, 3: MULTIPLE_PX * columns}
    example = make_example()
    with torch.no_grad():
        return torch.export.export(segmenter, (example,), dynamic_shapes=(shapes,))


def write_pt2(segmenter: PhotoSegmenter, path: Path) -> None:
    """Write the program and its weights; there is no pickle in the file.

    Raises:
        Exception: As `trace`.
    """
    program = trace(segmenter)
    program.example_inputs = None  # torch would pickle them
    torch.export.save(program, path)


class _EvenConvolution(nn.Module):
    """A convolution of stride 2 that pads as TensorFlow does, for even sides: there it is fixed."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        kernels = zip(convolution.kernel_size, convolution.dilation, strict=True)
        rows, columns = (max(0, dilation * (kernel - 1) - 1) for kernel, dilation in kernels)
        self.padding = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        self.convolution = nn.Conv2d(
            convolution.in_channels,
            convolution.out_channels,
            (convolution.kernel_size[0], convolution.kernel_size[1]),
            stride=2,
            dilation=(convolution.dilation[0], convolution.dilation[1]),
            groups=convolution.groups,
            bias=convolution.bias is not None,
        )
        self.convolution.load_state_dict(convolution.state_dict())

    def forward(self, features: Tensor) -> Tensor:
        return self.convolution(functional.pad(features, self.padding))


def _fix_padding(network: nn.Module) -> nn.Module:
    """Put the padding of even sides where timm works it out from the size.

    The tracer would carry its sums through every later layer, and take minutes.
    """
    from timm.layers.conv2d_same import Conv2dSame

    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Conv2dSame) and tuple(child.stride) == (2, 2):
                setattr(parent, name, _EvenConvolution(child))
    return network


def make_example() -> Float32[Tensor, "b 3 h w"]:
    """Photos of noise, always the same."""
    return torch.rand(EXAMPLE_SHAPE, generator=torch.Generator().manual_seed(0)) * 255.0
