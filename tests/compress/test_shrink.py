"""The main job in one process: what comes out is what was measured, and it can be used again."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import gossamer
from gossamer.compress.recipe import Recipe
from gossamer.compress.report import page
from gossamer.compress.shrink import Shrunk
from gossamer.core.errors import BudgetError, InputError, UnsupportedError
from gossamer.core.graph import Graph
from gossamer.core.network import Network
from gossamer.core.saved import load_network, read_weights
from gossamer.datasets import open_task

RECIPE = Recipe.of(
    ("prune", {"macs": 0.6, "round_to": 4, "criterion": "l2", "epochs": 0}),
    ("finetune", {"epochs": 2}),
    "int8",
)
FILES = {
    "model.onnx", "model.pt2", "weights.safetensors", "network.json", "recipe.yaml",
    "report.html", "report.json",
}  # fmt: skip


def small(width: int = 8) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * width, 10),
        )  # fmt: skip


@pytest.fixture(scope="module")
def task() -> Any:
    return open_task("digits")


@pytest.fixture(scope="module")
def made(task: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Shrunk]:
    torch.set_num_threads(1)
    module = small()
    result = gossamer.shrink(
        module, task, recipe=RECIPE, trained=False, epochs=3, seed=3,
        out=tmp_path_factory.mktemp("made") / "out", max_drop=60.0, cpu=True,
    )  # fmt: skip
    return module, result


def test_everything_is_there_and_nothing_else(made: tuple[nn.Module, Shrunk]) -> None:
    folder = made[1].folder
    assert folder is not None
    assert {p.name for p in folder.iterdir()} == FILES | {".work", ".lock"}
    report = json.loads((folder / "report.json").read_text())
    assert report == json.loads(json.dumps(made[1].report))
    assert (folder / "report.html").read_text() == page(report)
    assert Recipe.read(folder / "recipe.yaml") == RECIPE


def test_the_users_network_is_unchanged(made: tuple[nn.Module, Shrunk]) -> None:
    for name, tensor in small().state_dict().items():
        assert torch.equal(tensor, made[0].state_dict()[name]), name


def test_the_report_is_true(made: tuple[nn.Module, Shrunk], task: Any) -> None:
    """Counts and scores are found again by other means than those that wrote them."""
    result = made[1]
    assert result.folder is not None
    report = result.report
    for side in ("before", "after"):
        row = report[side]
        assert {"score", "macs", "params", "bytes", "peak_memory_bytes"} <= set(row)
        assert 0 < row["latency_ms"]["p50"] <= row["latency_ms"]["p95"]
    assert report["before"]["params"] == sum(p.numel() for p in small().parameters())
    assert report["before"]["macs"] == 64 * 9 * 8 + 36 * 9 * 8 * 16 + 64 * 10
    assert report["after"]["macs"] <= 0.6 * report["before"]["macs"]
    assert report["after"]["params"] == sum(p.numel() for p in result.module.parameters())
    assert report["after"]["bytes"] == (result.folder / "model.onnx").stat().st_size
    session = onnxruntime.InferenceSession(str(result.folder / "model.onnx"))
    right = total = 0
    for images, labels in task.batches("test", batch_size=50, shuffle=False):
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        right += int((np.argmax(np.asarray(logits), 1) == labels.numpy()).sum())
        total += len(labels)
    assert report["after"]["score"] == pytest.approx(100 * right / total)
    weights = report["classes"]["after"]
    assert set(weights) == {str(n) for n in range(10)}
    assert report["verified"] is True and report["checks"]["agreement"] >= 0.95
    assert report["seed"] == 3 and "torch" in report["versions"] and report["device"]


def test_the_layers_tell_what_was_removed(made: tuple[nn.Module, Shrunk]) -> None:
    report = made[1].report
    rows = {row["module"]: row for row in report["layers"]}
    assert set(rows) == {"0", "1", "3", "4", "8"}
    for side in ("before", "after"):
        for kind, total in (("macs", "macs"), ("parameters", "params")):
            assert sum(row[side][kind] for row in rows.values()) == report[side][total]
    assert rows["3"]["after"]["macs"] < rows["3"]["before"]["macs"]


def test_the_folder_is_a_network_again(made: tuple[nn.Module, Shrunk], task: Any) -> None:
    result = made[1]
    assert result.folder is not None
    module, inputs, about = load_network(result.folder)
    assert torch.allclose(module(*inputs), result.module.eval()(*inputs), atol=1e-6)
    assert about["task"]["classes"] == [str(n) for n in range(10)]
    names = set(read_weights(result.folder / "weights.safetensors"))
    assert "0.weight" in names and not [n for n in names if n.startswith("program")]


@pytest.mark.slow
def test_pruned_again(made: tuple[nn.Module, Shrunk], task: Any, tmp_path: Path) -> None:
    assert made[1].folder is not None
    module, _, _ = load_network(made[1].folder)
    again = gossamer.shrink(
        module, task, recipe=Recipe.of(("prune", {"macs": 0.6, "epochs": 0})), cpu=True
    )
    assert again.folder is None
    assert again.report["after"]["macs"] <= 0.6 * made[1].report["after"]["macs"]
    assert again.report["verified"] is True
    assert again.report["checks"]["largest_difference"] < 1e-3
    assert Graph.trace(again.module, task.example_inputs).macs == again.report["after"]["macs"]


def test_run_again_it_gives_the_same(
    made: tuple[nn.Module, Shrunk], task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = made[1]
    assert result.folder is not None
    before = (result.folder / "weights.safetensors").read_bytes()
    monkeypatch.setattr("gossamer.compress.shrink.fit", None)  # nothing is trained again
    monkeypatch.setattr("gossamer.compress.finetune.fit", None)
    gossamer.shrink(
        small(), task, recipe=RECIPE, trained=False, epochs=3, seed=3, out=result.folder,
        max_drop=60.0, cpu=True,
    )  # fmt: skip
    assert (result.folder / "weights.safetensors").read_bytes() == before


def test_a_folder_of_another_run_is_refused(made: tuple[nn.Module, Shrunk], task: Any) -> None:
    assert made[1].folder is not None
    with pytest.raises(InputError, match="holds a run with another model"):
        gossamer.shrink(
            small(16), task, recipe=RECIPE, trained=False, epochs=3, seed=3, out=made[1].folder,
            max_drop=60.0,
        )  # fmt: skip


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :10] if x.sum() > 0 else -x.flatten(1)[:, :10]


def test_what_cannot_be_exported_is_told_before_anything(task: Any, tmp_path: Path) -> None:
    module = nn.Sequential(Branches(), nn.Linear(10, 10))
    with pytest.raises(UnsupportedError, match=r"cannot be traced.*test_shrink\.py"):
        gossamer.shrink(module, task, trained=False, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_numbers(task: Any, tmp_path: Path) -> None:
    module = copy.deepcopy(small())
    module.get_parameter("3.weight").data[0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match=r"NaN or infinity in 3\.weight"):
        gossamer.shrink(module, task, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"minutes": 0.0}, "--minutes"),
        ({"minutes": float("nan")}, "--minutes"),
        ({"threads": 0}, "--batch-size and --threads"),
        ({"batch_size": 0}, "--batch-size and --threads"),
        ({"epochs": 0, "trained": False}, "--epochs"),
        ({"recipe": "missing.yaml"}, r"missing\.yaml"),
        ({"macs": "much"}, "--macs"),
    ],
)
def test_options_that_make_no_sense(
    task: Any, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        gossamer.shrink(small(), task, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_result_says_in_one_line_what_it_is(made: tuple[nn.Module, Shrunk]) -> None:
    assert repr(made[1]).startswith("Shrunk(score ") and "\n" not in repr(made[1])


def test_a_packed_form_is_measured_from_its_file(
    made: tuple[nn.Module, Shrunk], task: Any, tmp_path: Path
) -> None:
    recipe = Recipe.of(("post-mortem", {"bits": 2, "bucket": 64}))
    result = gossamer.shrink(made[0], task, recipe=recipe, out=tmp_path / "out", cpu=True)
    assert result.folder is not None
    packed, after = result.report["packed"], result.report["after"]
    file = result.folder / "packed.safetensors"
    assert {p.name for p in result.folder.iterdir()} == FILES | {file.name, ".work", ".lock"}
    assert packed["bytes"] == file.stat().st_size < packed["float_bytes"]
    assert packed["float_bytes"] == (result.folder / "weights.safetensors").stat().st_size
    assert (packed["agreement"], packed["score"]) == (1.0, after["score"])
    assert result.report["runtime"] == "packed" and result.report["verified"]
    text = (result.folder / "report.html").read_text()
    assert "Packed form" in text
    # Only the size of what is deployed counts: the packed file and the structure.
    tight = packed["bytes"] + packed["network_bytes"] - 1
    with pytest.raises(BudgetError, match="size"):
        gossamer.shrink(made[0], task, recipe=recipe, size=tight, out=tmp_path / "tight", cpu=True)


def test_zeros_survive_training_and_are_counted(
    made: tuple[nn.Module, Shrunk], task: Any, tmp_path: Path
) -> None:
    module = small()
    with torch.no_grad():
        weight = module.get_parameter("3.weight")
        weight[weight.abs() < weight.abs().median()] = 0.0
    network = Network(module, task.example_inputs, storage={"3.weight": "sparse"})
    for step, options in (("finetune", {"epochs": 1}), ("distil", {"epochs": 1})):
        network = (
            Recipe.of((step, options))
            .steps[0]
            .apply(network, task, teacher=Network(made[0], task.example_inputs), cpu=True)
        )
        now = network.module.get_parameter("3.weight")
        assert torch.equal(now == 0, weight == 0)
        assert not torch.equal(now, weight)
    graph = Graph.trace(network.module, task.example_inputs)
    assert graph.macs - graph.macs_effective == int((weight == 0).sum()) * 36
