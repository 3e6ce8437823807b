"""The main job: network, data and budget in; a smaller, verified network and a report out.

The dense network is trained first if it has no weights. A recipe is applied, or searched for within
the given minutes. What is reported is measured on the exported files after they were written and
loaded again; the test split is touched once, for that.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from gossamer.compress.budget import Budget, Limit
from gossamer.compress.deploy import packed_runner
from gossamer.compress.planner import Planner, Timer
from gossamer.compress.recipe import Recipe
from gossamer.compress.workspace import PACKED, Workspace
from gossamer.core.errors import BudgetError, GossamerError, InputError, first_line
from gossamer.core.experiment import about
from gossamer.core.export import OnnxRunner, largest_difference, write_onnx, write_pt2
from gossamer.core.files import exclusive, load_state, read_json, save_state, write_json, write_text
from gossamer.core.fit import Supervised, fit, sgd, warm_cosine
from gossamer.core.graph import Graph, layer_table
from gossamer.core.network import Network
from gossamer.core.saved import GRAPH_FILE, WEIGHTS_FILE, save_network
from gossamer.core.segmentation import Segmentation
from gossamer.core.task import Labelled, Task, evaluating
from gossamer.hardware.measure import compare, measure, peak_memory_of

log = logging.getLogger(__name__)

FLOAT_TOLERANCE = 1e-3
AGREEMENT = 0.95  # share of validation labels on which an integer file must agree with its module


@dataclass(frozen=True)
class Shrunk:
    """What :func:`shrink` made.

    Attributes:
        network: the smaller network.
        report: as in ``report.json``.
        folder: with the exported files, or None if none was asked for.
    """

    network: Network
    report: Mapping[str, Any]
    folder: Path | None = None

    def __repr__(self) -> str:
        before, after = self.report["before"], self.report["after"]
        said = ", ".join(
            f"{name} {before[name]:,} -> {after[name]:,}" for name in ("macs", "params", "bytes")
        )
        return f"Shrunk(score {before['score']:.2f} -> {after['score']:.2f}, {said})"

    @property
    def module(self) -> nn.Module:
        """The smaller network's module."""
        return self.network.module


def shrink(
    model: nn.Module,
    task: Task,
    *,
    macs: Limit | float | str | None = None,
    params: Limit | float | str | None = None,
    size: Limit | float | str | None = None,
    latency: Limit | float | str | None = None,
    max_drop: float | None = None,
    recipe: Recipe | Path | str | Literal["auto"] = "auto",
    minutes: float = 5.0,
    out: Path | str | None = None,
    trained: bool = True,
    epochs: int = 30,
    batch_size: int = 64,
    threads: int = 1,
    seed: int = 0,
    origin: Mapping[str, Any] | None = None,
    cpu: bool = False,
) -> Shrunk:
    """Makes a network smaller within a budget and proves it.

    Args:
        model: the network; unchanged.
        task: its data and metric.
        macs: limit on multiply-accumulates: a share of the original (0.5) or a value ("10M").
        params: limit on parameters, likewise.
        size: limit on the bytes of the deployed file, likewise ("100KB").
        latency: limit on the median time of a batch in ONNX Runtime, likewise ("2ms").
        max_drop: points of the score that may be lost. With no limit at all a search aims at half
            of the MACs and one point; a given recipe is applied without a budget.
        recipe: steps to apply (a recipe, YAML file), or "auto" to search for them.
        minutes: for the search and its final training.
        out: folder for the results; an interrupted run with the same folder goes on.
        trained: whether the model's weights are trained; otherwise it is trained first.
        epochs: of that training.
        batch_size: of the timed call.
        threads: of ONNX Runtime.
        seed: of everything that is drawn.
        origin: what the model was made from, for the record.
        cpu: stay on the CPU although there is a GPU.

    Raises:
        InputError: if model, task, recipe or folder cannot be used.
        UnsupportedError: if the network cannot be traced or exported.
        BudgetError: if the budget cannot be met; the sentence says what came nearest.
    """
    budget = Budget.of(macs=macs, params=params, size=size, latency=latency, max_drop=max_drop)
    if recipe == "auto" and not budget.limits and max_drop is None:
        budget = Budget.of(macs=0.5, max_drop=1.0)
    if not minutes > 0:
        raise InputError(f"--minutes must be above 0, not {minutes}")
    if isinstance(recipe, str | Path) and recipe != "auto":
        recipe = Recipe.read(Path(recipe))
    if batch_size < 1 or threads < 1:
        raise InputError(
            f"--batch-size and --threads are at least 1, not {min(batch_size, threads)}"
        )
    if not trained and epochs < 1:
        raise InputError(f"--epochs must be at least 1, not {epochs}")
    refuse_unusable(model)
    with tempfile.TemporaryDirectory() if out is None else nullcontext(out) as place:
        folder = Path(place)
        with exclusive(folder), _no_empty_folder(folder):
            job = _Job(
                model=model,
                task=task,
                budget=budget,
                recipe=None if isinstance(recipe, str | Path) else recipe,
                seconds=60.0 * minutes,
                folder=folder,
                trained=trained,
                epochs=epochs,
                timer=Timer(batch=batch_size, threads=threads),
                seed=seed,
                origin=dict(origin or {"model": type(model).__name__}),
                cpu=cpu,
            )
            network, report = job.run()
    return Shrunk(network, report, None if out is None else Path(out))


