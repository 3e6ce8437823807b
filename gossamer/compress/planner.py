"""Finds a recipe that meets a budget on this machine.

Trials are proposed by optuna's multi-objective sampler (score up, cost down) and judged by
successive halving (Jamieson and Talwalkar, AISTATS 2016): many recipes get a short fine-tuning, the
better third a longer one, and the best of those the rest of the time. Latency is predicted from
a table of operators timed on this device in the first rung, where many recipes have to be ranked,
and measured in turns with the original afterwards; a step such as int8 stays only where it pays.
Finished trials are records of the workspace, so an interrupted search goes on where it stopped.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gossamer.compress.budget import Budget
from gossamer.compress.deploy import Deployed, deploy
from gossamer.compress.recipe import Recipe
from gossamer.compress.workspace import Workspace
from gossamer.core.errors import BudgetError, GossamerError
from gossamer.core.export import OnnxRunner
from gossamer.core.graph import Graph
from gossamer.core.network import Network
from gossamer.core.progress import progress
from gossamer.core.task import Task, seed_of
from gossamer.hardware.measure import compare, measure, resized
from gossamer.hardware.onnx_operators import onnx_operators
from gossamer.hardware.predictor import LookupTable
from gossamer.parts.front import undominated

log = logging.getLogger(__name__)

CRITERIA = ("l2", "taylor", "fpgm", "batchnorm-scale")
ALLOCATIONS = ("global", "uniform")
MULTIPLES = (1, 4, 8, 16)
RECOVERIES = ("finetune", "distil")
SHAPES = ("prune", "low-rank", "bip")
"""How the network gets narrower."""
VALUES = ("float", "int8")
PACKED_VALUES = ("sparse", "few-bits", "codebook")
"""How its values are stored. Packed forms make the deployed files smaller and nothing faster, so
they are tried where the budget limits the size."""
RUNGS = 3
ETA = 3


@dataclass(frozen=True)
class Timer:
    """How deployed files are timed.

    Attributes:
        batch: samples in a call.
        threads: of ONNX Runtime.
        rounds: turns.
    """

    batch: int = 64
    threads: int = 1
    rounds: int = 15


def costs(
    contenders: Mapping[str, Network | Path],
    inputs: Sequence[Any],
    folder: Path,
    timer: Timer,
    *,
    table: LookupTable | None = None,
) -> tuple[dict[str, dict[str, float]], dict[str, Deployed]]:
    """Deployed bytes and latency of several networks, and their counts.

    The latency is that of the ONNX file, whatever the network's runtime.

    Args:
        contenders: by name; one that is already a file is only timed.
        inputs: positional arguments, batch first.
        folder: gets the deployed files.
        timer: how they are timed.
        table: predicts latencies, operator by operator; None measures them, in turns.

    Returns:
        Costs by budget name, and what was deployed of each network. "speedup" is the first one's
        time over one's own.
    """
    made = {
        name: deploy(contender, folder, threads=timer.threads, name=f"{name}.onnx")
        for name, contender in contenders.items()
        if not isinstance(contender, Path)
    }
    files = {
        name: contender if isinstance(contender, Path) else made[name].onnx
        for name, contender in contenders.items()
    }
    times = (
        _measured(files, inputs, timer)
        if table is None
        else _predicted(files, inputs, timer, table)
    )
    rows = {}
    for name, contender in contenders.items():
        latency, speedup = times[name]
        size = made[name].nbytes if name in made else files[name].stat().st_size
        rows[name] = {"size": float(size), "latency": latency, "speedup": speedup}
        if not isinstance(contender, Path):
            graph = Graph.trace(contender.module, inputs)
            rows[name] |= {"macs": float(graph.macs), "params": float(graph.parameters)}
    return rows, made


def _measured(
    files: Mapping[str, Path], inputs: Sequence[Any], timer: Timer
) -> dict[str, tuple[float, float]]:
    """Median milliseconds, and how many times as fast as the first, round by round."""
    timings = measure(
        files, inputs, batch_sizes=(timer.batch,), threads=(timer.threads,), rounds=timer.rounds
    )
    first = timings[0]
    return {
        t.name: (t.latency.p50, compare(first, t).ratio if t is not first else 1.0) for t in timings
    }


def _predicted(
    files: Mapping[str, Path], inputs: Sequence[Any], timer: Timer, table: LookupTable
) -> dict[str, tuple[float, float]]:
    """Predicted milliseconds, and how many times as fast as the first."""
    found: dict[str, float] = {}
    for name, file in files.items():
        feed = OnnxRunner(file).feed(*resized(inputs, timer.batch))
        found[name] = table.predict(onnx_operators(file, feed, threads=timer.threads))
    first = next(iter(found.values()))
    return {name: (spent, first / max(spent, 1e-9)) for name, spent in found.items()}


@dataclass
class Planner:
    """The search for a recipe.

    Attributes:
        dense: the network to shrink, trained.
        task: trains on "train", judges on "validation".
        budget: what must be met.
        workspace: where trials are kept.
        seconds: for the whole search and the final training.
        timer: how candidates are timed.
        seed: of proposals and training.
        cpu: stay on the CPU although there is a GPU.
    """

    dense: Network
    task: Task
    budget: Budget
    workspace: Workspace
    seconds: float
    timer: Timer = field(default_factory=Timer)
    seed: int = 0
    cpu: bool = False

    def run(self) -> tuple[Recipe, list[dict[str, Any]]]:
        """Searches.

        Returns:
            The recipe for the final training, and every trial as a report shows it.

        Raises:
            BudgetError: if no recipe that was tried meets the limits on costs.
        """
        chosen = self.workspace.record("chosen")
        if chosen is None:
            chosen = self._search()
            self.workspace.keep("chosen", chosen)
        trials = self._trials()
        mark_front(trials)
        last = max((t["rung"] for t in trials if t["number"] == chosen["trial"]), default=None)
        for trial in trials:
            trial["chosen"] = trial["number"] == chosen["trial"] and trial["rung"] == last
        return Recipe.from_json(chosen["recipe"]), trials

    def _trials(self) -> list[dict[str, Any]]:
        return list(self.workspace.records("trials"))

    def _search(self) -> dict[str, Any]:
        folder = self.workspace.path("trial-files")
        folder.mkdir(parents=True, exist_ok=True)
        before, made = costs({"dense": self.dense}, self.dense.example_inputs, folder, self.timer)
        # Kept with the trials: what they cost is told relative to it, also after an interruption.
        dense = self.workspace.record("dense")
        if dense is None:
            score = self.task.score(made["dense"].run, "validation")
            dense = {"costs": before["dense"], "score": score}
            self.workspace.keep("dense", dense)
        base, score = dense["costs"], dense["score"]
        epoch = self._seconds_per_epoch()
        # A third of the time is for the final training, the rest is shared by the rungs.
        search_time = 0.6 * self.seconds
        spent = sum(t["seconds"] for t in self._trials())
        final_epochs = int(max(2, min(60, 0.3 * self.seconds / max(epoch, 1e-3))))
        epochs = [max(1, round(final_epochs / ETA ** (RUNGS - r))) for r in range(RUNGS)]
        log.info("an epoch takes %.2f s; rungs of %s epochs, then %d", epoch, epochs, final_epochs)
        began = time.monotonic()

        def left() -> float:
            return search_time - spent - (time.monotonic() - began)

        done = {(t["number"], t["rung"]): t for t in self._trials()}
        with progress() as bar:
            shown = bar.add_task("searching recipes", total=search_time, completed=spent)
            number = 0
            # Half of the search goes to the first rung; at least a handful of recipes is tried.
            while (left() > 0.5 * search_time or number < 4) and number < 60:
                if (number, 0) not in done:
                    params = self._propose(
                        number, base, [t for (_, r), t in done.items() if r == 0]
                    )
                    done[number, 0] = self._try(number, 0, params, epochs[0], base, score)
                number += 1
                bar.update(shown, completed=search_time - left())
            for rung in range(1, RUNGS):
                alive = [t for (_, r), t in done.items() if r == rung - 1]
                for trial in ranked(alive, self.budget.max_drop)[
                    : max(1, math.ceil(len(alive) / ETA))
                ]:
                    key = (trial["number"], rung)
                    if key in done:
                        continue
                    if left() < 0:
                        break
                    done[key] = self._try(*key, trial["choices"], epochs[rung], base, score)
                    bar.update(shown, completed=search_time - left())
        return self._choose(list(done.values()), base, final_epochs)

    def _choose(
        self, trials: list[dict[str, Any]], base: Mapping[str, float], epochs: int
    ) -> dict[str, Any]:
        best_rung: dict[int, dict[str, Any]] = {}
        for trial in sorted(trials, key=lambda t: t["rung"]):
            if trial["score"] is not None:
                best_rung[trial["number"]] = trial
        if not best_rung:
            reasons = sorted({t["failed"] for t in trials if t.get("failed")})
            raise BudgetError(f"no recipe could be applied: {reasons[0] if reasons else 'no time'}")
        affordable = [t for t in best_rung.values() if not t["broken"]]
        if not affordable:
            nearest = min(best_rung.values(), key=lambda t: t["excess"])
            raise BudgetError(
                f"no recipe meets {' and '.join(nearest['broken'])} among the "
                f"{len(best_rung)} that were tried; relax it or give more --minutes"
            )
        longest = max(t["rung"] for t in affordable)
        finalists = [t for t in affordable if t["rung"] == longest]
        chosen = ranked(finalists, self.budget.max_drop)[0]
        return {"recipe": recipe_of(chosen["choices"], epochs).to_json(), "trial": chosen["number"]}

    def _table(self) -> LookupTable:
        """Times of operators, kept in this run's folder: another machine's do not slip in."""
        return LookupTable(
            threads=self.timer.threads, path=self.workspace.path("operator-times.json")
        )

    def _seconds_per_epoch(self) -> float:
        """Times an epoch of training the dense network."""
        record = self.workspace.record("epoch")
        if record is None:
            from gossamer.compress.finetune import finetune

            began = time.monotonic()
            finetune(self.dense, self.task, epochs=1, lr=1e-4, seed=self.seed, cpu=self.cpu)
            record = {"seconds": time.monotonic() - began}
            self.workspace.keep("epoch", record)
        return float(record["seconds"])

    def _propose(
        self, number: int, base: Mapping[str, float], seen: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """The next recipe's parameters: a few plain ones first, then optuna's proposals.

        The sampler is made anew for each trial from the finished ones, so an interrupted search
        proposes the same as one that was not.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        high = min(
            [0.95]
            + [s for n in ("macs", "params") if (s := self.budget.share(n, base[n])) is not None]
        )
        low = max(0.05, 0.35 * high)
        narrow = [n for n in ("macs", "params") if n in self.budget.limits]
        packed = "size" in self.budget.limits
        common = {"shape": "prune", "measure": "parameters" if narrow == ["params"] else "macs",
                  "sparsity": 0.8, "bits": 4}  # fmt: skip
        plain: list[dict[str, Any]] = [
            {"criterion": "l2", "allocation": "uniform", "keep": high, "multiple": 8,
             "recovery": "finetune", "rounds": 1, "values": "int8"},
            {"criterion": "taylor", "allocation": "global", "keep": high, "multiple": 8,
             "recovery": "distil", "rounds": 1, "values": "int8"},
            {"criterion": "taylor", "allocation": "global", "keep": high, "multiple": 4,
             "recovery": "finetune", "rounds": 2, "values": "float"},
        ]  # fmt: skip
        if packed:
            plain += [plain[1] | {"values": "few-bits"}, plain[1] | {"values": "sparse"}]
        if number < len(plain):
            return common | plain[number]
        category = optuna.distributions.CategoricalDistribution
        distributions = {
            # Without a limit on what a narrower network saves, it may keep its shape.
            "shape": category(SHAPES if narrow else ("none", *SHAPES)),
            "criterion": category(CRITERIA),
            "allocation": category(ALLOCATIONS),
            "keep": optuna.distributions.FloatDistribution(low, high),
            "multiple": category(MULTIPLES),
            "recovery": category(RECOVERIES),
            "rounds": category((1, 2)),
            "values": category((*VALUES, *PACKED_VALUES) if packed else VALUES),
            "sparsity": optuna.distributions.FloatDistribution(0.5, 0.95),
            "bits": category((2, 3, 4)),
        }
        study = optuna.create_study(
            directions=["maximize", "minimize", "minimize"],
            sampler=optuna.samplers.TPESampler(
                seed=seed_of("proposal", self.seed, number) % 2**32, n_startup_trials=6
            ),
        )
        for trial in sorted(seen, key=lambda t: t["number"]):
            if trial["score"] is None:
                continue
            study.add_trial(
                optuna.trial.create_trial(
                    params={k: trial["choices"][k] for k in distributions},
                    distributions=distributions,
                    values=[trial["score"], trial["latency"], trial["size"]],
                )
            )
        asked = study.ask(distributions)
        return common | dict(asked.params)

    def _try(
        self,
        number: int,
        rung: int,
        params: Mapping[str, Any],
        epochs: int,
        base: Mapping[str, float],
        dense_score: float,
    ) -> dict[str, Any]:
        """Applies a recipe with short training, measures it and keeps the record."""
        began = time.monotonic()
        recipe = recipe_of(params, epochs)
        row: dict[str, Any] = {
            "number": number, "rung": rung, "choices": dict(params), "recipe": recipe.to_json(),
            "score": None, "broken": [], "excess": math.inf, "failed": None,
            "latency_is": "predicted" if rung == 0 else "measured",
        }  # fmt: skip
        folder = self.workspace.path("trial-files")
        try:
            network, seed = self.dense, seed_of("trial", self.seed, number)
            for step, own in zip(recipe.steps, recipe.seeds(seed), strict=True):
                network = step.apply(network, self.task, teacher=self.dense, seed=own, cpu=self.cpu)
            found, made = costs(
                {"dense": folder / "dense.onnx", "trial": network},
                self.dense.example_inputs,
                folder,
                self.timer,
                table=self._table() if rung == 0 else None,
            )
            cost = found["trial"]
            # Latency moves with the machine: what counts is the ratio to the dense network's now.
            cost["latency"] = base["latency"] / cost["speedup"]
            score = self.task.score(made["trial"].run, "validation")
            row |= {name: cost[name] for name in ("macs", "params", "size", "latency", "speedup")}
            row |= {
                "score": score,
                "drop": dense_score - score,
                "broken": self.budget.broken(base, cost, None),
                "excess": sum(
                    max(0.0, cost[n] / limit.target(base[n]) - 1.0)
                    for n, limit in self.budget.limits.items()
                ),
            }
        except GossamerError as error:
            row["failed"] = str(error)
            row["excess"] = 1e9
        row["seconds"] = time.monotonic() - began
        self.workspace.keep(f"trials/{rung}-{number:03d}", row)
        return row


