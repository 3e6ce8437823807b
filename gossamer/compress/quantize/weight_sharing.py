"""Other ways of sharing weights: even grids, trained centroids, soft clusters, tables of vectors.

What :mod:`gossamer.compress.quantize.codebooks` is compared with.

Sources: Han, Mao and Dally, "Deep compression", arXiv:1510.00149, section 3 (k-means, then
centroids trained by the sum of their weights' gradients); Cho et al., "DKM: differentiable k-means
clustering layer for neural network compression", arXiv:2108.12659; Martinez et al., "Permute,
quantize, and fine-tune", arXiv:2010.15703, sections 3.1 and 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.compress.quantize.codebooks import (
    check_entries,
    entry_spacing,
    kmeans_values,
    nearest_entries,
)
from gossamer.core.errors import InputError
from gossamer.parts.codebook import CodebookTensor
from gossamer.parts.swap import swapped


def uniform_codebook(weight: Tensor, entries: int, *, per_row: bool = False) -> CodebookTensor:
    """Rounds to an even grid around zero, whose width has the least squared error.

    Args:
        weight: rows first.
        entries: levels of the grid.
        per_row: a width for each row instead of one.
    """
    check_entries(entries)
    rows = weight.detach().float().cpu().flatten(1)
    table = torch.linspace(-1.0, 1.0, entries)
    parts = rows if per_row else rows.flatten()[None]
    widest = parts.abs().amax(1, keepdim=True).clamp(min=1e-7)
    best, chosen = torch.full((len(parts), 1), math.inf), widest
    for share in torch.linspace(0.1, 1.0, 91):
        scale = (widest * share).half().float()
        error = (_on_grid(parts / scale, entries) * scale - parts).square().sum(1, keepdim=True)
        chosen = torch.where(error < best, scale, chosen)
        best = torch.minimum(error, best)
    sizes = (1,) * len(rows) if per_row else (len(rows),)
    indices = ((_on_grid(rows / chosen, entries) + 1.0) / 2 * (entries - 1)).round()
    return CodebookTensor.of(
        indices.to(torch.uint8), table[None].half(), chosen[:, 0].half(), sizes, tuple(weight.shape)
    )


def _on_grid(x: Tensor, entries: int) -> Tensor:
    """Nearest of ``entries`` even levels from -1 to 1."""
    places = ((x + 1.0) / 2 * (entries - 1)).round().clamp(0, entries - 1)
    return places / (entries - 1) * 2 - 1.0


@dataclass(frozen=True)
class Product:
    """A weight by product quantization.

    Attributes:
        decoded: the weight it stands for.
        bits: of codes and table, by the formula.
    """

    decoded: Tensor
    bits: float


def product_quantize(
    weight: Tensor,
    *,
    length: int = 4,
    entries: int = 256,
    sweeps: int = 10,
    entry_bits: int = 16,
    seed: int = 0,
) -> Product:
    """Represents runs of ``length`` weights by entries of one table of vectors (PQF's scheme).

    Columns are permuted first, so that the vectors are easy to cluster: greedily by variance, then
    by random swaps that lower the determinant of the vectors' covariance. In a network the
    permutation is free (it belongs to the layer before); the fine-tuning of PQF is left out.

    Args:
        weight: rows first.
        length: weights in a vector.
        entries: of the table; a quarter of the vectors at most.
        sweeps: random swaps that are tried, for each column.
        entry_bits: of each value of the table.
        seed: of swaps and k-means.
    """
    from sklearn.cluster import KMeans

    rows = weight.detach().float().cpu().flatten(1)
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % length))
    order = _pqf_order(padded.double().numpy(), length, sweeps, seed)
    vectors = padded[:, order].reshape(-1, length)
    entries = max(2, min(entries, len(vectors) // 4))
    model = KMeans(entries, n_init=1, max_iter=50, random_state=seed % (1 << 32))  # type: ignore[arg-type]
    codes = model.fit_predict(vectors.numpy())
    table = torch.from_numpy(model.cluster_centers_).half().float()
    decoded = torch.empty_like(padded)
    decoded[:, order] = table[torch.from_numpy(codes).long()].reshape(padded.shape)
    bits = len(vectors) * math.log2(entries) + entry_bits * entries * length
    return Product(decoded[:, : rows.shape[1]].reshape(weight.shape), bits)


def _pqf_order(columns: np.ndarray, length: int, sweeps: int, seed: int) -> Tensor:
    """Columns in the order in which consecutive ``length`` of them make vectors.

    Bucket ``b`` holds the columns that are component ``b`` of all vectors (Martinez et al., section
    3.1, algorithm 1: buckets of like variance make the determinant small).
    """
    count = columns.shape[1]
    order = np.argsort(columns.var(0))[::-1].copy().reshape(length, -1).T.reshape(-1)
    rng = np.random.default_rng(seed)
    # A few thousand vectors tell the covariance well enough.
    rows = max(1, 8192 * length // count)
    sample = columns[rng.permutation(len(columns))[:rows]]

    def volume(order: np.ndarray) -> float:
        vectors = sample[:, order].reshape(-1, length)
        covariance = vectors.T @ vectors / len(vectors) + 1e-12 * np.eye(length)
        return float(np.linalg.slogdet(covariance)[1])

    best = volume(order)
    for i, j in rng.integers(count, size=(sweeps * count, 2)):
        if i % length == j % length:
            continue
        order[[i, j]] = order[[j, i]]
        now = volume(order)
        if now < best:
            best = now
        else:
            order[[i, j]] = order[[j, i]]
    return torch.from_numpy(order)


class SharedWeights(nn.Module):
    """A network whose weights share centroids that are trained (Deep Compression).

    Which weight has which centroid stays. The gradient of a centroid is the sum of those of its
    weights.

    Args:
        network: everything but the shared weights trains with them; not copied.
        tensors: where tables and indices begin.
    """

    def __init__(self, network: nn.Module, tensors: Mapping[str, CodebookTensor]) -> None:
        super().__init__()
        self.network = network
        self.stored = dict(tensors)
        self.tables = nn.ParameterList([nn.Parameter(t.tables.float()) for t in tensors.values()])
        for name in tensors:
            network.get_parameter(name).requires_grad_(False)

    def tensors(self) -> dict[str, CodebookTensor]:
        """Tables as they are now, with the indices."""
        pairs = zip(self.stored.items(), self.tables, strict=True)
        return {
            name: CodebookTensor.of(t.indices, p.detach().cpu().half(), t.scales, t.sizes, t.shape)
            for (name, t), p in pairs
        }

    def forward(self, *inputs: Any, **named: Any) -> Any:
        weights = {}
        for (name, stored), tables in zip(self.stored.items(), self.tables, strict=True):
            groups = stored.group_of_row.to(tables.device)
            row = tables[groups if len(tables) > 1 else torch.zeros_like(groups)]
            if stored.scales is not None:
                row = row * stored.scales.float().to(row)[groups, None]
            weights[name] = row.gather(1, stored.indices.long().to(row.device)).view(stored.shape)
        with swapped(self.network, weights):
            return self.network(*inputs, **named)


class SoftClusters(nn.Module):
    """A network trained through softly clustered weights (DKM).

    Each weight is a mean of the centroids by its attention ``softmax(-|w - c| / tau)``; centroids
    are the means of the weights by the same attention, iterated from their last values. Outside
    training every weight is its nearest centroid.

    Args:
        network: holds the trained weights; not copied.
        names: the weights that are clustered.
        entries: K.
        temperature: tau, in units of the mean distance of neighbouring centroids.
        iterations: of centroids and attention.
    """

    def __init__(
        self,
        network: nn.Module,
        names: Collection[str],
        entries: int,
        *,
        temperature: float = 0.2,
        iterations: int = 5,
    ) -> None:
        super().__init__()
        check_entries(entries)
        if not temperature > 0 or iterations < 1:
            raise InputError("DKM needs a temperature above 0 and an iteration or more")
        self.network = network
        self.names = tuple(names)
        self.temperature, self.iterations = temperature, iterations
        tables = [kmeans_values(network.get_parameter(n), entries) for n in self.names]
        self.centers: Tensor
        self.register_buffer("centers", torch.stack(tables))

    def soft(self, number: int) -> Tensor:
        """The softly clustered weight, with gradients; moves its centroids."""
        weight = self.network.get_parameter(self.names[number])
        w, c = weight.flatten(), self.centers[number].clone()
        tau = self.temperature * entry_spacing(c.detach()[None])[0]
        attention = w
        for _ in range(self.iterations):
            attention = torch.softmax(-(w[:, None] - c).abs() / tau, 1)
            c = (attention * w[:, None]).sum(0) / attention.sum(0).clamp(min=1e-12)
        self.centers[number] = c.detach()
        return (attention @ c).view(weight.shape)

    def tensors(self) -> dict[str, CodebookTensor]:
        """Every weight at its nearest centroid."""
        made = {}
        for name, centers in zip(self.names, self.centers.cpu(), strict=True):
            weight = self.network.get_parameter(name).detach().cpu()
            table = centers.half()[None]
            indices = nearest_entries(weight.flatten(1), table.float())
            made[name] = CodebookTensor.of(
                indices, table, None, (len(weight),), tuple(weight.shape)
            )
        return made

    def forward(self, *inputs: Any, **named: Any) -> Any:
        if self.training:
            weights = {name: self.soft(i) for i, name in enumerate(self.names)}
        else:
            device = self.centers.device
            weights = {name: t.decode().to(device) for name, t in self.tensors().items()}
        with swapped(self.network, weights):
            return self.network(*inputs, **named)
