"""Hard-concrete gates: probabilities in closed form and by drawing, and gates that are cut."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gossamer
from gossamer.compress.prune.hard_concrete import (
    BETA,
    GAMMA,
    ZETA,
    Gates,
    drawn_gates,
    hard_concrete,
    open_probability,
    settled_gates,
)
from gossamer.compress.prune.rewind import Retraining
from gossamer.compress.recipe import Recipe
from gossamer.core import surgery
from gossamer.core.dependency import analyse
from gossamer.core.errors import InputError, UnsupportedError
from gossamer.core.graph import Graph
from gossamer.core.network import Network
from gossamer.datasets import open_task
from gossamer.models.plain import ConvNet
from gossamer.models.resnet import digits_resnet
from gossamer.parts.swap import swapped


@pytest.mark.parametrize("log_alpha", [-3.0, -0.7, 0.0, 1.5, 4.0])
def test_probabilities_are_those_of_drawing(log_alpha: float) -> None:
    n = 400_000
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = drawn_gates(torch.full((n,), log_alpha, dtype=torch.float64), uniform)
    assert float(z.min()) >= 0.0 and float(z.max()) <= 1.0
    opened = float(open_probability(torch.tensor(log_alpha)))
    assert float((z > 0).double().mean()) == pytest.approx(opened, abs=4 * 0.5 / math.sqrt(n))

    # The concrete variable's distribution function, from the density's own definition: s < t
    # where the noise is below beta logit(t) - log alpha.
    def below(t: float) -> float:
        s = (t - GAMMA) / (ZETA - GAMMA)
        return 1.0 / (1.0 + math.exp(-(BETA * math.log(s / (1.0 - s)) - log_alpha)))

    assert opened == pytest.approx(1.0 - below(0.0), abs=1e-6)
    for t in (0.25, 0.5, 0.9):
        assert float((z <= t).double().mean()) == pytest.approx(below(t), abs=4e-3)
    assert float((z == 1).double().mean()) == pytest.approx(1.0 - below(1.0), abs=4e-3)


def test_worked_numbers() -> None:
    # log(.1 / 1.1) = -2.3979: at log alpha 0 a gate is open with sigmoid(1.5986) = .8318.
    zero = torch.tensor(0.0)
    assert float(open_probability(zero)) == pytest.approx(0.83182, abs=1e-5)
    assert float(settled_gates(zero)) == pytest.approx(0.5)
    # The finished gate is closed up to sigmoid = 1/12, and 1 from 11/12 on.
    edge = math.log(1 / 11)
    made = settled_gates(torch.tensor([edge - 1e-3, edge + 1e-3, -edge - 1e-3, -edge + 1e-3]))
    assert made[0] == 0 and 0 < made[1] < 1e-3 and 1 - 1e-3 < made[2] < 1 and made[3] == 1
    median = drawn_gates(zero, torch.tensor(0.5))
    assert float(median) == pytest.approx(0.5)


@pytest.fixture(scope="module")
def task() -> Any:
    torch.set_num_threads(1)
    return open_task("digits", limit=600)


@pytest.fixture(scope="module")
def trained(task: Any) -> nn.Module:
    torch.manual_seed(0)
    module = ConvNet(1, 8, (12, "pool", 16, "pool"), (24,))
    Retraining(epochs=8, lr=0.05).train(module, task)
    return module.eval()


def test_gates_multiply_the_activations(trained: nn.Module, task: Any) -> None:
    """By hooks on what the readers get: behind convolution, normalisation, ReLU and pooling."""
    gates = Gates(trained, analyse(trained, task.example_inputs))
    assert gates.groups.sizes == (12, 16, 24)
    values = torch.rand(52, generator=torch.Generator().manual_seed(1))
    first, second, third = values.split([12, 16, 24])
    readers = [m for m in trained.modules() if isinstance(m, nn.Conv2d | nn.Linear)][1:]
    places = second.repeat_interleave(readers[1].in_features // 16)  # type: ignore[operator]
    handles = [
        reader.register_forward_pre_hook(lambda _, given, by=by: (given[0] * by,))
        for reader, by in zip(readers, (first.view(1, -1, 1, 1), places, third), strict=True)
    ]
    images, _ = next(iter(task.batches("validation", batch_size=16)))
    expected = trained(images).detach()
    for handle in handles:
        handle.remove()
    with swapped(trained, gates.gated(values)):
        torch.testing.assert_close(trained(images), expected, rtol=1e-4, atol=1e-5)


def test_the_expected_share_counts_parameters(trained: nn.Module, task: Any) -> None:
    dependency = analyse(trained, task.example_inputs)
    gates = Gates(trained, dependency, start=0.7)
    assert float(gates.expected().detach()) == pytest.approx(0.7, abs=1e-6)
    one = torch.zeros(12, dtype=torch.bool)
    one[3] = True
    fewer = dependency.cost({0: one}).parameters
    assert fewer is not None and dependency.graph.parameters - fewer == int(gates.sizes[3])
    with torch.no_grad():
        gates.log_alpha.fill_(-50.0)
        gates.log_alpha[3] = 50.0
    assert float(gates.expected().detach()) == pytest.approx(
        float(gates.sizes[3] / gates.sizes.sum())
    )


@pytest.mark.parametrize("residual", [False, True])
def test_the_cut_network_is_the_gated_one(residual: bool, trained: nn.Module, task: Any) -> None:
    torch.manual_seed(0)
    net = digits_resnet().eval() if residual else copy.deepcopy(trained)
    dependency = analyse(net, task.example_inputs)
    gates = Gates(net, dependency)
    with torch.no_grad():
        gates.log_alpha.copy_(4.0 * torch.randn(gates.groups.total))
        gates.groups.split(gates.log_alpha)[0].fill_(-20.0)  # this family would vanish
    images, _ = next(iter(task.batches("validation", batch_size=16)))
    with swapped(net, gates.gated(settled_gates(gates.log_alpha))):
        expected = net(images).detach()
    removal = gates.fold(net)
    small = surgery.remove(net, dependency, removal).module.eval()
    torch.testing.assert_close(small(images), expected, rtol=1e-3, atol=1e-4)
    assert int(removal[gates.groups.indices[0]].sum()) == gates.groups.sizes[0] - 1
    before, after = (Graph.trace(n, task.example_inputs).parameters for n in (net, small))
    assert after < before


def test_a_higher_price_leaves_less(trained: nn.Module, task: Any) -> None:
    network = Network(trained, task.example_inputs)
    left = []
    for lam in (0.0, 0.5, 3.0):
        made = hard_concrete(network, task, lam=lam, epochs=15, batch_size=64, lr=0.05)
        report = made.steps[-1]["report"]
        left.append(report["parameters"][1])
        assert report["rounds"][0]["verified"] and len(report["expected"]) == 15
        assert Graph.trace(made.module, task.example_inputs).parameters == left[-1]
        if lam == 0.5:
            assert task.score(made.module, "test") > 85.0
    assert left[0] > left[1] > left[2]


def test_the_step_works_in_the_main_job(trained: nn.Module, task: Any, tmp_path: Path) -> None:
    recipe = Recipe.of(("hard-concrete", {"lam": 10.0, "epochs": 8}), ("finetune", {"epochs": 1}))
    result = gossamer.shrink(trained, task, recipe=recipe, out=tmp_path / "out", cpu=True)
    before, after = result.network.steps[0]["report"]["parameters"]
    assert Graph.trace(result.module, task.example_inputs).parameters == after < before


def test_bad_input_is_one_sentence(trained: nn.Module, task: Any) -> None:
    network = Network(trained, task.example_inputs)
    with pytest.raises(InputError, match="lam and epochs"):
        hard_concrete(network, task, lam=-1.0)
    with pytest.raises(InputError, match=r"\(0, 1\), not 1"):
        hard_concrete(network, task, start=1.0)
    lone = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    with pytest.raises(UnsupportedError):
        hard_concrete(Network(lone, task.example_inputs), task)
