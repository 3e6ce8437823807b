"""gossamer data prune, methods and compare."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from gossamer.cli import app, main
from gossamer.data.selection import read_selection


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for name, grey, count in (("dark", 30, 12), ("light", 200, 6)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(count):
            pixels = random.normal(grey, 10, (16, 16)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number:02}.png")
    (tmp_path / "photos" / "dark" / "broken.png").write_bytes(b"nothing")
    return tmp_path / "photos"


def run(*words: str | Path) -> None:
    app(list(map(str, words)), result_action="return_value", exit_on_error=False)


def fails(capsys: pytest.CaptureFixture[str], monkeypatch, *words: str | Path) -> str:
    monkeypatch.setattr("sys.argv", ["gossamer", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_prune_a_folder(photos: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "kept.parquet"
    run("data", "prune", photos, "--keep", "0.5", "--clusters", "2", "--out", out,
        "--copy-to", tmp_path / "copy", "--json")  # fmt: skip
    said = json.loads(capsys.readouterr().out)
    assert said["images"] == 18 and said["kept"] == 9 and said["skipped"] == ["dark/broken.png"]
    found = read_selection(out)
    assert len(found.names) == 18 and found.about["method"] == "prototypes"
    assert found.about["skipped"][0][0] == "dark/broken.png"
    names = {str(found.names[row]) for row in found.kept}
    copied = {
        p.relative_to(tmp_path / "copy").as_posix() for p in (tmp_path / "copy").rglob("*.png")
    }
    assert copied == names
    kept, others = found.scores[found.kept], np.delete(found.scores, found.kept)
    assert found.labels is not None
    assert kept.min() >= np.sort(others)[-1] or {"dark", "light"} == set(found.labels)


def test_embeddings_from_files(photos: Path, tmp_path: Path) -> None:
    names = sorted(p.relative_to(photos).as_posix() for p in photos.rglob("*.png"))
    names.remove("dark/broken.png")
    features = np.eye(18, dtype=np.float32)
    features[5] = [1.0] + [0.0] * 17  # a double of the first
    np.save(tmp_path / "f.npy", features)
    table = pa.table({"name": names[::-1], "embedding": features[::-1].tolist()})
    pyarrow.parquet.write_table(table, tmp_path / "f.parquet")
    outs = []
    for suffix in ("npy", "parquet"):
        out = tmp_path / f"{suffix}.parquet"
        run("data", "prune", photos, "--keep", "0.5", "--embed", tmp_path / f"f.{suffix}",
            "--clusters", "3", "--balance", "0", "--out", out)  # fmt: skip
        outs.append(read_selection(out))
    np.testing.assert_array_equal(outs[0].scores, outs[1].scores)
    assert outs[0].scores[0] == outs[0].scores[5]


def test_a_network_embeds_and_is_remembered(photos: Path, tmp_path: Path) -> None:
    for out in ("a.parquet", "b.parquet"):
        run("data", "prune", photos, "--keep", "0.5", "--embed", "gossamer_digits_resnet",
            "--work", tmp_path / "work", "--out", tmp_path / out)  # fmt: skip
    assert (tmp_path / "work" / "embedding" / "features.npy").exists()


def test_refusals(photos: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    out = tmp_path / "out.parquet"

    def sentence(*words: str | Path) -> str:
        said = fails(capsys, monkeypatch, "data", "prune", *words, "--out", out)
        assert not out.exists()
        return said

    assert "fraction to keep" in sentence(photos, "--keep", "1.5")
    assert "there is no method" in sentence(photos, "--keep", "0.5", "--metric", "best")
    (tmp_path / "empty").mkdir()
    assert "holds no images" in sentence(tmp_path / "empty", "--keep", "0.5")
    np.save(tmp_path / "f.npy", np.zeros((3, 2)))
    assert "[18, d] are needed" in sentence(photos, "--keep", "0.5", "--embed", tmp_path / "f.npy")
    assert "no folder of image files" in sentence(
        "digits", "--keep", "0.5", "--copy-to", tmp_path / "copy"
    )
    Image.new("L", (16, 16)).save(photos / "loose.png")
    assert "needs labels" in sentence(photos, "--keep", "0.5", "--metric", "class-prototypes")


def test_compare_goes_on_and_draws(tmp_path: Path, capsys, monkeypatch) -> None:
    out = tmp_path / "compared"
    words = ("data", "compare", "digits", "--methods", "prototypes", "class-prototypes:easy",
             "--keep", "0.1", "0.5", "--seeds", "0", "1", "--out", out, "--json")  # fmt: skip
    run(*words)
    first = json.loads(capsys.readouterr().out)
    assert set(first["curves"]) == {"prototypes", "class-prototypes:easy", "random"}
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    for points in first["curves"].values():
        assert points[0]["accuracy"] < points[1]["accuracy"] < first["whole"] + 1.0
    assert all(p["over_random"] == 0.0 for p in first["curves"]["random"])
    # A run that was killed after some cells measures the others only.
    from gossamer.data import compare as comparing

    (out / "compare.json").unlink()
    cells = [row for row in first["rows"] if row["seed"] == 0]
    settings = first["settings"]
    identity = {
        **settings, "contenders": list(first["curves"]), "seeds": [0, 1], "balance": 0.5,
    }  # fmt: skip
    (out / "cells.json").write_text(json.dumps({"identity": identity, "rows": cells}))
    calls = []
    learner = comparing.random_features_learner

    def counted():
        learn = learner()
        return lambda task, seed: (calls.append(seed), learn(task, seed))[1]

    monkeypatch.setattr(comparing, "random_features_learner", counted)
    run(*words)
    again = json.loads(capsys.readouterr().out)
    assert again["curves"] == first["curves"]
    assert calls == [1] * 7
    (out / "cells.json").write_text(json.dumps({"identity": {}, "rows": []}))
    assert "another --out" in fails(capsys, monkeypatch, *words)


def test_methods_are_listed(capsys) -> None:
    run("data", "methods", "--json")
    names = [row["name"] for row in json.loads(capsys.readouterr().out)]
    assert {"prototypes", "el2n", "memorization", "random"} <= set(names)
