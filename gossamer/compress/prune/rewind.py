"""Prune, rewind, retrain: the loop that iterative pruning of single weights shares.

In each round some of the weights that are left go, the others keep their values (fine-tuning), or
are set back to what they were earlier (rewinding: lottery tickets), and the network is trained
again with its masks on.

Sources: Han et al., "Learning both Weights and Connections", NeurIPS 2015; Frankle and Carbin, "The
Lottery Ticket Hypothesis", ICLR 2019; Renda, Frankle and Carbin, "Comparing Rewinding and
Fine-tuning in Neural Network Pruning", ICLR 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from gossamer.core.errors import InputError
from gossamer.core.fit import History, Supervised, cosine, fit, sgd
from gossamer.core.task import Task, seed_of
from gossamer.parts.masks import Masks

Choose = Callable[[nn.Module, Masks, int], Mapping[str, Tensor]]
"""Module, masks and number of the round to bool masks of what stays."""


@dataclass(frozen=True)
class Retraining:
    """How a masked network is trained in each round.

    Attributes:
        epochs: of each round.
        batch_size: samples a batch.
        lr: learning rate at the start of SGD.
        weight_decay: of SGD, on matrices and kernels.
        optimizer: ``(module) -> Optimizer`` in place of SGD.
        schedule: learning-rate multiplier over the fraction of a round.
        clip: largest gradient norm, or None.
        cpu: stay on the CPU although there is a GPU.
    """

    epochs: int = 10
    batch_size: int = 128
    lr: float = 0.02
    weight_decay: float = 5e-4
    optimizer: Callable[[nn.Module], Optimizer] | None = None
    schedule: Callable[[float], float] = cosine
    clip: float | None = None
    cpu: bool = False

    def train(
        self,
        module: nn.Module,
        task: Task,
        masks: Masks | None = None,
        *,
        seed: int = 0,
        checkpoint: Path | None = None,
        title: str = "training",
    ) -> History:
        """Trains in place, removed weights zero before and after every step."""
        make = self.optimizer or (lambda m: sgd(m, lr=self.lr, weight_decay=self.weight_decay))
        if masks is not None:
            masks.hold_weights()
        rule = Supervised(
            module,
            task,
            optimizer=make(module),
            schedule=self.schedule,
            clip=self.clip,
            after_backward=None if masks is None else masks.hold_gradients,
            after_step=None if masks is None else masks.hold_weights,
        )
        history = fit(
            rule,
            task,
            epochs=self.epochs,
            batch_size=self.batch_size,
            seed=seed,
            checkpoint=checkpoint,
            cpu=self.cpu,
            title=title,
        )
        module.cpu()
        return history


def prune_and_retrain(
    module: nn.Module,
    task: Task,
    masks: Masks,
    choose: Choose,
    *,
    rounds: int,
    retraining: Retraining,
    rewind: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    observe: Callable[[nn.Module, Masks], dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Prunes and trains in rounds, in place.

    Args:
        module: trained; it is pruned and trained on.
        task: its data.
        masks: what is left of it so far; they are narrowed.
        choose: which weights stay in a round.
        rounds: how many.
        retraining: what follows the pruning of each round.
        rewind: state to which everything but the masks is set back in each round; None to go on
            from the trained weights.
        seed: of the training.
        checkpoint: file beside which each round keeps its state; an interrupted run makes the same
            choices again and resumes inside the round.
        observe: measured at the end of each round and added to its record.

    Returns:
        A record for each round: "round", "remaining", "sparsity" and what was observed.
    """
    if rounds < 1:
        raise InputError(f"pruning takes 1 round or more, not {rounds}")
    records: list[dict[str, Any]] = []
    for number in range(rounds):
        masks.narrow(choose(module, masks, number))
        if rewind is not None:
            module.load_state_dict(rewind)
        masks.hold_weights()
        if retraining.epochs:
            retraining.train(
                module,
                task,
                masks,
                seed=seed_of("round", seed, number),
                checkpoint=checkpoint and checkpoint.with_suffix(f".{number}.state"),
                title=f"round {number + 1} of {rounds}",
            )
        record: dict[str, Any] = {
            "round": number + 1,
            "remaining": masks.remaining,
            "sparsity": masks.sparsity,
        }
        records.append(record | (observe(module, masks) if observe else {}))
    return records
