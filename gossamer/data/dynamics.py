"""What a network says of each training sample while it learns.

Every score of training dynamics (EL2N, forgetting, the area under the margin, mean loss) is a
statistic of the same record: for each run, epoch and sample, the logits of the visit in which the
sample was trained on. Nothing is evaluated twice; the record costs a few bytes a visit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gossamer.core.errors import InputError
from gossamer.core.fit import Supervised, cosine, fit, sgd
from gossamer.core.task import Batch, Classification, logits_of, order_of

QUANTITIES = ("el2n", "margin", "loss", "correct")


@dataclass(frozen=True)
class Dynamics:
    """The record of several runs.

    Attributes:
        el2n: ``[runs, epochs, n]``: ``|| softmax(f(x)) - y ||_2`` (Paul et al. 2021).
        margin: ``[runs, epochs, n]``: logit of the label minus the largest other one (Pleiss et
            al. 2020).
        loss: ``[runs, epochs, n]``: cross-entropy, nats.
        correct: ``[runs, epochs, n]`` bool.
    """

    el2n: np.ndarray
    margin: np.ndarray
    loss: np.ndarray
    correct: np.ndarray

    def difficulty(self) -> np.ndarray:
        """Mean EL2N over runs and epochs, ``[n]``; high is hard."""
        return self.el2n.mean((0, 1))

    def forgetting(self) -> np.ndarray:
        """Times a sample went from correct to wrong, mean over runs, ``[n]``.

        A sample that no visit of a run got right counts as infinity (Toneva et al. 2019).
        """
        return forgetting_events(self.correct).mean(0)

    def area_under_margin(self) -> np.ndarray:
        """Minus the mean margin over runs and epochs, ``[n]``; high is hard."""
        return -self.margin.mean((0, 1))


def forgetting_events(correct: np.ndarray) -> np.ndarray:
    """Counts changes from correct to wrong along the axis of epochs.

    Args:
        correct: ``[..., epochs, n]`` bool.

    Returns:
        ``[..., n]`` float64; infinity where no visit was correct.
    """
    correct = np.asarray(correct, dtype=bool)
    lost = (correct[..., :-1, :] & ~correct[..., 1:, :]).sum(-2).astype(np.float64)
    return np.where(correct.any(-2), lost, np.inf)


def el2n(logits: Tensor, labels: Tensor) -> Tensor:
    """``|| softmax(logits) - onehot(labels) ||_2`` of each sample, ``[n]``.

    Args:
        logits: ``[n, classes]``.
        labels: class indices ``[n]``.
    """
    wrong = logits.float().softmax(1)
    wrong = wrong - nn.functional.one_hot(labels, logits.shape[1])
    return wrong.norm(dim=1)


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Logit of the label minus the largest other one, ``[n]``.

    Args:
        logits: ``[n, classes]``.
        labels: class indices ``[n]``.
    """
    own = logits.gather(1, labels[:, None])[:, 0]
    return own - logits.scatter(1, labels[:, None], -torch.inf).amax(1)


def record(
    task: Classification,
    make_network: Callable[[int], nn.Module],
    *,
    epochs: int,
    seeds: Sequence[int] = (0,),
    batch_size: int = 128,
    optimizer: Callable[[nn.Module], Optimizer] = sgd,
    planned_epochs: int | None = None,
    checkpoint: Path | None = None,
    cpu: bool = False,
) -> Dynamics:
    """Trains a network for each seed and records every visit of every training sample.

    Args:
        task: its training split is scored.
        make_network: a fresh network for a seed.
        epochs: passes that are recorded.
        seeds: one run each; also of the order of samples.
        batch_size: samples a batch.
        optimizer: makes the optimizer of a network. Default: SGD, see :func:`~gossamer.core.fit`.
        planned_epochs: length of the schedule of the learning rate, of which ``epochs`` are run
            (EL2N reads the first 10 of 200). Default: ``epochs``.
        checkpoint: file that holds the state of the run in progress; each finished run is kept
            beside it.
        cpu: stay on the CPU although there is a GPU.

    Raises:
        InputError: if there is nothing to train.
    """
    if epochs < 1 or not seeds:
        raise InputError("the record of a training needs at least one epoch and one seed")
    runs = [
        _run(
            task,
            make_network(seed),
            epochs=epochs,
            share=epochs / (planned_epochs or epochs),
            seed=seed,
            batch_size=batch_size,
            optimizer=optimizer,
            checkpoint=None
            if checkpoint is None
            else checkpoint.with_name(f"{checkpoint.stem}-{seed}{checkpoint.suffix}"),
            cpu=cpu,
        )
        for seed in seeds
    ]
    el2n_, margin, loss, correct = (
        np.stack([run[name].numpy() for run in runs]) for name in QUANTITIES
    )
    return Dynamics(el2n_, margin, loss, correct > 0.5)


class Watched(Supervised):
    """The plain rule, with a record of what the network answered for each sample.

    The rows of a batch are those that the order of (seed, epoch) gives, so the task need not hand
    them out.

    Args:
        network: what is trained.
        task: whose training split is watched.
        epochs: of the run.
        batch_size: of the run.
        share: of the learning-rate schedule that is gone through.
        optimizer: owns the network's parameters.
    """

    def __init__(
        self,
        network: nn.Module,
        task: Classification,
        *,
        epochs: int,
        batch_size: int,
        optimizer: Optimizer,
        share: float = 1.0,
    ) -> None:
        super().__init__(
            network,
            task,
            optimizer=optimizer,
            schedule=lambda fraction: cosine(fraction * share),
            criterion=self._watch,
        )
        self.batch_size = batch_size
        self.seen = {name: torch.zeros(epochs, task.size("train")) for name in QUANTITIES}

    def extra_state(self) -> dict[str, Any]:
        return dict(self.seen)

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        self.seen = dict(state)

    def _watch(self, outputs: Any, batch: Batch) -> Tensor:
        logits, labels = logits_of(outputs).detach().float(), batch[1]
        order = order_of(self.task.size("train"), True, self.run.seed, self.run.epoch)
        at = self.run.step - self.run.epoch * self.run.steps_per_epoch
        rows = torch.from_numpy(order[at * self.batch_size : (at + 1) * self.batch_size])
        found = {
            "el2n": el2n(logits, labels),
            "margin": margins(logits, labels),
            "loss": nn.functional.cross_entropy(logits, labels, reduction="none"),
            "correct": (logits.argmax(1) == labels).float(),
        }
        for name, values in found.items():
            self.seen[name][self.run.epoch, rows] = values.cpu()
        return self.task.criterion(outputs, batch)


def _run(
    task: Classification,
    network: nn.Module,
    *,
    epochs: int,
    share: float,
    seed: int,
    batch_size: int,
    optimizer: Callable[[nn.Module], Optimizer],
    checkpoint: Path | None,
    cpu: bool,
) -> dict[str, Tensor]:
    rule = Watched(
        network,
        task,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer(network),
        share=share,
    )
    fit(
        rule,
        task,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        checkpoint=checkpoint,
        cpu=cpu,
        title=f"watching a training (seed {seed})",
    )
    return rule.seen
