"""Prune single weights by ADMM: training pulls the weights to the nearest sparse ones.

Training under a bound on the number of weights is split in two: the loss with a quadratic pull to
``Z - U`` by gradient descent, and the nearest sparse tensor Z by cutting. U adds up by how much
they still differ, so that the pull grows until both agree. Then the rest is cut for good and the
network is trained on with its masks.

Source: Zhang et al., "A Systematic DNN Weight Pruning Framework using Alternating Direction Method
of Multipliers", ECCV 2018, arXiv:1804.03294, section 3.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.compress.prune.layer_allocation import ALLOCATIONS
from gossamer.compress.prune.rewind import Retraining
from gossamer.compress.prune.sparsify import (
    check_sparsity,
    limited,
    pruned_so_far,
    sparse_network,
)
from gossamer.compress.prune.weight_scores import keep_in_each
from gossamer.core.errors import InputError
from gossamer.core.fit import Supervised, cosine, fit, sgd
from gossamer.core.network import Network
from gossamer.core.task import Task, seed_of
from gossamer.parts.masks import Masks


class AdmmTraining(Supervised):
    """The loss plus ``rho / 2 ||W - Z + U||^2``; Z and U change every few epochs.

    Args:
        network: trained in place.
        task: gives the loss.
        masks: which weights are there at all.
        keep: how many of each tensor's weights stay.
        rho: strength of the pull.
        every: epochs between changes of Z and U.
        lr: learning rate of SGD at the start; falls to 0 along half a cosine.
        weight_decay: of matrices and kernels.

    Attributes:
        gaps: ``||W - Z|| / ||W||`` after each change.
    """

    def __init__(
        self,
        network: nn.Module,
        task: Task,
        masks: Masks,
        keep: Mapping[str, int],
        *,
        rho: float,
        every: int = 1,
        lr: float = 0.02,
        weight_decay: float = 5e-4,
    ) -> None:
        super().__init__(
            network,
            task,
            optimizer=sgd(network, lr=lr, weight_decay=weight_decay),
            schedule=cosine,
            penalty=self.pull,
            after_step=masks.hold_weights,
        )
        self.masks, self.keep = masks, dict(keep)
        self.rho, self.every = rho, every
        self.weights = {name: network.get_parameter(name) for name in masks.kept}
        self.z = _frozen(self.projected({n: w.detach() for n, w in self.weights.items()}))
        self.u = _frozen({n: torch.zeros_like(w) for n, w in self.weights.items()})
        self.gaps: list[float] = []

    def projected(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The nearest tensors with so many weights as stay: the largest of each."""
        kept = keep_in_each(
            {name: value.abs() for name, value in values.items()}, self.masks.kept, self.keep
        )
        return {n: torch.where(kept[n].to(v.device), v, 0.0) for n, v in values.items()}

    def pull(self) -> Tensor:
        """``rho / 2`` times the sum of squares of W - Z + U."""
        rows = zip(self.weights.values(), self.z, self.u, strict=True)
        return 0.5 * self.rho * torch.stack([(w - z + u).square().sum() for w, z, u in rows]).sum()

    @torch.no_grad()
    def end_epoch(self) -> None:
        if (self.run.epoch + 1) % self.every:
            return
        sums = {n: w + u for (n, w), u in zip(self.weights.items(), self.u, strict=True)}
        gap = size = 0.0
        for (name, z), old, u in zip(self.projected(sums).items(), self.z, self.u, strict=True):
            old.copy_(z)
            u.copy_(sums[name] - z)
            gap += float((self.weights[name] - z).square().sum())
            size += float(self.weights[name].square().sum())
        self.gaps.append((gap / max(size, 1e-300)) ** 0.5)

    def extra_state(self) -> dict[str, Any]:
        return {"gaps": self.gaps}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        self.gaps = list(state["gaps"])


def _frozen(values: Mapping[str, Tensor]) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(v, requires_grad=False) for v in values.values()])


