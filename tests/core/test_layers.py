"""Layers by their shapes: every multiplication of a traced network is accounted for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.core.graph import Graph
from gossamer.core.layers import layers, unmodelled


def traced(module: nn.Module, *shape: int) -> Graph:
    return Graph.trace(module, (torch.randn(2, *shape),))


@pytest.mark.parametrize("name", ["mobilenetv2_100", "vit_tiny_patch16_224", "resnet18"])
def test_every_multiplication_is_in_a_layer(name: str) -> None:
    import timm

    graph = traced(timm.create_model(name), 3, 224, 224)
    assert unmodelled(graph) == []
    assert sum(layer.macs for layer in layers(graph)) == graph.macs


def test_weights_are_those_of_the_module() -> None:
    import timm

    module = timm.create_model("mobilenetv2_100")
    sizes = {name: p.numel() for name, p in module.named_parameters()}
    found = layers(traced(module, 3, 96, 96))
    assert len(found) == 53
    assert all(layer.weights == sizes[layer.weight or ""] for layer in found)


def test_a_convolution_with_everything() -> None:
    module = nn.Conv2d(12, 24, (3, 5), stride=(2, 1), padding=(1, 4), dilation=(1, 2), groups=4)
    (layer,) = layers(traced(module, 12, 11, 9))
    assert (layer.channels, layer.features, layer.groups) == (12, 24, 4)
    assert (layer.kernel, layer.stride) == ((3, 5), (2, 1))
    assert (layer.padding, layer.dilation) == ((1, 4), (1, 2))
    assert (layer.input_size, layer.output_size) == ((11, 9), (6, 9))
    assert layer.bias and layer.weight == "weight" and not layer.depthwise
    assert layer.weights == module.weight.numel() == 24 * 3 * 15
    assert layer.macs == 6 * 9 * 24 * 3 * 15
    assert layer.elements(4) == 4 * (12 * 99 + 24 * 54) + layer.weights + 24


def test_a_signal_of_one_axis_has_height_one() -> None:
    (layer,) = layers(traced(nn.Conv1d(4, 4, 3, stride=2, padding=1, groups=4), 4, 10))
    assert (layer.kernel, layer.stride, layer.padding) == ((1, 3), (1, 2), (0, 1))
    assert (layer.input_size, layer.output_size) == ((1, 10), (1, 5))
    assert layer.depthwise and layer.macs == 5 * 4 * 3


def test_same_padding_keeps_the_size() -> None:
    (layer,) = layers(traced(nn.Conv2d(3, 8, 5, padding="same"), 3, 7, 7))
    assert layer.padding == (2, 2) and layer.output_size == (7, 7)


class Attention(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(-1, 6, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v)
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v


@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_two_products_for_each_head(fused: bool) -> None:
    linear, scores, mixed = layers(traced(Attention(fused), 6, 16))
    assert (linear.kind, linear.positions, linear.macs) == ("linear", 6, 6 * 16 * 48)
    for product, inner, columns in ((scores, 4, 6), (mixed, 6, 4)):
        assert product.kind == "product" and product.weight is None and product.groups == 4
        assert (product.group_width, product.features // 4) == (inner, columns)
        assert product.macs == 4 * 6 * inner * columns
    # q, k and the scores of four heads: each once for every sample
    assert scores.elements(3) == 3 * (4 * 6 * 4 + 4 * 6 * 4 + 4 * 6 * 6)


def test_what_has_no_form_is_named() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Conv2d(3, 8, 2, stride=2)
            self.up = nn.ConvTranspose2d(8, 3, 2, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.down(x))

    graph = traced(Both(), 3, 8, 8)
    assert [layer.module for layer in layers(graph)] == ["down"]
    assert [op.module for op in unmodelled(graph)] == ["up"]
