"""The front door: commands made from typed functions.

Everything heavy is imported inside a command, so that ``gossamer --help`` answers at once. A
problem the user can mend is one sentence on stderr and exit code 2.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Group, Parameter

import gossamer
from gossamer.core.errors import GossamerError, InputError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from gossamer.core.task import Task

app = App(
    name="gossamer",
    help="Deep learning on a budget: make networks smaller, and see what it costs.",
    version=gossamer.__version__,
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,  # main says how to go on
)
_BUDGET = Group("Budget: a share of the original (0.5) or a value with a unit")

_METHODS = Group("Methods of pruning that have")

Json = Annotated[bool, Parameter(name="--json", negative="")]
Limit = Annotated[str | None, Parameter(group=_BUDGET)]


def main() -> None:
    """Runs the command line; GossamerError becomes one sentence and exit code 2."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("gossamer").setLevel(logging.INFO)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of the libraries, to their developers
    try:
        app()
    except GossamerError as error:
        print(f"gossamer: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("gossamer: interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    except OSError as error:  # a full disk, a folder that may not be written
        where = f" ({error.filename})" if error.filename else ""
        print(f"gossamer: {(error.strerror or str(error)).lower()}{where}", file=sys.stderr)
        sys.exit(2)


def _out() -> Console:
    from rich.console import Console

    return Console()


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, allow_nan=False))


@app.command
def shrink(
    model: str | None = None,
    *,
    data: str | None = None,
    out: Path = Path("shrunk"),
    weights: Path | None = None,
    macs: Limit = None,
    params: Limit = None,
    size: Limit = None,
    latency: Limit = None,
    max_drop: Annotated[float | None, Parameter(group=_BUDGET)] = None,
    recipe: str = "auto",
    minutes: float = 3.0,
    epochs: int = 30,
    image_size: int | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    threads: int = 1,
    seed: int = 0,
    json_: Json = False,
) -> None:
    """Make a network smaller within a budget, export and verify it, and write a report.

    Example: gossamer shrink resnet18 --data photos/ --weights my.safetensors --macs 0.5

    Without MODEL and --data: a residual network and real handwritten digits, both embedded.

    Parameters
    ----------
    model
        A timm name, torchvision:NAME, package.module:factory, or a folder written by gossamer.
    data
        "digits", or a folder: images with a subfolder for each class, MNIST, CIFAR-10, Parquet.
    out
        Folder for the results; an interrupted run with the same folder goes on.
    weights
        A safetensors file or a state dict. Without it the network is trained first.
    macs
        Multiply-accumulates, as 0.5 or 10M.
    params
        Parameters, as 0.5 or 1.2M.
    size
        Bytes of the exported file, as 0.25 or 500KB.
    latency
        Median time of a batch in ONNX Runtime, as 0.5 or 3ms.
    max_drop
        Points of the score that may be lost.
    recipe
        A YAML file of steps, or auto to search for one.
    minutes
        For the search and the final training.
    epochs
        Of training a network that has no weights.
    image_size
        Side in pixels. Default: the data's own, or the network's.
    limit
        At most this many training images.
    batch_size
        Of the timed call.
    threads
        Of ONNX Runtime.
    seed
        Of everything that is drawn.
    json_
        Print the report as JSON.
    """
    from gossamer.compress.shrink import shrink as run

    asked = recipe != "auto" or any((macs, params, size, latency, max_drop))
    if model is None and data is None and not asked:
        macs, size, max_drop = "0.5", "0.25", 1.0
    model, data = _both_or_embedded(model, data)
    task = _task(data, model, image_size=image_size, seed=seed, limit=limit)
    network, trained, origin = _network(model, task, weights, seed=seed)
    result = run(
        network, task, macs=macs, params=params, size=size, latency=latency, max_drop=max_drop,
        recipe="auto" if recipe == "auto" else Path(recipe), minutes=minutes, out=out,
        trained=trained, epochs=epochs, batch_size=batch_size, threads=threads, seed=seed,
        origin=origin,
    )  # fmt: skip
    if json_:
        _print_json(result.report)
        return
    _show_report(result.report, out)


