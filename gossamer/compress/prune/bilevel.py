"""BiP: find the mask and the weights under it together, by bi-level optimization.

The upper level chooses which weights stay, the lower level trains those that do. Mask m and weights
w enter the loss as z = m w only, so the implicit gradient of the lower solution needs no Hessian::

    dl/dm = (w - m g / gamma) g,    g = dl/dz at z = m w

and a mask step costs one pass forward and one back: about the price of one more retraining,
whatever the sparsity. Hydra (scores learned under frozen weights, then fine-tuning) is the nearest
relative.

Sources: Zhang et al., "Advancing Model Pruning via Bi-level Optimization", NeurIPS 2022,
arXiv:2210.04092 (eq. 7 and algorithm A1) and the authors' code where the paper is silent; Hydra:
Sehwag et al., NeurIPS 2020, arXiv:2002.10509.

What differs from the authors' code, each on purpose: the implicit term is the formula's (there the
gradients of all parameters are multiplied, which is another term); scores are a copy of the weights
(there they share storage; ``tie_scores=True`` does that); decay and momentum leave weights outside
of the mask alone; every layer keeps at least one weight.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.compress.prune.groups import Groups
from gossamer.compress.prune.rewind import Retraining
from gossamer.compress.prune.sparsify import check_sparsity, pruned_so_far, sparse_network
from gossamer.compress.prune.weight_scores import largest
from gossamer.core import surgery
from gossamer.core.dependency import analyse
from gossamer.core.errors import InputError
from gossamer.core.fit import Log, Rule, cosine, fit
from gossamer.core.network import Network
from gossamer.core.task import Batch, Task, seed_of
from gossamer.parts.batchnorm import recalibrate_batchnorm
from gossamer.parts.masks import Masks
from gossamer.parts.straight_through import straight_through
from gossamer.parts.swap import swapped

Granularity = Literal["weight", "filter", "channel"]
Selection = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""Magnitudes of scores by name to masks (0 or 1, float) of the same shapes."""


def implicit_mask_gradient(weight: Tensor, mask: Tensor, slope: Tensor, lr2: float) -> Tensor:
    """dl/dm of the bi-level problem: (w - lr2 m g) g.

    Args:
        weight: w, at the lower optimum.
        mask: m.
        slope: g = dl/dz at z = m w.
        lr2: 1 / gamma.
    """
    return (weight - lr2 * mask * slope) * slope


def weights_kept(count: int, sparsity: float) -> int:
    """How many of ``count`` weights stay: the density times the count, rounded up."""
    return count - int(sparsity * count + 1e-9)


