"""The search: which trials are better, which are on the front, and that it replays what it did."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gossamer.compress.budget import Budget
from gossamer.compress.planner import (
    PACKED_VALUES,
    SHAPES,
    VALUES,
    Planner,
    Timer,
    costs,
    mark_front,
    ranked,
    recipe_of,
)
from gossamer.compress.recipe import Recipe
from gossamer.compress.workspace import Workspace
from gossamer.core.errors import BudgetError
from gossamer.core.network import Network
from gossamer.datasets import open_task
from gossamer.hardware.predictor import LookupTable
from gossamer.models.plain import mlp


def trial(number: int, score: float | None, latency: float = 1.0, **other: Any) -> dict[str, Any]:
    row = {"number": number, "score": score, "latency": latency, "size": 1.0, "broken": []}
    return row | {"drop": None if score is None else 90.0 - score} | other


def test_the_front_is_what_brute_force_finds() -> None:
    drawn = random.Random(0)
    for _ in range(20):
        trials = [
            trial(
                n, drawn.choice([None, *range(80, 86)]), drawn.randrange(5), size=drawn.randrange(5)
            )
            for n in range(25)
        ]
        mark_front(trials)
        for one in trials:
            if one["score"] is None:
                assert one["on_front"] is False
                continue
            mine = (-one["score"], one["latency"], one["size"])
            others = [
                (-t["score"], t["latency"], t["size"]) for t in trials if t["score"] is not None
            ]
            beaten = any(
                all(a <= b for a, b in zip(other, mine, strict=True)) and other != mine
                for other in others
            )
            assert one["on_front"] is (not beaten)


def test_a_front_of_nothing() -> None:
    trials = [trial(0, None)]
    mark_front(trials)
    mark_front([])
    assert trials[0]["on_front"] is False


def test_order_of_trials() -> None:
    over = trial(0, 95.0, broken=["--macs"])
    safe_fast, safe_slow = trial(1, 89.6, 1.0), trial(2, 89.9, 2.0)
    fastest_but_unsafe, unsafe = trial(3, 89.4, 0.1), trial(4, 88.0, 0.1)
    failed = trial(5, None)
    expected = [safe_fast, safe_slow, fastest_but_unsafe, unsafe, over, failed]
    for order in itertools.permutations(expected):
        assert [t["number"] for t in ranked(order, 1.0)] == [t["number"] for t in expected]
    # Where no drop is named the more accurate one is better.
    assert [t["number"] for t in ranked([safe_fast, safe_slow, unsafe], None)] == [2, 1, 4]


CHOICES = {
    "criterion": "taylor", "allocation": "global", "keep": 0.49, "multiple": 8,
    "recovery": "distil", "rounds": 2, "values": "int8", "measure": "macs", "shape": "prune",
    "sparsity": 0.8, "bits": 3,
}  # fmt: skip


def test_the_recipe_of_a_trial() -> None:
    recipe = recipe_of(CHOICES, 7)
    assert [s.name for s in recipe.steps] == ["prune", "distil", "prune", "distil", "int8"]
    assert recipe.steps[0].options["macs"] == recipe.steps[2].options["macs"] == 0.7
    assert recipe.steps[1].options["epochs"] + recipe.steps[3].options["epochs"] == 7
    plain = recipe_of(CHOICES | {"rounds": 1, "values": "float", "recovery": "finetune"}, 4)
    assert [s.name for s in plain.steps] == ["prune", "finetune"]
    assert plain.steps[0].options["macs"] == 0.49
    assert "parameters" in recipe_of(CHOICES | {"measure": "parameters"}, 4).steps[0].options


def test_recipes_of_every_shape_and_form() -> None:
    """Each names steps and options that exist, and spends the epochs it was given."""
    for shape, values in itertools.product(("none", *SHAPES), (*VALUES, *PACKED_VALUES)):
        recipe = recipe_of(CHOICES | {"shape": shape, "values": values, "rounds": 1}, 9)
        spent = sum(int(s.options.get("epochs", 0)) for s in recipe.steps)
        assert spent == 9, recipe.to_yaml()
        names = [s.name for s in recipe.steps]
        first = {"none": "distil", "prune": "prune", "low-rank": "svd", "bip": "bip"}[shape]
        last = {
            "float": "distil", "int8": "int8", "sparse": "rate-distortion",
            "few-bits": "quantized-distillation", "codebook": "codebook",
        }[values]  # fmt: skip
        assert (names[0], names[-1]) == (first, last)


def test_packed_forms_are_tried_where_the_size_is_limited(tmp_path: Path) -> None:
    def proposed(**budget: Any) -> set[str]:
        search = planner(tmp_path / str(len(budget)), **budget)
        base = {"macs": 1.0, "params": 1.0, "size": 1.0, "latency": 1.0}
        found = [search._propose(n, base, []) for n in range(30)]
        shapes = {p["shape"] for p in found}
        assert ("none" in shapes) == ("macs" not in budget)
        return {p["values"] for p in found}

    assert proposed(macs=0.5) == set(VALUES)
    assert proposed(size=0.2, max_drop=1.0) == {*VALUES, *PACKED_VALUES}


def small() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
        )  # fmt: skip


def test_predicted_costs_rank_as_measured_ones(tmp_path: Path, one_thread: None) -> None:
    task = open_task("digits")
    networks = {
        f"{width}": Network(mlp((64, width, width, 10)), task.example_inputs)
        for width in (1024, 128, 512)
    }
    timer, table = Timer(batch=32), LookupTable()
    rows, made = costs(networks, task.example_inputs, tmp_path, timer, table=table)
    assert rows["128"]["latency"] < rows["512"]["latency"] < rows["1024"]["latency"]
    assert rows["1024"]["speedup"] == 1.0
    faster = rows["1024"]["latency"] / rows["128"]["latency"]
    assert rows["128"]["speedup"] == pytest.approx(faster)
    assert rows["512"]["size"] == made["512"].onnx.stat().st_size
    macs = 64 * 128 + 128 * 128 + 1280
    assert rows["128"]["macs"] == macs


def planner(folder: Path, **budget: Any) -> Planner:
    task = open_task("digits")
    return Planner(
        dense=Network(small(), task.example_inputs),
        task=task,
        budget=Budget.of(**budget),
        workspace=Workspace(folder, {}),
        seconds=0.1,
        timer=Timer(batch=8, rounds=3),
        cpu=True,
    )


@pytest.mark.slow
def test_a_search_replays_its_finished_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    tried: list[tuple[int, int]] = []
    true_try = Planner._try
    stop_after = 2

    def counted(self: Planner, number: int, rung: int, *args: Any) -> dict[str, Any]:
        if len(tried) == stop_after:
            raise KeyboardInterrupt
        row = true_try(self, number, rung, *args)
        tried.append((number, rung))
        return row

    monkeypatch.setattr(Planner, "_try", counted)
    with pytest.raises(KeyboardInterrupt):
        planner(tmp_path, macs=0.7).run()
    kept = {p.name: p.read_bytes() for p in (tmp_path / ".work" / "trials").iterdir()}
    assert len(kept) == len(tried) == 2
    stop_after = math.inf  # type: ignore[assignment]
    recipe, trials = planner(tmp_path, macs=0.7).run()
    assert len(tried) == len(set(tried)) == len(trials) >= 4
    now = {p.name: p.read_bytes() for p in (tmp_path / ".work" / "trials").iterdir()}
    assert {name: now[name] for name in kept} == kept
    # All are told relative to one measurement of the original, also after the interruption.
    products = [t["latency"] * t["speedup"] for t in trials if t["score"] is not None]
    assert max(products) == pytest.approx(min(products))
    # Many recipes are ranked by what the table of operators says, the better ones are measured.
    assert {(t["rung"], t["latency_is"]) for t in trials} <= {
        (0, "predicted"), (1, "measured"), (2, "measured"),
    }  # fmt: skip
    assert LookupTable(path=tmp_path / ".work" / "operator-times.json").times
    (chosen,) = [t for t in trials if t["chosen"]]
    assert not chosen["broken"]
    assert recipe.steps[0] == Recipe.from_json(chosen["recipe"]).steps[0]
    # A finished search is not repeated.
    before = len(tried)
    again, _ = planner(tmp_path, macs=0.7).run()
    assert again == recipe and len(tried) == before


def test_a_budget_out_of_reach_is_named_with_the_nearest(tmp_path: Path) -> None:
    search = planner(tmp_path, macs="50", size="100")
    far = trial(0, 95.0, rung=0, broken=["--macs 50 (nearest: 80)", "--size 100 (nearest: 900)"])
    near = trial(1, 70.0, rung=0, broken=["--size 100 (nearest: 200)"])
    with pytest.raises(
        BudgetError, match=r"no recipe meets --size 100 \(nearest: 200\) among the 2"
    ):
        search._choose([far | {"excess": 8.6}, near | {"excess": 1.0}], {}, 3)
    lost = trial(0, None, rung=0, failed="the loss became nan")
    with pytest.raises(BudgetError, match="no recipe could be applied: the loss became nan"):
        search._choose([lost], {}, 3)


def test_finalists_come_from_the_longest_rung(tmp_path: Path) -> None:
    early = trial(0, 99.0, rung=0, choices=CHOICES)
    late = trial(1, 90.0, rung=1, choices=CHOICES | {"rounds": 1})
    over = trial(2, 99.0, rung=2, broken=["--macs"])
    chosen = planner(tmp_path, macs=0.5)._choose([early, late, over], {}, 5)
    assert chosen == {"recipe": recipe_of(late["choices"], 5).to_json(), "trial": 1}
