"""gossamer data prune-for-transfer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from gossamer.cli import app, main
from gossamer.data.selection import read_selection


def folder(root: Path, images: np.ndarray, labels: list[str]) -> Path:
    for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        place = root / label / f"{number:04}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15).astype(np.uint8)).save(place)
    return root


@pytest.fixture
def sets(tmp_path: Path) -> tuple[Path, Path]:
    """A source of digits 0 to 3 and their negatives; a target of other 1s and 3s."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8)
    rows = np.flatnonzero(labels < 4)
    some, others = rows[:200], rows[200:300]
    source = folder(
        tmp_path / "source",
        np.concatenate([images[some], 16 - images[some]]),
        [f"{label}" for label in labels[some]] + [f"not {label}" for label in labels[some]],
    )
    wanted = others[np.isin(labels[others], (1, 3))]
    target = folder(tmp_path / "target", images[wanted], [str(label) for label in labels[wanted]])
    return source, target


@pytest.mark.parametrize("method", ["lm", "fm"])
def test_what_the_target_shows_is_kept(sets, tmp_path: Path, capsys, method: str) -> None:
    source, target = sets
    app(
        ["data", "prune-for-transfer", str(source), str(target), "--keep", "0.25", "--method",
         method, "--epochs", "12", "--out", str(tmp_path / "kept.parquet"), "--json"],
        result_action="return_value", exit_on_error=False,
    )  # fmt: skip
    said = json.loads(capsys.readouterr().out)
    assert set(said["classes"]) == {"1", "3"}
    assert sum(said["classes"].values()) <= len(list(target.rglob("*.png")))
    found = read_selection(tmp_path / "kept.parquet")
    assert found.labels is not None
    assert {found.labels[row] for row in found.kept} == {"1", "3"}
    assert len(found.kept) == sum(label in ("1", "3") for label in found.labels)


def test_refusals(sets, tmp_path: Path, capsys, monkeypatch) -> None:
    source, target = sets

    def sentence(*words: str | Path) -> str:
        monkeypatch.setattr(
            "sys.argv", ["gossamer", "data", "prune-for-transfer", *map(str, words)]
        )
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        return capsys.readouterr().err

    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("L", (8, 8)).save(flat / "x.png")
    assert "take --method fm" in sentence(flat, target, "--keep", "0.5")
    assert "give --weights" in sentence(flat, target, "--keep", "0.5", "--method", "fm")
    assert "--even needs labels" in sentence(source, flat, "--keep", "0.5", "--even")
    assert "fraction to keep" in sentence(source, target, "--keep", "0")
