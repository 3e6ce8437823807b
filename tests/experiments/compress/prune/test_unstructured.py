"""Experiments on single weights, in small: every claim finds its rows, the work is the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from gossamer.core.experiment import Claim
from gossamer.datasets.digits import digits
from gossamer.experiments.compress.prune import (
    activation,
    bilevel,
    pq_index,
    rate_distortion,
    taxonomy,
)
from gossamer.models.plain import ConvNet, mlp


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _small_task(seed: int) -> Any:
    return digits(seed=seed, limit=120)


def _measured(claims: tuple[Claim, ...], rows: list[Any]) -> list[str]:
    """Claims that found nothing to compare."""
    return [c.text for c in claims if c.judge(rows).holds is None]


def test_rate_distortion_measures_every_claim() -> None:
    setting = replace(
        rate_distortion.DIGITS,
        task=_small_task,
        network=lambda: ConvNet(1, 8, (4, "pool", 6, "pool"), (8,)),
        dense=replace(rate_distortion.DIGITS.dense, epochs=1),
        between=replace(rate_distortion.DIGITS.between, epochs=0),
        grid=8,
        samples=32,
    )
    rows = [dict(r) for r in rate_distortion.measured(setting, [0])]
    assert _measured(rate_distortion.EXPERIMENT.claims, rows) == []
    by_round = {
        name: [r["left"] for r in rows if r["contender"] == name and "left" in r]
        for name in ("uniform", "global", "rd")
    }
    # Baselines keep exactly a fifth less each time, ours no more than they.
    assert by_round["uniform"] == by_round["global"]
    assert all(a <= b for a, b in zip(by_round["rd"], by_round["global"], strict=True))
    best = {r["round"]: r["accuracy"] for r in rows if r["contender"] == "best baseline"}
    for number, score in best.items():
        assert score == max(
            r["accuracy"]
            for r in rows
            if r.get("round") == number and r["contender"] in rate_distortion.BASELINES
        )


def test_activation_measures_every_claim() -> None:
    setting = replace(
        activation.DIGITS,
        task=_small_task,
        networks={
            "mlp": lambda: mlp((64, 12, 10)),
            "cnn": lambda: ConvNet(1, 8, (4, "pool"), (8,)),
        },
        training=replace(activation.DIGITS.training, epochs=0),
    )
    rows = [dict(r) for r in activation.measured(setting, [0])]
    assert _measured(activation.EXPERIMENT.claims, rows) == []
    # Equal sparsity in every round, whoever takes the last weights.
    for network, pairing in itertools.product(("mlp", "cnn"), activation.PAIRINGS):
        left = [
            [r["remaining"] for r in rows if r.get("line") == f"{network}, {pairing}, {contender}"]
            for contender, *_ in activation.CONTENDERS
        ]
        assert left[0] == left[1] == left[2] and len(left[0]) == 12


def test_the_pq_index_measures_every_claim() -> None:
    setting = replace(
        pq_index.DIGITS,
        task=_small_task,
        network=lambda: mlp((64, 12, 10)),
        training=replace(pq_index.DIGITS.training, epochs=0),
    )
    rows = [dict(r) for r in pq_index.measured(setting, [0])]
    assert _measured(pq_index.EXPERIMENT.claims, rows) == []
    ticket = [
        r["share"] for r in rows if r.get("line") == "lottery ticket, global" and "share" in r
    ]
    assert ticket == pytest.approx([0.2] * 12, abs=0.01)


def test_bilevel_measures_every_claim() -> None:
    setting = replace(
        bilevel.DIGITS,
        task=_small_task,
        network=lambda: ConvNet(1, 8, (4, "pool", 6, "pool"), (8,)),
        dense=replace(bilevel.DIGITS.dense, epochs=1),
        epochs=2,
        round_epochs=1,
        rates=(0.05,),
    )
    rows = [dict(r) for r in bilevel.measured(setting, [0])]
    assert _measured(bilevel.EXPERIMENT.claims, rows) == []
    for density in setting.densities:
        left = {r["remaining"] for r in rows if r.get("density") == density}
        assert max(left) - min(left) <= 1


def test_the_contrasts_measure_every_claim() -> None:
    setting = replace(
        taxonomy.DIGITS, task=_small_task, train=replace(taxonomy.DIGITS.train, epochs=0), tune=0
    )
    bench = taxonomy.Bench.of(setting, 0)
    rows: list[Any] = []
    for sparsity in (0.8, 0.95):
        for contrast in (taxonomy.structure, taxonomy.rounds, taxonomy.trained_weights):
            rows += contrast(bench, sparsity)
    rows += taxonomy.language([0], epochs=0, width=8)
    assert _measured(taxonomy.EXPERIMENT.claims, rows) == []
    # Both sides of the first contrast keep as many parameters (widths are whole channels).
    for sparsity in (0.8, 0.95):
        kept = {
            r["contender"]: r["parameters_kept"]
            for r in rows
            if r["contrast"] == "1 structure" and r["sparsity"] == sparsity
        }
        assert kept["weights"] == pytest.approx(kept["n of m"], abs=0.01)
        assert kept["filters"] <= kept["weights"] + 0.01
    dynamic, static = taxonomy.chosen_channels(bench, 0.5)
    assert static["macs_kept"] <= dynamic["macs_kept"] < 0.5


def test_classes_are_split_in_halves_of_their_own() -> None:
    first, second = taxonomy.halves(_small_task(0))
    assert [len(t.classes) for t in (first, second)] == [5, 5]
    labels = torch.cat([b[1] for b in second.batches("test", batch_size=64)])
    assert set(labels.tolist()) == set(range(5))
