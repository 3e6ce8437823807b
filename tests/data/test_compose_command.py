"""gossamer data compress."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gossamer.cli import app, main


def run(*words: str | Path) -> None:
    app(list(map(str, words)), result_action="return_value", exit_on_error=False)


def test_digits_become_tiles(tmp_path: Path, capsys) -> None:
    out = tmp_path / "small"
    run("data", "compress", "digits", "--per-class", "3", "--epochs", "1", "--out", out, "--json")
    said = json.loads(capsys.readouterr().out)
    files = sorted(out.rglob("*.png"))
    assert said["stored"] == len(files) == 30
    assert said["bytes"] == sum(file.stat().st_size for file in files)
    assert set(said["classes"].values()) == {12}
    record = json.loads((out / "compressed.json").read_text())
    assert record["factor"] == 2 and all(len(set(i["of"])) == 4 for i in record["images"])
    with Image.open(files[0]) as image:
        assert image.size == (8, 8) and np.asarray(image).max() > 100


def test_scores_of_an_index_file(tmp_path: Path) -> None:
    index = tmp_path / "kept.parquet"
    run("data", "prune", "digits", "--keep", "0.5", "--out", index)
    run("data", "compress", "digits", "--per-class", "2", "--factor", "1", "--scores", index,
        "--out", tmp_path / "small")  # fmt: skip
    from gossamer.data.selection import read_selection

    found = read_selection(index)
    record = json.loads((tmp_path / "small" / "compressed.json").read_text())
    assert found.labels is not None
    labels = np.array(found.labels)
    easiest = {
        str(found.names[row])
        for label in map(str, range(10))
        for row in np.flatnonzero(labels == label)[
            np.argsort(found.scores[labels == label], kind="stable")[:2]
        ]
    }
    assert {name for image in record["images"] for name in image["of"]} == easiest


def test_refusals(tmp_path: Path, capsys, monkeypatch) -> None:
    def sentence(*words: str | Path) -> str:
        monkeypatch.setattr("sys.argv", ["gossamer", "data", "compress", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        return capsys.readouterr().err

    out = tmp_path / "out"
    few = ("--order", "random", "--out", out)
    assert "class" in sentence("digits", "--per-class", "500", *few)
    assert "at least one image" in sentence("digits", "--per-class", "0", *few)
    assert "cannot hold 9 tiles" in sentence("digits", "--per-class", "1", "--factor", "9", *few)
    (tmp_path / "flat").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "flat" / "x.png")
    assert "have no labels" in sentence(tmp_path / "flat", "--per-class", "1", *few)
    assert not out.exists()
