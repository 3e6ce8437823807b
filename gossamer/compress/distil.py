"""Knowledge distillation: a network learns from a larger one's answers as well as from labels.

Source: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network",
arXiv:1503.02531; weights and temperature as in Polino, Pascanu and Alistarh, arXiv:1802.05668.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.core.fit import Supervised, fit, sgd
from gossamer.core.network import Network
from gossamer.core.task import Batch, Task, device_of, logits_of
from gossamer.parts.distillation import (
    Ask,
    asked_distillation_loss,
    distillation_loss,
    frozen_teacher,
)
from gossamer.parts.masks import Masks


class DistillationCriterion:
    """A loss for :class:`gossamer.core.fit.Supervised`: the task's own mixed with a teacher's.

    Args:
        task: gives the inputs of a batch and the loss against its labels.
        teacher: a copy is frozen in evaluation mode.
        temperature: T.
        weight: lambda, share of the teacher.
        reduction: of the divergence, see :data:`gossamer.parts.distillation.Reduction`.
        ask: for which samples the teacher is asked; None for all, by the task's own loss. With a
            mask the hard part is plain cross-entropy, so the task must yield (inputs, labels).
    """

    def __init__(
        self,
        task: Task,
        teacher: nn.Module,
        *,
        temperature: float = 2.0,
        weight: float = 0.7,
        reduction: Literal["batchmean", "mean"] = "batchmean",
        ask: Ask | None = None,
    ) -> None:
        if not 0.0 <= weight <= 1.0 or temperature <= 0.0:
            raise InputError(
                f"distillation needs a weight in 0..1 and a temperature above 0, not {weight} "
                f"and {temperature}"
            )
        self.task = task
        self.teacher = frozen_teacher(teacher)
        self.temperature = temperature
        self.weight = weight
        self.reduction: Literal["batchmean", "mean"] = reduction
        self.ask = ask

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        """The loss (a scalar) of the student's ``outputs`` for ``batch``."""
        student = logits_of(outputs)
        if device_of(self.teacher) != student.device:
            self.teacher.to(student.device)
        with torch.no_grad():
            teacher = logits_of(self.task.outputs(self.teacher, batch))
        if teacher.shape != student.shape:
            raise InputError(
                f"teacher and student answer different shapes: {tuple(teacher.shape)} and "
                f"{tuple(student.shape)}"
            )
        if self.ask is not None:
            return asked_distillation_loss(
                student,
                teacher,
                batch[1],
                ask=self.ask,
                temperature=self.temperature,
                weight=self.weight,
                reduction=self.reduction,
            )
        return distillation_loss(
            student,
            teacher,
            self.task.criterion(outputs, batch),
            temperature=self.temperature,
            weight=self.weight,
            reduction=self.reduction,
        )


def module_of(teacher: nn.Module | Network | None, step: str) -> nn.Module:
    """The teacher's module.

    Raises:
        InputError: if there is none.
    """
    if teacher is None:
        raise InputError(f"{step} needs a teacher: a trained network for the same task")
    return teacher.module if isinstance(teacher, Network) else teacher


def distil(
    network: Network,
    task: Task,
    *,
    teacher: nn.Module | Network | None = None,
    epochs: int = 40,
    batch_size: int = 128,
    lr: float = 0.1,
    weight_decay: float = 5e-4,
    temperature: float = 2.0,
    weight: float = 0.7,
    seed: int = 0,
    checkpoint: Path | None = None,
    cpu: bool = False,
) -> Network:
    """Trains a network under a teacher (a step of a recipe).

    Weights that an earlier step pruned stay zero.

    Args:
        network: the student; unchanged.
        task: its data.
        teacher: a trained network for the same task.
        epochs: passes over the training split.
        batch_size: samples a batch.
        lr: learning rate at the start; falls to 0 along half a cosine.
        weight_decay: of matrices and kernels.
        temperature: T.
        weight: lambda, share of the teacher.
        seed: of the data order.
        checkpoint: file that holds the run's state; an interrupted run resumes from it.
        cpu: stay on the CPU although there is a GPU.

    Returns:
        The trained student.

    Raises:
        InputError: if there is no teacher.
    """
    criterion = DistillationCriterion(
        task, module_of(teacher, "distil"), temperature=temperature, weight=weight
    )
    student = copy.deepcopy(network.module)
    masks = Masks.of_zeros(network, student)
    rule = Supervised(
        student,
        task,
        criterion=criterion,
        after_step=masks.hold_weights,
        optimizer=sgd(student, lr=lr, weight_decay=weight_decay),
    )
    history = fit(
        rule,
        task,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        checkpoint=checkpoint,
        cpu=cpu,
        title="distilling",
    )
    return network.after(
        "distil",
        {
            "epochs": epochs,
            "batch_size": batch_size,
            "lr": lr,
            "weight_decay": weight_decay,
            "temperature": temperature,
            "weight": weight,
            "seed": seed,
        },
        {"loss": history.loss[-1] if history.loss else None},
        module=student.cpu(),
        **masks.stored(),
    )
