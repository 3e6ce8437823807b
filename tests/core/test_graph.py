"""Counts of traced networks against closed forms and published figures."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from gossamer.core.errors import UnsupportedError
from gossamer.core.graph import Graph, layer_table


def trace(module: nn.Module, *shape: int) -> Graph:
    return Graph.trace(module, (torch.randn(2, *shape),))


def test_convolution_linear_and_attention_have_their_closed_forms():
    conv = trace(nn.Conv2d(6, 12, 3, stride=2, padding=1, groups=3), 6, 9, 9)
    assert conv.macs == 5 * 5 * 12 * 2 * 9
    assert conv.parameters == 12 * 2 * 9 + 12
    up = trace(nn.ConvTranspose2d(4, 6, 2, stride=2), 4, 5, 5)
    assert up.macs == 5 * 5 * 4 * 6 * 4
    assert trace(nn.Linear(7, 11), 5, 7).macs == 5 * 7 * 11
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    tokens, width, hidden = 10, 16, 32
    expected = tokens * width * (3 * width + width + 2 * hidden) + 2 * tokens * tokens * width
    assert trace(layer, tokens, width).macs == expected


@pytest.mark.parametrize(
    ("name", "millions", "parameters"),
    [
        # Multiply-accumulates and parameters as torchvision publishes them.
        ("resnet18", 1814, 11_689_512),
        ("resnet50", 4089, 25_557_032),
        ("mobilenet_v2", 301, 3_504_872),
        ("vit_b_16", 17_564, 86_567_656),
        ("swin_t", 4491, 28_288_354),
    ],
)
def test_published_figures(name, millions, parameters):
    graph = trace(torchvision.models.get_model(name, weights=None), 3, 224, 224)
    assert round(graph.macs / 1e6) == millions
    assert graph.parameters == parameters
    assert graph.dynamic


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 1), nn.Conv2d(1, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) + self.b(x)


def test_peak_activations_count_what_lives_at_once():
    # Input 64, both branches 256 each while they are added: the input is gone by then.
    graph = trace(Branches(), 1, 8, 8)
    assert graph.peak_activation_bytes() == 4 * 3 * 256
    # A view shares its input's storage.
    flat = trace(nn.Sequential(nn.Flatten(), nn.Linear(64, 8)), 1, 8, 8)
    assert flat.peak_activation_bytes() == 4 * (64 + 8)


def test_the_graph_trains_and_evaluates_like_the_network():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
    x = torch.randn(3, 1, 6, 6)
    network = trace(module, 1, 6, 6).network()
    for training in (True, False):
        module.train(training), network.train(training)
        torch.manual_seed(1)
        with torch.no_grad():
            expected = module(x)
        state = {k: v.clone() for k, v in module.state_dict().items()}
        torch.manual_seed(1)
        with torch.no_grad():
            found = network(x)
        # Both share their tensors: the second pass moved the statistics once more.
        if training:
            assert not torch.equal(module[1].running_mean, state["1.running_mean"])
        assert torch.equal(found, expected)


def test_tied_weights_are_one_tensor():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 8)
            self.head = nn.Linear(8, 20, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(x))

    graph = Graph.trace(Tied(), (torch.randint(0, 20, (2, 5)),))
    assert graph.parameters == 160
    assert list(graph.tensors) == ["embed.weight"]


def test_outputs_keep_their_structure():
    class Several(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, object]:
            return {"a": x + 1, "b": [x * 2, (x, x - 1)]}

    x = torch.randn(3, 4)
    out = Graph.trace(Several(), (torch.randn(2, 4),)).network()(x)
    assert torch.equal(out["a"], x + 1) and torch.equal(out["b"][1][1], x - 1)


def test_what_cannot_be_traced_is_said_in_one_sentence():
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(UnsupportedError, match="Branching cannot be traced"):
        trace(Branching(), 4)


def test_the_layer_table_adds_up():
    graph = trace(torchvision.models.get_model("resnet18", weights=None), 3, 64, 64)
    rows = layer_table(graph)
    assert sum(r["macs"] for r in rows) == graph.macs
    assert sum(r["parameters"] for r in rows) == graph.parameters


def test_memory_is_shared_by_views_and_by_what_overwrites_its_input():
    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 1)
            self.drop = nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu_(self.conv(x))
            first, second = self.drop(y).chunk(2, dim=1)
            return first.flatten(1) + second.flatten(1)

    graph = trace(Overwriting(), 1, 8, 8)
    assert [(b.node.op, b.elements) for b in graph.buffers] == [
        ("placeholder", 64), ("call_function", 256), ("call_function", 128),
    ]  # fmt: skip
    # The input is gone when the halves are added: 256 and 128 live.
    assert graph.peak_activation_bytes() == 4 * (256 + 128)
    last = graph.buffers[1].uses[-1]
    assert graph.steps[last].target is torch.ops.aten.add.Tensor
