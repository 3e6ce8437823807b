"""The LASSO agrees with scikit-learn's, the refits with numpy's least squares."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso
from torch import nn

import gossamer
from gossamer.compress.prune.magnitude import prune
from gossamer.compress.prune.reconstruction import (
    channel_products,
    entering_order,
    fitted_weight,
    lasso,
    refit,
)
from gossamer.compress.prune.rewind import Retraining
from gossamer.compress.recipe import Recipe
from gossamer.core import surgery
from gossamer.core.dependency import analyse
from gossamer.core.errors import InputError
from gossamer.core.graph import Graph
from gossamer.core.network import Network
from gossamer.datasets import open_task
from gossamer.models.plain import ConvNet
from gossamer.models.resnet import digits_resnet


def problem(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs ``[rows, 4 channels x 3]``, weight ``[5, 12]`` and the channel of each input."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(12, 12, generator=generator)
    x = (torch.randn(60, 12, generator=generator) @ mixing).double()
    weight = torch.randn(5, 12, generator=generator).double()
    return x, weight, torch.arange(4).repeat_interleave(3)


def added(x: torch.Tensor, weight: torch.Tensor) -> np.ndarray:
    """What each channel adds to every output of every row, ``[rows * outputs, channels]``."""
    each = torch.einsum("nck,ock->noc", x.view(-1, 4, 3), weight.view(5, 4, 3))
    return each.flatten(0, 1).numpy()


def test_products_are_those_of_what_each_channel_adds() -> None:
    x, weight, owner = problem(0)
    z = added(x, weight)
    np.testing.assert_allclose(channel_products(x.T @ x, weight, owner, 4), z.T @ z)


@pytest.mark.parametrize("seed", range(5))
def test_the_order_is_that_of_scikit_learns_lasso(seed: int) -> None:
    """Coordinate descent on the responses themselves, at a hundred penalties."""
    x, weight, owner = problem(seed)
    z = added(x, weight)
    y = z.sum(1)
    order = entering_order(channel_products(x.T @ x, weight, owner, 4))
    top = float(np.abs(z.T @ y).max()) / len(y)
    entered: list[int] = []
    for alpha in top * np.geomspace(0.999, 1e-4, 100):
        fit = Lasso(alpha=alpha, fit_intercept=False, tol=1e-10, max_iter=100_000).fit(z, y)
        entered += [c for c in np.flatnonzero(fit.coef_) if c not in entered]
    assert order.argsort(descending=True).tolist() == entered
    assert order.sort(descending=True).values.tolist() == [1.0, 0.75, 0.5, 0.25]


def test_what_adds_nothing_never_enters() -> None:
    z = np.random.default_rng(0).standard_normal((30, 3))
    z[:, 1] = 0.0
    order = entering_order(torch.from_numpy(z.T @ z))
    assert float(order[1]) == 0.0 and float(order.max()) == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_refits_are_least_squares(seed: int) -> None:
    x_old, weight, owner = problem(seed)
    x = x_old + 0.3 * torch.randn(x_old.shape, generator=torch.Generator().manual_seed(9)).double()
    kept = owner != 1
    x[:, ~kept] = 0.0
    gram, cross = x.T @ x, x.T @ x_old
    y = (x_old @ weight.T).numpy()
    full = fitted_weight(weight, gram, cross, kept, owner, "least-squares")
    best, *_ = np.linalg.lstsq(x[:, kept].numpy(), y, rcond=None)
    np.testing.assert_allclose(full[:, kept], best.T, rtol=1e-6)
    scaled = fitted_weight(weight, gram, cross, kept, owner, "scale")
    z = added(x, weight)[:, [0, 2, 3]]
    factors, *_ = np.linalg.lstsq(z, y.reshape(-1), rcond=None)
    expected = weight.view(5, 4, 3)[:, [0, 2, 3]] * torch.from_numpy(factors).view(1, 3, 1)
    np.testing.assert_allclose(scaled[:, kept], expected.flatten(1), rtol=1e-6)

    def error(new: torch.Tensor) -> float:
        return float((x @ new.T - torch.from_numpy(y)).square().sum())

    assert error(full) <= error(scaled) <= error(weight)


def test_inputs_that_hardly_ever_speak_get_no_huge_weights() -> None:
    """Along a direction that calibration hardly sees, the fit would follow the noise."""
    x_old, weight, owner = problem(0)
    kept = owner != 1
    quiet = int(kept.nonzero()[0])
    x = x_old + 0.3 * torch.randn(x_old.shape, generator=torch.Generator().manual_seed(9)).double()
    x[:, quiet] *= 1e-5
    x[:, ~kept] = 0.0
    made = fitted_weight(weight, x.T @ x, x.T @ x_old, kept, owner, "least-squares")
    assert float(made.norm()) < 3.0 * float(weight.norm())
    others = kept.clone()
    others[quiet] = False
    best, *_ = np.linalg.lstsq(x[:, others].numpy(), (x_old @ weight.T).numpy(), rcond=None)
    np.testing.assert_allclose(made[:, others], best.T, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def task() -> Any:
    torch.set_num_threads(1)
    return open_task("digits", limit=600)


@pytest.fixture(scope="module")
def trained(task: Any) -> nn.Module:
    torch.manual_seed(0)
    module = ConvNet(1, 8, (16, "pool", 24, "pool"), (32,))
    Retraining(epochs=10, lr=0.05).train(module, task)
    return module.eval()


def test_a_copied_channel_is_made_up_for_exactly(task: Any) -> None:
    """Two channels are equal: with one gone, the reader of the other takes both weights."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 10),
    ).eval()  # fmt: skip
    with torch.no_grad():
        net[0].weight[1].copy_(net[0].weight[0])
        net[0].bias[1].copy_(net[0].bias[0])
    inputs = [(x,) for x, _ in task.batches("validation", batch_size=32)]
    expected = net(inputs[0][0]).detach()
    for how in ("least-squares", "scale"):
        other = copy.deepcopy(net)
        dependency = analyse(other, task.example_inputs)
        family = next(f.index for f in dependency.families if f.units == 3)
        removal = {family: torch.tensor([False, True, False])}
        errors = refit(other, dependency, removal, inputs, how=how)
        small = surgery.remove(other, dependency, removal).module
        (error,) = errors.values()
        if how == "least-squares":
            assert error[1] < 1e-9 < error[0]
            torch.testing.assert_close(small(inputs[0][0]), expected, rtol=1e-3, atol=1e-4)
        else:
            assert 1e-9 < error[1] < error[0]


