"""Sparse from the first step: SET and RigL move their zeros, movement pruning learns its mask.

Dynamic sparse training begins with a random sparse network; now and then the smallest weights that
are there go and as many others come, at random (SET) or where the gradient is largest (RigL). The
number of weights never changes. Movement pruning begins dense: scores gather how far each weight
moves away from zero, and the mask of the highest scores shrinks along a cubic schedule.

Sources: SET, Mocanu et al., Nature Communications 2018, arXiv:1707.04780; RigL, Evci et al., ICML
2020, arXiv:1911.11134, algorithm 1; movement pruning, Sanh et al., NeurIPS 2020, arXiv:2005.07683,
sections 3 and 4.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.compress.prune.bilevel import by_weight
from gossamer.compress.prune.layer_allocation import ALLOCATIONS
from gossamer.compress.prune.schedule import cubic
from gossamer.compress.prune.sparsify import check_sparsity, pruned_so_far, sparse_network
from gossamer.compress.prune.weight_scores import largest
from gossamer.core.errors import InputError
from gossamer.core.fit import Log, Rule, Supervised, cosine, fit, sgd
from gossamer.core.network import Network
from gossamer.core.task import Batch, Task, seed_of
from gossamer.parts.masks import Masks
from gossamer.parts.straight_through import straight_through
from gossamer.parts.swap import swapped


def drop_share(fraction: float, *, first: float = 0.3, until: float = 0.75) -> float:
    """Share of a layer's weights that is exchanged: half a cosine from ``first`` to 0 at ``until``.

    Args:
        fraction: of training done.
        first: at the start.
        until: fraction of training after which nothing is exchanged.
    """
    if fraction >= until:
        return 0.0
    return 0.5 * first * (1.0 + math.cos(math.pi * fraction / until))


def exchanged(weight: Tensor, mask: Tensor, worth: Tensor, count: int) -> Tensor:
    """The mask after ``count`` weights went and as many others came.

    Args:
        weight: of the layer; the smallest that are there go.
        mask: bool.
        worth: of the weights that are not there; the highest come.
        count: how many (no more than are there, or are not).

    Returns:
        Bool mask of as many ones.
    """
    there, gone = mask.flatten(), ~mask.flatten()
    count = min(count, int(there.sum()), int(gone.sum()))
    if count <= 0:
        return mask.clone()
    size = torch.where(there, weight.detach().flatten().abs(), -torch.inf)
    stays = largest(size, int(there.sum()) - count)
    comes = largest(torch.where(gone, worth.flatten(), -torch.inf), count)
    return (stays | comes).view_as(mask)


class DynamicSparse(Supervised):
    """The plain rule on a sparse network whose zeros move.

    Args:
        network: trained in place; its masked weights are zeroed at once.
        task: gives the loss.
        masks: where weights are.
        grow: "gradient" (RigL) or "random" (SET).
        every: steps between exchanges.
        first: share of a layer that is exchanged at first.
        until: fraction of training after which zeros stay where they are.
        lr: of SGD.
        weight_decay: of SGD.
    """

    def __init__(
        self,
        network: nn.Module,
        task: Task,
        masks: Masks,
        *,
        grow: Literal["gradient", "random"] = "gradient",
        every: int = 100,
        first: float = 0.3,
        until: float = 0.75,
        lr: float = 0.1,
        weight_decay: float = 5e-4,
    ) -> None:
        super().__init__(
            network,
            task,
            optimizer=sgd(network, lr=lr, weight_decay=weight_decay),
            after_step=masks.hold_weights,
        )
        self.masks = masks
        self.grow = grow
        self.every = every
        self.first = first
        self.until = until
        masks.hold_weights()

    def step(self, batch: Batch) -> Log:
        share = drop_share(self.run.fraction, first=self.first, until=self.until)
        if share and self.run.step and self.run.step % self.every == 0:
            return self._exchange(batch, share)
        self.after_backward = self.masks.hold_gradients
        return super().step(batch)

    def _exchange(self, batch: Batch, share: float) -> Log:
        """A step that moves zeros in place of weights: dense gradients say where to."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.run.accelerator.autocast():
            loss = self.criterion(self.task.outputs(self.network, batch), batch)
        self.backward(loss)
        for name, mask in self.masks.kept.items():
            weight = self.network.get_parameter(name)
            mask = mask.to(weight.device)
            assert weight.grad is not None
            worth = (
                weight.grad.abs() if self.grow == "gradient" else torch.rand_like(weight.detach())
            )
            self.masks.kept[name] = exchanged(weight, mask, worth, int(share * int(mask.sum())))
        # What has come starts at zero, without a past.
        self.masks.hold_weights()
        self.masks.hold_optimizer(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.detach()}

    def extra_state(self) -> dict[str, Any]:
        return {"masks": {name: mask.cpu() for name, mask in self.masks.kept.items()}}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        self.masks.kept = {name: mask.bool() for name, mask in state["masks"].items()}
        self.masks.hold_weights()


