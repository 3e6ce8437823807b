"""Results as other programs write them: tables of any columns, logits, and public dumps."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.special import log_softmax

from gossamer.core.errors import InputError
from gossamer.evaluate.evaluation_pool import EvaluationPool, measured_of
from gossamer.evaluate.ranking_baselines import mean_score
from gossamer.evaluate.result_logs import read_logits, renamed

TRIALS = pa.table(
    {
        "set": ["a", "a", "b", "b", "a"],
        "who": ["p", "q", "p", "q", "q"],
        "file": ["1_p_cat.png", "7_q_cat.png", "2_p_cat.png", "3_q_cat.png", "8_q_dog.png"],
        "right": [True, False, False, True, True],
    }
)
ROLES = {"model": "who", "sample": "set,file", "score": "right"}


def test_columns_of_other_names() -> None:
    results, samples = renamed(TRIALS, ROLES, sample_pattern=r"_(\w+)\.png$")
    # Its first group counts, from the first underscore on.
    assert results["sample"].to_pylist()[0] == "a/p_cat"
    results, samples = renamed(TRIALS, ROLES, sample_pattern=r"_([a-z]+)\.png$")
    assert results["sample"].to_pylist() == ["a/cat", "a/cat", "b/cat", "b/cat", "a/dog"]
    assert results["kind"].to_pylist() == ["binary"] * 5
    assert samples.to_pylist() == [
        {"id": "a/cat", "set": "a", "file": "1_p_cat.png"},
        {"id": "b/cat", "set": "b", "file": "2_p_cat.png"},
        {"id": "a/dog", "set": "a", "file": "8_q_dog.png"},
    ]
    measured = measured_of(results)
    assert measured.models == ("p", "q")
    assert mean_score(measured.scores).tolist() == [0.5, pytest.approx(2 / 3)]


def test_names_that_are_left_out_are_their_own(tmp_path: Path) -> None:
    table = pa.table({"model": [1, 2], "question": [5, 5], "score": [0.25, 3.5]})
    results, samples = renamed(table, {"sample": "question"})
    assert results.to_pylist()[1] == {
        "model": "2", "sample": "5", "score": 3.5, "kind": "numeric",
    }  # fmt: skip
    assert samples.to_pylist() == [{"id": "5"}]
    whole, _ = renamed(table, {"sample": "question"}, sample_pattern=r"\d")
    assert whole["sample"].to_pylist() == ["5", "5"]


@pytest.mark.parametrize(
    ("roles", "pattern", "says"),
    [
        ({"modell": "who"}, None, "no 'modell' in a measurement"),
        ({"model": "none"}, None, "no column 'none'; it has set, who, file, right"),
        (ROLES | {"score": "right,set"}, None, "a score is one column"),
        (ROLES, "(", "no regular expression"),
        (ROLES, "dog", "does not fit the sample '1_p_cat.png'"),
    ],
)
def test_unusable_columns(roles: dict[str, str], pattern: str | None, says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        renamed(TRIALS, roles, sample_pattern=pattern)


def test_logits(tmp_path: Path) -> None:
    path = tmp_path / "l.npz"
    random = np.random.default_rng(0)
    one, two = random.normal(size=(2, 6, 3)).astype(np.float16)
    label = np.array([0, 1, 2, 2, 1, 0], np.uint8)
    np.savez(path, label=label, one=one, two=two)
    results, samples = read_logits(path)
    measured = measured_of(results)
    right = [float((logits.argmax(1) == label).mean()) for logits in (one, two)]
    assert mean_score(measured.scores).tolist() == pytest.approx(right)
    assert samples["label"].to_pylist() == label.tolist()
    results, _ = read_logits(path, metric="log-probability")
    expected = log_softmax(two.astype(np.float64), 1)[np.arange(6), label]
    np.testing.assert_allclose(results["score"].to_numpy()[6:], expected)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"one": np.zeros((2, 3))}, "no whole numbers called label"),
        ({"label": np.zeros(2, int)}, "no whole numbers called label"),
        ({"label": np.zeros(2), "one": np.zeros((2, 3))}, "no whole numbers called label"),
        ({"label": np.zeros(3, int), "one": np.zeros((2, 3))}, "logits [3, classes] are needed"),
        ({"label": np.full(2, 3), "one": np.zeros((2, 3))}, "labels outside of the 3 classes"),
        ({"label": np.zeros(2, int), "one": np.full((2, 3), np.nan)}, "holds NaN or infinity"),
    ],
)
def test_unusable_logits(tmp_path: Path, arrays: dict[str, Any], says: str) -> None:
    np.savez(tmp_path / "l.npz", **arrays)
    with pytest.raises(InputError, match=re.escape(says)):
        read_logits(tmp_path / "l.npz")


def test_damaged_logits(tmp_path: Path) -> None:
    np.savez(tmp_path / "l.npz", label=np.zeros(2, int), one=np.zeros((2, 3)))
    content = (tmp_path / "l.npz").read_bytes()
    np.save(tmp_path / "one.npy", np.zeros((2, 3)))
    one = (tmp_path / "one.npy").read_bytes()
    for damaged in (content[:100], b"", b"logits", content.replace(b"NUMPY", b"NUMPX"), one):
        (tmp_path / "d.npz").write_bytes(damaged)
        with pytest.raises(InputError, match="file that can be read"):
            read_logits(tmp_path / "d.npz")


def test_command(
    tmp_path: Path, exit_code: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(TRIALS, tmp_path / "t.parquet")
    pool = tmp_path / "pool"
    roles = [f"{role}={name}" for role, name in ROLES.items()]
    words = ["collect", pool, tmp_path / "t.parquet", "--columns", *roles]
    assert exit_code("evaluate", *words, "--sample-pattern", "_([a-z]+).png") == 0
    capsys.readouterr()
    assert (
        exit_code("evaluate", "rank", pool, "--where", "set.eq=b", "--method", "mean", "--json")
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert [entry["model"] for entry in found["models"]] == ["q", "p"]
    for more, says in [
        (["--columns", "who"], "write model=, sample= or score=COLUMN"),
        (["--kind", "helm", "--sample-pattern", "x"], "are for tables"),
        (["--kind", "logits", "--metric", "f1"], "correct and log-probability, no 'f1'"),
    ]:
        assert exit_code("evaluate", "collect", tmp_path / "n", tmp_path / "t.parquet", *more) == 2
        assert says in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "n").exists()


def test_public_dumps(real_data: Callable[[str], Path], tmp_path: Path) -> None:
    """Trials of people, logits of networks and ratings of an arena."""
    folder = real_data("eval_scores")
    people = EvaluationPool(tmp_path / "people")
    table = pq.read_table(folder / "human_object_recognition.parquet")
    roles = {"model": "dataset,subject", "sample": "dataset,image", "score": "correct"}
    results, samples = renamed(table, roles, sample_pattern=r"_s\d+_(.*)")
    people.add(results, samples=samples)
    found = people.query(filters={"dataset.eq": "colour"})
    measured = people.measured(found.samples)
    assert len(measured.models) == 4 and len(found.samples) == 1280
    assert (np.bincount(measured.scores.models) == 1280).all()  # everybody saw every image

    results, _ = read_logits(folder / "cifar10_jpeg_test_logits.npz")
    measured = measured_of(results)
    accuracy = dict(zip(measured.models, mean_score(measured.scores), strict=True))
    assert accuracy["logits_resnet20"] == pytest.approx(0.81, abs=0.02)
    assert accuracy["logits_resnet56"] == max(accuracy.values())

    ratings = pq.read_table(folder / "arena_ratings.parquet")
    results, _ = renamed(ratings, {"sample": "board,category", "score": "rating"})
    assert len(measured_of(results).scores.values) == len(ratings) == 15_825
