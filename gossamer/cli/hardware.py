"""Commands that tell what a network costs on a machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from gossamer.cli.front import Json, app, out_console, print_json
from gossamer.cli.given import module_of
from gossamer.core.errors import InputError

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


@hardware.command
def predict(
    model: str,
    *,
    batch: int = 1,
    threads: int = 1,
    device: str | None = None,
    measure: bool = False,
    weights: Path | None = None,
    image_size: int | None = None,
    channels: int = 3,
    classes: int | None = None,
    json_: Json = False,
) -> None:
    """Predict how long a network takes in ONNX Runtime, from its operators.

    Example: gossamer hardware predict resnet18 --batch 8

    Parameters
    ----------
    model
        A timm name, torchvision:NAME, package.module:factory, or a folder written by gossamer.
    batch
        Samples in the call.
    threads
        Of ONNX Runtime.
    device
        A device file or a name: only its roofline is shown. Default: this machine.
    measure
        Also measure the network itself.
    weights
        A safetensors file or a state dict.
    image_size
        Side in pixels. Default: the network's own, or 224.
    channels
        Of the input.
    classes
        Logits. Default: the network's own.
    json_
        Print JSON.
    """
    import tempfile

    from gossamer.core.export import OnnxRunner, write_onnx
    from gossamer.core.network import Network
    from gossamer.hardware.calibrate import machine_device
    from gossamer.hardware.device import read_device
    from gossamer.hardware.measure import measure as timed
    from gossamer.hardware.measure import resized
    from gossamer.hardware.onnx_operators import onnx_operators
    from gossamer.hardware.predictor import LookupTable, Roofline

    if min(batch, threads) < 1:
        raise InputError(f"--batch and --threads must be at least 1, not {batch} and {threads}")
    module, inputs = module_of(
        model, weights, image_size=image_size, channels=channels, classes=classes
    )
    report: dict[str, Any] = {"model": model, "batch": batch, "threads": threads}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_onnx(Network(module.eval(), inputs), path)
        feed = OnnxRunner(path).feed(*resized(inputs, batch))
        found = onnx_operators(path, feed, threads=threads)
        described = machine_device(threads=threads) if device is None else read_device(device)
        report |= {
            "device": described.name,
            "operators": len(found),
            "roofline_ms": Roofline(described).predict(found),
        }
        if device is None:
            report["table_ms"] = LookupTable.of_machine(threads=threads).predict(found)
        if measure:
            (timing,) = timed({model: path}, inputs, batch_sizes=(batch,), threads=(threads,))
            report["measured_ms"] = timing.latency.p50
    if json_:
        print_json(report)
        return
    said = {
        "roofline_ms": "modelled: the roofline",
        "table_ms": "modelled: operators timed one by one",
        "measured_ms": "measured, median",
    }
    from rich.table import Table

    table = Table(title=f"{model}, batch {batch}, on {report['device']}")
    table.add_column("")
    table.add_column("ms", justify="right")
    for key, words in said.items():
        if key in report:
            table.add_row(words, f"{report[key]:.3f}")
    out_console().print(table)


@hardware.command
def roofline(
    model: str,
    *,
    device: str | None = None,
    batch: int = 1,
    weights: Path | None = None,
    image_size: int | None = None,
    channels: int = 3,
    classes: int | None = None,
    memory: str | None = None,
    dtype: str = "float32",
    threads: int = 1,
    measure: bool = True,
    fuse: bool = False,
    out: Path | None = None,
    json_: Json = False,
) -> None:
    """Show how efficient every layer of a network is, and how efficient it could be.

    Example: gossamer hardware roofline mobilenetv2_100 --out roofline

    Parameters
    ----------
    model
        A timm name, torchvision:NAME, package.module:factory, or a folder written by gossamer.
    device
        A description of this machine (a YAML file), or the name of another machine that comes with
        gossamer, for which nothing is measured. Default: this machine, calibrated once.
    batch
        Samples in a call.
    weights
        A safetensors file or a state dict.
    image_size
        Side in pixels. Default: the network's own, or 224.
    channels
        Of the input.
    classes
        Logits. Default: the network's own.
    memory
        Name of the memory that bounds every layer. Default: for each the nearest that holds it.
    dtype
        Number format of the bounds.
    threads
        Of the measurement and of this machine's ceilings.
    measure
        Measure the layers and the whole network here.
    fuse
        Also time ConvFirst and MBConv blocks fused and layer by layer.
    out
        A folder for the plots, the table as JSON and a page with both.
    json_
        Print JSON.
    """
    from dataclasses import asdict

    from gossamer.hardware.calibrate import machine_device
    from gossamer.hardware.device import known_devices, read_device
    from gossamer.hardware.fused_block import plan_blocks
    from gossamer.hardware.measure import resized
    from gossamer.hardware.roofline import efficiency_report, table_row, write_report

    module, inputs = module_of(
        model, weights, image_size=image_size, channels=channels, classes=classes
    )
    of = machine_device(threads=threads) if device is None else read_device(device)
    report = efficiency_report(
        module, inputs, device=of, batch=batch, dtype=dtype, memory=memory, threads=threads,
        measured=measure and device not in known_devices(), name=model,
    )  # fmt: skip
    plans = plan_blocks(module, resized(inputs, batch), threads=threads)[1] if fuse else []
    if out is not None:
        write_report(report, out, plans=plans)
    if json_:
        print_json(report.to_json() | {"blocks": [asdict(plan) for plan in plans]})
        return
    from rich.table import Table

    table = Table(title=f"{model}, batch {batch}, {dtype}, on {of.name}")
    for column in ("layer", "operator", "Mop", "kB", "op/byte", "memory", "best eff.", "best ms",
                   "ms", "eff."):  # fmt: skip
        table.add_column(column, justify="left" if column in ("layer", "operator") else "right")
    for row in report.layers:
        table.add_row(*table_row(row))
    console = out_console()
    console.print(table)
    console.print(
        f"counted {report.operations / 1e9:.3f} G operations; modelled "
        f"{1e3 * report.ideal_seconds:.3f} ms at the peak rate and "
        f"{1e3 * report.best_seconds:.3f} ms by the waterline (best efficiency {report.bound:.3f})"
    )
    for runtime, seconds in report.latency.items():
        console.print(
            f"measured {1e3 * seconds:.3f} ms in {runtime}: efficiency "
            f"{report.efficiency(runtime):.3f}"
        )
    if report.measured_only:
        console.print(
            f"{len(report.measured_only)} operators without a model, measured only: "
            + ", ".join(report.measured_only)
        )
    if report.beyond_peak:
        console.print(
            "faster than the peak, so calibrate again on a quiet machine: "
            + ", ".join(report.beyond_peak)
        )
    for plan in plans:
        console.print(f"{plan.name}: {plan.said}")


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


@hardware.command
def group_size(
    model: str,
    *,
    weights: Path | None = None,
    image_size: int | None = None,
    channels: int = 3,
    classes: int | None = None,
    select: Literal["grouped", "depthwise", "spatial"] = "grouped",
    widths: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64),
    movement: float = 1.0,
    device: str | None = None,
    measure: bool = False,
    batch: int = 1,
    json_: Json = False,
) -> None:
    """Show what wider groups of channels would cost, and which width suits the machine.

    Example: gossamer hardware group-size mobilenetv2_100 --device a100-sxm-80gb --measure

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
    select
        Which convolutions: those of several groups, depthwise ones, or all of more than one tap.
    widths
        Channels of a group, to try.
    movement
        Weight of moving values against multiplying them, in the balance.
    device
        A description of a machine (a file or a name), for the width at which arithmetic is its
        limit.
    measure
        Also rebuild the network at every width and time them in turns in ONNX Runtime.
    batch
        Images of a timed call.
    json_
        Print JSON.
    """
    from dataclasses import asdict

    from gossamer.core.errors import InputError
    from gossamer.core.graph import Graph
    from gossamer.core.layers import layers
    from gossamer.hardware import group_size as room
    from gossamer.hardware.device import read_device
    from gossamer.parts import regroup

    if not widths or min(widths) < 1 or not movement > 0.0 or batch < 1:
        raise InputError("--widths, --movement and --batch are more than 0")
    described = None if device is None else read_device(device)
    chosen_by = getattr(regroup, select)
    module, inputs = module_of(
        model, weights, image_size=image_size, channels=channels, classes=classes
    )
    everything = layers(Graph.trace(module, inputs))
    chosen = [layer for layer in everything if chosen_by(layer)]
    if not chosen:
        raise InputError(
            f"{model} has no {select} convolution; --select spatial takes all of more than one tap"
        )
    points = []
    for point in room.curve(chosen, widths, movement=movement):
        match = room.match_macs(everything, point.group_width, select=chosen_by)
        points.append(
            asdict(point) | {"equal_groups": match.groups, "equal_macs": match.difference}
        )
    choices: dict[str, Any] = {"balance": room.balanced(chosen, widths, movement=movement)}
    if described is not None:
        beta = room.machine_balance(described)
        choices["machine"] = room.machine_bound(chosen, beta, widths)
        choices["machine_balance"] = beta
    report: dict[str, Any] = {
        "model": model, "layers": [asdict(row) for row in room.group_table(chosen)],
        "curve": points, "choices": choices,
    }  # fmt: skip
    if measure:
        timed = room.measure_networks(module, inputs, widths, select=chosen_by, batch=batch)
        report["measured"] = [
            {
                "group_width": point.group_width, "milliseconds": point.latency.p50,
                "joules": point.joules, "batch": batch, "runtime": point.latency.runtime,
            }
            for point in timed
        ]  # fmt: skip
        choices["measured"] = room.measured(timed)
    if json_:
        print_json(report)
        return
    _show_groups(report)


def _show_groups(report: dict[str, Any]) -> None:
    from rich.table import Table

    console = out_console()
    table = Table(title=f"{report['model']}: convolutions as they are, counted")
    for column in ("layer", "channels", "groups", "width", "positions", "MACs", "MACs a value"):
        left = column == "layer"
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    for row in report["layers"]:
        table.add_row(
            row["layer"], f"{row['channels']:,}", f"{row['groups']:,}", f"{row['group_width']:,}",
            f"{row['positions']:,}", f"{row['macs']:,}", f"{row['intensity']:.2f}",
        )  # fmt: skip
    console.print(table)
    table = Table(title="the same with groups of one width")
    times = {point["group_width"]: point for point in report.get("measured", ())}
    columns = ["width", "MACs", "weights", "MACs a value", "balance", "equal groups", "apart"]
    for column in columns + (["ms, measured"] if times else []):
        table.add_column(column, justify="right")
    for point in report["curve"]:
        cells = [
            f"{point['group_width']}", f"{point['macs']:,}", f"{point['weights']:,}",
            f"{point['intensity']:.2f}", f"{point['balance']:.3f}",
            f"{point['equal_groups']}",
            f"{100 * point['equal_macs']:+.1f} %",
        ]  # fmt: skip
        if times:
            cells.append(f"{times[point['group_width']]['milliseconds']:.2f}")
        table.add_row(*cells)
    console.print(table)
    choices = report["choices"]
    console.print(f"balance of arithmetic and movement: {choices['balance']} channels a group")
    if "machine" in choices:
        console.print(
            f"the machine wants {choices['machine_balance']:.1f} MACs a value: "
            + (f"{choices['machine']} channels a group" if choices["machine"] else
               "no width tried reaches that, so memory stays the limit")
        )  # fmt: skip
    if "measured" in choices:
        console.print(f"measured best: {choices['measured']} channels a group")


@hardware.command
def systolic(
    model: str,
    *,
    weights: Path | None = None,
    image_size: int | None = None,
    channels: int = 3,
    classes: int | None = None,
    rows: int = 64,
    columns: int = 64,
    dataflow: Literal["rs", "os", "ws", "is"] = "rs",
    sram_kb: tuple[float, float, float] = (64.0, 64.0, 64.0),
    bandwidth: float | None = None,
    overlap_folds: bool = False,
    cross_group: bool = False,
    group_width: int | None = None,
    search: bool = False,
    select: Literal["grouped", "depthwise", "spatial"] = "grouped",
    threshold: float = 0.5,
    topology: Path | None = None,
    json_: Json = False,
) -> None:
    """Model a network on a systolic array: cycles, use of the array and traffic of each layer.

    Example: gossamer hardware systolic mobilenetv1_100 --rows 64 --columns 64 --dataflow ws

    Parameters
    ----------
    model
        A timm name, torchvision:NAME, package.module:factory, a folder written by gossamer, or a
        topology file of SCALE-Sim (.csv).
    weights
        A safetensors file or a state dict.
    image_size
        Side in pixels. Default: the network's own, or 224.
    channels
        Of the input.
    classes
        Logits. Default: the network's own.
    rows
        Of processing elements.
    columns
        Of processing elements.
    dataflow
        What stays in place: filter rows (rs), outputs (os), weights (ws) or inputs (is).
    sram_kb
        Of inputs, weights and outputs.
    bandwidth
        DRAM words a cycle. Default: always enough.
    overlap_folds
        Pay filling and draining once a layer instead of once a fold.
    cross_group
        Row stationary: let several groups share the array.
    group_width
        Channels of a group, in place of what the selected convolutions have.
    search
        Try group widths of 1 to 32 in the layers that use the array badly.
    select
        Which convolutions may change: those of several groups, depthwise ones, or all of more
        than one tap.
    threshold
        Share of the array below which --search changes a layer.
    topology
        Also write the layers as a topology file of SCALE-Sim.
    json_
        Print JSON.
    """
    from dataclasses import asdict

    from gossamer.core.errors import InputError
    from gossamer.core.graph import Graph
    from gossamer.core.groups import regrouped
    from gossamer.core.layers import layers
    from gossamer.hardware import systolic as room
    from gossamer.parts import regroup

    array = room.SystolicArray(
        rows, columns, dataflow, sram_kb=sram_kb, bandwidth=bandwidth,
        overlap_folds=overlap_folds, cross_group=cross_group,
    )  # fmt: skip
    chosen_by = getattr(regroup, select)
    graph = None
    if model.endswith(".csv"):
        chosen, missing = room.read_topology(Path(model)), {}
    else:
        module, inputs = module_of(
            model, weights, image_size=image_size, channels=channels, classes=classes
        )
        graph = Graph.trace(module, inputs)
        chosen, missing = layers(graph), room.without_model(graph)
    if group_width is not None:
        chosen = [regrouped(la, group_width=group_width) if chosen_by(la) else la for la in chosen]
    if topology is not None:
        room.write_topology(chosen, topology)
    profiled = array.profile(chosen, unmodelled_macs=missing)
    report: dict[str, Any] = {
        "model": model, "array": asdict(array), "cycles": profiled.cycles,
        "stall_cycles": profiled.latency_cycles - profiled.cycles, "macs": profiled.macs,
        "mean_utilisation": profiled.mean_utilisation,
        "overall_utilisation": profiled.overall_utilisation,
        "dram_words": profiled.dram_words, "energy": profiled.energy(),
        "not_modelled": dict(profiled.unmodelled),
        "layers": [asdict(run) for run in profiled.runs],
    }  # fmt: skip
    if search:
        if graph is None:
            raise InputError("--search needs a network; a topology file has no parameters to count")
        found = room.co_optimise(graph, array, select=chosen_by, threshold=threshold)
        report["search"] = {
            "flagged": list(found.flagged),
            "candidates": [asdict(candidate) for candidate in found.candidates],
            "fastest": found.choose().group_width,
        }
    if json_:
        print_json(report)
        return
    _show_array(report)


def _show_array(report: dict[str, Any]) -> None:
    from rich.table import Table

    from gossamer.hardware.systolic import DATAFLOWS

    array, console = report["array"], out_console()
    title = f"{report['model']} on {array['rows']} x {array['columns']}, "
    table = Table(title=title + f"{DATAFLOWS[array['dataflow']]}, modelled")
    for column in ("layer", "groups", "MACs", "cycles", "used", "MACs a value", "DRAM words"):
        left = column == "layer"
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    for run in report["layers"]:
        table.add_row(
            run["layer"] or "(network)",
            f"{run['groups']:,} x {run['group_width']:,}" if run["groups"] > 1 else "1",
            f"{run['macs']:,}",
            f"{run['cycles'] + run['stall_cycles']:,}",
            f"{100 * run['utilisation']:.2f} %",
            f"{run['reuse']:.1f}",
            f"{sum(run['dram'].values()):,}",
        )
    console.print(table)
    console.print(
        f"{report['cycles'] + report['stall_cycles']:,} cycles"
        + (f" ({report['stall_cycles']:,} waiting for the DRAM)" if report["stall_cycles"] else "")
        + f"; mean use over layers {100 * report['mean_utilisation']:.1f} %, of all cycles "
        f"{100 * report['overall_utilisation']:.1f} %; {report['dram_words']:,} DRAM words"
    )
    for name, macs in report["not_modelled"].items():
        console.print(f"not modelled, only measurable: {name}, {macs:,} MACs")
    if "search" not in report:
        return
    table = Table(title=f"groups of one width in {len(report['search']['flagged'])} layers")
    for column in ("width", "MACs", "parameters", "cycles", "mean use", "energy", "efficient"):
        table.add_column(column, justify="right")
    for candidate in report["search"]["candidates"]:
        table.add_row(
            f"{candidate['group_width']}", f"{candidate['macs']:,}",
            f"{candidate['parameters']:,}", f"{candidate['cycles']:,}",
            f"{100 * candidate['mean_utilisation']:.1f} %", f"{candidate['energy']:.3g}",
            "*" if candidate["efficient"] else "",
        )  # fmt: skip
    console.print(table)
    console.print(f"fewest cycles: groups of {report['search']['fastest']} channels")


@hardware.command
def schedule(
    model: str,
    *,
    scratchpad: str,
    order: Literal["free", "fixed"] = "free",
    parameters: bool = False,
    fuse: bool = False,
    bytes_: Annotated[int, Parameter(name="--bytes")] = 1,
    solver: Literal["auto", "cp-sat", "highs", "windows"] = "auto",
    seconds: float = 60.0,
    threads: int = 1,
    seed: int = 0,
    weights: Path | None = None,
    image_size: int | None = None,
    channels: int = 3,
    classes: int | None = None,
    out: Path | None = None,
    json_: Json = False,
) -> None:
    """Plan a scratchpad memory: order, addresses, and what moves to the large memory and back.

    Example: gossamer hardware schedule densenet121 --scratchpad 1600KiB --out plan

    Parameters
    ----------
    model
        A timm name, torchvision:NAME, package.module:factory, or a folder written by gossamer.
    scratchpad
        Its size, as 512KB (512,000 bytes), 512KiB (524,288 bytes) or 1.5MiB.
    order
        "free": operators may change places; "fixed": they run as the network has them.
    parameters
        Also keep the parameters of the operator that runs.
    fuse
        Element-wise operators run in the step that makes their input.
    bytes_
        Of each element: 1 for int8, 4 for float32.
    solver
        "cp-sat" and "highs" solve the whole program, "windows" divides and conquers.
    seconds
        Time limit of the search; then the best plan so far is taken, with the bound.
    threads
        Of the solver.
    seed
        Of the solver.
    weights
        A safetensors file or a state dict.
    image_size
        Side in pixels. Default: the network's own, or 224.
    channels
        Of the input.
    classes
        Logits. Default: the network's own.
    out
        Folder for plan.json and the map of the memory, map.png.
    json_
        Print JSON.
    """
    from gossamer.core.files import write_json
    from gossamer.core.graph import Graph
    from gossamer.hardware import scratchpad as room
    from gossamer.hardware.memory_graph import MemoryGraph, minimum_peak
    from gossamer.hardware.memory_map import draw_map
    from gossamer.hardware.scratchpad_baselines import baselines, require_room
    from gossamer.hardware.scratchpad_plan import replay

    budget = _bytes_of(scratchpad)
    module, inputs = module_of(
        model, weights, image_size=image_size, channels=channels, classes=classes
    )
    graph = MemoryGraph.from_graph(
        Graph.trace(module, inputs), dtype_bytes=bytes_, parameters=parameters, fuse=fuse
    )
    require_room(graph, budget)
    peak = minimum_peak(graph)
    plan = room.schedule(
        graph, budget, order=order, solver=solver, seconds=seconds, threads=threads, seed=seed,
        peak=peak,
    )  # fmt: skip
    seen = replay(graph, plan)
    report: dict[str, Any] = {
        "model": model,
        "operators": len(graph.ops),
        "tensors": len(graph.sizes),
        "required_bytes": graph.required,
        "smallest_peak_bytes": peak.bytes,
        "peak_in_given_order_bytes": max(graph.footprints(graph.order)),
        "checked": {"peak_bytes": seen.peak_bytes, "highest_address": seen.highest},
        "baselines": [
            {
                "name": b.name, "extra_bytes": b.extra_bytes, "arena_bytes": b.arena_bytes,
                "fits": b.plan is not None,
            }
            for b in baselines(graph, budget, peak_order=peak.order)
        ],
        "plan": plan.to_json(graph),
    }  # fmt: skip
    if out is not None:
        draw_map(graph, plan, out / "map.png")
        write_json(out / "plan.json", report)
    if json_:
        print_json(report)
        return
    _show_schedule(report, out)


def _bytes_of(text: str) -> int:
    """Reads a size of memory."""
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
    units |= {"kib": 2**10, "mib": 2**20, "gib": 2**30}
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match.group(2) not in units:
        raise InputError(
            f"the scratchpad cannot be {text!r:.40}; give a size as 512KB, 512KiB or 1.5MiB"
        )
    return int(float(match.group(1)) * units[match.group(2)])


def _show_schedule(report: dict[str, Any], out: Path | None) -> None:
    from rich.table import Table

    console = out_console()
    plan = report["plan"]
    if plan["spills"]:
        table = Table(title=f"{report['model']}: what moves")
        for column in ("step", "operator", "tensor", "bytes", "what"):
            table.add_column(column, justify="right" if column in ("step", "bytes") else "left")
        events = [(e, "spill") for e in plan["spills"]] + [(e, "fill") for e in plan["fills"]]
        for event, what in sorted(events, key=lambda e: (e[0]["step"], e[1] == "fill")):
            operator = plan["order"][event["step"]] if event["step"] < len(plan["order"]) else ""
            cells = (str(event["step"]), operator, event["tensor"], f"{event['bytes']:,}", what)
            table.add_row(*cells)
        console.print(table)
    table = Table(title=f"{report['model']} in {plan['budget_bytes']:,} bytes")
    for column in ("plan", "extra bytes", "addresses"):
        table.add_column(column, justify="right" if column == "extra bytes" else "left")
    table.add_row("this one", f"{plan['extra_bytes']:,}", "fit, checked byte by byte")
    for row in report["baselines"]:
        short = f"need {row['arena_bytes']:,} bytes: too fragmented"
        table.add_row(row["name"], f"{row['extra_bytes']:,}", "fit" if row["fits"] else short)
    console.print(table)
    console.print(
        f"{report['operators']} operators, {report['tensors']} tensors; the largest operator needs "
        f"{report['required_bytes']:,} bytes, the whole {report['smallest_peak_bytes']:,} in the "
        f"best order and {report['peak_in_given_order_bytes']:,} in its own"
    )
    console.print(
        f"{plan['extra_bytes']:,} bytes move, {plan['status']}"
        + (
            f": no plan moves less than {plan['bound_bytes']:,} (gap {100 * plan['gap']:.0f} %)"
            if plan["status"] != "optimal"
            else ""
        )
        + f"; {plan['method']}, {plan['seconds']:.1f} s"
    )
    if out is not None:
        console.print(f"wrote {out / 'plan.json'} and {out / 'map.png'}")


@hardware.command
def fingerprint(
    model: str | None = None,
    *,
    trace: Path | None = None,
    weights: Path | None = None,
    image_size: int | None = None,
    channels: int = 3,
    classes: int | None = None,
    batch: int = 1,
    repeats: int = 10,
    json_: Json = False,
) -> None:
    """Show what running a network tells somebody who shares the machine.

    Example: gossamer hardware fingerprint mobilenetv2_100

    Parameters
    ----------
    model
        A timm name, torchvision:NAME, package.module:factory, or a folder written by gossamer.
    trace
        In place of a network: a CSV file of one pass, with columns t_start, dur, alloc, free and,
        if known, class. Its times are not used, as they may be another machine's.
    weights
        A safetensors file or a state dict.
    image_size
        Side in pixels. Default: the network's own, or 224.
    channels
        Of the input.
    classes
        Logits. Default: the network's own.
    batch
        Images of the pass in the file.
    repeats
        Recorded passes.
    json_
        Print JSON.
    """
    import os

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is first imported

    from gossamer.hardware.execution_trace import Trace
    from gossamer.hardware.fingerprint import audit, audit_trace
    from gossamer.hardware.kernel_times import SIZES_ONLY

    if (model is None) == (trace is None):
        raise InputError("give a network or --trace FILE, one of the two")
    if trace is not None:
        seen = Trace.from_csv(trace, batch=batch, channels=channels, side=image_size or 224)
        report = audit_trace(seen, SIZES_ONLY, replay=False)
    else:
        assert model is not None
        module, inputs = module_of(
            model, weights, image_size=image_size, channels=channels, classes=classes
        )
        report = audit(module, (channels, inputs[0].shape[-1]), repeats=repeats)
    if json_:
        print_json({"model": model, "trace": trace and str(trace)} | report.to_json())
        return
    from rich.table import Table

    table = Table(title=f"{model or trace}: blocks as an observer names them")
    names = list(next(iter(report.identified.values())).scores)
    for column in ("seen", "family", *names):
        table.add_column(column, justify="left" if column in ("seen", "family") else "right")
    for level, found in report.identified.items():
        table.add_row(level, found.family, *(f"{found.scores[name]:.2f}" for name in names))
    console = out_console()
    console.print(table)
    for level, said in report.shows.items():
        console.print(f"{level} shows {said}")
    spec = report.recovered
    console.print(
        f"recovered at L1 (confidence {spec.confidence:.2f}): "
        + ", ".join(f"{name} {value}" for name, value in spec.parameters.items())
    )
    if report.replay is not None:
        console.print(f"distance of the recovered network's trace: {report.replay:.2f} a step")
