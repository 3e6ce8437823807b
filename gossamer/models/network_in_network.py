"""Network in network: convolutions followed by convolutions of one pixel, and no hidden layer.

Lin, Chen & Yan, "Network In Network", ICLR 2014, arXiv:1312.4400, in the shape that defences
against poisoning train on each part of their data: without biases and with batch normalisation.
"""

from __future__ import annotations

from torch import nn

STAGES = ((5, (192, 160, 96)), (5, (192, 192, 192)), (3, (192, 192, 192)))
"""Kernel and widths of the three convolutions of each stage."""


def network_in_network(classes: int = 10, channels: int = 3) -> nn.Sequential:
    """Three stages of three convolutions; maximum, then mean pooling between them; a linear head.

    Args:
        classes: logits.
        channels: of the image.
    """
    layers: list[nn.Module] = []
    pools = (nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(1))
    inputs = channels
    for (kernel, widths), pool in zip(STAGES, pools, strict=True):
        for place, width in enumerate(widths):
            size = 1 if place else kernel
            layers += [
                nn.Conv2d(inputs, width, size, padding=size // 2, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            inputs = width
        layers.append(pool)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs, classes))
