"""Choose each layer's sparsity by rate-distortion curves and dynamic programming.

For each layer and each candidate rate the network's *final output* is measured with only that layer
pruned by magnitude. What several layers do together is close to the sum of what each does alone, so
the choice of rates is a knapsack, solved exactly.

Source: Xu et al., "Efficient Joint Optimization of Layer-Adaptive Weight Pruning in Deep Neural
Networks", ICCV 2023, arXiv:2308.10438 (objective: eq. 1; additivity: eq. 3; dynamic programming:
section 3.3), and the authors' code where the paper is silent.

What differs from the code, each on purpose: the first layer is treated like the others (there it
may exceed the budget by half a step); "at most" the budget is meant as said; counts are whole
numbers of weights, so what is removed is what was measured. The sum of distortions is no longer
near the joint one where a layer is almost gone, so rates are capped at 0.99 unless a layer's curve
is zero throughout.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.compress.knapsack import knapsack, lagrangian
from gossamer.compress.prune.rewind import Retraining
from gossamer.compress.prune.sparsify import in_rounds
from gossamer.compress.prune.weight_scores import keep_in_each
from gossamer.core.errors import InputError
from gossamer.core.network import Network
from gossamer.core.progress import progress
from gossamer.core.task import Task, device_of, evaluating, logits_of, seed_of, to_device
from gossamer.parts.masks import Masks, multiplied_weights

Mode = Literal["mean", "worst"]
EXACT = 200_000
"""Budgets up to this many weights are solved exactly, larger ones in :data:`UNITS`."""
UNITS = 20_000


@dataclass(frozen=True)
class Curves:
    """Distortion of the output against the weights that one layer keeps.

    Attributes:
        kept: of each layer, weights kept at each grid point, falling; the first is all that is
            left of it, ``[points]``.
        distortion: of each layer at each point, others as they are, ``[points]``.
        size: weights of each layer, those already gone included.
        macs: multiply-accumulates of each layer with all its weights.
    """

    kept: Mapping[str, np.ndarray]
    distortion: Mapping[str, np.ndarray]
    size: Mapping[str, int]
    macs: Mapping[str, int]

    def monotone(self) -> dict[str, bool]:
        """Whether each layer's distortion never falls as more is removed (it need not)."""
        return {name: bool((np.diff(d) >= 0).all()) for name, d in self.distortion.items()}

    def at(self, kept: Mapping[str, int]) -> float:
        """The sum of the curves at an allocation's grid points: the predicted distortion.

        Raises:
            InputError: if a count is no point of its layer's curve.
        """
        total = 0.0
        for name, count in kept.items():
            place = np.flatnonzero(self.kept[name] == count)
            if not len(place):
                raise InputError(f"the curve of {name} has no point with {count} weights kept")
            total += float(self.distortion[name][place[0]])
        return total


