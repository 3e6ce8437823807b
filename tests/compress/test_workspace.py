"""The working folder: finished pieces are kept, half ones are swept, other runs are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gossamer.compress.recipe import Recipe
from gossamer.compress.workspace import CopyOf, Workspace
from gossamer.core.errors import InputError
from gossamer.core.files import exclusive
from gossamer.core.network import Network


def test_records_come_back_in_order(tmp_path: Path) -> None:
    work = Workspace(tmp_path, {"seed": 0})
    assert work.record("chosen") is None
    for number in (2, 0, 1):
        work.keep(f"trials/0-{number:03d}", {"number": number})
    assert [row["number"] for row in Workspace(tmp_path, {"seed": 0}).records("trials")] == [
        0,
        1,
        2,
    ]
    work.keep("chosen", {"a": 1.5})
    assert work.record("chosen") == {"a": 1.5}
    work.clear("chosen")
    work.clear("trials")
    assert work.record("chosen") is None and list(work.records("trials")) == []


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    settings = {"model": "a", "options": (1, 2), "seed": 0}
    Workspace(tmp_path, settings)
    Workspace(tmp_path, settings)  # tuples become lists on disk; that is no other run
    with pytest.raises(InputError, match="holds a run with another seed; choose another --out"):
        Workspace(tmp_path, settings | {"seed": 1})


@pytest.mark.parametrize("text", ["[]", "{", "3", ""])
def test_a_damaged_record_of_the_run_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / ".work").mkdir()
    (tmp_path / ".work" / "settings.json").write_text(text)
    with pytest.raises(InputError, match=r"settings\.json"):
        Workspace(tmp_path, {"seed": 0})


def test_what_a_killed_run_was_writing_is_swept(tmp_path: Path) -> None:
    work = Workspace(tmp_path, {})
    work.keep("steps/done", {})
    half = [
        tmp_path / ".work" / "steps" / ".0-prune.abc.part",
        tmp_path / ".work" / "steps" / ".0-prune.abc.old",
        tmp_path / ".work" / ".dense.safetensors.abc.part",
        tmp_path / ".report.json.abc.part",
    ]
    for path in half[:2]:
        path.mkdir()
        (path / "network.json").write_text("half")
    for path in half[2:]:
        path.write_text("half")
    mine = tmp_path / ".notes.part"
    mine.write_text("the user's")
    Workspace(tmp_path, {})
    assert not any(path.exists() for path in half)
    assert mine.exists() and work.record("steps/done") == {}


def test_a_folder_is_held_by_one_run(tmp_path: Path) -> None:
    with exclusive(tmp_path):
        second = exclusive(tmp_path)
        with pytest.raises(InputError, match="in use by another run"):
            second.__enter__()
    with exclusive(tmp_path):
        pass


class Steps:
    """Steps that count how often they run; the second can be interrupted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran: list[str] = []
        self.interrupt = False
        monkeypatch.setattr("gossamer.compress.recipe.step_function", self.of)

    def of(self, name: str) -> Any:
        def step(network: Network, task: Any, *, lr: float = 1.0, seed: int = 0) -> Network:
            if self.interrupt and len(self.ran) == 1:
                raise KeyboardInterrupt
            self.ran.append(name)
            module = nn.Linear(3, 2)
            with torch.no_grad():
                for p in module.parameters():
                    p.fill_(float(network.module(torch.ones(1, 3)).sum()) + lr + seed % 7)
            written: Any = (lambda path: path.write_bytes(b"file")) if name == "int8" else None
            return network.after(name, {"lr": lr}, {}, module=module, write_onnx=written)

        return step


def test_finished_steps_are_read_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    recipe = Recipe.of(("finetune", {"lr": 0.5}), ("distil", {"lr": 0.25}), "int8")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = Network(nn.Linear(3, 2), (torch.ones(2, 3),), origin={"model": "dense"})
    whole = Workspace(tmp_path / "whole", {}).apply(recipe, dense, None, seed=1)  # type: ignore[arg-type]
    assert steps.ran == ["finetune", "distil", "int8"]

    steps.ran, steps.interrupt = [], True
    with pytest.raises(KeyboardInterrupt):
        Workspace(tmp_path / "cut", {}).apply(recipe, dense, None, seed=1)  # type: ignore[arg-type]
    steps.interrupt = False
    cut = Workspace(tmp_path / "cut", {}).apply(recipe, dense, None, seed=1)  # type: ignore[arg-type]
    assert steps.ran == ["finetune", "distil", "int8"], "the first is not repeated"

    x = torch.randn(4, 3)
    assert torch.equal(whole.module(x), cut.module(x))
    assert [s["step"] for s in cut.steps] == ["finetune", "distil", "int8"]
    assert cut.origin == {"model": "dense"} and cut.steps == whole.steps
    assert isinstance(cut.write_onnx, CopyOf)
    cut.write_onnx(tmp_path / "copy.onnx")
    assert (tmp_path / "copy.onnx").read_bytes() == b"file"


def test_a_doctored_step_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Steps(monkeypatch)
    recipe = Recipe.of("finetune")
    dense = Network(nn.Linear(3, 2), (torch.ones(2, 3),))
    Workspace(tmp_path, {}).apply(recipe, dense, None, seed=1)  # type: ignore[arg-type]
    path = tmp_path / ".work" / "steps" / "0-finetune" / "network.json"
    path.write_text(path.read_text().replace('"origin"', '"other"'))
    with pytest.raises(InputError, match="its record lacks origin"):
        Workspace(tmp_path, {}).apply(recipe, dense, None, seed=1)  # type: ignore[arg-type]
