"""Prune single weights by a criterion: the classic unstructured ways, as a step of a recipe.

Criterion (how much a weight matters), allocation (how many each layer keeps), schedule (how much is
gone after each round) and rewinding are chosen by name. Zeros make the stored network smaller, not
faster: there is no dense kernel that skips them, and the report says so by measuring it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.compress.prune.layer_allocation import ALLOCATIONS
from gossamer.compress.prune.rewind import Retraining, prune_and_retrain
from gossamer.compress.prune.schedule import SCHEDULES
from gossamer.compress.prune.weight_scores import CRITERIA, Scores, keep_in_each
from gossamer.core.errors import InputError
from gossamer.core.network import Network
from gossamer.core.task import Task, seed_of
from gossamer.parts.masks import Masks, multiplied_weights


def sparsify(
    network: Network,
    task: Task,
    *,
    sparsity: float = 0.9,
    criterion: str = "magnitude",
    allocation: str = "global",
    schedule: str = "iterative",
    rounds: int = 5,
    rewind: Literal["none", "start"] = "none",
    skip: Collection[str] = (),
    epochs: int = 10,
    batch_size: int = 128,
    lr: float = 0.02,
    seed: int = 0,
    checkpoint: Path | None = None,
    cpu: bool = False,
) -> Network:
    """Removes single weights in rounds, training with masks on after each.

    Args:
        network: trained; unchanged.
        task: its data.
        sparsity: share of the weights (of all layers that are pruned) that goes.
        criterion: a name of :data:`~.weight_scores.CRITERIA`.
        allocation: a name of :data:`~.layer_allocation.ALLOCATIONS`.
        schedule: a name of :data:`~.schedule.SCHEDULES`: how much is gone after each round.
        rounds: of pruning and training.
        rewind: "start" sets the weights that stay back to what they were before this step.
        skip: names of parameters or modules that stay dense.
        epochs: of training, over all rounds.
        batch_size: samples a batch.
        lr: learning rate at the start of each round; falls to 0 along half a cosine.
        seed: of random scores, batches and data order.
        checkpoint: file beside which each round keeps its state.
        cpu: stay on the CPU although there is a GPU.

    Returns:
        The sparse network, in packed form too.

    Raises:
        InputError: if a name is unknown or the sparsity is not in [0, 1).
        UnsupportedError: if the network cannot be traced or has nothing to prune.
    """
    for name, known in (
        (criterion, CRITERIA), (allocation, ALLOCATIONS), (schedule, SCHEDULES)
    ):  # fmt: skip
        if name not in known:
            raise InputError(f"there is no {name}; there are {', '.join(known)}")

    def choose(now: nn.Module, masks: Masks, keep: int, number: int) -> Mapping[str, Tensor]:
        scores = CRITERIA[criterion](now, list(masks.kept), task, seed_of("score", seed, number))
        return allocated(now, scores, masks, allocation, keep)

    return in_rounds(
        network,
        task,
        choose,
        step="sparsify",
        options={"criterion": criterion, "allocation": allocation, "rewind": rewind},
        sparsity=sparsity,
        schedule=schedule,
        rounds=rounds,
        retraining=Retraining(epochs=epochs, batch_size=batch_size, lr=lr, cpu=cpu),
        rewind=network.module.state_dict() if rewind == "start" else None,
        skip=skip,
        seed=seed,
        checkpoint=checkpoint,
    )


def in_rounds(
    network: Network,
    task: Task,
    choose: Callable[[nn.Module, Masks, int, int], Mapping[str, Tensor]],
    *,
    step: str,
    options: Mapping[str, Any],
    sparsity: float,
    rounds: int,
    retraining: Retraining,
    schedule: str = "iterative",
    rewind: Mapping[str, Tensor] | None = None,
    skip: Collection[str] = (),
    seed: int = 0,
    checkpoint: Path | None = None,
    report: Mapping[str, Any] | None = None,
) -> Network:
    """What every step that prunes single weights in rounds does.

    Args:
        network: unchanged.
        task: its data.
        choose: ``(module, masks, keep, round) -> bool masks`` of what stays.
        step: name of the step, for the record.
        options: its own options, for the record.
        sparsity: share of the weights that goes.
        rounds: of pruning and training.
        retraining: of all rounds together: its epochs are shared out.
        schedule: a name of :data:`~.schedule.SCHEDULES`.
        rewind: state that the weights that stay are set back to in each round.
        skip: names of parameters or modules that stay dense.
        seed: of the training.
        checkpoint: file beside which each round keeps its state.
        report: filled by ``choose`` on the way, for the record.

    Raises:
        InputError: if the sparsity is not in [0, 1) or there is no round.
        UnsupportedError: if the network cannot be traced or has nothing to prune.
    """
    check_sparsity(sparsity)
    if rounds < 1 or retraining.epochs < 0:
        raise InputError(f"{step} needs at least one round and no negative number of epochs")
    module = copy.deepcopy(network.module).cpu()
    masks = pruned_so_far(network, module, skip=skip)
    gone = SCHEDULES[schedule](sparsity)
    records = []
    for number in range(rounds):
        keep = min(masks.remaining, round(masks.total * (1.0 - gone((number + 1) / rounds))))
        epochs = retraining.epochs
        part = epochs * (number + 1) // rounds - epochs * number // rounds
        records += prune_and_retrain(
            module,
            task,
            masks,
            lambda now, masks, _, keep=keep, number=number: choose(now, masks, keep, number),
            rounds=1,
            retraining=replace(retraining, epochs=part),
            rewind=rewind,
            seed=seed_of(step, seed, number),
            checkpoint=checkpoint and checkpoint.with_suffix(f".part{number}.state"),
        )
        records[-1]["round"] = number + 1
    options = {
        "sparsity": sparsity, **options, "schedule": schedule, "rounds": rounds, "skip": list(skip),
        "epochs": retraining.epochs, "batch_size": retraining.batch_size, "lr": retraining.lr,
        "seed": seed,
    }  # fmt: skip
    found = {"rounds_run": records, **(report or {})}
    return sparse_network(network, step, options, module, masks, found)


def check_sparsity(sparsity: float) -> None:
    """Refuses what is no share of weights that can go."""
    if not 0.0 <= sparsity < 1.0:
        raise InputError(f"the sparsity is a share in [0, 1), not {sparsity:g}")


def pruned_so_far(network: Network, module: nn.Module, *, skip: Collection[str] = ()) -> Masks:
    """Masks over every weight that can be pruned, with those gone that an earlier step removed.

    Args:
        network: what the step was given.
        module: a copy of its module, to be pruned.
        skip: names of parameters or modules that stay dense.

    Raises:
        UnsupportedError: if the network has nothing to prune.
    """
    names = multiplied_weights(module, network.example_inputs, skip=skip)
    masks = Masks.full(module, list(names))
    before = Masks.of_zeros(network, module)
    masks.narrow({name: kept for name, kept in before.kept.items() if name in masks.kept})
    return masks


def allocated(
    module: nn.Module, scores: Scores, masks: Masks, allocation: str, keep: int
) -> Mapping[str, Tensor]:
    """What stays when ``keep`` weights do, by an allocation's name."""
    alive = {
        name: torch.where(mask, scores[name].to(mask.device), -torch.inf)
        for name, mask in masks.kept.items()
    }
    weights = {name: module.get_parameter(name).detach() for name in masks.kept}
    counts = ALLOCATIONS[allocation](weights, alive, keep)
    return keep_in_each(scores, masks.kept, limited(counts, masks))


