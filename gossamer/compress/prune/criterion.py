"""How much a unit matters: one score for each unit of each family, high = keep.

Every criterion is a function ``(module, dependency, ...) -> list of [units] tensors``, one for
each family. A unit's parameters lie in several tensors of different scale (filters, BatchNorm
scales, shifts); by default each tensor's share is divided by its mean over the units before the
shares are averaged (``normalise=True``), so neither the largest tensor nor the layer with the
largest weights decides everything. ``normalise=False`` gives the textbook sums.

Sources: filter norms, Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017; Taylor,
Molchanov et al., ICLR 2017 (activations, eq. 8) and CVPR 2019 (weights, eq. 8); BatchNorm scale,
Liu et al., "Network Slimming", ICCV 2017; FPGM, He et al., "Filter Pruning via Geometric Median",
CVPR 2019. Criteria that look at activations without labels (APoZ, HRank, ThiNet) are in
:mod:`gossamer.compress.prune.activation_criterion`, the LASSO is in
:mod:`gossamer.compress.prune.reconstruction`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from gossamer.compress.prune.activation_criterion import (
    greedy_reconstruction,
    map_rank,
    nonzero_share,
)
from gossamer.compress.prune.groups import Entry, Groups
from gossamer.compress.prune.layer_values import LayerValues
from gossamer.compress.prune.reconstruction import lasso
from gossamer.core.errors import InputError, UnsupportedError
from gossamer.core.graph import op_name
from gossamer.core.task import Task, device_of, to_device

if TYPE_CHECKING:
    from gossamer.core.dependency import Dependency

Scores = list[Tensor]


def magnitude(
    module: nn.Module,
    dependency: Dependency,
    *,
    p: int = 2,
    normalise: bool = True,
    accessories: bool = False,
    readers: bool = False,
) -> Scores:
    """L1 or L2 norms of the units' weights.

    Args:
        module: whose weights are scored.
        dependency: its removable families.
        p: 1 (sum of absolute values) or 2 (root of the sum of squares).
        normalise: average the tensors' shares, each divided by its mean; else one norm over all.
        accessories: count BatchNorm scales and shifts and the like too.
        readers: count the weights that read the units too (DepGraph's group importance, Fang et
            al., CVPR 2023).

    Raises:
        InputError: if ``p`` is neither 1 nor 2.
    """
    if p not in (1, 2):
        raise InputError(f"the norm must be 1 or 2, not {p}")
    roles = ["producer", *["accessory"] * accessories, *["consumer"] * readers]
    groups = Groups.of(module, dependency, roles=roles)
    power = torch.abs if p == 1 else torch.square
    shares = [_share(groups, entry, power(entry.tensor.detach())) for entry in groups.entries]
    if p == 2 and normalise:
        shares = [share.sqrt() for share in shares]
    if normalise:
        return groups.split(_average(groups, shares))
    total = torch.stack(shares).sum(0)
    return groups.split(total.sqrt() if p == 2 else total)


def random(module: nn.Module, dependency: Dependency, *, seed: int = 0) -> Scores:
    """Uniform random numbers: the control that every criterion has to beat."""
    generator = torch.Generator().manual_seed(seed)
    device = device_of(module)
    return [torch.rand(f.units, generator=generator).to(device) for f in dependency.families]


def batchnorm_scale(
    module: nn.Module, dependency: Dependency, *, normalise: bool = False
) -> Scores:
    """|gamma| of the BatchNorm that follows (the mean, where a unit passes several).

    Families that pass no BatchNorm with a scale get their normalised L2 norms times the mean
    |gamma| of the network, so that they neither vanish nor survive by default.

    Args:
        module: whose scales are read; train it with :func:`slimming_penalty` before.
        dependency: its removable families.
        normalise: divide each layer's scales by their mean (the paper does not).

    Raises:
        UnsupportedError: if no family passes a BatchNorm with a scale.
    """
    scales = set(LayerValues(dependency.graph, _NORMS).places)
    groups = Groups.of(module, dependency)
    entries = [entry for entry in groups.entries if entry.name in scales]
    if not entries:
        raise UnsupportedError(
            "the network has no BatchNorm scales on removable channels; use another criterion"
        )
    shares = [_share(groups, entry, entry.tensor.detach().abs()) for entry in entries]
    passes = [_share(groups, entry, torch.ones_like(entry.tensor)) for entry in entries]
    if normalise:
        scores = _average(groups, shares, entries)
    else:
        scores = torch.stack(shares).sum(0) / torch.stack(passes).sum(0).clamp(min=1)
    covered = torch.stack(passes).sum(0) > 0
    norms = torch.cat(magnitude(module, dependency))
    return groups.split(torch.where(covered, scores, norms * scores[covered].mean()))


def slimming_penalty(module: nn.Module, *, weight: float = 1e-4) -> Callable[[], Tensor]:
    """The sparsity penalty of network slimming, ``weight * sum |gamma|``, for a training rule.

    Args:
        module: whose BatchNorm scales are driven towards zero.
        weight: the paper uses 1e-4 for VGG and 1e-5 for ResNet and DenseNet.
    """
    parameters = dict(module.named_parameters())
    scales = [parameters[name] for name in _batchnorm_scales(module) if name in parameters]

    def penalty() -> Tensor:
        return weight * torch.stack([scale.abs().sum() for scale in scales]).sum()

    return penalty


def geometric_median(
    module: nn.Module, dependency: Dependency, *, normalise: bool = True
) -> Scores:
    """FPGM: the sum of distances to all other units' filters; the most replaceable score least.

    Args:
        module: whose filters are compared.
        dependency: its removable families.
        normalise: as in :func:`magnitude`; else distances of several tensors are added.
    """
    groups = Groups.of(module, dependency, roles=("producer",))
    shares = [_distances(groups, entry) for entry in groups.entries if entry.tensor.ndim > 1]
    entries = [entry for entry in groups.entries if entry.tensor.ndim > 1]
    if not entries:
        raise UnsupportedError("the network has no filters to compare")
    if normalise:
        return groups.split(_average(groups, shares, entries))
    return groups.split(torch.stack(shares).sum(0))


def taylor(
    module: nn.Module,
    dependency: Dependency,
    task: Task,
    *,
    batches: int = 8,
    batch_size: int = 64,
    split: str = "train",
    seed: int = 0,
    normalise: bool = True,
    accessories: bool = True,
) -> Scores:
    """First-order Taylor on weights: (sum over the unit of gradient times weight)^2.

    The square is averaged over batches; gradients are taken in evaluation mode (in training mode
    the sum over a filter before a BatchNorm is zero, since the loss ignores its scale).

    Args:
        module: whose units are scored; its gradients are left as they were.
        dependency: its removable families.
        task: gives the loss.
        batches: how many batches are averaged.
        batch_size: samples a batch.
        split: labelled samples to use.
        seed: chooses the batches.
        normalise: as in :func:`magnitude`.
        accessories: let BatchNorm scales and shifts add their share.
    """
    roles = ("producer", "accessory") if accessories else ("producer",)
    groups = Groups.of(module, dependency, roles=roles)
    sums = [torch.zeros(groups.total, device=groups.device) for _ in groups.entries]
    parameters = list({id(e.tensor): e.tensor for e in groups.entries}.values())
    count = 0
    for batch in _some(task, module, batches, batch_size, split, seed):
        with _evaluation(module), torch.enable_grad():
            loss = task.loss(module, batch)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        found = {id(p): g for p, g in zip(parameters, gradients, strict=True)}
        for total, entry in zip(sums, groups.entries, strict=True):
            gradient = found[id(entry.tensor)]
            if gradient is not None:
                total += _share(groups, entry, gradient * entry.tensor.detach()).square()
        count += 1
    shares = [total / max(1, count) for total in sums]
    if normalise:
        return groups.split(_average(groups, shares))
    return groups.split(torch.stack(shares).sum(0))


def taylor_activation(
    module: nn.Module,
    dependency: Dependency,
    task: Task,
    *,
    batches: int = 8,
    batch_size: int = 64,
    split: str = "train",
    seed: int = 0,
    normalise: bool = True,
) -> Scores:
    """First-order Taylor on activations: |mean over positions of activation times gradient|.

    The absolute value is taken per sample, then averaged; with ``normalise`` every layer is
    divided by its L2 norm, as published. The activations are those of the modules that own the
    producing weights (convolutions and linear layers), or of the BatchNorms behind them.

    Args:
        module: whose units are scored.
        dependency: its removable families.
        task: gives the loss.
        batches: how many batches are averaged.
        batch_size: samples a batch.
        split: labelled samples to use.
        seed: chooses the batches.
        normalise: divide each layer's scores by their L2 norm.

    Raises:
        UnsupportedError: if no producing module has activations that can be scored.
    """
    groups = Groups.of(module, dependency)
    values = LayerValues(dependency.graph, (*_SCORED, *_NORMS))
    kinds = {name: op_name(nodes[0].target) for name, nodes in values.places.items()}
    owners: dict[str, Entry] = {e.name: e for e in groups.entries if e.name in kinds}
    batchnormed = {
        int(f)
        for name, entry in owners.items()
        if kinds[name] in _NORMS
        for f in _families(groups, entry)
    }
    owners = {
        name: entry
        for name, entry in owners.items()
        if kinds[name] in _NORMS or not _families(groups, entry) <= batchnormed
    }
    if not owners:
        raise UnsupportedError("no convolution, linear layer or BatchNorm makes removable units")
    outputs: dict[str, Tensor] = {}

    def keep(name: str, node: fx.Node, _: Any, output: Tensor) -> None:
        if name in owners:
            outputs[name] = output

    run = values.watching(keep)
    sums = {name: torch.zeros(groups.total, device=groups.device) for name in owners}
    count = 0
    for batch in _some(task, module, batches, batch_size, split, seed):
        with torch.enable_grad():
            loss = task.loss(run, batch)
            gradients = torch.autograd.grad(loss, list(outputs.values()), allow_unused=True)
        for (name, output), gradient in zip(outputs.items(), gradients, strict=True):
            if gradient is None:
                continue
            product = output.detach() * gradient * len(output)
            product = product.movedim(-1 if kinds[name] == "linear" else 1, 1)
            each = product.flatten(2).mean(2) if product.ndim > 2 else product
            padded = torch.zeros(groups.total + 1, device=groups.device)
            padded.index_add_(0, owners[name].owner, each.abs().sum(0).to(padded.dtype))
            sums[name] += padded[:-1]
        count += len(next(iter(outputs.values())))
        outputs.clear()
    shares = []
    for total in sums.values():
        share = total / max(1, count)
        shares.append(share / share.norm().clamp(min=1e-30) if normalise else share)
    covered = torch.stack(
        [_share(groups, e, torch.ones_like(e.tensor)) > 0 for e in owners.values()]
    )
    return groups.split(torch.stack(shares).sum(0) / covered.sum(0).clamp(min=1))


Criterion = Callable[[nn.Module, "Dependency", Task, int], Scores]


def _l1(module: nn.Module, dependency: Dependency, task: Task, seed: int) -> Scores:
    return magnitude(module, dependency, p=1)


def _l2(module: nn.Module, dependency: Dependency, task: Task, seed: int) -> Scores:
    return magnitude(module, dependency, p=2)


def _group(module: nn.Module, dependency: Dependency, task: Task, seed: int) -> Scores:
    return magnitude(module, dependency, p=2, accessories=True, readers=True)


def _random(module: nn.Module, dependency: Dependency, task: Task, seed: int) -> Scores:
    return random(module, dependency, seed=seed)


def _scale(module: nn.Module, dependency: Dependency, task: Task, seed: int) -> Scores:
    return batchnorm_scale(module, dependency)


def _fpgm(module: nn.Module, dependency: Dependency, task: Task, seed: int) -> Scores:
    return geometric_median(module, dependency)


def _taylor(module: nn.Module, dependency: Dependency, task: Task, seed: int) -> Scores:
    return taylor(module, dependency, task, seed=seed)


def _taylor_activation(module: nn.Module, dependency: Dependency, task: Task, seed: int) -> Scores:
    return taylor_activation(module, dependency, task, seed=seed)


def _apoz(module: nn.Module, dependency: Dependency, task: Task, seed: int) -> Scores:
    return nonzero_share(module, dependency, task, seed=seed)


def _hrank(module: nn.Module, dependency: Dependency, task: Task, seed: int) -> Scores:
    return map_rank(module, dependency, task, seed=seed)


def _thinet(module: nn.Module, dependency: Dependency, task: Task, seed: int) -> Scores:
    return greedy_reconstruction(module, dependency, task, seed=seed)


def _lasso(module: nn.Module, dependency: Dependency, task: Task, seed: int) -> Scores:
    return lasso(module, dependency, task, seed=seed)


CRITERIA: dict[str, Criterion] = {
    "l1": _l1,
    "l2": _l2,
    "group": _group,
    "random": _random,
    "batchnorm-scale": _scale,
    "fpgm": _fpgm,
    "taylor": _taylor,
    "taylor-activation": _taylor_activation,
    "apoz": _apoz,
    "hrank": _hrank,
    "thinet": _thinet,
    "lasso": _lasso,
}
"""Criteria by the names that recipes use: ``(module, dependency, task, seed) -> scores``."""

_NORMS = ("batch_norm",)
_SCORED = ("conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear")


def _batchnorm_scales(module: nn.Module) -> list[str]:
    return [
        f"{name}.weight" if name else "weight"
        for name, part in module.named_modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.affine
    ]


def _families(groups: Groups, entry: Entry) -> set[int]:
    units = entry.owner[entry.owner < groups.total]
    return set(groups.family[units].unique().tolist())


def _share(groups: Groups, entry: Entry, values: Tensor) -> Tensor:
    """One tensor's sums over each unit, ``[total]``."""
    result = torch.zeros(groups.total + 1, device=groups.device)
    result.index_add_(0, entry.owner, entry.reduce(values).to(result.dtype))
    return result[:-1]


