"""Time of the rate-distortion allocation: by layers, by levels, and against the naive table.

The naive table is the recursion as it stands in the paper: for each layer and each number of
weights left, a loop over the levels. Both must find the same total.

    python benchmarks/rate_distortion.py [--out benchmarks/results/rate_distortion.json]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gossamer.compress.knapsack import knapsack, lagrangian
from gossamer.core.experiment import about
from gossamer.core.files import write_json

BUDGET = 5_000


def problem(layers: int, levels: int, seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Curves that rise, of layers of unlike sizes that share a budget of 3 / 10."""
    rng = np.random.default_rng(seed)
    size = rng.integers(BUDGET // layers, 6 * BUDGET // layers, layers)
    grid = np.arange(levels + 1) / levels
    costs = [n - (grid * n).astype(np.int64) for n in size]
    losses = [np.cumsum(rng.uniform(0, 1, levels + 1)) * grid**2 for _ in size]
    return losses, costs


def naive(losses: Sequence[np.ndarray], costs: Sequence[np.ndarray], budget: int) -> float:
    """The table filled number by number; returns the least total."""
    best = [0.0] * (budget + 1)
    for values, prices in zip(losses, costs, strict=True):
        values, prices = values.tolist(), prices.tolist()
        best = [
            min(
                (best[r - p] + v for v, p in zip(values, prices, strict=True) if p <= r),
                default=float("inf"),
            )
            for r in range(budget + 1)
        ]
    return best[budget]


def seconds(work: Callable[[], object], repeats: int = 7) -> float:
    """Median time."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    by_layers, by_levels = [], []
    for layers in (8, 16, 32, 64, 128, 256):
        losses, costs = problem(layers, 100)
        by_layers.append(
            {
                "layers": layers,
                "exact_s": seconds(lambda x=losses, c=costs: knapsack(x, c, BUDGET)),
                "lagrangian_s": seconds(lambda x=losses, c=costs: lagrangian(x, c, BUDGET)),
            }
        )
        print(by_layers[-1])
    for levels in (25, 50, 100, 200):
        losses, costs = problem(32, levels)
        by_levels.append(
            {
                "levels": levels,
                "exact_s": seconds(lambda x=losses, c=costs: knapsack(x, c, BUDGET)),
            }
        )
        print(by_levels[-1])
    slope = np.polyfit(
        np.log([r["layers"] for r in by_layers]), np.log([r["exact_s"] for r in by_layers]), 1
    )[0]
    against = []
    for layers in (4, 8, 16):
        losses, costs = problem(layers, 100)
        chosen = knapsack(losses, costs, BUDGET)
        total = sum(float(v[i]) for v, i in zip(losses, chosen, strict=True))
        assert abs(total - naive(losses, costs, BUDGET)) < 1e-9 * max(1.0, total)
        cheap = lagrangian(losses, costs, BUDGET)
        # In turns, so that a busy moment hits both.
        ratios = [
            seconds(lambda x=losses, c=costs: naive(x, c, BUDGET), 1)
            / seconds(lambda x=losses, c=costs: knapsack(x, c, BUDGET), 1)
            for _ in range(5)
        ]
        against.append(
            {
                "layers": layers,
                "naive_over_exact": statistics.median(ratios),
                "low": min(ratios),
                "high": max(ratios),
                "lagrangian_loss_over_exact": sum(
                    float(v[i]) for v, i in zip(losses, cheap, strict=True)
                )
                / total,
            }
        )
        print(against[-1])
    result = {
        "budget": BUDGET, "by_layers": by_layers, "by_levels": by_levels,
        "exponent_in_layers": float(slope), "against_naive": against, **about(),
    }  # fmt: skip
    print(f"time grows with layers to the power of {slope:.2f}")
    if out:
        write_json(out, result)


if __name__ == "__main__":
    main()
