"""Bi-level pruning: the mask's gradient is the derivative, masks are exact, levels are apart."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gossamer
from gossamer.compress.prune.bilevel import (
    BilevelPruning,
    ScoreLearning,
    bip,
    by_weight,
    hydra,
    implicit_mask_gradient,
    weights_kept,
)
from gossamer.compress.prune.rewind import Retraining
from gossamer.compress.prune.weight_scores import largest
from gossamer.compress.recipe import Recipe
from gossamer.core.errors import InputError
from gossamer.core.fit import cosine, fit
from gossamer.core.graph import Graph
from gossamer.core.network import Network
from gossamer.core.task import seed_of
from gossamer.datasets import open_task
from gossamer.models.plain import ConvNet, mlp
from gossamer.models.resnet import digits_resnet

NAMES = ["1.weight", "3.weight"]


def test_a_linear_loss_has_the_exact_gradient() -> None:
    """l(z) = g z has the lower optimum w = -m g / gamma, so l = -sum m^2 g^2 / gamma."""
    g, m, gamma = torch.tensor([0.5, -1, 2]), torch.tensor([1.0, 0, 1]), 2.0
    optimum = -m * g / gamma
    found = implicit_mask_gradient(optimum, m, g, 1 / gamma)
    assert found.tolist() == [-0.25, 0.0, -4.0]
    mask = m.clone().requires_grad_()
    (true,) = torch.autograd.grad((g * mask * (-mask * g / gamma)).sum(), mask)
    assert torch.equal(found, true)


@pytest.mark.parametrize(
    ("gamma", "true", "approximate"),
    [
        (1.0, (-0.1846, -0.1879), (-0.3403, -0.1767)),
        (10.0, (-0.0964, -0.0128), (-0.1059, -0.0122)),
        (100.0, (-0.012424, -0.001102), (-0.012548, -0.001095)),
    ],
)
def test_a_quadratic_loss_tends_to_the_exact_gradient(
    gamma: float, true: tuple[float, float], approximate: tuple[float, float]
) -> None:
    a = torch.tensor([[1.0, 0.2], [0.2, 0.5]], dtype=torch.float64)
    b = torch.tensor([1.0, -1.0], dtype=torch.float64)

    def optimum(m: Tensor) -> Tensor:
        d = torch.diag(m)
        return torch.linalg.solve(
            d @ a.T @ a @ d + gamma * torch.eye(2, dtype=torch.float64), d @ a.T @ b
        )

    m = torch.tensor([1.0, 0.6], dtype=torch.float64, requires_grad=True)
    loss = 0.5 * (a @ (m * optimum(m)) - b).square().sum()
    (gradient,) = torch.autograd.grad(loss, m)
    w = optimum(m).detach()
    slope = a.T @ (a @ (m.detach() * w) - b)
    found = implicit_mask_gradient(w, m.detach(), slope, 1 / gamma)
    torch.testing.assert_close(gradient, torch.tensor(true).double(), atol=6e-5, rtol=1e-3)
    torch.testing.assert_close(found, torch.tensor(approximate).double(), atol=6e-5, rtol=1e-3)
    # At a lower optimum both terms are the same.
    torch.testing.assert_close(found, 2 * w * slope)


def test_masks_keep_exactly_what_they_should() -> None:
    assert weights_kept(216, 1 - 0.33) == 72
    assert weights_kept(1000, 0.9) == 100 and weights_kept(10, 0.0) == 10
    select = by_weight(0.5, least=0)
    found = select({"a": torch.tensor([0.1, 0.5]), "b": torch.tensor([0.3, 0.2])})
    assert found["a"].tolist() == [0, 1] and found["b"].tolist() == [1, 0]
    # Ties go by index: the first go.
    assert largest(torch.tensor([1.0, 1, 1, 2]), 2).tolist() == [False, False, True, True]
    assert not bool(largest(torch.tensor([1.0, 2.0]), 0).any())
    guarded = by_weight(0.5)({"a": torch.tensor([9.0, 8.0, 7.0]), "b": torch.tensor([0.1])})
    assert guarded["b"].tolist() == [1] and guarded["a"].tolist() == [1, 0, 0]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        values = torch.randint(0, 5, (40,), generator=generator).float()
        order = torch.argsort(values, stable=True)
        expected = torch.zeros(40, dtype=torch.bool)
        expected[order[40 - 13 :]] = True
        assert torch.equal(largest(values, 13), expected)


@pytest.fixture(scope="module")
def task() -> Any:
    torch.set_num_threads(1)
    return open_task("digits", limit=200)


@pytest.fixture(scope="module")
def trained(task: Any) -> nn.Module:
    torch.manual_seed(0)
    module = mlp((64, 24, 10))
    Retraining(epochs=5, lr=0.05).train(module, task)
    return module


def test_the_score_gradient_is_that_of_the_formula_for_all_entries(
    trained: nn.Module, task: Any
) -> None:
    module = copy.deepcopy(trained)
    rule = BilevelPruning(module, task, NAMES, by_weight(0.7), lr2=0.3, mask_lr=0.1)
    before = [s.detach().clone() for s in rule.scores]
    masks = rule.masks()
    images, labels = next(task.batches("train", batch_size=64))
    fit(rule, {"lower": task, "upper": task}, epochs=0)
    rule._train_mask((images, labels))
    # By hand: z as the weights of a copy.
    other = copy.deepcopy(trained)
    with torch.no_grad():
        for name in NAMES:
            other.get_parameter(name).mul_(masks[name])
    nn.functional.cross_entropy(other(images), labels).backward()
    for name, score, old in zip(NAMES, rule.scores, before, strict=True):
        w, g = trained.get_parameter(name), other.get_parameter(name).grad
        assert g is not None
        expected = (w - 0.3 * masks[name] * g) * g * torch.sign(old)
        assert score.grad is not None
        torch.testing.assert_close(score.grad, expected)
        torch.testing.assert_close(score, old - 0.1 * expected)
        assert bool((score.grad[masks[name] == 0] != 0).any())
    assert all(torch.equal(a, b) for a, b in zip(
        module.parameters(), trained.parameters(), strict=True
    ))  # fmt: skip


def test_without_a_mask_step_it_is_one_shot_pruning_and_retraining(
    trained: nn.Module, task: Any
) -> None:
    network = Network(trained, task.example_inputs)
    made = bip(
        network, task, sparsity=0.7, epochs=2, mask_lr=0.0, lr=0.05, recalibrate=0, seed=3,
        cpu=True,
    )  # fmt: skip
    assert made.steps[-1]["report"]["overlap_with_largest"] == 1.0
    module = copy.deepcopy(trained)
    masks = by_weight(0.7)({n: module.get_parameter(n).detach().abs() for n in NAMES})
    groups = [
        {"params": [p for p in module.parameters() if p.ndim > 1], "weight_decay": 1e-4},
        {"params": [p for p in module.parameters() if p.ndim < 2]},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)

    def masked() -> None:
        with torch.no_grad():
            for name in NAMES:
                module.get_parameter(name).mul_(masks[name])

    masked()
    steps = task.steps_per_epoch("train", 128)
    for step in range(2 * steps):
        batches = list(task.batches("train", batch_size=128, seed=3, epoch=step // steps))
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * cosine(step / (2 * steps))
        optimizer.zero_grad()
        task.loss(module, batches[step % steps]).backward()
        for name in NAMES:
            module.get_parameter(name).grad.mul_(masks[name])
        optimizer.step()
        masked()
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, made.module.state_dict()[name], atol=1e-6, rtol=1e-5)


def test_the_two_levels_see_other_batches_and_keep_apart(trained: nn.Module, task: Any) -> None:
    seen: dict[str, list[Tensor]] = {"lower": [], "upper": []}

    class Watched(BilevelPruning):
        def step(self, batch: Any) -> Any:
            for level, found in seen.items():
                found.append(batch[level][0])
            return super().step(batch)

    rule = Watched(copy.deepcopy(trained), task, NAMES, by_weight(0.7))
    fit(rule, {"lower": task, "upper": task}, epochs=1, batch_size=50)
    assert not torch.equal(seen["lower"][0], seen["upper"][0])
    for found in seen.values():
        joined = torch.cat(found).flatten(1)
        assert len(joined.unique(dim=0)) == len(torch.cat(seen["lower"]).flatten(1).unique(dim=0))
    apart = BilevelPruning(copy.deepcopy(trained), task, NAMES, by_weight(0.7))
    scores = [s.detach().clone() for s in apart.scores]
    fit(apart, {"lower": task, "upper": task}, epochs=0)
    batch = next(task.batches("train", batch_size=64))
    apart._train_weights(batch)
    assert all(torch.equal(a, b) for a, b in zip(apart.scores, scores, strict=True))
    # Weights outside of the mask wait as they are.
    for name, mask in apart.masks().items():
        now, then = apart.network.get_parameter(name), trained.get_parameter(name)
        assert torch.equal(now[mask == 0], then[mask == 0])
        assert not torch.equal(now[mask > 0], then[mask > 0])
    tied = BilevelPruning(copy.deepcopy(trained), task, NAMES, by_weight(0.7), tie_scores=True)
    fit(tied, {"lower": task, "upper": task}, epochs=1, batch_size=50)
    for name, score in zip(NAMES, tied.scores, strict=True):
        assert score is tied.network.get_parameter(name)


def test_weights_come_back(trained: nn.Module, task: Any) -> None:
    network = Network(trained, task.example_inputs)
    made = bip(network, task, sparsity=0.9, epochs=3, batch_size=32, cpu=True)
    assert 0.2 < made.steps[-1]["report"]["overlap_with_largest"] < 1.0
    assert made.steps[-1]["report"]["remaining"] == weights_kept(64 * 24 + 240, 0.9)
    other = bip(network, task, sparsity=0.9, epochs=3, batch_size=32, lr2=0.5, cpu=True)
    assert not torch.equal(
        made.module.get_parameter("1.weight"), other.module.get_parameter("1.weight")
    )


def test_hydra_learns_scores_only(trained: nn.Module, task: Any) -> None:
    module = copy.deepcopy(trained)
    rule = ScoreLearning(module, task, NAMES, by_weight(0.8))
    first = [s.detach().clone() for s in rule.scores]
    before = rule.masks()
    expected = by_weight(0.8)(
        {
            n: trained.get_parameter(n).detach().abs()
            / trained.get_parameter(n).detach().abs().max()
            / trained.get_parameter(n).shape[1] ** 0.5
            for n in NAMES
        }
    )
    assert all(torch.equal(before[n], expected[n]) for n in NAMES)
    fit(rule, task, epochs=2, batch_size=32)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[name]), name
    assert all(not torch.equal(a, b) for a, b in zip(rule.scores, first, strict=True))
    made = hydra(Network(trained, task.example_inputs), task, sparsity=0.8, epochs=2, cpu=True)
    assert made.steps[-1]["report"]["remaining"] == weights_kept(64 * 24 + 240, 0.8)


@pytest.mark.parametrize("granularity", ["filter", "channel"])
def test_structured_masks_are_cut_out(task: Any, granularity: Any) -> None:
    for make in (
        lambda: ConvNet(1, 8, (8, "pool", 12, "pool"), (24,)),
        lambda: digits_resnet((8, 16), blocks_per_stage=1),
    ):
        torch.manual_seed(1)
        module = make()
        Retraining(epochs=2, lr=0.05).train(module, task)
        network = Network(module, task.example_inputs)
        made = bip(
            network, task, sparsity=0.5, granularity=granularity, epochs=2, lr=0.02, cpu=True
        )
        report = made.steps[-1]["report"]
        assert report["rounds"][0]["verified"]
        graph = Graph.trace(made.module, task.example_inputs)
        assert [graph.parameters, graph.macs] == [report["parameters"][1], report["macs"][1]]
        assert report["units"][1] == report["units"][0] // 2
        assert report["macs"][1] < 0.6 * report["macs"][0]
        if isinstance(module, ConvNet):
            shapes = [tuple(p.shape) for p in made.module.parameters() if p.ndim > 1]
            assert shapes == [(4, 1, 3, 3), (6, 4, 3, 3), (12, 24), (10, 12)]


def test_the_step_works_in_the_main_job(trained: nn.Module, task: Any, tmp_path: Path) -> None:
    recipe = Recipe.of(
        ("bip", {"sparsity": 0.8, "epochs": 1}), ("hydra", {"sparsity": 0.85, "epochs": 2})
    )
    result = gossamer.shrink(trained, task, recipe=recipe, out=tmp_path / "out", cpu=True)
    first, second = (s["report"]["remaining"] for s in result.report["steps"])
    assert second <= first
    assert result.report["packed"]["agreement"] == 1.0


def test_a_killed_run_goes_on(trained: nn.Module, task: Any, tmp_path: Path) -> None:
    whole = BilevelPruning(copy.deepcopy(trained), task, NAMES, by_weight(0.8))
    tasks = {"lower": task, "upper": task}
    fit(whole, tasks, epochs=3, batch_size=50, seed=seed_of("run"))

    class Killed(BilevelPruning):
        def end_epoch(self) -> None:
            if self.run.epoch == 1:
                raise KeyboardInterrupt

    place = tmp_path / "state"
    options: dict[str, Any] = {
        "epochs": 3, "batch_size": 50, "seed": seed_of("run"), "checkpoint": place,
        "checkpoint_every": 3,
    }  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        fit(Killed(copy.deepcopy(trained), task, NAMES, by_weight(0.8)), tasks, **options)
    again = BilevelPruning(copy.deepcopy(trained), task, NAMES, by_weight(0.8))
    fit(again, tasks, **options)
    for a, b in zip(whole.scores, again.scores, strict=True):
        assert torch.equal(a, b)
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, again.network.state_dict()[name])


def test_bad_input_is_one_sentence(trained: nn.Module, task: Any) -> None:
    network = Network(trained, task.example_inputs)
    for step in (bip, hydra):
        with pytest.raises(InputError, match=r"\[0, 1\)"):
            step(network, task, sparsity=1.0)
        with pytest.raises(InputError, match="granularity is weight"):
            step(network, task, granularity="layer")  # type: ignore[arg-type]
        with pytest.raises(InputError, match="0 or more"):
            step(network, task, mask_lr=-1.0)
