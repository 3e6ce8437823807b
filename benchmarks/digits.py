"""The main job on ten splits of the handwritten digits.

The recipe is searched once, on a split that is not among the ten, by its validation score. Then for
each of ten splits a dense ResNet of widths 16-32-64 is trained, shrunk by that recipe and measured:
test accuracy, MACs, bytes of the ONNX file, and ONNX Runtime's median time of a batch of 64 on one
thread, dense and small in turns.

    python benchmarks/digits.py --plan 4 --json benchmarks/results/digits.json

Targets: at most .5 of the MACs and .25 of the bytes, at most one point of accuracy lost, at least
twice as fast.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from gossamer.compress.recipe import Recipe
from gossamer.compress.shrink import shrink
from gossamer.core.experiment import about
from gossamer.datasets import open_task
from gossamer.models import digits_resnet

RECIPE = Path(__file__).with_name("digits_recipe.yaml")
PLANNING_SPLIT = 100
EPOCHS = 40


def dense(seed: int) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return digits_resnet((16, 32, 64))


def plan(minutes: float) -> None:
    """Searches the recipe on a split of its own."""
    with tempfile.TemporaryDirectory() as out:
        result = shrink(
            dense(PLANNING_SPLIT), open_task("digits", seed=PLANNING_SPLIT), macs=0.5, size=0.25,
            latency=0.5, minutes=minutes, trained=False, epochs=EPOCHS, seed=PLANNING_SPLIT,
            out=out,
        )  # fmt: skip
    RECIPE.write_text(result.report["recipe_yaml"])


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of the 95 % t-interval."""
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(half)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", type=float, metavar="MINUTES", help="search the recipe first")
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("digits-work"),
        help="where runs are kept: the same folder again only measures again",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.plan:
        plan(options.plan)
    recipe = Recipe.read(RECIPE)
    print(recipe.to_yaml())
    rows = []
    for seed in range(options.splits):
        report = shrink(
            dense(seed), open_task("digits", seed=seed), macs=1.0, recipe=recipe, trained=False,
            epochs=EPOCHS, seed=seed, out=options.work / f"split-{seed}",
        ).report  # fmt: skip
        before, after = report["before"], report["after"]
        rows.append(
            {
                "split": seed,
                "dense": before["score"],
                "small": after["score"],
                "macs": after["macs"] / before["macs"],
                "params": after["params"] / before["params"],
                "bytes": after["bytes"] / before["bytes"],
                "speedup": report["speedup"]["ratio"],
                "speedup_low": report["speedup"]["low"],
                "speedup_high": report["speedup"]["high"],
                "verified": report["verified"],
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    drop = interval([row["dense"] - row["small"] for row in rows])
    speed = [row["speedup"] for row in rows]
    summary = {
        "dense": interval([row["dense"] for row in rows]),
        "small": interval([row["small"] for row in rows]),
        "drop": drop,
        "macs": max(row["macs"] for row in rows),
        "bytes": max(row["bytes"] for row in rows),
        "speedup_median": float(np.median(speed)),
        "speedup_worst": min(speed),
        "verified": all(row["verified"] for row in rows),
    }
    print(json.dumps(summary, indent=1))
    if options.json:
        content = {"about": about(), "recipe": recipe.to_json(), "rows": rows, "summary": summary}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