@contextmanager
def _no_empty_folder(folder: Path) -> Iterator[None]:
    """Leaves no folder behind for a run that failed before it had anything to keep."""
    try:
        yield
    except GossamerError:
        if [path.name for path in folder.iterdir()] == [".lock"]:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def refuse_unusable(model: nn.Module) -> None:
    """Refuses weights that are no numbers."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"the weights hold NaN or infinity in {name}; mend or retrain them")


@dataclass
class _Job:
    model: nn.Module
    task: Task
    budget: Budget
    recipe: Recipe | None
    seconds: float
    folder: Path
    trained: bool
    epochs: int
    timer: Timer
    seed: int
    origin: dict[str, Any]
    cpu: bool

    def run(self) -> tuple[Network, dict[str, Any]]:
        # Before hours are spent: a network that cannot be exported is told now.
        with tempfile.TemporaryDirectory() as scratch:
            write_onnx(Network(self.model, self.task.example_inputs), Path(scratch) / "dense.onnx")
        if not self.trained:
            self.model = copy.deepcopy(self.model)  # it is trained, and the caller's is unchanged
        work = Workspace(
            self.folder,
            {
                "model": fingerprint_of(self.model, self.origin, self.trained),
                "data": self.task.fingerprint(),
                "budget": self.budget.to_json(),
                "recipe": self.recipe.to_json() if self.recipe else "auto",
                "seed": self.seed,
                "training": None if self.trained else self.epochs,
            },
        )
        began = time.monotonic()
        dense = dense_network(
            work, self.model, self.task, origin=self.origin, trained=self.trained,
            epochs=self.epochs, seed=self.seed, cpu=self.cpu,
        )  # fmt: skip
        trials: list[dict[str, Any]] = []
        recipe = self.recipe
        if recipe is None:
            recipe, trials = Planner(
                dense=dense,
                task=self.task,
                budget=self.budget,
                workspace=work,
                seconds=self.seconds,
                timer=self.timer,
                seed=self.seed,
                cpu=self.cpu,
            ).run()
        small = work.apply(recipe, dense, self.task, seed=self.seed, cpu=self.cpu)
        return small, self._publish(work, dense, small, recipe, trials, began)

    def _publish(
        self,
        work: Workspace,
        dense: Network,
        small: Network,
        recipe: Recipe,
        trials: list[dict[str, Any]],
        began: float,
    ) -> dict[str, Any]:
        from gossamer.compress.report import page

        stage = work.path("export")
        stage.mkdir(parents=True, exist_ok=True)
        files = {"before": stage / "before.onnx", "after": stage / "model.onnx"}
        metadata = {"task": self.task.describe(), "steps": [dict(s) for s in small.steps]}
        write_onnx(dense, files["before"], metadata=metadata)
        write_onnx(small, files["after"], metadata=metadata)
        # From here on only what was written and loaded again counts.
        rows, ratio, roofline = self._measured(dense, small, files)
        save_network(stage, small.module, small.example_inputs, metadata | {"origin": self.origin})
        packed = self._packed(dense, small, stage)
        drop = rows["before"]["score"] - rows["after"]["score"]
        broken = self.budget.broken(
            _budget_row(rows["before"]), _budget_row(rows["after"], packed),
            rows["before"]["validation_score"] - rows["after"]["validation_score"],
        )  # fmt: skip
        if broken:
            work.clear("export")
            if self.recipe is None:
                # With more time, or on a quieter machine, the search may choose another.
                work.clear("chosen")
                work.clear("steps")
            other = "change the recipe" if self.recipe else "give more --minutes"
            raise BudgetError(
                f"the budget cannot be met: {' and '.join(broken)}; relax it or {other}"
            )
        verified, checks = self._verified(small, files["after"])
        if packed:
            checks["packed_agreement"] = packed["agreement"]
            verified = verified and packed["agreement"] >= AGREEMENT
        report = {
            "model": self.origin,
            "task": self.task.describe(),
            "budget": self.budget.to_json(),
            "before": rows["before"],
            "after": rows["after"],
            "drop": drop,
            "speedup": ratio,
            "recipe": recipe.to_json(),
            "recipe_yaml": recipe.to_yaml(),
            "steps": [dict(s) for s in small.steps],
            "runtime": small.runtime,
            "packed": packed,
            "layers": _layers(dense, small),
            "roofline": roofline,
            "classes": self._classes(files),
            "trials": trials,
            "verified": verified,
            "checks": checks,
            "seconds": time.monotonic() - began,
            **about(seed=self.seed),
        }
        write_pt2(small, stage / "model.pt2")
        write_text(stage / "report.html", page(report))
        write_text(stage / "recipe.yaml", recipe.to_yaml())
        # The report comes last: where it is, everything is.
        (self.folder / "report.json").unlink(missing_ok=True)
        (self.folder / PACKED).unlink(missing_ok=True)
        for name in ("model.onnx", "model.pt2", "weights.safetensors", "network.json",
                     "recipe.yaml", "report.html", *([PACKED] if packed else [])):  # fmt: skip
            (stage / name).replace(self.folder / name)
        write_json(self.folder / "report.json", report)
        work.clear("export")
        work.clear("trial-files")
        return report

    def _measured(
        self, dense: Network, small: Network, files: Mapping[str, Path]
    ) -> tuple[dict[str, dict[str, Any]], dict[str, Any], dict[str, Any] | None]:
        timings = measure(
            files, dense.example_inputs, batch_sizes=(self.timer.batch,),
            threads=(self.timer.threads,), rounds=max(20, self.timer.rounds), energy=True,
        )  # fmt: skip
        by_name = {timing.name: timing for timing in timings}
        split = "test" if self.task.size("test") else "validation"
        rows: dict[str, dict[str, Any]] = {}
        graphs: dict[str, Graph] = {}
        for name, network in (("before", dense), ("after", small)):
            runner = OnnxRunner(files[name], threads=self.timer.threads)
            graph = Graph.trace(network.module, network.example_inputs)
            graphs[name] = graph
            latency = by_name[name].latency
            rows[name] = {
                "score": self.task.score(runner, split),
                "validation_score": self.task.score(runner, "validation"),
                "macs": graph.macs,
                "macs_effective": graph.macs_effective,
                "params": graph.parameters,
                "bytes": files[name].stat().st_size,
                "latency_ms": {
                    "p50": latency.p50, "p95": latency.p95, "batch": latency.batch,
                    "threads": latency.threads, "spread": latency.spread,
                },
                "peak_memory_bytes": peak_memory_of(
                    files[name], network.example_inputs, batch=self.timer.batch
                ),
                "energy_joules": by_name[name].joules,
            }  # fmt: skip
        speed = compare(by_name["before"], by_name["after"])
        ratio = {"ratio": speed.ratio, "low": speed.low, "high": speed.high, "winner": speed.winner}
        formats = {"before": dense.storage, "after": small.storage}
        return rows, ratio, self._roofline(rows, graphs, formats)

    def _roofline(
        self,
        rows: Mapping[str, Mapping[str, Any]],
        graphs: Mapping[str, Graph],
        formats: Mapping[str, Mapping[str, str]],
    ) -> dict[str, Any] | None:
        """How efficient both networks are and could be here; None where it cannot be told."""
        try:
            # Compilers are loaded only where a network is finished.
            from gossamer.hardware.calibrate import device_at_hand
            from gossamer.hardware.roofline import roofline_record

            device = device_at_hand(threads=self.timer.threads)
            # An int8 file computes in int8 where it is run; its ceiling is another.
            integer = "int8" in device.macs_per_second
            return {
                "device": device.name,
                "source": device.macs_per_second["float32"].source,
                **{
                    name: roofline_record(
                        graph, device, batch=self.timer.batch,
                        latency_ms=rows[name]["latency_ms"]["p50"],
                        dtype="int8"
                        if integer and any(f.startswith("int8/") for f in formats[name].values())
                        else "float32",
                    )
                    for name, graph in graphs.items()
                },
            }  # fmt: skip
        except Exception as error:  # an illustration: nothing of it may lose a finished network
            log.warning("the report has no roofline: %s", first_line(error))
            return None

    def _packed(self, dense: Network, small: Network, stage: Path) -> dict[str, Any] | None:
        """What the packed form costs and answers, after it was written and loaded again."""
        if small.packed is None:
            return None
        small.packed.save(stage / PACKED)
        runner = packed_runner(stage)
        split = "test" if self.task.size("test") else "validation"
        timings = measure(
            {"before": copy.deepcopy(dense.module).eval(), "packed": runner},
            dense.example_inputs, batch_sizes=(self.timer.batch,),
            threads=(self.timer.threads,), runtimes=("torch",),
            rounds=max(20, self.timer.rounds),
        )  # fmt: skip
        speed = compare(*timings)
        return {
            "file": PACKED,
            "bytes": (stage / PACKED).stat().st_size,
            "network_bytes": (stage / GRAPH_FILE).stat().st_size,
            "float_bytes": (stage / WEIGHTS_FILE).stat().st_size,
            "score": self.task.score(runner, split),
            "validation_score": self.task.score(runner, "validation"),
            "agreement": _agreement(self.task, small.module, runner),
            "latency_ms": {"p50": timings[1].latency.p50, "batch": timings[1].latency.batch},
            "speedup": {"ratio": speed.ratio, "low": speed.low, "high": speed.high,
                        "winner": speed.winner},
        }  # fmt: skip

    def _verified(self, small: Network, file: Path) -> tuple[bool, dict[str, Any]]:
        """Compares the exported file with the module it was made of."""
        runner = OnnxRunner(file)
        checks: dict[str, Any] = {
            "surgery": [
                bool(r.get("verified"))
                for step in small.steps
                for r in step["report"].get("rounds", [])
            ]
        }
        if small.write_onnx is None:
            checks["largest_difference"] = largest_difference(
                small.module, runner, small.example_inputs
            )
            good = checks["largest_difference"] <= FLOAT_TOLERANCE
        else:
            checks["agreement"] = _agreement(self.task, small.module, runner)
            good = checks["agreement"] >= AGREEMENT
        return bool(good and all(checks["surgery"])), checks

    def _classes(self, files: Mapping[str, Path]) -> dict[str, Any]:
        if not isinstance(self.task, Labelled | Segmentation):
            return {}
        split = "test" if self.task.size("test") else "validation"
        return {name: self.task.class_scores(OnnxRunner(f), split) for name, f in files.items()}


def dense_network(
    work: Workspace,
    model: nn.Module,
    task: Task,
    *,
    origin: Mapping[str, Any],
    trained: bool,
    epochs: int,
    seed: int,
    cpu: bool,
) -> Network:
    """The network to start from; trained now, in place, if it was not.

    Args:
        work: where its weights are kept once it is trained.
        model: the network.
        task: its data.
        origin: what the model was made from.
        trained: whether its weights are trained.
        epochs: of training it.
        seed: of training it.
        cpu: stay on the CPU although there is a GPU.
    """
    network = Network(model, task.example_inputs, origin=origin)
    if trained:
        return network
    place = work.path("dense.safetensors")
    if not place.exists():
        log.info("the network has no weights; it is trained for %d epochs first", epochs)
        rule = Supervised(model, task, optimizer=_optimizer(model), schedule=warm_cosine(0.1))
        state = work.path("dense.state")
        fit(
            rule, task, epochs=epochs, seed=seed, checkpoint=state, cpu=cpu,
            title="training the dense network",
        )  # fmt: skip
        save_state(place, model.cpu().state_dict())
        state.unlink(missing_ok=True)
    model.load_state_dict(load_state(place))
    return network


def _agreement(task: Task, module: nn.Module, runner: OnnxRunner | nn.Module) -> float:
    """Share of the validation split on which two networks decide the same."""
    same = total = 0
    with evaluating(module), evaluating(runner):
        for batch in task.batches("validation", batch_size=256, shuffle=False):
            a = task.decisions(task.outputs(module, batch))
            b = task.decisions(task.outputs(runner, batch))
            same += int((a == b).sum())
            total += a.numel()
    return same / max(1, total)


def _budget_row(
    row: Mapping[str, Any], packed: Mapping[str, Any] | None = None
) -> dict[str, float]:
    # A packed network is deployed as two files; nothing else of it is smaller.
    files = float(packed["bytes"] + packed["network_bytes"]) if packed else float(row["bytes"])
    return {
        "macs": float(row["macs"]),
        "params": float(row["params"]),
        "size": files,
        "latency": float(row["latency_ms"]["p50"]),
    }


def _layers(dense: Network, small: Network) -> list[dict[str, Any]]:
    """Counted costs of each module before and after, in execution order."""
    tables = []
    for network in (dense, small):
        table = layer_table(Graph.trace(network.module, network.example_inputs))
        tables.append({row["module"]: row for row in table})
    before, after = tables

    def short(row: Mapping[str, Any] | None) -> dict[str, Any] | None:
        if row is None:
            return None
        return {
            "macs": row["macs"],
            "parameters": row["parameters"],
            "output": list(row["output"]),
        }

    return [
        {"module": name, "before": short(row), "after": short(after.get(name))}
        for name, row in before.items()
        if row["macs"] or row["parameters"]
    ]


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """SGD for networks with batch normalisation, AdamW for the others."""
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        return sgd(model, lr=0.1)
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)


def fingerprint_of(model: nn.Module, origin: Mapping[str, Any], trained: bool) -> str:
    """Changes with the model's name and, if it is trained, with any weight."""
    digest = hashlib.blake2b(repr(sorted(origin.items())).encode(), digest_size=8)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        if trained:
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def finished(folder: Path) -> dict[str, Any] | None:
    """The report of a finished run, or None."""
    path = Path(folder) / "report.json"
    return read_json(path) if path.exists() else None
