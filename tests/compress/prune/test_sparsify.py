"""Single weights: exact counts, known allocations, zeros that stay, rewinding to the bit."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gossamer
from gossamer.compress.prune.layer_allocation import ALLOCATIONS, filled, random
from gossamer.compress.prune.rewind import Retraining, prune_and_retrain
from gossamer.compress.prune.sparsify import limited, sparsify
from gossamer.compress.prune.weight_scores import (
    CRITERIA,
    keep_in_each,
    keep_overall,
    mean_gradients,
)
from gossamer.compress.recipe import Recipe
from gossamer.core.errors import InputError
from gossamer.core.graph import Graph
from gossamer.core.network import Network
from gossamer.datasets import open_task
from gossamer.models.plain import mlp
from gossamer.parts.masks import Masks
from gossamer.parts.packed import PackedNetwork


@pytest.fixture(scope="module")
def task() -> Any:
    return open_task("digits", limit=200)


@pytest.fixture(scope="module")
def trained(task: Any) -> nn.Module:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = mlp((64, 32, 10))
    Retraining(epochs=5, lr=0.05).train(module, task)
    return module


def test_lamp_scores_decide_as_worked_by_hand() -> None:
    """w = (1, -2, 3, -4) has scores (1/30, 4/29, 9/25, 1)."""
    weights = {"a": torch.tensor([1.0, -2, 3, -4]), "b": torch.tensor([10.0, 1.0])}
    scores = {name: w.abs() for name, w in weights.items()}
    # b's scores are 1 and 1/101, so of six weights the order of removal is
    # b1 (.0099), a0 (.033), a1 (.138), a2 (.36); the largest of each layer are never removed.
    lamp = ALLOCATIONS["lamp"]
    assert [lamp(weights, scores, keep) for keep in (5, 4, 3, 2)] == [
        {"a": 4, "b": 1},
        {"a": 3, "b": 1},
        {"a": 2, "b": 1},
        {"a": 1, "b": 1},
    ]


def test_erk_follows_the_sum_over_the_product_of_the_axes() -> None:
    conv, linear = torch.zeros(16, 3, 3, 3), torch.zeros(10, 64)
    weights = {"conv": conv, "linear": linear}
    keep = ALLOCATIONS["erk"](weights, {}, 99)
    # Raw counts are 25 and 74: densities 25/432 and 74/640.
    assert keep == {"conv": 25, "linear": 74}
    many = ALLOCATIONS["erk"](weights, {}, 1000)
    assert many == {"conv": 360, "linear": 640}  # the linear layer is full, the rest goes on


def test_uniform_plus_spares_the_ends() -> None:
    weights = {n: torch.zeros(s) for n, s in (("a", 100), ("b", 1000), ("c", 500), ("d", 50))}
    found = ALLOCATIONS["uniform+"](weights, {}, 300)
    assert found["a"] == 100 and found["d"] == 10
    assert (found["b"], found["c"]) == (127, 63)
    assert sum(found.values()) == 300
    # At extreme sparsity the ends leave half to the layers between.
    thin = ALLOCATIONS["uniform+"](weights, {}, 60)
    assert thin == {"a": 20, "b": 20, "c": 10, "d": 10}


@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=6),
    st.floats(0, 1),
    st.sampled_from([*sorted(ALLOCATIONS), "random"]),
    st.integers(0, 99),
)
def test_allocations_keep_exactly_what_is_asked(
    sizes: list[int], share: float, name: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = {str(i): torch.randn(n, generator=generator) for i, n in enumerate(sizes)}
    keep = round(share * sum(sizes))
    allocate = random(seed) if name == "random" else ALLOCATIONS[name]
    found = allocate(weights, {n: w.abs() for n, w in weights.items()}, keep)
    assert sum(found.values()) == keep
    assert all(0 <= found[n] <= w.numel() for n, w in weights.items())


def test_what_stays_is_exact_and_ties_go_by_index() -> None:
    scores = {"a": torch.tensor([1.0, 1.0, 1.0, 2.0]), "b": torch.tensor([[1.0, 3.0]])}
    alive = {"a": torch.tensor([True, True, True, True]), "b": torch.tensor([[True, True]])}
    kept = keep_overall(scores, alive, 4)
    assert kept["a"].tolist() == [False, False, True, True]
    assert kept["b"].tolist() == [[True, True]]
    alive["a"][3] = False
    kept = keep_in_each(scores, alive, {"a": 2, "b": 1})
    assert kept["a"].tolist() == [False, True, True, False]
    assert kept["b"].tolist() == [[False, True]]
    with pytest.raises(InputError, match="4 weights cannot stay where 3 are left"):
        keep_in_each(scores, alive, {"a": 4, "b": 1})
    assert filled({"a": torch.zeros(3), "b": torch.zeros(3)}, {"a": 1, "b": 1}, 3) == {
        "a": 2,
        "b": 1,
    }


def test_layers_that_are_nearly_empty_pass_their_share_on() -> None:
    module = mlp((4, 4, 4))
    masks = Masks(
        module,
        {"1.weight": torch.eye(4) > 0, "3.weight": torch.ones(4, 4, dtype=torch.bool)},
    )
    assert limited({"1.weight": 8, "3.weight": 8}, masks) == {"1.weight": 4, "3.weight": 12}


def test_mean_gradients_are_those_of_the_mean_loss(trained: nn.Module, task: Any) -> None:
    found = mean_gradients(trained, ["1.weight"], task, seed=3, samples=64, batch_size=32)
    batches = list(itertools.islice(task.batches("train", batch_size=32, seed=3), 2))
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    loss = nn.functional.cross_entropy(trained(images), labels)
    (expected,) = torch.autograd.grad(loss, [trained.get_parameter("1.weight")])
    torch.testing.assert_close(found["1.weight"], expected)


def test_rewinding_sets_survivors_back_to_the_bit(trained: nn.Module, task: Any) -> None:
    module = copy.deepcopy(trained)
    start = copy.deepcopy(mlp((64, 32, 10)).state_dict())
    masks = Masks.full(module, ["1.weight", "3.weight"])
    seen = []

    def choose(now: nn.Module, masks: Masks, number: int) -> Any:
        seen.append({n: t.clone() for n, t in now.state_dict().items()})
        scores = CRITERIA["magnitude"](now, list(masks.kept), task, 0)
        return keep_overall(scores, masks.kept, round(0.8 * masks.remaining))

    records = prune_and_retrain(
        module, task, masks, choose, rounds=2, retraining=Retraining(epochs=0), rewind=start,
        observe=lambda m, k: {"zeros": int((m.get_parameter("1.weight") == 0).sum())},
    )  # fmt: skip
    for name, mask in masks.kept.items():
        now = module.get_parameter(name)
        assert torch.equal(now[mask], start[name][mask])
        assert not bool(now[~mask].any())
    for name in ("1.bias", "3.bias"):
        assert torch.equal(module.get_parameter(name), start[name])
    total = 64 * 32 + 320
    first = round(0.8 * total)
    assert [r["remaining"] for r in records] == [first, round(0.8 * first)]
    assert records[-1]["zeros"] == int((~masks.kept["1.weight"]).sum())
    assert len(seen) == 2


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
@pytest.mark.parametrize("rewind", ["none", "start"])
def test_the_step_reaches_the_sparsity_exactly(
    trained: nn.Module, task: Any, criterion: str, rewind: Any
) -> None:
    network = Network(trained, task.example_inputs)
    made = sparsify(
        network, task, sparsity=0.9, criterion=criterion, rounds=3, rewind=rewind, epochs=3,
        cpu=True,
    )  # fmt: skip
    report = made.steps[-1]["report"]
    total = 64 * 32 + 320
    assert report["remaining"] == total - round(0.9 * total) == 237
    zeros = sum(int((made.module.get_parameter(n) == 0).sum()) for n in ("1.weight", "3.weight"))
    assert zeros == total - 237
    shares = [r["sparsity"] for r in report["rounds_run"]]
    assert shares == pytest.approx([1 - 0.1 ** (k / 3) for k in (1, 2, 3)], abs=1e-3)
    assert made.storage == {"1.weight": "sparse", "3.weight": "sparse"}


def test_magnitude_beats_random(trained: nn.Module, task: Any) -> None:
    network = Network(trained, task.example_inputs)
    options = {"sparsity": 0.8, "rounds": 1, "schedule": "one-shot", "epochs": 0, "cpu": True}
    scores = {
        name: task.score(sparsify(network, task, criterion=name, **options).module)
        for name in ("magnitude", "random")
    }
    assert scores["magnitude"] > scores["random"] + 10


def test_a_second_step_prunes_on_and_skipped_layers_stay_dense(
    trained: nn.Module, task: Any
) -> None:
    network = Network(trained, task.example_inputs)
    first = sparsify(network, task, sparsity=0.5, rounds=1, epochs=0, cpu=True)
    second = sparsify(first, task, sparsity=0.8, rounds=1, epochs=1, cpu=True)
    for name in ("1.weight", "3.weight"):
        gone = first.module.get_parameter(name) == 0
        assert not bool(second.module.get_parameter(name)[gone].any())
    spared = sparsify(network, task, sparsity=0.5, skip=["3"], rounds=1, epochs=0, cpu=True)
    assert set(spared.storage) == {"1.weight"}
    assert bool((spared.module.get_parameter("3.weight") != 0).all())


def test_the_step_works_in_the_main_job(trained: nn.Module, task: Any, tmp_path: Path) -> None:
    recipe = Recipe.of(("sparsify", {"sparsity": 0.9, "rounds": 2, "epochs": 2}), ("finetune", {
        "epochs": 1
    }))  # fmt: skip
    result = gossamer.shrink(trained, task, recipe=recipe, out=tmp_path / "out", cpu=True)
    report = result.report
    # Fine-tuning made other values, the zeros stayed.
    assert report["packed"]["agreement"] == 1.0
    assert report["after"]["macs_effective"] == pytest.approx(0.1 * report["after"]["macs"], abs=1)
    only = Recipe.of(("sparsify", {"sparsity": 0.9, "rounds": 1, "epochs": 1}))
    result = gossamer.shrink(trained, task, recipe=only, out=tmp_path / "packed", cpu=True)
    packed = result.report["packed"]
    assert packed["bytes"] < 0.35 * packed["float_bytes"]
    read = PackedNetwork.load(tmp_path / "packed" / "packed.safetensors")
    assert Graph.trace(result.module, task.example_inputs).parameters == 64 * 32 + 32 + 330
    assert read.nbytes() == result.report["steps"][-1]["report"]["packed_bytes"]


def test_a_killed_run_goes_on_to_the_same_weights(
    trained: nn.Module, task: Any, tmp_path: Path
) -> None:
    network = Network(trained, task.example_inputs)
    options: dict[str, Any] = {"sparsity": 0.9, "rounds": 2, "epochs": 4, "cpu": True}
    whole = sparsify(network, task, **options)
    place = tmp_path / "state"
    sparsify(network, task, checkpoint=place, **options)
    # As if it had been killed in the second round: the first round's file is there.
    for path in tmp_path.iterdir():
        if "part1" in path.name:
            path.unlink()
    again = sparsify(network, task, checkpoint=place, **options)
    for name, tensor in whole.module.state_dict().items():
        assert torch.equal(tensor, again.module.state_dict()[name]), name


def test_bad_input_is_one_sentence(trained: nn.Module, task: Any) -> None:
    network = Network(trained, task.example_inputs)
    for share in (-0.1, 1.0, 3.0):
        with pytest.raises(InputError, match=r"share in \[0, 1\)"):
            sparsify(network, task, sparsity=share)
    with pytest.raises(InputError, match="there is no best"):
        sparsify(network, task, criterion="best")
    with pytest.raises(InputError, match="no part 'head'"):
        sparsify(network, task, skip=["head"])
