"""Every method that removes single weights, side by side: accuracy at 90, 95 and 98 % sparsity.

All start from the same dense network (or, if they prune before or during training, from the same
first weights with as many epochs in all) and have the same epochs after it. The learning rate of
each is chosen among three by validation accuracy at 95 % on a split of its own, one trial each.
Test accuracy is measured once, of the final network.

    python benchmarks/sparsity.py --out benchmarks/results/sparsity.json [--markdown]
    python benchmarks/sparsity.py --data cifar10/ --out benchmarks/results/sparsity_cifar10.json
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gossamer.compress.prune.activation import activating_pruning
from gossamer.compress.prune.bilevel import bip, hydra
from gossamer.compress.prune.dynamic_sparse import dynamic_sparse, movement
from gossamer.compress.prune.post_training import prune_after_training
from gossamer.compress.prune.pq_index import adaptive_pruning
from gossamer.compress.prune.rate_distortion import rate_distortion
from gossamer.compress.prune.rewind import Retraining, prune_and_retrain
from gossamer.compress.prune.sparsify import pruned_so_far, sparse_network, sparsify
from gossamer.compress.prune.weight_scores import keep_overall
from gossamer.core.experiment import about
from gossamer.core.files import read_json, write_json
from gossamer.core.network import Network
from gossamer.core.task import Labelled, seed_of
from gossamer.datasets.cifar import cifar10
from gossamer.datasets.digits import digits
from gossamer.models.plain import ConvNet
from gossamer.models.resnet import cifar_resnet
from gossamer.parts.masks import Masks

SPARSITIES = (0.9, 0.95, 0.98)
RATES = (0.02, 0.05, 0.1)
DENSE_EPOCHS, EPOCHS = 20, 30

Method = Callable[..., Network]


def _sparsify(**fixed: Any) -> Method:
    def run(dense: Network, first: Network, task: Labelled, **options: Any) -> Network:
        return sparsify(dense, task, **fixed, **options)

    return run


def _first(**fixed: Any) -> Method:
    """Pruned before training, then trained for as long as dense and tuned together."""

    def run(dense: Network, first: Network, task: Labelled, **options: Any) -> Network:
        epochs = options.pop("epochs")
        lr, size = options.pop("lr"), options.pop("batch_size")
        made = sparsify(first, task, **fixed, **options, epochs=0)
        module = copy.deepcopy(made.module)
        Retraining(epochs=DENSE_EPOCHS + epochs, lr=lr, batch_size=size).train(
            module, task, Masks.of_zeros(made, module), seed=options["seed"]
        )
        return replace(made, module=module.eval())

    return run


def _sparse_gpt(dense: Network, first: Network, task: Labelled, **options: Any) -> Network:
    made = prune_after_training(
        dense, task, sparsity=options["sparsity"], seed=options["seed"], samples=256
    )
    module = copy.deepcopy(made.module)
    Retraining(epochs=options["epochs"], lr=options["lr"], batch_size=options["batch_size"]).train(
        module, task, Masks.of_zeros(made, module), seed=options["seed"]
    )
    return replace(made, module=module.eval())


def _dynamic(grow: str) -> Method:
    def run(dense: Network, first: Network, task: Labelled, **options: Any) -> Network:
        epochs = options.pop("epochs")
        return dynamic_sparse(
            first, task, grow=grow, every=20, epochs=DENSE_EPOCHS + epochs, **options
        )

    return run


def _lottery(dense: Network, first: Network, task: Labelled, **options: Any) -> Network:
    """Five rounds of magnitude pruning of what was trained, each rewound to the first weights."""
    module = copy.deepcopy(dense.module)
    masks = pruned_so_far(dense, module)
    keep = 1.0 - options["sparsity"]

    def choose(now: nn.Module, masks: Masks, number: int) -> Any:
        scores = {n: now.get_parameter(n).detach().abs() for n in masks.kept}
        return keep_overall(scores, masks.kept, round(masks.total * keep ** ((number + 1) / 5)))

    prune_and_retrain(
        module, task, masks, choose, rounds=5, seed=options["seed"],
        rewind=first.module.state_dict(),
        retraining=Retraining(
            epochs=options["epochs"] // 5, lr=options["lr"], batch_size=options["batch_size"]
        ),
    )  # fmt: skip
    return sparse_network(dense, "lottery-ticket", {}, module, masks, {})


def _adaptive(dense: Network, first: Network, task: Labelled, **options: Any) -> Network:
    total = DENSE_EPOCHS + options.pop("epochs")
    return adaptive_pruning(
        first, task, rounds=5, epochs=total // 6, p=1.0, q=2.0, gamma=3.0, **options
    )


def _activating(dense: Network, first: Network, task: Labelled, **options: Any) -> Network:
    # Five rounds whatever the sparsity: the share of each follows.
    rate = 1.0 - (1.0 - options["sparsity"]) ** 0.2
    total = DENSE_EPOCHS + options.pop("epochs")
    return activating_pruning(
        first, task, rate=rate, ap_rate=0.1 * rate, epochs=total // 6, **options
    )


METHODS: dict[str, Method] = {
    "random": _sparsify(criterion="random", rounds=1),
    "magnitude, one shot": _sparsify(rounds=1),
    "magnitude, 5 rounds": _sparsify(rounds=5),
    "magnitude, uniform": _sparsify(rounds=5, allocation="uniform"),
    "magnitude, uniform+": _sparsify(rounds=5, allocation="uniform+"),
    "magnitude, ERK": _sparsify(rounds=5, allocation="erk"),
    "LAMP": _sparsify(rounds=5, allocation="lamp"),
    "lookahead": _sparsify(rounds=5, criterion="lookahead"),
    "gradient": _sparsify(rounds=5, criterion="gradient"),
    "Fisher (OBD)": _sparsify(rounds=5, criterion="fisher"),
    "lottery ticket": _lottery,
    "rate-distortion": lambda d, f, t, **o: rate_distortion(
        d, t, rounds=5, grid=25, samples=128, **o
    ),
    "AP": _activating,
    "SAP": _adaptive,
    "BiP": lambda d, f, t, **o: bip(d, t, **o),
    "Hydra": lambda d, f, t, **o: hydra(d, t, **o),
    "SparseGPT": _sparse_gpt,
    "movement": lambda d, f, t, **o: movement(d, t, **o),
    "SNIP": _first(criterion="snip", rounds=1),
    "GraSP": _first(criterion="grasp", rounds=1),
    "SynFlow": _first(criterion="synflow", rounds=100),
    "SET": _dynamic("random"),
    "RigL": _dynamic("gradient"),
}  # fmt: skip


def start(task: Labelled, network: Callable[[], nn.Module], seed: int) -> tuple[Network, Network]:
    """The trained dense network and its first weights."""
    torch.manual_seed(seed_of("network", seed) % 2**32)
    module = network()
    first = Network(copy.deepcopy(module), task.example_inputs)
    Retraining(epochs=DENSE_EPOCHS, lr=0.05, batch_size=64).train(module, task, seed=seed)
    return Network(module.eval(), task.example_inputs), first


def run(work: str, folder: Path | None, seeds: list[int], out: Path) -> dict[str, Any]:
    """Measures what is not in ``out`` yet; it is written after every method."""

    def task_of(seed: int) -> Labelled:
        return digits(seed=seed) if folder is None else cifar10(folder, seed=seed)

    network: Callable[[], nn.Module] = (
        (lambda: ConvNet(1, 8, (16, "pool", 32, "pool"), (64,)))
        if folder is None
        else (lambda: cifar_resnet(20))
    )
    result = read_json(out) if out.exists() else {"work": work, "rates": {}, "rows": []}
    tuning = 1000
    task = task_of(tuning)
    dense, first = start(task, network, tuning)
    for name, method in METHODS.items():
        if name in result["rates"]:
            continue
        scores = {}
        for lr in RATES:
            made = method(
                dense, first, task, sparsity=0.95, epochs=EPOCHS, batch_size=64, lr=lr, seed=tuning
            )
            scores[lr] = task.score(made.module, "validation")
        result["rates"][name] = max(scores, key=lambda lr: scores[lr])
        print(name, scores, flush=True)
        write_json(out, result)
    for seed in seeds:
        task = task_of(seed)
        dense, first = start(task, network, seed)
        if not any(r["method"] == "dense" and r["seed"] == seed for r in result["rows"]):
            longer = copy.deepcopy(dense.module)
            Retraining(epochs=EPOCHS, lr=0.05, batch_size=64).train(longer, task, seed=seed)
            score = task.score(longer.eval(), "test")
            result["rows"].append({"method": "dense", "seed": seed, "accuracy": score})
        done = {(r["method"], r.get("sparsity"), r["seed"]) for r in result["rows"]}
        for name, method in METHODS.items():
            for sparsity in SPARSITIES:
                if (name, sparsity, seed) in done:
                    continue
                made = method(
                    dense, first, task, sparsity=sparsity, epochs=EPOCHS, batch_size=64,
                    lr=result["rates"][name], seed=seed,
                )  # fmt: skip
                report = made.steps[-1]["report"]
                result["rows"].append(
                    {
                        "method": name, "sparsity": sparsity, "seed": seed,
                        "reached": report["sparsity"],
                        "accuracy": task.score(made.module, "test"),
                        "empty_layers": len(report["empty_layers"]),
                    }
                )  # fmt: skip
            write_json(out, result)
            print(seed, name, flush=True)
    result |= about(seeds=seeds, epochs=[DENSE_EPOCHS, EPOCHS])
    write_json(out, result)
    return result


def markdown(result: dict[str, Any]) -> str:
    """The table, the best at 98 % first."""
    names = list(dict.fromkeys(r["method"] for r in result["rows"] if r["method"] != "dense"))

    def cell(name: str, sparsity: float) -> tuple[float, str]:
        found = [r for r in result["rows"] if r["method"] == name and r.get("sparsity") == sparsity]
        scores = [r["accuracy"] for r in found]
        spread = np.std(scores, ddof=1) if len(scores) > 1 else 0.0
        reached = float(np.mean([r["reached"] for r in found]))
        note = "" if abs(reached - sparsity) < 0.005 else f" (at {reached:.1%})"
        return float(np.mean(scores)), f"{np.mean(scores):.1f} ± {spread:.1f}{note}"

    names.sort(key=lambda name: -cell(name, SPARSITIES[-1])[0])
    lines = ["| method | 90 % | 95 % | 98 % | learning rate |", "| --- | --- | --- | --- | --- |"]
    for name in names:
        cells = " | ".join(cell(name, s)[1] for s in SPARSITIES)
        lines.append(f"| {name} | {cells} | {result['rates'][name]} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10; default: digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sparsity.json"))
    parser.add_argument("--markdown", action="store_true", help="print the table and stop")
    given = parser.parse_args()
    if given.markdown:
        print(markdown(json.loads(given.out.read_text())))
        return
    torch.set_num_threads(1)
    print(
        markdown(
            run("digits" if given.data is None else "cifar10", given.data, given.seeds, given.out)
        )
    )


if __name__ == "__main__":
    main()