def admm(
    network: Network,
    task: Task,
    *,
    sparsity: float = 0.9,
    allocation: str = "global",
    rho: float = 0.1,
    every: int = 1,
    epochs: int = 20,
    retrain_epochs: int = 10,
    batch_size: int = 128,
    lr: float = 0.02,
    weight_decay: float = 5e-4,
    skip: Collection[str] = (),
    seed: int = 0,
    checkpoint: Path | None = None,
    cpu: bool = False,
) -> Network:
    """Removes weights by ADMM, then trains what is left (a step of a recipe).

    Args:
        network: trained; unchanged.
        task: its data.
        sparsity: share of the weights that goes.
        allocation: a name of :data:`~.layer_allocation.ALLOCATIONS`: how many weights each layer
            keeps, decided by magnitude at the start (the paper sets them by hand).
        rho: strength of the pull towards sparse weights.
        every: epochs between changes of what the weights are pulled to.
        epochs: of training under the pull.
        retrain_epochs: with masks, afterwards.
        batch_size: samples a batch.
        lr: learning rate at the start of both parts; falls to 0 along half a cosine.
        weight_decay: of matrices and kernels.
        skip: names of parameters or modules that stay dense.
        seed: of the data order.
        checkpoint: file beside which both parts keep their state.
        cpu: stay on the CPU although there is a GPU.

    Returns:
        The sparse network, in packed form too; its record has the relative distance to the sparse
        weights after each change, and what cutting the rest changed.

    Raises:
        InputError: if a name is unknown or a number is out of range.
        UnsupportedError: if the network cannot be traced or has nothing to prune.
    """
    check_sparsity(sparsity)
    if allocation not in ALLOCATIONS:
        raise InputError(f"there is no {allocation}; there are {', '.join(ALLOCATIONS)}")
    if not rho > 0.0 or every < 1 or epochs < 0 or retrain_epochs < 0:
        raise InputError("admm needs rho above 0, every of 1 or more, and no negative epochs")
    module = copy.deepcopy(network.module).cpu()
    masks = pruned_so_far(network, module, skip=skip)
    weights = {name: module.get_parameter(name).detach() for name in masks.kept}
    sizes = {n: w.abs().masked_fill(~masks.kept[n], -torch.inf) for n, w in weights.items()}
    wanted = min(masks.remaining, round(masks.total * (1.0 - sparsity)))
    keep = limited(ALLOCATIONS[allocation](weights, sizes, wanted), masks)
    rule = AdmmTraining(
        module, task, masks, keep, rho=rho, every=every, lr=lr, weight_decay=weight_decay
    )
    fit(
        rule, task, epochs=epochs, batch_size=batch_size, seed=seed_of("admm", seed),
        checkpoint=checkpoint and checkpoint.with_suffix(".pull.state"), cpu=cpu, title="ADMM",
    )  # fmt: skip
    module.cpu()
    weights = {name: module.get_parameter(name).detach() for name in masks.kept}
    cut = keep_in_each({n: w.abs() for n, w in weights.items()}, masks.kept, keep)
    lost = sum(float(w[~cut[n].cpu()].square().sum()) for n, w in weights.items())
    whole = sum(float(w.square().sum()) for w in weights.values())
    masks.narrow(cut)
    retraining = Retraining(
        epochs=retrain_epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay, cpu=cpu
    )
    retraining.train(
        module, task, masks, seed=seed_of("admm retraining", seed),
        checkpoint=checkpoint and checkpoint.with_suffix(".masked.state"), title="retraining",
    )  # fmt: skip
    options = {
        "sparsity": sparsity, "allocation": allocation, "rho": rho, "every": every,
        "epochs": epochs, "retrain_epochs": retrain_epochs, "batch_size": batch_size, "lr": lr,
        "weight_decay": weight_decay, "skip": list(skip), "seed": seed,
    }  # fmt: skip
    report = {"gaps": rule.gaps, "cut": (lost / max(whole, 1e-300)) ** 0.5}
    return sparse_network(network, "admm", options, module, masks, report)
