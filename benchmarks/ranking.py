"""How long does a Plackett-Luce fit take, and how good is it, beside choix and scikit-learn?

Scores are drawn so that wins follow the model exactly; a tenth of the samples is held out. From the
same samples: wins are counted and I-LSR fitted here; choix gets the pairs as its list of tuples and
fits by I-LSR; logistic regression gets the counts of pairs (as arenas fit Bradley-Terry). Counting
pairs from scores is timed apart. One thread, in turns; the likelihood is of held-out pairs in nats.
choix runs in an environment of its own:

    python benchmarks/ranking.py --setup
    python benchmarks/ranking.py --json benchmarks/results/ranking.json

Without the peer its numbers are null.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from gossamer.core.experiment import about
from gossamer.core.files import write_json
from gossamer.evaluate.comparisons import Scores, wins_of
from gossamer.evaluate.plackett_luce import fit_pairs, log_likelihood
from gossamer.evaluate.ranking_baselines import bradley_terry, elo

HERE = Path(__file__).resolve().parent
PEER = HERE / ".envs" / "choix" / "bin" / "python"
PROGRAM = """
import json, sys, time
import choix, numpy as np
wins = np.load(sys.argv[1])
winners, losers = np.nonzero(wins)
times = wins[winners, losers].astype(int)
data = np.repeat(np.stack([winners, losers], 1), times, axis=0)
started = time.process_time()
if len(data) <= 200_000:
    found = choix.ilsr_pairwise(len(wins), [tuple(map(int, pair)) for pair in data], tol=1e-8)
    pairs = time.process_time() - started
else:
    found, pairs = None, None
started = time.process_time()
dense = choix.ilsr_pairwise_dense(wins, tol=1e-8)
print(json.dumps({"seconds": pairs, "dense_seconds": time.process_time() - started,
                  "utilities": dense.tolist()}))
"""


def setup(folder: Path) -> None:
    """Makes the peer's environment, which shares numpy and scipy with this one."""
    venv.create(folder, with_pip=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    shared = folder / "lib" / version / "site-packages" / "shared.pth"
    shared.write_text(sysconfig.get_paths()["purelib"] + "\n")
    packages = ("choix", "networkx")
    subprocess.run([folder / "bin" / "pip", "install", "-q", "--no-deps", *packages], check=True)


def drawn(models: int, comparisons: int, seed: int) -> tuple[Scores, Scores]:
    """Samples of ten models each, and a ninth as many that are held out."""
    random = np.random.default_rng(seed)
    truth = random.normal(size=models)
    parts = []
    for share in (1.0, 1 / 9):
        samples = int(comparisons * share / 45)
        who = random.random((samples, models)).argpartition(10, axis=1)[:, :10]
        values = truth[who] + random.gumbel(size=who.shape)
        numbers = np.repeat(np.arange(samples), 10)
        parts.append(Scores.of(numbers, who.ravel(), values.ravel(), models))
    return parts[0], parts[1]


def timed(work: Any) -> tuple[float, Any]:
    started = time.process_time()
    found = work()
    return time.process_time() - started, found


def choix(wins: np.ndarray) -> dict[str, Any] | None:
    if not PEER.exists():
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "wins.npy"
        np.save(path, wins)
        done = subprocess.run(
            [PEER, "-c", PROGRAM, path], check=True, capture_output=True, text=True
        )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--setup", action="store_true")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    told = parser.parse_args()
    if told.setup:
        setup(PEER.parent.parent)
        return
    wins_of(drawn(20, 4500, 0)[0])  # compile
    elo(drawn(20, 4500, 0)[0])
    rows = []
    for models, comparisons in ((30, 10_000), (30, 100_000), (100, 100_000), (100, 1_000_000),
                                (300, 1_000_000)):  # fmt: skip
        seconds: dict[str, list[float]] = {}
        likelihood: dict[str, float] = {}
        for turn in range(told.turns):
            scores, held_out = drawn(models, comparisons, turn)
            counting, wins = timed(lambda s=scores: wins_of(s))
            unseen = wins_of(held_out)
            fitted = {
                "gossamer": timed(lambda w=wins: fit_pairs(w)),
                "logistic regression": timed(lambda w=wins: bradley_terry(w)),
                "Elo": timed(lambda s=scores: elo(s)),
            }
            peer = choix(wins)
            if peer is not None:
                fitted["choix, matrix"] = peer["dense_seconds"], np.array(peer["utilities"])
                if peer["seconds"] is not None:
                    fitted["choix, pairs"] = peer["seconds"], np.array(peer["utilities"])
            seconds.setdefault("counting", []).append(counting)
            for name, (spent, utilities) in fitted.items():
                scale = np.log(10) / 400 if name in ("logistic regression", "Elo") else 1.0
                seconds.setdefault(name, []).append(spent)
                likelihood[name] = log_likelihood(utilities * scale, unseen)
        row = {
            "models": models, "comparisons": comparisons,
            "seconds": {name: median(values) for name, values in seconds.items()},
            "range": {name: [min(values), max(values)] for name, values in seconds.items()},
            "held_out_log_likelihood": likelihood,
        }  # fmt: skip
        rows.append(row)
        print(f"{models} models, {comparisons:,} comparisons")
        for name, spent in row["seconds"].items():
            print(f"  {name:<22} {1000 * spent:10.2f} ms  {likelihood.get(name, float('nan')):.6f}")
    if told.json is not None:
        write_json(told.json, {"about": about(), "rows": rows})


if __name__ == "__main__":
    main()