@torch.no_grad()
def rd_curves(
    module: nn.Module,
    inputs: Sequence[tuple[Any, ...]],
    masks: Masks,
    macs: Mapping[str, int],
    *,
    grid: int = 100,
    mode: Mode = "mean",
    cap: float = 0.99,
) -> Curves:
    """Measures the curve of every layer.

    The cost is one pass over the inputs for each layer and grid point.

    Args:
        module: unchanged; its removed weights are zero.
        inputs: positional arguments of the network, one tuple a batch.
        masks: the layers, and what is left of each.
        macs: of each layer.
        grid: steps between a whole and an empty layer.
        mode: "mean" averages the squared difference over samples and logits, "worst" takes the
            sample whose mean over logits is largest.
        cap: a point of its own on each curve: the largest share that :func:`allocate` takes, which
            a coarse grid would miss by a step.

    Raises:
        InputError: if there are no inputs.
    """
    if not inputs or grid < 1:
        raise InputError("rate-distortion curves need calibration inputs and a grid of 1 or more")
    kept: dict[str, np.ndarray] = {}
    distortion: dict[str, np.ndarray] = {}
    size = {name: mask.numel() for name, mask in masks.kept.items()}
    with evaluating(module), progress() as bar:
        device = device_of(module)
        batches = [to_device(batch, device) for batch in inputs]
        before = [logits_of(module(*batch)).flatten(1) for batch in batches]
        shown = bar.add_task("measuring rate-distortion curves", total=len(size) * (grid + 1))
        for name, mask in masks.kept.items():
            weight = module.get_parameter(name)
            flat = weight.data.view(-1)
            saved = flat.clone()
            alive = mask.flatten().nonzero().flatten()
            # The smallest first; a stable order, so that ties go by index as in the final masks.
            order = alive[torch.argsort(saved[alive].abs(), stable=True)]
            gone = size[name] - len(alive)
            counts, values, done = [len(alive)], [0.0], 0
            ends = {step * size[name] // grid for step in range(1, grid + 1)}
            ends.add(size[name] - math.ceil(size[name] * (1.0 - cap) - 1e-9))
            try:
                for end in sorted(ends):
                    remove = end - gone
                    bar.advance(shown)
                    if remove <= done:
                        continue
                    flat[order[done:remove]] = 0.0
                    done = remove
                    counts.append(len(alive) - remove)
                    values.append(_distortion(module, batches, before, mode))
            finally:
                flat.copy_(saved)
            kept[name] = np.array(counts)
            distortion[name] = np.array(values)
    return Curves(kept, distortion, size, dict(macs))


def _distortion(
    module: nn.Module, batches: Sequence[tuple[Any, ...]], before: Sequence[Tensor], mode: Mode
) -> float:
    squares = torch.cat(
        [
            (logits_of(module(*batch)).flatten(1) - old).double().square().mean(1)
            for batch, old in zip(batches, before, strict=True)
        ]
    )
    return float(squares.mean() if mode == "mean" else squares.max())


def output_distortion(
    module: nn.Module,
    reference: nn.Module,
    inputs: Sequence[tuple[Any, ...]],
    mode: Mode = "mean",
) -> float:
    """Squared difference of two networks' outputs, as the curves measure it."""
    with evaluating(reference):
        before = [logits_of(reference(*batch)).flatten(1) for batch in inputs]
    with evaluating(module):
        return _distortion(module, inputs, before, mode)


def allocate(
    curves: Curves,
    budget: int,
    *,
    constraint: Literal["weights", "macs"] = "weights",
    method: Literal["dp", "lagrange"] = "dp",
    cap: float = 0.99,
) -> dict[str, int]:
    """The weights that each layer keeps so that the summed distortion is least.

    Args:
        curves: of all layers.
        budget: weights (or MACs) that may stay in all.
        constraint: what the budget counts.
        method: "dp" (exact up to :data:`EXACT`) or "lagrange".
        cap: largest share that a layer may lose, unless its curve is zero throughout.

    Raises:
        BudgetError: if the budget is below what the cap leaves.
    """
    losses, costs, choices = [], [], []
    for name, counts in curves.kept.items():
        values = curves.distortion[name]
        allowed = counts >= (1.0 - cap) * curves.size[name] - 1e-9
        if not values.any():
            allowed = np.ones_like(allowed)
        # A layer of which the cap would leave nothing to choose stays as it is.
        allowed[0] = True
        each = 1.0 if constraint == "weights" else curves.macs[name] / curves.size[name]
        choices.append(counts[allowed])
        losses.append(values[allowed])
        costs.append(np.ceil(counts[allowed] * each).astype(np.int64))
    if method == "lagrange":
        chosen = lagrangian(losses, costs, budget)
    else:
        chosen = knapsack(losses, costs, budget, units=None if budget <= EXACT else UNITS)
    return {n: int(c[i]) for n, c, i in zip(curves.kept, choices, chosen, strict=True)}


def calibration_inputs(
    task: Task,
    *,
    samples: int,
    source: Literal["data", "noise"],
    seed: int,
    batch_size: int = 256,
) -> list[tuple[Any, ...]]:
    """Inputs that the curves are measured on.

    Args:
        task: training inputs come from it.
        samples: how many.
        source: "data", or "noise": standard normal inputs of the same shape, which need no data.
        seed: of the choice or of the noise.
        batch_size: samples a batch.
    """
    if samples < 1:
        raise InputError(f"calibration needs 1 sample or more, not {samples}")
    if source == "noise":
        generator = torch.Generator().manual_seed(seed_of("noise", seed))
        shapes = [tuple(x.shape[1:]) for x in task.example_inputs]
        if not all(x.is_floating_point() for x in task.example_inputs):
            raise InputError("noise is no input of a network that takes tokens; calibrate on data")
        return [
            tuple(
                torch.randn(min(batch_size, samples - at), *shape, generator=generator)
                for shape in shapes
            )
            for at in range(0, samples, batch_size)
        ]
    size = min(batch_size, samples)
    batches = task.batches("train", batch_size=size, seed=seed, shuffle=True)
    found = [task.inputs(b) for b in itertools.islice(batches, -(-samples // size))]
    rest = samples - size * (len(found) - 1)
    found[-1] = tuple(x[:rest] for x in found[-1])
    return found


def rate_distortion(
    network: Network,
    task: Task,
    *,
    sparsity: float = 0.9,
    rounds: int = 5,
    grid: int = 100,
    mode: Literal["mean", "worst"] = "mean",
    calibration: Literal["data", "noise"] = "data",
    samples: int = 1024,
    constraint: Literal["weights", "macs"] = "weights",
    method: Literal["dp", "lagrange"] = "dp",
    cap: float = 0.99,
    skip: Collection[str] = (),
    epochs: int = 10,
    batch_size: int = 128,
    lr: float = 0.02,
    seed: int = 0,
    checkpoint: Path | None = None,
    cpu: bool = False,
) -> Network:
    """Removes single weights, each layer's share chosen by rate-distortion (a step of a recipe).

    Args:
        network: trained; unchanged.
        task: calibrates and trains.
        sparsity: share of the weights (or, with ``constraint="macs"``, of the MACs) that goes.
        rounds: of measuring, pruning and training; the same share of the rest goes in each.
        grid: points of each curve; a round costs layers x grid passes over the calibration inputs.
        mode: see :func:`rd_curves`.
        calibration: "data" or "noise".
        samples: calibration inputs.
        constraint: what is limited.
        method: "dp" or "lagrange".
        cap: largest share that one layer loses.
        skip: names of parameters or modules that stay dense.
        epochs: of training, over all rounds.
        batch_size: samples a batch.
        lr: learning rate at the start of each round.
        seed: of calibration inputs and data order.
        checkpoint: file beside which each round keeps its state.
        cpu: stay on the CPU although there is a GPU.

    Returns:
        The sparse network; its record has the predicted and the measured distortion of each round.

    Raises:
        InputError: if an option is out of range.
        BudgetError: if the cap leaves more than the sparsity allows.
        UnsupportedError: if the network cannot be traced or has nothing to prune.
    """
    if not 0.0 < cap <= 1.0 or grid < 2:
        raise InputError(f"rate-distortion needs a cap in (0, 1] and a grid of 2 or more, not "
                         f"{cap:g} and {grid}")  # fmt: skip
    inputs = calibration_inputs(task, samples=samples, source=calibration, seed=seed)
    macs = multiplied_weights(network.module, network.example_inputs)
    record: list[dict[str, Any]] = []

    def choose(now: nn.Module, masks: Masks, keep: int, number: int) -> Mapping[str, Tensor]:
        return chosen_by_curves(
            now, inputs, masks, macs, keep, grid=grid, mode=mode, constraint=constraint,
            method=method, cap=cap, record=record,
        )  # fmt: skip

    return in_rounds(
        network,
        task,
        choose,
        step="rate-distortion",
        options={
            "grid": grid, "mode": mode, "calibration": calibration, "samples": samples,
            "constraint": constraint, "method": method, "cap": cap,
        },
        sparsity=sparsity,
        rounds=rounds,
        retraining=Retraining(epochs=epochs, batch_size=batch_size, lr=lr, cpu=cpu),
        skip=skip,
        seed=seed,
        checkpoint=checkpoint,
        report={"curves": record},
    )  # fmt: skip


def chosen_by_curves(
    module: nn.Module,
    inputs: Sequence[tuple[Any, ...]],
    masks: Masks,
    macs: Mapping[str, int],
    keep: int,
    *,
    grid: int = 100,
    mode: Mode = "mean",
    constraint: Literal["weights", "macs"] = "weights",
    method: Literal["dp", "lagrange"] = "dp",
    cap: float = 0.99,
    record: list[dict[str, Any]] | None = None,
) -> dict[str, Tensor]:
    """One round: curves, allocation, and the masks of what stays.

    Args:
        module: unchanged.
        inputs: calibration inputs.
        masks: what is left.
        macs: of each layer.
        keep: weights that stay; with ``constraint="macs"`` the same share of the MACs.
        grid: points of each curve.
        mode: see :func:`rd_curves`.
        constraint: what is limited.
        method: see :func:`allocate`.
        cap: see :func:`allocate`.
        record: gets what was predicted and what came out.
    """
    curves = rd_curves(module, inputs, masks, macs, grid=grid, mode=mode, cap=cap)
    budget = keep
    if constraint == "macs":
        budget = int(keep / masks.total * sum(macs[name] for name in masks.kept))
    counts = allocate(curves, budget, constraint=constraint, method=method, cap=cap)
    scores = {name: module.get_parameter(name).detach().abs() for name in masks.kept}
    kept = keep_in_each(scores, masks.kept, counts)
    if record is not None:
        record.append(
            {
                "predicted": curves.at(counts),
                "joint": _joint(module, inputs, kept, mode),
                "kept": counts,
                "monotone": curves.monotone(),
            }
        )
    return kept


def _joint(
    module: nn.Module, inputs: Sequence[tuple[Any, ...]], kept: Mapping[str, Tensor], mode: Mode
) -> float:
    """The distortion when all layers are pruned together."""
    saved = {name: module.get_parameter(name).data.clone() for name in kept}
    with evaluating(module):
        before = [logits_of(module(*batch)).flatten(1) for batch in inputs]
        try:
            for name, mask in kept.items():
                module.get_parameter(name).data.masked_fill_(~mask, 0.0)
            return _distortion(module, inputs, before, mode)
        finally:
            for name, value in saved.items():
                module.get_parameter(name).data.copy_(value)