def test_readers_of_a_residual_network_come_nearer_to_the_original(task: Any) -> None:
    torch.manual_seed(0)
    net = digits_resnet()
    Retraining(epochs=4, lr=0.05).train(net, task)
    net.eval()
    images = torch.cat([x for x, _ in task.batches("test", batch_size=64)])
    expected = net(images).detach()
    distance = {}
    for how in ("none", "scale", "least-squares"):
        made = prune(
            Network(net, task.example_inputs), task, criterion="lasso", allocation="uniform",
            macs=0.6, epochs=0, reconstruct=how, samples=256,  # type: ignore[arg-type]
        )  # fmt: skip
        distance[how] = float((made.module(images) - expected).detach().square().mean())
        (record,) = made.steps[-1]["report"]["rounds"]
        assert record["verified"]
        assert all(after <= before + 1e-9 for before, after in record["reconstruction"].values())
    assert distance["least-squares"] < distance["scale"] < distance["none"]


def test_without_training_it_beats_magnitude(trained: nn.Module, task: Any) -> None:
    network = Network(trained, task.example_inputs)
    common: dict[str, Any] = {"allocation": "uniform", "parameters": 0.4, "epochs": 0}
    plain = prune(network, task, criterion="l1", **common)
    score = {"l1": task.score(plain.module, "test")}
    for criterion, how in (("lasso", "least-squares"), ("thinet", "scale")):
        made = prune(network, task, criterion=criterion, reconstruct=how, **common)  # type: ignore[arg-type]
        score[criterion] = task.score(made.module, "test")
        cost = Graph.trace(made.module, task.example_inputs).parameters
        assert cost <= 0.4 * Graph.trace(trained, task.example_inputs).parameters
    assert score["lasso"] > score["l1"] and score["thinet"] > score["l1"]


def test_scores_are_shares_of_each_family(trained: nn.Module, task: Any) -> None:
    scores = lasso(trained, analyse(trained, task.example_inputs), task, samples=64)
    for family in scores:
        inside = family[family > 0]
        assert float(inside.max()) == 1.0 and len(inside.unique()) == len(inside)


def test_several_rounds_and_a_rebuilt_network_work(
    trained: nn.Module, task: Any, tmp_path: Path
) -> None:
    recipe = Recipe.of(
        ("prune", {"criterion": "lasso", "reconstruct": "least-squares", "macs": 0.5, "rounds": 2,
                   "epochs": 2, "samples": 64}),
        ("prune", {"criterion": "thinet", "reconstruct": "scale", "macs": 0.8, "epochs": 0}),
    )  # fmt: skip
    result = gossamer.shrink(trained, task, recipe=recipe, out=tmp_path / "out", cpu=True)
    assert [len(step["report"]["rounds"]) for step in result.network.steps] == [2, 1]
    rebuilt = Graph.trace(trained, task.example_inputs).network().eval()
    options: dict[str, Any] = {
        "criterion": "lasso", "reconstruct": "least-squares", "macs": 0.6, "epochs": 0,
    }  # fmt: skip
    plain, other = (
        prune(Network(m, task.example_inputs), task, **options) for m in (trained, rebuilt)
    )
    images, _ = next(iter(task.batches("test", batch_size=32)))
    torch.testing.assert_close(plain.module(images), other.module(images), rtol=1e-3, atol=1e-4)


def test_bad_input_is_one_sentence(trained: nn.Module, task: Any) -> None:
    network = Network(trained, task.example_inputs)
    with pytest.raises(InputError, match="none, scale or least-squares"):
        prune(network, task, reconstruct="magic")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="1 sample or more"):
        prune(network, task, reconstruct="scale", samples=0, epochs=0)