def dynamic_sparse(
    network: Network,
    task: Task,
    *,
    sparsity: float = 0.9,
    grow: Literal["gradient", "random"] = "gradient",
    allocation: str = "erk",
    every: int = 100,
    drop: float = 0.3,
    until: float = 0.75,
    skip: Collection[str] = (),
    epochs: int = 30,
    batch_size: int = 128,
    lr: float = 0.1,
    weight_decay: float = 5e-4,
    seed: int = 0,
    checkpoint: Path | None = None,
    cpu: bool = False,
) -> Network:
    """Trains sparse from the start, moving zeros on the way (a step of a recipe): RigL or SET.

    Args:
        network: its weights are where training starts; which of them stay at first is drawn.
        task: its data.
        sparsity: share of the weights that is zero, from the first step to the last.
        grow: "gradient" is RigL, "random" is SET.
        allocation: a name of :data:`~.layer_allocation.ALLOCATIONS` that needs no scores.
        every: steps between exchanges.
        drop: share of a layer that is exchanged at first.
        until: fraction of training after which zeros stay where they are.
        skip: names of parameters or modules that stay dense.
        epochs: of training.
        batch_size: samples a batch.
        lr: learning rate at the start; falls to 0 along half a cosine.
        weight_decay: of matrices and kernels.
        seed: of the first masks, what is drawn and the data order.
        checkpoint: file that holds the run's state.
        cpu: stay on the CPU although there is a GPU.

    Raises:
        InputError: if an option is out of range.
        UnsupportedError: if the network cannot be traced or has nothing to prune.
    """
    check_sparsity(sparsity)
    if grow not in ("gradient", "random"):
        raise InputError(f"zeros move by gradient or at random, not by {grow!r:.40}")
    if allocation not in ("erk", "uniform", "uniform+"):
        raise InputError(
            f"the first masks are shared by erk, uniform or uniform+, not {allocation}"
        )
    if every < 1 or not 0.0 <= drop <= 1.0 or not 0.0 <= until <= 1.0:
        raise InputError("every is 1 or more, drop and until are shares")
    module = copy.deepcopy(network.module).cpu()
    masks = pruned_so_far(network, module, skip=skip)
    generator = torch.Generator().manual_seed(seed_of("first masks", seed))
    weights = {name: module.get_parameter(name).detach() for name in masks.kept}
    keep = masks.total - round(sparsity * masks.total)
    counts = ALLOCATIONS[allocation](weights, {}, keep)
    for name, weight in weights.items():
        drawn = torch.rand(weight.numel(), generator=generator)
        alive = masks.kept[name].flatten()
        drawn = torch.where(alive, drawn, -torch.inf)
        count = min(counts[name], int(alive.sum()))
        masks.kept[name] = largest(drawn, count).view_as(weight)
    first = {name: mask.clone() for name, mask in masks.kept.items()}
    rule = DynamicSparse(
        module, task, masks, grow=grow, every=every, first=drop, until=until, lr=lr,
        weight_decay=weight_decay,
    )  # fmt: skip
    fit(
        rule, task, epochs=epochs, batch_size=batch_size, seed=seed, checkpoint=checkpoint,
        cpu=cpu, title="dynamic sparse training",
    )  # fmt: skip
    module.cpu()
    moved = sum(int((first[n] & ~m.cpu()).sum()) for n, m in masks.kept.items())
    options = {
        "sparsity": sparsity, "grow": grow, "allocation": allocation, "every": every,
        "drop": drop, "until": until, "skip": list(skip), "epochs": epochs,
        "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay, "seed": seed,
    }  # fmt: skip
    return sparse_network(network, "dynamic-sparse", options, module, masks, {"moved": moved})


