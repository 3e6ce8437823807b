"""Small networks of one kind of block each, of random depth and width.

The kinds are those whose marks on execution differ: plain stacks (VGG), residual blocks (He et al.,
CVPR 2016), dense connections (Huang et al., CVPR 2017), fire modules (Iandola et al.,
arXiv:1602.07360), depthwise-separable convolutions (Howard et al., arXiv:1704.04861), inverted
residuals (Sandler et al., CVPR 2018) and grouped convolutions with a channel shuffle (Zhang et al.,
CVPR 2018).
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from gossamer.core.errors import InputError
from gossamer.models.mobilenet import SeparableBlock

FAMILIES = (
    "plain", "residual", "dense", "fire", "depthwise-separable", "inverted residual", "shuffle",
)  # fmt: skip


def convolution(
    inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1, groups: int = 1,
    activation: bool = True,
) -> nn.Sequential:  # fmt: skip
    """A convolution without bias, its normalisation and, unless refused, a rectifier."""
    layers: list[nn.Module] = [
        nn.Conv2d(
            inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False
        ),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([nn.ReLU()] if activation else []))


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut, which is a 1 x 1 convolution where shapes differ.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        stride: of the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            convolution(inputs, outputs, stride=stride),
            convolution(outputs, outputs, activation=False),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = (
            nn.Identity()
            if same
            else convolution(inputs, outputs, 1, stride=stride, activation=False)
        )
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.body(x) + self.shortcut(x))


class DenseLayer(nn.Module):
    """Appends ``growth`` channels to what comes in.

    Args:
        inputs: channels that come in.
        growth: channels that are added.
        bottleneck: whether a 1 x 1 convolution to four times the growth comes first.
    """

    def __init__(self, inputs: int, growth: int, *, bottleneck: bool) -> None:
        super().__init__()
        self.body = (
            nn.Sequential(convolution(inputs, 4 * growth, 1), convolution(4 * growth, growth))
            if bottleneck
            else convolution(inputs, growth)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


class Fire(nn.Module):
    """A 1 x 1 convolution to few channels, then 1 x 1 and 3 x 3 side by side.

    Args:
        inputs: channels that come in.
        squeeze: channels in between.
        expand1: channels of the 1 x 1 branch.
        expand3: channels of the 3 x 3 branch.
    """

    def __init__(self, inputs: int, squeeze: int, expand1: int, expand3: int) -> None:
        super().__init__()
        self.squeeze = convolution(inputs, squeeze, 1)
        self.expand1 = convolution(squeeze, expand1, 1)
        self.expand3 = convolution(squeeze, expand3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x)
        return torch.cat([self.expand1(x), self.expand3(x)], 1)


class InvertedResidual(nn.Module):
    """Widens by 1 x 1, filters each channel, narrows by 1 x 1; adds its input where shapes agree.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        stride: of the depthwise convolution.
        expansion: channels inside over channels that come in.
        kernel: side of the depthwise kernels.
    """

    def __init__(
        self, inputs: int, outputs: int, *, stride: int, expansion: int, kernel: int = 3
    ) -> None:
        super().__init__()
        inner = inputs * expansion
        self.body = nn.Sequential(
            convolution(inputs, inner, 1),
            convolution(inner, inner, kernel, stride=stride, groups=inner),
            convolution(inner, outputs, 1, activation=False),
        )
        self.joined = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.joined else self.body(x)


class ShuffleUnit(nn.Module):
    """Grouped 1 x 1, shuffle, depthwise 3 x 3, grouped 1 x 1; added to (or beside) its input.

    Args:
        inputs: channels that come in.
        outputs: channels that go out; with a stride of 2 the pooled input is ``inputs`` of them.
        stride: 1 (the input is added) or 2 (its mean is concatenated).
        groups: of the 1 x 1 convolutions.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int, groups: int) -> None:
        super().__init__()
        inner = max(groups, outputs // 4 // groups * groups)
        made = outputs - inputs if stride == 2 else outputs
        self.groups, self.stride = groups, stride
        self.reduce = convolution(inputs, inner, 1, groups=groups)
        self.depthwise = convolution(inner, inner, stride=stride, groups=inner, activation=False)
        self.expand = convolution(inner, made, 1, groups=groups, activation=False)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.reduce(x)
        b, c, h, w = y.shape
        y = y.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)
        y = self.expand(self.depthwise(y))
        if self.stride == 2:
            return self.act(torch.cat([avg_pool2d(x, 3, 2, padding=1), y], 1))
        return self.act(x + y)


