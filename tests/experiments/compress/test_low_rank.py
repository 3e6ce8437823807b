from dataclasses import replace

import pytest
import torch
from torch import nn

from gossamer.core.errors import InputError
from gossamer.core.experiment import Result
from gossamer.experiments.compress.low_rank import (
    DIGITS,
    EXPERIMENT,
    SHARE,
    LeastSquares,
    _Contest,
    autoencoder,
    cifar_work,
    contend,
    full,
    linear_map,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_ordered_decomposition_finds_the_best_approximations():
    row = linear_map(0, steps=1200)
    assert row["singular_values"][:3] == pytest.approx([7.903, 6.213, 3.046], abs=1e-3)
    assert row["norms"][:3] == pytest.approx(row["singular_values"][:3], abs=0.15)
    assert max(row["norms"][3:]) < 0.15
    assert row["errors"][0] < 1e-3 and row["errors"][1] < 1e-2
    # the untrained map is as far away as the matrix is large
    assert linear_map(0, steps=0)["worst_error"] > 50


def test_three_points_need_three_components():
    row = autoencoder(0, steps=1500)
    assert row["components"] == 3
    assert row["squared_error"] < 0.1
    assert autoencoder(0, steps=30, lam=0.0)["components"] == 10


def test_least_squares_is_half_the_squared_error_a_sample():
    task = LeastSquares(torch.eye(2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    module = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(module.weight)
    assert task.score(module) == pytest.approx(-0.5 * (1 + 4 + 9 + 16) / 2)


def test_contenders_on_digits_in_small():
    work = replace(DIGITS, epochs=4, lams=(0.0, 1e-3), rates=(0.02,), shares=(1.0, 0.25), lr=0.02)
    rows = list(contend(work, 0))
    by_name = {}
    for row in rows:
        by_name.setdefault(row["contender"], []).append(row)
    assert list(by_name) == [
        "dense", "SVD", "SVD by energy", "Maestro", "Maestro by importance",
        "Maestro, lam 0", "Maestro, lam 0.001",
        "Maestro by lam", "HGL without LoD", "LoD without HGL", "LoD across layers",
        "fixed rank", "Pufferfish", "SVD, fine-tuned", "magnitude pruning",
        "iterative magnitude pruning", "unit pruning",
    ]  # fmt: skip
    dense = 64 * 128 + 128 * 128 + 128 * 10 + 128 + 128 + 10
    quarter = 16 * (64 + 128) + 32 * 256 + 128 * 10 + 128 + 128 + 10
    assert by_name["dense"][0]["parameters"] == dense
    for name in ("SVD", "Maestro", "LoD without HGL", "fixed rank", "Pufferfish",
                 "magnitude pruning", "iterative magnitude pruning"):  # fmt: skip
        assert by_name[name][-1]["share"] == SHARE
        assert by_name[name][-1]["parameters"] == quarter, name
    for name in ("SVD by energy", "Maestro by importance", "unit pruning"):
        assert 0.9 * quarter < by_name[name][-1]["parameters"] <= quarter
    curve = by_name["SVD"]
    assert curve[0]["drop"] == 0 and curve[0]["accuracy"] == by_name["dense"][0]["accuracy"]
    assert curve[1]["drop"] == curve[0]["accuracy"] - curve[1]["accuracy"]
    sizes = by_name["Maestro by lam"][0]["sizes"]
    assert sizes == [dense, dense] and by_name["Maestro by lam"][0]["largest_rise"] == 0
    # a factorised pass of full rank is dearer than a dense one, of random ranks cheaper than that
    full_pass = 64 * (64 + 128) + 128 * 256 + 1280
    ordered = by_name["LoD without HGL"][0]["training_macs"] / (4 * 862)
    assert 0.5 * full_pass < ordered < full_pass
    assert by_name["dense"][0]["training_macs"] / (4 * 862) == 64 * 128 + 128 * 128 + 1280
    assert rows[0] == next(iter(contend(work, 0)))  # a function of the seed


def test_a_trial_that_diverges_is_lost_but_not_all():
    work = replace(DIGITS, epochs=1)
    contest = _Contest(work, 0)
    trials = contest.tried(contest.dense, [0.02, 1e6])
    assert [trial.setting["learning_rate"] for trial in trials] == [0.02]
    with pytest.raises(InputError, match="loss became"):
        contest.tried(contest.dense, [1e6])


def test_full_needs_the_images(tmp_path):
    with pytest.raises(InputError, match="no train_jpeg"):
        next(iter(full([0], images=tmp_path)))
    network = cifar_work(tmp_path).network()
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(11.17e6, rel=0.01)


def test_result_is_drawn_and_judged(tmp_path):
    rows = []
    for seed in range(2):
        rows.append({"work": "linear map", "seed": seed, "worst_error": 5e-4 + seed * 2e-3})
        for name, accuracy, drop in (("SVD", 90, 7.0), ("Maestro", 95, 2.5)):
            rows.append(
                {"contender": name, "share": 0.25, "seed": seed, "accuracy": accuracy,
                 "drop": drop - seed, "parameters": 100, "parameters_share": 0.5}
            )  # fmt: skip
        for name, size in (("Maestro, lam 0", 100), ("Maestro, lam 0.001", 90)):
            rows.append(
                {"contender": name, "share": None, "seed": seed, "accuracy": 95,
                 "parameters": size, "parameters_share": size / 200}
            )  # fmt: skip
        rows.append({"contender": "Maestro by lam", "seed": seed, "largest_rise": seed})
    result = Result("maestro", "quick", tuple(rows), EXPERIMENT.claims)
    assert [e.holds for e in result.evidence()] == [False, True, True, False, True]
    EXPERIMENT.draw(result, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
