"""Activate while pruning: spend a little of each round on weights whose removal revives neurons.

In a ReLU network a neuron is dead for an input if its pre-activation is not positive. Of the
weights that a round of pruning removes, a small share is taken not by the method's own score but
for being negative and hardly moved by training: without it the pre-activation can only rise. Any
iterative method can be run that way; at the end of a round survivors are rewound.

Source: Liu, Ghosh, Tan and Motani, "AP: Selective Activation for De-sparsifying Pruned Neural
Networks", TMLR 2023, arXiv:2212.06145 (dynamic dead neuron rate: section 3; algorithm 1).

What differs from the authors' code, each on purpose: thresholds are counts over unique weights
(there weights are counted once for each bias), exactly as many weights go as asked, biases and
batch-norm scales are not pruned, and both contenders train once a round.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from gossamer.compress.prune.layer_allocation import ALLOCATIONS
from gossamer.compress.prune.rewind import Retraining, prune_and_retrain
from gossamer.compress.prune.sparsify import allocated, pruned_so_far, sparse_network
from gossamer.compress.prune.weight_scores import CRITERIA, Scores, keep_overall
from gossamer.compress.prune.wiring import Rectifier, Wiring
from gossamer.core.errors import InputError, UnsupportedError
from gossamer.core.network import Network
from gossamer.core.task import Task, evaluating, seed_of
from gossamer.parts.masks import Masks

Sign = Literal["negative", "positive", "any"]


@dataclass(frozen=True)
class DeadNeurons:
    """Shares of dead neurons, averaged over inputs; a convolution's every position is a neuron.

    Attributes:
        total: dead for an input.
        static: cut off: all weights that lead to it, or all that read it, are gone.
        dynamic: dead for an input though not cut off; ``total`` is the sum of the two.
        layers: (static, dynamic) of each ReLU, by its name in the trace.
    """

    total: float
    static: float
    dynamic: float
    layers: Mapping[str, tuple[float, float]]


def dead_neuron_rate(
    module: nn.Module, inputs: Iterable[tuple[Any, ...]], masks: Masks | None = None
) -> DeadNeurons:
    """The rate of dead neurons of a ReLU network, in evaluation mode.

    A neuron that is cut off counts as dead for every input, whatever its bias makes of it. Where
    the trace does not tell what is around a ReLU (grouped convolutions, attention), none of its
    neurons counts as cut off.

    Args:
        module: the network; after batch normalisation, if it has that, is what counts.
        inputs: positional arguments, one tuple a batch.
        masks: which weights are there; without them, those that are not zero.

    Raises:
        UnsupportedError: if the network has no ReLU or cannot be traced.
        InputError: if there are no inputs.
    """
    batches = list(inputs)
    if not batches:
        raise InputError("the rate of dead neurons needs inputs")
    wiring = Wiring.of(module, _pair(batches[0]))
    if not wiring.rectifiers:
        raise UnsupportedError("the network has no ReLU whose neurons could be dead")
    there = _present(wiring, masks)
    cut = {r.node: _cut_off(r, there) for r in wiring.rectifiers}
    names = set(cut)
    dead: dict[str, Tensor] = {}
    neurons: dict[str, int] = {}

    class Watching(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n.name in names:
                # Rectified in place or not, a dead neuron answers zero.
                value = result.detach()
                per_channel = (value <= 0).transpose(0, 1).flatten(1).double()
                dead[n.name] = dead.get(n.name, 0) + per_channel.sum(1)
                neurons[n.name] = neurons.get(n.name, 0) + per_channel.shape[1]
            return result

    network = wiring.graph.network()
    with evaluating(network):
        for batch in batches:
            Watching(network.program).run(*batch, False)
    layers: dict[str, tuple[float, float]] = {}
    static_sum = dynamic_sum = count = 0.0
    for name, sums in dead.items():
        gone = cut[name]
        gone = torch.zeros(len(sums), dtype=torch.bool) if gone is None else gone
        static = float(gone.sum()) * neurons[name]
        dynamic = float(sums[~gone].sum())
        size = len(sums) * neurons[name]
        layers[name] = (static / size, dynamic / size)
        static_sum, dynamic_sum, count = static_sum + static, dynamic_sum + dynamic, count + size
    static, dynamic = static_sum / count, dynamic_sum / count
    return DeadNeurons(static + dynamic, static, dynamic, layers)


def _pair(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Inputs of a batch of at least two, as tracing wants them."""
    return tuple(
        x if not isinstance(x, Tensor) or len(x) > 1 else torch.cat([x, x]) for x in inputs
    )