@app.command
def compare(
    model: str | None = None,
    *,
    recipes: Annotated[list[Path], Parameter(consume_multiple=True)],
    data: Annotated[str | None, Parameter(name=("--data", "--task"))] = None,
    out: Path = Path("compared"),
    weights: Path | None = None,
    seeds: Annotated[list[int], Parameter(consume_multiple=True)] = [0, 1, 2],  # noqa: B006
    epochs: int = 30,
    image_size: int | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    threads: int = 1,
    json_: Json = False,
) -> None:
    """Apply several recipes to one network, and show which none of the others beats.

    Example: gossamer compare resnet18 --recipes a.yaml b.yaml --data photos/ --weights w.st

    Without MODEL and --data: a residual network and real handwritten digits, both embedded.

    Parameters
    ----------
    model
        A timm name, torchvision:NAME, package.module:factory, or a folder written by gossamer.
    recipes
        YAML files of steps; each is shown under its file's name.
    data
        "digits", or a folder: images with a subfolder for each class, MNIST, CIFAR-10, Parquet.
    out
        Folder for the results; an interrupted run with the same folder goes on.
    weights
        A safetensors file or a state dict. Without it the network is trained first.
    seeds
        Each recipe is applied with each of them; intervals are over them.
    epochs
        Of training a network that has no weights.
    image_size
        Side in pixels. Default: the data's own, or the network's.
    limit
        At most this many training images.
    batch_size
        Of the timed call.
    threads
        Of the runtimes.
    json_
        Print the result as JSON.
    """
    from gossamer.compress.compare import compare as run
    from gossamer.compress.recipe import Recipe

    model, data = _both_or_embedded(model, data)
    read = {}
    for path in recipes:
        if path.stem in read:
            raise InputError(f"two recipes are called {path.stem}; rename one of the files")
        read[path.stem] = Recipe.read(path)
    task = _task(data, model, image_size=image_size, seed=0, limit=limit)
    network, trained, origin = _network(model, task, weights, seed=0)
    result = run(
        network, task, read, out=out, seeds=seeds, trained=trained, epochs=epochs,
        batch_size=batch_size, threads=threads, origin=origin,
    )  # fmt: skip
    if json_:
        _print_json(result)
        return
    _show_comparison(result, out)


def _show_comparison(result: dict[str, Any], out: Path) -> None:
    from rich.table import Table

    table = Table(title=f"{result['task']['name']}: {len(result['recipes'])} recipes")
    for column in (
        "", result["task"]["metric"], "validation", "deployed bytes", "MACs", "zeros skipped",
        f"ms a batch of {result['batch']}", "speed", "runs in",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column in ("", "runs in") else "right")
    dense = result["dense"]
    table.add_row(
        "dense", f"{dense['score']:.2f}", f"{dense['validation_score']:.2f}",
        f"{dense['deployed_bytes']:,}", f"{dense['macs']:,}", f"{dense['macs_effective']:,}",
        f"{dense['latency']:.3f}", "", "onnxruntime",
    )  # fmt: skip
    for name, record in result["recipes"].items():
        if record["failed"] is not None:
            table.add_row(name, f"failed: {record['failed']}")
            continue
        means = record["means"]

        def shown(key: str, form: str, means: Any = means) -> str:
            mean, half = means[key]
            return form.format(mean) + (f" ± {form.format(half)}" if half else "")

        low, middle, high = record["speedup"][1], record["speedup"][0], record["speedup"][2]
        table.add_row(
            ("* " if record["on_front"] else "  ") + name, shown("score", "{:.2f}"),
            shown("validation_score", "{:.2f}"), shown("deployed_bytes", "{:,.0f}"),
            shown("macs", "{:,.0f}"), shown("macs_effective", "{:,.0f}"),
            f"{record['latency']:.3f}", f"{middle:.2f}x ({low:.2f}-{high:.2f})", record["runtime"],
        )  # fmt: skip
    console = _out()
    console.print(table)
    console.print(
        "* on the front: no other recipe is better in validation score, deployed bytes, latency "
        "and MACs together"
    )
    console.print(f"written to {out}: compare.json, compare.png", style="bold")


