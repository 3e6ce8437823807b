"""Codebooks: weights as indices into small tables, tables and indices learned together.

A weight costs ``log2 K`` bits for its index into a table of ``K`` values. One table for a whole
tensor is coarse, and a choice among tables for each weight would cost index bits. JLCM permutes
neurons so that those with similar weights are neighbours: each run of them has a scale or a table
of its own at no cost in indices. Tables, scales and indices are then learned layer by layer from a
few hundred samples, by how well the layer's output is reconstructed. Where the straight-through
gradient of the indices grows with the distance of an entry, the *proximal* one falls with it, so
that weights move to neighbouring entries.

Source: Yvinec, Dapogny and Bailly, "Network memory footprint compression through jointly learnable
codebooks and mappings", ICLR 2024, arXiv:2309.17361. No code is published, and the text leaves out
how neurons are described and clustered, the form of the proximal gradient, schedules and learning
rates: those are ours, named options here.

What it is compared with is in :mod:`gossamer.compress.quantize.weight_sharing`.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn

from gossamer.core.dependency import analyse
from gossamer.core.errors import InputError, UnsupportedError
from gossamer.core.files import load_state, save_state
from gossamer.core.fit import cosine
from gossamer.core.graph import Graph, GraphNetwork, level_of
from gossamer.core.network import Network
from gossamer.core.progress import progress
from gossamer.core.surgery import permute
from gossamer.core.task import Task, seed_of
from gossamer.parts.codebook import ENTRIES, CodebookTensor
from gossamer.parts.masks import SPARSE, multiplied_weights
from gossamer.parts.packed import PackedNetwork

log = logging.getLogger(__name__)

Gradient = Literal["proximal", "softmax"]
Falloff = Literal["inverse", "bell"]
Grouping = Literal["scales", "tables"]

# What it takes


def codebook_bits(
    weights: int,
    entries: int,
    *,
    tables: int = 1,
    groups: int = 1,
    scales: bool = False,
    each_weight_chooses: bool = False,
    entry_bits: int = 16,
) -> float:
    """Bits of a tensor stored by codebooks (arXiv:2309.17361, section 3).

    Args:
        weights: in the tensor.
        entries: K, values in a table.
        tables: how many there are; each group of rows says which is its own.
        groups: of consecutive rows.
        scales: whether each group has a scale.
        each_weight_chooses: each weight says which table is its own, in place of each group.
        entry_bits: of an entry or a scale.
    """
    check_entries(entries)
    total = weights * math.log2(entries) + entry_bits * entries * tables
    if scales:
        total += entry_bits * groups
    return total + (weights if each_weight_chooses else groups) * math.log2(tables)


def check_entries(entries: int) -> None:
    """Refuses tables that an index of a byte cannot name."""
    if not 2 <= entries <= ENTRIES:
        raise InputError(f"a codebook has 2 to {ENTRIES} entries, not {entries}")


# One-dimensional k-means


def kmeans_values(values: Tensor, entries: int) -> Tensor:
    """The table that represents ``values`` best (least squares), sorted ``[entries]``.

    Values are first gathered in a few hundred bins, for which the best clusters are found exactly
    by dynamic programming (they are runs of neighbouring bins); Lloyd's iterations on all values
    follow. So up to 512 distinct values the result is the optimum. With no more distinct values
    than entries those are returned (the last one repeated).

    Args:
        values: any shape, not empty.
        entries: K.
    """
    x, counts = values.detach().flatten().double().cpu().unique(return_counts=True)
    if len(x) <= entries:
        return torch.cat([x, x[-1:].expand(entries - len(x))]).float()
    count = torch.cat([torch.zeros(1).double(), counts.double().cumsum(0)])
    total = torch.cat([torch.zeros(1).double(), (x * counts).cumsum(0)])
    edges = _bins(x, count, max(512, 4 * entries))
    runs = edges[_best_runs(count[edges].diff(), total[edges].diff(), entries)]
    centers = total[runs].diff() / count[runs].diff()
    for _ in range(300):
        inner = torch.searchsorted(x, (centers[1:] + centers[:-1]) / 2)
        runs = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), len(x))])
        there = count[runs].diff()
        new = torch.where(there > 0, total[runs].diff() / there.clamp(min=1), centers)
        if torch.equal(new, centers):
            break
        centers = new
    return centers.float()


def _bins(x: Tensor, count: Tensor, bins: int) -> Tensor:
    """Where bins of sorted distinct values begin and end: at quantiles, and evenly in between."""
    if len(x) <= bins:
        return torch.arange(len(x) + 1)
    half = torch.linspace(0.0, 1.0, bins // 2 + 1, dtype=torch.float64)
    by_count = torch.searchsorted(count, half * count[-1])
    by_value = torch.searchsorted(x, x[0] + half * (x[-1] - x[0]))
    ends = torch.tensor([0, len(x)])
    return torch.cat([by_count, by_value, ends]).clamp(max=len(x)).unique()


def _best_runs(count: Tensor, total: Tensor, clusters: int) -> Tensor:
    """Ends of the runs of bins whose means represent them best, ``[clusters + 1]``."""
    size = len(count)
    counts = torch.cat([torch.zeros(1).double(), count.cumsum(0)])
    totals = torch.cat([torch.zeros(1).double(), total.cumsum(0)])
    # What a run explains is its sum, squared, over its count: to be made largest.
    gains = (totals - totals[:, None]).square() / (counts - counts[:, None]).clamp(min=1e-300)
    gains.masked_fill_(torch.ones(size + 1, size + 1).tril().bool(), -math.inf)
    best, before = gains[0], []
    for _ in range(clusters - 1):
        best, place = (best[:, None] + gains).max(0)
        before.append(place)
    ends = [size]
    for place in reversed(before):
        ends.append(int(place[ends[-1]]))
    return torch.tensor([0, *reversed(ends)])


def nearest_entries(values: Tensor, tables: Tensor) -> Tensor:
    """Index of the nearest entry, uint8 ``[rows, columns]``.

    Args:
        values: ``[rows, columns]``.
        tables: of each row, ``[rows, entries]`` or ``[1, entries]``, in any order.
    """
    best = torch.full(values.shape, math.inf, device=values.device)
    index = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for entry in range(tables.shape[1]):
        distance = (values - tables[:, entry : entry + 1]).abs()
        closer = distance < best
        best = torch.where(closer, distance, best)
        index.masked_fill_(closer, entry)
    return index


# Neurons side by side


def describe_neurons(rows: Tensor) -> Tensor:
    """What the distribution of each neuron's weights looks like, ``[neurons, 11]``.

    Standard deviation, largest magnitude and nine quantiles (10 % to 90 %), in units of the
    tensor's standard deviation. (The paper does not say what it uses.)

    Args:
        rows: the weights of each neuron, ``[neurons, weights]``.
    """
    scaled = rows.detach().float().cpu()
    scaled = scaled / scaled.std(unbiased=False).clamp(min=1e-12)
    quantiles = torch.quantile(scaled, torch.linspace(0.1, 0.9, 9), dim=1).T
    spread = scaled.std(1, unbiased=False, keepdim=True)
    return torch.cat([spread, scaled.abs().amax(1, keepdim=True), quantiles], 1)


def group_neurons(descriptors: Tensor, groups: int, *, seed: int = 0) -> Tensor:
    """Group of each neuron, int64 ``[neurons]``; groups are numbered by rising spread.

    k-means with ten restarts; for two groups, or few neurons, equal parts of the neurons sorted by
    spread (the first column).

    Args:
        descriptors: ``[neurons, features]``, the first is the spread.
        groups: at most this many.
        seed: of the restarts.
    """
    count = len(descriptors)
    groups = min(groups, count)
    spread = descriptors[:, 0]
    if groups <= 2 or count < 2 * groups:
        rank = spread.argsort().argsort()
        return rank * groups // count
    from sklearn.cluster import KMeans

    model = KMeans(groups, n_init=10, random_state=seed % (1 << 32))  # type: ignore[arg-type]
    found = model.fit_predict(descriptors.numpy())
    found = torch.from_numpy(found).long()
    means = torch.stack([spread[found == g].mean() for g in found.unique()])
    order = torch.empty(len(means), dtype=torch.long)
    order[means.argsort()] = torch.arange(len(means))
    return order[found.unique(return_inverse=True)[1]]


@dataclass(frozen=True)
class Reordered:
    """A network whose similar neurons are neighbours.

    Attributes:
        module: computes the same function as the original.
        sizes: rows of each group of a weight, in order, by name; absent where rows keep an order
            of their own (the network's output, say).
        orders: of each family of units that was reordered, as :func:`gossamer.core.surgery.permute`
            takes them.
    """

    module: nn.Module
    sizes: Mapping[str, tuple[int, ...]]
    orders: Mapping[int, Tensor]


def reorder(
    module: nn.Module,
    example_inputs: Sequence[Any],
    *,
    groups: int = 8,
    names: Collection[str] | None = None,
    seed: int = 0,
) -> Reordered:
    """Permutes neurons so that those with similar weights are neighbours.

    The permutation costs nothing: biases, normalisations and all readers follow. Layers that share
    their units (around a residual connection, say) share one order, made from all their weights;
    inputs and outputs of the network keep theirs.

    Args:
        module: unchanged.
        example_inputs: for tracing it.
        groups: at most, in each layer.
        names: the weights that count. Default: all that inputs are multiplied with.
        seed: of the clustering.

    Raises:
        UnsupportedError: if the network cannot be traced.
    """
    dependency = analyse(module, example_inputs)
    wanted = set(multiplied_weights(module, example_inputs) if names is None else names)
    orders: dict[int, Tensor] = {}
    owners: dict[str, list[Tensor]] = {}
    for family in dependency.families:
        rows = []
        for member in family.members:
            if member.name not in wanted or member.role != "producer":
                continue
            counts = torch.bincount(member.owner[member.owner >= 0], minlength=family.units)
            tensor = dependency.graph.tensors[member.name].detach()
            if int(counts.min()) != int(counts.max()) or bool((member.owner < 0).any()):
                continue
            by_unit = tensor.movedim(member.axis, 0).flatten(1)[member.owner.argsort(stable=True)]
            rows.append(describe_neurons(by_unit.reshape(family.units, -1)))
        if not rows or family.units < 2:
            continue
        # The spread of all of a unit's weights comes first: groups are sorted by it.
        mean = torch.stack([r[:, 0] for r in rows]).mean(0)[:, None]
        label = group_neurons(torch.cat([mean, *rows], 1), groups, seed=seed)
        order = label.argsort(stable=True)
        orders[family.index] = order
        for member in family.members:
            if member.name in wanted and member.axis == 0 and member.role == "producer":
                owners.setdefault(member.name, []).append(label[order][member.owner])
    made = permute(module, dependency, orders)
    sizes = {}
    for name, found in owners.items():
        for label in found:
            if bool((label.diff() >= 0).all()):  # neighbours: one family decides the rows
                sizes[name] = tuple(label.unique_consecutive(return_counts=True)[1].tolist())
                break
    return Reordered(made, sizes, orders)


def even_sizes(rows: int, groups: int) -> tuple[int, ...]:
    """Rows of each of ``groups`` groups of nearly equal size."""
    groups = min(groups, rows)
    return tuple(rows * (g + 1) // groups - rows * g // groups for g in range(groups))


# A codebook before it is learned


def cluster_weights(
    weight: Tensor,
    entries: int,
    *,
    sizes: Sequence[int] | None = None,
    grouping: Grouping = "scales",
    scale: Literal["max", "std"] = "max",
    zeros: bool = False,
) -> CodebookTensor:
    """Represents a weight by k-means tables and the nearest entries.

    Args:
        weight: rows first.
        entries: K.
        sizes: rows of each group. Default: one group.
        grouping: one table, and a scale for each group; or a table for each group.
        scale: what "scales" divides a group by, its largest magnitude or standard deviation.
        zeros: keep weights that are exactly 0 so (with an entry that is 0).
    """
    check_entries(entries)
    rows = weight.detach().float().cpu().flatten(1)
    sizes = (len(rows),) if sizes is None else tuple(sizes)
    parts = rows.split(list(sizes))

    def table(values: Tensor) -> Tensor:
        if not zeros:
            return kmeans_values(values, entries)
        there = values[values != 0]
        found = kmeans_values(there, entries - 1) if len(there) else torch.zeros(entries - 1)
        return torch.cat([torch.zeros(1), found])

    if grouping == "tables":
        tables = torch.stack([table(part.flatten()) for part in parts]).half()
        scales = None
        at = tables.float().repeat_interleave(torch.tensor(sizes), 0)
    else:
        measure = {"max": lambda p: p.abs().max(), "std": lambda p: p.std(unbiased=False)}[scale]
        scales = torch.stack([measure(part) for part in parts]).clamp(min=1e-7).half()
        each = scales.float().repeat_interleave(torch.tensor(sizes))[:, None]
        tables = table((rows / each).flatten())[None].half()
        at = tables.float() * each
    indices = nearest_entries(rows, at)
    if zeros:
        indices.masked_fill_(rows == 0, 0)
    return CodebookTensor.of(indices, tables, scales, sizes, tuple(weight.shape))


# Learning tables and indices


@dataclass(frozen=True)
class Learning:
    """How a layer's codebook is learned. (All of it is ours; the paper leaves it out.)

    Attributes:
        gradient: of the indices: "proximal" (the paper's idea), "softmax" (straight through the
            relaxation), or None: indices stay, tables and scales are learned.
        falloff: how the proximal gradient falls with the distance d of an entry, D being the mean
            distance of neighbours: "inverse" D^2 / d, or "bell" D / (1 + (d / D)^2).
        steps: of Adam.
        warm_up: first steps, in which indices stay.
        batch_size: samples a step.
        lr: of tables and scales at first; falls to 0 along half a cosine.
        index_lr: of the logits of the indices, likewise.
        temperature: how strongly the logits prefer near entries at first (tau).
        held_out: share of the samples by which the best step is chosen.
        candidates: entries that a weight may move to, its nearest ones; None for all (for up to
            2^24 logits, otherwise 3).

    Raises:
        InputError: if a value cannot be used.
    """

    gradient: Gradient | None = "proximal"
    falloff: Falloff = "bell"
    steps: int = 2000
    warm_up: int = 100
    batch_size: int = 32
    lr: float = 1e-3
    index_lr: float = 1e-2
    temperature: float = 2.0
    held_out: float = 0.2
    candidates: int | None = None

    def __post_init__(self) -> None:
        if self.gradient not in (None, "proximal", "softmax"):
            raise InputError(f"gradient is proximal, softmax or null, not {self.gradient!r:.40}")
        if self.falloff not in ("inverse", "bell"):
            raise InputError(f"falloff is inverse or bell, not {self.falloff!r:.40}")
        if self.steps < 0 or self.warm_up < 0 or self.batch_size < 1:
            raise InputError("steps and warm_up are 0 or more and batches hold a sample or more")
        if not (self.lr > 0 and self.index_lr > 0 and self.temperature > 0):
            raise InputError("learning rates and temperature are above 0")
        if not 0 < self.held_out < 1 or (self.candidates is not None and self.candidates < 2):
            raise InputError("held_out lies between 0 and 1, and there are 2 candidates or more")


def index_gradient(
    logits: Tensor,
    values: Tensor,
    chosen: Tensor,
    gradient: Gradient,
    *,
    spacing: Tensor | float = 1.0,
    falloff: Falloff = "bell",
) -> Tensor:
    """How weights change with the logits of their entries, ``[candidates, weights]``.

    Args:
        logits: ``[candidates, weights]``.
        values: of the candidates, ``[candidates, weights]`` or ``[candidates, 1]``.
        chosen: value of the entry that each weight has now, ``[weights]``.
        gradient: "softmax": p_k (C_k - sum_l p_l C_l), which grows with the distance; "proximal":
            the sign of C_k - C_chosen times a falling function of the distance, 0 for the chosen.
        spacing: D, mean distance of neighbouring entries, one number or ``[weights]``.
        falloff: that function.

    Source: arXiv:2309.17361, section 3.3.
    """
    if gradient == "softmax":
        # torch's softmax along the first axis is several times slower.
        shares = (logits - _best(logits)[1]).exp()
        shares /= shares.sum(0)
        return shares * (values - (shares * values).sum(0))
    difference = values - chosen
    distance = difference.abs()
    if falloff == "inverse":
        size = spacing**2 / distance.clamp(min=1e-6)
    else:
        size = spacing / (1.0 + (distance / spacing) ** 2)
    return difference.sign() * size


def _best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The first largest of each column and its value (argmax, but vectorised along columns)."""
    index, value = torch.zeros_like(logits[0], dtype=torch.uint8), logits[0]
    for place in range(1, len(logits)):
        index.masked_fill_(logits[place] > value, place)
        value = torch.maximum(value, logits[place])
    return index.long(), value


@dataclass(frozen=True)
class _Layout:
    """Which table, group and candidates each weight has.

    Attributes:
        table: int64 ``[weights]``.
        group: int64 ``[weights]``.
        tables: how many tables there are.
        entries: of each.
        candidates: entry of each candidate, int64 ``[candidates, weights]``; None for all in order.
    """

    table: Tensor
    group: Tensor
    tables: int
    entries: int
    candidates: Tensor | None = None

    def best_entry(self, logits: Tensor) -> Tensor:
        """The entry with the largest logit, ``[weights]``."""
        best, _ = _best(logits)
        return best if self.candidates is None else self.candidates.gather(0, best[None])[0]

    def place(self, index: Tensor) -> Tensor:
        """Where an entry of each weight stands in the flat tables."""
        return index if self.tables == 1 else self.table * self.entries + index

    def lookup(self, tables: Tensor, index: Tensor) -> Tensor:
        """The value of an entry of each weight."""
        return tables.flatten().index_select(0, self.place(index))

    def values(self, tables: Tensor) -> Tensor:
        """Values of the candidates, ``[candidates, weights]`` (or 1 where all have the same)."""
        if self.candidates is None:
            return tables.T if self.tables == 1 else tables.T.index_select(1, self.table)
        return torch.stack([self.lookup(tables, c) for c in self.candidates])

    def spacing(self, tables: Tensor) -> Tensor:
        """Mean distance of neighbouring entries, ``[weights]`` (or one number)."""
        spacing = entry_spacing(tables)
        return spacing if self.tables == 1 else spacing.index_select(0, self.table)


class _Decode(torch.autograd.Function):
    """Weights by their best entries; gradients of entries and scales are exact."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        tables: Tensor,
        scales: Tensor,
        index: Tensor,
        layout: _Layout,
        learning: Learning,
    ) -> Tensor:
        values, scale = layout.lookup(tables, index), scales.index_select(0, layout.group)
        ctx.save_for_backward(logits, tables, scales, index, values, scale)
        ctx.layout, ctx.learning = layout, learning
        return scale * values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        logits, tables, scales, index, values, scale = ctx.saved_tensors
        layout, learning = ctx.layout, ctx.learning
        scaled = g * scale
        flat = torch.zeros(tables.numel(), dtype=g.dtype, device=g.device)
        flat.index_add_(0, layout.place(index), scaled)
        of_scales = torch.zeros_like(scales).index_add_(0, layout.group, g * values)
        ways = index_gradient(
            logits,
            layout.values(tables),
            values,
            learning.gradient,
            spacing=layout.spacing(tables),
            falloff=learning.falloff,
        )
        return ways.mul_(scaled), flat.view_as(tables), of_scales, None, None, None


def entry_spacing(tables: Tensor) -> Tensor:
    """Mean distance of neighbouring entries of each table ``[tables, entries]``, ``[tables]``."""
    width = tables.amax(1) - tables.amin(1)
    return (width / (tables.shape[1] - 1)).clamp(min=1e-12)


Multiply = Callable[[Tensor, Tensor], Tensor]
"""``(inputs, weight) -> output`` of a layer, without its bias."""


class Layer:
    """A linear layer or convolution of a traced network, without its bias.

    Args:
        node: the operator.
    """

    def __init__(self, node: fx.Node) -> None:
        self.node = node.name
        self.weight = str(node.args[1].target)  # type: ignore[union-attr]
        self._target: Any = node.target
        self._rest = tuple(node.args[3:])
        self._named = {k: v for k, v in node.kwargs.items() if k not in ("weight", "bias")}

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._target(x, weight, None, *self._rest, **self._named)


def plain_layer(x: Tensor, weight: Tensor) -> Tensor:
    """A linear layer, for weights that belong to no network."""
    return torch.nn.functional.linear(x, weight)


@dataclass
class Learned:
    """What learning a layer did.

    Attributes:
        stored: the codebook.
        error_before: mean squared error of the layer's output over the mean square of the target,
            on all samples, with the codebook it began with.
        error: the same at the end.
        moves: index changes during learning.
        jumps: those that passed over an entry.
    """

    stored: CodebookTensor
    error_before: float
    error: float
    moves: int = 0
    jumps: int = 0


def learn_codebook(
    weight: Tensor,
    start: CodebookTensor,
    inputs: Tensor,
    target: Tensor,
    *,
    layer: Multiply = plain_layer,
    learning: Learning = Learning(),
    zeros: bool = False,
    seed: int = 0,
) -> Learned:
    """Learns tables, scales and indices by how well a layer's output is reconstructed.

    The best step by the held-out samples is kept; at the end entries are refitted in closed form
    (:func:`refit`), and entries that nobody uses are dropped.

    Args:
        weight: in float; where the indices' logits begin.
        start: its codebook, where learning begins.
        inputs: of the layer, ``[samples, ...]``.
        target: the output without bias that is to be reconstructed, ``[samples, ...]``.
        layer: ``(inputs, weight) -> output``.
        learning: how.
        zeros: weights that are exactly 0 stay at entry 0, which stays 0.
        seed: of the batches.

    Raises:
        InputError: if inputs and target do not fit together.
    """
    return _LayerRun(weight, start, inputs, target, layer, learning, zeros, seed).run()


class _LayerRun:
    """The state of :func:`learn_codebook`."""

    def __init__(
        self,
        weight: Tensor,
        start: CodebookTensor,
        inputs: Tensor,
        target: Tensor,
        layer: Multiply,
        learning: Learning,
        zeros: bool,
        seed: int,
    ) -> None:
        if len(inputs) != len(target) or len(inputs) < 2:
            raise InputError(
                f"learning a codebook needs at least two samples with their outputs, not "
                f"{len(inputs)} and {len(target)}"
            )
        if start.scales is None and len(start.tables) == 1:
            # Groups that share everything are one.
            one = (start.shape[0],)
            start = CodebookTensor.of(start.indices, start.tables, None, one, start.shape)
        self.start, self.inputs, self.target = start, inputs, target
        self.layer, self.learning = layer, learning
        device = inputs.device
        self.weights = weight.detach().float().flatten().to(device)
        self.zeros = self.weights == 0 if zeros else None
        by_group = len(start.tables) > 1
        # Every table has largest magnitude 1 here, also those that are stored without scales.
        tables = start.tables.float()
        factor = tables.abs().amax(1).clamp(min=1e-12)
        scales = torch.ones(len(start.sizes)) if start.scales is None else start.scales.float()
        self.tables = (tables / factor[:, None]).to(device).requires_grad_()
        self.log_scales = (scales * factor).clamp(min=1e-12).log().to(device).requires_grad_()
        group = start.group_of_row.repeat_interleave(start.indices.shape[1]).to(device)
        table = group if by_group else torch.zeros_like(group)
        self.layout = _Layout(table, group, tables.shape[0], tables.shape[1])
        self.index = start.indices.flatten().long().to(device)
        self.logits: Tensor | None = None
        self.power = float(target.float().square().mean().clamp(min=1e-30))
        self.generator = torch.Generator().manual_seed(seed)
        shuffled = torch.randperm(len(inputs), generator=self.generator)
        held = max(1, min(len(inputs) - 1, round(len(inputs) * learning.held_out)))
        self.held, self.seen = shuffled[:held], shuffled[held:]
        self.moves = self.jumps = 0

    @torch.enable_grad()
    def run(self) -> Learned:
        learning = self.learning
        before = self._error(self.start)
        optimizer = torch.optim.Adam([self.tables, self.log_scales], lr=learning.lr)
        best, kept = self._held_error(), self._state()
        look = max(1, learning.steps // 100)  # the held-out samples cost as much as some steps
        for step in range(learning.steps):
            if step == learning.warm_up and learning.gradient is not None:
                self._release(optimizer)
            rate = cosine(step / learning.steps)
            for group, lr in zip(
                optimizer.param_groups, (learning.lr, learning.index_lr), strict=False
            ):
                group["lr"] = lr * rate
            self._step(optimizer)
            if (step + 1) % look == 0 or step + 1 == learning.steps:
                error = self._held_error()
                if error < best:
                    best, kept = error, self._state()
                self._revive()
        self._restore(kept)
        made = refit(
            self._stored(), self.inputs, self.target, layer=self.layer, zeros=self.zeros is not None
        )
        made = drop_unused(made)
        after = self._error(made)
        if after > before:
            made, after = self.start, before
        return Learned(made, before, after, self.moves, self.jumps)

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        size = min(self.learning.batch_size, len(self.seen))
        picked = self.seen[torch.randint(len(self.seen), (size,), generator=self.generator)]
        optimizer.zero_grad(set_to_none=True)
        output = self.layer(self.inputs[picked], self._weight())
        ((output - self.target[picked]).square().mean() / self.power).backward()
        if self.zeros is not None and self.tables.grad is not None:
            self.tables.grad[:, 0] = 0.0
        optimizer.step()
        with torch.no_grad():
            # A factor can stand in a table or in its scale: it stands in the scale.
            factor = self.tables.abs().amax(1).clamp(min=1e-12)
            self.tables /= factor[:, None]
            self.log_scales += factor.log()

    def _weight(self) -> Tensor:
        scales = self.log_scales.exp()
        if self.logits is None:
            values = self.layout.lookup(self.tables, self.index)
            flat = values * scales.index_select(0, self.layout.group)
        else:
            self._move(self.layout.best_entry(self.logits.detach()))
            flat = _Decode.apply(
                self.logits, self.tables, scales, self.index, self.layout, self.learning
            )
        assert isinstance(flat, Tensor)
        return flat.view(self.start.shape)

    @torch.no_grad()
    def _move(self, index: Tensor) -> None:
        """Takes the new indices and counts the steps from the old ones."""
        moved = (index != self.index).nonzero().flatten()
        if len(moved):
            ranks = self.tables.argsort(1).argsort(1)
            table = self.layout.table[moved]
            steps = ranks[table, index[moved]] - ranks[table, self.index[moved]]
            self.moves += len(moved)
            self.jumps += int((steps.abs() > 1).sum())
        self.index = index

    @torch.no_grad()
    def _release(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on indices may move: logits prefer the entries nearest to the weights."""
        learning, layout = self.learning, self.layout
        tables = self.tables.detach()
        weights = self.weights / self.log_scales.exp().index_select(0, layout.group)
        limit = learning.candidates
        if limit is None and weights.numel() * layout.entries > 1 << 24:
            limit = 3
        own = self.index[None]
        if limit is not None and limit < layout.entries:
            near = (weights - layout.values(tables)).abs()
            near.scatter_(0, own, -1.0)  # the present entry is one of them
            candidates = near.topk(limit, 0, largest=False).indices
            layout = self.layout = replace(layout, candidates=candidates)
            own = (candidates == own).long().argmax(0, keepdim=True)
        distance = (weights - layout.values(tables)).abs()
        logits = -learning.temperature * distance / layout.spacing(tables)
        # What is assigned now stays in front, also where its entry has moved away meanwhile.
        front, value = _best(logits)
        present = logits.gather(0, own)
        logits.scatter_(0, own, torch.where(front == own, present, value + 1e-6))
        if self.zeros is not None:
            fixed = torch.full_like(logits, -1e4).scatter_(0, own, 1e4)
            logits = torch.where(self.zeros, fixed, logits)
        self.logits = logits.requires_grad_()
        optimizer.add_param_group({"params": [self.logits], "lr": learning.index_lr})

    @torch.no_grad()
    def _revive(self) -> None:
        """Entries that nobody uses any more take the values of the worst represented weights."""
        if self.logits is None or self.layout.candidates is not None:
            return
        layout = self.layout
        used = torch.bincount(layout.place(self.index), minlength=self.tables.numel())
        unused = used.view_as(self.tables) == 0
        if self.zeros is not None:
            unused[:, 0] = False
        if not bool(unused.any()):
            return
        weights = self.weights / self.log_scales.exp().index_select(0, layout.group)
        misses = (weights - layout.lookup(self.tables, self.index)).abs()
        if self.zeros is not None:
            misses[self.zeros] = -1.0
        for number in unused.any(1).nonzero().flatten().tolist():
            entries = unused[number].nonzero().flatten()
            own = (layout.table == number).nonzero().flatten()
            worst = own[misses[own].topk(min(len(entries), len(own))).indices]
            worst = worst[misses[worst] > 0.0]
            entries = entries[: len(worst)]
            self.tables[number, entries] = weights[worst].clamp(-1.0, 1.0)
            self.logits[entries, worst] = self.logits[:, worst].amax(0) + 1e-3

    def _state(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.tables.detach().clone(), self.log_scales.detach().clone(), self.index.clone()

    @torch.no_grad()
    def _restore(self, state: tuple[Tensor, Tensor, Tensor]) -> None:
        self.tables.copy_(state[0])
        self.log_scales.copy_(state[1])
        self.index = state[2]

    @torch.no_grad()
    def _stored(self) -> CodebookTensor:
        tables, scales = self.tables.detach().cpu(), self.log_scales.exp().cpu()
        if len(tables) > 1 or self.start.scales is None:
            tables, scales = (tables * scales[:, None]).half(), None
        else:
            tables, scales = tables.half(), scales.half()
        index = self.index.to(torch.uint8).cpu().view(self.start.indices.shape)
        return CodebookTensor.of(index, tables, scales, self.start.sizes, self.start.shape)

    @torch.no_grad()
    def _held_error(self) -> float:
        # This also takes in the indices that the last step chose, so that they are kept with it.
        output = self.layer(self.inputs[self.held], self._weight())
        return float((output - self.target[self.held]).square().mean()) / self.power

    def _error(self, stored: CodebookTensor) -> float:
        return output_error(stored, self.inputs, self.target, layer=self.layer)


@torch.no_grad()
def output_error(
    stored: CodebookTensor | Tensor,
    inputs: Tensor,
    target: Tensor,
    *,
    layer: Multiply = plain_layer,
    batch_size: int = 256,
) -> float:
    """Mean squared error of a layer's output over the mean square of the target.

    Args:
        stored: its weight.
        inputs: ``[samples, ...]``.
        target: ``[samples, ...]``, without bias.
        layer: ``(inputs, weight) -> output``.
        batch_size: samples at a time.
    """
    weight = stored if isinstance(stored, Tensor) else stored.decode()
    weight = weight.to(inputs.device)
    total = 0.0
    for x, y in zip(inputs.split(batch_size), target.split(batch_size), strict=True):
        total += float((layer(x, weight) - y).double().square().sum())
    return total / max(float(target.double().square().sum()), 1e-30)


@torch.no_grad()
def refit(
    stored: CodebookTensor,
    inputs: Tensor,
    target: Tensor,
    *,
    layer: Multiply = plain_layer,
    zeros: bool = False,
    batch_size: int = 256,
) -> CodebookTensor:
    """The best tables for given indices and scales, by the normal equations of the layer's output.

    Args:
        stored: indices and scales stay.
        inputs: of the layer, ``[samples, ...]``.
        target: its output without bias, ``[samples, ...]``.
        layer: ``(inputs, weight) -> output``.
        zeros: entry 0 stays 0.
        batch_size: samples at a time.

    Returns:
        The refitted codebook; the given one where 16-bit entries make the refitted one worse.
    """
    device = inputs.device
    entries, count = stored.entries, len(stored.tables)
    scales = torch.ones(len(stored.sizes)) if stored.scales is None else stored.scales.float()
    scale_of_row = scales[stored.group_of_row][:, None]
    parts = [
        ((stored.indices == entry) * scale_of_row).view(stored.shape).to(device)
        for entry in range(entries)
    ]
    table_of_row = stored.group_of_row if count > 1 else torch.zeros_like(stored.group_of_row)
    of_table = torch.nn.functional.one_hot(table_of_row, count).double().to(device)
    normal = torch.zeros(count, entries, entries, dtype=torch.float64, device=device)
    right = torch.zeros(count, entries, dtype=torch.float64, device=device)
    axis = 1 if len(stored.shape) > 2 else -1  # of the rows, in an output
    for x, y in zip(inputs.split(batch_size), target.split(batch_size), strict=True):
        outputs = [layer(x, part).movedim(axis, 0).flatten(1).double() for part in parts]
        y_rows = y.movedim(axis, 0).flatten(1).double()
        for i in range(entries):
            right[:, i] += of_table.T @ (outputs[i] * y_rows).sum(1)
            for j in range(i, entries):
                normal[:, i, j] += of_table.T @ (outputs[i] * outputs[j]).sum(1)
    normal = normal + normal.triu(1).transpose(1, 2)
    tables = stored.tables.double().clone()
    free = slice(1, None) if zeros else slice(None)
    # Entries that nobody uses have no equation: the shortest solution leaves them at 0.
    solved = torch.linalg.pinv(normal[:, free, free].cpu(), hermitian=True, rtol=1e-12)
    tables[:, free] = (solved @ right[:, free].cpu()[..., None])[..., 0]
    used = torch.zeros(count, entries).index_put_(
        (table_of_row[:, None].expand_as(stored.indices), stored.indices.long()), torch.ones(())
    )
    tables = torch.where(used > 0, tables, stored.tables.double())
    if bool((tables.abs() > torch.finfo(torch.float16).max).any()):
        return stored
    made = CodebookTensor.of(
        stored.indices, tables.half(), stored.scales, stored.sizes, stored.shape
    )
    errors = [output_error(one, inputs, target, layer=layer) for one in (made, stored)]
    return made if errors[0] <= errors[1] else stored


def drop_unused(stored: CodebookTensor) -> CodebookTensor:
    """Without the entries that no index names (of a single table; two at least are kept)."""
    if len(stored.tables) > 1 or stored.entries == 2:
        return stored
    used = torch.bincount(stored.indices.flatten().long(), minlength=stored.entries) > 0
    if int(used.sum()) < 2:
        used[:2] = True
    new = (used.cumsum(0) - 1).clamp(min=0).to(torch.uint8)
    return CodebookTensor.of(
        new[stored.indices.long()],
        stored.tables[:, used],
        stored.scales,
        stored.sizes,
        stored.shape,
    )


# A whole network


class _Found(Exception):
    pass


class _InputsOf(fx.Interpreter):
    """Runs a traced network up to one operator and keeps what goes into it."""

    def __init__(self, program: fx.GraphModule, node: str) -> None:
        super().__init__(program)
        self._wanted = node
        self.input: Tensor | None = None

    def run_node(self, n: fx.Node) -> Any:
        if n.name == self._wanted:
            (self.input, *_), _ = self.fetch_args_kwargs_from_env(n)
            raise _Found
        return super().run_node(n)


@torch.no_grad()
def _inputs_of(network: GraphNetwork, node: str, batches: Sequence[tuple[Any, ...]]) -> Tensor:
    device = next(iter(network.program.state_dict().values())).device
    found = []
    for batch in batches:
        interpreter = _InputsOf(network.program, node)
        with contextlib.suppress(_Found):
            interpreter.run(*(x.to(device) for x in batch), False)
        assert interpreter.input is not None
        found.append(interpreter.input)
    return torch.cat(found)


@dataclass(frozen=True)
class Compressed:
    """A network whose weights are codebooks.

    Attributes:
        module: computes with the decoded weights; neurons may be in another order.
        tensors: the codebooks by name.
        layers: what was done to each, by name, JSON values.
    """

    module: nn.Module
    tensors: Mapping[str, CodebookTensor]
    layers: Mapping[str, Mapping[str, Any]]


_MULTIPLYING = {
    torch.ops.aten.linear.default,
    torch.ops.aten.conv2d.default,
    torch.ops.aten.conv2d.padding,
}


def compress(
    module: nn.Module,
    example_inputs: Sequence[Any],
    calibration: Sequence[tuple[Any, ...]],
    *,
    entries: int = 4,
    groups: int = 8,
    grouping: Grouping = "scales",
    learning: Learning | None = Learning(),
    rearrange: bool = True,
    skip: Collection[str] = (),
    ends: bool = True,
    embeddings: bool = False,
    sparse: Collection[str] = (),
    seed: int = 0,
    checkpoint: Path | None = None,
    cpu: bool = False,
) -> Compressed:
    """Replaces the weights of linear layers and convolutions by codebooks (JLCM).

    Layers are learned in order: inputs are those of the network compressed so far, the target is
    what the float network has there.

    Args:
        module: unchanged.
        example_inputs: for tracing it.
        calibration: batches of inputs.
        entries: K, values in a table.
        groups: of rows, at most, in each layer.
        grouping: what a group has of its own.
        learning: how, or None for k-means alone.
        rearrange: permute neurons so that similar ones form groups; otherwise groups are cut
            evenly from the rows as they are.
        skip: modules or parameters that stay float.
        ends: whether the first and the last layer get codebooks too.
        embeddings: whether embeddings do (by k-means).
        sparse: weights whose zeros stay zero.
        seed: of clustering and batches.
        checkpoint: file that holds the layers that are done; an interrupted run goes on from it.
        cpu: stay on the CPU although there is a GPU.

    Raises:
        InputError: if an option cannot be used, the checkpoint is of another run or there is
            nothing to calibrate with.
        UnsupportedError: if the network cannot be traced or has no such layers.
    """
    check_entries(entries)
    if groups < 1:
        raise InputError(f"a layer has at least one group, not {groups}")
    if learning is not None and not calibration:
        raise InputError("learning codebooks needs calibration samples; none were given")
    names = list(multiplied_weights(module, example_inputs, skip=skip))
    if not ends:
        every = list(multiplied_weights(module, example_inputs))  # the ends are the network's own
        names = [name for name in names if name not in (every[0], every[-1])]
    made = Reordered(copy.deepcopy(module), {}, {})
    if rearrange and groups > 1:
        made = reorder(module, example_inputs, groups=groups, names=names, seed=seed)
    graph = Graph.trace(made.module, example_inputs)
    layers: dict[str, Layer] = {}
    for node in graph.fx.nodes:
        if node.op != "call_function" or node.target not in _MULTIPLYING:
            continue
        source = node.args[1]
        if isinstance(source, fx.Node) and source.target in names:
            layers.setdefault(str(source.target), Layer(node))
    looked_up = _embeddings(graph, skip) if embeddings else []
    if not layers and not looked_up:
        raise UnsupportedError("the network has no linear layers or convolutions to compress")
    device = torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
    original = copy.deepcopy(graph.network()).to(device).eval()
    smaller = copy.deepcopy(graph.network()).to(device).eval()
    settings = (
        entries, groups, grouping, learning, rearrange, sorted(sparse), seed, names, looked_up
    )  # fmt: skip
    identity = _identity(original, calibration, settings)
    tensors, reports = _resumed(checkpoint, identity)
    with progress() as bar:
        shown = bar.add_task("learning codebooks", total=len(layers) + len(looked_up))
        for name in [*layers, *looked_up]:
            if name in tensors:
                with torch.no_grad():
                    _parameter(smaller, name).copy_(tensors[name].decode())
                bar.advance(shown)
                continue
            weight = _parameter(smaller, name).detach().cpu().clone()
            zeros = name in sparse and bool((weight == 0).any())
            start = cluster_weights(
                weight,
                entries,
                sizes=made.sizes.get(name) or even_sizes(len(weight), groups),
                grouping=grouping,
                zeros=zeros,
            )
            learned = Learned(start, math.nan, math.nan)
            if learning is not None and name in layers:
                layer = layers[name]
                exact = _parameter(original, name).detach()
                with torch.no_grad():
                    target = torch.cat(
                        [
                            layer(x, exact)
                            for x in _inputs_of(original, layer.node, calibration).split(256)
                        ]
                    )
                learned = learn_codebook(
                    weight,
                    start,
                    _inputs_of(smaller, layer.node, calibration),
                    target,
                    layer=layer,
                    learning=learning,
                    zeros=zeros,
                    seed=seed_of(seed, "learn", name),
                )
            tensors[name] = learned.stored
            with torch.no_grad():
                _parameter(smaller, name).copy_(learned.stored.decode())
            reports[name] = _layer_report(weight, learned)
            log.debug("%s: %s", name, reports[name])
            bar.advance(shown)
            if checkpoint is not None:
                stored = {n: [t.record(), t.arrays()] for n, t in tensors.items()}
                save_state(
                    checkpoint, {"identity": identity, "tensors": stored, "reports": reports}
                )
    result = made.module
    with torch.no_grad():
        for name, stored in tensors.items():
            result.get_parameter(name).copy_(stored.decode())
    return Compressed(result, tensors, reports)


def _identity(
    network: nn.Module, calibration: Sequence[tuple[Any, ...]], settings: tuple[Any, ...]
) -> str:
    """Changes with the weights, the calibration samples and every setting."""
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=8)
    for tensor in [*network.state_dict().values(), *(x for batch in calibration for x in batch)]:
        if isinstance(tensor, Tensor):
            values = tensor.detach().cpu().contiguous().flatten()
            digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _resumed(
    checkpoint: Path | None, identity: str
) -> tuple[dict[str, CodebookTensor], dict[str, dict[str, Any]]]:
    """The layers that an interrupted run has done."""
    if checkpoint is None or not checkpoint.exists():
        return {}, {}
    saved = load_state(checkpoint)
    if saved.get("identity") != identity:
        raise InputError(
            f"{checkpoint} belongs to a run with other settings or data; remove it to start anew"
        )
    tensors = {n: CodebookTensor.restore(*entry) for n, entry in saved["tensors"].items()}
    return tensors, {name: dict(row) for name, row in saved["reports"].items()}


def _parameter(network: GraphNetwork, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    return getattr(network.program.get_submodule(path), leaf)


def _embeddings(graph: Graph, skip: Collection[str]) -> list[str]:
    found = []
    for node in graph.fx.nodes:
        if node.target is torch.ops.aten.embedding.default and node.args[0].op == "get_attr":
            name = str(node.args[0].target)
            if not any(name == s or name.startswith(f"{s}.") for s in skip):
                found.append(name)
    return list(dict.fromkeys(found))


def _layer_report(weight: Tensor, learned: Learned) -> dict[str, Any]:
    stored = learned.stored
    residual = stored.decode() - weight
    report = {
        "weights": weight.numel(),
        "entries": stored.entries,
        "groups": len(stored.sizes),
        "bytes": stored.nbytes(),
        "formula_bits": formula_bits(stored),
        "weight_error": float(residual.square().sum() / weight.square().sum().clamp(min=1e-30)),
    }
    if not math.isnan(learned.error):
        report |= {
            "output_error_before": learned.error_before,
            "output_error": learned.error,
            "moves": learned.moves,
            "jumps": learned.jumps,
        }
    return report


def formula_bits(stored: CodebookTensor) -> float:
    """:func:`codebook_bits` of a stored tensor (each group has its own table, or all have one)."""
    groups, tables = len(stored.sizes), len(stored.tables)
    bits = codebook_bits(
        stored.indices.numel(),
        stored.entries,
        tables=tables,
        groups=groups,
        scales=stored.scales is not None,
    )
    # Table g belongs to group g: nobody has to say so.
    return bits - groups * math.log2(tables)


def footprint(packed: PackedNetwork) -> list[dict[str, Any]]:
    """What each tensor of a packed network takes: its name, values, bytes, and bits a value."""
    rows = []
    for name, stored in packed.tensors.items():
        count = math.prod(stored.shape)
        size = stored.nbytes()
        rows.append({"tensor": name, "codec": stored.codec, "values": count, "bytes": size})
    for name, tensor in packed.plain.items():
        size = tensor.numel() * tensor.element_size()
        rows.append({"tensor": name, "codec": "plain", "values": tensor.numel(), "bytes": size})
    return [row | {"bits": 8 * row["bytes"] / max(1, row["values"])} for row in rows]


# A step of a recipe


def calibration_batches(task: Task, samples: int, *, batch_size: int = 64) -> list[tuple[Any, ...]]:
    """Training inputs without augmentation, about ``samples`` of them, evenly over the split.

    Raises:
        InputError: if there are none.
    """
    if samples < 1 or task.size("train") == 0:
        raise InputError("calibration needs at least one sample of the training split")
    batch_size = min(batch_size, task.size("train"))
    wanted = -(-min(samples, task.size("train")) // batch_size)
    batches = task.size("train") // batch_size  # whole ones
    chosen = np.unique(np.linspace(0, batches - 1, min(wanted, batches)).round().astype(int))
    found = []
    for start in chosen:
        stream = task.batches("train", batch_size=batch_size, start=int(start), shuffle=False)
        found.append(task.inputs(next(iter(stream))))
    return found


def codebook(
    network: Network,
    task: Task,
    *,
    bits: int = 2,
    entries: int | None = None,
    groups: int = 8,
    grouping: Grouping = "scales",
    gradient: Literal["proximal", "softmax", "none"] = "proximal",
    falloff: Falloff = "bell",
    steps: int = 2000,
    samples: int = 1024,
    batch_size: int = 32,
    lr: float = 1e-3,
    index_lr: float = 1e-2,
    temperature: float = 2.0,
    rearrange: bool = True,
    skip: Collection[str] = (),
    ends: bool = True,
    embeddings: bool = False,
    seed: int = 0,
    checkpoint: Path | None = None,
    cpu: bool = False,
) -> Network:
    """Replaces weights by indices into learned tables (a step of a recipe).

    Args:
        network: trained; unchanged.
        task: its training split gives the calibration samples (without augmentation or labels).
        bits: of an index.
        entries: of a table, instead of ``2 ** bits``; 3 takes 1.6 bits an index.
        groups: of rows in each layer, at most.
        grouping: whether each group has a scale or a table of its own.
        gradient: of the indices; "none" learns tables only.
        falloff: how the proximal gradient falls with the distance of an entry.
        steps: of Adam for each layer; 0 for k-means alone.
        samples: for calibration.
        batch_size: samples a step.
        lr: of tables and scales at the start; falls to 0 along half a cosine.
        index_lr: of the indices' logits, likewise.
        temperature: how strongly those prefer near entries at first.
        rearrange: permute neurons so that similar ones form groups.
        skip: modules or parameters that stay float.
        ends: whether the first and the last layer get codebooks too.
        embeddings: whether embeddings do (by k-means).
        seed: of clustering and batches.
        checkpoint: file that holds the layers that are done; an interrupted run goes on from it.
        cpu: stay on the CPU although there is a GPU.

    Returns:
        The network with every such weight at an entry of its table, and its packed form.

    Raises:
        InputError: if an option cannot be used.
        UnsupportedError: if the network cannot be traced or has no such layers.
    """
    if not 1 <= bits <= 8:
        raise InputError(f"an index has 1 to 8 bits, not {bits}")
    if grouping not in ("scales", "tables"):
        raise InputError(f"grouping is scales or tables, not {grouping!r:.40}")
    learning = Learning(
        gradient=None if gradient == "none" else gradient,
        falloff=falloff,
        steps=steps,
        warm_up=min(Learning.warm_up, steps // 2),  # or indices would never move in a short run
        batch_size=batch_size,
        lr=lr,
        index_lr=index_lr,
        temperature=temperature,
    )
    level = level_of(network.module)
    made = compress(
        network.module,
        network.example_inputs,
        calibration_batches(task, samples),
        entries=1 << bits if entries is None else entries,
        groups=groups,
        grouping=grouping,
        learning=learning if steps else None,
        rearrange=rearrange,
        skip=skip,
        ends=ends,
        embeddings=embeddings,
        sparse=[level + name for name, form in network.storage.items() if form == SPARSE],
        seed=seed,
        checkpoint=checkpoint,
        cpu=cpu,
    )
    packed = PackedNetwork.of(made.module, made.tensors)
    options = {
        "bits": bits, "entries": entries, "groups": groups, "grouping": grouping,
        "gradient": gradient, "falloff": falloff, "steps": steps, "samples": samples,
        "batch_size": batch_size, "lr": lr, "index_lr": index_lr, "temperature": temperature,
        "rearrange": rearrange, "skip": sorted(skip), "ends": ends, "embeddings": embeddings,
        "seed": seed,
    }  # fmt: skip
    report = {
        "layers": {name.removeprefix(level): dict(row) for name, row in made.layers.items()},
        "packed_bytes": packed.nbytes(),
        "plain_bytes": packed.plain_nbytes(),
    }
    storage = {
        name.removeprefix(level): f"codebook{stored.entries}/{len(stored.sizes)}"
        for name, stored in made.tensors.items()
    }
    return network.after(
        "codebook",
        options,
        report,
        module=made.module,
        storage=storage,
        runtime="packed",
        packed=packed,
    )
