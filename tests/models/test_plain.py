"""Plain networks have the layers and sizes that their plan says."""

from __future__ import annotations

import torch
from torch import nn

from gossamer.models.plain import ConvNet, mlp


def test_a_perceptron_has_the_parameters_of_its_widths() -> None:
    network = mlp((64, 32, 10))
    assert sum(p.numel() for p in network.parameters()) == 64 * 32 + 32 + 32 * 10 + 10
    x = torch.randn(3, 1, 8, 8)
    by_hand = network[3](network[1](x.flatten(1)).relu())
    assert torch.equal(network(x), by_hand)


def test_normalisation_comes_before_the_relu() -> None:
    kinds = [type(layer) for layer in mlp((4, 5, 6, 2), norm=True)]
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert kinds == [nn.Flatten, *hidden, *hidden, nn.Linear]


def test_a_convolutional_network_has_the_parameters_of_its_plan() -> None:
    network = ConvNet(1, 8, (16, "pool", 32, "pool"), (64,), norm=False)
    expected = (9 * 16 + 16) + (9 * 16 * 32 + 32) + (32 * 2 * 2 * 64 + 64) + (64 * 10 + 10)
    assert sum(p.numel() for p in network.parameters()) == expected
    assert network(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    with_norm = ConvNet(1, 8, (16, "pool", 32, "pool"), (64,))
    assert sum(p.numel() for p in with_norm.parameters()) == expected + 2 * (16 + 32)
