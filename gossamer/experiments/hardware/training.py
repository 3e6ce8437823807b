"""Networks trained alike: the same budget and the same number of trials for every contender."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gossamer.core.fit import Supervised, cosine, fit, sgd, warm_cosine
from gossamer.core.task import Task, seed_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Budget:
    """What every contender gets.

    Attributes:
        epochs: passes over the training split for each trial.
        rates: learning rates, one trial each; the best on the validation split is kept.
        batch_size: samples a batch.
        weight_decay: of matrices and kernels.
        warm: share of training in which the learning rate rises.
    """

    epochs: int
    rates: tuple[float, ...]
    batch_size: int = 64
    weight_decay: float = 4e-5
    warm: float = 0.0


@dataclass(frozen=True)
class Trained:
    """The best trial of one contender.

    Attributes:
        module: the network.
        validation: its score on the validation split.
        rate: its learning rate.
    """

    module: nn.Module
    validation: float
    rate: float


def trained(make: Callable[[], nn.Module], task: Task, budget: Budget, seed: int) -> Trained:
    """Trains a network once for each learning rate and keeps the best on the validation split.

    Args:
        make: the network with fresh weights, drawn from torch's generator.
        task: its data.
        budget: what it gets.
        seed: of the initial weights and the data order.
    """
    trials: Sequence[Trained] = [_trial(make, task, budget, seed, rate) for rate in budget.rates]
    best = max(trials, key=lambda trial: trial.validation)
    log.info("%s", [(trial.rate, trial.validation) for trial in trials])
    return best


def _trial(
    make: Callable[[], nn.Module], task: Task, budget: Budget, seed: int, rate: float
) -> Trained:
    with torch.random.fork_rng():
        torch.manual_seed(seed_of("weights", seed))
        module = make()
    rule = Supervised(
        module,
        task,
        optimizer=sgd(module, lr=rate, weight_decay=budget.weight_decay),
        schedule=warm_cosine(budget.warm) if budget.warm else cosine,
    )
    fit(
        rule, task, epochs=budget.epochs, batch_size=budget.batch_size, seed=seed,
        title=f"training at {rate:g}",
    )  # fmt: skip
    return Trained(module, task.score(module, "validation"), rate)
