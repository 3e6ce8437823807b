"""Channels chosen for each input: as many as asked, others zero, and the rest as trained."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gossamer.compress.prune.dynamic_channels import BoostedConvolution, boosted
from gossamer.core.errors import InputError, UnsupportedError
from gossamer.models.plain import ConvNet, mlp


def test_each_input_has_its_own_channels() -> None:
    torch.manual_seed(0)
    network = boosted(ConvNet(1, 8, (12, "pool"), (5,)), 0.25)
    layer = network[0]
    assert isinstance(layer, BoostedConvolution)
    with torch.no_grad():
        layer.saliency.weight.copy_(torch.linspace(-2, 2, 12)[:, None])
    x = torch.stack([torch.full((1, 8, 8), 0.1), torch.full((1, 8, 8), 5.0)])
    gates = layer.gates(x)
    assert ((gates > 0).sum(1) <= 3).all()
    # 1 + w |x|: for a bright input the last channels win; for a dark one too, but less clearly.
    assert (gates[1] > 0).nonzero().flatten().tolist() == [9, 10, 11]
    expected = (layer.saliency.weight[9:, 0] * 5.0 + 1.0).detach()
    torch.testing.assert_close(gates[1, 9:].detach(), expected)
    out = layer.eval()(x)
    assert not bool(out[1, :9].any())
    plain = layer.norm(layer.convolution(x)) + layer.shift[:, None, None]
    torch.testing.assert_close(out[1, 9:], plain[1, 9:] * expected[:, None, None])


def test_with_all_channels_and_neutral_gates_it_is_the_network() -> None:
    torch.manual_seed(0)
    plain = ConvNet(1, 8, (6, "pool"), (5,)).eval()
    network = boosted(plain, 1.0).eval()
    layer = network[0]
    assert isinstance(layer, BoostedConvolution)
    with torch.no_grad():
        layer.saliency.weight.zero_()
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(network(x), plain(x))


def test_bad_input_is_one_sentence() -> None:
    with pytest.raises(InputError, match=r"\(0, 1\]"):
        boosted(ConvNet(1, 8, (6,), (5,)), 0.0)
    with pytest.raises(UnsupportedError, match="no convolution followed"):
        boosted(mlp((4, 3, 2)), 0.5)
    with pytest.raises(UnsupportedError, match="no convolution followed"):
        boosted(nn.Sequential(nn.Conv2d(1, 2, 3)), 0.5)