def _average(groups: Groups, shares: list[Tensor], entries: list[Entry] | None = None) -> Tensor:
    """Each tensor's shares divided by their mean in the family, averaged over the tensors.

    A tensor that is zero throughout (fresh biases, say) has no opinion and is left out.
    """
    total = torch.zeros(groups.total, device=groups.device)
    number = torch.zeros(groups.total, device=groups.device)
    families = len(groups.sizes)
    for entry, share in zip(entries or groups.entries, shares, strict=True):
        touched = _share(groups, entry, torch.ones_like(entry.tensor)) > 0
        sums = torch.zeros(families, device=groups.device).index_add_(0, groups.family, share)
        counts = torch.zeros(families, device=groups.device)
        counts.index_add_(0, groups.family, touched.float())
        mean = (sums / counts.clamp(min=1))[groups.family]
        counted = touched & (mean > 0)
        total += torch.where(counted, share / mean.clamp(min=1e-30), 0.0)
        number += counted
    # What no tensor has an opinion on is as good as the average.
    return torch.where(number > 0, total / number.clamp(min=1), 1.0)


def _distances(groups: Groups, entry: Entry) -> Tensor:
    """Sum of distances of each unit's filter to those of all units of the family, ``[total]``."""
    rows = entry.tensor.detach().movedim(entry.axis, 0).flatten(1)
    owner = entry.owner
    order = torch.argsort(owner, stable=True)
    order = order[owner[order] < groups.total]
    of = owner[order]
    units, start = torch.unique_consecutive(of, return_counts=True)
    first = start.cumsum(0) - start
    rank = torch.arange(len(order), device=groups.device) - torch.repeat_interleave(first, start)
    # Units may own several rows (a head, a grouped convolution): the rows are concatenated.
    filters = torch.zeros(len(units), int(start.max()), rows.shape[1], device=groups.device)
    filters[torch.repeat_interleave(torch.arange(len(units)).to(of.device), start), rank] = rows[
        order
    ].to(filters.dtype)
    result = torch.zeros(groups.total, device=groups.device)
    family = groups.family[units]
    for index in family.unique().tolist():
        here = family == index
        flat = filters[here].flatten(1)
        exact = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
        result[units[here]] = exact.sum(1)
    return result


def _some(
    task: Task, module: nn.Module, batches: int, batch_size: int, split: str, seed: int
) -> Iterator[Any]:
    device = device_of(module)
    stream = task.batches(split, batch_size=batch_size, seed=seed, shuffle=True)
    for _, batch in zip(range(batches), stream, strict=False):
        yield to_device(batch, device)


@contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
