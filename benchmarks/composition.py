"""A recipe that the planner found against every single method at the same deployed bytes.

The planner searches under a limit on size. Each single method gets the setting with which its
deployed files are as large as the planner's at most, and as many epochs as the planner's recipe has
in all. Everything is then applied with the same seeds and measured by ``gossamer compare``. The
planner chose by the validation score, so whether its recipe is better is said by the test scores,
paired by seed.

    python benchmarks/composition.py --out benchmarks/results/composition.json
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gossamer
from gossamer.compress.compare import compare
from gossamer.compress.deploy import deploy
from gossamer.compress.prune.rewind import Retraining
from gossamer.compress.recipe import Recipe
from gossamer.core.errors import GossamerError
from gossamer.core.experiment import about, half_width
from gossamer.core.files import write_json
from gossamer.core.network import Network
from gossamer.core.task import Task
from gossamer.datasets.cifar import cifar10
from gossamer.datasets.digits import digits
from gossamer.models import load_weights
from gossamer.models.resnet import cifar_resnet, digits_resnet

Steps = list[Any]


def singles(epochs: int) -> dict[str, Callable[[float], Steps]]:
    """Single methods by a strength in (0, 1): the larger, the smaller the files."""
    train = {"epochs": epochs, "lr": 0.05}
    return {
        "prune": lambda s: [("prune", {"macs": round(1 - s, 4), **train})],
        "prune taylor": lambda s: [
            ("prune", {"criterion": "taylor", "macs": round(1 - s, 4), **train})
        ],
        "low rank": lambda s: [("svd", {"parameters": round(1 - s, 4), "epochs": epochs})],
        "magnitude": lambda s: [("sparsify", {"sparsity": round(s, 4), **train})],
        "rate-distortion": lambda s: [
            ("rate-distortion", {"sparsity": round(s, 4), "rounds": 3, "grid": 25, **train})
        ],
        "BiP": lambda s: [("bip", {"sparsity": round(s, 4), **train})],
        "few bits": lambda s: [
            (
                "quantized-distillation",
                {"bits": 2 + round(6 * (1 - s)), "epochs": epochs, "lr": 0.01, "batch_size": 128},
            )
        ],
        "codebook": lambda s: [("codebook", {"bits": 1 + round(5 * (1 - s)), "steps": 500})],
        "int8": lambda s: ["int8"],
    }


def fitted(
    steps: Callable[[float], Steps], dense: Network, task: Task, limit: int
) -> Recipe | None:
    """The weakest setting whose files are within the limit, found without training."""

    def size(strength: float) -> float:
        network = dense
        try:
            for step in Recipe.of(*steps(strength)).steps:
                free = {k: 0 for k in ("epochs", "steps") if k in step.options}
                quick = type(step)(step.name, {**step.options, **free})
                network = quick.apply(network, task, teacher=dense, cpu=True)
            with tempfile.TemporaryDirectory() as folder:
                return float(deploy(network, Path(folder)).nbytes)
        except GossamerError:
            return float("inf")

    low, high = 0.0, 0.995
    if size(high) > limit:
        return None
    for _ in range(9):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if size(middle) <= limit else (middle, high)
    return Recipe.of(*steps(high))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10; default: digits")
    parser.add_argument("--weights", type=Path, help="of ResNet-20, with --data")
    parser.add_argument("--size", type=float, default=0.06, help="share of the dense file")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, required=True, help="folder for what is made")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/composition.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    task: Task
    module: nn.Module
    torch.manual_seed(0)
    if given.data is None:
        task, module = digits(), digits_resnet()
        Retraining(epochs=30, lr=0.1, batch_size=64, cpu=True).train(module, task)
    else:
        task, module = cifar10(given.data, limit=4000), cifar_resnet(20)
        load_weights(module, given.weights)
    module.eval()
    found = gossamer.shrink(
        module, task, size=given.size, minutes=given.minutes, out=given.work / "planned", cpu=True
    )
    recipe = Recipe.from_json(found.report["recipe"])
    epochs = sum(int(step.options.get("epochs", 0)) for step in recipe.steps)
    dense = Network(module, task.example_inputs)
    with tempfile.TemporaryDirectory() as folder:
        limit = deploy(found.network, Path(folder)).nbytes
    recipes = {"planned": recipe}
    out_of_reach = []
    for name, steps in singles(epochs).items():
        made = fitted(steps, dense, task, limit)
        if made is None:
            out_of_reach.append(name)
        else:
            recipes[name] = made
        print(name, "out of reach" if made is None else made.to_json(), flush=True)
    result = compare(
        module, task, recipes, out=given.work / "compared", seeds=given.seeds, cpu=True
    )
    table = {
        name: {
            "recipe": record["recipe"],
            "failed": record["failed"],
            **({key: record[key] for key in ("means", "speedup", "runs")} if not record["failed"]
               else {}),
        }
        for name, record in result["recipes"].items()
    }  # fmt: skip
    scored = {n: r["means"]["score"][0] for n, r in table.items() if not r["failed"]}
    best = max(scored, key=lambda n: scored[n])
    ahead = {}
    for name in scored:
        pairs = zip(table["planned"]["runs"], table[name]["runs"], strict=True)
        gains = [planned["score"] - single["score"] for planned, single in pairs]
        ahead[name] = (sum(gains) / len(gains), half_width(gains))
    write_json(
        given.out,
        {
            "limit_bytes": limit, "epochs": epochs, "dense": result["dense"], "recipes": table,
            "out_of_reach": out_of_reach, "planned_ahead_by": ahead, "best_on_test": best,
            "planned_beats_every_single": best == "planned", **about(seeds=given.seeds),
        },
    )  # fmt: skip
    for name, record in table.items():
        if not record["failed"]:
            means = record["means"]
            print(name, means["score"], means["validation_score"], means["deployed_bytes"][0])
    print("best on the test split:", best)


if __name__ == "__main__":
    main()
