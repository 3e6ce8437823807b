"""Rate-distortion: curves are what pruning one layer does, allocations the best there are."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gossamer
from gossamer.compress.prune.rate_distortion import (
    Curves,
    allocate,
    calibration_inputs,
    output_distortion,
    rate_distortion,
    rd_curves,
)
from gossamer.compress.prune.rewind import Retraining
from gossamer.compress.recipe import Recipe
from gossamer.core.errors import BudgetError, InputError
from gossamer.core.network import Network
from gossamer.datasets import open_task
from gossamer.models.plain import ConvNet, mlp
from gossamer.parts.masks import Masks, multiplied_weights


@pytest.fixture(scope="module")
def task() -> Any:
    return open_task("digits", limit=300)


@pytest.fixture(scope="module")
def trained(task: Any) -> nn.Module:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = ConvNet(1, 8, (8, "pool", 12, "pool"), (24,))
    Retraining(epochs=8, lr=0.05).train(module, task)
    return module.eval()


def _curves(**layers: tuple[list[int], list[float]]) -> Curves:
    return Curves(
        {n: np.array(k) for n, (k, _) in layers.items()},
        {n: np.array(d) for n, (_, d) in layers.items()},
        {n: k[0] for n, (k, _) in layers.items()},
        {n: 10 * k[0] for n, (k, _) in layers.items()},
    )


def test_a_worked_allocation() -> None:
    deltas = (
        [0, 0.1, 0.5, 2, 9],
        [0, 0.2, 0.3, 1, 2, 6, 20],
        [0, 0.05, 0.1, 0.4, 0.6, 1.5, 3, 7, 30],
    )
    curves = _curves(
        **{str(i): ([len(d) - 1 - k for k in range(len(d))], d) for i, d in enumerate(deltas)}
    )
    kept = allocate(curves, 9, cap=1.0)
    assert kept == {"0": 2, "1": 3, "2": 4}
    assert curves.at(kept) == pytest.approx(2.1)
    # The same in MACs, of which each weight costs ten.
    assert allocate(curves, 90, constraint="macs", cap=1.0) == kept
    with pytest.raises(InputError, match="no point with 7"):
        curves.at({"0": 7})


def test_a_layer_that_does_nothing_goes_first_and_wholly() -> None:
    steps = [100 - 10 * k for k in range(11)]
    idle, busy = [0.0] * 11, [float(k) for k in range(11)]
    kept = allocate(_curves(idle=(steps, idle), busy=(steps, busy)), 100)
    assert kept == {"idle": 0, "busy": 100}
    # A layer that matters is never cut past the cap.
    almost = allocate(_curves(a=(steps, [0.0] * 10 + [1.0]), busy=(steps, busy)), 110)
    assert almost == {"a": 10, "busy": 100}
    with pytest.raises(BudgetError):
        allocate(_curves(busy=(steps, busy)), 5)


def test_more_sparsity_never_keeps_more() -> None:
    rng = np.random.default_rng(0)
    layers = {}
    for i in range(4):
        size = int(rng.integers(50, 400))
        counts = [size - size * k // 20 for k in range(21)]
        layers[str(i)] = (counts, np.cumsum(rng.uniform(0, 1, 21)).tolist())
    curves = _curves(**layers)
    total = sum(k[0] for k, _ in layers.values())
    kept = [sum(allocate(curves, round(total * (1 - s))).values()) for s in np.linspace(0, 0.9, 19)]
    assert all(a >= b for a, b in itertools.pairwise(kept))
    steps = max(k[0] // 20 + 1 for k, _ in layers.values())
    for share, count in zip(np.linspace(0, 0.9, 19), kept, strict=True):
        assert round(total * (1 - share)) - steps < count <= round(total * (1 - share))


def test_curves_measure_what_pruning_one_layer_does(trained: nn.Module, task: Any) -> None:
    inputs = calibration_inputs(task, samples=40, source="data", seed=1, batch_size=16)
    assert [len(x) for (x,) in inputs] == [16, 16, 8]
    macs = multiplied_weights(trained, task.example_inputs)
    masks = Masks.full(trained, list(macs))
    before = copy.deepcopy(trained.state_dict())
    for mode in ("mean", "worst"):
        curves = rd_curves(trained, inputs, masks, macs, grid=10, mode=mode, cap=0.97)
        for name, size in curves.size.items():
            points = [size - int(d / 10 * size) for d in range(11)]
            # The cap is a point of its own: the fewest weights that are at least 3 %.
            points.insert(10, math.ceil(0.03 * size))
            assert curves.kept[name].tolist() == points
            assert curves.distortion[name][0] == 0.0
            for point in (3, 7, 10, 11):
                pruned = copy.deepcopy(trained)
                weight = pruned.get_parameter(name).data.view(-1)
                gone = torch.argsort(weight.abs(), stable=True)[: size - curves.kept[name][point]]
                weight[gone] = 0.0
                difference = torch.cat(
                    [(pruned(x) - trained(x)).square().mean(1) for (x,) in inputs]
                )
                expected = difference.mean() if mode == "mean" else difference.max()
                assert curves.distortion[name][point] == pytest.approx(expected.item(), rel=1e-4)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_curves_of_a_pruned_layer_start_at_what_is_left(trained: nn.Module, task: Any) -> None:
    module = copy.deepcopy(trained)
    masks = Masks.full(module, ["9.weight"])
    small = module.get_parameter("9.weight").abs() > 0.1
    masks.narrow({"9.weight": small})
    masks.hold_weights()
    inputs = calibration_inputs(task, samples=20, source="noise", seed=1)
    curves = rd_curves(module, inputs, masks, {"9.weight": 1152}, grid=20)
    left = int(small.sum())
    points = curves.kept["9.weight"]
    assert points[0] == left and (points[1:] < left).all() and points[-1] == 0
    assert curves.distortion["9.weight"][0] == 0.0


def test_small_cuts_in_several_layers_add_up(task: Any) -> None:
    """In a linear network the sum of what each layer does tends to what both do."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 200, bias=False), nn.Linear(200, 40, bias=False))
    inputs = [(torch.randn(400, 64),)]
    masks = Masks.full(module, ["0.weight", "1.weight"])
    curves = rd_curves(module, inputs, masks, dict.fromkeys(masks.kept, 1), grid=20)
    errors = []
    for point in (12, 6, 3):
        pruned = copy.deepcopy(module)
        kept = {name: int(curves.kept[name][point]) for name in masks.kept}
        for name in masks.kept:
            weight = pruned.get_parameter(name).data.view(-1)
            weight[torch.argsort(weight.abs(), stable=True)[: len(weight) - kept[name]]] = 0.0
        joint = output_distortion(pruned, module, inputs)
        errors.append(abs(joint - curves.at(kept)) / joint)
    assert errors[0] > errors[-1] and errors[-1] < 0.05


