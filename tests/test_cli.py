"""The command line: what a user types, and what comes back."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from gossamer.cli import main

NETWORK = """\
from torch import nn


def make(num_classes=10, in_chans=1):
    return nn.Sequential(
        nn.Conv2d(in_chans, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )
"""
RECIPE = """\
steps:
  - prune: {macs: 0.7, epochs: 0, criterion: l2}
  - finetune: {epochs: 1}
"""


def run(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    """Runs the command in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["gossamer", *map(str, words)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def photos(folder: Path, each: int = 12) -> Path:
    """A folder of images, a subfolder a class."""
    digits: Any = load_digits()
    for digit, name in ((0, "zero"), (1, "one"), (4, "four")):
        (folder / name).mkdir(parents=True)
        for number, pixels in enumerate(digits.images[digits.target == digit][:each]):
            image = Image.fromarray((pixels * 255 / 16).astype(np.uint8)).resize((16, 16))
            image.convert("RGB").save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def shrunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a user worked: a factory, a recipe, photos, and the folder that shrink wrote."""
    here = tmp_path_factory.mktemp("user")
    (here / "own_cli_net.py").write_text(NETWORK)
    (here / "recipe.yaml").write_text(RECIPE)
    photos(here / "photos", each=60)
    done = gossamer(
        here, "shrink", "own_cli_net:make", "--data", "photos", "--recipe", "recipe.yaml",
        "--epochs", "4", "--out", "small", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (here / "report.txt").write_text(done.stdout)
    (here / "said.txt").write_text(done.stderr)
    return here


def gossamer(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gossamer.cli", *words],
        cwd=folder, capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_help_is_quick_and_has_an_example(tmp_path: Path) -> None:
    times = []
    for _ in range(3):
        began = time.monotonic()
        done = gossamer(tmp_path, "--help")
        times.append(time.monotonic() - began)
        assert done.returncode == 0
    for command in ("shrink", "predict", "profile", "systems", "reproduce"):
        assert command in done.stdout
    assert min(times) < 1.0


def test_every_command_shows_an_example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("shrink", "predict", "profile", "systems", "reproduce"):
        assert run(monkeypatch, command, "--help") == 0
        assert f"Example: gossamer {command} " in " ".join(capsys.readouterr().out.split())


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.strip() == "0.1.0"


@pytest.mark.slow
def test_an_own_factory_on_a_folder_of_images(shrunk: Path) -> None:
    report = json.loads((shrunk / "report.txt").read_text())
    assert report == json.loads((shrunk / "small" / "report.json").read_text())
    assert report["task"]["classes"] == ["four", "one", "zero"]
    assert report["after"]["macs"] <= 0.7 * report["before"]["macs"]
    assert report["model"] == {"model": "own_cli_net:make"}
    assert report["verified"] is True
    said = (shrunk / "said.txt").read_text()
    assert said.count("has no weights; it is trained for 4 epochs first") == 1
    assert "Traceback" not in said and "Warning" not in said


@pytest.mark.slow
def test_predict_agrees_with_the_network(
    shrunk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from gossamer.core.saved import load_network
    from gossamer.datasets import open_task

    images = sorted((shrunk / "photos" / "zero").glob("*.png"))[:3]
    assert run(monkeypatch, "predict", shrunk / "small", *images, "--top", "3", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["image"] for row in rows] == list(map(str, images))
    task: Any = open_task(shrunk / "photos")
    module, _, _ = load_network(shrunk / "small")
    for row, path in zip(rows, images, strict=True):
        pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None]
        with torch.inference_mode():
            expected = torch.softmax(module(task.preprocess(pixels))[0], 0)
        got = {c["class"]: c["probability"] for c in row["classes"]}
        for name, share in zip(task.classes, expected.tolist(), strict=True):
            assert got[name] == pytest.approx(share, abs=1e-4)
    assert run(monkeypatch, "predict", shrunk / "small", images[0]) == 0
    assert " %)" in capsys.readouterr().out


@pytest.mark.slow
def test_a_folder_that_was_written_is_a_model(shrunk: Path) -> None:
    done = gossamer(
        shrunk, "shrink", "small", "--data", "photos", "--recipe", "recipe.yaml", "--out", "smaller"
    )
    assert done.returncode == 0, done.stderr
    assert "before and after" in done.stdout and "verified: yes" in done.stdout
    assert "has no weights" not in done.stderr
    first = json.loads((shrunk / "small" / "report.json").read_text())
    second = json.loads((shrunk / "smaller" / "report.json").read_text())
    assert second["before"]["macs"] == first["after"]["macs"]
    assert second["before"]["score"] == pytest.approx(first["after"]["score"])
    assert second["after"]["macs"] <= 0.7 * first["after"]["macs"]


@pytest.mark.slow
def test_profile_of_a_written_folder(
    shrunk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "profile", shrunk / "small", "--json") == 0
    profile = json.loads(capsys.readouterr().out)
    report = json.loads((shrunk / "small" / "report.json").read_text())
    assert profile["macs"] == report["after"]["macs"]
    assert profile["parameters"] == report["after"]["params"]
    assert [r["module"] for r in profile["layers"] if r["macs"]] == ["0", "3", "8"]


def test_profile_counts_as_published(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "profile", "resnet18", "--json") == 0
    profile = json.loads(capsys.readouterr().out)
    assert profile["parameters"] == 11_689_512
    assert profile["macs"] == 1_814_073_344
    assert sum(row["macs"] for row in profile["layers"]) == profile["macs"]


def test_systems_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "systems", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 85
    assert {"spec", "title", "room", "module", "provenance", "verdict", "claims"} <= set(rows[0])


@pytest.mark.slow
def test_an_interrupted_run_says_how_to_go_on(shrunk: Path) -> None:
    command = [
        sys.executable, "-m", "gossamer.cli", "shrink", "own_cli_net:make", "--data", "photos",
        "--epochs", "4000", "--out", "interrupted",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=shrunk, stderr=subprocess.PIPE, text=True)
    state = shrunk / "interrupted" / ".work" / "dense.state"
    deadline = time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    # Python loses an interrupt that comes while C code calls back; who waits presses again.
    for _ in range(6):
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
            break
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "gossamer: interrupted; run the same command again to go on"
    assert "Traceback" not in said
    assert state.exists()


def test_a_list_takes_all_the_words_after_its_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In every room, also below a group of commands."""
    for words, says in [
        (("reproduce", "nothing", "--seeds", "0", "1"), "no system 'nothing'"),
        (
            ("evaluate", "robustness", "no/", "--data", "digits", "--mean", "0.5", "0.4"),
            "has 1 channel",
        ),
        (("data", "explore", "no/", "--model", "a", "b"), "no/ is no folder"),
    ]:
        assert run(monkeypatch, *words) == 2
        assert says in " ".join(capsys.readouterr().err.split()), words
