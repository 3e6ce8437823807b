"""Pruning from a layer's inputs: worked examples, the optimum never beaten, exact traces."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gossamer
from gossamer.compress.prune.post_training import (
    LayerInputs,
    kept_in_rows,
    kept_n_of_m,
    obd_saliency,
    obs_removed,
    obs_saliency,
    prune_after_training,
    sparse_gpt,
    wanda_scores,
)
from gossamer.compress.prune.rewind import Retraining
from gossamer.compress.recipe import Recipe
from gossamer.core.errors import InputError
from gossamer.core.graph import Graph
from gossamer.core.network import Network
from gossamer.datasets import open_task
from gossamer.models.plain import ConvNet, mlp


def test_saliencies_by_hand() -> None:
    hessian = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    w = torch.tensor([1.0, -1.0])
    inverse = torch.linalg.inv(hessian)
    assert obd_saliency(w, hessian.diagonal()).tolist() == [1.0, 0.5]
    torch.testing.assert_close(obs_saliency(w, inverse), torch.tensor([0.875, 0.4375]))
    torch.testing.assert_close(obs_removed(w, inverse, 0), torch.tensor([0.0, -0.5]))


def test_optimal_brain_surgeon_by_hand() -> None:
    hessian = torch.tensor([[2.0, 1, 0], [1, 2, 1], [0, 1, 2]], dtype=torch.float64)
    w = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    inverse = torch.linalg.inv(hessian)
    removed = obs_removed(w, inverse, 0)
    expected = torch.tensor([0.0, 8 / 3, 8 / 3], dtype=torch.float64)
    torch.testing.assert_close(removed, expected)

    def error(new: torch.Tensor) -> float:
        return float((new - w) @ hessian @ (new - w))

    assert error(removed) == pytest.approx(float(w[0] ** 2 / inverse[0, 0])) == pytest.approx(4 / 3)
    # Columns 0 and 2 in SparseGPT's order: 2 of 3 go, whichever its scores choose; here those two.
    assert error(torch.tensor([0.0, 2.0, 0.0], dtype=torch.float64)) == pytest.approx(20.0)
    assert error(torch.tensor([0.0, 8 / 3, 0.0], dtype=torch.float64)) == pytest.approx(
        15.5556, abs=1e-4
    )
    assert error(torch.tensor([0.0, 4.0, 0.0], dtype=torch.float64)) == pytest.approx(12.0)


def test_sparse_gpt_removes_in_its_order_as_worked() -> None:
    gram = torch.tensor([[2.0, 1, 0], [1, 2, 1], [0, 1, 2]], dtype=torch.float64)
    # Scores w^2 / U_jj^2 decide; weights chosen so that columns 0 and 2 go.
    w = torch.tensor([[1.0, 20.0, 3.0]])
    made, mask = sparse_gpt(w, gram, 2 / 3, damping=0.0)
    assert mask.tolist() == [[False, True, False]]
    # After column 0 the others are moved by the surgeon's step; column 2 is last: nothing follows.
    inverse = torch.linalg.inv(gram)
    after = obs_removed(w[0].double(), inverse, 0)
    torch.testing.assert_close(made[0, 1].double(), after[1])


def test_it_lies_between_zeroing_and_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        mixing = torch.randn(24, 24, generator=generator)
        x = torch.randn(24, 200, generator=generator).double()
        x = mixing.double() @ x
        gram = x @ x.T
        w = torch.randn(6, 24, generator=generator)
        made, mask = sparse_gpt(w, gram, 0.5, block=8, damping=0.0)
        assert int((~mask).sum()) == 6 * 12
        zeroed = torch.where(mask, w, 0.0)

        def error(new: torch.Tensor, gram: torch.Tensor = gram, w: torch.Tensor = w) -> float:
            change = (new - w).double()
            return float(((change @ gram) * change).sum())

        best = torch.zeros_like(w, dtype=torch.float64)
        for row in range(6):
            kept = mask[row]
            best[row, kept] = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ w[row].double())
        assert error(best.float()) <= error(made) * (1 + 1e-6) <= error(zeroed)
    # Uncorrelated inputs leave nothing to make up for.
    made, mask = sparse_gpt(w, torch.eye(24), 0.5, damping=0.0)
    torch.testing.assert_close(made, torch.where(mask, w, 0.0))
    assert not bool(made[~mask].any())


def test_wanda_by_hand() -> None:
    weight = torch.tensor([[4.0, 0, 1, -1], [3, -2, -1, -3]])
    scores = wanda_scores(weight, torch.tensor([1.0, 2, 8, 3]))
    assert scores.tolist() == [[4, 0, 8, 3], [3, 4, 8, 9]]
    kept = kept_in_rows(scores, 0.5)
    assert [(~row).nonzero().flatten().tolist() for row in kept] == [[1, 3], [0, 1]]
    plain = kept_in_rows(weight.abs(), 0.5)
    assert [(~row).nonzero().flatten().tolist() for row in plain] == [[1, 2], [1, 2]]


def test_n_of_m_keeps_n_of_every_m() -> None:
    scores = torch.rand(5, 18, generator=torch.Generator().manual_seed(1))
    kept = kept_n_of_m(scores, 2, 4)
    assert bool((kept[:, :16].view(5, 4, 4).sum(2) == 2).all()) and bool(kept[:, 16:].all())
    pieces = scores[:, :16].view(5, 4, 4)
    low = torch.where(kept[:, :16].view(5, 4, 4), 2.0, pieces).amin(2)
    assert bool((torch.where(kept[:, :16].view(5, 4, 4), pieces, -1.0).amax(2) >= low).all())
    gram = torch.eye(18)
    _, mask = sparse_gpt(torch.randn(5, 18), gram, 0.0, n_of_m=(2, 4), block=6)
    assert bool((mask[:, :16].view(5, 4, 4).sum(2) == 2).all())


def test_gathered_inputs_are_those_of_the_layers() -> None:
    torch.manual_seed(0)
    network = ConvNet(2, 6, (4, "pool"), (5,)).eval()
    x = torch.randn(7, 2, 6, 6)
    watched = LayerInputs(network, (x,), ["0.weight", "5.weight", "7.weight"])
    hidden = network[3](network[1](network[0](x)).relu()).flatten(1).double().detach()
    torch.testing.assert_close(watched.gram("5.weight", [(x[:3],), (x[3:],)]), hidden.T @ hidden)
    patches = nn.functional.unfold(x.double(), 3, padding=1).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(watched.gram("0.weight", [(x,)]), patches.T @ patches)
    # What is gathered follows the weights as they are now.
    with torch.no_grad():
        network[0].weight.zero_()
    assert not torch.allclose(watched.gram("5.weight", [(x,)]), hidden.T @ hidden)


@pytest.mark.parametrize("padding", [0, (2, 1), "same", "valid"])
def test_patches_are_what_the_convolution_multiplies(padding: Any) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, (4, 3), padding=padding, dilation=(1, 2), bias=False)
    x = torch.randn(3, 2, 9, 8)
    seen: list[torch.Tensor] = []
    watched = LayerInputs(nn.Sequential(layer), (x,), ["0.weight"])
    watched.visit(["0.weight"], [(x,)], lambda _, rows: seen.append(rows))
    answers = seen[0] @ layer.weight.detach().double().flatten(1).T
    expected = layer(x).detach().double().flatten(2).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(answers, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def task() -> Any:
    torch.set_num_threads(1)
    return open_task("digits", limit=300)


@pytest.fixture(scope="module")
def trained(task: Any) -> nn.Module:
    torch.manual_seed(0)
    module = ConvNet(1, 8, (8, "pool", 12, "pool"), (24,))
    Retraining(epochs=8, lr=0.05).train(module, task)
    return module.eval()


def test_updating_beats_scaling_beats_magnitude_on_the_output(
    trained: nn.Module, task: Any
) -> None:
    network = Network(trained, task.example_inputs)
    images = torch.cat([x for x, _ in task.batches("validation", batch_size=64)])
    errors = {}
    for method in ("sparsegpt", "wanda", "magnitude"):
        made = prune_after_training(network, task, sparsity=0.6, method=method, samples=200)  # type: ignore[arg-type]
        with torch.no_grad():
            errors[method] = float((made.module(images) - trained(images)).square().mean())
        for name, density in made.steps[-1]["report"]["density"].items():
            assert density == pytest.approx(0.4, abs=0.06), name
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]


def test_the_step_works_in_the_main_job(trained: nn.Module, task: Any, tmp_path: Path) -> None:
    recipe = Recipe.of(
        ("prune-after-training", {"n_of_m": "2:4", "skip": ["0"], "samples": 64}),
        ("finetune", {"epochs": 1}),
    )
    result = gossamer.shrink(trained, task, recipe=recipe, out=tmp_path / "out", cpu=True)
    weight = dict(result.module.named_parameters())["program.4.weight"].flatten(1)
    assert bool(((weight.view(12, -1, 4) != 0).sum(2) <= 2).all())
    assert result.report["packed"]["agreement"] == 1.0


def test_a_network_rebuilt_from_its_graph_is_pruned_alike(trained: nn.Module, task: Any) -> None:
    rebuilt = Graph.trace(copy.deepcopy(trained), task.example_inputs).network().eval()
    made = [
        prune_after_training(Network(m, task.example_inputs), task, samples=64)
        for m in (trained, rebuilt)
    ]
    plain, other = (dict(m.module.named_parameters()) for m in made)
    for name, tensor in plain.items():
        torch.testing.assert_close(other[f"program.{name}"], tensor)


def test_bad_input_is_one_sentence(task: Any) -> None:
    network = Network(mlp((64, 10)), task.example_inputs)
    with pytest.raises(InputError, match=r"\[0, 1\)"):
        prune_after_training(network, task, sparsity=1.0)
    with pytest.raises(InputError, match="written as 2:4"):
        prune_after_training(network, task, n_of_m="two of four")
    with pytest.raises(InputError, match="0 < n < m"):
        prune_after_training(network, task, n_of_m="4:4")
    with pytest.raises(InputError, match="1 sample or more"):
        prune_after_training(network, task, samples=0)
