"""The experiments on group widths: what they count, and that every claim is judged."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossamer.core.experiment import Result
from gossamer.core.graph import Graph
from gossamer.core.layers import Layer
from gossamer.datasets.digits import digits
from gossamer.experiments.hardware import group_size, systolic
from gossamer.experiments.hardware.training import Budget, trained
from gossamer.hardware.systolic import SystolicArray
from gossamer.models.mobilenet import mobilenet_v1, small_mobilenet

SMALL = Budget(epochs=1, rates=(1e-6, 0.1))


def test_the_best_trial_on_validation_is_kept() -> None:
    task = digits(limit=200)
    best = trained(small_mobilenet, task, Budget(epochs=6, rates=(1e-6, 0.1), warm=0.1), 0)
    assert best.rate == 0.1
    assert best.validation == task.score(best.module, "validation")


@pytest.fixture(scope="module")
def mobilenet() -> list[Layer]:
    return systolic.convolutions(mobilenet_v1(), 224)


def test_gains_at_the_papers_array(mobilenet: list[Layer]) -> None:
    gains = {(row["dataflow"], row["group_width"]): row for row in systolic.gains(mobilenet)}
    # 0.388 M cycles and 46.7 % become 0.205 M and 75.0 %
    row = gains["rs", 8]
    assert row["latency_gain"] == pytest.approx(100 * (1 - 205_268 / 388_052))
    assert row["utilisation_points"] == pytest.approx(75.02 - 46.73, abs=0.01)
    assert row["utilisation_gain"] == pytest.approx(100 * (75.019 / 46.726 - 1), abs=0.01)


def test_pairs_of_mobilenet() -> None:
    subject = group_size.Subject("m", mobilenet_v1, group_size.images(224), (8, 16))
    rows = list(group_size.counted(subject))
    worst = rows[-1]
    assert worst["kind"] == "worst pair"
    assert worst["macs_apart"] == pytest.approx(10_838_016 / 829_530_112)
    assert worst["weights_ratio"] == pytest.approx(357_120 / 784_800)
    assert worst["intensity_ratio"] == pytest.approx(26.000 / 23.137, rel=1e-4)
    built = Graph.trace(mobilenet_v1(groups=32), (subject.inputs,)).macs
    assert next(row["macs"] for row in rows if row.get("groups") == 32) == built


def test_every_claim_on_widths_is_judged(tmp_path: Path) -> None:
    """On one small network in the place of both."""
    task = digits(limit=200)
    rows: list = []
    images = group_size.images(8, 1)
    subject = group_size.Subject(group_size.MOBILENET, small_mobilenet, images, (4,))
    rows += group_size.counted(subject)
    rows += group_size.timed(subject, (0,), batch=1, rounds=2)
    rows += [row | {"network": group_size.RESNEXT} for row in rows]
    rows += group_size.accuracies(subject, task, SMALL, 0)
    ratio = next(r for r in rows if r["kind"] == "ratio" and r["deployed"])
    assert (
        ratio["runtime"] == "onnxruntime" and ratio["low"] <= ratio["time_ratio"] <= ratio["high"]
    )
    result = Result("e2gc", "quick", tuple(rows), group_size.EXPERIMENT.claims)
    assert all(found.holds is not None for found in result.evidence())
    group_size.draw(result, tmp_path / "e2gc.png")
    assert (tmp_path / "e2gc.png").read_bytes().startswith(b"\x89PNG")


def test_every_claim_on_arrays_is_judged(mobilenet: list[Layer], tmp_path: Path) -> None:
    rows: list = []
    for width in (1, 8):
        changed = systolic.regroup_all(mobilenet, group_width=width)
        rows += systolic.modelled(systolic.MOBILENET, changed, f"G={width}", group_width=width)
    scores = list(
        systolic.accuracies(
            small_mobilenet, digits(limit=200), (1, 8), SMALL, 0, SystolicArray(16, 16, "ws")
        )
    )
    assert [row["contender"] for row in scores] == ["G=1", "G=8", "G=1, wider"]
    # the control has about the MACs of the widest groups
    assert scores[2]["macs"] == pytest.approx(scores[1]["macs"], rel=0.1)
    result = Result(
        "draco", "quick", (*rows, *systolic.with_floor(scores)), systolic.EXPERIMENT.claims
    )
    evidence = result.evidence()
    assert all(found.holds is not None for found in evidence)
    assert all(found.holds for found in evidence[:8])
    systolic.draw(result, tmp_path / "draco.png")
    assert (tmp_path / "draco.png").read_bytes().startswith(b"\x89PNG")


def test_the_floor_is_one_standard_deviation_below() -> None:
    rows = [
        {"contender": "G=1", "accuracy": 90.0},
        {"contender": "G=8", "accuracy": 89.0},
        {"contender": "G=1", "accuracy": 94.0},
    ]
    found = systolic.with_floor(rows)
    assert found[0]["accuracy_floor"] == pytest.approx(90.0 - 8**0.5)
    assert "accuracy_floor" not in found[1]
