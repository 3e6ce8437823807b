"""gossamer evaluate certify."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from gossamer.cli import app, main
from gossamer.evaluate.training_partition import finite_spread
from gossamer.evaluate.vote_certificates import certified_accuracy, certify


def run(*words: str | Path) -> None:
    app(list(map(str, words)), result_action="return_value", exit_on_error=False)


def certified(capsys, *words: str | Path) -> dict:
    run("evaluate", "certify", *words, "--json")
    return json.loads(capsys.readouterr().out)


def test_digits_with_ridge_regression(tmp_path: Path, capsys) -> None:
    options = ("--parts", "9", "--sizes", "0", "2", "--out", tmp_path / "out")
    said = certified(capsys, "digits", *options)
    assert said["training_images"] + said["test_images"] == 1797 and said["models"] == 9
    for rule in ("vote", "roe"):
        entry = said["rules"][rule]
        table = pl.read_parquet(tmp_path / "out" / f"{rule}.parquet")
        right = (table["label"] == table["true_label"]).to_numpy()
        radii = table["radius"].to_numpy()
        expected = [100 * right.mean(), 100 * (right & (radii >= 2)).mean()]
        np.testing.assert_allclose(entry["certified_accuracy"], expected)
        assert entry["clean_accuracy"] == entry["certified_accuracy"][0] > 85
    assert json.loads((tmp_path / "out" / "certified.json").read_text()) == said
    assert (tmp_path / "out" / "certified.png").stat().st_size > 5000


@pytest.mark.parametrize("method", ["fa", "dpa*"])
def test_the_other_methods(method: str, tmp_path: Path, capsys) -> None:
    said = certified(
        capsys, "digits", "--method", method, "--parts", "5", "--d", "3", "--rule", "roe",
        "--content-hash", "digest", "--test-images", "50", "--out", tmp_path,
    )  # fmt: skip
    assert said["models"] == (15 if method == "fa" else 5) and said["test_images"] == 50
    assert list(said["rules"]) == ["roe"] and said["rules"]["roe"]["clean_accuracy"] > 80


def test_networks_of_any_name(tmp_path: Path, capsys) -> None:
    said = certified(
        capsys, "digits", "--model", "gossamer_digits_resnet", "--parts", "3", "--epochs", "6",
        "--augment", "--test-images", "60", "--out", tmp_path,
    )  # fmt: skip
    assert said["base"] == "gossamer_digits_resnet"
    assert said["rules"]["vote"]["clean_accuracy"] > 40


def test_parts_that_lack_classes_are_told(tmp_path: Path, capsys, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        run("evaluate", "certify", "digits", "--parts", "80", "--out", tmp_path)
    assert "roe (%)" in capsys.readouterr().out
    assert "of the parts lack a class" in caplog.text
    assert "take fewer parts or more data" in caplog.text
    summary = json.loads((tmp_path / "certified.json").read_text())
    assert summary["parts_lacking_classes"] > 0.5 and summary["sizes"] == [0, 8, 16, 24, 32, 40]


def test_stored_logits(tmp_path: Path, capsys) -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=(40, 12, 5)).astype(np.float32)
    labels = random.integers(0, 5, 40)
    spread = finite_spread(12, [0, 5])
    np.savez(tmp_path / "all.npz", logits=logits, labels=labels, spread=spread)
    said = certified(capsys, "--logits", tmp_path / "all.npz", "--out", tmp_path / "one")
    np.save(tmp_path / "logits.npy", logits)
    np.save(tmp_path / "labels.npy", labels)
    np.save(tmp_path / "spread.npy", spread)
    apart = ("--labels", tmp_path / "labels.npy", "--spread", tmp_path / "spread.npy")
    again = certified(
        capsys, "--logits", tmp_path / "logits.npy", *apart, "--out", tmp_path / "two"
    )
    for rule in ("vote", "roe"):
        expected = certify(logits, rule, spread)
        for answer, folder in ((said, "one"), (again, "two")):
            table = pl.read_parquet(tmp_path / folder / f"{rule}.parquet")
            assert (table["radius"].to_numpy() == expected.radii).all()
            found = answer["rules"][rule]["certified_accuracy"]
            assert found == certified_accuracy(expected, labels, answer["sizes"]).tolist()
    alone = certified(capsys, "--logits", tmp_path / "logits.npy", "--out", tmp_path / "three")
    assert "certified_accuracy" not in alone["rules"]["roe"]
    table = pl.read_parquet(tmp_path / "three" / "roe.parquet")
    assert (table["radius"].to_numpy() == certify(logits).radii).all()


def test_refusals(tmp_path: Path, capsys, monkeypatch) -> None:
    def sentence(*words: str | Path) -> str:
        out = tmp_path / "refused"
        monkeypatch.setattr(
            "sys.argv", ["gossamer", "evaluate", "certify", *map(str, words), "--out", str(out)]
        )
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2 and not out.exists()
        return " ".join(capsys.readouterr().err.split())

    logits = tmp_path / "logits.npy"
    np.save(logits, np.zeros((4, 3, 2), np.float32))
    labels = tmp_path / "labels.npy"
    np.save(labels, np.array([0, 1, 2, 0]))
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK\x03\x04 and no more")
    named = tmp_path / "named.npz"
    np.savez(named, scores=np.zeros(3))
    objects = tmp_path / "objects.npy"
    np.save(objects, np.array([{}], dtype=object), allow_pickle=True)
    assert "either labelled images or --logits" in sentence()
    assert "either labelled images or --logits" in sentence("digits", "--logits", logits)
    assert "k and d are 1 or more, not 0" in sentence("digits", "--parts", "0")
    assert "trains one model a part" in sentence("digits", "--d", "2")
    assert "at least one image, not 0" in sentence("digits", "--test-images", "0")
    assert "have their own" in sentence("digits", "--labels", labels)
    assert "class 2 at 2, but there are 2 classes" in sentence(
        "--logits", logits, "--labels", labels
    )
    assert "0 samples or more, not -3" in sentence("--logits", logits, "--sizes", "-3")
    assert "no file" in sentence("--logits", tmp_path / "absent.npy")
    assert "no array of numbers" in sentence("--logits", broken)
    assert "no array of numbers" in sentence("--logits", objects)
    assert 'holds scores; an array "logits" is needed' in sentence("--logits", named)
    assert "there is no timm model" in sentence("digits", "--model", "resnet0")
