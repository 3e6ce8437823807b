"""Networks that answer a class for each pixel.

Each has a layer ``decoder`` whose output is the feature map that the last layer classifies.
"""

from __future__ import annotations

import re
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from gossamer.core.errors import InputError

Backbone = Literal["resnet18", "resnet50", "resnet101", "wide_resnet34", "mobilenetv2"]

BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet18": ("resnet18", {"stem_type": "deep", "stem_width": 32}),
    "resnet50": ("resnet50", {"stem_type": "deep", "stem_width": 32}),
    "resnet101": ("resnet101", {"stem_type": "deep", "stem_width": 64}),
    # ResNet-34 with every stage twice as wide.
    "wide_resnet34": ("resnet34", {"channels": (128, 256, 512, 1024)}),
    "mobilenetv2": ("mobilenetv2_100", {}),
}
"""timm's name and options of each backbone."""


def convolution(inputs: int, outputs: int, kernel: int = 3, *, dilation: int = 1) -> nn.Sequential:
    """Convolution that keeps the size, batch normalisation and ReLU."""
    return nn.Sequential(
        nn.Conv2d(
            inputs,
            outputs,
            kernel,
            padding=dilation * (kernel // 2),
            dilation=dilation,
            bias=False,
        ),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Level(nn.Module):
    """One resolution of a U-Net: two convolutions down, what is coarser, two convolutions up.

    Args:
        inputs: channels that enter.
        width: channels at this resolution.
        inner: what works on the pooled map (its channels come second); None at the bottom.
    """

    def __init__(self, inputs: int, width: int, inner: tuple[nn.Module, int] | None) -> None:
        super().__init__()
        self.down = nn.Sequential(convolution(inputs, width), convolution(width, width))
        self.inner = None if inner is None else inner[0]
        self.pool = nn.MaxPool2d(2)
        self.up = (
            None
            if inner is None
            else nn.Sequential(convolution(width + inner[1], width), convolution(width, width))
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Maps ``[batch, inputs, height, width]`` to ``[batch, width, height, width]``."""
        fine = self.down(maps)
        if self.inner is None or self.up is None:
            return fine
        coarse = interpolate(self.inner(self.pool(fine)), size=fine.shape[2:], mode="nearest")
        return self.up(torch.cat((fine, coarse), 1))


class UNet(nn.Module):
    """A U-Net whose channels double with each level.

    Source: Ronneberger, Fischer and Brox, "U-Net: convolutional networks for biomedical image
    segmentation", arXiv:1505.04597, with padded convolutions, batch normalisation and
    nearest-neighbour upsampling.

    Args:
        channels: of the image.
        classes: logits a pixel.
        width: channels at full resolution.
        depth: resolutions (1 or more); sides of the image are at least ``2 ** (depth - 1)``.

    Raises:
        InputError: if a number is below 1.
    """

    def __init__(
        self, channels: int = 3, classes: int = 2, *, width: int = 8, depth: int = 3
    ) -> None:
        super().__init__()
        if min(channels, classes, width, depth) < 1:
            raise InputError(
                f"a U-Net needs channels, classes, width and depth of 1 or more, not {channels}, "
                f"{classes}, {width} and {depth}"
            )
        level: tuple[nn.Module, int] | None = None
        for number in reversed(range(depth)):
            inputs = channels if number == 0 else width * 2 ** (number - 1)
            level = (Level(inputs, width * 2**number, level), width * 2**number)
        assert level is not None
        self.decoder = level[0]
        self.classifier = nn.Conv2d(width, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[batch, channels, height, width]`` to logits ``[batch, classes, ...]``."""
        return self.classifier(self.decoder(images))


class Pyramid(nn.Module):
    """Atrous spatial pyramid pooling: dilated convolutions and a global view, side by side.

    Args:
        inputs: channels that enter.
        width: channels of each branch and of the result.
        rates: dilations.
    """

    def __init__(self, inputs: int, width: int, rates: tuple[int, ...]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [convolution(inputs, width, 1)]
            + [convolution(inputs, width, dilation=rate) for rate in rates]
        )
        # No batch normalisation: after global pooling there is one value a channel and image.
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(inputs, width, 1), nn.ReLU())
        self.project = convolution(width * (len(rates) + 2), width, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps ``[batch, inputs, height, width]`` to ``[batch, width, height, width]``."""
        views = [branch(maps) for branch in self.branches]
        views.append(self.pool(maps).expand(-1, -1, *maps.shape[2:]))
        return self.project(torch.cat(views, 1))


class DeepLab(nn.Module):
    """DeepLabv3+ with a backbone of timm at output stride 16.

    Source: Chen et al., "Encoder-decoder with atrous separable convolution for semantic image
    segmentation", arXiv:1802.02611, with plain 3x3 convolutions in the decoder.

    Args:
        channels: of the image.
        classes: logits a pixel.
        backbone: which one; see :data:`BACKBONES`.
        width: channels of pyramid and decoder.
        low: channels to which the map at stride 4 is reduced.
        rates: dilations of the pyramid.

    Raises:
        InputError: if there is no such backbone.
    """

    def __init__(
        self,
        channels: int = 3,
        classes: int = 21,
        *,
        backbone: Backbone = "resnet18",
        width: int = 256,
        low: int = 48,
        rates: tuple[int, ...] = (6, 12, 18),
    ) -> None:
        super().__init__()
        import timm

        if backbone not in BACKBONES:
            raise InputError(
                f"there is no backbone {backbone!r:.60}; there are: {', '.join(BACKBONES)}"
            )
        name, options = BACKBONES[backbone]
        self.backbone = timm.create_model(
            name,
            features_only=True,
            out_indices=(1, 4),
            output_stride=16,
            in_chans=channels,
            **options,
        )
        fine, coarse = self.backbone.feature_info.channels()  # type: ignore[operator, union-attr]
        self.pyramid = Pyramid(coarse, width, rates)
        self.low = convolution(fine, low, 1)
        self.decoder = nn.Sequential(convolution(low + width, width), convolution(width, width))
        self.classifier = nn.Conv2d(width, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[batch, channels, height, width]`` to logits ``[batch, classes, ...]``."""
        fine, coarse = self.backbone(images)
        wide = interpolate(self.pyramid(coarse), size=fine.shape[2:], mode="bilinear")
        maps = self.decoder(torch.cat((self.low(fine), wide), 1))
        return interpolate(self.classifier(maps), size=images.shape[2:], mode="bilinear")


def segmentation_network(name: str, *, channels: int, classes: int) -> nn.Module:
    """Builds a network by name: ``unet:WIDTHxDEPTH`` or ``deeplab:BACKBONE``.

    Raises:
        InputError: if the name is neither.
    """
    if found := re.fullmatch(r"unet:(\d{1,4})x(\d{1,2})", name):
        width, depth = map(int, found.groups())
        return UNet(channels, classes, width=width, depth=depth)
    if name.startswith("deeplab:"):
        return DeepLab(channels, classes, backbone=cast(Backbone, name.removeprefix("deeplab:")))
    raise InputError(
        f"{name!r:.60} is no segmentation network; write unet:WIDTHxDEPTH or deeplab:BACKBONE"
    )
