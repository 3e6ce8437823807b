"""How much each single weight matters: one score a weight, high = keep.

A criterion is a function ``(module, names, task, seed) -> scores``: for each named parameter a
tensor of its shape. Weights that were removed are zero in ``module``; their scores are never asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from gossamer.compress.prune.empirical_fisher import (
    BlockFisher,
    fisher_gradients,
    sample_gradients,
)
from gossamer.compress.prune.first_weights import grasp, snip, synflow
from gossamer.compress.prune.wiring import Wiring, column_norms, row_norms
from gossamer.core.errors import InputError
from gossamer.core.task import Task, device_of, evaluating, to_device

Scores = dict[str, Tensor]
Criterion = Callable[[nn.Module, Sequence[str], Task, int], Scores]


def magnitude(module: nn.Module, names: Sequence[str], task: Task, seed: int) -> Scores:
    """The absolute value |w|."""
    return {name: module.get_parameter(name).detach().abs() for name in names}


def random(module: nn.Module, names: Sequence[str], task: Task, seed: int) -> Scores:
    """Uniform random numbers: the control that every criterion has to beat."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(module.get_parameter(name).shape, generator=generator) for name in names
    }


def gradient(module: nn.Module, names: Sequence[str], task: Task, seed: int) -> Scores:
    """|w g|: how far the loss moves, to first order, when the weight goes (g over 1024 samples)."""
    slopes = mean_gradients(module, names, task, seed)
    return {name: (module.get_parameter(name).detach() * g).abs() for name, g in slopes.items()}


def mean_gradients(
    module: nn.Module,
    names: Sequence[str],
    task: Task,
    seed: int,
    *,
    samples: int = 1024,
    batch_size: int = 128,
) -> Scores:
    """The gradient of the task's loss, in evaluation mode, averaged over training samples.

    Args:
        module: unchanged.
        names: of its parameters.
        task: gives data and loss.
        seed: of the choice of samples.
        samples: at most so many, in batches.
        batch_size: samples a batch.
    """
    parameters = [module.get_parameter(name) for name in names]
    total = [torch.zeros_like(p) for p in parameters]
    device = device_of(module)
    seen = 0
    # Batch norm in evaluation mode: the loss that is meant is the deployed network's. Inference
    # mode would leave no graph to differentiate, so only the modes are borrowed.
    with evaluating(module), torch.inference_mode(False), torch.enable_grad():
        for batch in task.batches("train", batch_size=batch_size, seed=seed):
            loss = task.loss(module, to_device(batch, device))
            for sum_, g in zip(total, torch.autograd.grad(loss, parameters), strict=True):
                sum_ += g
            seen += 1
            if seen * batch_size >= samples:
                break
    return {name: sum_ / seen for name, sum_ in zip(names, total, strict=True)}


def lookahead(module: nn.Module, names: Sequence[str], task: Task, seed: int) -> Scores:
    """LAP: |w| times the norms of the weights that lead to its input and that read its output.

    Where the trace does not tell the layer before or after, its norm counts as 1 (the first and
    last layer have none). Park et al., "Lookahead: A Far-Sighted Alternative of Magnitude-based
    Pruning", ICLR 2020, eq. 4; batch normalisation between the layers is not folded in.
    """
    wiring = Wiring.of(module, task.example_inputs)
    scores: Scores = {}
    for name in names:
        weight = module.get_parameter(name).detach()
        score = weight.abs()
        outputs, columns = weight.shape[0], weight.shape[1]
        if makers := wiring.before.get(name):
            squares = [row_norms(module.get_parameter(m)).square() for m in makers]
            norm = torch.stack(squares).sum(0).sqrt()
            # After flattening each channel has several columns.
            norm = norm.repeat_interleave(columns // len(norm))
            score = score * norm.view(1, -1, *[1] * (weight.ndim - 2))
        if readers := wiring.after.get(name):
            squares = [
                column_norms(module.get_parameter(w.weight), w.positions).square() for w in readers
            ]
            norm = torch.stack(squares).sum(0).sqrt()
            score = score * norm.view(outputs, *[1] * (weight.ndim - 1))
        scores[name] = score
    return scores


def fisher(module: nn.Module, names: Sequence[str], task: Task, seed: int) -> Scores:
    """Optimal brain damage with the empirical Fisher diagonal: half of mean(g^2) w^2.

    The squares are of single samples' gradients (256 of them), not of a batch's mean.
    """
    total = {name: torch.zeros_like(module.get_parameter(name)) for name in names}
    seen = 0
    for found in sample_gradients(module, names, task, seed):
        for name, slopes in found.items():
            total[name] += slopes.square().sum(0)
        seen += len(next(iter(found.values())))
    return {n: 0.5 * total[n] / seen * module.get_parameter(n).detach().square() for n in names}


def woodfisher(module: nn.Module, names: Sequence[str], task: Task, seed: int) -> Scores:
    """Optimal brain surgeon with the empirical Fisher: w^2 / (2 [F^-1]_qq), in blocks of 100.

    The choice alone; the step of the same name (:mod:`gossamer.compress.prune.woodfisher`) also
    moves the weights that stay.
    """
    return {
        name: BlockFisher(gradients).saliency(module.get_parameter(name).detach())
        for name, gradients in fisher_gradients(module, names, task, seed).items()
    }


CRITERIA: dict[str, Criterion] = {
    "magnitude": magnitude,
    "gradient": gradient,
    "lookahead": lookahead,
    "fisher": fisher,
    "woodfisher": woodfisher,
    "snip": snip,
    "grasp": grasp,
    "synflow": synflow,
    "random": random,
}
"""Criteria by the names that recipes use."""


def keep_overall(scores: Mapping[str, Tensor], alive: Mapping[str, Tensor], keep: int) -> Scores:
    """Masks with the ``keep`` highest scores of all tensors together.

    Args:
        scores: by name.
        alive: bool masks of what may stay.
        keep: how many weights stay, exactly; of equal scores the first go.

    Raises:
        InputError: if fewer are alive.
    """
    flat = torch.cat([scores[name].flatten().double().cpu() for name in alive])
    there = torch.cat([mask.flatten().cpu() for mask in alive.values()])
    kept = _largest(flat, there, keep)
    pieces = kept.split([mask.numel() for mask in alive.values()])
    return {
        name: piece.view_as(mask).to(mask.device)
        for (name, mask), piece in zip(alive.items(), pieces, strict=True)
    }


def keep_in_each(
    scores: Mapping[str, Tensor], alive: Mapping[str, Tensor], keep: Mapping[str, int]
) -> Scores:
    """Masks with the ``keep[name]`` highest scores of each tensor.

    Raises:
        InputError: if fewer are alive in one of them.
    """
    return {
        name: _largest(scores[name].flatten().double().cpu(), mask.flatten().cpu(), keep[name])
        .view_as(mask)
        .to(mask.device)
        for name, mask in alive.items()
    }


def _largest(scores: Tensor, alive: Tensor, keep: int) -> Tensor:
    there = int(alive.sum())
    if not 0 <= keep <= there:
        raise InputError(f"{keep} weights cannot stay where {there} are left")
    return largest(torch.where(alive, scores, -torch.inf), keep)


def largest(scores: Tensor, keep: int) -> Tensor:
    """Bool mask of the ``keep`` largest of a vector ``[n]``; of equal ones the first go.

    Takes time in proportion to n: no sorting.
    """
    if keep <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(len(scores) - keep + 1).values
    result = scores > threshold
    level = (scores == threshold).nonzero().flatten()
    result[level[len(level) - (keep - int(result.sum())) :]] = True
    return result
