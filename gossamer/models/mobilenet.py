"""MobileNet-V1 and ResNeXt-50 whose grouped convolutions have a constant width or number of groups.

MobileNet-V1 (Howard et al., arXiv:1704.04861) alternates a depthwise 3 x 3 convolution and a 1 x 1
convolution. With ``group_width`` the depthwise ones become group convolutions of so many channels a
group (E2GC, arXiv:2006.15100; DRACO, arXiv:2006.15103); a width of 1 is the original network.
ResNeXt-50 (Xie et al., "Aggregated residual transformations for deep neural networks", CVPR 2017)
has 32 groups in every stage, so that groups become wider with depth; here the width can be constant
instead. Names of tensors are those of timm's ``mobilenetv1_100`` and ``resnext50_32x4d``, whose
weights therefore load as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from timm.models import register_model
from torch import Tensor, nn
from torch.nn.functional import relu

from gossamer.core.errors import InputError
from gossamer.core.groups import group_count, warn_of_remainders
from gossamer.models.pretrained import no_weights

STAGES = ((64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 6, 2), (1024, 2, 2))
"""Channels, blocks and stride of the first block, for each stage of MobileNet-V1."""
SMALL_STAGES = ((64, 1, 1), (128, 2, 2), (256, 2, 2))
"""The same for images of 8 to 32 pixels: five blocks."""


def _groups(channels: int, group_width: int | None, groups: int | None) -> int:
    return group_count(channels, channels, group_width=group_width, groups=groups)


class SeparableBlock(nn.Module):
    """A grouped 3 x 3 convolution, then a 1 x 1 convolution, each normalised and rectified.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        stride: of the grouped convolution.
        groups: of the grouped convolution; as many as channels make it depthwise.
        activation: makes the rectifier.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        stride: int,
        groups: int,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(
            inputs, inputs, 3, stride=stride, padding=1, groups=groups, bias=False
        )
        self.bn1 = nn.BatchNorm2d(inputs)
        self.act1 = activation()
        self.conv_pw = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.act2 = activation()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv_dw(x)))
        return self.act2(self.bn2(self.conv_pw(x)))


