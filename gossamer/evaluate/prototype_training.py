"""Training of part-prototype networks: which stage when, and what each stage updates.

ProtoPNet learns in stages: *warm* (prototypes and add-on layers before a frozen backbone), *joint*
(everything but the head), *push* (prototypes become training patches) and *last* (the head alone).
The improved model has a warm and a joint stage only. Joint training from the start draws all
prototypes to one patch.

Sources: Chen et al., arXiv:1806.10574, section 2.2, and Huang et al., arXiv:2212.05946, section 4,
with the numbers of their published code. There, joint steps of the learning rate count joint
epochs; so here. What differs: in the last stage the backbone is in evaluation mode, so that pushed
prototypes stay training patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam

from gossamer.core.errors import InputError
from gossamer.core.fit import History, Log, Rule, fit
from gossamer.core.task import Batch, Labelled
from gossamer.evaluate.part_prototypes import (
    Answer,
    FeatureMaps,
    LinearHead,
    PartPrototypeNet,
    Patches,
    alignment,
    check_labels,
    cluster_and_separation,
    cross_class_sparsity,
    orthogonality,
)

Stage = Literal["warm", "joint", "last"]


@dataclass(frozen=True)
class Schedule:
    """The stage of each epoch.

    Attributes:
        stages: one an epoch; prototypes are pushed where "last" follows another stage.
        decay_every: joint epochs after which the learning rates are multiplied by ``decay``.
        decay: see there.
    """

    stages: tuple[Stage, ...]
    decay_every: int
    decay: float

    def multiplier(self, epoch: int) -> float:
        """Of the joint stage's learning rates in ``epoch``."""
        return self.decay ** (self.stages[:epoch].count("joint") // self.decay_every)

    def pushes_after(self, epoch: int) -> bool:
        """Whether prototypes are pushed at the end of ``epoch``."""
        following = self.stages[epoch + 1 : epoch + 2]
        return following == ("last",) and self.stages[epoch] != "last"


def protopnet_schedule(
    epochs: int = 31,
    *,
    warm: int = 5,
    push_from: int = 10,
    push_every: int = 10,
    last: int = 20,
    decay_every: int = 5,
    passes: int = 1,
) -> Schedule:
    """The base model's: a push and ``last`` epochs of the head every ``push_every`` epochs.

    A push always follows the last epoch, so that the network that is kept has pushed prototypes.

    Args:
        epochs: of the warm and joint stages (31 pushes after epochs 10, 20 and 30).
        warm: of these, the first.
        push_from: first epoch (from 0) after which prototypes are pushed.
        push_every: epochs between pushes.
        last: epochs of the last stage after each push.
        decay_every: joint epochs between learning-rate steps of a factor of .1.
        passes: over the data in each epoch (30 stands for the offline augmentation's copies).

    Raises:
        InputError: if a number is out of range.
    """
    if not 0 <= warm <= epochs or epochs < 1 or min(push_every, decay_every, passes) < 1:
        raise InputError(
            "a schedule needs an epoch or more, of which warm ones are a part, and at least 1 "
            f"epoch between pushes and between steps, not {epochs}, {warm}, {push_every}, "
            f"{decay_every}"
        )
    stages: list[Stage] = []
    for epoch in range(epochs):
        stages.extend(_epochs("warm" if epoch < warm else "joint", passes))
        if epoch == epochs - 1 or (epoch >= push_from and epoch % push_every == 0):
            stages.extend(_epochs("last", last * passes))
    return Schedule(tuple(stages), decay_every * passes, 0.1)


def improved_schedule(
    epochs: int = 12, *, warm: int = 5, decay_every: int = 3, passes: int = 1
) -> Schedule:
    """The improved model's: warm, then joint; no push and no last stage.

    Args:
        epochs: in all.
        warm: of these, the first.
        decay_every: joint epochs between learning-rate steps of a factor of .2.
        passes: over the data in each epoch.

    Raises:
        InputError: if a number is out of range.
    """
    if not 0 <= warm <= epochs or epochs < 1 or min(decay_every, passes) < 1:
        raise InputError(
            "a schedule needs an epoch or more, of which warm ones are a part, and at least 1 "
            f"epoch between steps, not {epochs}, {warm} and {decay_every}"
        )
    stages = _epochs("warm", warm * passes) + _epochs("joint", (epochs - warm) * passes)
    return Schedule(stages, decay_every * passes, 0.2)


def _epochs(stage: Stage, count: int) -> tuple[Stage, ...]:
    stages: list[Stage] = [stage] * count
    return tuple(stages)


@dataclass(frozen=True)
class Weights:
    """How much each term of the loss counts, beside the cross-entropy.

    Attributes:
        cluster: of the distance to the own class's prototypes.
        separation: subtracted, of that to other classes'.
        orthogonality: of the prototypes of a class (cosine only).
        sparsity: of weights to other classes (linear head only).
        alignment: of SDFA, after the warm stage (0.3 is the published code's other default).
        delta: difference of similarities that costs nothing.
    """

    cluster: float = 0.8
    separation: float = 0.08
    orthogonality: float = 1e-4
    sparsity: float = 1e-4
    alignment: float = 0.5
    delta: float = 0.1


@dataclass(frozen=True)
class Rates:
    """Adam's learning rates.

    Attributes:
        backbone: in the joint stage.
        add_on: of the layers between backbone and prototypes.
        prototypes: of these.
        importance: of the SA head.
        last: of the linear head, in the last stage.
        weight_decay: on backbone and add-on layers.
    """

    backbone: float = 1e-4
    add_on: float = 3e-3
    prototypes: float = 3e-3
    importance: float = 1e-6
    last: float = 1e-4
    weight_decay: float = 1e-3


class PrototypeTraining(Rule):
    """Trains a :class:`~gossamer.evaluate.part_prototypes.PartPrototypeNet` by a schedule.

    Args:
        network: what is trained.
        task: labelled images; the push reads its training split.
        schedule: the stages; ``fit`` must be given as many epochs. Default: the base model's for
            a linear head, the improved one's for SA.
        weights: of the loss.
        rates: of learning.
        batch_size: of the push.

    Attributes:
        patches: where pushed prototypes come from; None before the first push.

    Raises:
        InputError: if the classes of task and network differ.
    """

    def __init__(
        self,
        network: PartPrototypeNet,
        task: Labelled,
        *,
        schedule: Schedule | None = None,
        weights: Weights | None = None,
        rates: Rates | None = None,
        batch_size: int = 80,
    ) -> None:
        if len(task.classes) != network.num_classes:
            raise InputError(
                f"{task.name} has {len(task.classes)} classes, the part-prototype network "
                f"{network.num_classes}"
            )
        # The trained network, of a kind that has prototypes.
        self.network: PartPrototypeNet = network  # pyright: ignore[reportIncompatibleVariableOverride]
        self.task = task
        self.schedule = schedule or default_schedule(network)
        self.weights = weights or Weights()
        self.batch_size = batch_size
        self.patches: Patches | None = None
        rates = rates or Rates()
        linear = isinstance(network.head, LinearHead)
        if "last" in self.schedule.stages and not linear:
            raise InputError("the SA head has no last stage; use the improved schedule")
        add_on = {
            "params": list(network.add_on.parameters()),
            "lr": rates.add_on,
            "weight_decay": rates.weight_decay,
        }
        both: list[dict[str, Any]] = [add_on, {"params": [network.prototypes]}]
        both[1]["lr"] = rates.prototypes
        if not linear:
            both.append({"params": list(network.head.parameters()), "lr": rates.importance})
        backbone = [p for p in network.features.parameters() if p.requires_grad]
        self._trainable = backbone
        deep = {"params": backbone, "lr": rates.backbone, "weight_decay": rates.weight_decay}
        self.warm_optimizer = Adam([dict(group) for group in both])
        self.joint_optimizer = Adam([dict(group) for group in (deep, *both) if group["params"]])
        self.last_optimizer = Adam(network.head.parameters(), lr=rates.last)
        for group in self.joint_optimizer.param_groups:
            group["initial_lr"] = group["lr"]

    def begin(self) -> None:
        if self.run.epochs != len(self.schedule.stages):
            raise InputError(
                f"the schedule has {len(self.schedule.stages)} epochs, the run {self.run.epochs}"
            )

    def step(self, batch: Batch) -> Log:
        stage = self.schedule.stages[self.run.epoch]
        images, labels = self.task.inputs(batch)[0], batch[1]
        check_labels(labels, self.network.num_classes)
        for parameter in self._trainable:
            parameter.requires_grad_(stage == "joint")
        if stage == "last":
            return self._last_step(images, labels)
        optimizer = self.warm_optimizer
        if stage == "joint":
            optimizer = self.joint_optimizer
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self.schedule.multiplier(self.run.epoch)
        self.network.zero_grad(set_to_none=True)
        with self.run.accelerator.autocast():
            answer = self.network.answer(images)
            terms = self.terms(answer, labels, aligned=stage == "joint")
            loss = torch.stack(list(terms.values())).sum()
        self.backward(loss)
        optimizer.step()
        self.network.normalise()
        return {"loss": loss.detach(), **{name: term.detach() for name, term in terms.items()}}

    def terms(self, answer: Answer, labels: Tensor, *, aligned: bool) -> dict[str, Tensor]:
        """The weighted terms of the loss, by name.

        Args:
            answer: of the network.
            labels: ``[B]``.
            aligned: whether SDFA counts (if the network has it).
        """
        network, weights = self.network, self.weights
        cluster, separation = cluster_and_separation(
            answer.distances, labels, network.prototype_classes
        )
        terms = {
            "cross_entropy": F.cross_entropy(answer.logits, labels),
            "cluster": weights.cluster * cluster,
            "separation": -weights.separation * separation,
        }
        if isinstance(network.head, LinearHead):
            terms["sparsity"] = weights.sparsity * cross_class_sparsity(
                network.head.weight, network.prototype_classes
            )
        if network.similarity == "cosine":
            by_class = network.prototypes.unflatten(0, (network.num_classes, network.per_class))
            terms["orthogonality"] = weights.orthogonality * orthogonality(by_class)
        if network.align and aligned:
            assert answer.shallow is not None
            own = network.own(answer.activations, labels)
            terms["alignment"] = weights.alignment * alignment(
                answer.deep, answer.shallow, own, weights.delta
            )
        return terms

    def _last_step(self, images: Tensor, labels: Tensor) -> Log:
        head = self.network.head
        assert isinstance(head, LinearHead)
        self.network.eval()
        with self.run.accelerator.autocast():
            with torch.no_grad():
                scores = self.network.answer(images).scores
            loss = F.cross_entropy(head(scores), labels)
            loss = loss + self.weights.sparsity * cross_class_sparsity(
                head.weight, self.network.prototype_classes
            )
        self.last_optimizer.zero_grad(set_to_none=True)
        self.backward(loss)
        self.last_optimizer.step()
        return {"loss": loss.detach()}

    def end_epoch(self) -> None:
        if self.schedule.pushes_after(self.run.epoch):
            batches = self.task.batches("train", batch_size=self.batch_size, shuffle=False)
            self.patches = self.network.push(batches)

    def finish(self) -> None:
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        self.network.eval()

    def extra_state(self) -> dict[str, Any]:
        return {"patches": None if self.patches is None else vars(self.patches)}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        self.patches = None if state["patches"] is None else Patches(**state["patches"])


def default_schedule(network: PartPrototypeNet) -> Schedule:
    """The base model's for a linear head, the improved one's for SA."""
    return protopnet_schedule() if isinstance(network.head, LinearHead) else improved_schedule()


def train_prototypes(
    network: PartPrototypeNet,
    task: Labelled,
    *,
    schedule: Schedule | None = None,
    weights: Weights | None = None,
    rates: Rates | None = None,
    batch_size: int = 80,
    seed: int = 0,
    checkpoint: Path | None = None,
    cpu: bool = False,
) -> History:
    """Trains a part-prototype network in place.

    Args:
        network: starts from a pretrained backbone, as a rule.
        task: labelled images.
        schedule: the stages, see :class:`PrototypeTraining`.
        weights: of the loss.
        rates: of learning.
        batch_size: images a batch.
        seed: of data order and augmentation.
        checkpoint: file that holds the run's state; an interrupted run goes on from it.
        cpu: stay on the CPU although there is a GPU.

    Raises:
        InputError: if the classes of task and network differ, or the schedule does not suit the
            head.
    """
    rule = PrototypeTraining(
        network, task, schedule=schedule, weights=weights, rates=rates, batch_size=batch_size
    )
    return fit(
        rule,
        task,
        epochs=len(rule.schedule.stages),
        batch_size=batch_size,
        seed=seed,
        checkpoint=checkpoint,
        cpu=cpu,
        title="part prototypes",
    )


class PooledClassifier(nn.Module):
    """The black box beside the part prototypes: mean of the same deep map, and a linear layer.

    Also what pretrains a backbone where there are no weights for it.

    Args:
        features: the maps.
        classes: logits.
    """

    def __init__(self, features: FeatureMaps, classes: int) -> None:
        super().__init__()
        self.features = features
        self.classifier = nn.Linear(features.shapes[features.deep][0], classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images)[1].mean((2, 3)))