def recipe_of(params: Mapping[str, Any], epochs: int) -> Recipe:
    """The recipe that a trial's parameters stand for, with ``epochs`` of training in all."""
    # A method that trains on the way to its stored values has a third of the epochs.
    trains = params["values"] in ("sparse", "few-bits")
    last = max(1, epochs // 3) if trains else 0
    steps = _shape_steps(params, epochs - last)
    match params["values"]:
        case "int8":
            steps.append("int8")
        case "sparse":
            options = {"sparsity": round(float(params["sparsity"]), 3), "rounds": 1}
            steps.append(("rate-distortion", {**options, "epochs": last, "grid": 25}))
        case "few-bits":
            options = {"bits": int(params["bits"]), "epochs": last, "batch_size": 128}
            steps.append(("quantized-distillation", {**options, "lr": 0.01}))
        case "codebook":
            steps.append(("codebook", {"bits": int(params["bits"]), "steps": 300}))
    return Recipe.of(*steps)


def _shape_steps(params: Mapping[str, Any], epochs: int) -> list[Any]:
    """The steps that make the network narrower and let it recover."""
    keep, measure = float(params["keep"]), params["measure"]
    rate = 0.05 if params["recovery"] == "distil" else 0.02
    recover = [(params["recovery"], {"epochs": epochs, "lr": rate})] if epochs else []
    match params["shape"]:
        case "none":
            return list(recover)
        case "low-rank":
            return [("svd", {measure: round(keep, 4)}), *recover]
        case "bip":
            # MACs fall with the square of the width; a little is left for what does not.
            units = {"sparsity": round(1.0 - 0.97 * keep**0.5, 4), "granularity": "filter"}
            first = epochs // 2
            rest = [(params["recovery"], {"epochs": epochs - first, "lr": rate})]
            return [
                ("bip", {**units, "epochs": first, "lr": 0.05}), *(rest if epochs > first else [])
            ]  # fmt: skip
    steps: list[Any] = []
    rounds = int(params["rounds"])
    for number in range(rounds):
        # The share of each round is of what the round starts from.
        options = {
            "criterion": params["criterion"],
            "allocation": params["allocation"],
            measure: round(keep ** (1.0 / rounds), 4),
            "round_to": int(params["multiple"]),
            "epochs": 0,
        }
        part = epochs * (number + 1) // rounds - epochs * number // rounds
        steps.append(("prune", options))
        if part:
            steps.append((params["recovery"], {"epochs": part, "lr": rate}))
    return steps


def ranked(trials: Sequence[dict[str, Any]], max_drop: float | None) -> list[dict[str, Any]]:
    """Best first: limits on costs met; then the score safely within its limit; then the faster.

    Half of the permitted drop is kept as a margin, since validation scores are noisy. Where no
    drop is named, or it is not met, the more accurate network is the better one.
    """

    def key(trial: Mapping[str, Any]) -> tuple[Any, ...]:
        if trial["score"] is None:
            return (True, True, math.inf, trial["number"])
        safe = max_drop is not None and trial["drop"] <= 0.5 * max_drop
        return (
            bool(trial["broken"]),
            not safe,
            trial["latency"] if safe else -trial["score"],
            trial["number"],
        )

    return sorted(trials, key=key)


def mark_front(trials: Sequence[dict[str, Any]]) -> None:
    """Sets ``on_front`` on trials that no other beats in score, latency and bytes together."""
    points = [t for t in trials if t["score"] is not None]
    for trial in trials:
        trial["on_front"] = False
    front = undominated([[-t["score"], t["latency"], t["size"]] for t in points])
    for trial, is_on in zip(points, front, strict=True):
        trial["on_front"] = is_on