def _present(wiring: Wiring, masks: Masks | None) -> dict[str, Tensor]:
    known = {} if masks is None else masks.kept
    return {
        name: known[name].cpu() if name in known else wiring.graph.tensors[name].detach().cpu() != 0
        for name in wiring.before
    }


def _cut_off(rectifier: Rectifier, there: Mapping[str, Tensor]) -> Tensor | None:
    """Which channels have no weight leading in or none reading them, ``[channels]``."""
    result: Tensor | None = None
    if rectifier.producers:
        rows = [there[name].flatten(1).any(1) for name in rectifier.producers]
        result = ~torch.stack(rows).any(0)
    if rectifier.consumers:
        read = [
            there[wire.weight].transpose(0, 1).flatten(1).any(1).view(-1, wire.positions).any(1)
            for wire in rectifier.consumers
        ]
        unread = ~torch.stack(read).any(0)
        result = unread if result is None else result | unread
    return result


def movement(module: nn.Module, start: Mapping[str, Tensor], names: Iterable[str]) -> Scores:
    """|w_t - w_0|: how far training moved each weight from ``start``."""
    return {n: (module.get_parameter(n).detach().cpu() - start[n].cpu()).abs() for n in names}


def activating(
    module: nn.Module,
    masks: Mapping[str, Tensor],
    moved: Mapping[str, Tensor],
    count: int,
    *,
    sign: Sign = "negative",
) -> Scores:
    """The AP metric: masks without the ``count`` weights of one sign that moved least.

    Args:
        module: its weights say which sign they have.
        masks: what is alive.
        moved: see :func:`movement`.
        count: how many go (or as many as there are of that sign).
        sign: "negative" is the method; "positive" is the control that should do the opposite.

    Returns:
        Bool masks of what stays. Of weights that moved equally little the first go.
    """
    weights = {name: module.get_parameter(name).detach().cpu() for name in masks}
    candidates = {
        name: masks[name].cpu()
        & (weight < 0 if sign == "negative" else weight > 0 if sign == "positive" else weight != 0)
        for name, weight in weights.items()
    }
    number = sum(int(mask.sum()) for mask in candidates.values())
    stays = keep_overall(moved, candidates, number - min(count, number))
    return {name: masks[name].cpu() & (~candidates[name] | stays[name]) for name in masks}


def activating_pruning(
    network: Network,
    task: Task,
    *,
    sparsity: float = 0.9,
    rate: float = 0.2,
    ap_rate: float = 0.02,
    criterion: str = "magnitude",
    allocation: str = "global",
    rewind: Literal["start", "none"] = "start",
    ap_rounds: Literal["all", "last half"] = "all",
    sign: Literal["negative", "positive", "any"] = "negative",
    skip: Collection[str] = (),
    epochs: int = 10,
    batch_size: int = 128,
    lr: float = 0.1,
    seed: int = 0,
    checkpoint: Path | None = None,
    cpu: bool = False,
) -> Network:
    """Iterative pruning with a share for activation (a step of a recipe).

    Each round trains, removes ``rate`` of the weights that are left (``rate - ap_rate`` by the
    criterion, ``ap_rate`` by the AP metric) and rewinds; the last sparsity is trained once more.

    Args:
        network: its weights are where training starts; unchanged.
        task: its data.
        sparsity: share of the weights that goes; the number of rounds follows from it.
        rate: share of what is left that goes in a round.
        ap_rate: the part of ``rate`` that the AP metric takes; 0 is the criterion alone.
        criterion: a name of :data:`~.weight_scores.CRITERIA`.
        allocation: a name of :data:`~.layer_allocation.ALLOCATIONS`.
        rewind: "start" sets survivors back to the weights that were given, "none" trains on.
        ap_rounds: "last half" leaves the first half of the rounds to the criterion (AP-Lite; the
            paper does not say which rounds those are).
        sign: which weights the AP metric takes; anything but "negative" is a control.
        skip: names of parameters or modules that stay dense.
        epochs: of training in each round.
        batch_size: samples a batch.
        lr: learning rate at the start of each round; falls to 0 along half a cosine.
        seed: of the data order.
        checkpoint: file beside which each round keeps its state.
        cpu: stay on the CPU although there is a GPU.

    Returns:
        The sparse network; its record has the dead neuron rates of each round, where there are
        ReLUs.

    Raises:
        InputError: if an option is out of range.
        UnsupportedError: if the network cannot be traced or has nothing to prune.
    """
    if not 0.0 < rate < 1.0 or not 0.0 <= ap_rate <= rate:
        raise InputError(
            f"a round removes a share in (0, 1), of which activation is a part, not {rate:g} and "
            f"{ap_rate:g}"
        )
    if not 0.0 < sparsity < 1.0:
        raise InputError(f"the sparsity is a share in (0, 1), not {sparsity:g}")
    for name, known in ((criterion, CRITERIA), (allocation, ALLOCATIONS)):
        if name not in known:
            raise InputError(f"there is no {name}; there are {', '.join(known)}")
    module = copy.deepcopy(network.module).cpu()
    masks = pruned_so_far(network, module, skip=skip)
    training = Retraining(epochs=epochs, batch_size=batch_size, lr=lr, cpu=cpu)
    training.train(
        module, task, masks, seed=seed_of("first", seed),
        checkpoint=checkpoint and checkpoint.with_suffix(".first.state"),
    )  # fmt: skip
    plan = Plan(
        rate=rate, ap_rate=ap_rate, criterion=criterion, allocation=allocation, sign=sign,
        floor=round(masks.total * (1.0 - sparsity)),
    )  # fmt: skip
    rounds = plan.rounds(masks)
    start = {name: tensor.clone() for name, tensor in network.module.state_dict().items()}
    sample = [task.inputs(b) for b in task.batches("validation", batch_size=256)]

    def observe(now: nn.Module, masks: Masks) -> dict[str, Any]:
        try:
            rates = dead_neuron_rate(now, sample, masks)
        except UnsupportedError:
            return {}
        return {"dead_static": rates.static, "dead_dynamic": rates.dynamic}

    first = rounds // 2 if ap_rounds == "last half" else 0
    records = run_rounds(
        module, task, masks, plan, rounds=rounds, training=training, start=start,
        rewind=rewind == "start", ap_from=first, seed=seed, checkpoint=checkpoint,
        observe=observe,
    )  # fmt: skip
    options = {
        "sparsity": sparsity, "rate": rate, "ap_rate": ap_rate, "criterion": criterion,
        "allocation": allocation, "rewind": rewind, "ap_rounds": ap_rounds, "sign": sign,
        "skip": list(skip), "epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed,
    }  # fmt: skip
    return sparse_network(
        network, "activating-pruning", options, module, masks, {"rounds_run": records}
    )