def _both_or_embedded(model: str | None, data: str | None) -> tuple[str, str]:
    """What was given, or the example that is embedded where nothing was."""
    if model is None and data is None:
        return "gossamer_digits_resnet", "digits"
    if model is None or data is None:
        raise InputError(
            f"{'--data' if data is None else 'MODEL'} is missing; give both a MODEL and --data, or "
            "neither for the embedded example"
        )
    return model, data


def _task(data: str, model: str, *, image_size: int | None, seed: int, limit: int | None) -> Task:
    """The data, at the size and with the channels the network is made for."""
    from gossamer.datasets import open_task

    channels = mean = std = None
    if _is_folder(model):
        from gossamer.core.files import read_json
        from gossamer.core.task import Preprocess

        record = read_json(Path(model) / "network.json")
        for name in ("about", "task", "preprocess"):
            record = record.get(name) if isinstance(record, dict) else None
        if record is not None:
            preprocess = Preprocess.from_json(record)
            channels, mean, std = preprocess.channels, preprocess.mean, preprocess.std
            image_size = image_size or preprocess.height
    elif image_size is None and data != "digits" and ":" not in model:
        image_size = _default_size(model)
    return open_task(
        data, image_size=image_size, channels=channels, seed=seed, limit=limit, mean=mean, std=std
    )


def _is_folder(model: str) -> bool:
    """Whether a model's name is that of a folder written by gossamer.

    Raises:
        InputError: if it is another folder and cannot be the name of a network.
    """
    if (Path(model) / "network.json").is_file():
        return True
    if ("/" in model or model in (".", "..")) and Path(model).is_dir():
        raise InputError(f"{model} holds no network.json; give a folder written by gossamer shrink")
    return False


def _default_size(model: str) -> int | None:
    """The image size a timm model that admits only one was made for."""
    import timm

    import gossamer.models  # noqa: F401 (registers our own)

    if not timm.is_model(model):
        return None
    config = timm.get_pretrained_cfg(model)
    if config is None or not getattr(config, "fixed_input_size", False):
        return None
    return int(config.input_size[-1])


def _network(
    model: str, task: Task, weights: Path | None, *, seed: int
) -> tuple[nn.Module, bool, dict[str, Any]]:
    """Builds or loads a network: the module, whether it is trained, and its origin."""
    import torch

    from gossamer.core.task import Classification
    from gossamer.models import build, load_weights

    assert isinstance(task, Classification)
    if _is_folder(model):
        from gossamer.core.saved import load_network

        module, _, about = load_network(Path(model))
        if weights is not None:
            load_weights(module, weights)
        _fits(model, module, task)
        return module, True, {"model": str(model), "from": about.get("origin", {})}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = build(
            model,
            classes=len(task.classes),
            channels=task.preprocess.channels,
            image_size=(task.preprocess.height, task.preprocess.width),
            example_inputs=task.example_inputs,
        )
    if weights is not None:
        load_weights(module, weights)
    return module, weights is not None, {"model": model}


def _fits(model: str, module: nn.Module, task: Any) -> None:
    import torch

    try:
        with torch.inference_mode():
            outputs = module.eval()(*task.example_inputs)
        fits = outputs.shape[-1] == len(task.classes)
    except Exception as error:  # the graph was made for other sizes
        raise InputError(
            f"the network in {model} does not accept images of "
            f"{tuple(task.example_inputs[0].shape[1:])}"
        ) from error
    if not fits:
        raise InputError(
            f"the network in {model} has {outputs.shape[-1]} classes, the data has "
            f"{len(task.classes)}"
        )


