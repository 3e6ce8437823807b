"""The commands on token stores, as a user types them; and the accounts of the experiment."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from gossamer.cli import main
from gossamer.data.token_store import TokenStore
from gossamer.experiments.data.tokens import (
    as_jpeg,
    carve_order,
    resized_back,
    shrunk,
    subset_within,
    zipped,
)


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gossamer", "data", *map(str, words)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos") / "photos"
    digits = load_digits()
    for digit, name in ((0, "zero"), (1, "one"), (4, "four")):
        (folder / name).mkdir(parents=True)
        for number, pixels in enumerate(digits.images[digits.target == digit][:60]):
            image = Image.fromarray((pixels * 255 / 16).astype(np.uint8)).resize((16, 16))
            image.convert("RGB").save(folder / name / f"{number}.png")
    return folder


def test_from_photos_to_a_classifier(run, photos, tmp_path) -> None:
    store = tmp_path / "photos.tokens"
    code, out, err = run(
        "tokenize", photos, "--out", store, "--patch", 2, "--codes", 32, "--epochs", 2,
        "--adapt-epochs", 1, "--json",
    )  # fmt: skip
    assert code == 0, err
    report = json.loads(out)
    assert report["grid"] == [8, 8] and sum(report["images"].values()) == 180
    # Three classes of 48 training images after a fifth went to the test split, less validation.
    assert report["images"]["test"] == 36
    assert report["bytes_per_image"]["train"] < 16 * 16 * 3 / 8
    assert Path(report["adapt"]).is_file()
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "photos.tokens", "photos.tokens.adapt.safetensors",
    ]  # fmt: skip

    sheet = tmp_path / "sheet.png"
    code, out, _ = run("tokens", store, "--pictures", sheet, "--count", 9)
    assert code == 0 and "codes are used" in out
    drawn = np.asarray(Image.open(sheet))
    assert drawn.shape == (48, 48, 3) and drawn.std() > 20

    net = tmp_path / "net.safetensors"
    code, out, err = run(
        "train-tokens", store, "--out", net, "--adapt", report["adapt"], "--pretrain-epochs", 1,
        "--epochs", 2, "--batch-size", 32, "--width", 32, "--depth", 1, "--heads", 4, "--json",
    )  # fmt: skip
    assert code == 0, err
    assert 0 <= json.loads(out)["test"] <= 100
    assert net.is_file() and not list(tmp_path.glob("*.run.*"))

    # Another store of the same tokenizer holds the same codes.
    again = tmp_path / "again.tokens"
    code, _, err = run(
        "tokenize", photos, "--out", again, "--tokenizer", store / "tokenizer.safetensors",
        "--no-compress",
    )  # fmt: skip
    assert code == 0, err
    rows = np.arange(36)
    first, second = TokenStore(store).splits["test"], TokenStore(again).splits["test"]
    assert torch.equal(first.fetch(rows), second.fetch(rows))


def test_bad_input_is_one_sentence(run, photos, tmp_path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ")
    for words, message in (
        (("tokenize", empty, "--out", tmp_path / "s"), "holds none of the data"),
        (("tokenize", photos, "--out", photos), "is no store of tokens"),
        (("tokenize", photos, "--out", tmp_path / "s", "--patch", 3), "2, 4, 8, 16, 32 or 64"),
        (("tokenize", photos, "--out", tmp_path / "s", "--image-size", 18, "--patch", 4),
         "open them at 16 x 16"),
        (("tokenize", photos, "--out", tmp_path / "s", "--tokenizer", broken),
         "truncated or no tokenizer"),
        (("tokenize", photos, "--out", tmp_path / "s", "--codes", 1), "--codes at least 2"),
        (("tokens", empty), "has no store.json"),
        (("train-tokens", empty, "--out", tmp_path / "n"), "has no store.json"),
        (("train-tokens", empty, "--out", empty), "is a folder"),
    ):  # fmt: skip
        code, _, err = run(*words)
        assert code == 2 and message in err, (words, err)
        assert err.count("\n") == 1 and "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.safetensors", "empty"]


def test_a_corrupt_image_is_named(run, photos, tmp_path) -> None:
    folder = tmp_path / "photos"
    for source in photos.rglob("*.png"):
        target = folder / source.relative_to(photos)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    (folder / "one" / "3.png").write_bytes(b"no image")
    code, _, err = run("tokenize", folder, "--out", tmp_path / "s", "--patch", 2)
    assert code == 2 and "one/3.png" in err
    assert not (tmp_path / "s").exists()


# Bytes of pixels in the experiment


def real() -> torch.Tensor:
    images = torch.from_numpy(load_digits().images[:300]).float().unsqueeze(1)
    return torch.nn.functional.interpolate(images * 255 / 16, size=(32, 32))


def test_bytes_of_subsets_are_those_asked_for() -> None:
    raw = real()
    order = np.arange(300)
    kept = subset_within(raw, order, 5000)
    assert zipped(raw[:kept]) <= 5000 < zipped(raw[: kept + 1])
    assert subset_within(raw, order, 1 << 30) == 300


def test_every_beginning_has_all_classes() -> None:
    labels = torch.tensor([0] * 50 + [1] * 100 + [2] * 50)
    order = carve_order(labels)
    assert sorted(order.tolist()) == list(range(200))
    for count in (20, 40, 100):
        found = torch.bincount(labels[torch.from_numpy(order[:count])], minlength=3) / count
        torch.testing.assert_close(found, torch.tensor([0.25, 0.5, 0.25]), atol=0.06, rtol=0)


def test_jpeg_is_counted_without_what_files_share() -> None:
    raw = real()[:20]
    back, sizes = as_jpeg(raw, 5)
    assert back.shape == raw.shape and len(sizes) == 20
    # Tables and headers are most of such a small file.
    assert sizes.min() > 10 and sizes.max() < 250
    assert (back.float() - raw).square().mean() < 0.2 * raw.var()


def test_smaller_pictures_fit() -> None:
    raw = real()
    back, side, size = shrunk(raw, 9000)
    assert size <= 9000 and 1 < side < 32
    again = resized_back(raw, side)
    assert torch.equal(back, again) and again.shape == raw.shape
    assert shrunk(raw, 1 << 30)[1] == 32
