"""Rankings from scores of any kind: invariances, missing results, intervals, pools, commands."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import kendalltau

from gossamer.core.errors import InputError
from gossamer.evaluate.comparisons import Scores, choices_of, wins_of
from gossamer.evaluate.evaluation_pool import EvaluationPool, measured_of
from gossamer.evaluate.plackett_luce import NotIdentifiable, fit_lists, fit_pairs
from gossamer.evaluate.ranking import rank
from gossamer.evaluate.ranking_baselines import borda, dowdall, elo, mean_score
from gossamer.evaluate.result_logs import read_harness, read_helm


def gumbel(models: int, samples: int, seed: int = 0, apart: float = 0.3) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.gumbel(size=(models, samples)) + apart * np.arange(models)[:, None]


def test_wins_against_a_loop() -> None:
    matrix = np.random.default_rng(0).integers(0, 3, (5, 40)).astype(float)
    matrix[np.random.default_rng(1).random((5, 40)) < 0.3] = np.nan
    scores = Scores.of_matrix(matrix)
    np.testing.assert_array_equal(
        np.nan_to_num(scores.matrix(), nan=-1), np.nan_to_num(matrix, nan=-1)
    )
    for ties in (1.0, 0.5, 0.0):
        expected = np.zeros((5, 5))
        for column in matrix.T:
            for i in range(5):
                for j in range(5):
                    if i != j and not np.isnan(column[[i, j]]).any():
                        expected[i, j] += (column[i] > column[j]) + ties * (column[i] == column[j])
        np.testing.assert_allclose(wins_of(scores, ties=ties), expected)
    sizes = (~np.isnan(matrix)).sum(0)
    each = wins_of(scores, ties=0.5, weighting="samples")
    assert each.sum() == pytest.approx((sizes > 1).sum())


def test_utilities_of_luce_data_are_found() -> None:
    scores = Scores.of_matrix(gumbel(6, 20_000))
    np.testing.assert_allclose(np.diff(fit_pairs(wins_of(scores))), 0.3, atol=0.03)
    np.testing.assert_allclose(np.diff(fit_lists(choices_of(scores), 6)), 0.3, atol=0.03)


def test_only_order_within_a_sample_counts() -> None:
    matrix = gumbel(5, 200)
    random = np.random.default_rng(3)
    scaled = matrix * np.exp(2 * random.normal(size=200)) + 50 * random.normal(size=200)
    before, after = (fit_pairs(wins_of(Scores.of_matrix(m))) for m in (matrix, scaled))
    np.testing.assert_allclose(before, after, atol=1e-9)
    assert not np.allclose(*(mean_score(Scores.of_matrix(m)) for m in (matrix, scaled)))


def test_order_of_models_and_samples_does_not_matter_but_for_elo() -> None:
    matrix = gumbel(5, 100)
    random = np.random.default_rng(1)
    rows, columns = random.permutation(5), random.permutation(100)
    turned = matrix[rows][:, columns]
    first, second = (fit_pairs(wins_of(Scores.of_matrix(m))) for m in (matrix, turned))
    np.testing.assert_allclose(first[rows], second, atol=1e-8)
    scores = Scores.of_matrix(matrix)
    assert not np.allclose(elo(scores, seed=0), elo(scores, seed=1))


def test_samples_that_say_nothing() -> None:
    matrix = gumbel(4, 50)
    base = wins_of(Scores.of_matrix(matrix))
    alone = np.full((4, 1), np.nan)
    alone[2] = 1.0
    np.testing.assert_array_equal(wins_of(Scores.of_matrix(np.hstack([matrix, alone]))), base)
    tied = wins_of(Scores.of_matrix(np.hstack([matrix, np.ones((4, 1))])))
    np.testing.assert_array_equal(tied - base, 1 - np.eye(4))
    lists = choices_of(Scores.of_matrix(np.ones((4, 3))))
    assert len(lists.winners) == 0


def test_choices_of_right_and_wrong() -> None:
    matrix = np.array([[1.0], [0.0], [1.0], [0.0]])
    lists = choices_of(Scores.of_matrix(matrix))
    assert sorted(lists.winners.tolist()) == [0, 2]
    assert lists.starts.tolist() == [0, 2, 4]
    assert [sorted(lists.losers[k : k + 2].tolist()) for k in (0, 2)] == [[1, 3], [1, 3]]


def test_positions() -> None:
    scores = Scores.of_matrix(np.array([[3.0, 1.0], [2.0, 1.0], [1.0, np.nan]]))
    np.testing.assert_allclose(borda(scores), [(1 + 0.5) / 2, (0.5 + 0.5) / 2, 0.0])
    np.testing.assert_allclose(dowdall(scores), [(1 + 1 / 1.5) / 2, (0.5 + 1 / 1.5) / 2, 1 / 3])


def test_means_over_data_sets_of_other_scales() -> None:
    matrix = np.array([[0.0, 1.0, 10.0, 50.0], [1.0, 1.0, 90.0, 50.0]])
    found = mean_score(Scores.of_matrix(matrix), np.array([0, 0, 1, 1]))
    np.testing.assert_allclose(found, [(0.5 + 0.25) / 2, (1 + 0.75) / 2])


def test_strong_models_on_hard_samples_only() -> None:
    """What is missing is not missing at random: the mean is fooled, comparisons are not."""
    random = np.random.default_rng(0)
    skill, hardness = np.linspace(0, 3, 8), random.uniform(-2, 7, 3000)
    matrix = skill[:, None] - hardness + random.gumbel(size=(8, 3000))
    seen = random.random((8, 3000)) < np.exp(-np.abs(1.5 * skill[:, None] - hardness))
    matrix[~seen] = np.nan
    scores = Scores.of_matrix(matrix)
    luce = kendalltau(fit_pairs(wins_of(scores)), skill).statistic
    mean = kendalltau(mean_score(scores), skill).statistic
    assert luce > 0.9 and mean < -0.5


def test_intervals_cover_and_ranks_are_shared() -> None:
    matrix = gumbel(4, 400, apart=0.0)
    matrix[3] += 1.0
    found = rank(Scores.of_matrix(matrix), ["a", "b", "c", "best"])
    assert found.models[0] == "best"
    assert (found.best_rank[0], found.worst_rank[0]) == (1, 1)
    assert {int(r) for r in found.worst_rank[1:]} == {4}
    assert (found.low < found.utility).all() and (found.utility < found.high).all()
    anchored = rank(Scores.of_matrix(matrix), ["a", "b", "c", "best"], anchor="a", bootstrap=20)
    assert anchored.utility[anchored.models.index("a")] == 0.0


def test_bootstrap_is_over_samples_not_pairs() -> None:
    """The half width of Monte Carlo repetitions, within a third."""
    spread = np.std(
        [fit_pairs(wins_of(Scores.of_matrix(gumbel(5, 150, s)))) for s in range(150)], 0
    )
    found = rank(Scores.of_matrix(gumbel(5, 150, 999)), bootstrap=200)
    half = (found.high - found.low)[np.argsort([int(m) for m in found.models])] / 2
    np.testing.assert_allclose(half, 1.96 * spread, rtol=0.35)


def test_ties_everywhere_are_said() -> None:
    matrix = np.repeat(np.arange(200.0)[None], 3, axis=0)
    found = rank(Scores.of_matrix(matrix), bootstrap=5)
    assert found.utility == pytest.approx(np.zeros(3), abs=1e-12)
    assert found.remarks == ("Every comparison is a tie, so nothing orders the models.",)
    matrix[1, 7] = 8.0
    assert not rank(Scores.of_matrix(matrix), bootstrap=5).remarks


def test_rankings_that_cannot_be() -> None:
    with pytest.raises(InputError, match="only alone was measured"):
        rank(Scores.of_matrix(np.ones((1, 5))), ["alone"])
    apart = np.array([[1.0, np.nan], [np.nan, 1.0]])
    with pytest.raises(InputError, match="no sample was answered by two models"):
        rank(Scores.of_matrix(apart))
    always = np.array([[1.0, 1.0], [0.0, 0.0]])
    with pytest.raises(NotIdentifiable, match="strong never lost"):
        rank(Scores.of_matrix(always), ["strong", "weak"])
    assert rank(Scores.of_matrix(always), ["strong", "weak"], alpha=0.1).models[0] == "strong"
    with pytest.raises(InputError, match="no model 'c' to put at 0"):
        rank(Scores.of_matrix(gumbel(2, 9)), ["a", "b"], anchor="c")
    with pytest.raises(InputError, match="has two scores on sample 3"):
        Scores.of(np.array([3, 3]), np.array([1, 1]), np.array([0.0, 1.0]))
    few = rank(Scores.of_matrix(gumbel(2, 9)), bootstrap=0)
    assert "Only 9 samples" in few.remarks[0]


def rows_of(matrix: np.ndarray) -> list[dict[str, object]]:
    return [
        {"model": f"m{i}", "sample": f"s{j}", "score": float(matrix[i, j])}
        for i, j in np.argwhere(~np.isnan(matrix))
    ]


@pytest.fixture
def pool(tmp_path: Path) -> EvaluationPool:
    made = EvaluationPool(tmp_path / "pool")
    matrix = gumbel(4, 60)
    subjects = ["biology", "law", "law"]
    samples = [
        {
            "id": f"s{j}", "text": f"question {j} about {subjects[j % 3]}", "tags": ["x"] * (j % 4),
            "metadata": {"subject": subjects[j % 3], "year": 2000 + j},
        }
        for j in range(60)
    ]  # fmt: skip
    made.add(rows_of(matrix), samples=samples)
    return made


def test_a_pool_grows_and_the_latest_counts(pool: EvaluationPool) -> None:
    before = wins_of(pool.measured().scores)
    pool.add([{"model": "m9", "sample": "s0", "score": 99.0}])
    pool.add([{"model": "m0", "sample": "s0", "score": 1e9}])
    measured = pool.measured()
    assert measured.models == ("m0", "m1", "m2", "m3", "m9")
    row = measured.scores.matrix()[0, measured.samples.index("s0")]
    assert row == 1e9
    # Wins add up: those of the untouched samples are what they were.
    others = pool.measured([f"s{j}" for j in range(1, 60)])
    first = pool.measured(["s0"])
    total = wins_of(others.scores)
    assert total.sum() + 4 * 3 / 2 == before.sum()
    assert wins_of(first.scores)[0, -1] == 1


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"metadata.subject.eq": "law"}, lambda j: j % 3 > 0),
        ({"metadata.subject.ne": "law"}, lambda j: j % 3 == 0),
        ({"metadata.year.ge": 2050}, lambda j: j >= 50),
        ({"metadata.year.lt": "2005"}, lambda j: j < 5),
        ({"text.contains": "biology"}, lambda j: j % 3 == 0),
        ({"tags.len": 3}, lambda j: j % 4 == 3),
        ({"tags.contains": "x"}, lambda j: j % 4 > 0),
        ({"metadata.subject.eq": "law", "metadata.year.gt": 2030}, lambda j: j % 3 and j > 30),
    ],
)
def test_filters_return_exactly_what_fits(pool: EvaluationPool, filters: dict, expected) -> None:  # type: ignore[no-untyped-def, type-arg]
    found = pool.query(filters=filters)
    assert set(found.samples) == {f"s{j}" for j in range(60) if expected(j)}


def test_nearest_samples_are_those_of_brute_force(pool: EvaluationPool) -> None:
    random = np.random.default_rng(0)
    vectors = random.normal(size=(60, 8)).astype(np.float32)
    vectors[7] = vectors[3]  # a tie, broken by id
    asked = vectors[3] + 0.1 * random.normal(size=8).astype(np.float32)
    where = {text: k for k, text in enumerate(pool.samples()["text"].to_pylist())}
    assert pool.embed(lambda texts: vectors[[where[t] for t in texts]], space="test") == 60
    assert pool.embed(lambda texts: np.empty((0, 8)), space="test") == 0  # only what is new
    cosine = vectors @ asked / np.linalg.norm(vectors, axis=1) / np.linalg.norm(asked)
    ids = pool.samples()["id"].to_pylist()
    found = pool.query(near=asked, space="test", threshold=0.3)
    assert set(found.samples) == {ids[k] for k in np.flatnonzero(cosine > 0.3)}
    order = sorted(range(60), key=lambda k: (-round(float(cosine[k]), 5), ids[k]))
    assert list(pool.query(near=asked, space="test", top_k=5).samples) == [
        ids[k] for k in order[:5]
    ]
    both = pool.query(near=[asked, vectors[9]], space="test", threshold=0.1)
    second = vectors @ vectors[9] / np.linalg.norm(vectors, axis=1) / np.linalg.norm(vectors[9])
    assert set(both.samples) == {ids[k] for k in np.flatnonzero((cosine > 0.1) & (second > 0.1))}
    some = pool.query(filters={"metadata.subject.eq": "law"}, near=asked, space="test", threshold=0)
    assert all(int(name[1:]) % 3 for name in some.samples)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"model": "a", "score": 1.0}], "no sample"),
        ([{"model": "a", "sample": "s", "score": "good"}], "measurements are not usable"),
        ([{"model": None, "sample": "s", "score": 1.0}], "names no model"),
        ([{"model": "a", "sample": "s", "score": 0.5, "kind": "binary"}], "it is 0 or 1"),
        ([{"model": "a", "sample": "s", "score": 0.5, "kind": "odd"}], "a measurement is 'odd'"),
    ],
)
def test_unusable_measurements_leave_the_pool_as_it_was(
    pool: EvaluationPool, rows: list[dict[str, object]], says: str
) -> None:
    before = sorted(pool.folder.rglob("*"))
    with pytest.raises(InputError, match=says):
        pool.add(rows)
    assert sorted(pool.folder.rglob("*")) == before


def test_unusable_filters(pool: EvaluationPool) -> None:
    for name, says in [
        ("metadata.subject", "ends in no operator"),
        ("author.eq", "no column 'author'"),
        ("metadata.year.contains", "cannot be applied"),
    ]:
        with pytest.raises(InputError, match=says):
            pool.query(filters={name: "x"})


def test_logs_of_other_programs(tmp_path: Path) -> None:
    for model, right in (("alpha", [1, 0]), ("beta", [1, 1])):
        folder = tmp_path / "harness" / model
        folder.mkdir(parents=True)
        lines = [
            json.dumps({"doc_id": k, "doc": {"question": f"q{k}"}, "metrics": ["acc"], "acc": a})
            for k, a in enumerate(right)
        ]
        (folder / "samples_boolq_2026-01-01T00-00-00.jsonl").write_text("\n".join(lines) + "\n")
    results, samples = read_harness(tmp_path / "harness")
    assert {(r["model"], r["sample"], r["score"]) for r in results} == {
        ("alpha", "boolq/0", 1.0), ("alpha", "boolq/1", 0.0), ("beta", "boolq/0", 1.0),
        ("beta", "boolq/1", 1.0),
    }  # fmt: skip
    assert samples[0]["text"] == "q0"
    run = tmp_path / "helm" / "run"
    run.mkdir(parents=True)
    spec = {"name": "mmlu:subject=law", "adapter_spec": {"model": "org/m"}}
    (run / "run_spec.json").write_text(json.dumps(spec))
    (run / "instances.json").write_text(json.dumps([{"id": "id1", "input": {"text": "why?"}}]))
    stat = {"name": {"name": "exact_match"}, "sum": 3.0, "count": 4}
    stats = [{"instance_id": "id1", "stats": [stat]}]
    (run / "per_instance_stats.json").write_text(json.dumps(stats))
    results, samples = read_helm(tmp_path / "helm")
    assert results == [{"model": "org/m", "sample": "mmlu/id1", "score": 0.75, "kind": "numeric"}]
    assert samples[0]["text"] == "why?"
    with pytest.raises(InputError, match="no samples_"):
        read_harness(tmp_path / "helm")


def test_commands(
    tmp_path: Path, exit_code: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    matrix = gumbel(4, 200)
    pq.write_table(pa.Table.from_pylist(rows_of(matrix)), tmp_path / "r.parquet")
    samples = [
        {"id": f"s{j}", "text": "chest X-ray" if j < 150 else "contract law", "field": j % 2}
        for j in range(200)
    ]
    pq.write_table(pa.Table.from_pylist(samples), tmp_path / "s.parquet")
    made = ["collect", tmp_path / "pool", tmp_path / "r.parquet"]
    assert exit_code("evaluate", *made, "--samples", tmp_path / "s.parquet", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "models": 4, "samples": 200, "measurements": 800,
    }  # fmt: skip
    assert exit_code("evaluate", "rank", tmp_path / "pool", "--json") == 0
    whole = json.loads(capsys.readouterr().out)
    assert [entry["model"] for entry in whole["models"]] == ["m3", "m2", "m1", "m0"]
    asked = ["--text", "an X-ray of the chest", "--top-k", 150, "--where", "field.eq=1"]
    assert exit_code("evaluate", "rank", tmp_path / "pool", *asked, "--json") == 0
    part = json.loads(capsys.readouterr().out)
    near = [entry for entry in part["nearest"] if entry["similarity"] > 0.1]
    assert len(near) == 75 and all(int(entry["sample"][1:]) < 150 for entry in near)
    assert exit_code("evaluate", "rank", tmp_path / "r.parquet") == 0
    assert "m3" in capsys.readouterr().out
    for words, says in [
        (["rank", tmp_path / "none"], "does not exist"),
        (["rank", tmp_path / "pool", "--where", "field"], "write COLUMN.OPERATOR=VALUE"),
        (["rank", tmp_path / "pool", "--where", "field.eq=7"], "no sample fits"),
        (["rank", tmp_path / "pool", "--top-k", 3], "need --text or --like"),
        (["rank", tmp_path / "pool", "--like", "s999"], "sample s999 has no vector"),
        (["collect", tmp_path / "pool", tmp_path / "x.txt"], "no .parquet, .csv or .jsonl"),
    ]:
        assert exit_code("evaluate", *words) == 2
        assert says in " ".join(capsys.readouterr().err.split())


def test_measurements_without_a_number_are_missing() -> None:
    rows = [{"model": m, "sample": "s", "score": v} for m, v in (("a", 1.0), ("b", math.nan))]
    assert len(measured_of(rows).scores.values) == 1
