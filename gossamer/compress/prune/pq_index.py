"""PQ Index: how compressible weights still are; SAP: prune just as much in each round.

The index compares two norms of the weights that are left: 0 for weights of one size, near 1 where
few carry all. It bounds from below how many have to stay, and Sparsity-informed Adaptive Pruning
removes what the bound allows, so the share of a round follows from the network. Along a run the
index is expected to fall, to rise where the network can be compressed no further, and to fall again
when it collapses.

Source: Diao et al., "Pruning Deep Neural Networks from a Sparsity Perspective", ICLR 2023,
arXiv:2302.05601 (definition 1, theorem 2, algorithm 1), and the authors' code where the paper is
silent. Gini index: Hurley and Rickard, IEEE Transactions on Information Theory 2009; Hoyer: Journal
of Machine Learning Research 2004.

What differs from the code, each on purpose: counts are computed in whole numbers and removed
exactly, ties by index; no layer or neuron loses its last weight.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.compress.prune.rewind import Retraining, prune_and_retrain
from gossamer.compress.prune.sparsify import pruned_so_far, sparse_network
from gossamer.compress.prune.weight_scores import keep_in_each, keep_overall
from gossamer.core.errors import InputError
from gossamer.core.network import Network
from gossamer.core.task import Task, seed_of
from gossamer.parts.masks import Masks

Scope = Literal["global", "layer", "neuron"]


def pq_index(
    weights: Tensor, p: float = 0.5, q: float = 1.0, *, mask: Tensor | None = None
) -> Tensor:
    """The index of each vector: 1 - d^(1/q - 1/p) |w|_p / |w|_q, over the d weights that are left.

    Args:
        weights: ``[..., d]``; each last axis is a vector. Not differentiable at 0 for p < 1, so no
            gradient is kept.
        p: 0 < p <= 1.
        q: 1 <= q, p < q.
        mask: bool of the same shape, True where a weight is left. Default: everywhere.

    Returns:
        float64 ``[...]``, 0 where no weight is left.

    Raises:
        InputError: if p and q are out of order.
    """
    _check_exponents(p, q)
    if weights.shape[-1] == 0:
        return torch.zeros(weights.shape[:-1], dtype=torch.float64)
    size = weights.detach().double().abs()
    there = torch.ones_like(size) if mask is None else mask.to(size)
    count = there.sum(-1)
    # Means over what is left, divided by the largest: sums of d terms to the power of 1/p overflow.
    largest = (size * there).amax(-1, keepdim=True)
    scaled = size * there / torch.where(largest > 0, largest, 1.0)
    mean_p = ((scaled.pow(p) * there).sum(-1) / count.clamp(min=1)).pow(1.0 / p)
    mean_q = ((scaled.pow(q) * there).sum(-1) / count.clamp(min=1)).pow(1.0 / q)
    index = 1.0 - mean_p / torch.where(mean_q > 0, mean_q, 1.0)
    return torch.where((count > 0) & (mean_q > 0), index.clamp(min=0.0), 0.0)


def keep_lower_bound(
    index: Tensor | float, count: Tensor | int, p: float, q: float, eta: float = 0.0
) -> Tensor:
    """How many of ``count`` weights have to stay, at the least: theorem 2.

    ``eta`` is the mass (in powers of p) of what goes over the mass of what stays. With the true eta
    of a cut the bound holds; with eta = 0, as SAP uses it, it is a rule and no guarantee.

    Returns:
        A real number, float64; the weights kept are its ceiling.
    """
    _check_exponents(p, q)
    if eta < 0:
        raise InputError(f"eta is 0 or more, not {eta:g}")
    index = torch.as_tensor(index, dtype=torch.float64)
    count = torch.as_tensor(count, dtype=torch.float64)
    return count * (1.0 + eta) ** (-q / (q - p)) * (1.0 - index).pow(q * p / (q - p))


def removable(
    index: Tensor | float,
    count: Tensor | int,
    *,
    p: float = 0.5,
    q: float = 1.0,
    eta: float = 0.0,
    gamma: float = 1.0,
    beta: float = 0.9,
) -> Tensor:
    """How many weights SAP removes in a round, of each vector.

    Args:
        index: of each vector.
        count: weights left of each.
        p: of the index.
        q: of the index.
        eta: slack of the bound.
        gamma: multiplies the share that goes.
        beta: largest share that goes.

    Returns:
        int64, of the shape of ``count``.
    """
    if gamma <= 0 or not 0 < beta <= 1:
        raise InputError(f"SAP needs a gamma above 0 and a beta in (0, 1], not {gamma:g}, {beta:g}")
    number = torch.as_tensor(count, dtype=torch.float64)
    # A count that is a whole number but for rounding must not keep one weight more.
    stay = torch.ceil(keep_lower_bound(index, count, p, q, eta) - 1e-6)
    share = (gamma * (number - stay) / number.clamp(min=1)).clamp(0.0, beta)
    return torch.floor(number * share + 1e-6).long()


def _check_exponents(p: float, q: float) -> None:
    if not (0.0 < p <= 1.0 <= q and p < q):
        raise InputError(f"the PQ index needs 0 < p <= 1 <= q and p < q, not {p:g} and {q:g}")


def gini_index(weights: Tensor) -> float:
    """Gini index of the magnitudes of a vector: 0 if all are equal (or there is none)."""
    size = weights.detach().double().abs().flatten().sort().values
    total, n = float(size.sum()), len(size)
    if total == 0.0:
        return 0.0
    rank = torch.arange(1, n + 1, dtype=torch.float64)
    return float(((2 * rank - n - 1) * size).sum() / (n * total))


def hoyer_index(weights: Tensor) -> float:
    """(sqrt(d) - |w|_1 / |w|_2) / (sqrt(d) - 1): 0 if all are equal, 1 for one weight."""
    size = weights.detach().double().abs().flatten()
    if len(size) < 2 or not bool(size.any()):
        return 0.0
    root = math.sqrt(len(size))
    return float((root - size.sum() / size.norm()) / (root - 1.0))


def kurtosis(weights: Tensor) -> float:
    """Fourth moment over the squared second, of the weights about zero (3 for normal ones)."""
    square = weights.detach().double().flatten().square()
    return float(square.square().mean() / square.mean().square()) if bool(square.any()) else 0.0


def pq_report(module: nn.Module, masks: Masks, *, p: float = 0.5, q: float = 1.0) -> dict[str, Any]:
    """The index of what is left, over all weights, of each layer, and of each layer's neurons.

    Returns:
        "global", "layer" (by name), "neuron" (mean over the neurons that have weights left, by
        name), and beside them "gini", "hoyer" and "kurtosis" over all weights.
    """
    weights = {name: module.get_parameter(name).detach().cpu() for name in masks.kept}
    kept = {name: mask.cpu() for name, mask in masks.kept.items()}
    left = torch.cat([weights[name][kept[name]] for name in weights])
    neurons = {}
    for name, weight in weights.items():
        rows, there = weight.flatten(1), kept[name].flatten(1)
        index = pq_index(rows, p, q, mask=there)
        neurons[name] = float(index[there.any(1)].mean()) if bool(there.any()) else 0.0
    return {
        "global": float(pq_index(left, p, q)),
        "layer": {name: float(pq_index(w[kept[name]], p, q)) for name, w in weights.items()},
        "neuron": neurons,
        "gini": gini_index(left),
        "hoyer": hoyer_index(left),
        "kurtosis": kurtosis(left),
    }


Count = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Vectors ``[..., d]``, their masks, weights left ``[...]`` to how many of each go ``[...]``."""


