"""The multi-label classifier on the photo and its context map.

IRNet's form: trunk, global average pooling, bias-free 1x1 class layer, so that the class layer
applied before pooling is the class activation map (irn net/resnet50_cam.py). A context map M joins
by fusion: conv(X; W) + conv_m(M; w_m), which is the concatenation [X ; M] of the paper. With w_m
zero at the start, the default, the pretrained network is kept bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss_core.models.backbones import Backbone

ContextAt = Callable[[tuple[int, int]], Tensor]
"""Gives the context map of a batch, (B,1,h,w), at a feature map's size (h,w); (m*B,1,h,w) where
each photo is looked at under m contexts, context after context."""


class ContextSlice(nn.Module):
    """The weights w_m of the context channel of one convolution, zero at the start.

    It adds conv_m(M; w_m) to what the convolution gives, through a hook, so that the trunk's own
    names and weights stay as they are and conv(X; W) can be shared by every confounder.

    Attributes:
        conv: conv_m, no bias, same kernel; same stride too, but for 1x1 kernels.
        stride: What a 1x1 conv_m sees of M: every n-th row and column.
        channels_in: C of the features that enter the convolution.
        context: The context of the batch under way; None adds nothing.
        rms: Root mean square of conv_m(M) and of conv(X) in the last batch; tensors, for a number
            would have the device finish first.
    """

    def __init__(self, beside: nn.Conv2d) -> None:
        super().__init__()
        kernel, dilation = _pair(beside.kernel_size), _pair(beside.dilation)
        stride, pointwise = _pair(beside.stride), kernel == (1, 1)
        # A strided 1x1 convolution of under 8 channels corrupts the heap on CPUs of AVX2: oneDNN
        # 3.13's backward pass of its weights (oneDNN issue 6035). Picking the cells first gives the
        # same values.
        self.stride = stride if pointwise else (1, 1)
        self.conv = nn.Conv2d(
            1,
            beside.out_channels,
            kernel,
            (1, 1) if pointwise else stride,
            (dilation[0] * (kernel[0] - 1) // 2, dilation[1] * (kernel[1] - 1) // 2),
            dilation,
            bias=False,
        )
        nn.init.zeros_(self.conv.weight)
        self.channels_in = beside.in_channels
        self.context: ContextAt | None = None
        self.rms = (torch.zeros(()), torch.zeros(()))
        beside.register_forward_hook(self._add)

    def _add(self, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self.context is None:
            return output
        context = self.context((inputs[0].shape[-2], inputs[0].shape[-1]))
        added = self.conv(context[:, :, :: self.stride[0], :: self.stride[1]])
        self.rms = (_rms(added), _rms(output))
        times = len(added) // len(output)
        return (output if times == 1 else torch.cat([output] * times)) + added


class Classifier(nn.Module):
    """Trunk, fusion, class layer.

    Attributes:
        backbone: The trunk.
        head: Bias-free 1x1 class layer.
        slices: Where the context joins; empty for a plain classifier.
    """

    def __init__(self, backbone: Backbone, *, num_classes: int, fusion: str | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Conv2d(backbone.shape.channels[-1], num_classes, 1, bias=False)
        self.slices = nn.ModuleList(ContextSlice(conv) for conv in self._fused(fusion))
        self._num_shared = len(backbone.blocks)
        if fusion is not None and fusion != "head":
            self._num_shared = (2 if fusion == "all" else int(fusion.removeprefix("block"))) - 1

    def forward(self, photos: Tensor, context: ContextAt | None = None) -> Tensor:
        """Logits (B,n) of normalised photos (B,3,H,W): the mean of the class maps."""
        return self.class_maps(photos, context).float().mean(dim=(2, 3))

    def class_maps(self, photos: Tensor, context: ContextAt | None = None) -> Tensor:
        """Unrectified class activation maps (B,n,h,w); their mean is the logit."""
        return self.finish(self.begin(photos), context)

    def begin(self, photos: Tensor) -> Tensor:
        """The part of a pass that no context can change: what the first fused block is given."""
        for block in self.backbone.blocks[: self._num_shared]:
            photos = block(photos)
        return photos

    def finish(
        self, features: Tensor, context: ContextAt | None = None, *, num_contexts: int = 1
    ) -> Tensor:
        """The rest of the pass, for each of m contexts.

        Args:
            features: What `begin` gave, (B,...).
            context: Gives m maps a photo, context after context.
            num_contexts: m.

        Returns:
            Unrectified class maps (m*B,n,h,w), context after context.
        """
        rest = self.backbone.blocks[self._num_shared :]
        if num_contexts > 1 and len(rest):  # the head alone shares conv(X; W) among the contexts
            features = torch.cat([features] * num_contexts)
        slices = self.context_slices()
        for part in slices:
            part.context = context
        try:
            for block in rest:
                features = block(features)
            return self.head(features)
        finally:
            for part in slices:
                part.context = None

    def new_parameters(self) -> list[nn.Parameter]:
        """Parameters without pretrained weights: the class layer and the context slices."""
        return [*self.head.parameters(), *self.slices.parameters()]

    def context_rms_ratio(self) -> float:
        """RMS of conv_m(M) over that of conv(X) in the last batch, mean over slices; 0 if none."""
        pairs = [part.rms for part in self.context_slices()]
        ratios = [float(added) / max(float(photo), 1e-12) for added, photo in pairs]
        return sum(ratios) / len(ratios) if ratios else 0.0

    def context_slices(self) -> list[ContextSlice]:
        """`slices`, from the first block that is fused to the last."""
        return [part for part in self.slices if isinstance(part, ContextSlice)]

    def _fused(self, fusion: str | None) -> list[nn.Conv2d]:
        if fusion is None:
            return []
        if fusion == "head":
            return [self.head]
        return [self.backbone.first_convolution(block) for block in fused_blocks(fusion)]


def fused_blocks(fusion: str) -> Sequence[int]:
    """The blocks of the trunk that a context map joins; none for `head`."""
    if fusion == "head":
        return ()
    return range(2, 6) if fusion == "all" else [int(fusion.removeprefix("block"))]


def multilabel_loss(logits: Tensor, tags: Tensor) -> Tensor:
    """Multi-label soft-margin loss: mean BCE on logits over photos and classes.

    It is CONTA's likelihood, -log of a product of sigmoids over n (its issues #3 and #9).

    Args:
        logits: (B,n).
        tags: (B,n), 1 where the photo carries the tag.
    """
    return F.multilabel_soft_margin_loss(logits, tags)


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    height, width = values
    return height, width


def _rms(values: Tensor) -> Tensor:
    return values.detach().float().square().mean().sqrt()


def initialise_slices(classifier: Classifier, generator: torch.Generator) -> None:
    """Draw w_m as PyTorch draws a convolution that takes photo and context as one input.

    Uniform within 1 / sqrt(fan in), the fan in of the photo's channels and the context's together
    (`torch.nn.Conv2d.reset_parameters`). From zero, W1 and W2 learn nothing until w_m has moved.
    """
    for part in classifier.context_slices():
        weight = part.conv.weight
        channels, (height, width) = part.channels_in + 1, weight.shape[2:]
        bound = (channels * height * width) ** -0.5
        with torch.no_grad():
            weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))


def initialise_head(classifier: Classifier, generator: torch.Generator) -> None:
    """Draw the class layer from its own generator: every arm of a study starts from the same."""
    weight = classifier.head.weight
    bound = classifier.head.in_channels**-0.5
    with torch.no_grad():
        weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))