@dataclass(frozen=True)
class Plan:
    """What a round removes.

    Attributes:
        rate: share of what is left.
        ap_rate: the part of it that is taken by the AP metric.
        criterion: takes the rest.
        allocation: shares the rest among layers.
        sign: of the weights that the AP metric takes.
        floor: weights that are left at the end.
    """

    rate: float = 0.2
    ap_rate: float = 0.02
    criterion: str = "magnitude"
    allocation: str = "global"
    sign: Sign = "negative"
    floor: int = 0

    def rounds(self, masks: Masks) -> int:
        """Rounds until no more than ``floor`` weights are left."""
        left, count = masks.remaining, 0
        while left > self.floor:
            left -= max(1, min(round(self.rate * left), left - self.floor))
            count += 1
        return count

    def kept(
        self, module: nn.Module, masks: Masks, start: Mapping[str, Tensor], task: Task,
        seed: int, *, activate: bool = True,
    ) -> Scores:  # fmt: skip
        """What stays after a round.

        Args:
            module: trained since ``start``.
            masks: what was alive in it.
            start: its state when the round's training began.
            task: for criteria that need data.
            seed: of random scores.
            activate: whether the AP metric has its part.
        """
        before = masks.remaining
        remove = max(1, min(round(self.rate * before), before - self.floor))
        own = min(int(self.ap_rate * before), remove) if activate else 0
        names = list(masks.kept)
        scores = CRITERIA[self.criterion](module, names, task, seed)
        kept = allocated(module, scores, masks, self.allocation, before - (remove - own))
        if own:
            kept = activating(module, kept, movement(module, start, names), own, sign=self.sign)
        return dict(kept)


def run_rounds(
    module: nn.Module,
    task: Task,
    masks: Masks,
    plan: Plan,
    *,
    rounds: int,
    training: Retraining,
    start: Mapping[str, Tensor],
    rewind: bool = True,
    ap_from: int = 0,
    seed: int = 0,
    checkpoint: Path | None = None,
    observe: Callable[[nn.Module, Masks], dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Rounds of pruning by a plan, in place; ``module`` has been trained from ``start``."""
    began = dict(start)

    def choose(now: nn.Module, masks: Masks, number: int) -> Mapping[str, Tensor]:
        now.eval()
        kept = plan.kept(
            now, masks, began, task, seed_of("score", seed, number), activate=number >= ap_from
        )
        if not rewind:
            # The next round's training begins where this one ends.
            began.update({n: t.detach().clone() for n, t in now.state_dict().items()})
        return kept

    return prune_and_retrain(
        module, task, masks, choose, rounds=rounds, retraining=training,
        rewind=start if rewind else None, seed=seed, checkpoint=checkpoint, observe=observe,
    )  # fmt: skip
