"""Fresh statistics for batch normalisation after the weights before it have changed.

Running means and variances describe the activations of the network that was trained. After
pruning, merging or choosing a subnet they are wrong, and accuracy collapses although the weights
are fine; a few batches forward mend it.

Source: Yu and Huang, "Universally slimmable networks and improved training techniques",
arXiv:1903.05134, section 3.3 (post-statistics); cumulative averages over the batches.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gossamer.core.errors import InputError
from gossamer.core.task import Task, device_of, to_device


def recalibrate_batchnorm(network: nn.Module, inputs: Iterable[tuple[Any, ...]]) -> int:
    """Replaces the running statistics by averages over ``inputs``, in place.

    Everything but batch normalisation runs in evaluation mode, so dropout does not disturb the
    statistics. Every batch counts the same; give batches of one size.

    Args:
        network: its batch-norm buffers change; modes and momenta are restored.
        inputs: positional arguments of the network, one tuple a batch.

    Returns:
        How many batches were used (0 if the network has no running statistics).

    Raises:
        InputError: if ``inputs`` is empty although there are statistics to compute.
    """
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    modes = [(module, module.training) for module in network.modules()]
    momenta = [norm.momentum for norm in norms]
    device = device_of(network)
    count = 0
    kept = [(n.running_mean, n.running_var, n.num_batches_tracked) for n in norms]
    before = [[None if t is None else t.clone() for t in tensors] for tensors in kept]
    try:
        network.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average
            norm.training = True
        with torch.no_grad():
            for batch in inputs:
                network(*to_device(batch, device))
                count += 1
    finally:
        for module, mode in modes:
            module.training = mode
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        if count == 0:
            for tensors, values in zip(kept, before, strict=True):
                for tensor, value in zip(tensors, values, strict=True):
                    if tensor is not None and value is not None:
                        tensor.copy_(value)
    if count == 0:
        raise InputError("there are no batches to compute batch-norm statistics from")
    return count


def recalibrate_on(network: nn.Module, task: Task, *, batch_size: int = 128, seed: int = 0) -> int:
    """:func:`recalibrate_batchnorm` over one epoch of the training split.

    The batches are those of training, shuffled and augmented: the weights were fitted to their
    statistics.

    Args:
        network: its batch-norm buffers change.
        task: its training split is used.
        batch_size: samples a batch; a smaller rest is left out, since it would count as much.
        seed: of order and augmentation.

    Returns:
        How many batches were used.
    """
    whole = max(1, task.size("train") // batch_size)
    batches = task.batches("train", batch_size=batch_size, seed=seed)
    return recalibrate_batchnorm(
        network, (task.inputs(batch) for _, batch in zip(range(whole), batches, strict=False))
    )
