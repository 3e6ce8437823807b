"""SAP against lottery tickets and one-shot pruning: accuracy, rounds and the index along the way.

All start from the same first weights and the same trained dense network. In each round SAP removes
what the PQ index allows, the lottery ticket a fifth; both rewind and train for the same epochs.
One-shot pruning removes as much in all as the lottery ticket has by then, ranked once and for all
by the dense network. Decisions are made on the trained network of the last epoch, never on test
scores.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.compress.prune.pq_index import (
    Count,
    Scope,
    adaptive,
    compressibility_limit,
    fixed,
    kept_by_magnitude,
    pq_report,
)
from gossamer.compress.prune.rewind import Retraining, prune_and_retrain
from gossamer.core.experiment import Claim, Experiment, Pick, Result, Row
from gossamer.core.fit import sgd
from gossamer.core.task import Labelled, seed_of
from gossamer.datasets.cifar import cifar10
from gossamer.datasets.digits import digits
from gossamer.experiments.drawing import lines
from gossamer.experiments.real_data import folder_of
from gossamer.models.plain import mlp
from gossamer.models.resnet import SmallResNet
from gossamer.parts.masks import Masks, multiplied_weights


@dataclass(frozen=True)
class Setting:
    """The work.

    Attributes:
        task: by seed of the split.
        network: untrained.
        training: of each round.
        rounds: of the lottery ticket and of SAP at most.
        scopes: each tried.
    """

    task: Callable[[int], Labelled]
    network: Callable[[], nn.Module]
    training: Retraining
    rounds: int
    scopes: tuple[Scope, ...]


def _nesterov(lr: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return partial(sgd, lr=lr, weight_decay=5e-4)


DIGITS = Setting(
    task=lambda seed: digits(seed=seed),
    network=lambda: mlp((64, 128, 256, 10)),
    training=Retraining(epochs=20, batch_size=64, optimizer=_nesterov(0.05), clip=1.0),
    rounds=12,
    scopes=("global", "layer"),
)


def _cifar(folder: Path) -> Setting:
    return Setting(
        task=lambda seed: cifar10(folder, seed=seed),
        network=lambda: SmallResNet(
            (64, 128, 256, 512), 2, in_channels=3, classes=10, projection=True
        ),
        training=Retraining(epochs=200, batch_size=250, optimizer=_nesterov(0.1), clip=1.0),
        rounds=15,
        scopes=("global", "layer", "neuron"),
    )


CONTENDERS: dict[str, Count] = {
    "SAP (.5, 1)": adaptive(p=0.5, q=1.0),
    "SAP (1, 2)": adaptive(p=1.0, q=2.0),
    "lottery ticket": fixed(0.2),
    "one-shot": fixed(0.2),
}


def measured(setting: Setting, seeds: Sequence[int]) -> Iterator[Row]:
    """Rows of all contenders."""
    for seed in seeds:
        task = setting.task(seed)
        torch.manual_seed(seed_of("network", seed) % 2**32)
        dense = setting.network()
        start = copy.deepcopy(dense.state_dict())
        setting.training.train(dense, task, seed=seed)
        names = list(multiplied_weights(dense, task.example_inputs))
        index = pq_report(dense, Masks.full(dense, names))["global"]
        accuracy = task.score(dense, "test")
        yield {"contender": "dense", "seed": seed, "accuracy": accuracy, "index": index}
        for scope in setting.scopes:
            curves: dict[str, list[dict[str, Any]]] = {}
            for contender, count in CONTENDERS.items():
                records = _run(setting, task, dense, names, start, contender, count, scope, seed)
                about = {
                    "contender": contender, "scope": scope, "seed": seed,
                    "line": f"{contender}, {scope}",
                }  # fmt: skip
                begin = {"round": 0, "left": 100.0, "accuracy": accuracy, "index": index}
                curves[contender] = [begin, *records]
                for record in curves[contender]:
                    yield about | record
            for contender in ("SAP (.5, 1)", "SAP (1, 2)"):
                yield {
                    "contender": f"{contender} against the lottery ticket", "scope": scope,
                    "seed": seed, **_compared(curves[contender], curves["lottery ticket"]),
                }  # fmt: skip


def _run(
    setting: Setting,
    task: Labelled,
    dense: nn.Module,
    names: Sequence[str],
    start: Mapping[str, Tensor],
    contender: str,
    count: Count,
    scope: Scope,
    seed: int,
) -> list[dict[str, Any]]:
    module = copy.deepcopy(dense)
    masks = Masks.full(module, names)
    ranked = {name: dense.get_parameter(name).detach() for name in names}
    before = [masks.total]

    def choose(now: nn.Module, masks: Masks, number: int) -> Mapping[str, Tensor]:
        weights = {name: now.get_parameter(name).detach() for name in masks.kept}
        return kept_by_magnitude(
            weights, masks.kept, count, scope,
            ranked_by=ranked if contender == "one-shot" else None,
        )  # fmt: skip

    def observe(now: nn.Module, masks: Masks) -> dict[str, Any]:
        share = 1.0 - masks.remaining / before[0]
        before[0] = masks.remaining
        report = pq_report(now, masks)
        return {
            "left": 100 * masks.remaining / masks.total,
            "share": share,
            "accuracy": task.score(now, "test"),
            "index": report["global"],
            "gini": report["gini"],
        }

    return prune_and_retrain(
        module, task, masks, choose, rounds=setting.rounds, retraining=setting.training,
        rewind=start, seed=seed, observe=observe,
    )  # fmt: skip


def _compared(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """One seed's curves: how far below the ticket's, how many rounds, how the rate varies."""
    left = np.log([r["left"] for r in theirs])[::-1]
    level = np.array([r["accuracy"] for r in theirs])[::-1]
    # Where the ticket's curve reaches; further on there is nothing to compare with.
    common = [r for r in ours if r["left"] >= theirs[-1]["left"]]
    below = [float(np.interp(np.log(r["left"]), left, level)) - r["accuracy"] for r in common]

    def rounds_to_a_tenth(curve: Sequence[Mapping[str, Any]]) -> int:
        reached = [r["round"] for r in curve if r["left"] <= 10.0]
        return reached[0] if reached else len(curve)

    shares = [r["share"] for r in ours if "share" in r]
    dense = ours[0]["accuracy"]
    collapse = next((i for i, r in enumerate(ours) if r["accuracy"] < dense - 3.0), None)
    turn = compressibility_limit([r["index"] for r in ours])
    slower = 1.0
    if collapse is not None and collapse > 1:
        # The share of the round before accuracy falls against the largest one before it.
        slower = shares[collapse - 1] / max(shares[: collapse - 1])
    return {
        "worst_below": max(below),
        "rounds": rounds_to_a_tenth(ours),
        "rounds_ticket": rounds_to_a_tenth(theirs),
        "share_ratio": max(shares) / max(min(shares), 1e-9),
        "share_before_collapse": slower,
        "turns_before_collapse": float(turn is not None and (collapse is None or turn < collapse)),
        "collapses": float(collapse is not None),
    }


def quick(seeds: Sequence[int]) -> Iterable[Row]:
    """A perceptron on digits, twelve rounds, over all weights and in each layer."""
    return measured(DIGITS, seeds)


def full(seeds: Sequence[int]) -> Iterable[Row]:
    """ResNet-18 on CIFAR-10, fifteen rounds of 200 epochs, three scopes."""
    return measured(_cifar(folder_of("cifar10")), seeds)


def draw(result: Result, path: Path) -> None:
    """Accuracy and index against the weights left, over all weights."""
    rows = [row for row in result.rows if row.get("scope") == "global" and "line" in row]
    lines(
        rows, path, panels=(("accuracy", "test accuracy (%)"), ("index", "PQ index (.5, 1)")),
        x="left", x_label="weights left (%)", by="line", logarithmic=True, invert=True,
    )  # fmt: skip


def _against(metric: str, scope: str) -> Pick:
    return Pick(metric, {"contender": "SAP (.5, 1) against the lottery ticket", "scope": scope})


EXPERIMENT = Experiment(
    spec="pq-index",
    title="pruning as much as the PQ index allows against a fifth in each round",
    claims=(
        *(
            claim
            for scope in DIGITS.scopes
            for claim in (
                Claim(
                    f"{scope}: SAP is never more than a point below the lottery ticket at the same "
                    "number of weights",
                    _against("worst_below", scope),
                    "<=",
                    1.0,
                ),
                Claim(
                    f"{scope}: SAP needs fewer rounds to a tenth of the weights",
                    _against("rounds", scope),
                    "<",
                    _against("rounds_ticket", scope),
                ),
                Claim(
                    f"{scope}: SAP's largest share of a round is twice its smallest or more",
                    _against("share_ratio", scope),
                    ">=",
                    2.0,
                ),
                Claim(
                    f"{scope}: SAP slows down before accuracy falls by three points",
                    _against("share_before_collapse", scope),
                    "<",
                    1.0,
                ),
            )
        ),
        Claim(
            "global: the index has a minimum and rises before accuracy falls by three points",
            _against("turns_before_collapse", "global"),
            ">=",
            1.0,
            paper="a hypothesis of the paper, seen in all of its curves",
        ),
    ),
    quick=quick,
    full=full,
    draw=draw,
)
