"""Commands that make a network smaller, and use what came out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter

from gossamer.cli.front import Json, app, out_console, print_json
from gossamer.cli.given import both_or_embedded, network_of, task_of
from gossamer.core.errors import InputError

_BUDGET = Group("Budget: a share of the original (0.5) or a value with a unit")

Limit = Annotated[str | None, Parameter(group=_BUDGET)]


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
    model, data = both_or_embedded(model, data)
    task = task_of(data, model, image_size=image_size, seed=seed, limit=limit)
    network, trained, origin = network_of(model, task, weights, seed=seed)
    result = run(
        network, task, macs=macs, params=params, size=size, latency=latency, max_drop=max_drop,
        recipe="auto" if recipe == "auto" else Path(recipe), minutes=minutes, out=out,
        trained=trained, epochs=epochs, batch_size=batch_size, threads=threads, seed=seed,
        origin=origin,
    )  # fmt: skip
    if json_:
        print_json(result.report)
        return
    _show_report(result.report, out)


@app.command
def compare(
    model: str | None = None,
    *,
    recipes: list[Path],
    data: Annotated[str | None, Parameter(name=("--data", "--task"))] = None,
    out: Path = Path("compared"),
    weights: Path | None = None,
    seeds: list[int] = [0, 1, 2],  # noqa: B006
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

    model, data = both_or_embedded(model, data)
    read = {}
    for path in recipes:
        if path.stem in read:
            raise InputError(f"two recipes are called {path.stem}; rename one of the files")
        read[path.stem] = Recipe.read(path)
    task = task_of(data, model, image_size=image_size, seed=0, limit=limit)
    network, trained, origin = network_of(model, task, weights, seed=0)
    result = run(
        network, task, read, out=out, seeds=seeds, trained=trained, epochs=epochs,
        batch_size=batch_size, threads=threads, origin=origin,
    )  # fmt: skip
    if json_:
        print_json(result)
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
    console = out_console()
    console.print(table)
    console.print(
        "* on the front: no other recipe is better in validation score, deployed bytes, latency "
        "and MACs together"
    )
    console.print(f"written to {out}: compare.json, compare.png", style="bold")


def _show_report(report: Any, out: Path) -> None:
    from rich.table import Table

    console = out_console()
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
        print_json(found)
        return
    console = out_console()
    for row in found:
        words = ", ".join(f"{c['class']} ({100 * c['probability']:.1f} %)" for c in row["classes"])
        console.print(f"{row['image']}: {words}", highlight=False)