class MovementPruning(Rule):
    """Weights and scores trained together; the mask of the highest scores shrinks.

    Args:
        network: trained in place.
        task: gives the loss.
        names: of the masked parameters.
        sparsity: at the end.
        lr: of the weights (SGD along half a cosine).
        score_lr: of the scores.
        weight_decay: of the weights.
        warm: fraction of training before the first weight goes.
        cool: fraction of training after the last went.
    """

    def __init__(
        self,
        network: nn.Module,
        task: Task,
        names: Sequence[str],
        *,
        sparsity: float,
        lr: float = 0.02,
        score_lr: float = 1.0,
        weight_decay: float = 5e-4,
        warm: float = 0.1,
        cool: float = 0.3,
    ) -> None:
        self.network = network
        self.task = task
        self.names = list(names)
        self.share = cubic(sparsity)
        self.warm, self.cool = warm, cool
        self.scores = nn.ParameterList(
            [nn.Parameter(torch.zeros_like(network.get_parameter(n).detach())) for n in names]
        )
        self.optimizer = sgd(network, lr=lr, weight_decay=weight_decay)
        self.lr, self.score_lr = lr, score_lr

    def masks(self, fraction: float) -> dict[str, Tensor]:
        """The mask at a fraction of training, float 0 and 1."""
        done = (fraction - self.warm) / max(1e-9, 1.0 - self.warm - self.cool)
        sparsity = self.share(min(1.0, max(0.0, done)))
        scores = dict(zip(self.names, self.scores, strict=True))
        return by_weight(sparsity)({name: score.detach() for name, score in scores.items()})

    def step(self, batch: Batch) -> Log:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * cosine(self.run.fraction)
        self.optimizer.zero_grad(set_to_none=True)
        masks = self.masks(self.run.fraction)
        parameters = {n: self.network.get_parameter(n) for n in self.names}
        gates = {
            n: straight_through(score, masks[n])
            for n, score in zip(self.names, self.scores, strict=True)
        }
        with swapped(self.network, {n: parameters[n] * gates[n] for n in self.names}):
            loss = self.task.loss(self.network, batch)
        self.backward(loss)
        self.optimizer.step()
        with torch.no_grad():
            # dL/dS = dL/dW' W: away from zero is minus that. Plain descent gathers it, without
            # momentum, for weights that are masked too.
            for score in self.scores:
                assert score.grad is not None
                score.sub_(score.grad, alpha=self.score_lr)
                score.grad = None
        return {"loss": loss.detach()}


def movement(
    network: Network,
    task: Task,
    *,
    sparsity: float = 0.9,
    epochs: int = 30,
    batch_size: int = 128,
    lr: float = 0.02,
    score_lr: float = 1.0,
    weight_decay: float = 5e-4,
    warm: float = 0.1,
    cool: float = 0.3,
    skip: Collection[str] = (),
    seed: int = 0,
    checkpoint: Path | None = None,
    cpu: bool = False,
) -> Network:
    """Movement pruning (a step of a recipe): what moves away from zero stays.

    Args:
        network: trained; unchanged.
        task: what it is fine-tuned on.
        sparsity: share of the weights that goes.
        epochs: of fine-tuning.
        batch_size: samples a batch.
        lr: of the weights at the start.
        score_lr: of the scores.
        weight_decay: of matrices and kernels.
        warm: fraction of training before the first weight goes.
        cool: fraction of training after the last went.
        skip: names of parameters or modules that stay dense.
        seed: of the data order.
        checkpoint: file that holds the run's state.
        cpu: stay on the CPU although there is a GPU.

    Raises:
        InputError: if an option is out of range.
        UnsupportedError: if the network cannot be traced or has nothing to prune.
    """
    check_sparsity(sparsity)
    if not (warm >= 0.0 and cool >= 0.0 and warm + cool < 1.0):
        raise InputError(f"warm and cool leave no room for pruning: {warm:g} + {cool:g}")
    module = copy.deepcopy(network.module).cpu()
    masks = pruned_so_far(network, module, skip=skip)
    rule = MovementPruning(
        module, task, list(masks.kept), sparsity=sparsity, lr=lr, score_lr=score_lr,
        weight_decay=weight_decay, warm=warm, cool=cool,
    )  # fmt: skip
    fit(
        rule, task, epochs=epochs, batch_size=batch_size, seed=seed, checkpoint=checkpoint,
        cpu=cpu, title="movement pruning",
    )  # fmt: skip
    masks.narrow({name: mask.cpu() > 0 for name, mask in rule.masks(1.0).items()})
    module.cpu()
    options = {
        "sparsity": sparsity, "epochs": epochs, "batch_size": batch_size, "lr": lr,
        "score_lr": score_lr, "weight_decay": weight_decay, "warm": warm, "cool": cool,
        "skip": list(skip), "seed": seed,
    }  # fmt: skip
    return sparse_network(network, "movement", options, module, masks, {})