def adaptive(
    *, p: float = 0.5, q: float = 1.0, eta: float = 0.0, gamma: float = 1.0, beta: float = 0.9
) -> Count:
    """SAP's counts."""

    def count(weights: Tensor, mask: Tensor, left: Tensor) -> Tensor:
        index = pq_index(weights, p, q, mask=mask)
        return removable(index, left, p=p, q=q, eta=eta, gamma=gamma, beta=beta)

    return count


def fixed(share: float = 0.2) -> Count:
    """The lottery ticket's counts: the same share of what is left."""

    def count(weights: Tensor, mask: Tensor, left: Tensor) -> Tensor:
        return torch.floor(share * left.double() + 1e-9).long()

    return count


def kept_by_magnitude(
    weights: Mapping[str, Tensor],
    alive: Mapping[str, Tensor],
    count: Count,
    scope: Scope,
    *,
    ranked_by: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """One round: the smallest weights of each scope go, as many as ``count`` says.

    Args:
        weights: of each layer.
        alive: bool masks of what is left.
        count: how many go.
        scope: all layers together, each layer, or each output neuron (filter).
        ranked_by: other weights, whose magnitudes decide which go (one-shot pruning ranks by the
            first trained network).

    Returns:
        Bool masks; no scope loses its last weight.
    """
    rank = {n: (weights if ranked_by is None else ranked_by)[n].detach().abs() for n in weights}
    if scope == "global":
        flat = torch.cat([w.detach().flatten() for w in weights.values()])
        mask = torch.cat([alive[n].flatten() for n in weights])
        left = mask.sum()
        gone = int(count(flat, mask, left))
        return keep_overall(rank, alive, max(1, int(left) - gone))
    if scope == "layer":
        counts = {}
        for name, weight in weights.items():
            left = alive[name].sum()
            gone = int(count(weight.detach().flatten(), alive[name].flatten(), left))
            counts[name] = max(min(1, int(left)), int(left) - gone)
        return keep_in_each(rank, alive, counts)
    if scope != "neuron":
        raise InputError(f"the scope is global, layer or neuron, not {scope!r:.40}")
    result = {}
    for name, weight in weights.items():
        rows, mask = weight.detach().flatten(1), alive[name].flatten(1)
        left = mask.sum(1)
        gone = torch.minimum(count(rows, mask, left), (left - 1).clamp(min=0))
        # The rank of each weight among those left of its row, smallest first, ties by index.
        score = torch.where(mask, rank[name].flatten(1), torch.inf)
        order = torch.argsort(score, dim=1, stable=True)
        place = torch.empty_like(order)
        place.scatter_(1, order, torch.arange(rows.shape[1]).expand_as(order).contiguous())
        result[name] = (mask & (place >= gone[:, None])).view_as(weight)
    return result


def compressibility_limit(indices: Sequence[float]) -> int | None:
    """The first place after which the index rises, having fallen before: no further from here.

    Args:
        indices: of the retrained network after each round, the dense one first.

    Returns:
        Where the first minimum is, or None if the index never rises after a fall.
    """
    for i in range(1, len(indices) - 1):
        if indices[i] < indices[i - 1] and indices[i + 1] > indices[i]:
            return i
    return None


def adaptive_pruning(
    network: Network,
    task: Task,
    *,
    rounds: int = 10,
    sparsity: float | None = None,
    p: float = 0.5,
    q: float = 1.0,
    eta: float = 0.0,
    gamma: float = 1.0,
    beta: float = 0.9,
    scope: Literal["global", "layer", "neuron"] = "global",
    rewind: Literal["start", "none"] = "start",
    skip: Collection[str] = (),
    epochs: int = 20,
    batch_size: int = 128,
    lr: float = 0.1,
    weight_decay: float = 5e-4,
    seed: int = 0,
    checkpoint: Path | None = None,
    cpu: bool = False,
) -> Network:
    """SAP: sparsity-informed adaptive pruning (a step of a recipe).

    Args:
        network: its weights are where training starts; unchanged.
        task: its data.
        rounds: of pruning; fewer where ``sparsity`` is reached before.
        sparsity: share of the weights that goes at most; None for as much as the rounds remove.
        p: of the index.
        q: of the index.
        eta: slack of the bound; larger prunes more.
        gamma: speed; larger prunes more.
        beta: largest share of a round.
        scope: what has an index of its own: all weights, each layer or each neuron.
        rewind: "start" sets survivors back to the weights that were given, "none" trains on.
        skip: names of parameters or modules that stay dense.
        epochs: of training in each round (and before the first).
        batch_size: samples a batch.
        lr: learning rate at the start of each round; falls to 0 along half a cosine.
        weight_decay: of matrices and kernels; the index depends on it.
        seed: of the data order.
        checkpoint: file beside which each round keeps its state.
        cpu: stay on the CPU although there is a GPU.

    Returns:
        The sparse network; its record has the indices before and after each round's pruning and
        "compressibility_limit": the round after which the index rose, if it did.

    Raises:
        InputError: if an option is out of range.
        UnsupportedError: if the network cannot be traced or has nothing to prune.
    """
    if sparsity is not None and not 0.0 < sparsity < 1.0:
        raise InputError(f"the sparsity is a share in (0, 1), not {sparsity:g}")
    if rounds < 1 or epochs < 0:
        raise InputError("adaptive pruning needs a round or more and no negative epochs")
    if scope not in ("global", "layer", "neuron"):
        raise InputError(f"the scope is global, layer or neuron, not {scope!r:.40}")
    count = adaptive(p=p, q=q, eta=eta, gamma=gamma, beta=beta)
    removable(0.0, 1, p=p, q=q, eta=eta, gamma=gamma, beta=beta)
    module = copy.deepcopy(network.module).cpu()
    masks = pruned_so_far(network, module, skip=skip)
    training = Retraining(
        epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay, clip=1.0, cpu=cpu
    )
    training.train(
        module, task, masks, seed=seed_of("first", seed),
        checkpoint=checkpoint and checkpoint.with_suffix(".first.state"),
    )  # fmt: skip
    floor = 1 if sparsity is None else round(masks.total * (1.0 - sparsity))
    start = {name: tensor.clone() for name, tensor in network.module.state_dict().items()}
    records: list[dict[str, Any]] = []
    trained = [pq_report(module, masks, p=p, q=q)["global"]]
    for number in range(rounds):
        if masks.remaining <= floor:
            break
        pruned: list[float] = []

        def choose(now: nn.Module, masks: Masks, _: int) -> Mapping[str, Tensor]:
            weights = {name: now.get_parameter(name).detach().cpu() for name in masks.kept}
            kept = kept_by_magnitude(weights, masks.kept, count, scope)
            if sum(int(mask.sum()) for mask in kept.values()) < floor:
                scores = {name: weight.abs() for name, weight in weights.items()}
                kept = keep_overall(scores, masks.kept, floor)
            left = torch.cat([weights[name][mask] for name, mask in kept.items()])
            pruned.append(float(pq_index(left, p, q)))  # noqa: B023 (called in this round)
            return kept

        before = masks.remaining
        (record,) = prune_and_retrain(
            module, task, masks, choose, rounds=1, retraining=training,
            rewind=start if rewind == "start" else None, seed=seed_of("sap", seed, number),
            checkpoint=checkpoint and checkpoint.with_suffix(f".part{number}.state"),
        )  # fmt: skip
        trained.append(pq_report(module, masks, p=p, q=q)["global"])
        records.append(
            record | {
                "round": number + 1, "share": 1.0 - masks.remaining / before,
                "index_pruned": pruned[0], "index_trained": trained[-1],
            }
        )  # fmt: skip
    options = {
        "rounds": rounds, "sparsity": sparsity, "p": p, "q": q, "eta": eta, "gamma": gamma,
        "beta": beta, "scope": scope, "rewind": rewind, "skip": list(skip), "epochs": epochs,
        "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay, "seed": seed,
    }  # fmt: skip
    report = {
        "rounds_run": records,
        "index_dense": trained[0],
        "compressibility_limit": compressibility_limit(trained),
        "index": pq_report(module, masks, p=p, q=q),
    }
    return sparse_network(network, "adaptive-pruning", options, module, masks, report)
