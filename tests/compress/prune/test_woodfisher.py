"""WoodFisher: the inverse is the dense one, and the update the exact minimum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gossamer
from gossamer.compress.prune.empirical_fisher import (
    BlockFisher,
    fisher_gradients,
    sample_gradients,
)
from gossamer.compress.prune.post_training import obs_removed, obs_saliency
from gossamer.compress.prune.rewind import Retraining
from gossamer.compress.prune.sparsify import sparsify
from gossamer.compress.prune.weight_scores import CRITERIA
from gossamer.compress.prune.woodfisher import woodfisher
from gossamer.compress.recipe import Recipe
from gossamer.core.errors import InputError
from gossamer.core.network import Network
from gossamer.datasets import open_task
from gossamer.models.plain import ConvNet, mlp


def dense(gradients: torch.Tensor, damping: float) -> np.ndarray:
    g = gradients.double().numpy()
    return damping * np.eye(g.shape[1]) + g.T @ g / len(g)


@pytest.mark.parametrize("damping", [1e-5, 1e-2])
def test_the_inverse_is_that_of_the_dense_matrix(damping: float) -> None:
    gradients = torch.randn(40, 25, generator=torch.Generator().manual_seed(0))
    found = {p.start: i for p, i in BlockFisher(gradients, 10, damping).inverses()}[0]
    for block in range(3):
        mine = gradients[:, block * 10 : block * 10 + 10]
        n = mine.shape[1]
        expected = np.linalg.inv(dense(mine, damping))
        np.testing.assert_allclose(found[block, :n, :n], expected, rtol=1e-6, atol=1e-9 / damping)


def test_few_gradients_leave_a_damped_inverse() -> None:
    """A matrix of rank 3 in 8 dimensions: only the damping makes it invertible."""
    gradients = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    (_, inverse), = BlockFisher(gradients, 8, 1e-3).inverses()  # fmt: skip
    np.testing.assert_allclose(inverse[0], np.linalg.inv(dense(gradients, 1e-3)), rtol=1e-8)


def test_single_removals_are_those_of_the_surgeon() -> None:
    generator = torch.Generator().manual_seed(2)
    gradients, w = (torch.randn(*s, generator=generator).double() for s in ((30, 6), (6,)))
    fisher = BlockFisher(gradients, 6, 1e-4)
    inverse = torch.from_numpy(np.linalg.inv(dense(gradients, 1e-4)))
    torch.testing.assert_close(fisher.saliency(w), obs_saliency(w, inverse))
    for index in range(6):
        kept = torch.arange(6) != index
        torch.testing.assert_close(fisher.compensated(w, kept), obs_removed(w, inverse, index))


def test_several_removals_reach_the_minimum_of_the_quadratic() -> None:
    generator = torch.Generator().manual_seed(3)
    gradients, w = (torch.randn(*s, generator=generator).double() for s in ((50, 24), (4, 6)))
    kept = torch.rand(4, 6, generator=generator) < 0.5
    made = BlockFisher(gradients, 12, 1e-3).compensated(w, kept)
    assert made.shape == w.shape and not bool(made[~kept].any())
    for block in range(2):
        part = slice(block * 12, block * 12 + 12)
        f = torch.from_numpy(dense(gradients[:, part], 1e-3))
        old, stay = w.flatten()[part], kept.flatten()[part]
        # With the removed ones at 0, the slope along every weight that stays is 0.
        best = torch.zeros(12, dtype=torch.float64)
        best[stay] = torch.linalg.solve(f[stay][:, stay], f[stay] @ old)
        torch.testing.assert_close(made.flatten()[part], best)


def test_everything_or_nothing_goes() -> None:
    gradients, w = torch.randn(5, 7), torch.randn(7)
    fisher = BlockFisher(gradients, 3, 1e-2)
    torch.testing.assert_close(fisher.compensated(w, torch.ones(7, dtype=torch.bool)), w)
    assert not bool(fisher.compensated(w, torch.zeros(7, dtype=torch.bool)).any())


@pytest.fixture(scope="module")
def task() -> Any:
    torch.set_num_threads(1)
    return open_task("digits", limit=600)


@pytest.fixture(scope="module")
def trained(task: Any) -> nn.Module:
    torch.manual_seed(0)
    module = ConvNet(1, 8, (8, "pool", 12, "pool"), (24,))
    Retraining(epochs=10, lr=0.05).train(module, task)
    return module.eval()


def test_gradients_are_those_of_single_samples(trained: nn.Module, task: Any) -> None:
    names = [n for n, p in trained.named_parameters() if p.ndim > 1][:2]
    batch = next(iter(task.batches("train", batch_size=3, seed=5)))
    found = next(sample_gradients(trained, names, task, 5, samples=3, batch_size=3))
    for index in range(3):
        loss = task.loss(trained, tuple(part[index : index + 1] for part in batch))
        expected = torch.autograd.grad(loss, [trained.get_parameter(n) for n in names])
        for name, g in zip(names, expected, strict=True):
            torch.testing.assert_close(found[name][index], g, rtol=1e-4, atol=1e-6)
    means = fisher_gradients(trained, names, task, 5, gradients=2, average=3)
    assert all(len(m) == 2 for m in means.values())
    torch.testing.assert_close(
        means[names[0]][0],
        next(sample_gradients(trained, names, task, 5, samples=6, batch_size=192))[names[0]][:3]
        .mean(0).flatten(),
    )  # fmt: skip


def test_removed_weights_have_no_part_in_the_curvature(task: Any) -> None:
    torch.manual_seed(1)
    module = mlp((64, 16, 10))
    with torch.no_grad():
        module[-1].weight[:, :8] = 0.0
    name = [n for n, p in module.named_parameters() if p.ndim > 1][-1]
    gradients = fisher_gradients(module, [name], task, 0, gradients=32)[name].view(-1, 10, 16)
    assert not bool(gradients[:, :, :8].any()) and bool(gradients[:, :, 8:].any())


def test_without_training_it_beats_magnitude(trained: nn.Module, task: Any) -> None:
    network = Network(trained, task.example_inputs)
    common: dict[str, Any] = {"sparsity": 0.7, "rounds": 1, "epochs": 0}
    made = {
        "magnitude": sparsify(network, task, **common),
        "choice": woodfisher(network, task, update=False, **common),
        "woodfisher": woodfisher(network, task, **common),
    }
    score = {n: task.score(m.module, "test") for n, m in made.items()}
    assert score["woodfisher"] > score["magnitude"] and score["choice"] > score["magnitude"]
    for network in made.values():
        assert network.steps[-1]["report"]["sparsity"] == pytest.approx(0.7, abs=1e-3)
    # The choice alone is what the criterion of that name chooses.
    same = sparsify(Network(trained, task.example_inputs), task, criterion="woodfisher", **common)
    assert same.steps[-1]["report"]["sparsity"] == pytest.approx(0.7, abs=1e-3)
    assert "woodfisher" in CRITERIA


def test_the_step_works_in_the_main_job(trained: nn.Module, task: Any, tmp_path: Path) -> None:
    recipe = Recipe.of(("woodfisher", {"sparsity": 0.8, "rounds": 2, "epochs": 2, "gradients": 64}))
    result = gossamer.shrink(trained, task, recipe=recipe, out=tmp_path / "out", cpu=True)
    report = result.network.steps[-1]["report"]
    assert report["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert result.report["packed"]["agreement"] == 1.0


def test_bad_input_is_one_sentence(task: Any) -> None:
    network = Network(mlp((64, 10)), task.example_inputs)
    with pytest.raises(InputError, match=r"\[0, 1\)"):
        woodfisher(network, task, sparsity=1.0)
    with pytest.raises(InputError, match="damping is above 0"):
        woodfisher(network, task, damping=0.0, rounds=1, epochs=0)
    with pytest.raises(InputError, match="1 gradient or more"):
        woodfisher(network, task, gradients=0, rounds=1, epochs=0)
    with pytest.raises(InputError, match="fewer than 100000 samples"):
        woodfisher(network, task, average=100_000, rounds=1, epochs=0)
