"""The command that audits a network's traces."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from gossamer.cli import main
from gossamer.models.mobilenet import small_mobilenet


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["gossamer", "hardware", "fingerprint", *map(str, words)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_audit_of_a_network(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    words = ("gossamer_small_mobilenet", "--image-size", 16, "--channels", 1, "--repeats", 2)
    assert run(monkeypatch, *words, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["levels"]) == {"L1", "L1, sizes only"}
    # On a busy machine a normalisation may look like a layer, so only the order of widths is sure.
    widths = [layer["channels"] for layer in found["recovered"]["layers"]]
    assert list(dict.fromkeys(widths)) == [32, 64, 128, 256]
    state = small_mobilenet().state_dict().values()
    weights = sum(value.numel() * value.element_size() for value in state)
    assert found["shows"]["L0"].endswith(f"{weights:,} always")


def test_audit_of_a_file(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    sizes = [(96, 0), (16, 96), (64, 0), (64, 16), (128, 128)]
    rows = [f"0,,{4 * a * 55 * 55},{4 * f * 55 * 55}" for a, f in sizes]
    path = tmp_path / "fire.csv"
    path.write_text("\n".join(["t_start,dur,alloc,free", *rows]) + "\n", "utf-8")
    assert run(monkeypatch, "--trace", path, "--image-size", 55, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["family"] == "fire"
    assert found["recovered"]["parameters"]["squeeze"] == 16
    assert run(monkeypatch, "--trace", path, "--image-size", 55) == 0
    assert "squeeze 16, expand1 64, expand3 64" in " ".join(capsys.readouterr().out.split())


def test_refusals(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    assert run(monkeypatch) == 2
    assert "one of the two" in " ".join(capsys.readouterr().err.split())
    assert run(monkeypatch, "--trace", tmp_path / "none.csv") == 2
    assert "there is no trace" in capsys.readouterr().err
