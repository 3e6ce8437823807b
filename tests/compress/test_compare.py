"""Recipes side by side: measured on files, intervals over seeds, a front that is one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gossamer.compress.compare import compare
from gossamer.compress.prune.rewind import Retraining
from gossamer.compress.recipe import Recipe
from gossamer.core.errors import InputError
from gossamer.core.export import OnnxRunner
from gossamer.datasets import open_task
from gossamer.models.plain import mlp

RECIPES = {
    "half": Recipe.of(("prune", {"macs": 0.5, "epochs": 1})),
    "sparse": Recipe.of(("sparsify", {"sparsity": 0.9, "rounds": 1, "epochs": 1})),
    "impossible": Recipe.of(("prune", {"macs": 0.0001, "epochs": 0})),
    "nothing": Recipe.of(("finetune", {"epochs": 0})),
}


@pytest.fixture(scope="module")
def task() -> Any:
    torch.set_num_threads(1)
    return open_task("digits", limit=200)


@pytest.fixture(scope="module")
def dense(task: Any) -> nn.Module:
    torch.manual_seed(0)
    module = mlp((64, 48, 10))
    Retraining(epochs=6, lr=0.05).train(module, task)
    return module


@pytest.fixture(scope="module")
def made(dense: nn.Module, task: Any, tmp_path_factory: Any) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("compare") / "out"
    return compare(dense, task, RECIPES, out=out, seeds=(0, 1, 2), rounds=5, cpu=True), out


def test_every_recipe_is_measured_on_its_files(made: Any, task: Any) -> None:
    result, out = made
    assert json.loads((out / "compare.json").read_text()) == json.loads(json.dumps(result))
    assert (out / "compare.png").stat().st_size > 10_000
    half, sparse = result["recipes"]["half"], result["recipes"]["sparse"]
    files = out / ".work" / "files"
    for seed, run in zip((0, 1, 2), half["runs"], strict=True):
        file = files / f"half-{seed}" / "model.onnx"
        assert run["onnx_bytes"] == run["deployed_bytes"] == file.stat().st_size
        assert run["score"] == task.score(OnnxRunner(file), "test")
    assert half["means"]["macs"][0] <= 0.5 * result["dense"]["macs"]
    assert sparse["runtime"] == "packed"
    assert sparse["means"]["macs_effective"][0] == pytest.approx(
        0.1 * result["dense"]["macs"], abs=1
    )
    run = sparse["runs"][0]
    stored = (files / "sparse-0" / "packed.safetensors").stat().st_size
    assert run["packed_bytes"] == stored
    assert run["deployed_bytes"] == stored + (files / "sparse-0" / "network.json").stat().st_size
    assert len(sparse["packed_speedup"]) == 3


def test_intervals_are_those_of_the_seeds(made: Any) -> None:
    result, _ = made
    half = result["recipes"]["half"]
    scores = [run["score"] for run in half["runs"]]
    mean, width = half["means"]["score"]
    assert mean == pytest.approx(np.mean(scores))
    # 4.302653 is the 97.5 % point of t with two degrees of freedom.
    assert width == pytest.approx(4.302653 * np.std(scores, ddof=1) / np.sqrt(3), rel=1e-5)


def test_the_front_holds_what_nobody_beats(made: Any) -> None:
    recipes = made[0]["recipes"]
    good = {n: r for n, r in recipes.items() if r["failed"] is None}

    def point(record: Any) -> list[float]:
        means = record["means"]
        return [
            -means["validation_score"][0], means["deployed_bytes"][0], record["latency"],
            means["macs_effective"][0],
        ]  # fmt: skip

    for name, record in good.items():
        beaten = any(
            all(a <= b for a, b in zip(point(other), point(record), strict=True))
            and point(other) != point(record)
            for key, other in good.items()
            if key != name
        )
        assert record["on_front"] == (not beaten), name
    assert recipes["half"]["on_front"] or recipes["sparse"]["on_front"]


def test_a_recipe_that_fails_says_why_and_the_others_go_on(made: Any) -> None:
    record = made[0]["recipes"]["impossible"]
    assert "cannot be met" in record["failed"] and not record["on_front"]


def test_a_run_goes_on_from_what_is_there(made: Any, dense: nn.Module, task: Any) -> None:
    result, out = made
    again = compare(dense, task, RECIPES, out=out, seeds=(0, 1, 2), rounds=5, cpu=True)
    for name in ("half", "sparse"):
        for a, b in zip(
            result["recipes"][name]["runs"], again["recipes"][name]["runs"], strict=True
        ):
            assert a == b
    with pytest.raises(InputError, match="another recipes"):
        compare(dense, task, {"half": RECIPES["half"]}, out=out, cpu=True)


def test_bad_input_is_one_sentence(dense: nn.Module, task: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one recipe"):
        compare(dense, task, {}, out=tmp_path)
    with pytest.raises(InputError, match="must differ"):
        compare(dense, task, RECIPES, out=tmp_path, seeds=(1, 1))
