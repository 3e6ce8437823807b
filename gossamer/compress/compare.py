"""Several recipes side by side: what each costs and keeps, and which none of the others beats.

Every recipe starts from the same dense network and is applied with several seeds. What is compared
was measured on the files that would be deployed, after they were written and loaded again, the
latencies of all in turns. The front is drawn by validation scores; test scores are shown beside
them, so that choosing by the front does not use them up.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from gossamer.compress.deploy import deploy, packed_runner
from gossamer.compress.recipe import Recipe
from gossamer.compress.shrink import dense_network, fingerprint_of, refuse_unusable
from gossamer.compress.workspace import Workspace
from gossamer.core.errors import GossamerError, InputError
from gossamer.core.experiment import about, half_width
from gossamer.core.files import exclusive, whole_file, write_json
from gossamer.core.graph import Graph
from gossamer.core.network import Network
from gossamer.core.task import Task
from gossamer.hardware.measure import compare as compare_timings
from gossamer.hardware.measure import measure
from gossamer.parts.front import undominated

log = logging.getLogger(__name__)


def compare(
    model: nn.Module,
    task: Task,
    recipes: Mapping[str, Recipe],
    *,
    out: Path | str,
    seeds: Sequence[int] = (0, 1, 2),
    trained: bool = True,
    epochs: int = 30,
    batch_size: int = 64,
    threads: int = 1,
    rounds: int = 20,
    origin: Mapping[str, Any] | None = None,
    cpu: bool = False,
) -> dict[str, Any]:
    """Applies recipes to one network and measures what they make.

    Args:
        model: the network; unchanged.
        task: its data and metric.
        recipes: by the name they are shown under.
        out: folder for the results; an interrupted run with the same folder goes on.
        seeds: each recipe is applied with each of them.
        trained: whether the model's weights are trained; otherwise it is trained first.
        epochs: of that training.
        batch_size: of the timed call.
        threads: of the runtimes.
        rounds: turns of the timing.
        origin: what the model was made from, for the record.
        cpu: stay on the CPU although there is a GPU.

    Returns:
        What is written to ``compare.json``: "dense", and for each recipe its runs, the mean of
        each number with half of its 95 % interval over the seeds, and "on_front". A recipe that
        fails has the reason in "failed".

    Raises:
        InputError: if there is no recipe or seed, or the folder holds another run.
        UnsupportedError: if the network cannot be traced or exported.
    """
    if not recipes or not seeds:
        raise InputError("comparing needs at least one recipe and one seed")
    if len(set(seeds)) != len(seeds):
        raise InputError("the seeds must differ, or their spread means nothing")
    if batch_size < 1 or threads < 1 or epochs < 1:
        raise InputError("--batch-size, --threads and --epochs are at least 1")
    refuse_unusable(model)
    folder = Path(out)
    with exclusive(folder):
        work = Workspace(
            folder,
            {
                "model": fingerprint_of(model, dict(origin or {}), trained),
                "data": task.fingerprint(),
                "recipes": {name: recipe.to_json() for name, recipe in recipes.items()},
                "training": None if trained else epochs,
            },
        )
        model = copy.deepcopy(model)
        dense = dense_network(
            work, model, task, origin=dict(origin or {"model": type(model).__name__}),
            trained=trained, epochs=epochs, seed=seeds[0], cpu=cpu,
        )  # fmt: skip
        result = _measured(
            work, dense, task, recipes, seeds, batch=batch_size, threads=threads, rounds=rounds,
            cpu=cpu,
        )  # fmt: skip
        result |= {"task": task.describe(), "batch": batch_size, "threads": threads, **about()}
        write_json(folder / "compare.json", result)
        with whole_file(folder / "compare.png") as partial:
            draw(result, partial)
    return result


def _measured(
    work: Workspace,
    dense: Network,
    task: Task,
    recipes: Mapping[str, Recipe],
    seeds: Sequence[int],
    *,
    batch: int,
    threads: int,
    rounds: int,
    cpu: bool,
) -> dict[str, Any]:
    place = work.path("files")
    made: dict[str, dict[int, Network]] = {}
    failed: dict[str, str] = {}
    for name, recipe in recipes.items():
        for seed in seeds:
            try:
                made.setdefault(name, {})[seed] = work.apply(
                    recipe, dense, task, seed=seed, cpu=cpu, name=f"runs/{_plain(name)}-{seed}"
                )
            except GossamerError as error:
                log.warning("%s: %s", name, error)
                failed[name] = str(error)
                made.pop(name, None)
                break
    rows = {"dense": _counted(dense, task, place / "dense", threads)}
    for name, networks in made.items():
        for seed, network in networks.items():
            key = f"{_plain(name)}-{seed}"
            rows[key] = _counted(network, task, place / key, threads)
    inputs = dense.example_inputs
    # Latency depends on the structure, hardly on the seed: the first of each recipe is timed.
    first = {name: f"{_plain(name)}-{seeds[0]}" for name in made}
    onnx = {"dense": place / "dense" / "model.onnx"} | {
        name: place / key / "model.onnx" for name, key in first.items()
    }
    timed = measure(onnx, inputs, batch_sizes=(batch,), threads=(threads,), rounds=rounds)
    timings = {timing.name: timing for timing in timed}
    packed = {name: place / key for name, key in first.items() if rows[key]["packed_bytes"]}
    torch_times = {}
    if packed:
        contenders: dict[str, Any] = {"dense": copy.deepcopy(dense.module).eval()}
        contenders |= {name: packed_runner(where) for name, where in packed.items()}
        torch_timed = measure(
            contenders, inputs, batch_sizes=(batch,), threads=(threads,), runtimes=("torch",),
            rounds=rounds,
        )  # fmt: skip
        torch_times = {timing.name: timing for timing in torch_timed}
    results: dict[str, Any] = {}
    for name, recipe in recipes.items():
        record: dict[str, Any] = {"recipe": recipe.to_json(), "failed": failed.get(name)}
        if name in made:
            runs = [{"seed": s, **rows[f"{_plain(name)}-{s}"]} for s in seeds]
            speed = compare_timings(timings["dense"], timings[name])
            record |= {
                "runtime": made[name][seeds[0]].runtime,
                "runs": runs,
                "means": _means(runs),
                "latency": timings[name].latency.p50,
                "speedup": [speed.ratio, speed.low, speed.high],
            }
            if name in torch_times:
                fast = compare_timings(torch_times["dense"], torch_times[name])
                record["packed_latency"] = torch_times[name].latency.p50
                record["packed_speedup"] = [fast.ratio, fast.low, fast.high]
        results[name] = record
    _mark_front(results)
    before = rows["dense"] | {"latency": timings["dense"].latency.p50}
    return {"dense": before, "recipes": results}


def _counted(network: Network, task: Task, folder: Path, threads: int) -> dict[str, Any]:
    """Scores and sizes of a network, measured on its files."""
    made = deploy(network, folder, threads=threads)
    graph = Graph.trace(network.module, network.example_inputs)
    validation = task.score(made.run, "validation")
    return {
        "macs": graph.macs,
        "macs_effective": graph.macs_effective,
        "params": graph.parameters,
        "onnx_bytes": made.onnx.stat().st_size,
        "packed_bytes": made.packed.stat().st_size if made.packed else None,
        "deployed_bytes": made.nbytes,
        "validation_score": validation,
        "score": task.score(made.run, "test") if task.size("test") else validation,
    }


def _plain(name: str) -> str:
    """A name as part of a path."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


