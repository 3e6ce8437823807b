"""Masks: what is removed stays removed, whatever the optimizer does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gossamer.core.errors import InputError, UnsupportedError
from gossamer.core.graph import Graph
from gossamer.core.network import Network
from gossamer.models.plain import ConvNet, mlp
from gossamer.parts.masks import Masks, multiplied_weights


def _trained_steps(network: nn.Module, masks: Masks, optimizer: torch.optim.Optimizer) -> None:
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(16, 12, generator=generator)
        optimizer.zero_grad()
        network(x).square().mean().backward()
        masks.hold_gradients()
        optimizer.step()
        masks.hold_weights()


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_removed_weights_stay_exactly_zero_and_the_others_move(kind: str) -> None:
    torch.manual_seed(0)
    network = mlp((12, 9, 4))
    masks = Masks.full(network, ["1.weight", "3.weight"])
    optimizer: torch.optim.Optimizer
    if kind == "sgd":
        optimizer = torch.optim.SGD(
            network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01
        )
    else:
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    _trained_steps(network, masks, optimizer)
    kept = {n: torch.rand_like(m, dtype=torch.float) < 0.4 for n, m in masks.kept.items()}
    masks.narrow(kept)
    masks.hold_weights()
    masks.hold_optimizer(optimizer)
    before = copy.deepcopy(network.state_dict())
    _trained_steps(network, masks, optimizer)
    for name, mask in kept.items():
        weight = network.get_parameter(name)
        assert torch.equal(weight[~mask], torch.zeros(int((~mask).sum())))
        assert not torch.equal(weight[mask], before[name][mask])
    counted = sum(int(mask.sum()) for mask in kept.values())
    assert masks.remaining == counted
    assert masks.sparsity == pytest.approx(1 - counted / (12 * 9 + 9 * 4))


def test_without_the_optimizers_memory_cleared_momentum_would_move_them() -> None:
    torch.manual_seed(0)
    network = mlp((12, 9, 4))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    masks = Masks.full(network, ["1.weight"])
    _trained_steps(network, masks, optimizer)
    masks.narrow({"1.weight": torch.zeros(9, 12, dtype=torch.bool)})
    masks.hold_weights()
    network(torch.randn(4, 12)).sum().backward()
    masks.hold_gradients()
    optimizer.step()
    assert bool((network.get_parameter("1.weight") != 0).any())
    masks.hold_weights()
    masks.hold_optimizer(optimizer)
    optimizer.step()
    assert not bool((network.get_parameter("1.weight") != 0).any())


def test_multiplied_weights_are_those_of_products_with_their_macs() -> None:
    network = ConvNet(1, 8, (4, "pool", 6), (5,))
    x = torch.randn(2, 1, 8, 8)
    found = multiplied_weights(network, (x,))
    assert found == {
        "0.weight": 9 * 4 * 64,
        "4.weight": 9 * 4 * 6 * 16,
        "8.weight": 6 * 16 * 5,
        "10.weight": 50,
    }
    assert list(multiplied_weights(network, (x,), skip=["0", "10.weight"])) == [
        "4.weight",
        "8.weight",
    ]
    # The same network rebuilt from its graph has the same weights, one level down.
    rebuilt = Graph.trace(network, (x,)).network()
    assert multiplied_weights(rebuilt, (x,)) == {f"program.{n}": m for n, m in found.items()}


def test_embeddings_and_norms_are_no_multiplied_weights() -> None:
    network = nn.Sequential(nn.Embedding(7, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    found = multiplied_weights(network, (torch.zeros(2, 5, dtype=torch.long),))
    assert found == {"2.weight": 5 * 18}
    with pytest.raises(UnsupportedError, match="no weights that could be pruned"):
        multiplied_weights(nn.Sequential(nn.ReLU()), (torch.randn(2, 3),))
    with pytest.raises(InputError, match="no part 'head'"):
        multiplied_weights(network, (torch.zeros(2, 5, dtype=torch.long),), skip=["head"])


def test_effective_macs_count_the_weights_that_are_not_zero() -> None:
    network = mlp((8, 6, 2))
    with torch.no_grad():
        network[1].weight[:3] = 0.0
    graph = Graph.trace(network, (torch.randn(2, 8),))
    assert (graph.macs, graph.macs_effective) == (60, 24 + 12)


def test_masks_follow_a_network_through_its_graph() -> None:
    network = mlp((8, 6, 2))
    masks = Masks(network, {"1.weight": torch.rand(6, 8) < 0.5})
    masks.hold_weights()
    made = Network(network, (torch.randn(2, 8),), storage=masks.storage())
    rebuilt = Graph.trace(network, made.example_inputs).network()
    again = Masks.of_zeros(made, rebuilt)
    assert torch.equal(again.kept["program.1.weight"], masks.kept["1.weight"])
    assert again.storage() == masks.storage() == {"1.weight": "sparse"}
    assert Masks.of_zeros(Network(network, made.example_inputs), network).kept == {}


def test_masks_that_do_not_fit_are_refused() -> None:
    network = mlp((8, 6, 2))
    with pytest.raises(InputError, match="no parameter nope"):
        Masks(network, {"nope": torch.ones(2, dtype=torch.bool)})
    with pytest.raises(InputError, match=r"1\.weight is torch.bool \(2, 2\)"):
        Masks(network, {"1.weight": torch.ones(2, 2, dtype=torch.bool)})
