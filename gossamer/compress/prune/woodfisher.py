"""WoodFisher: prune single weights by the loss that their removal costs, and move the others.

The optimal brain surgeon with the empirical Fisher matrix in the place of the Hessian: a weight is
worth ``w_q^2 / (2 [F^-1]_qq)``, and when weights go those that stay are set to what the quadratic
model of the loss says is best.

Source: Singh and Alistarh, NeurIPS 2020, arXiv:2004.14340, eq. 4 and section 4. What differs: the
weights that go in one round are made up for jointly within each block (the paper adds up the
changes of single removals).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from gossamer.compress.prune.empirical_fisher import (
    BLOCK,
    DAMPING,
    BlockFisher,
    fisher_gradients,
)
from gossamer.compress.prune.layer_allocation import ALLOCATIONS
from gossamer.compress.prune.rewind import Retraining
from gossamer.compress.prune.schedule import SCHEDULES
from gossamer.compress.prune.sparsify import allocated, in_rounds
from gossamer.core.errors import InputError
from gossamer.core.network import Network
from gossamer.core.task import Task, seed_of
from gossamer.parts.masks import Masks


def woodfisher(
    network: Network,
    task: Task,
    *,
    sparsity: float = 0.9,
    allocation: str = "global",
    schedule: str = "cubic",
    rounds: int = 5,
    update: bool = True,
    gradients: int = 256,
    average: int = 1,
    block: int = BLOCK,
    damping: float = DAMPING,
    skip: Collection[str] = (),
    epochs: int = 10,
    batch_size: int = 128,
    lr: float = 0.02,
    seed: int = 0,
    checkpoint: Path | None = None,
    cpu: bool = False,
) -> Network:
    """Removes weights by their second-order cost (a step of a recipe).

    Args:
        network: trained; unchanged.
        task: its data.
        sparsity: share of the weights that goes.
        allocation: a name of :data:`~.layer_allocation.ALLOCATIONS`.
        schedule: a name of :data:`~.schedule.SCHEDULES`: how much is gone after each round.
        rounds: of pruning and training.
        update: move the weights that stay; without it only the choice is WoodFisher's.
        gradients: that the Fisher matrix is the mean square of.
        average: samples whose mean is one gradient.
        block: consecutive weights of a tensor whose curvature is taken together.
        damping: added to the diagonal.
        skip: names of parameters or modules that stay dense.
        epochs: of training, over all rounds.
        batch_size: samples a batch.
        lr: learning rate at the start of each round; falls to 0 along half a cosine.
        seed: of samples, batches and data order.
        checkpoint: file beside which each round keeps its state.
        cpu: stay on the CPU although there is a GPU.

    Returns:
        The sparse network, in packed form too.

    Raises:
        InputError: if a name is unknown or a number is out of range.
        UnsupportedError: if the network cannot be traced or has nothing to prune.
    """
    for name, known in ((allocation, ALLOCATIONS), (schedule, SCHEDULES)):
        if name not in known:
            raise InputError(f"there is no {name}; there are {', '.join(known)}")

    def choose(now: nn.Module, masks: Masks, keep: int, number: int) -> Mapping[str, Tensor]:
        found = fisher_gradients(
            now, list(masks.kept), task, seed_of("fisher", seed, number),
            gradients=gradients, average=average,
        )  # fmt: skip
        fishers = {name: BlockFisher(g, block, damping) for name, g in found.items()}
        weights = {name: now.get_parameter(name) for name in fishers}
        scores = {name: f.saliency(weights[name].detach()) for name, f in fishers.items()}
        kept = allocated(now, scores, masks, allocation, keep)
        if update:
            with torch.no_grad():
                for name, fisher in fishers.items():
                    weights[name].copy_(fisher.compensated(weights[name], kept[name]))
        return kept

    options = {
        "allocation": allocation, "update": update, "gradients": gradients, "average": average,
        "block": block, "damping": damping,
    }  # fmt: skip
    return in_rounds(
        network,
        task,
        choose,
        step="woodfisher",
        options=options,
        sparsity=sparsity,
        schedule=schedule,
        rounds=rounds,
        retraining=Retraining(epochs=epochs, batch_size=batch_size, lr=lr, cpu=cpu),
        skip=skip,
        seed=seed,
        checkpoint=checkpoint,
    )
