"""Robustness of a network on a data set: blocks, kills, shards, machines, and the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gossamer.cli import main
from gossamer.core.errors import InputError
from gossamer.core.saved import read_weights
from gossamer.evaluate.robustness import (
    ArrayImages,
    Measurement,
    TaskImages,
    evaluate_robustness,
)


def small() -> tuple[nn.Module, ArrayImages]:
    """The same network and images whoever asks, so that machines can open them by themselves."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
        images = torch.rand(103, 1, 8, 8)
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[:5] = (labels[:5] + 1) % 4
    return model, ArrayImages(images, labels)


def opened(work: Path | None = None, **options: object) -> Measurement:
    model, images = small()
    settings = {"eps": 0.05, "steps": 8, "block": 25} | options
    return Measurement(model, images, work=work, **settings)  # type: ignore[arg-type]


def test_report_adds_up() -> None:
    report = evaluate_robustness(opened())
    assert report.images == 103
    assert report.clean == pytest.approx(100 * 98 / 103)
    assert report.after[-1] == report.robust < report.after[0] + 1e-9 <= report.clean
    assert [cost.attack for cost in report.costs] == ["pma", "apgd-t"]
    assert report.costs[0].attacked == 98
    assert report.costs[1].attacked == 98 - report.costs[0].broken
    assert (report.broken_by == -2).sum() == 5
    assert sum(cost.broken for cost in report.costs) == (report.broken_by >= 0).sum()
    json.dumps(report.to_json(), allow_nan=False)


def test_blocks_shards_and_resuming_change_nothing(tmp_path: Path) -> None:
    whole = evaluate_robustness(opened(block=1000))
    half = evaluate_robustness(opened(tmp_path / "w"), shard=(1, 2))
    assert half.images == 50  # blocks 1 and 3
    assert sorted(p.name for p in (tmp_path / "w").glob("block*")) == [
        "block-000001.json", "block-000003.json",
    ]  # fmt: skip
    before = (tmp_path / "w" / "block-000001.json").stat().st_mtime_ns
    rest = evaluate_robustness(opened(tmp_path / "w"))
    assert (tmp_path / "w" / "block-000001.json").stat().st_mtime_ns == before
    assert rest.broken_by.tolist() == whole.broken_by.tolist()
    assert rest.robust == whole.robust


def test_a_folder_belongs_to_one_measurement(tmp_path: Path) -> None:
    evaluate_robustness(opened(tmp_path))
    with pytest.raises(InputError, match="holds a measurement with another eps"):
        opened(tmp_path, eps=0.06)
    other, images = small()
    other.get_parameter("1.weight").data.mul_(1.0001)
    with pytest.raises(InputError, match="another model"):
        Measurement(other, images, eps=0.05, steps=8, block=25, work=tmp_path)


def test_predicted_labels_measure_stability() -> None:
    report = evaluate_robustness(opened(predicted=True))
    assert report.clean == 100.0 and report.labels == "predicted"
    assert report.robust < 100.0


def test_adversarial_images_are_kept_and_fool(tmp_path: Path) -> None:
    report = evaluate_robustness(opened(tmp_path, save_images=True))
    model, images = small()
    files = sorted(tmp_path.glob("images-*.safetensors"))
    found = torch.cat([read_weights(path)["images"] for path in files])
    assert (found - images.images).abs().max() <= 0.05 + 1e-6
    right = model(found).argmax(1) == images.labels
    assert right.float().mean().item() * 100 == pytest.approx(report.robust)


