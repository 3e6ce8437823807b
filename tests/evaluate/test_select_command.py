"""``gossamer evaluate select``: a pool is trained, kept, and used on files; bad input."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from gossamer.cli import main
from gossamer.core.errors import InputError
from gossamer.datasets.perfusion import ACQUISITIONS, drawn_phantoms, standardised
from gossamer.evaluate.uncertainty_selection import (
    Calibration,
    Pool,
    Scan,
    calibrate,
    load_pool,
    pool_network,
    save_pool,
)


def run(*arguments: object) -> int:
    """Exit code of the command line."""
    own = sys.argv
    sys.argv = ["gossamer", "evaluate", "select", *map(str, arguments)]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = own
    return 0


def answered(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], says: str, *arguments: object) -> None:
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1, error


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten series with masks, [6, 32, 32]."""
    folder = tmp_path_factory.mktemp("labelled")
    series, masks = drawn_phantoms(10, frames=6, size=32, seed=0)
    for number, (one, mask) in enumerate(zip(series, masks, strict=True)):
        np.save(folder / f"s{number}.npy", 50.0 + 20.0 * one.numpy())
        np.save(folder / f"s{number}_mask.npy", mask.numpy().astype(np.uint8))
    return folder


@pytest.fixture(scope="module")
def trained(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "pool"
    assert run(
        "--train", "--pool", folder, "--data", labelled, "--networks", 2, "--patch", 16, "--epochs",
        25, "--width", 8, "--depth", 2, "--fine-stride", 4, "--learning-rate", 0.01, "--device",
        "cpu",
    ) == 0  # fmt: skip
    return folder


def test_a_trained_pool_is_used_as_it_was_trained(
    trained: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = load_pool(trained)
    assert (len(pool.networks), pool.frames) == (2, 6)
    assert pool.scan == Scan(patch=16, stride=4, fine_stride=4)
    out = tmp_path / "out"
    report = answered(capsys, "--pool", trained, "--data", labelled, "--out", out)
    assert report == json.loads((out / "selection.json").read_text())
    assert [one["name"] for one in report["series"]] == [f"s{number}" for number in range(10)]
    for one in report["series"]:
        frames = standardised(torch.from_numpy(np.load(labelled / f"{one['name']}.npy")))
        found = pool.select(frames)
        assert one["network"] == found.index
        assert one["flagged"] == found.flagged
        upp = [np.inf if value is None else value for value in one["upp"]]
        np.testing.assert_allclose(upp, found.upp)
        np.testing.assert_array_equal(np.load(one["mask"]), found.mask)
        np.testing.assert_allclose(np.load(one["uncertainty"]), found.u_map, atol=1e-6)
        assert one["dice"]["oracle"] >= max(one["dice"]["selected"], one["dice"]["established"])
    assert np.mean([one["dice"]["selected"] for one in report["series"]]) > 0.6
    # The threshold is the largest of the two validation series: no more than eight are above.
    assert sum(one["flagged"] for one in report["series"]) <= 8


def test_nifti_in_nifti_out(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    series, masks = drawn_phantoms(2, frames=6, size=32, acquisition=ACQUISITIONS["noisy"], seed=9)
    affine = np.diag([1.5, 1.5, 8.0, 1.0])
    volume = series.numpy().transpose(3, 2, 0, 1)
    nibabel.Nifti1Image(volume, affine).to_filename(tmp_path / "heart.nii.gz")
    nibabel.Nifti1Image(masks.numpy().astype(np.uint8).transpose(2, 1, 0), affine).to_filename(
        tmp_path / "heart_mask.nii.gz"
    )
    report = answered(
        capsys, "--pool", trained, "--data", tmp_path, "--out", tmp_path / "out", "--fine-stride", 8
    )
    assert [one["name"] for one in report["series"]] == ["heart-slice0", "heart-slice1"]
    assert report["threshold"] is None and "No threshold" in report["remarks"][0]
    pool = load_pool(trained)
    for number, one in enumerate(report["series"]):
        image = nibabel.load(one["mask"])
        assert np.array_equal(image.affine, affine)
        mask = Pool(
            pool.networks, 6, Scan(patch=16, stride=4, fine_stride=8)
        ).select(standardised(series[number])).mask  # fmt: skip
        assert np.array_equal(image.get_fdata()[:, :, 0].T, mask)
        assert nibabel.load(one["uncertainty"]).shape == (32, 32, 1)


def test_a_pool_survives_the_disk(tmp_path: Path) -> None:
    torch.manual_seed(0)
    networks = tuple(pool_network(3, width=2, depth=2).eval() for _ in range(2))
    series = torch.randn(3, 24, 24)
    scan = Scan(patch=12, stride=3, fine_stride=4, min_area=0.0, batch_size=5)
    pool = Pool(networks, 3, scan, Calibration(1, float("inf"), (0.1, 0.2)))
    save_pool(tmp_path / "pool", pool)
    again = load_pool(tmp_path / "pool")
    assert (again.scan, again.calibration) == (scan, pool.calibration)
    # Nine windows in batches of five: the last batch is a smaller one, down to a single window.
    np.testing.assert_allclose(again.select(series).upp, pool.select(series).upp, rtol=1e-4)
    (tmp_path / "pool" / "pool.json").unlink()
    bare = load_pool(tmp_path / "pool")
    assert bare.scan == Scan(patch=12, stride=3, fine_stride=1)
    assert bare.calibration is None
    with pytest.raises(InputError, match="networks for 3 frames"):
        bare.select(series[:2])
    assert calibrate(bare.networks, [(series, np.ones((24, 24)))], scan).threshold >= 0.0


def test_a_pool_of_one_says_that_nothing_was_selected(
    trained: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained / "member-000", tmp_path / "pool" / "only")
    report = answered(
        capsys, "--pool", tmp_path / "pool", "--data", labelled / "s0.npy", "--out", tmp_path / "o"
    )
    assert report["series"][0]["network"] == 0
    assert "holds one network" in report["remarks"][0]


def test_bad_input_is_one_sentence(
    trained: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = labelled / "s0.npy"
    out = ("--out", tmp_path / "out")

    def select(says: str, *more: object, pool: Path = trained, data: object = one) -> None:
        refused(capsys, says, "--pool", pool, "--data", data, *out, *more)

    select("is no folder of networks", pool=tmp_path / "none")
    (tmp_path / "empty").mkdir()
    select("holds no networks", pool=tmp_path / "empty")
    select("does not exist", data=tmp_path / "none")
    select("there are no phantoms", data="phantoms:other")
    select("networks for 6 frames", data="phantoms")
    select("stride of 1 up to that side", "--fine-stride", 0)
    select("leave gaps", "--trim", 7)
    select("share of the image", "--min-area", 2)
    np.save(tmp_path / "small.npy", np.random.default_rng(0).normal(size=(6, 16, 16)))
    select("covers the whole series", data=tmp_path / "small.npy")
    np.save(tmp_path / "tiny.npy", np.random.default_rng(0).normal(size=(6, 8, 8)))
    select("does not fit", data=tmp_path / "tiny.npy")
    np.save(tmp_path / "tiny.npy", np.zeros((6, 32, 32)))
    select("same value everywhere", data=tmp_path / "tiny.npy")
    broken = tmp_path / "broken"
    shutil.copytree(trained, broken)
    (broken / "pool.json").write_text('{"scan": {"patch": 16, "color": 1}, "calibration": null}')
    select("does not describe a pool", pool=broken)
    (broken / "pool.json").write_text('{"scan": {"patch": 18}, "calibration": null}')
    select("windows of 18 pixels", pool=broken)
    (broken / "member-001" / "weights.safetensors").write_bytes(b"x")
    select("not a whole safetensors file", pool=broken)
    assert not (tmp_path / "out").exists()

    def train(says: str, *more: object, data: object = labelled) -> None:
        refused(
            capsys, says, "--train", "--pool", tmp_path / "new", "--data", data, "--epochs", 1,
            *(more if "--patch" in more else (*more, "--patch", 16)),
        )  # fmt: skip

    train("leaves nothing to select", "--networks", 1)
    train("only one file", data=one)
    train("covers the whole series", "--patch", 32)
    train("percentile in 0..100", "--percentile", 101, "--networks", 2, "--width", 1, "--depth", 1)
    lacking = tmp_path / "lacking"
    shutil.copytree(labelled, lacking)
    (lacking / "s3_mask.npy").unlink()
    train("s3 has no mask", data=lacking)
    np.save(lacking / "s3_mask.npy", np.zeros((32, 32)))
    train("s3 has an empty mask", data=lacking)
    assert not (tmp_path / "new").exists()
    refused(capsys, "something else than a pool", "--train", "--pool", labelled, "--data", labelled)
