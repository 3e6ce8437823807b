"""ConvFirst, MBConv and ConvNeXt blocks, and networks made of one of them.

ConvFirst (Lavin, "On the efficiency of convolutional neural networks", arXiv:2404.03617) puts a
grouped convolution before the two pointwise layers of a residual block: it works on the narrow
side (``expand`` times fewer operations and activations than in the middle, where MBConv has it),
and what follows it needs no neighbours, so a strip of rows can go through the whole block at once
(:mod:`gossamer.hardware.fused_block`). The blocks are those of the author's published code:
convolutions without bias, batch normalisation after each, SiLU. MBConv is that of MobileNetV2
(arXiv:1801.04381) with grouped convolutions, the ConvNeXt block that of arXiv:2201.03545.

The paper's own dimensions of ConvFirstNet are not at hand: **the sizes here are ours**.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from timm.models import register_model
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.core.errors import InputError
from gossamer.models.pretrained import no_weights

Size = Literal["nano", "small", "base"]
SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...], int]] = {
    "nano": ((32, 64, 128, 256), (2, 2, 6, 2), 4),
    "small": ((64, 128, 256, 512), (2, 2, 6, 2), 4),
    "base": ((64, 128, 256, 512), (2, 2, 6, 2), 6),
}
"""Channels and blocks of the four stages, and the expansion. Ours, not the paper's."""


def _check(inputs: int, group_width: int, kernel: int, expand: int, stride: int) -> None:
    if group_width < 1 or inputs % group_width:
        raise InputError(f"groups of {group_width} channels do not divide {inputs} channels")
    if kernel < 1 or kernel % 2 == 0:
        raise InputError(f"the kernel has an odd side, not {kernel}")
    if expand < 1 or stride < 1:
        raise InputError(f"expansion and stride are at least 1, not {expand} and {stride}")


class ConvFirst(nn.Module):
    """Grouped convolution, expansion, projection; a residual block where the shape stays.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        kernel: side of the convolution.
        stride: of the convolution.
        group_width: channels of one of its groups.
        expand: how many times wider the middle is than ``inputs``.

    Raises:
        InputError: if the groups do not divide the channels, or a number is impossible.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel: int = 3,
        stride: int = 1,
        group_width: int = 8,
        expand: int = 6,
    ) -> None:
        super().__init__()
        _check(inputs, group_width, kernel, expand, stride)
        self.conv = nn.Conv2d(
            inputs, inputs, kernel, stride, kernel // 2, groups=inputs // group_width, bias=False
        )
        self.bn1 = nn.BatchNorm2d(inputs)
        self.expand = nn.Conv2d(inputs, expand * inputs, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(expand * inputs)
        self.project = nn.Conv2d(expand * inputs, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv(x))
        y = F.silu(self.bn2(self.expand(y)))
        y = self.bn3(self.project(y))
        return y + x if self.residual else y


class MBConv(nn.Module):
    """Expansion, grouped convolution, projection; a residual block where the shape stays.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        kernel: side of the convolution.
        stride: of the convolution.
        group_width: channels of one of its groups (1: depthwise).
        expand: how many times wider the middle is than ``inputs``.

    Raises:
        InputError: if the groups do not divide the channels, or a number is impossible.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel: int = 3,
        stride: int = 1,
        group_width: int = 1,
        expand: int = 6,
    ) -> None:
        super().__init__()
        middle = expand * inputs
        _check(middle, group_width, kernel, expand, stride)
        self.expand = nn.Conv2d(inputs, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv = nn.Conv2d(
            middle, middle, kernel, stride, kernel // 2, groups=middle // group_width, bias=False
        )
        self.bn2 = nn.BatchNorm2d(middle)
        self.project = nn.Conv2d(middle, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.bn1(self.expand(x)))
        y = F.silu(self.bn2(self.conv(y)))
        y = self.bn3(self.project(y))
        return y + x if self.residual else y


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of ``[batch, channels, height, width]``."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, layer normalisation, two pointwise layers, layer scale.

    A change of shape is made before it, by a normalised convolution of the stride's side.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        kernel: side of the depthwise convolution.
        stride: of the convolution that changes the shape.
        expand: how many times wider the middle is.
        layer_scale: what the branch is multiplied with at the start.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel: int = 7,
        stride: int = 1,
        expand: int = 4,
        layer_scale: float = 1e-6,
    ) -> None:
        super().__init__()
        _check(outputs, 1, kernel, expand, stride)
        self.reshape: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.reshape = nn.Sequential(
                ChannelNorm(inputs, eps=1e-6), nn.Conv2d(inputs, outputs, stride, stride)
            )
        self.conv = nn.Conv2d(outputs, outputs, kernel, padding=kernel // 2, groups=outputs)
        self.norm = nn.LayerNorm(outputs, eps=1e-6)
        self.expand = nn.Linear(outputs, expand * outputs)
        self.project = nn.Linear(expand * outputs, outputs)
        self.scale = nn.Parameter(layer_scale * torch.ones(outputs))

    def forward(self, x: Tensor) -> Tensor:
        x = self.reshape(x)
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        y = self.scale * self.project(F.gelu(self.expand(y)))
        return x + y.permute(0, 3, 1, 2)


Block = Callable[[int, int, int], nn.Module]
"""Makes a block of inputs, outputs and stride."""


class BlockNet(nn.Module):
    """A stem, stages of one kind of block, the mean over positions, one linear layer.

    Args:
        block: makes a block; the first of each stage but the first halves the resolution.
        widths: channels of each stage.
        depths: blocks of each stage.
        stem_stride: of the first convolution: 4 (a 4 x 4 convolution of patches) or 1 or 2 (3 x 3).
        in_channels: of the images.
        classes: logits.

    Raises:
        InputError: if the stages are not described alike, or the stem's stride is another.
    """

    def __init__(
        self,
        block: Block,
        widths: Sequence[int],
        depths: Sequence[int],
        *,
        stem_stride: int = 4,
        in_channels: int = 3,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        if len(widths) != len(depths) or not widths or stem_stride not in (1, 2, 4):
            raise InputError(
                f"a network has as many widths as depths and a stem of stride 1, 2 or 4, not "
                f"{len(widths)}, {len(depths)} and {stem_stride}"
            )
        side, pad = (4, 0) if stem_stride == 4 else (3, 1)
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, widths[0], side, stem_stride, pad, bias=False),
            nn.BatchNorm2d(widths[0]),
        )
        self.stages = nn.Sequential()
        inputs = widths[0]
        for number, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            stage = nn.Sequential()
            for index in range(depth):
                stage.append(block(inputs, width, 2 if number > 0 and index == 0 else 1))
                inputs = width
            self.stages.append(stage)
        self.norm = nn.BatchNorm2d(inputs)
        self.head = nn.Linear(inputs, classes)
        # What timm's users read off a model.
        self.num_classes = classes
        self.num_features = inputs

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature maps before pooling, ``[batch, channels, height, width]``."""
        return F.silu(self.norm(self.stages(self.stem(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits ``[batch, classes]`` of feature maps, or with ``pre_logits`` their means."""
        x = x.mean((2, 3))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The layer that makes logits, as timm's models have it."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the classifier by a fresh one for ``num_classes``."""
        self.head = nn.Linear(self.num_features, num_classes)
        self.num_classes = num_classes


