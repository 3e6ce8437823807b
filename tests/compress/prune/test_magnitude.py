"""The pruning step end to end on digits."""

from __future__ import annotations

import copy

import pytest
import torch

from gossamer.compress.prune.magnitude import prune
from gossamer.core.errors import BudgetError, InputError
from gossamer.core.fit import Supervised, fit, sgd
from gossamer.core.graph import Graph
from gossamer.core.network import Network
from gossamer.datasets.digits import digits
from gossamer.models.resnet import digits_resnet


@pytest.fixture(scope="module")
def trained() -> Network:
    torch.set_num_threads(1)
    task = digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = digits_resnet(widths=(8, 16))
    fit(Supervised(module, task, optimizer=sgd(module)), task, epochs=10, batch_size=32, cpu=True)
    return Network(module.eval(), task.example_inputs)


@pytest.mark.parametrize(
    ("criterion", "allocation", "schedule", "rounds"),
    [
        ("l2", "global", "one-shot", 1),
        ("taylor", "lamp", "cubic", 2),
        ("fpgm", "uniform", "iterative", 2),
    ],
)
def test_budget_is_met_and_verified(
    trained: Network, criterion: str, allocation: str, schedule: str, rounds: int
) -> None:
    task = digits()
    before = copy.deepcopy(trained.module.state_dict())
    result = prune(
        trained,
        task,
        criterion=criterion,
        allocation=allocation,
        schedule=schedule,
        rounds=rounds,
        macs=0.5,
        round_to=2,
        epochs=4,
        batch_size=32,
        lr=0.05,
        cpu=True,
    )
    macs = Graph.trace(result.module, trained.example_inputs).macs
    full = Graph.trace(trained.module, trained.example_inputs).macs
    assert 0.3 * full < macs <= 0.5 * full
    report = result.steps[-1]["report"]
    assert len(report["rounds"]) == rounds
    assert all(r["verified"] for r in report["rounds"])
    assert report["parameters"][1] == sum(p.numel() for p in result.module.parameters())
    assert task.score(result.module) > 85
    for name, tensor in trained.module.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_bad_options(trained: Network) -> None:
    task = digits()
    with pytest.raises(InputError, match="there is no l3"):
        prune(trained, task, criterion="l3")
    with pytest.raises(InputError, match="one budget"):
        prune(trained, task, macs=0.5, parameters=0.5)
    with pytest.raises(InputError, match="share"):
        prune(trained, task, macs=50)
    with pytest.raises(BudgetError, match="least possible"):
        prune(trained, task, macs=0.001, epochs=0)
