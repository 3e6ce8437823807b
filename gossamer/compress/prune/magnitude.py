"""Prune by a criterion: score, allocate, remove for real, fine-tune.

The classic way (Li et al., ICLR 2017, and all that followed): a trained network's units are scored,
those of least worth are removed until a budget is met, and the rest is trained on. Criterion,
allocation and schedule are chosen by name, so a recipe can hold them. Between removing and
fine-tuning the readers of what went may be fitted to the untouched network's responses.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import torch

from gossamer.compress.prune.allocation import ALLOCATIONS, cost_of, quanta, select, unit_widths
from gossamer.compress.prune.criterion import CRITERIA
from gossamer.compress.prune.rate_distortion import calibration_inputs
from gossamer.compress.prune.reconstruction import Refit, refit
from gossamer.compress.prune.schedule import SCHEDULES
from gossamer.core import surgery
from gossamer.core.dependency import analyse
from gossamer.core.errors import InputError
from gossamer.core.fit import Supervised, cosine, fit, sgd
from gossamer.core.network import Network
from gossamer.core.task import Task, seed_of

log = logging.getLogger(__name__)


def prune(
    network: Network,
    task: Task,
    *,
    criterion: str = "l2",
    allocation: str = "global",
    macs: float | None = None,
    parameters: float | None = None,
    units: float | None = None,
    round_to: int = 1,
    reconstruct: Refit = "none",
    samples: int = 512,
    schedule: str = "one-shot",
    rounds: int = 1,
    epochs: int = 10,
    batch_size: int = 128,
    lr: float = 0.02,
    seed: int = 0,
    exact_only: bool = False,
    checkpoint: Path | None = None,
    cpu: bool = False,
) -> Network:
    """Removes the units of least worth and fine-tunes.

    Args:
        network: trained; unchanged.
        task: scores (where the criterion needs data) and fine-tunes.
        criterion: a name of :data:`~.criterion.CRITERIA`.
        allocation: a name of :data:`~.allocation.ALLOCATIONS`.
        macs: keep at most this share of the MACs. Exactly one of the three budgets is given;
            with none, .5 of the MACs.
        parameters: keep at most this share of the parameters.
        units: keep this share of the units.
        round_to: channels of every family that can are kept in multiples of this.
        reconstruct: what the weights that read removed units do before fine-tuning: "none",
            "least-squares" (they are fitted to the responses of the network before the round) or
            "scale" (one factor a unit is).
        samples: training inputs that they are fitted on.
        schedule: a name of :data:`~.schedule.SCHEDULES`: how much is gone after each round.
        rounds: of removing and fine-tuning.
        epochs: of fine-tuning, over all rounds.
        batch_size: samples a batch.
        lr: learning rate of fine-tuning (cosine in each round).
        seed: of random scores, batches and data order.
        exact_only: leave families alone that a normalisation or softmax runs over.
        checkpoint: file that holds the state of fine-tuning (of several rounds: one each); an
            interrupted run goes through the same surgery and resumes from it.
        cpu: stay on the CPU although there is a GPU.

    Returns:
        The smaller network; its record says what was removed, of which family, and how far its
        outputs are from those of the network with the units silenced.

    Raises:
        InputError: if a name is unknown or the budgets do not fit together.
        BudgetError: if the budget cannot be met.
        UnsupportedError: if the network cannot be traced or has nothing to remove.
    """
    budgets = {"macs": macs, "parameters": parameters, "units": units}
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) > 1:
        raise InputError(f"give one budget, not {' and '.join(given)}")
    budget, share = next(iter(given.items()), ("macs", 0.5))
    if not 0.0 < share <= 1.0:
        raise InputError(f"{budget} must be a share in (0, 1], not {share}")
    if rounds < 1 or epochs < 0:
        raise InputError("prune needs at least one round and no negative number of epochs")
    if reconstruct not in ("none", "scale", "least-squares"):
        raise InputError(
            f"readers are reconstructed by none, scale or least-squares, not {reconstruct!r:.40}"
        )
    for name, known in (
        (criterion, CRITERIA),
        (allocation, ALLOCATIONS),
        (schedule, SCHEDULES),
    ):
        if name not in known:
            raise InputError(f"there is no {name}; there are {', '.join(known)}")
    gone = SCHEDULES[schedule](1.0 - share)
    module = copy.deepcopy(network.module).cpu()
    first = analyse(module, network.example_inputs)
    start = {
        "macs": float(first.graph.macs),
        "parameters": float(first.graph.parameters),
        "units": float(first.units),
    }
    record = []
    dependency = first
    after, left = first.graph.cost(), first.units
    for number in range(rounds):
        if number:
            dependency = analyse(module, network.example_inputs)
        module.eval()
        scores = CRITERIA[criterion](module, dependency, task, seed_of("score", seed, number))
        priorities = ALLOCATIONS[allocation](scores)
        if exact_only:
            priorities = [
                p if family.exactness == "exact" else torch.full_like(p, torch.inf)
                for p, family in zip(priorities, dependency.families, strict=True)
            ]
        target = start[budget] * (1.0 - gone((number + 1) / rounds))
        removed = select(
            priorities,
            cost=cost_of(budget, dependency),
            target=target,
            quantum=quanta(unit_widths(dependency), round_to),
        )
        removal = {i: mask.cpu() for i, mask in enumerate(removed) if bool(mask.any())}
        errors = {}
        if reconstruct != "none" and removal:
            inputs = calibration_inputs(
                task, samples=samples, source="data", seed=seed_of("refit", seed, number),
                batch_size=64,
            )  # fmt: skip
            errors = refit(module, dependency, removal, inputs, how=reconstruct)
        result = surgery.remove(module, dependency, removal, verify=True)
        module = result.module
        after = dependency.cost(removal)
        left = dependency.units - sum(int(mask.sum()) for mask in removal.values())
        record.append(
            {
                "removed": {
                    dependency.families[i].name: f"{int(mask.sum())} of {len(mask)}"
                    for i, mask in removal.items()
                },
                "verified": bool(result.verified),
                "error": float(result.error),
                "reconstruction": errors,
                "notes": list(result.notes),
            }
        )
        part = epochs * (number + 1) // rounds - epochs * number // rounds
        if part:
            rule = Supervised(module, task, optimizer=sgd(module, lr=lr), schedule=cosine)
            fit(
                rule,
                task,
                epochs=part,
                batch_size=batch_size,
                seed=seed_of("fine-tune", seed, number),
                checkpoint=checkpoint and checkpoint.with_suffix(f".{number}.state"),
                cpu=cpu,
                title="fine-tuning",
            )
            module.cpu()
    module.eval()
    report = {
        "parameters": [int(start["parameters"]), after.parameters],
        "macs": [int(start["macs"]), after.macs],
        "units": [first.units, left],
        "rounds": record,
    }
    options = {
        "criterion": criterion,
        "allocation": allocation,
        budget: share,
        "round_to": round_to,
        "reconstruct": reconstruct,
        "samples": samples,
        "schedule": schedule,
        "rounds": rounds,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
    }
    return network.after("prune", options, report, module=module)