class MobileNet(nn.Module):
    """A stem of 3 x 3, separable blocks, the mean over positions, one linear layer.

    Args:
        stages: channels, blocks and stride of each stage, before the width multiplier.
        stem: channels of the first convolution, before the width multiplier.
        stem_stride: of the first convolution.
        group_width: channels of one group of the grouped convolutions (1: depthwise). A layer whose
            channels it does not divide gets the largest width below it that does.
        groups: a constant number of groups in place of a constant width; layers with fewer channels
            have one for each.
        width: multiplies all channels; they are rounded to multiples of 8.
        in_channels: of the images.
        classes: logits.
        activation: makes the rectifiers. The paper has ReLU; published weights of TensorFlow and
            timm were trained with ``nn.ReLU6``.

    Raises:
        InputError: if a width, or a number of groups, is not positive, or both are given.
    """

    def __init__(
        self,
        stages: Sequence[tuple[int, int, int]] = STAGES,
        *,
        stem: int = 32,
        stem_stride: int = 2,
        group_width: int | None = None,
        groups: int | None = None,
        width: float = 1.0,
        in_channels: int = 3,
        classes: int = 1000,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        if not width > 0.0:
            raise InputError(f"the width multiplier is more than 0, not {width:g}")
        if group_width is None and groups is None:
            group_width = 1
        inputs = _scaled(stem, width)
        self.conv_stem = nn.Conv2d(
            in_channels, inputs, 3, stride=stem_stride, padding=1, bias=False
        )
        self.bn1 = nn.BatchNorm2d(inputs)
        self.act1 = activation()
        self.blocks = nn.Sequential()
        for channels, count, stride in stages:
            stage = nn.Sequential()
            outputs = _scaled(channels, width)
            for block in range(count):
                stage.append(
                    SeparableBlock(
                        inputs, outputs, stride=stride if block == 0 else 1,
                        groups=_groups(inputs, group_width, groups), activation=activation,
                    )
                )  # fmt: skip
                inputs = outputs
            self.blocks.append(stage)
        self.classifier = nn.Linear(inputs, classes)
        # What timm's users read off a model.
        self.num_classes = classes
        self.num_features = inputs
        _initialise(self)
        _warn(self, "conv_dw", group_width, groups)

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature maps before pooling, ``[batch, channels, height, width]``."""
        return self.blocks(self.act1(self.bn1(self.conv_stem(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits ``[batch, classes]`` of feature maps, or with ``pre_logits`` their means."""
        x = x.mean((2, 3))
        return x if pre_logits else self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The layer that makes logits, as timm's models have it."""
        return self.classifier

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the classifier by a fresh one for ``num_classes``."""
        self.classifier = nn.Linear(self.num_features, num_classes)
        self.num_classes = num_classes


def mobilenet_v1(
    *,
    group_width: int | None = None,
    groups: int | None = None,
    width: float = 1.0,
    small_images: bool = False,
    in_channels: int = 3,
    classes: int = 1000,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> MobileNet:
    """MobileNet-V1: 568.7 million MACs at 224 x 224 as it was published.

    Args:
        group_width: channels of one group (1, the default, is the original network).
        groups: a constant number of groups in place of a constant width.
        width: multiplies all channels.
        small_images: the first convolution keeps the resolution, for images of 32 pixels.
        in_channels: of the images.
        classes: logits.
        activation: makes the rectifiers.
    """
    return MobileNet(
        STAGES, stem_stride=1 if small_images else 2, group_width=group_width, groups=groups,
        width=width, in_channels=in_channels, classes=classes, activation=activation,
    )  # fmt: skip


def small_mobilenet(
    *,
    group_width: int | None = None,
    groups: int | None = None,
    width: float = 1.0,
    in_channels: int = 1,
    classes: int = 10,
) -> MobileNet:
    """Five separable blocks of 64 to 256 channels, for images of 8 to 32 pixels.

    Args:
        group_width: channels of one group (1, the default, is depthwise).
        groups: a constant number of groups in place of a constant width.
        width: multiplies all channels.
        in_channels: of the images.
        classes: logits.
    """
    return MobileNet(
        SMALL_STAGES, stem_stride=1, group_width=group_width, groups=groups, width=width,
        in_channels=in_channels, classes=classes,
    )  # fmt: skip


class Bottleneck(nn.Module):
    """1 x 1, grouped 3 x 3 and 1 x 1 convolutions and a shortcut.

    Args:
        inputs: channels that come in.
        inner: channels of the grouped convolution.
        outputs: channels that go out.
        stride: of the grouped convolution.
        groups: of the grouped convolution.
    """

    def __init__(self, inputs: int, inner: int, outputs: int, *, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = relu(self.bn1(self.conv1(x)))
        y = relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNeXt(nn.Module):
    """A residual network of bottlenecks with grouped convolutions.

    Args:
        blocks: bottlenecks of each stage.
        group_width: channels of one group in every stage.
        groups: groups in every stage, in place of the width.
        in_channels: of the images.
        classes: logits.

    Raises:
        InputError: unless exactly one of width and number is given, at least 1.
    """

    def __init__(
        self,
        blocks: Sequence[int] = (3, 4, 6, 3),
        *,
        group_width: int | None = None,
        groups: int | None = None,
        in_channels: int = 3,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.stages: list[str] = []
        inputs = 64
        for number, count in enumerate(blocks):
            inner, outputs = 128 << number, 256 << number
            stage = nn.Sequential()
            for block in range(count):
                stride = 2 if number > 0 and block == 0 else 1
                count_of_groups = _groups(inner, group_width, groups)
                stage.append(
                    Bottleneck(inputs, inner, outputs, stride=stride, groups=count_of_groups)
                )
                inputs = outputs
            self.stages.append(f"layer{number + 1}")
            self.add_module(self.stages[-1], stage)
        self.fc = nn.Linear(inputs, classes)
        self.num_classes = classes
        self.num_features = inputs
        _initialise(self)
        _warn(self, "conv2", group_width, groups)

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature maps before pooling, ``[batch, channels, height / 32, width / 32]``."""
        x = self.maxpool(relu(self.bn1(self.conv1(x))))
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits ``[batch, classes]`` of feature maps, or with ``pre_logits`` their means."""
        x = x.mean((2, 3))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The layer that makes logits, as timm's models have it."""
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the classifier by a fresh one for ``num_classes``."""
        self.fc = nn.Linear(self.num_features, num_classes)
        self.num_classes = num_classes


def resnext50(
    *,
    group_width: int | None = None,
    groups: int | None = None,
    in_channels: int = 3,
    classes: int = 1000,
) -> ResNeXt:
    """ResNeXt-50; without a width or a number of groups the published 32x4d (32 groups).

    Args:
        group_width: channels of one group in every stage.
        groups: groups in every stage.
        in_channels: of the images.
        classes: logits.
    """
    if group_width is None and groups is None:
        groups = 32
    return ResNeXt(group_width=group_width, groups=groups, in_channels=in_channels, classes=classes)


def _scaled(channels: int, width: float) -> int:
    """A multiple of 8 near to ``channels * width``, no more than 10 % below it."""
    wanted = channels * width
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded


def _initialise(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)


def _warn(module: nn.Module, leaf: str, group_width: int | None, groups: int | None) -> None:
    counts = {
        name: (layer.in_channels, layer.groups)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Conv2d) and name.endswith(f".{leaf}")
    }
    warn_of_remainders(counts, group_width=group_width, groups=groups)


# timm calls a registered function with these keywords; those that mean nothing here are ignored.


@register_model
def gossamer_mobilenetv1(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    cache_dir: str | Path | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    group_width: int | None = None,
    groups: int | None = None,
    width: float = 1.0,
) -> MobileNet:
    """:func:`mobilenet_v1` for timm."""
    no_weights("gossamer_mobilenetv1", pretrained)
    return mobilenet_v1(
        group_width=group_width, groups=groups, width=width, in_channels=in_chans,
        classes=num_classes,
    )  # fmt: skip


@register_model
def gossamer_mobilenetv1_g8(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    cache_dir: str | Path | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
) -> MobileNet:
    """:func:`mobilenet_v1` with groups of 8 channels, for timm."""
    no_weights("gossamer_mobilenetv1_g8", pretrained)
    return mobilenet_v1(group_width=8, in_channels=in_chans, classes=num_classes)


@register_model
def gossamer_small_mobilenet(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    cache_dir: str | Path | None = None,
    num_classes: int = 10,
    in_chans: int = 1,
    group_width: int | None = None,
    groups: int | None = None,
    width: float = 1.0,
) -> MobileNet:
    """:func:`small_mobilenet` for timm."""
    no_weights("gossamer_small_mobilenet", pretrained)
    return small_mobilenet(
        group_width=group_width, groups=groups, width=width, in_channels=in_chans,
        classes=num_classes,
    )  # fmt: skip


@register_model
def gossamer_resnext50(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    cache_dir: str | Path | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    group_width: int | None = None,
    groups: int | None = None,
) -> ResNeXt:
    """:func:`resnext50` for timm."""
    no_weights("gossamer_resnext50", pretrained)
    return resnext50(
        group_width=group_width, groups=groups, in_channels=in_chans, classes=num_classes
    )
