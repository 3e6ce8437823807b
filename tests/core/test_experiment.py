"""Verdicts against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from scipy import stats

from gossamer.core.errors import InputError
from gossamer.core.experiment import Claim, Experiment, Pick, Result

ROWS = [
    {"contender": "ours", "seed": 0, "accuracy": 90.0, "macs": 10.0},
    {"contender": "ours", "seed": 1, "accuracy": 92.0, "macs": 10.0},
    {"contender": "ours", "seed": 2, "accuracy": 94.0, "macs": 10.0},
    {"contender": "plain", "seed": 0, "accuracy": 89.0, "macs": 20.0},
    {"contender": "plain", "seed": 1, "accuracy": 90.0, "macs": 20.0},
    {"contender": "plain", "seed": 2, "accuracy": 91.0, "macs": 20.0},
]
OURS = Pick("accuracy", {"contender": "ours"})
PLAIN = Pick("accuracy", {"contender": "plain"})


def test_paired_difference_by_hand() -> None:
    # Differences 1, 2, 3: mean 2, deviation 1, standard error 1/sqrt(3); t(2 df, .975) = 4.30265.
    found = Claim("better", OURS, ">=", PLAIN).judge(ROWS)
    assert found.holds is True
    assert (found.left, found.right, found.difference, found.seeds) == (92.0, 90.0, 2.0, 3)
    assert found.half_width == pytest.approx(4.302652729911275 / math.sqrt(3), rel=1e-9)


def test_the_interval_is_that_of_a_paired_t_test() -> None:
    rows = [{"side": "l", "seed": s, "x": x} for s, x in enumerate([3.1, 2.2, 4.7, 3.9])]
    rows += [{"side": "r", "seed": s, "x": x} for s, x in enumerate([2.9, 2.5, 4.0, 3.0])]
    found = Claim("", Pick("x", {"side": "l"}), ">", Pick("x", {"side": "r"})).judge(rows)
    reference = stats.ttest_rel([3.1, 2.2, 4.7, 3.9], [2.9, 2.5, 4.0, 3.0])
    interval = reference.confidence_interval()
    assert found.difference is not None and found.half_width is not None
    assert found.difference - found.half_width == pytest.approx(interval.low)
    assert found.difference + found.half_width == pytest.approx(interval.high)


@pytest.mark.parametrize(
    ("relation", "offset", "beyond", "holds"),
    [
        (">=", 2.0, 0.0, True),  # 92 >= 90 + 2
        (">", 2.0, 0.0, False),
        (">=", 2.1, 0.0, False),
        ("<=", 2.0, 0.0, True),
        ("<", 2.0, 0.0, False),
        ("<", 2.1, 0.0, True),
        ("==", 2.0, 0.0, True),
        ("==", 1.9, 0.0, False),
        (">", 0.0, 3.4, True),  # 2 / 0.57735 = 3.4641 standard errors
        (">", 0.0, 3.5, False),
        ("<", 4.0, 3.4, True),
        ("<", 4.0, 3.5, False),
    ],
)
def test_relations_offsets_and_margins(
    relation: str, offset: float, beyond: float, holds: bool
) -> None:
    claim = Claim("", OURS, relation, PLAIN, offset=offset, beyond=beyond)  # type: ignore[arg-type]
    found = claim.judge(ROWS)
    assert found.holds is holds
    assert found.difference == pytest.approx(2.0)  # of the means, whatever the offset


def test_against_a_constant() -> None:
    found = Claim("", OURS, ">=", 91.0).judge(ROWS)
    assert (found.holds, found.right, found.difference, found.seeds) == (True, 91.0, 1.0, 3)
    assert Claim("", OURS, ">=", 93.0).judge(ROWS).holds is False


def test_seeds_are_paired_and_the_lonely_left_out() -> None:
    rows = [*ROWS, {"contender": "ours", "seed": 9, "accuracy": 0.0}]
    assert Claim("", OURS, ">=", PLAIN).judge(rows) == Claim("", OURS, ">=", PLAIN).judge(ROWS)


def test_rows_of_one_seed_are_averaged() -> None:
    rows = [
        {"c": "a", "seed": 0, "x": 1.0},
        {"c": "a", "seed": 0, "x": 3.0},
        {"c": "a", "seed": 0, "x": None},
        {"c": "b", "seed": 0, "x": 2.0},
    ]
    found = Claim("", Pick("x", {"c": "a"}), "==", Pick("x", {"c": "b"})).judge(rows)
    assert (found.holds, found.left, found.seeds, found.half_width) == (True, 2.0, 1, None)


def test_nothing_measured_is_no_verdict() -> None:
    found = Claim("", Pick("accuracy", {"contender": "absent"}), ">=", PLAIN).judge(ROWS)
    assert found.holds is None and found.seeds == 0


def test_verdicts_of_results() -> None:
    good, bad = Claim("", OURS, ">", PLAIN), Claim("", OURS, "<", PLAIN)
    absent = Claim("", Pick("accuracy", {"contender": "absent"}), "<", PLAIN)
    rows = tuple(ROWS)
    assert Result("s", "quick", rows, (good,)).verdict() == "holds"
    assert Result("s", "quick", rows, (good,), True).verdict() == "holds (reconstruction)"
    assert Result("s", "quick", rows, (good, bad)).verdict() == "does not hold (1 of 2)"
    assert Result("s", "quick", rows, (bad,), True).verdict() == "does not hold (0 of 1)"
    assert Result("s", "quick", rows, (good, absent)).verdict() == "not measured"
    assert Result("s", "quick", (), ()).verdict() == "not measured"


def test_results_come_back_from_their_file(tmp_path: Path) -> None:
    claims = (
        Claim("a", OURS, ">", PLAIN, offset=0.5, beyond=1.0, paper="3 points"),
        Claim("b", Pick("macs", {"contender": "ours"}), "<=", 12.0),
    )
    result = Result("spec", "quick", tuple(ROWS), claims, False, {"seeds": [0, 1, 2]})
    result.write(tmp_path / "r.json")
    back = Result.read(tmp_path / "r.json")
    assert back == result
    assert back.verdict() == "holds"


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 3},
        {"rows": ["text"]},
        {"claims": [{"text": "a"}]},
        {"claims": [[1]]},
        {"relation": "~"},
        {"spec": None},
        {"left": {"metric": "x", "shell": "y"}},
    ],
)
def test_files_that_are_no_results(tmp_path: Path, change: dict[str, object]) -> None:
    Result("spec", "quick", tuple(ROWS), (Claim("a", OURS, ">", PLAIN),)).write(tmp_path / "r.json")
    value = json.loads((tmp_path / "r.json").read_text())
    target = value if set(change) <= set(value) else value["claims"][0]
    for key, item in change.items():
        if item is None:
            del target[key]
        else:
            target[key] = item
    (tmp_path / "r.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match="is not a result of an experiment"):
        Result.read(tmp_path / "r.json").verdict()


def test_an_experiment_records_what_it_ran_on() -> None:
    asked: list[tuple[int, ...]] = []

    def measure(seeds: object) -> list[dict[str, object]]:
        asked.append(tuple(seeds))  # type: ignore[arg-type]
        return list(ROWS)

    experiment = Experiment("spec", "title", (Claim("", OURS, ">", PLAIN),), measure, measure)
    result = experiment.run("quick")
    assert asked == [(0, 1, 2)]
    assert experiment.run("full", seeds=[5]).about["seeds"] == [5]
    assert result.about["versions"]["torch"] and result.about["device"]
    assert result.verdict() == "holds"
