"""Plain networks without shortcuts: perceptrons, and convolutions with a hidden layer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn


def mlp(widths: Sequence[int], *, norm: bool = False) -> nn.Sequential:
    """Linear layers with ReLU between them; images are flattened.

    Args:
        widths: of the input, the hidden layers and the output, as (64, 128, 10).
        norm: batch normalisation before each ReLU.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(widths[:-1]):
        layers.append(nn.Linear(inputs, outputs))
        if norm:
            layers.append(nn.BatchNorm1d(outputs))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


class ConvNet(nn.Sequential):
    """Convolutions with ReLU, pools between them, and a linear head.

    Args:
        inputs: channels of the image.
        side: pixels of the (square) image.
        plan: for each layer its output channels, or "pool", or "drop:SHARE".
        hidden: widths of the hidden linear layers.
        kernel: pixels of the kernels.
        classes: outputs.
        drop: dropout after each hidden linear layer.
        norm: batch normalisation between each convolution and its ReLU.
    """

    def __init__(
        self,
        inputs: int,
        side: int,
        plan: Sequence[int | str],
        hidden: Sequence[int],
        *,
        kernel: int = 3,
        classes: int = 10,
        drop: float = 0.0,
        norm: bool = True,
    ) -> None:
        layers: list[nn.Module] = []
        width = inputs
        for part in plan:
            if part == "pool":
                layers.append(nn.MaxPool2d(2))
                side //= 2
            elif isinstance(part, str):
                layers.append(nn.Dropout(float(part.removeprefix("drop:"))))
            else:
                layers.append(nn.Conv2d(width, part, kernel, padding=kernel // 2))
                if norm:
                    layers.append(nn.BatchNorm2d(part))
                layers.append(nn.ReLU())
                width = part
        layers.append(nn.Flatten())
        width *= side * side
        for size in hidden:
            layers += [nn.Linear(width, size), nn.ReLU()]
            if drop:
                layers.append(nn.Dropout(drop))
            width = size
        super().__init__(*layers, nn.Linear(width, classes))
