"""Commands that tell what a network costs on a machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from cyclopts import App

from gossamer.cli.front import Json, app, out_console, print_json
from gossamer.cli.given import module_of

hardware = App(
    name="hardware",
    help="What a network costs on a machine, modelled and measured.",
)
app.command(hardware)


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
    from gossamer.core.graph import Graph, layer_table
    from gossamer.core.network import Network

    module, inputs = module_of(
        model, weights, image_size=image_size, channels=channels, classes=classes
    )
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
        print_json(report)
        return
    _show_profile(report)


@hardware.command
def calibrate(
    *,
    out: Path | None = None,
    threads: int = 1,
    device: Literal["cpu", "cuda"] = "cpu",
    json_: Json = False,
) -> None:
    """Measure this machine's ceilings and write them as a device description.

    Example: gossamer hardware calibrate --out device.yaml

    Parameters
    ----------
    out
        The YAML file. The description is also kept for the other commands of this machine.
    threads
        The figures hold for this many.
    device
        "cuda" measures the GPU.
    json_
        Print JSON.
    """
    import yaml

    from gossamer.hardware.calibrate import cached_place
    from gossamer.hardware.calibrate import calibrate as measure_ceilings

    found = measure_ceilings(threads=threads, device=device)
    kept = cached_place(threads=threads, device=device)
    for place in filter(None, (out, kept)):
        found.write(place)
    if json_:
        print_json(yaml.safe_load(found.to_yaml()))
        return
    from rich.table import Table

    table = Table(title=found.name)
    for column in ("figure", "value", "source"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for dtype, figure in found.macs_per_second.items():
        table.add_row(f"peak, {dtype}", f"{figure.value / 1e9:,.1f} GMAC/s", figure.source)
    for memory in found.memories:
        size = f" ({memory.bytes.value / 2**20:,.2f} MiB)" if memory.bytes else ""
        if rate := memory.bytes_per_second:
            table.add_row(f"{memory.name}{size}", f"{rate.value / 1e9:,.1f} GB/s", rate.source)
    for runtime, figure in found.operator_seconds.items():
        table.add_row(f"one operator, {runtime}", f"{1e6 * figure.value:,.2f} us", figure.source)
    console = out_console()
    console.print(table)
    console.print(f"written to {out or kept}", soft_wrap=True)


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
    console = out_console()
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