def _means(runs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float | None]]:
    """Mean and half of the 95 % t-interval of every number over the seeds."""
    result: dict[str, tuple[float, float | None]] = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        if name == "seed" or any(value is None for value in values):
            continue
        result[name] = (float(np.mean(values)), half_width(values))
    return result


def _mark_front(results: Mapping[str, dict[str, Any]]) -> None:
    """Sets "on_front" on recipes that no other is better than in score and all costs together."""
    names = [name for name, record in results.items() if record["failed"] is None]
    for record in results.values():
        record["on_front"] = False
    front = undominated(
        [
            [
                -results[name]["means"]["validation_score"][0],
                results[name]["means"]["deployed_bytes"][0],
                results[name]["latency"],
                results[name]["means"]["macs_effective"][0],
            ]
            for name in names
        ]
    )
    for name, is_on in zip(names, front, strict=True):
        results[name]["on_front"] = is_on


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Test scores against deployed bytes and against latency, with intervals over the seeds.

    Args:
        result: as :func:`compare` returns it.
        path: of the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    dense = result["dense"]
    shown = {n: r for n, r in result["recipes"].items() if r["failed"] is None}
    for place, (key, label) in enumerate(
        (("deployed_bytes", "deployed bytes"), ("latency", "ms a batch, ONNX Runtime")), start=1
    ):
        axes = figure.add_subplot(1, 2, place)
        axes.plot(dense[key], dense["score"], "s", color="0.4", label="dense")
        for name, record in shown.items():
            x = record["latency"] if key == "latency" else record["means"][key][0]
            y, half = record["means"]["score"]
            axes.errorbar(
                x, y, yerr=half, marker="o" if record["on_front"] else "x", capsize=3,
                linestyle="none", label=name if record["on_front"] else f"{name} (beaten)",
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlabel(label)
        axes.set_ylabel(f"{result['task']['metric']}, test")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120, format="png")