def test_a_network_that_hides_its_gradients_is_named() -> None:
    model, images = small()

    class Steps(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return model((pixels * 12).round() / 12)

    report = evaluate_robustness(
        Measurement(Steps(), images, attack="auto-attack", eps=0.1, steps=3, block=103)
    )
    assert any("gradients were zero" in remark for remark in report.remarks)
    assert any("Square" in remark for remark in report.remarks)


@pytest.mark.slow
def test_blocks_are_done_by_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    from gossamer.evaluate.robustness_ray import over_ray

    root = Path(__file__).resolve().parents[2]
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")

    def open_() -> Measurement:  # travels by value: test files are no module on the workers
        with torch.random.fork_rng():
            torch.manual_seed(3)
            layers = [nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)]
            model = nn.Sequential(*layers).eval()
            images = torch.rand(103, 1, 8, 8)
        with torch.no_grad():
            labels = model(images).argmax(1)
        labels[:5] = (labels[:5] + 1) % 4
        return Measurement(
            model, ArrayImages(images, labels), eps=0.05, steps=8, block=25, work=tmp_path
        )

    spread = over_ray(open_, address="local", workers=2)
    report = evaluate_robustness(open_(), spread=spread)
    assert report.broken_by.tolist() == evaluate_robustness(opened()).broken_by.tolist()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small network that knows its digits."""
    from safetensors.torch import save_file

    from gossamer.core.fit import Supervised, fit, sgd
    from gossamer.datasets import open_task
    from gossamer.models import build

    task = open_task("digits")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(
            "gossamer_digits_resnet", classes=10, channels=1, image_size=(8, 8),
            example_inputs=task.example_inputs,
        )  # fmt: skip
    fit(Supervised(model, task, optimizer=sgd(model, lr=0.1)), task, epochs=3)
    path = tmp_path_factory.mktemp("nets") / "digits.safetensors"
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return path


def words(weights: Path, *more: str | Path, **options: str) -> list[str]:
    settings = {"images": "60", "eps": "1/16", "steps": "6"} | options
    command = ["evaluate", "robustness", "gossamer_digits_resnet", "--weights", weights]
    for name, value in {"data": "digits", **settings}.items():
        command += [f"--{name}", value]
    return [str(word) for word in [*command, *more]]


def test_command(
    weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(monkeypatch, words(weights, "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["images"] == 60 and report["eps"] == 0.0625
    assert report["clean_accuracy"] > 60
    assert report["robust_accuracy"] < report["clean_accuracy"]
    assert report["aggregation"].startswith("worst case")
    assert called(monkeypatch, words(weights, "--attack", "pgd-ce")) == 0
    shown = capsys.readouterr().out
    assert "after pgd-ce" in shown and "upper bound" in shown


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (dict(eps="8/0"), "eps is '8/0'"),
        (dict(eps="big"), "eps is 'big'"),
        (dict(eps="3"), "eps is 3"),
        (dict(attack="magic"), "there is no attack 'magic'"),
        (dict(shard="2/2", work="w"), "shard 2 of 2"),
        (dict(shard="0/2"), "needs a work folder"),
        (dict(shard="half"), "give k/n"),
        (dict(images="0"), "0 images are asked for"),
        (dict(device="abacus"), "no device 'abacus'"),
        (dict(block="0"), "blocks of 0 images"),
        (dict(steps="0"), "steps is 0"),
    ],
)
def test_command_says_what_is_wrong(
    more: dict[str, str],
    says: str,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert called(monkeypatch, words(weights, **more)) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_a_network_without_weights_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "robustness", "gossamer_digits_resnet", "--data", "digits"]
    assert called(monkeypatch, command) == 2
    assert "no trained weights" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_run_goes_on(weights: Path, tmp_path: Path) -> None:
    def line(folder: str) -> list[str]:
        options = {"block": "3", "steps": "60", "attack": "pma", "work": str(tmp_path / folder)}
        return [sys.executable, "-m", "gossamer.cli", *words(weights, "--json", **options)]

    process = subprocess.Popen(line("w"), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "w").glob("block-*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "w").glob("block-*.json")}
    assert 0 < len(kept) < 20
    again = subprocess.run(line("w"), capture_output=True, text=True, check=True)
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())
    straight = subprocess.run(line("other"), capture_output=True, text=True, check=True)
    first, second = json.loads(again.stdout), json.loads(straight.stdout)
    assert first["robust_accuracy"] == second["robust_accuracy"]
    assert [a["backwards"] for a in first["attacks"]] == [a["backwards"] for a in second["attacks"]]


def called(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> int:
    """Runs the command line in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["gossamer", *command])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_splits_that_are_not_there() -> None:
    from gossamer.datasets import open_task

    task = open_task("digits")
    del task.splits["test"]
    with pytest.raises(InputError, match="no test split"):
        TaskImages(task)
