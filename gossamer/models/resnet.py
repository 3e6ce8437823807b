"""Residual networks for small images.

The CIFAR variant of He, Zhang, Ren and Sun, "Deep residual learning for image recognition" (CVPR
2016, section 4.2): a 3 x 3 stem, three stages of basic blocks whose widths double where the
resolution halves, global average pooling, one linear layer. Names of tensors are those of the
widespread PyTorch checkpoints (``conv1``, ``bn1``, ``layer1.0.conv1``, ..., ``linear``), which
therefore load as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.models import register_model
from torch import Tensor, nn
from torch.nn.functional import pad, relu

from gossamer.core.errors import InputError
from gossamer.models.pretrained import no_weights

WIDTHS = (16, 32, 64)


class PaddedShortcut(nn.Module):
    """Shortcut A of the paper: every second pixel, and zeros for the channels that are new.

    Args:
        extra: how many channels are added, half on each side.
        stride: every how manyeth pixel is kept.
    """

    def __init__(self, extra: int, stride: int) -> None:
        super().__init__()
        self.extra = extra
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        before = self.extra // 2
        x = x[:, :, :: self.stride, :: self.stride]
        return pad(x, (0, 0, 0, 0, before, self.extra - before))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, each convolution followed by batch normalisation.

    Args:
        inputs: channels that come in.
        width: channels that go out.
        stride: of the first convolution.
        projection: whether a shortcut that changes shape is a 1 x 1 convolution (B of the paper)
            or has no parameters (A).
    """

    def __init__(self, inputs: int, width: int, *, stride: int, projection: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or inputs != width:
            if projection:
                self.shortcut = nn.Sequential(
                    nn.Conv2d(inputs, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width)
                )
            else:
                self.shortcut = PaddedShortcut(width - inputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = relu(self.bn1(self.conv1(x)))
        return relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """A residual network for images of about 8 to 64 pixels.

    Args:
        widths: channels of each stage; each stage but the first halves the resolution.
        blocks_per_stage: basic blocks in each stage.
        in_channels: of the images.
        classes: logits.
        projection: how shortcuts change shape, see :class:`BasicBlock`.
    """

    def __init__(
        self,
        widths: Sequence[int],
        blocks_per_stage: int,
        *,
        in_channels: int,
        classes: int,
        projection: bool,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stages: list[str] = []
        inputs = widths[0]
        for stage, width in enumerate(widths, start=1):
            blocks = nn.Sequential()
            for block in range(blocks_per_stage):
                stride = 2 if stage > 1 and block == 0 else 1
                blocks.append(BasicBlock(inputs, width, stride=stride, projection=projection))
                inputs = width
            self.add_module(f"layer{stage}", blocks)
            self.stages.append(f"layer{stage}")
        self.linear = nn.Linear(inputs, classes)
        # What timm's users read off a model.
        self.num_classes = classes
        self.num_features = inputs
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature maps before pooling, ``[batch, widths[-1], height / 4, width / 4]``."""
        x = relu(self.bn1(self.conv1(x)))
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits ``[batch, classes]`` of feature maps, or with ``pre_logits`` their means."""
        x = x.mean((2, 3))
        return x if pre_logits else self.linear(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The layer that makes logits, as timm's models have it."""
        return self.linear

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the classifier by a fresh one for ``num_classes``."""
        self.linear = nn.Linear(self.num_features, num_classes)
        nn.init.kaiming_normal_(self.linear.weight)
        self.num_classes = num_classes


def cifar_resnet(depth: int = 20, *, in_channels: int = 3, classes: int = 10) -> SmallResNet:
    """ResNet-20, 32, 44, 56 or 110 for 32 x 32 images, with parameter-free shortcuts.

    Without the ``num_batches_tracked`` counters ResNet-20 has 269,722 parameters.

    Args:
        depth: convolutions and the linear layer counted, ``6 n + 2``.
        in_channels: of the images.
        classes: logits.

    Raises:
        InputError: if ``depth`` is not 6 n + 2.
    """
    if depth < 8 or (depth - 2) % 6:
        raise InputError(f"a CIFAR ResNet has 6 n + 2 layers (20, 32, 44, 56, ...), not {depth}")
    return SmallResNet(
        WIDTHS, (depth - 2) // 6, in_channels=in_channels, classes=classes, projection=False
    )


def digits_resnet(
    widths: Sequence[int] = WIDTHS,
    *,
    blocks_per_stage: int = 2,
    in_channels: int = 1,
    classes: int = 10,
) -> SmallResNet:
    """The residual network for 8 x 8 digits, with convolutions in shortcuts that change shape.

    Args:
        widths: channels of each stage.
        blocks_per_stage: basic blocks in each stage.
        in_channels: of the images.
        classes: logits.
    """
    return SmallResNet(
        widths, blocks_per_stage, in_channels=in_channels, classes=classes, projection=True
    )


# timm calls a registered function with these keywords; those that mean nothing here are ignored.


@register_model
def gossamer_digits_resnet(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    cache_dir: str | Path | None = None,
    num_classes: int = 10,
    in_chans: int = 1,
) -> SmallResNet:
    """:func:`digits_resnet` for timm."""
    no_weights("gossamer_digits_resnet", pretrained)
    return digits_resnet(in_channels=in_chans, classes=num_classes)


@register_model
def gossamer_resnet20(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    cache_dir: str | Path | None = None,
    num_classes: int = 10,
    in_chans: int = 3,
) -> SmallResNet:
    """:func:`cifar_resnet` of depth 20 for timm."""
    no_weights("gossamer_resnet20", pretrained)
    return cifar_resnet(20, in_channels=in_chans, classes=num_classes)


@register_model
def gossamer_resnet32(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    cache_dir: str | Path | None = None,
    num_classes: int = 10,
    in_chans: int = 3,
) -> SmallResNet:
    """:func:`cifar_resnet` of depth 32 for timm."""
    no_weights("gossamer_resnet32", pretrained)
    return cifar_resnet(32, in_channels=in_chans, classes=num_classes)


@register_model
def gossamer_resnet44(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    cache_dir: str | Path | None = None,
    num_classes: int = 10,
    in_chans: int = 3,
) -> SmallResNet:
    """:func:`cifar_resnet` of depth 44 for timm."""
    no_weights("gossamer_resnet44", pretrained)
    return cifar_resnet(44, in_channels=in_chans, classes=num_classes)


@register_model
def gossamer_resnet56(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    cache_dir: str | Path | None = None,
    num_classes: int = 10,
    in_chans: int = 3,
) -> SmallResNet:
    """:func:`cifar_resnet` of depth 56 for timm."""
    no_weights("gossamer_resnet56", pretrained)
    return cifar_resnet(56, in_channels=in_chans, classes=num_classes)
