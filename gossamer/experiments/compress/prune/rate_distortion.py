"""Rate-distortion against the usual ways to share sparsity among layers.

All contenders start from the same dense network and are pruned by magnitude inside each layer; they
differ only in how many weights each layer keeps. Iteratively, a fifth of what is left goes in each
round and every contender is trained for the same epochs with masks on; in one shot, nothing is
trained and the change of the output is measured. Random densities are the control.
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

from gossamer.compress.prune.layer_allocation import random
from gossamer.compress.prune.rate_distortion import (
    allocate,
    calibration_inputs,
    chosen_by_curves,
    output_distortion,
    rd_curves,
)
from gossamer.compress.prune.rewind import Retraining, prune_and_retrain
from gossamer.compress.prune.sparsify import allocated, limited
from gossamer.compress.prune.weight_scores import keep_in_each
from gossamer.core.experiment import Claim, Experiment, Pick, Result, Row
from gossamer.core.task import Labelled, seed_of
from gossamer.datasets.cifar import cifar10
from gossamer.datasets.digits import digits
from gossamer.experiments.drawing import lines
from gossamer.experiments.real_data import folder_of
from gossamer.models.plain import ConvNet
from gossamer.models.resnet import cifar_resnet
from gossamer.parts.masks import Masks, multiplied_weights

BASELINES = ("uniform", "uniform+", "global", "erk", "lamp")
OURS = ("rd", "rd worst", "rd noise")


@dataclass(frozen=True)
class Setting:
    """The work.

    Attributes:
        task: by seed of the split.
        network: untrained.
        dense: how the dense network is trained.
        between: how every contender is trained in each round.
        rounds: of removing a fifth.
        grid: points of each curve.
        samples: calibration inputs.
        valid: shares of weights left (high, low) over which accuracy is averaged.
    """

    task: Callable[[int], Labelled]
    network: Callable[[], nn.Module]
    dense: Retraining
    between: Retraining
    rounds: int
    grid: int
    samples: int
    valid: tuple[float, float] = (0.2, 0.06)


def _adam(lr: float, weight_decay: float = 0.0) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda module: torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=weight_decay)


def _constant(fraction: float) -> float:
    return 1.0


DIGITS = Setting(
    task=lambda seed: digits(seed=seed),
    network=lambda: ConvNet(1, 8, (16, "pool", 32, "pool"), (64,)),
    dense=Retraining(epochs=15, batch_size=64, optimizer=_adam(2e-3), schedule=_constant),
    between=Retraining(epochs=3, batch_size=64, optimizer=_adam(2e-3), schedule=_constant),
    rounds=13,
    grid=25,
    samples=128,
)


def _cifar(folder: Path) -> Setting:
    return Setting(
        task=lambda seed: cifar10(folder, seed=seed),
        network=lambda: cifar_resnet(20),
        dense=Retraining(epochs=100, batch_size=100, optimizer=_adam(3e-4), schedule=_constant),
        between=Retraining(epochs=5, batch_size=100, optimizer=_adam(3e-4), schedule=_constant),
        rounds=15,
        grid=100,
        samples=1024,
    )


def measured(setting: Setting, seeds: Sequence[int]) -> Iterator[Row]:
    """Rows of all contenders."""
    for seed in seeds:
        task = setting.task(seed)
        torch.manual_seed(seed_of("network", seed) % 2**32)
        dense = setting.network()
        setting.dense.train(dense, task, seed=seed, title="dense")
        dense.eval()
        yield {"contender": "dense", "seed": seed, "accuracy": task.score(dense, "test")}
        macs = multiplied_weights(dense, task.example_inputs)
        inputs = {
            source: calibration_inputs(task, samples=setting.samples, source=source, seed=seed)
            for source in ("data", "noise")
        }
        test = [task.inputs(b) for b in task.batches("test", batch_size=512)]
        choices = _choices(setting, macs, inputs, seed)
        yield from _one_shot(setting, dense, macs, inputs["data"], test, choices, seed)
        found: dict[int, list[float]] = {}
        for name, choose in choices.items():
            for row in _rounds(setting, task, dense, macs, choose, seed):
                if name in BASELINES:
                    found.setdefault(row["round"], []).append(row["accuracy"])
                yield {"contender": name, "seed": seed, **row}
        # The best of the baselines of this seed at each round: harder than any one of them.
        for number, scores in found.items():
            yield {
                "contender": "best baseline", "seed": seed, "round": number,
                "accuracy": max(scores),
            }  # fmt: skip


Choose = Callable[[nn.Module, Masks, int], Mapping[str, Tensor]]


def _choices(
    setting: Setting,
    macs: Mapping[str, int],
    inputs: Mapping[str, Sequence[tuple[Any, ...]]],
    seed: int,
) -> dict[str, Choose]:
    """What stays when ``keep`` weights do, for every contender."""

    def by_allocation(module: nn.Module, masks: Masks, keep: int, *, name: str) -> Any:
        scores = {n: module.get_parameter(n).detach().abs() for n in masks.kept}
        return allocated(module, scores, masks, name, keep)

    def at_random(module: nn.Module, masks: Masks, keep: int) -> Any:
        scores = {n: module.get_parameter(n).detach().abs() for n in masks.kept}
        counts = random(seed)(scores, scores, keep)
        return keep_in_each(scores, masks.kept, limited(counts, masks))

    def by_curves(module: nn.Module, masks: Masks, keep: int, *, source: str, mode: Any) -> Any:
        return chosen_by_curves(
            module, inputs[source], masks, macs, keep, grid=setting.grid, mode=mode
        )

    choices: dict[str, Choose] = {name: partial(by_allocation, name=name) for name in BASELINES}
    choices["random"] = at_random
    choices["rd"] = partial(by_curves, source="data", mode="mean")
    choices["rd worst"] = partial(by_curves, source="data", mode="worst")
    choices["rd noise"] = partial(by_curves, source="noise", mode="mean")
    return choices


def _rounds(
    setting: Setting,
    task: Labelled,
    dense: nn.Module,
    macs: Mapping[str, int],
    choose: Choose,
    seed: int,
) -> list[dict[str, Any]]:
    module = copy.deepcopy(dense)
    masks = Masks.full(module, list(macs))
    high, low = setting.valid

    def observe(now: nn.Module, masks: Masks) -> dict[str, Any]:
        # Accuracy of a round is averaged over the range only; all of them are drawn.
        left = masks.remaining / masks.total
        return {
            "left": left,
            "accuracy": task.score(now, "test"),
            "in_range": bool(low <= left <= high),
            "empty_layers": sum(not bool(m.any()) for m in masks.kept.values()),
        }

    def kept(now: nn.Module, masks: Masks, number: int) -> Mapping[str, Tensor]:
        now.eval()
        keep = min(masks.remaining, round(masks.total * 0.8 ** (number + 1)))
        return choose(now, masks, keep)

    return prune_and_retrain(
        module, task, masks, kept, rounds=setting.rounds, retraining=setting.between, seed=seed,
        observe=observe,
    )  # fmt: skip


def _one_shot(
    setting: Setting,
    dense: nn.Module,
    macs: Mapping[str, int],
    inputs: Sequence[tuple[Any, ...]],
    test: Sequence[tuple[Any, ...]],
    choices: Mapping[str, Choose],
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Change of the test logits without training, and how well curves predict it."""
    masks = Masks.full(dense, list(macs))
    for sparsity in (0.5, 0.8, 0.9, 0.95):
        for name, choose in choices.items():
            kept = choose(dense, masks, round(masks.total * (1 - sparsity)))
            yield {
                "contender": name, "seed": seed, "one_shot": sparsity,
                "distortion": output_distortion(_pruned(dense, kept), dense, test),
            }  # fmt: skip
    curves = rd_curves(dense, inputs, masks, macs, grid=setting.grid)
    rng = np.random.default_rng(seed_of("allocations", seed))
    predicted, joint = [], []
    for _ in range(30):
        # Moderate: no layer loses more than four fifths.
        counts = {
            n: int(c[rng.integers(0, round(0.8 * (len(c) - 1)) + 1)])
            for n, c in curves.kept.items()
        }
        scores = {n: dense.get_parameter(n).detach().abs() for n in counts}
        kept = keep_in_each(scores, masks.kept, counts)
        predicted.append(curves.at(counts))
        joint.append(output_distortion(_pruned(dense, kept), dense, inputs))
    from scipy.stats import spearmanr

    found: Any = spearmanr(predicted, joint)
    best = allocate(curves, masks.total // 2)
    yield {
        "contender": "additivity", "seed": seed, "rank_correlation": float(found.statistic),
        "predicted_over_joint": float(np.sum(predicted) / np.sum(joint)),
        "predicted_at_half": curves.at(best),
    }  # fmt: skip


def _pruned(dense: nn.Module, kept: Mapping[str, Tensor]) -> nn.Module:
    module = copy.deepcopy(dense)
    Masks(module, kept).hold_weights()
    return module


def quick(seeds: Sequence[int]) -> Iterable[Row]:
    """A small convolutional network on digits, thirteen rounds."""
    return measured(DIGITS, seeds)


def full(seeds: Sequence[int]) -> Iterable[Row]:
    """ResNet-20 on CIFAR-10, fifteen rounds."""
    return measured(_cifar(folder_of("cifar10")), seeds)


def draw(result: Result, path: Path) -> None:
    """Accuracy against the weights left, and distortion in one shot."""
    rows = [dict(row) for row in result.rows]
    for row in rows:
        row["left_percent"] = 100 * row["left"] if row.get("left") else None
    lines(
        rows, path, panels=(("accuracy", "test accuracy (%)"),), x="left_percent",
        x_label="weights left (%)", logarithmic=True, invert=True,
    )  # fmt: skip


def _in_range(contender: str) -> Pick:
    return Pick("accuracy", {"contender": contender, "in_range": True})


def _distortion(contender: str, sparsity: float) -> Pick:
    return Pick("distortion", {"contender": contender, "one_shot": sparsity})


EXPERIMENT = Experiment(
    spec="rd-pruning",
    title="sparsity shared among layers by rate-distortion against the usual ways",
    claims=(
        *(
            Claim(
                f"pruned iteratively to 20 .. 6 % of the weights, rate-distortion is on average at "
                f"least as accurate as {name}",
                _in_range("rd"),
                ">=",
                _in_range(name),
                paper="CIFAR-10: +0.5 to +1.0 points over the best other allocation"
                if name == "lamp"
                else "",
            )
            for name in ("uniform", "global", "lamp", "erk")
        ),
        Claim(
            "at 6.9 % of the weights it is more accurate than the best of the others, by more than "
            "a standard error",
            Pick("accuracy", {"contender": "rd", "round": 12}),
            ">",
            Pick("accuracy", {"contender": "best baseline", "round": 12}),
            beyond=1.0,
        ),
        *(
            Claim(
                f"in one shot at {sparsity:.0%} it changes the output least ({name})",
                _distortion("rd", sparsity),
                "<=",
                _distortion(name, sparsity),
            )
            for sparsity in (0.5, 0.8)
            for name in ("uniform", "global", "lamp", "erk")
        ),
        Claim(
            "the summed curves rank 30 random moderate allocations as their joint distortion does "
            "(rank correlation above 0.9)",
            Pick("rank_correlation", {"contender": "additivity"}),
            ">",
            0.9,
        ),
    ),
    quick=quick,
    full=full,
    draw=draw,
)
