"""Channels chosen for each input: feature boosting and suppression.

A small linear layer predicts from a layer's input which of its output channels will matter; the
others are not computed for this input, and those that are, are scaled by the prediction. The
network has all its channels in memory; what falls is the work for each input.

Source: Gao et al., "Dynamic Channel Pruning: Feature Boosting and Suppression", ICLR 2019,
arXiv:1810.05331, section 3.2.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError, UnsupportedError


class BoostedConvolution(nn.Module):
    """Convolution, normalisation without scale, and gates; a ReLU is to follow.

    Args:
        convolution: trained or not.
        norm: that follows it; its shift is kept, its scale is the gates' task.
        share: of the channels that are computed for each input.
    """

    def __init__(self, convolution: nn.Conv2d, norm: nn.BatchNorm2d, share: float) -> None:
        super().__init__()
        self.convolution = convolution
        self.norm = nn.BatchNorm2d(norm.num_features, affine=False)
        self.shift = nn.Parameter(norm.bias.detach().clone())
        self.saliency = nn.Linear(convolution.in_channels, convolution.out_channels)
        nn.init.ones_(self.saliency.bias)
        self.count = max(1, round(share * convolution.out_channels))

    def gates(self, x: Tensor) -> Tensor:
        """What each channel is scaled by, 0 for those that are not computed, ``[batch, out]``."""
        predicted = self.saliency(x.abs().mean((2, 3))).relu()
        best = predicted.topk(self.count, dim=1).indices
        return predicted * torch.zeros_like(predicted).scatter_(1, best, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gates(x)[:, :, None, None]
        return gates * (self.norm(self.convolution(x)) + self.shift[:, None, None])


def boosted(network: nn.Sequential, share: float) -> nn.Sequential:
    """A copy whose convolutions (each followed by batch normalisation) choose their channels.

    Args:
        network: a plain sequence; unchanged.
        share: of the channels that are computed for each input.

    Raises:
        InputError: if the share is not in (0, 1].
        UnsupportedError: if there is no convolution followed by batch normalisation.
    """
    if not 0.0 < share <= 1.0:
        raise InputError(f"the share of channels must be in (0, 1], not {share:g}")
    layers = list(copy.deepcopy(network))
    made: list[nn.Module] = []
    while layers:
        layer = layers.pop(0)
        if isinstance(layer, nn.Conv2d) and layers and isinstance(layers[0], nn.BatchNorm2d):
            layer = BoostedConvolution(layer, layers.pop(0), share)  # type: ignore[arg-type]
        made.append(layer)
    if not any(isinstance(layer, BoostedConvolution) for layer in made):
        raise UnsupportedError("the network has no convolution followed by batch normalisation")
    return nn.Sequential(*made)
