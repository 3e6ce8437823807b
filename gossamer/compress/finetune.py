"""Train a network on: the control that every other way of recovering is compared with."""

from __future__ import annotations

import copy
from pathlib import Path

from gossamer.core.fit import Supervised, fit, sgd
from gossamer.core.network import Network
from gossamer.core.task import Task
from gossamer.parts.masks import Masks


def finetune(
    network: Network,
    task: Task,
    *,
    epochs: int = 10,
    batch_size: int = 128,
    lr: float = 0.02,
    weight_decay: float = 5e-4,
    seed: int = 0,
    checkpoint: Path | None = None,
    cpu: bool = False,
) -> Network:
    """Trains a network with the task's own loss (a step of a recipe).

    Weights that an earlier step pruned stay zero.

    Args:
        network: unchanged.
        task: its data.
        epochs: passes over the training split.
        batch_size: samples a batch.
        lr: learning rate at the start; falls to 0 along half a cosine.
        weight_decay: of matrices and kernels.
        seed: of the data order.
        checkpoint: file that holds the run's state; an interrupted run resumes from it.
        cpu: stay on the CPU although there is a GPU.

    Returns:
        The trained network.
    """
    module = copy.deepcopy(network.module)
    masks = Masks.of_zeros(network, module)
    rule = Supervised(
        module,
        task,
        optimizer=sgd(module, lr=lr, weight_decay=weight_decay),
        after_step=masks.hold_weights,
    )
    history = fit(
        rule,
        task,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        checkpoint=checkpoint,
        cpu=cpu,
        title="fine-tuning",
    )
    options = {
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "weight_decay": weight_decay,
        "seed": seed,
    }
    report = {"loss": history.loss[-1] if history.loss else None}
    return network.after("finetune", options, report, module=module.cpu(), **masks.stored())
