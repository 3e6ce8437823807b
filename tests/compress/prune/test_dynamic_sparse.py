"""Zeros that move: their number never changes, what comes is where the gradient is largest."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gossamer
from gossamer.compress.prune.dynamic_sparse import (
    DynamicSparse,
    MovementPruning,
    drop_share,
    dynamic_sparse,
    exchanged,
    movement,
)
from gossamer.compress.prune.rewind import Retraining
from gossamer.compress.recipe import Recipe
from gossamer.core.errors import InputError
from gossamer.core.fit import fit
from gossamer.core.network import Network
from gossamer.datasets import open_task
from gossamer.models.plain import mlp
from gossamer.parts.masks import Masks

NAMES = ["1.weight", "3.weight"]


@pytest.fixture(scope="module")
def task() -> Any:
    torch.set_num_threads(1)
    return open_task("digits", limit=200)


@pytest.fixture(scope="module")
def first() -> nn.Module:
    torch.manual_seed(0)
    return mlp((64, 24, 10))


def test_the_share_falls_along_half_a_cosine() -> None:
    assert [drop_share(f) for f in (0.0, 0.375, 0.75, 0.9)] == pytest.approx([0.3, 0.15, 0, 0])


def test_an_exchange_by_hand() -> None:
    weight = torch.tensor([[0.1, -3.0, 0.2], [2.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    worth = torch.tensor([[9.0, 9.0, 9.0], [9.0, 1.0, 2.0]])
    now = exchanged(weight, mask, worth, 1)
    assert now.tolist() == [[False, True, True], [True, False, True]]
    assert int(exchanged(weight, mask, worth, 9).sum()) == 4
    assert torch.equal(exchanged(weight, mask, worth, 0), mask)


@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_the_number_of_weights_never_changes(first: nn.Module, task: Any, grow: Any) -> None:
    module = copy.deepcopy(first)
    generator = torch.Generator().manual_seed(1)
    masks = Masks(
        module,
        {n: torch.rand(module.get_parameter(n).shape, generator=generator) < 0.2 for n in NAMES},
    )
    counts = {n: int(m.sum()) for n, m in masks.kept.items()}
    seen: list[dict[str, torch.Tensor]] = []

    class Watched(DynamicSparse):
        def step(self, batch: Any) -> Any:
            before = {n: m.clone() for n, m in self.masks.kept.items()}
            weights = {n: self.network.get_parameter(n).detach().clone() for n in NAMES}
            logged = super().step(batch)
            for name, mask in self.masks.kept.items():
                now = self.network.get_parameter(name)
                assert int(mask.sum()) == counts[name]
                assert not bool(now[~mask].any())
                came = mask & ~before[name]
                assert not bool(now[came].any())
                if bool(came.any()):
                    seen.append({name: came})
                    gone = before[name] & ~mask
                    stayed = before[name] & mask
                    size = weights[name].abs()
                    assert float(size[gone].max()) <= float(size[stayed].min())
            return logged

    rule = Watched(module, task, masks, grow=grow, every=3, lr=0.05)
    fit(rule, task, epochs=8, batch_size=50)
    assert len(seen) > 4


def test_what_comes_is_where_the_dense_gradient_is_largest(first: nn.Module, task: Any) -> None:
    module = copy.deepcopy(first)
    masks = Masks(module, {n: module.get_parameter(n).detach() > 0 for n in NAMES})
    rule = DynamicSparse(module, task, masks)
    fit(rule, task, epochs=0)
    batch = next(task.batches("train", batch_size=64))
    before = {n: m.clone() for n, m in masks.kept.items()}
    other = copy.deepcopy(module)
    task.loss(other, batch).backward()
    rule._exchange(batch, 0.2)
    for name in NAMES:
        slope = other.get_parameter(name).grad
        assert slope is not None
        came = masks.kept[name] & ~before[name]
        count = int(0.2 * int(before[name].sum()))
        absent = slope.abs().masked_fill(before[name], -1.0).flatten()
        expected = absent.topk(count).indices.sort().values
        assert torch.equal(came.flatten().nonzero().flatten(), expected)


def test_a_killed_run_goes_on(first: nn.Module, task: Any, tmp_path: Path) -> None:
    network = Network(first, task.example_inputs)
    options: dict[str, Any] = {"sparsity": 0.8, "epochs": 3, "every": 2, "cpu": True, "lr": 0.05}
    whole = dynamic_sparse(network, task, **options)

    def killed(self: Any) -> None:
        raise KeyboardInterrupt

    place = tmp_path / "state"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DynamicSparse, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            dynamic_sparse(network, task, checkpoint=place, **options)
    again = dynamic_sparse(network, task, checkpoint=place, **options)
    for name, tensor in whole.module.state_dict().items():
        assert torch.equal(tensor, again.module.state_dict()[name]), name


def test_movement_keeps_what_moves_away_from_zero() -> None:
    """One weight small and growing, one large and shrinking: magnitude would keep the other."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([[0.1, 1.0]]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T

    class Pull:
        """Its gradient is -1 on the first weight and +1 on the second."""

        example_inputs = (torch.tensor([[-1.0, 1.0]]),)

        def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
            return model(torch.tensor([[-1.0, 1.0]])).sum()

    module = Two()
    rule = MovementPruning(module, Pull(), ["weight"], sparsity=0.5, lr=0.0005, weight_decay=0.0)  # type: ignore[arg-type]
    rule.run = type("R", (), {"fraction": 0.0, "accelerator": None})()  # type: ignore[assignment]
    rule.backward = lambda loss: loss.backward()  # type: ignore[method-assign]
    for _ in range(20):
        rule.step(None)
    scores = rule.scores[0].detach()
    assert float(scores[0, 0]) > 0 > float(scores[0, 1])
    assert float(module.weight[0, 0]) < float(module.weight[0, 1])
    assert rule.masks(1.0)["weight"].tolist() == [[1.0, 0.0]]
    assert rule.masks(0.05)["weight"].tolist() == [[1.0, 1.0]]


def test_both_steps_reach_the_sparsity_and_learn(
    first: nn.Module, task: Any, tmp_path: Path
) -> None:
    total = 64 * 24 + 240
    recipe = Recipe.of(("dynamic-sparse", {"sparsity": 0.8, "epochs": 6, "every": 5, "lr": 0.05}))
    result = gossamer.shrink(first, task, recipe=recipe, out=tmp_path / "out", cpu=True)
    report = result.report["steps"][-1]["report"]
    assert report["remaining"] == total - round(0.8 * total) and report["moved"] > 0
    trained = copy.deepcopy(first)
    Retraining(epochs=5, lr=0.05).train(trained, task)
    made = movement(
        Network(trained, task.example_inputs),
        task,
        sparsity=0.8,
        epochs=10,
        batch_size=16,
        cpu=True,
    )
    assert made.steps[-1]["report"]["remaining"] == total - int(0.8 * total)
    assert task.score(made.module) > 50


def test_bad_input_is_one_sentence(first: nn.Module, task: Any) -> None:
    network = Network(first, task.example_inputs)
    with pytest.raises(InputError, match=r"\[0, 1\)"):
        dynamic_sparse(network, task, sparsity=1.0)
    with pytest.raises(InputError, match="by gradient or at random"):
        dynamic_sparse(network, task, grow="luck")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="erk, uniform"):
        dynamic_sparse(network, task, allocation="lamp")
    with pytest.raises(InputError, match="no room"):
        movement(network, task, warm=0.5, cool=0.5)