def random_network(
    family: str,
    *,
    seed: int,
    blocks: tuple[int, int] = (3, 6),
    widths: tuple[int, ...] = (16, 24, 32, 48, 64),
    in_channels: int = 3,
    classes: int = 10,
) -> nn.Sequential:
    """A stem, random blocks of one kind, the mean over positions and a linear layer.

    Args:
        family: one of :data:`FAMILIES`.
        seed: of sizes and weights.
        blocks: least and most blocks.
        widths: channels the stem may have.
        in_channels: of the images.
        classes: logits.

    Raises:
        InputError: if the family is unknown.
    """
    if family not in FAMILIES:
        raise InputError(f"{family!r} is no family of blocks: {', '.join(FAMILIES)}")
    draw = random.Random(f"{family} {seed}")
    count, width = draw.randint(*blocks), draw.choice(widths)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = [convolution(in_channels, width)]
        channels = _BUILDERS[family](layers, draw, count, width)
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
    return nn.Sequential(*layers)


def _strides(draw: random.Random, count: int) -> list[int]:
    halved = set(draw.sample(range(count), min(2, count - 1)))
    return [2 if i in halved else 1 for i in range(count)]


def _plain(layers: list[nn.Module], draw: random.Random, count: int, width: int) -> int:
    pooled = draw.random() < 0.5
    for stride in _strides(draw, count):
        outputs = 2 * width if stride == 2 else draw.choice((width, width, width + 8))
        layers.append(convolution(width, outputs, stride=1 if pooled else stride))
        if pooled and stride == 2:
            layers.append(nn.MaxPool2d(2))
        for _ in range(draw.randint(0, 1)):
            layers.append(convolution(outputs, outputs))
        width = outputs
    return width


def _residual(layers: list[nn.Module], draw: random.Random, count: int, width: int) -> int:
    for stride in _strides(draw, count):
        outputs = width * stride
        layers.append(Residual(width, outputs, stride))
        width = outputs
    return width


def _dense(layers: list[nn.Module], draw: random.Random, count: int, width: int) -> int:
    growth, bottleneck = draw.choice((8, 12, 16, 24, 32)), draw.random() < 0.5
    halved = draw.randint(1, count)
    for i in range(count):
        layers.append(DenseLayer(width, growth, bottleneck=bottleneck))
        width += growth
        if i == halved:
            layers += [convolution(width, width // 2, 1), nn.AvgPool2d(2)]
            width //= 2
    return width


def _fire(layers: list[nn.Module], draw: random.Random, count: int, width: int) -> int:
    for stride in _strides(draw, count):
        squeeze = draw.choice((8, 12, 16))
        expand = squeeze * draw.choice((2, 3, 4))
        layers.append(Fire(width, squeeze, expand, expand))
        if stride == 2:
            layers.append(nn.MaxPool2d(2))
        width = 2 * expand
    return width


def _separable(layers: list[nn.Module], draw: random.Random, count: int, width: int) -> int:
    for stride in _strides(draw, count):
        outputs = 2 * width if stride == 2 else draw.choice((width, 2 * width))
        outputs = min(outputs, 256)
        layers.append(SeparableBlock(width, outputs, stride=stride, groups=width))
        width = outputs
    return width


def _inverted(layers: list[nn.Module], draw: random.Random, count: int, width: int) -> int:
    expansion, kernel = draw.choice((3, 4, 6)), draw.choice((3, 5))
    width = max(8, width // 2)
    layers[0] = convolution(layers[0][0].in_channels, width)  # type: ignore[index]
    for stride in _strides(draw, count):
        outputs = width + 8 if stride == 2 else width
        layers.append(
            InvertedResidual(width, outputs, stride=stride, expansion=expansion, kernel=kernel)
        )
        width = outputs
    return width


def _shuffle(layers: list[nn.Module], draw: random.Random, count: int, width: int) -> int:
    groups = draw.choice((2, 4))
    width = 4 * groups * max(1, width // (4 * groups))
    layers[0] = convolution(layers[0][0].in_channels, width)  # type: ignore[index]
    for stride in _strides(draw, count):
        outputs = 2 * width if stride == 2 else width
        layers.append(ShuffleUnit(width, outputs, stride=stride, groups=groups))
        width = outputs
    return width


_BUILDERS: dict[str, Callable[[list[nn.Module], random.Random, int, int], int]] = {
    "plain": _plain,
    "residual": _residual,
    "dense": _dense,
    "fire": _fire,
    "depthwise-separable": _separable,
    "inverted residual": _inverted,
    "shuffle": _shuffle,
}