def limited(counts: Mapping[str, int], masks: Masks) -> dict[str, int]:
    """Counts that no layer exceeds by what is left of it; the rest goes where there is room."""
    left = {name: int(mask.sum()) for name, mask in masks.kept.items()}
    result = {name: min(count, left[name]) for name, count in counts.items()}
    over = sum(counts.values()) - sum(result.values())
    for name in sorted(result, key=lambda n: result[n] - left[n]):
        take = min(over, left[name] - result[name])
        result[name] += take
        over -= take
    return result


def sparse_network(
    network: Network,
    step: str,
    options: Mapping[str, Any],
    module: nn.Module,
    masks: Masks,
    report: Mapping[str, Any],
) -> Network:
    """The result of a step that leaves zeros: with its packed form and densities on record."""
    masks.hold_weights()
    module.eval()
    stored = masks.stored()
    return network.after(
        step,
        options,
        {
            "sparsity": masks.sparsity,
            "remaining": masks.remaining,
            "weights": masks.total,
            "density": _densities(masks),
            "empty_layers": [n for n, mask in masks.kept.items() if not bool(mask.any())],
            "packed_bytes": stored["packed"].nbytes(),
            **report,
        },
        module=module,
        **stored,
    )


def _densities(masks: Masks) -> dict[str, float]:
    return {name: float(mask.float().mean()) for name, mask in masks.kept.items()}