def test_a_coarse_grid_reaches_the_cap(trained: nn.Module, task: Any) -> None:
    network = Network(trained, task.example_inputs)
    made = rate_distortion(
        network, task, sparsity=0.98, rounds=1, grid=5, samples=20, epochs=0, cpu=True
    )
    report = made.steps[-1]["report"]
    assert report["sparsity"] >= 0.98 and report["empty_layers"] == []


def test_the_step_keeps_the_budget_and_says_what_it_predicted(
    trained: nn.Module, task: Any
) -> None:
    network = Network(trained, task.example_inputs)
    made = rate_distortion(
        network, task, sparsity=0.6, rounds=2, grid=20, samples=60, epochs=0, cpu=True
    )
    report = made.steps[-1]["report"]
    total = report["weights"]
    steps = max(m.numel() // 20 + 1 for m in Masks.full(trained, list(made.storage)).kept.values())
    assert total * 0.4 - steps < report["remaining"] <= round(0.4 * total)
    last = report["curves"][-1]
    assert sum(last["kept"].values()) == report["remaining"]
    # Rounds go on from each other: nothing comes back.
    first = report["curves"][0]["kept"]
    assert all(last["kept"][name] <= first[name] for name in first)
    assert last["joint"] == pytest.approx(last["predicted"], rel=0.5)
    one = rate_distortion(
        network, task, sparsity=0.6, rounds=1, grid=20, samples=60, epochs=0, cpu=True
    )
    inputs = calibration_inputs(task, samples=60, source="data", seed=0)
    measured = output_distortion(one.module, trained, inputs)
    assert one.steps[-1]["report"]["curves"][0]["joint"] == pytest.approx(measured, rel=1e-4)


def test_it_beats_the_same_sparsity_in_every_layer(trained: nn.Module, task: Any) -> None:
    from gossamer.compress.prune.sparsify import sparsify

    network = Network(trained, task.example_inputs)
    inputs = calibration_inputs(task, samples=200, source="data", seed=9)
    ours = rate_distortion(
        network, task, sparsity=0.6, rounds=1, grid=40, samples=200, epochs=0, cpu=True
    )
    theirs = sparsify(
        network, task, sparsity=0.6, allocation="uniform", rounds=1, epochs=0, cpu=True
    )
    assert output_distortion(ours.module, trained, inputs) < 0.8 * output_distortion(
        theirs.module, trained, inputs
    )


def test_the_step_works_in_the_main_job(trained: nn.Module, task: Any, tmp_path: Path) -> None:
    options = {"sparsity": 0.7, "rounds": 2, "grid": 10, "samples": 32, "epochs": 2,
               "calibration": "noise", "constraint": "macs"}  # fmt: skip
    recipe = Recipe.of(("rate-distortion", options))
    result = gossamer.shrink(trained, task, recipe=recipe, out=tmp_path / "out", cpu=True)
    after = result.report["after"]
    assert after["macs_effective"] <= 0.31 * after["macs"]
    assert result.report["packed"]["agreement"] == 1.0


def test_bad_input_is_one_sentence(task: Any) -> None:
    network = Network(mlp((64, 10)), task.example_inputs)
    with pytest.raises(InputError, match=r"\[0, 1\)"):
        rate_distortion(network, task, sparsity=1.0)
    with pytest.raises(InputError, match="1 sample or more"):
        rate_distortion(network, task, samples=0)
    with pytest.raises(InputError, match="a cap in"):
        rate_distortion(network, task, cap=0.0)
    with pytest.raises(InputError, match="need calibration inputs"):
        rd_curves(network.module, [], Masks.full(network.module, ["1.weight"]), {"1.weight": 1})
