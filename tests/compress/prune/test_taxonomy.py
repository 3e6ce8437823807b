"""The table of methods: every value is one of its axis, everything that is said to be here is."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys

import pytest

from gossamer.compress.prune.taxonomy import (
    VALUES,
    Method,
    compare,
    find,
    methods,
    named,
    recommend,
    to_markdown,
)
from gossamer.compress.recipe import STEPS, Recipe, Step
from gossamer.core.errors import InputError


@pytest.mark.parametrize("method", methods(), ids=lambda m: m.name)
def test_every_row_is_valid(method: Method) -> None:
    for axis, allowed in VALUES.items():
        value = getattr(method, axis)
        values = value if isinstance(value, tuple) else (value,)
        assert values and set(values) <= set(allowed), axis
    assert 1985 < method.year < 2030 and method.paper
    if method.implemented_by is None:
        assert not method.options
        return
    module, _, name = method.implemented_by.partition(":")
    function = getattr(importlib.import_module(module), name)
    assert callable(function)
    steps = [step for step, place in STEPS.items() if place == method.implemented_by]
    if steps:
        # What only the user knows, as the base of a delta, is no part of a method.
        required = {
            p.name: "given"
            for p in inspect.signature(function).parameters.values()
            if p.kind is p.KEYWORD_ONLY and p.default is p.empty and p.name != "teacher"
        }
        Step(steps[0], required | dict(method.options))  # refuses options that it has not
    else:
        assert set(method.options) <= set(inspect.signature(function).parameters)


def test_names_are_unique_and_there_are_enough() -> None:
    names = [m.name for m in methods()]
    assert len(set(names)) == len(names) >= 60
    assert sum(m.implemented_by is not None for m in methods()) >= 30


def test_the_classic_answers() -> None:
    before = [m.name for m in find(when="before-training")]
    classic = ["SNIP", "GraSP", "SynFlow", "Random pruning"]
    assert before == [*classic, "FORCE", "ProsPr", "3SP"]
    assert [m.name for m in find(when="before-training", structured=True)] == ["3SP"]
    assert [m.name for m in find(when="before-training", data="none")] == classic[2:]
    assert {m.name for m in find(when="run-time")} == {
        "Feature boosting and suppression", "Runtime neural pruning", "SkipNet", "BranchyNet",
    }  # fmt: skip
    llm = {m.name for m in find(architectures="llm", data="unlabelled", implemented=True)}
    assert {"Wanda", "SparseGPT", "Wanda 2:4", "SparseGPT 2:4"} <= llm
    # Methods for any architecture are methods for this one.
    assert "Magnitude pruning" in {m.name for m in find(architectures="gnn")}
    assert all(m.structured for m in find(structured=True))
    assert find() == list(methods())


def test_two_methods_differ_where_they_do() -> None:
    assert compare("SparseGPT", "Wanda") == {
        "criterion": ("reconstruction", "activation"),
        "fusion": (("quantization",), ("none",)),
    }
    assert named("snip").name == "SNIP"
    table = to_markdown(find(when="before-training"))
    assert table.count("\n") == 8 and "| SNIP | 2019 |" in table


def test_bad_questions_are_answered_with_what_there_is() -> None:
    with pytest.raises(InputError, match="did you mean before-training"):
        find(when="before-trainings")
    with pytest.raises(InputError, match="methods have no 'colour'"):
        find(colour="red")
    with pytest.raises(InputError, match="did you mean SNIP"):
        named("SNOP")
    with pytest.raises(InputError, match="latency or size"):
        recommend(want="fame")
    with pytest.raises(InputError, match="no architecture"):
        recommend(architecture="abacus")
    with pytest.raises(InputError, match=r"\(0, 1\)"):
        recommend(sparsity=1.0)


@pytest.mark.parametrize(
    ("situation", "first"),
    [
        ({"want": "latency"}, "Taylor (weights)"),
        ({"want": "latency", "data": "none"}, "DepGraph"),
        ({"want": "size", "epochs": 5.0}, "LAMP"),
        ({"want": "size", "epochs": 60.0}, "Rate-distortion allocation"),
        ({"want": "size", "sparsity": 0.98}, "Rate-distortion allocation"),
        ({"want": "size", "epochs": 0.0, "architecture": "llm", "data": "unlabelled"}, "SparseGPT"),
        ({"n_of_m_hardware": True, "data": "unlabelled", "epochs": 0.0}, "SparseGPT 2:4"),
        ({"n_of_m_hardware": True, "data": "none", "epochs": 0.0}, "2:4 by magnitude"),
        ({"want": "size", "pretrained": False, "data": "none", "epochs": 0.0}, "SynFlow"),
        ({"want": "size", "pretrained": False, "epochs": 50.0}, "RigL"),
    ],
)
def test_recommendations(situation: dict, first: str) -> None:  # type: ignore[type-arg]
    advice = recommend(**situation)
    assert advice[0].method == first
    for one in advice:
        named(one.method)
        assert one.why
        # Each is a recipe that can be run.
        steps = [next(iter(step.items())) for step in one.recipe]
        assert Recipe.of(*steps).steps


def test_the_command_line_asks_the_same_table() -> None:
    def asked(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "gossamer.cli", "systems", *arguments],
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    found = asked("--when", "before-training", "--unstructured", "--data", "none", "--json")
    assert [m["name"] for m in json.loads(found.stdout)] == ["SynFlow", "Random pruning"]
    assert json.loads(asked("--structured", "--here", "--json").stdout)
    wrong = asked("--when", "never")
    assert wrong.returncode == 2 and "when is never 'never'" in wrong.stderr