def convfirst_net(
    size: Size = "nano",
    *,
    kernel: int = 3,
    group_width: int = 8,
    stem_stride: int = 4,
    in_channels: int = 3,
    classes: int = 1000,
) -> BlockNet:
    """A network of ConvFirst blocks, in one of our sizes.

    Args:
        size: a key of :data:`SIZES`.
        kernel: side of the grouped convolutions.
        group_width: channels of one of their groups.
        stem_stride: 4, or 1 or 2 for small images.
        in_channels: of the images.
        classes: logits.

    Raises:
        InputError: if there is no such size.
    """
    if size not in SIZES:
        raise InputError(f"there is no ConvFirst network of size {size!r}; {', '.join(SIZES)}")
    widths, depths, expand = SIZES[size]

    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        return ConvFirst(
            inputs, outputs, kernel=kernel, stride=stride, group_width=group_width, expand=expand
        )

    return BlockNet(
        block, widths, depths, stem_stride=stem_stride, in_channels=in_channels, classes=classes
    )


def _registered(size: Size, pretrained: bool, num_classes: int, in_chans: int) -> BlockNet:
    no_weights(f"gossamer_convfirst_{size}", pretrained)
    return convfirst_net(size, in_channels=in_chans, classes=num_classes)


# timm calls a registered function with these keywords; those that mean nothing here are ignored.


@register_model
def gossamer_convfirst_nano(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    cache_dir: str | Path | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
) -> BlockNet:
    """:func:`convfirst_net` of size nano for timm."""
    return _registered("nano", pretrained, num_classes, in_chans)


@register_model
def gossamer_convfirst_small(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    cache_dir: str | Path | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
) -> BlockNet:
    """:func:`convfirst_net` of size small for timm."""
    return _registered("small", pretrained, num_classes, in_chans)


@register_model
def gossamer_convfirst_base(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    cache_dir: str | Path | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
) -> BlockNet:
    """:func:`convfirst_net` of size base for timm."""
    return _registered("base", pretrained, num_classes, in_chans)