def _show_report(report: Any, out: Path) -> None:
    from rich.table import Table

    console = _out()
    before, after = report["before"], report["after"]
    table = Table(title=f"{report['task']['name']}: before and after")
    for column in ("", "before", "after", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    rows = [
        (report["task"]["metric"], before["score"], after["score"], "{:.2f}"),
        ("MACs", before["macs"], after["macs"], "{:,.0f}"),
        ("MACs, zeros skipped", before["macs_effective"], after["macs_effective"], "{:,.0f}"),
        ("parameters", before["params"], after["params"], "{:,.0f}"),
        ("bytes of the ONNX file", before["bytes"], after["bytes"], "{:,.0f}"),
        (
            f"ms a batch of {after['latency_ms']['batch']}, p50",
            before["latency_ms"]["p50"],
            after["latency_ms"]["p50"],
            "{:.3f}",
        ),
        ("peak memory, bytes", before["peak_memory_bytes"], after["peak_memory_bytes"], "{:,.0f}"),
    ]
    for name, old, new, shape in rows:
        if old is None or new is None:
            continue
        table.add_row(name, shape.format(old), shape.format(new), f"{new / old:.3f}")
    console.print(table)
    speed = report["speedup"]
    said = "" if speed["winner"] else ", no winner inside the noise"
    console.print(
        f"{speed['ratio']:.2f}x as fast, measured in turns "
        f"({speed['low']:.2f} to {speed['high']:.2f}{said})"
    )
    if packed := report["packed"]:
        console.print(
            f"packed form: {packed['bytes']:,} bytes (as float32 {packed['float_bytes']:,}), "
            f"score {packed['score']:.2f}, {packed['speedup']['ratio']:.2f}x as fast in torch"
        )
    console.print(f"verified: {'yes' if report['verified'] else 'no'}")
    console.print(
        f"written to {out}: model.onnx, model.pt2, network.json, report.html", style="bold"
    )


@app.command
def predict(folder: Path, *images: Path, top: int = 1, json_: Json = False) -> None:
    """Classify images with a network that shrink wrote.

    Example: gossamer predict small/ cat.jpg dog.png --top 3

    Parameters
    ----------
    folder
        A folder written by gossamer shrink.
    images
        Image files.
    top
        How many classes to name for each image.
    json_
        Print JSON.
    """
    import torch

    from gossamer.core.export import OnnxRunner
    from gossamer.core.task import Preprocess
    from gossamer.datasets.decode import decode

    if not images:
        raise InputError("name at least one image")
    if top < 1:
        raise InputError(f"--top must be at least 1, not {top}")
    path = folder / "model.onnx"
    if not path.is_file():
        raise InputError(f"{folder} holds no model.onnx; give a folder written by gossamer shrink")
    runner = OnnxRunner(path)
    task = runner.metadata().get("task")
    names = task.get("classes") if isinstance(task, dict) else None
    if not isinstance(task, dict) or "preprocess" not in task or not isinstance(names, list):
        raise InputError(
            f"{path} carries no preprocessing and class names; was it written by shrink?"
        )
    preprocess = Preprocess.from_json(task["preprocess"])
    if preprocess.channels not in (1, 3):
        raise InputError(f"{path} takes {preprocess.channels} channels; images have 1 or 3")
    size = (preprocess.height, preprocess.width)
    found = []
    for image in images:
        raw = decode(image, str(image), channels=preprocess.channels, size=size)
        tensor = torch.from_numpy(raw).unsqueeze(0)
        if preprocess.scale != 255:
            tensor = tensor.float() * (preprocess.scale / 255.0)
        logits = runner(preprocess(tensor))
        if not isinstance(logits, torch.Tensor) or logits.numel() != len(names):
            raise InputError(
                f"{path} does not answer one number for each of its {len(names)} classes"
            )
        shares = torch.softmax(logits.flatten().float(), 0)
        best = shares.topk(min(top, len(shares)))
        found.append(
            {
                "image": str(image),
                "classes": [
                    {"class": str(names[i]), "probability": p}
                    for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
                ],
            }
        )
    if json_:
        _print_json(found)
        return
    console = _out()
    for row in found:
        words = ", ".join(f"{c['class']} ({100 * c['probability']:.1f} %)" for c in row["classes"])
        console.print(f"{row['image']}: {words}", highlight=False)


@app.command
def profile(
    model: str,
    *,
    weights: Path | None = None,
    image_size: int | None = None,
    channels: int = 3,
    classes: int | None = None,
    measure: bool = False,
    json_: Json = False,
) -> None:
    """Show what every layer of a network costs.

    Example: gossamer profile resnet18 --image-size 224

    Parameters
    ----------
    model
        A timm name, torchvision:NAME, package.module:factory, or a folder written by gossamer.
    weights
        A safetensors file or a state dict.
    image_size
        Side in pixels. Default: the network's own, or 224.
    channels
        Of the input.
    classes
        Logits. Default: the network's own.
    measure
        Also measure latency in ONNX Runtime (one image, one thread).
    json_
        Print JSON.
    """
    import torch

    from gossamer.core.graph import Graph, layer_table
    from gossamer.core.network import Network
    from gossamer.models import build, load_weights

    if _is_folder(model):
        from gossamer.core.saved import load_network

        module, inputs, _ = load_network(Path(model))
    else:
        module = build(model, classes=classes, channels=channels, image_size=image_size)
        config = getattr(module, "default_cfg", None) or {}
        side = image_size or config.get("input_size", (3, 224, 224))[-1]
        inputs = (torch.randn(2, channels, side, side),)
    if weights is not None:
        load_weights(module, weights)
    graph = Graph.trace(module, inputs)
    rows = layer_table(graph)
    total = graph.cost()
    report: dict[str, Any] = {
        "model": model,
        "parameters": total.parameters,
        "macs": total.macs,
        "bytes_moved": total.bytes_moved,
        "activation_bytes": total.activation_bytes,
        "layers": [
            {
                "module": r["module"], "operators": r["ops"], "output": list(r["output"]),
                "parameters": r["parameters"], "macs": r["macs"], "bytes_moved": r["bytes_moved"],
            }
            for r in rows
        ],
    }  # fmt: skip
    if measure:
        from gossamer.hardware.measure import measured_costs

        cost = measured_costs({"network": Network(module, inputs)})["network"]
        report["measured"] = {k: v for k, v in cost.to_json().items() if v not in (None, ())}
    if json_:
        _print_json(report)
        return
    _show_profile(report)


def _show_profile(report: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title=report["model"])
    for column in ("layer", "output", "parameters", "MACs", "share", "kB moved"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for row in report["layers"]:
        if not row["macs"] and not row["parameters"]:
            continue
        table.add_row(
            row["module"] or "(network)",
            "x".join(map(str, row["output"][1:])),
            f"{row['parameters']:,}",
            f"{row['macs']:,}",
            f"{100 * row['macs'] / max(1, report['macs']):.1f} %",
            f"{row['bytes_moved'] / 1e3:,.0f}",
        )
    console = _out()
    console.print(table)
    console.print(
        f"{report['parameters']:,} parameters, {report['macs']:,} MACs, "
        f"{report['activation_bytes'] / 1e6:.2f} MB of activations at the peak of one sample"
    )
    if "measured" in report:
        latency = report["measured"]["latency"]
        console.print(
            f"{latency['p50']:.2f} ms (p95 {latency['p95']:.2f}) in ONNX Runtime, "
            f"{report['measured']['file_bytes']:,} bytes"
        )


@app.command
def systems(
    *,
    when: Annotated[str | None, Parameter(group=_METHODS)] = None,
    structured: Annotated[bool | None, Parameter(group=_METHODS, negative="--unstructured")] = None,
    granularity: Annotated[str | None, Parameter(group=_METHODS)] = None,
    criterion: Annotated[str | None, Parameter(group=_METHODS)] = None,
    learned: Annotated[str | None, Parameter(group=_METHODS)] = None,
    data: Annotated[str | None, Parameter(group=_METHODS)] = None,
    scope: Annotated[str | None, Parameter(group=_METHODS)] = None,
    schedule: Annotated[str | None, Parameter(group=_METHODS)] = None,
    architecture: Annotated[str | None, Parameter(group=_METHODS)] = None,
    here: Annotated[bool | None, Parameter(group=_METHODS, negative="")] = None,
    json_: Json = False,
) -> None:
    """List the 85 systems and what was measured of them, or ask for methods of pruning.

    Example: gossamer systems --when before-training --unstructured --data none

    Parameters
    ----------
    when
        before-training, during-training, after-training or run-time.
    structured
        Methods that leave smaller dense layers, or zeros only.
    granularity
        What goes as a whole: weight, filter, channel, neuron, head, layer, block ...
    criterion
        magnitude, norm, saliency, loss-change, reconstruction, similarity, activation ...
    learned
        How masks are learned: none, mask, score, gating, dynamic-sparse, bi-level ...
    data
        What is needed to decide: none, unlabelled, labelled or few-shot.
    scope
        local, global or both.
    schedule
        one-shot, iterative, gradual or learned.
    architecture
        cnn, vit, bert, llm, rnn, gnn ...
    here
        Only those that gossamer has.
    json_
        Print JSON.
    """
    wanted = {
        "when": when, "granularity": granularity, "criterion": criterion, "learned": learned,
        "data": data, "scope": scope, "schedule": schedule, "architectures": architecture,
    }  # fmt: skip
    wanted = {name: value for name, value in wanted.items() if value is not None}
    if wanted or structured is not None or here:
        _show_methods(wanted, structured, here, json_)
        return
    from gossamer.core.catalog import Catalog

    catalog = Catalog.load()
    if json_:
        _print_json(catalog.as_json())
        return
    from rich.table import Table

    table = Table(title=f"{len(catalog)} systems")
    for column in ("system", "room", "title", "provenance", "verdict"):
        table.add_column(column, no_wrap=column in ("system", "room"))
    for system in catalog.systems:
        table.add_row(system.spec, system.room, system.title, system.provenance, system.verdict)
    _out().print(table)


def _show_methods(
    wanted: dict[str, str], structured: bool | None, here: bool | None, json_: bool
) -> None:
    from gossamer.compress.prune.taxonomy import find

    found = find(structured=structured, implemented=here or None, **wanted)
    if json_:
        _print_json([method.to_json() for method in found])
        return
    from rich.table import Table

    table = Table(title=f"{len(found)} methods of pruning")
    for column in ("method", "year", "goes", "when", "criterion", "learned", "data", "here"):
        table.add_column(column)
    for method in found:
        step = (method.implemented_by or "").rpartition(":")[2].replace("_", "-")
        options = ", ".join(f"{k}: {v}" for k, v in method.options.items())
        table.add_row(
            method.name, str(method.year), ", ".join(method.granularity), method.when,
            method.criterion, method.learned, method.data,
            f"{step} ({options})" if options else step,
        )  # fmt: skip
    _out().print(table)


@app.command
def reproduce(
    system: str,
    *,
    full: Annotated[bool, Parameter(negative="--quick")] = False,
    seeds: tuple[int, ...] | None = None,
    out: Path | None = None,
    json_: Json = False,
) -> None:
    """Measure what a system's paper claims, and say which claims hold.

    Example: gossamer reproduce otov3 --quick

    Parameters
    ----------
    system
        A name from gossamer systems.
    full
        The sizes of the paper instead of a few minutes on two cores.
    seeds
        Seeds in place of the experiment's own.
    out
        Write the result (JSON) here, and its plot beside it.
    json_
        Print the result as JSON.
    """
    import importlib

    from gossamer.core.catalog import Catalog

    entry = Catalog.load()[system]
    if not entry.measurable:
        raise InputError(f"{system} has no experiment yet; `gossamer systems` shows what is here")
    experiment = importlib.import_module(entry.experiment).EXPERIMENT
    result = experiment.run("full" if full else "quick", seeds)
    if out is not None:
        result.write(out)
        if experiment.draw is not None:
            experiment.draw(result, out.with_suffix(".png"))
    if json_:
        _print_json(
            {
                "spec": result.spec, "mode": result.mode, "verdict": result.verdict(),
                "evidence": [vars(e) for e in result.evidence()],
                "rows": [dict(r) for r in result.rows], "about": dict(result.about),
            }
        )  # fmt: skip
        return
    from rich.table import Table

    table = Table(title=f"{system}: {result.verdict()}")
    for column in ("claim", "left", "right", "difference (95 %)", "holds", "paper"):
        table.add_column(column)
    for claim, found in zip(result.claims, result.evidence(), strict=True):
        if found.holds is None:
            table.add_row(claim.text, "-", "-", "-", "not measured", claim.paper)
            continue
        width = "" if found.half_width is None else f" ± {found.half_width:.3g}"
        table.add_row(
            claim.text, f"{found.left:.4g}", f"{found.right:.4g}", f"{found.difference:.3g}{width}",
            "yes" if found.holds else "no", claim.paper,
        )  # fmt: skip
    _out().print(table)


if __name__ == "__main__":
    main()
