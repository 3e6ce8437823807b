"""gossamer evaluate prototypes: train, score, explain, load again, refuse."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gossamer.cli import app, main

NETWORK = """\
from torch import nn


def make(in_chans=3):
    return nn.Sequential(
        nn.Conv2d(in_chans, 8, 3, stride=4, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8),
    )
"""
QUICK = ("--per-class", "2", "--dim", "8", "--epochs", "2", "--warm", "1", "--pretrain", "1")


def run(*words: str | Path) -> None:
    app(list(map(str, words)), result_action="return_value", exit_on_error=False)


def reported(capsys, *words: str | Path) -> dict:
    run("evaluate", "prototypes", *words, "--json")
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_parts_net.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def photos(folder: Path) -> Path:
    generator = np.random.default_rng(0)
    for label, name in enumerate(("dark", "light")):
        (folder / name).mkdir(parents=True)
        for number in range(14):
            pixels = generator.integers(0, 100, (32, 32, 3)) + 150 * label
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")
    return folder


def test_creatures_are_scored_explained_and_loaded_again(here: Path, capsys) -> None:
    words = ("--data", "creatures", "--image-size", "32", "--images", "3")
    said = reported(
        capsys, "own_parts_net:make", *words, *QUICK, "--out", "net", "--page", "page.png"
    )
    assert said["prototypes"] == 16 and said["images"] == 400 and said["classes"] == 8
    rows = said["tables"]["consistency"]
    assert len(rows) == 16 and {row["part"] for row in rows} <= set(said["parts"])
    consistent = [row["consistent"] for row in rows]
    assert said["consistency"] == pytest.approx(100 * np.mean(consistent))
    stable = [row["stable"] for row in said["tables"]["stability"]]
    assert said["stability"] == pytest.approx(np.mean(stable), abs=1e-3)
    assert (here / "page.png").stat().st_size > 10_000
    assert json.loads((here / "net" / "scores.json").read_text())["tables"] == said["tables"]
    again = reported(capsys, "net", *words, "--backbone", "own_parts_net:make")
    for name in ("accuracy", "consistency", "stability"):
        assert again[name] == said[name]
    with pytest.raises(Exception, match="code of your own"):
        run("evaluate", "prototypes", "net", *words)


def test_timm_networks_on_a_folder_of_images(here: Path, capsys) -> None:
    folder = photos(here / "photos")
    words = ("resnet10t", "--data", folder, *QUICK, "--batch-size", "8", "--out", "net")
    said = reported(capsys, *words, "--page", "page.html")
    assert said["consistency"] is None and said["tables"] == {}
    page = (here / "page.html").read_text()
    assert page.count("<section>") == said["images"] == 6
    # Of each image: itself, and for two prototypes a patch and an activation map.
    assert page.count("data:image/png;base64,") == 6 * 5
    assert reported(capsys, "net", "--data", folder)["accuracy"] == said["accuracy"]
    run("evaluate", "prototypes", "net", "--data", str(folder))
    assert "no key-points" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("resnet10t", "--data", "digits"), "none is shallow"),
        (("resnet1", "--data", "creatures"), "there is no timm model"),
        (("own_parts_net:make", "--data", "nowhere"), "is no data set"),
        (("own_parts_net:make", "--data", "creatures", "--page", "page.pdf"), "html or .png"),
        (("own_parts_net:make", "--data", "creatures", "--per-class", "0"), "1 or more"),
        (("own_parts_net:make", "--data", "creatures", "--weights", "no.pt"), "no file of weights"),
        (("own_parts_net:make", "--data", "creatures", "--warm", "-1"), "a schedule needs"),
        (("own_parts_net:make", "--data", "empty.json"), "not valid JSON"),
    ],
)
def test_bad_input_is_one_sentence(
    here: Path, words: tuple[str, ...], problem: str, monkeypatch, capsys
) -> None:
    (here / "empty.json").write_text("")
    monkeypatch.setattr(sys, "argv", ["gossamer", "evaluate", "prototypes", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and problem in " ".join(said.split()), said
    assert "Traceback" not in said


def test_a_network_of_other_classes_is_refused(here: Path, capsys) -> None:
    folder = photos(here / "photos")
    words = ("--epochs", "1", "--warm", "1", "--pretrain", "0", "--per-class", "1")
    reported(capsys, "resnet10t", "--data", folder, *words, "--out", "net")
    with pytest.raises(Exception, match="knows 2 classes"):
        run("evaluate", "prototypes", "net", "--data", "creatures")
