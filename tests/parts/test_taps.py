"""The map that is read is the one that the network computed, and no hook stays behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gossamer.core.errors import InputError
from gossamer.parts.taps import tapped


def test_a_layer_is_read_and_left_as_it_was() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1))
    images = torch.randn(2, 1, 4, 4)
    logits, features = tapped(network, "1", lambda: network(images))
    assert torch.equal(features, network[:2](images)) and torch.equal(logits, network(images))
    assert not network[1]._forward_hooks
    features.sum().backward()
    assert network[0].weight.grad is not None and network[2].weight.grad is None
    same, again = tapped(network, None, lambda: network(images))
    assert same is again
    with pytest.raises(InputError, match="no layer 'head'"):
        tapped(network, "head", lambda: network(images))
    with pytest.raises(InputError, match="gave no feature map"):
        tapped(network, "2", lambda: network[:2](images))
