"""The empirical Fisher matrix of a network's weights, block by block, and its inverse.

The Hessian of a trained network's loss is close to the mean of ``g g^T`` over samples' gradients.
It is inverted for blocks of consecutive weights of one tensor; weights of different blocks are
taken as independent. The paper builds the inverse by one rank-one update a gradient (Woodbury);
summing the matrices and inverting them by Cholesky gives the same, and a blocked product of
matrices is many times as fast as hundreds of passes over the inverse.

Source: Singh and Alistarh, "WoodFisher: Efficient Second-Order Approximation for Neural Network
Compression", NeurIPS 2020, arXiv:2004.14340, sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from gossamer.core.errors import InputError
from gossamer.core.task import Task, device_of, evaluating, to_device

DAMPING = 1e-5
BLOCK = 100
_PIECE = 4_000_000
"""Entries of the inverse that are in memory at a time."""


def sample_gradients(
    module: nn.Module,
    names: Sequence[str],
    task: Task,
    seed: int,
    *,
    samples: int = 256,
    batch_size: int = 64,
) -> Iterator[dict[str, Tensor]]:
    """Each training sample's own gradient of the task's loss, in evaluation mode.

    Args:
        module: unchanged.
        names: of its parameters.
        task: gives data and loss; every tensor of its batches has samples on axis 0.
        seed: of the choice of samples.
        samples: at most so many.
        batch_size: samples at a time.

    Yields:
        For each name ``[samples of the batch, *shape]``.

    Raises:
        InputError: if less than one sample is asked for.
    """
    if samples < 1:
        raise InputError(f"gradients need 1 sample or more, not {samples}")
    weights = {name: module.get_parameter(name).detach() for name in names}
    rest = {n: t.detach() for n, t in module.state_dict(keep_vars=True).items() if n not in weights}

    def loss(values: Mapping[str, Tensor], sample: Any) -> Tensor:
        batch = pytree.tree_map(lambda t: t[None], sample)
        outputs = torch.func.functional_call(module, {**values, **rest}, task.inputs(batch))
        return task.criterion(outputs, batch)

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    device = device_of(module)
    seen = 0
    # Inference mode would leave no graph to differentiate, so only the modes are borrowed.
    with evaluating(module), torch.inference_mode(False):
        for batch in task.batches("train", batch_size=batch_size, seed=seed):
            left = samples - seen
            batch = pytree.tree_map(lambda t, n=left: t[:n], to_device(batch, device))
            found = each(weights, batch)
            yield found
            seen += len(next(iter(found.values())))
            if seen >= samples:
                break


def fisher_gradients(
    module: nn.Module,
    names: Sequence[str],
    task: Task,
    seed: int,
    *,
    gradients: int = 256,
    average: int = 1,
) -> dict[str, Tensor]:
    """Gradients that a Fisher matrix is the mean square of, ``[gradients, weights]`` by name.

    Args:
        module: unchanged; the gradients of its zero weights are set to zero, so that weights that
            were removed have no part in the curvature of the others.
        names: of its parameters.
        task: gives data and loss.
        seed: of the choice of samples.
        gradients: how many; fewer if there is less data.
        average: samples whose mean is one gradient (the paper averages where data is plenty).

    Raises:
        InputError: if a number is below 1, or there are fewer samples than one average takes.
    """
    if gradients < 1 or average < 1:
        raise InputError("a Fisher matrix needs 1 gradient or more, of 1 sample or more each")
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    stream = sample_gradients(
        module, names, task, seed, samples=gradients * average, batch_size=64 * average
    )
    for found in stream:
        for name, each in found.items():
            whole = len(each) // average * average
            means = each[:whole].unflatten(0, (-1, average)).mean(1).flatten(1)
            parts[name].append(means * (module.get_parameter(name).detach() != 0).flatten())
    if sum(len(part) for part in next(iter(parts.values()))) == 0:
        raise InputError(f"there are fewer than {average} samples for one gradient")
    return {name: torch.cat(part) for name, part in parts.items()}


@dataclass(frozen=True)
class BlockFisher:
    """``damping I + 1/m sum g g^T`` of one tensor's weights, in blocks along the diagonal.

    Attributes:
        gradients: ``[m, weights]``.
        block: consecutive weights that are taken together.
        damping: added to the diagonal.

    Raises:
        InputError: if the block is empty or the damping is not positive.
    """

    gradients: Tensor
    block: int = BLOCK
    damping: float = DAMPING

    def __post_init__(self) -> None:
        if self.block < 1 or not self.damping > 0.0:
            raise InputError(
                f"blocks hold 1 weight or more and the damping is above 0, not {self.block} and "
                f"{self.damping:g}"
            )

    def inverses(self) -> Iterator[tuple[slice, Tensor]]:
        """The inverse, some blocks at a time.

        Yields:
            Which blocks, and their inverses ``[blocks, block, block]`` in float64. The last block
            is filled up with weights that have no gradient.
        """
        m, n = self.gradients.shape
        size = min(self.block, n)
        blocks = -(-n // size)
        step = max(1, _PIECE // size**2)
        for begin in range(0, blocks, step):
            end = min(begin + step, blocks)
            rows = self.gradients[:, begin * size : end * size].double()
            rows = F.pad(rows, (0, (end - begin) * size - rows.shape[1]))
            rows = rows.view(m, end - begin, size).transpose(0, 1)
            fisher = rows.mT @ rows / m
            fisher.diagonal(dim1=1, dim2=2).add_(self.damping)
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(fisher))
            yield slice(begin, end), inverse

    def saliency(self, weight: Tensor) -> Tensor:
        """Optimal brain surgeon: ``w_q^2 / (2 [F^-1]_qq)``, as ``weight``."""
        flat = self._blocks(weight)
        result = torch.empty_like(flat)
        for part, inverse in self.inverses():
            result[part] = flat[part].square() / (2.0 * inverse.diagonal(dim1=1, dim2=2))
        return self._whole(result, weight)

    def compensated(self, weight: Tensor, kept: Tensor) -> Tensor:
        """The weights that stay, moved to make up for those that go, which are zero.

        Within each block this is the minimum of ``d^T F d`` over all changes ``d`` that set the
        removed weights to zero: all of them at once, not one after the other.

        Args:
            weight: any shape.
            kept: bool, of its shape.
        """
        flat = self._blocks(weight)
        stay = self._blocks(kept.to(weight.dtype)) > 0
        result = torch.empty_like(flat)
        for part, inverse in self.inverses():
            gone = ~stay[part]
            both = gone.unsqueeze(1) & gone.unsqueeze(2)
            eye = torch.eye(inverse.shape[1], dtype=torch.float64, device=inverse.device)
            force = torch.linalg.solve(
                torch.where(both, inverse, eye), torch.where(gone, flat[part], 0.0).unsqueeze(2)
            )
            result[part] = flat[part] - (inverse @ force).squeeze(2)
        result = torch.where(stay, result, 0.0)
        return self._whole(result, weight)

    def _blocks(self, values: Tensor) -> Tensor:
        n = self.gradients.shape[1]
        size = min(self.block, n)
        flat = values.detach().flatten().double()
        return F.pad(flat, (0, -n % size)).view(-1, size)

    def _whole(self, blocks: Tensor, like: Tensor) -> Tensor:
        return blocks.flatten()[: like.numel()].view_as(like).to(like.dtype)