def by_weight(sparsity: float, *, least: int = 1) -> Selection:
    """The largest scores of all layers together; each layer keeps ``least`` at the least."""

    def select(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        flat = []
        for score in scores.values():
            values = score.detach().flatten()
            if least:
                values = values.masked_fill(largest(values, min(least, len(values))), torch.inf)
            flat.append(values)
        joined = torch.cat(flat)
        kept = largest(joined, weights_kept(len(joined), sparsity))
        pieces = kept.split([len(values) for values in flat])
        return {
            name: piece.view_as(score).to(score.dtype)
            for (name, score), piece in zip(scores.items(), pieces, strict=True)
        }

    return select


def by_unit(groups: Groups, sparsity: float) -> Selection:
    """The units of largest score in each family: whole filters or whole input channels.

    A unit's score is the root of the sum of squares over all its entries. Units of one family
    (those that a shortcut ties, say) stay or go together, so what goes can be cut out.
    """

    def select(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        squares = groups.sum([scores[entry.name].detach().square() for entry in groups.entries])
        kept = torch.cat(
            [largest(part, weights_kept(len(part), sparsity)) for part in groups.split(squares)]
        )
        # Indices that belong to no unit stay.
        values = torch.cat([kept.to(squares.dtype), torch.ones(1, device=squares.device)])
        masks = {name: torch.ones_like(score) for name, score in scores.items()}
        for entry in groups.entries:
            masks[entry.name] = masks[entry.name] * entry.spread(values)
        return masks

    return select


class ScoredMasks(Rule):
    """A rule whose masks are made of scores.

    Attributes:
        names: of the masked parameters.
        scores: of each of them, of its shape.
        select: magnitudes of scores to masks.
    """

    names: list[str]
    scores: nn.ParameterList
    select: Selection

    def masks(self) -> dict[str, Tensor]:
        """The mask that the scores make now, float 0 and 1."""
        return self.select(
            {name: s.detach().abs() for name, s in zip(self.names, self.scores, strict=True)}
        )


class BilevelPruning(ScoredMasks):
    """One step on the weights under the mask, one on the scores that make it.

    Batches are dicts: "lower" for the weights, "upper" for the mask.

    Args:
        network: pre-trained; trained in place.
        task: gives the loss.
        names: of the masked parameters.
        select: scores to masks.
        lr: of the weights (SGD, momentum, along half a cosine).
        momentum: of both.
        weight_decay: gamma of the lower problem, on the weights inside of the mask.
        mask_lr: of the scores (SGD), a tenth of it from half of the run, a hundredth from three
            quarters.
        lr2: 1 / gamma of the implicit term; 0 alternates the two levels without it.
        tie_scores: scores and weights are one tensor.
    """

    def __init__(
        self,
        network: nn.Module,
        task: Task,
        names: Sequence[str],
        select: Selection,
        *,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        mask_lr: float = 0.1,
        lr2: float = 1e-4,
        tie_scores: bool = False,
    ) -> None:
        self.network = network
        self.task = task
        self.names = list(names)
        self.select = select
        self.lr = lr
        self.weight_decay = weight_decay
        self.mask_lr = mask_lr
        self.lr2 = lr2
        weights = [network.get_parameter(name) for name in names]
        self.scores = nn.ParameterList(
            weights if tie_scores else [nn.Parameter(w.detach().clone()) for w in weights]
        )
        trained = [p for p in network.parameters() if p.requires_grad]
        self.lower = torch.optim.SGD(trained, lr=lr, momentum=momentum)
        self.upper = torch.optim.SGD(self.scores.parameters(), lr=mask_lr, momentum=momentum)

    def step(self, batch: Batch) -> Log:
        logged = self._train_weights(batch["lower"])
        if self.mask_lr:
            self._train_mask(batch["upper"])
        return logged

    def _train_weights(self, batch: Batch) -> Log:
        masks = self.masks()
        rate = self.lr * cosine(self.run.fraction)
        for group in self.lower.param_groups:
            group["lr"] = rate
        self.lower.zero_grad(set_to_none=True)
        masked = {n: self.network.get_parameter(n) * masks[n] for n in self.names}
        with swapped(self.network, masked), self.run.accelerator.autocast():
            loss = self.task.loss(self.network, batch)
        self.backward(loss)
        before = {}
        with torch.no_grad():
            for name, parameter in self.network.named_parameters():
                if parameter.grad is None or parameter.ndim < 2:
                    continue
                mask = masks.get(name)
                decay = parameter if mask is None else parameter * mask
                parameter.grad.add_(decay, alpha=self.weight_decay)
                if mask is not None:
                    before[name] = parameter.detach().clone()
        self.lower.step()
        with torch.no_grad():
            # Momentum would move weights that have just left the mask; they wait as they are.
            for name, old in before.items():
                parameter = self.network.get_parameter(name)
                parameter.copy_(torch.where(masks[name] > 0, parameter, old))
        return {"loss": loss.detach()}

    def _train_mask(self, batch: Batch) -> None:
        masks = self.masks()
        rate = self.mask_lr * (1.0, 0.1, 0.01)[
            (self.run.fraction >= 0.5) + (self.run.fraction >= 0.75)
        ]  # fmt: skip
        for group in self.upper.param_groups:
            group["lr"] = rate
        product = {
            n: (self.network.get_parameter(n).detach() * masks[n]).requires_grad_()
            for n in self.names
        }
        with swapped(self.network, product), self.run.accelerator.autocast():
            loss = self.task.loss(self.network, batch)
        slopes = torch.autograd.grad(loss, list(product.values()))
        with torch.no_grad():
            for name, score, slope in zip(self.names, self.scores, slopes, strict=True):
                weight = self.network.get_parameter(name)
                gradient = implicit_mask_gradient(weight, masks[name], slope, self.lr2)
                # dm/d|s| is taken as 1 everywhere: weights outside of the mask must be able to
                # come back.
                score.grad = gradient * torch.sign(score)
        self.upper.step()


class ScoreLearning(ScoredMasks):
    """Hydra's search: the weights are frozen, scores learn which of them stay.

    Args:
        network: pre-trained; its weights do not change.
        task: gives the loss.
        names: of the masked parameters.
        select: scores to masks.
        lr: of the scores (SGD with momentum .9, along half a cosine).
    """

    def __init__(
        self,
        network: nn.Module,
        task: Task,
        names: Sequence[str],
        select: Selection,
        *,
        lr: float = 0.1,
    ) -> None:
        self.network = network
        self.task = task
        self.names = list(names)
        self.select = select
        self.lr = lr
        # Scores in proportion to the weights, scaled as a fresh layer would be.
        scaled = []
        for name in names:
            weight = network.get_parameter(name).detach()
            bound = math.sqrt(6.0 / max(1, weight[0].numel()))
            scaled.append(nn.Parameter(bound * weight / weight.abs().max().clamp(min=1e-12)))
        self.scores = nn.ParameterList(scaled)
        self.optimizer = torch.optim.SGD(self.scores.parameters(), lr=lr, momentum=0.9)

    def step(self, batch: Batch) -> Log:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * cosine(self.run.fraction)
        self.optimizer.zero_grad(set_to_none=True)
        masks = self.masks()
        weights = {
            n: self.network.get_parameter(n).detach() * straight_through(s.abs(), masks[n])
            for n, s in zip(self.names, self.scores, strict=True)
        }
        with swapped(self.network, weights), self.run.accelerator.autocast():
            loss = self.task.loss(self.network, batch)
        self.backward(loss)
        self.optimizer.step()
        return {"loss": loss.detach()}


def bip(
    network: Network,
    task: Task,
    *,
    sparsity: float = 0.9,
    granularity: Literal["weight", "filter", "channel"] = "weight",
    epochs: int = 30,
    batch_size: int = 128,
    lr: float = 0.1,
    weight_decay: float = 1e-4,
    mask_lr: float = 0.1,
    lr2: float = 1e-4,
    tie_scores: bool = False,
    least: int = 1,
    recalibrate: int = 512,
    skip: Collection[str] = (),
    seed: int = 0,
    checkpoint: Path | None = None,
    cpu: bool = False,
) -> Network:
    """Bi-level pruning (a step of a recipe): mask and weights in one training.

    Args:
        network: trained; unchanged.
        task: both levels draw batches of its training split, in orders of their own.
        sparsity: share of the weights (or of the units of each family) that goes.
        granularity: "weight" leaves zeros; "filter" and "channel" score units by the weights that
            make them or that read them, and cut them out.
        epochs: of both levels together.
        batch_size: samples a batch.
        lr: of the weights.
        weight_decay: gamma of the lower problem.
        mask_lr: of the scores; 0 keeps the mask of the largest weights (one-shot pruning).
        lr2: factor of the implicit term; 0 alternates without it.
        tie_scores: scores and weights are one tensor, as in the authors' code.
        least: weights that each layer keeps at the least.
        recalibrate: training samples from which batch-norm statistics are computed at the end.
        skip: names of parameters or modules that stay dense.
        seed: of the data orders.
        checkpoint: file that holds the run's state.
        cpu: stay on the CPU although there is a GPU.

    Returns:
        The sparse network, or the smaller one.

    Raises:
        InputError: if an option is out of range.
        UnsupportedError: if the network cannot be traced or has nothing to prune.
    """
    check_sparsity(sparsity)
    _check(granularity, epochs, lr, mask_lr, lr2)
    module = copy.deepcopy(network.module).cpu()
    options = {
        "sparsity": sparsity, "granularity": granularity, "epochs": epochs,
        "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay, "mask_lr": mask_lr,
        "lr2": lr2, "tie_scores": tie_scores, "least": least, "recalibrate": recalibrate,
        "skip": list(skip), "seed": seed,
    }  # fmt: skip

    def run(names: Sequence[str], select: Selection) -> dict[str, Tensor]:
        rule = BilevelPruning(
            module, task, names, select, lr=lr, weight_decay=weight_decay, mask_lr=mask_lr,
            lr2=lr2, tie_scores=tie_scores,
        )  # fmt: skip
        fit(
            rule, {"lower": task, "upper": task}, epochs=epochs, batch_size=batch_size, seed=seed,
            checkpoint=checkpoint, cpu=cpu, title="bi-level pruning",
        )  # fmt: skip
        masks = rule.masks()
        module.cpu()
        return {name: mask.cpu() > 0 for name, mask in masks.items()}

    return _masked(
        network, task, module, run, step="bip", options=options, sparsity=sparsity,
        granularity=granularity, least=least, skip=skip, recalibrate=recalibrate, seed=seed,
    )  # fmt: skip


def hydra(
    network: Network,
    task: Task,
    *,
    sparsity: float = 0.9,
    granularity: Literal["weight", "filter", "channel"] = "weight",
    epochs: int = 30,
    batch_size: int = 128,
    lr: float = 0.02,
    weight_decay: float = 1e-4,
    mask_lr: float = 0.1,
    least: int = 1,
    recalibrate: int = 512,
    skip: Collection[str] = (),
    seed: int = 0,
    checkpoint: Path | None = None,
    cpu: bool = False,
) -> Network:
    """Scores learned under frozen weights, then fine-tuning (a step of a recipe).

    Args:
        network: trained; unchanged.
        task: its data.
        sparsity: share of the weights (or of the units of each family) that goes.
        granularity: as for :func:`bip`.
        epochs: half of them for the scores, half for fine-tuning.
        batch_size: samples a batch.
        lr: of fine-tuning.
        weight_decay: of fine-tuning.
        mask_lr: of the scores.
        least: weights that each layer keeps at the least.
        recalibrate: training samples from which batch-norm statistics are computed at the end.
        skip: names of parameters or modules that stay dense.
        seed: of the data order.
        checkpoint: file beside which both parts keep their state.
        cpu: stay on the CPU although there is a GPU.

    Raises:
        InputError: if an option is out of range.
        UnsupportedError: if the network cannot be traced or has nothing to prune.
    """
    check_sparsity(sparsity)
    _check(granularity, epochs, lr, mask_lr, 0.0)
    module = copy.deepcopy(network.module).cpu()
    options = {
        "sparsity": sparsity, "granularity": granularity, "epochs": epochs,
        "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay, "mask_lr": mask_lr,
        "least": least, "recalibrate": recalibrate, "skip": list(skip), "seed": seed,
    }  # fmt: skip

    def run(names: Sequence[str], select: Selection) -> dict[str, Tensor]:
        rule = ScoreLearning(module, task, names, select, lr=mask_lr)
        fit(
            rule, task, epochs=epochs // 2, batch_size=batch_size, seed=seed_of("scores", seed),
            checkpoint=checkpoint and checkpoint.with_suffix(".scores.state"), cpu=cpu,
            title="learning scores",
        )  # fmt: skip
        kept = {name: mask.cpu() > 0 for name, mask in rule.masks().items()}
        module.cpu()
        Retraining(
            epochs=epochs - epochs // 2, batch_size=batch_size, lr=lr, weight_decay=weight_decay,
            cpu=cpu,
        ).train(
            module, task, Masks(module, kept), seed=seed_of("fine-tune", seed),
            checkpoint=checkpoint and checkpoint.with_suffix(".tune.state"), title="fine-tuning",
        )  # fmt: skip
        return kept

    return _masked(
        network, task, module, run, step="hydra", options=options, sparsity=sparsity,
        granularity=granularity, least=least, skip=skip, recalibrate=recalibrate, seed=seed,
    )  # fmt: skip


def _check(granularity: str, epochs: int, lr: float, mask_lr: float, lr2: float) -> None:
    if granularity not in ("weight", "filter", "channel"):
        raise InputError(f"the granularity is weight, filter or channel, not {granularity!r:.40}")
    if epochs < 0 or lr <= 0 or mask_lr < 0 or lr2 < 0:
        raise InputError(
            "epochs, mask_lr and lr2 are 0 or more and lr is above 0, not "
            f"{epochs}, {mask_lr:g}, {lr2:g} and {lr:g}"
        )


def _masked(
    network: Network,
    task: Task,
    module: nn.Module,
    run: Callable[[Sequence[str], Selection], dict[str, Tensor]],
    *,
    step: str,
    options: Mapping[str, Any],
    sparsity: float,
    granularity: Granularity,
    least: int,
    skip: Collection[str],
    recalibrate: int,
    seed: int,
) -> Network:
    """Learns masks by ``run`` and makes the network that they leave."""
    if granularity == "weight":
        masks = pruned_so_far(network, module, skip=skip)
        first = {name: module.get_parameter(name).detach().abs() for name in masks.kept}
        select = by_weight(sparsity, least=least)
        start = select(first)
        kept = run(list(masks.kept), select)
        masks.narrow(kept)
        masks.hold_weights()
        _recalibrated(module, task, recalibrate, seed)
        return sparse_network(
            network, step, options, module, masks,
            {"overlap_with_largest": _overlap(start, kept)},
        )  # fmt: skip
    dependency = analyse(module, network.example_inputs)
    role = "producer" if granularity == "filter" else "consumer"
    groups = Groups.of(module, dependency, roles=(role,))
    names = list(dict.fromkeys(entry.name for entry in groups.entries))
    kept = run(names, by_unit(groups, sparsity))
    # Training may have moved the parameters; the groups hold those of before.
    dependency = analyse(module.eval(), network.example_inputs)
    groups = Groups.of(module, dependency, roles=(role,))
    gone = groups.sum([(~kept[entry.name]).to(torch.float32) for entry in groups.entries])
    size = groups.sum([torch.ones_like(kept[e.name], dtype=torch.float32) for e in groups.entries])
    with torch.no_grad():
        for name, mask in kept.items():
            module.get_parameter(name).masked_fill_(~mask, 0.0)
    _recalibrated(module, task, recalibrate, seed)
    # An entry that several families share may be masked by another; a unit goes if all of it is.
    removal = groups.removal(gone >= size)
    made = surgery.remove(module, dependency, removal, verify=True)
    cost = dependency.cost(removal)
    report = {
        "units": [groups.total, groups.total - int((gone >= size).sum())],
        "parameters": [dependency.graph.parameters, cost.parameters],
        "macs": [dependency.graph.macs, cost.macs],
        "rounds": [{"verified": bool(made.verified), "error": float(made.error)}],
    }
    return network.after(step, options, report, module=made.module.eval())


def _recalibrated(module: nn.Module, task: Task, samples: int, seed: int) -> None:
    if samples:
        size = min(128, samples)
        batches = task.batches("train", batch_size=size, seed=seed)
        recalibrate_batchnorm(
            module, (task.inputs(b) for b, _ in zip(batches, range(samples // size), strict=False))
        )
    module.eval()


def _overlap(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """Intersection over union of two masks."""
    both = sum(float(((before[n] > 0) & after[n]).sum()) for n in after)
    either = sum(float(((before[n] > 0) | after[n]).sum()) for n in after)
    return both / either if either else 1.0
