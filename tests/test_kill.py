"""A run that is killed at any moment and started again ends with the same weights, bit for bit.

Two kills run with the tests; ``GOSSAMER_KILLS=20 pytest tests/test_kill.py`` makes it twenty.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gossamer.core.files import load_state
from gossamer.core.saved import read_weights

KILLS = int(os.environ.get("GOSSAMER_KILLS", "2"))
RECIPE = """\
steps:
  - prune: {criterion: taylor, macs: 0.6, round_to: 4, epochs: 0}
  - distil: {epochs: 6, lr: 0.05}
  - int8:
"""
FILES = {
    "model.onnx", "model.pt2", "weights.safetensors", "network.json", "recipe.yaml",
    "report.html", "report.json",
}  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def start(folder: Path, out: Path) -> subprocess.Popen[str]:
    (folder / "recipe.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "gossamer.cli", "shrink", "--recipe", "recipe.yaml"]
    return subprocess.Popen(
        [*command, "--epochs", "6", "--out", str(out)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(folder: Path, out: Path) -> None:
    process = start(folder, out)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said


def weights(out: Path) -> dict[str, tuple[tuple[int, ...], bytes]]:
    tensors = read_weights(out / "weights.safetensors")
    return {name: (tuple(t.shape), t.numpy().tobytes()) for name, t in tensors.items()}


def finished_parts(out: Path) -> dict[str, str]:
    """What the run may not lose: the trained original and the finished steps."""
    work = out / ".work"
    places = [work / "dense.safetensors", *work.glob("steps/[0-9]*/*")]
    return {
        str(p.relative_to(work)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in places
        if p.is_file()
    }


def assert_whole(out: Path) -> None:
    """Every file that can be seen is whole."""
    for path in out.rglob("*"):
        if any(part.startswith(".") and part != ".work" for part in path.relative_to(out).parts):
            continue  # what was being written, under a hidden name
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".state" or path.name == "dense.safetensors":
            load_state(path)
        elif path.suffix == ".safetensors":
            assert read_weights(path)
    if (out / "report.json").exists():
        assert {p.name for p in out.iterdir()} >= FILES


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    folder = tmp_path_factory.mktemp("unbroken")
    began = time.monotonic()
    finish(folder, folder / "out")
    return folder / "out", time.monotonic() - began


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_run_ends_as_an_unbroken_one(
    number: int, unbroken: tuple[Path, float], tmp_path: Path
) -> None:
    expected, seconds = unbroken
    out = tmp_path / "out"
    moment = seconds * (number + random.Random(number).random()) / KILLS
    process = start(tmp_path, out)
    try:
        process.communicate(timeout=moment)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    kept: dict[str, str] = {}
    if out.exists():
        assert_whole(out)
        kept = finished_parts(out)
    finish(tmp_path, out)
    after = finished_parts(out)
    assert {name: after[name] for name in kept} == kept
    assert weights(out) == weights(expected)
    assert (out / "model.onnx").read_bytes() == (expected / "model.onnx").read_bytes()
    assert_whole(out)
    assert not [p for p in out.rglob(".*") if p.name not in (".work", ".lock")]
    report, other = (json.loads((f / "report.json").read_text()) for f in (out, expected))
    for side in ("before", "after"):
        for name in ("score", "validation_score", "macs", "params", "bytes"):
            assert report[side][name] == other[side][name]
