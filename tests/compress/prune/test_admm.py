"""ADMM: exact projections, U that adds up, exact sparsity, and a pull that leaves little to cut."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gossamer
from gossamer.compress.prune.admm import AdmmTraining, admm
from gossamer.compress.prune.rewind import Retraining
from gossamer.compress.prune.sparsify import sparsify
from gossamer.compress.recipe import Recipe
from gossamer.core.errors import InputError
from gossamer.core.fit import fit
from gossamer.core.network import Network
from gossamer.datasets import open_task
from gossamer.models.plain import ConvNet, mlp
from gossamer.parts.masks import Masks


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


def rule_of(
    task: Any, keep: int, rho: float = 0.1, module: nn.Module | None = None
) -> tuple[AdmmTraining, nn.Module]:
    torch.manual_seed(0)
    module = module or mlp((64, 10))
    (name,) = (n for n, p in module.named_parameters() if p.ndim > 1)
    masks = Masks.full(module, [name])
    return AdmmTraining(module, task, masks, {name: keep}, rho=rho), module


def test_the_projection_is_the_nearest_sparse_tensor(task: Any) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    rule, _ = rule_of(task, 2, module=net)
    values = torch.tensor([[0.5, -2.0, 0.1], [1.0, -0.2, 0.7]])
    made = rule.projected({"1.weight": values})["1.weight"]
    assert made.tolist() == [[0.0, -2.0, 0.0], [1.0, 0.0, 0.0]]
    every = (
        float(values.flatten()[[i for i in range(6) if i not in kept]].square().sum())
        for kept in itertools.combinations(range(6), 2)
    )
    assert float((values - made).square().sum()) == pytest.approx(min(every))


def test_the_pull_is_the_quadratic_and_u_adds_up(task: Any) -> None:
    rule, module = rule_of(task, 64, rho=0.3)
    w = next(p for p in module.parameters() if p.ndim > 1)
    assert int((rule.z[0] != 0).sum()) == 64 and not bool(rule.u[0].any())
    expected = 0.15 * (w - rule.z[0]).square().sum()
    torch.testing.assert_close(rule.pull(), expected)
    (slope,) = torch.autograd.grad(rule.pull(), w)
    torch.testing.assert_close(slope, 0.3 * (w - rule.z[0]).detach())
    total = torch.zeros_like(w)
    for epoch in range(3):
        rule.run = type("Run", (), {"epoch": epoch})()
        with torch.no_grad():
            w.add_(0.01 * torch.randn_like(w))
        rule.end_epoch()
        assert int((rule.z[0] != 0).sum()) == 64
        # Each change adds what the weights still lack of the sparse ones.
        total = total + (w - rule.z[0]).detach()
        torch.testing.assert_close(rule.u[0].detach(), total)
        # Z is the projection of W + U as it was before.
        before = total - (w - rule.z[0]).detach()
        kept = rule.z[0] != 0
        torch.testing.assert_close(rule.z[0][kept], (w + before)[kept].detach())
    assert len(rule.gaps) == 3


def test_a_strong_pull_makes_the_weights_sparse(trained: nn.Module, task: Any) -> None:
    network = Network(trained, task.example_inputs)
    cut = {}
    for rho in (1e-6, 1.0):
        made = admm(network, task, sparsity=0.8, rho=rho, epochs=8, retrain_epochs=0)
        cut[rho] = made.steps[-1]["report"]["cut"]
    assert cut[1.0] < 0.5 * cut[1e-6]


def test_the_sparsity_is_exact_and_the_cut_costs_less_than_plain_magnitude(
    trained: nn.Module, task: Any
) -> None:
    network = Network(trained, task.example_inputs)
    made = admm(network, task, sparsity=0.9, epochs=8, retrain_epochs=0)
    plain = sparsify(network, task, sparsity=0.9, rounds=1, epochs=0)
    for one in (made, plain):
        weights = [p for p in one.module.parameters() if p.ndim > 1]
        total, there = sum(w.numel() for w in weights), sum(int((w != 0).sum()) for w in weights)
        assert there == round(total * 0.1) == one.steps[-1]["report"]["remaining"]
    assert task.score(made.module, "test") > task.score(plain.module, "test")
    # Each layer keeps as many as magnitude alone would, decided before training.
    assert made.steps[-1]["report"]["density"] == plain.steps[-1]["report"]["density"]


def test_weights_that_an_earlier_step_removed_stay_away(trained: nn.Module, task: Any) -> None:
    network = Network(trained, task.example_inputs)
    once = sparsify(network, task, sparsity=0.5, rounds=1, epochs=0)
    twice = admm(once, task, sparsity=0.8, epochs=2, retrain_epochs=1)
    for before, after in zip(once.module.parameters(), twice.module.parameters(), strict=True):
        if before.ndim > 1:
            assert not bool((after[before == 0] != 0).any())
    assert twice.steps[-1]["report"]["sparsity"] == pytest.approx(0.8, abs=1e-3)


def test_an_interrupted_run_goes_on_where_it_was(task: Any, tmp_path: Path) -> None:
    whole, _ = rule_of(task, 100)
    fit(whole, task, epochs=3, seed=1)
    first, _ = rule_of(task, 100)

    class Killed(Exception):
        pass

    def stop() -> None:
        if first.run.epoch == 2:
            raise Killed

    first.after_backward = stop
    state = tmp_path / "run.state"
    with pytest.raises(Killed):
        fit(first, task, epochs=3, seed=1, checkpoint=state)
    again, _ = rule_of(task, 100)
    fit(again, task, epochs=3, seed=1, checkpoint=state)
    for a, b in zip(whole.network.parameters(), again.network.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(whole.u[0], again.u[0]) and whole.gaps == again.gaps


def test_the_step_works_in_the_main_job(trained: nn.Module, task: Any, tmp_path: Path) -> None:
    recipe = Recipe.of(("admm", {"sparsity": 0.7, "epochs": 2, "retrain_epochs": 1}))
    result = gossamer.shrink(trained, task, recipe=recipe, out=tmp_path / "out", cpu=True)
    assert result.network.steps[-1]["report"]["sparsity"] == pytest.approx(0.7, abs=1e-3)
    assert result.report["packed"]["agreement"] == 1.0


def test_bad_input_is_one_sentence(task: Any) -> None:
    network = Network(mlp((64, 10)), task.example_inputs)
    with pytest.raises(InputError, match=r"\[0, 1\)"):
        admm(network, task, sparsity=1.0)
    with pytest.raises(InputError, match="rho above 0"):
        admm(network, task, rho=0.0)
    with pytest.raises(InputError, match="there is no magic"):
        admm(network, task, allocation="magic")
