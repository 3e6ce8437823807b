"""Where the time of a network goes: computational efficiency, rooflines, waterlines, gaps.

One identity ties operations and time together: ``latency = operations / (peak rate x efficiency)``.
Layers with few operations (depthwise and pointwise convolutions) move many bytes for each of them,
so the memory bounds their efficiency; few operations are then not little time. For every layer
there is what is counted (operations; compulsory bytes, each tensor once), what follows from a
machine's ceilings (the best efficiency, ``min(1, intensity / ridge)``) and what was measured.

A sequence of kernels is bounded by its *waterline*: layer by layer the larger of arithmetic and
memory time. What a layer of high intensity has in excess does not help one of low intensity unless
both are fused into one kernel, so the bound is lower than that of the sums.

Operations are two for each multiply-accumulate, and one for each addition of a bias. Element-wise
operators, normalisation and pooling have bytes alone. The bound of a layer is that of the nearest
memory that holds everything the layer touches: what lies in a cache may beat the main memory's
roofline.

Source: Lavin, "On the efficiency of convolutional neural networks", arXiv:2404.03617 (efficiency
gaps, waterlines; how the bars are drawn is our reading); Williams et al., "Roofline", CACM 2009.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from gossamer.core.errors import InputError, UnsupportedError
from gossamer.core.files import whole_file, write_json, write_text
from gossamer.core.graph import Graph, Operator
from gossamer.core.layers import Layer, layers, unmodelled
from gossamer.core.task import device_of
from gossamer.hardware.calibrate import machine_device
from gossamer.hardware.device import Device
from gossamer.hardware.measure import measure, resized, torch_threads

BYTES = {
    "float64": 8, "float32": 4, "tf32": 4, "float16": 2, "bfloat16": 2, "float8": 1, "int8": 1,
}  # fmt: skip
"""Bytes of a number."""

# They multiply, but no table of shapes describes them.
_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "bilinear"}

Kind = Literal["arithmetic", "memory", "measured only"]


@dataclass(frozen=True)
class LayerEfficiency:
    """One operator of a network.

    Attributes:
        name: of its node in the graph.
        module: dotted path of the module that ran it.
        operator: bare name, as "conv2d".
        kind: "arithmetic" (it multiplies), "memory" (it only moves and transforms) or
            "measured only" (it multiplies and has no model).
        operations: counted; None for "measured only".
        bytes: counted, compulsory; None for "measured only".
        intensity: operations a byte.
        memory: the memory that the bound refers to.
        bound: modelled, the best efficiency that memory admits; 0 for "memory", which has no
            arithmetic.
        best_seconds: modelled, the shortest time: the larger of arithmetic and memory time.
        seconds: measured, or None.
        efficiency: measured, operations over peak times seconds; None without a time.
    """

    name: str
    module: str
    operator: str
    kind: Kind
    operations: float | None
    bytes: int | None
    intensity: float | None
    memory: str | None
    bound: float | None
    best_seconds: float | None
    seconds: float | None = None
    efficiency: float | None = None


@dataclass(frozen=True)
class EfficiencyReport:
    """What a network's operators cost and reach on a device.

    Attributes:
        name: of the network.
        device: what the bounds are of.
        dtype: number format of the bounds.
        batch: samples.
        threads: of the measurement.
        layers: one row for each operator that is no view.
        latency: measured, seconds of one call of the whole network, by runtime.
    """

    name: str
    device: Device
    dtype: str
    batch: int
    threads: int
    layers: tuple[LayerEfficiency, ...]
    latency: Mapping[str, float]

    @property
    def peak(self) -> float:
        """Operations a second: two for each multiply-accumulate."""
        return 2.0 * self.device.peak(self.dtype)

    @property
    def operations(self) -> float:
        """Counted operations of the network."""
        return sum(row.operations or 0.0 for row in self.layers)

    @property
    def bytes(self) -> int:
        """Counted bytes of the network, each tensor of each operator once."""
        return sum(row.bytes or 0 for row in self.layers)

    @property
    def ideal_seconds(self) -> float:
        """Operations at the peak rate."""
        return self.operations / self.peak

    @property
    def best_seconds(self) -> float:
        """The waterline: the sum over operators of the larger of arithmetic and memory time."""
        return sum(row.best_seconds or 0.0 for row in self.layers)

    @property
    def bound(self) -> float:
        """The best efficiency of the sequence of operators, unfused."""
        return self.ideal_seconds / self.best_seconds if self.best_seconds else 0.0

    @property
    def arithmetic_bound(self) -> float:
        """The waterline of the layers that multiply alone.

        A runtime that fuses normalisation and activation into them moves no bytes for those, so
        this bounds every runtime that runs one such layer after the other.
        """
        best = sum(r.best_seconds or 0.0 for r in self.layers if r.kind == "arithmetic")
        return self.ideal_seconds / best if best else 0.0

    def efficiency(self, runtime: str = "torch") -> float:
        """Measured efficiency of the whole network.

        Raises:
            InputError: if that runtime was not measured.
        """
        if runtime not in self.latency:
            measured = ", ".join(self.latency) or "nothing"
            raise InputError(f"{runtime} was not measured; {measured} was")
        return self.ideal_seconds / self.latency[runtime]

    @property
    def measured_only(self) -> list[str]:
        """Operators that multiply and have no model, as "module (operator)"."""
        return [f"{r.module} ({r.operator})" for r in self.layers if r.kind == "measured only"]

    @property
    def beyond_peak(self) -> list[str]:
        """Layers measured faster than the peak: then the peak or the count is wrong."""
        return [r.name for r in self.layers if r.efficiency is not None and r.efficiency > 1.0]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "name": self.name,
            "device": self.device.name,
            "dtype": self.dtype,
            "batch": self.batch,
            "threads": self.threads,
            "counted": {"operations": self.operations, "bytes": self.bytes},
            "modelled": {
                "ideal_ms": 1e3 * self.ideal_seconds,
                "best_ms": 1e3 * self.best_seconds,
                "bound": self.bound,
                "arithmetic_bound": self.arithmetic_bound,
            },
            "measured": {
                runtime: {"ms": 1e3 * seconds, "efficiency": self.efficiency(runtime)}
                for runtime, seconds in self.latency.items()
            },
            "measured_only": self.measured_only,
            "layers": [asdict(row) for row in self.layers],
        }

    def plot_waterline(self, path: Path) -> None:
        """Draws bars of operations by intensity, and the line below which memory bounds."""
        waterline_figure([self], path)

    def plot_roofline(self, path: Path) -> None:
        """Draws the device's roofs and every layer at what it reached."""
        roofline_figure(self, path)


# Arithmetic


def waterline(
    operations: Sequence[float] | np.ndarray,
    bytes_moved: Sequence[float] | np.ndarray,
    ridge: float | Sequence[float] | np.ndarray,
) -> float:
    """The best efficiency of a sequence of kernels that run one after the other.

    Args:
        operations: of each kernel.
        bytes_moved: of each kernel.
        ridge: operations a byte from which on arithmetic is the limit; one for all, or one each.

    Returns:
        ``sum ops / sum max(ops, bytes * ridge)``, at most 1.

    Raises:
        InputError: if there is nothing, or something is negative.
    """
    ops, moved, at = (np.asarray(v, dtype=float) for v in (operations, bytes_moved, ridge))
    if not ops.size or ops.shape != moved.shape or min(ops.min(), moved.min(), at.min()) < 0.0:
        raise InputError("a waterline needs as many operations as bytes, none of them negative")
    total = float(np.maximum(ops, moved * at).sum())
    return float(ops.sum()) / total if total else 0.0


def layer_operations(layer: Layer, batch: int = 1) -> float:
    """Operations of a layer: two a multiply-accumulate, one an addition of the bias."""
    biases = layer.output_elements if layer.bias else 0
    return float(batch * (2 * layer.macs + biases))


def layer_bytes(layer: Layer, batch: int = 1, element: int = 4) -> int:
    """Compulsory bytes of a layer: input, weights and output, each once."""
    return element * layer.elements(batch)


def model_layers(
    graph: Graph, device: Device, *, batch: int = 1, dtype: str = "float32",
    memory: str | None = None,
) -> list[LayerEfficiency]:  # fmt: skip
    """Counts every operator of a network and bounds it by a device's ceilings.

    Args:
        graph: the network.
        device: peak rate and bandwidths.
        batch: samples.
        dtype: number format of weights and activations.
        memory: name of the memory whose bandwidth bounds everything; None takes for each operator
            the nearest one that holds what it touches.

    Returns:
        One row for each operator that is no view, in order. Attention that is one operator is one
        row, the sum of its two products.

    Raises:
        InputError: if the device has no such peak or memory.
    """
    if dtype not in BYTES:
        raise InputError(f"{dtype} is no number format; there are {', '.join(BYTES)}")
    if batch < 1:
        raise InputError(f"the batch has at least one sample, not {batch}")
    element, peak = BYTES[dtype], 2.0 * device.peak(dtype)
    modelled: dict[str, list[Layer]] = {}
    for layer in layers(graph):
        modelled.setdefault(layer.name, []).append(layer)
    unknown = {op.name for op in unmodelled(graph)}
    rows: list[LayerEfficiency] = []
    for op in graph.operators:
        if op.name in unknown or op.op in _RECURRENT:
            rows.append(
                LayerEfficiency(
                    op.name, op.module, op.op, "measured only", None, None, None, None, None, None
                )
            )
            continue
        if op.name in modelled:
            kind: Kind = "arithmetic"
            operations = sum(layer_operations(layer, batch) for layer in modelled[op.name])
            moved = sum(layer_bytes(layer, batch, element) for layer in modelled[op.name])
        else:
            kind, operations = "memory", 0.0
            moved = _moved(graph, op, batch, element)
            if not moved:
                continue  # a view
        if memory is None:
            level, bandwidth = device.holding(moved)
        else:
            level, bandwidth = memory, device.bandwidth(memory)
        best = max(operations / peak, moved / bandwidth)
        rows.append(
            LayerEfficiency(
                op.name, op.module, op.op, kind, operations, moved, operations / moved, level,
                operations / peak / best, best,
            )
        )  # fmt: skip
    return rows


def _moved(graph: Graph, op: Operator, batch: int, element: int) -> int:
    """Bytes of an operator without arithmetic of its own: activations for each sample."""
    weights = 4 * sum(graph.tensors[name].numel() for name in op.weights if name in graph.tensors)
    held = min(weights, op.input_bytes)
    return element * (batch * (op.input_bytes - held + op.output_bytes) + held) // 4


def roofline_record(
    graph: Graph, device: Device, *, batch: int, latency_ms: float, dtype: str = "float32"
) -> dict[str, Any]:
    """What the report of a compressed network shows: its waterline and measured efficiency.

    Args:
        graph: the network.
        device: whose ceilings bound it.
        batch: samples of the timed call.
        latency_ms: measured, of one call in a runtime that fuses what has no arithmetic.
        dtype: number format that it computes in.

    Returns:
        JSON values: operations counted; ideal and best milliseconds and best efficiency of the
        layers that multiply, modelled; latency and efficiency measured; and for each such layer its
        module, operations, intensity and ridge.
    """
    rows = model_layers(graph, device, batch=batch, dtype=dtype)
    rows = [row for row in rows if row.kind == "arithmetic" and row.operations]
    peak = 2.0 * device.peak(dtype)
    operations = sum(row.operations or 0.0 for row in rows)
    best = sum(row.best_seconds or 0.0 for row in rows)
    ideal = operations / peak
    return {
        "dtype": dtype,
        "batch": batch,
        "operations": operations,
        "ideal_ms": 1e3 * ideal,
        "best_ms": 1e3 * best,
        "bound": ideal / best if best else 0.0,
        "latency_ms": latency_ms,
        "efficiency": 1e3 * ideal / latency_ms,
        "layers": [
            {
                "module": row.module,
                "operations": row.operations,
                "intensity": row.intensity,
                "ridge": peak / device.bandwidth(row.memory),
                "memory": row.memory,
            }
            for row in rows
        ],
    }


# Measuring


class _Stopwatch(fx.Interpreter):
    """Runs a graph operator by operator and notes the time of each."""

    def __init__(
        self, module: fx.GraphModule, device: torch.device, clock: Callable[[], float]
    ) -> None:
        super().__init__(module)
        self.device = device
        self.clock = clock
        self.spent: dict[str, list[float]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        target: Any = n.target
        began = self.clock()
        result = target(*args, **kwargs)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.spent.setdefault(n.name, []).append(self.clock() - began)
        return result


def operator_seconds(
    graph: Graph,
    inputs: Sequence[Any],
    *,
    threads: int = 1,
    seconds: float = 2.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Time of every operator of a network as torch runs it, one after the other.

    The traced graph is interpreted, so every operator is timed where it stands, with its real
    inputs and whatever the caches hold then; starting an operator is part of its time.

    Args:
        graph: the network.
        inputs: positional arguments.
        threads: of torch.
        seconds: for all repeats; at least three are made.
        clock: see :func:`gossamer.hardware.measure.measure`.

    Returns:
        Median seconds by name of the operator's node.
    """
    network = graph.network().eval()
    device = device_of(network)
    watch = _Stopwatch(network.program, device, clock)
    flat = (*pytree.tree_leaves(tuple(inputs)), False)
    with torch_threads(threads), torch.inference_mode():
        watch.run(*flat)
        watch.spent.clear()
        began = time.perf_counter()
        repeats = 0
        while repeats < 3 or time.perf_counter() - began < seconds:
            watch.run(*flat)
            repeats += 1
    return {name: float(np.median(times)) for name, times in watch.spent.items()}


def efficiency_report(
    model: nn.Module,
    example_inputs: Sequence[Any],
    *,
    device: Device | None = None,
    batch: int | None = None,
    dtype: str = "float32",
    memory: str | None = None,
    threads: int = 1,
    measured: bool = True,
    runtimes: Sequence[str] = ("torch", "onnxruntime"),
    rounds: int = 10,
    seconds: float = 2.0,
    clock: Callable[[], float] = time.perf_counter,
    name: str | None = None,
) -> EfficiencyReport:
    """Counts, bounds and measures every operator of a network.

    Args:
        model: the network; evaluation mode.
        example_inputs: positional arguments, batch at least 2.
        device: whose ceilings bound it. Default: this machine's, calibrated once and kept.
        batch: samples. Default: those of the example.
        dtype: number format of the bounds; measuring is done in the model's own.
        memory: see :func:`model_layers`.
        threads: of the runtimes, and of this machine's ceilings.
        measured: whether to measure; pass False for the bounds of another machine.
        runtimes: for the whole network, among "torch" and "onnxruntime"; what cannot be exported is
            left out. Single operators are measured in torch.
        rounds: turns of the whole network in each runtime.
        seconds: for measuring single operators.
        clock: see :func:`gossamer.hardware.measure.measure`.
        name: of the network in plots. Default: its class.

    Returns:
        The report.

    Raises:
        UnsupportedError: if the network cannot be traced.
        InputError: if an option is impossible.
    """
    if device is None:
        device = machine_device(threads=threads)
    graph = Graph.trace(model, example_inputs)
    if batch is None:
        first = next(x for x in pytree.tree_leaves(tuple(example_inputs)) if isinstance(x, Tensor))
        batch = len(first)
    rows = model_layers(graph, device, batch=batch, dtype=dtype, memory=memory)
    latency: dict[str, float] = {}
    if measured:
        if batch != 1 and not graph.dynamic:
            raise InputError(
                f"{type(model).__name__} fixes its batch size when it is traced, so its operators "
                "can be measured at batch 1 alone"
            )
        inputs = resized(example_inputs, batch)
        times = operator_seconds(graph, inputs, threads=threads, seconds=seconds, clock=clock)
        peak = 2.0 * device.peak(dtype)
        rows = [_with_time(row, times[row.name], peak) for row in rows]
        for runtime in runtimes:
            found: Any = runtime
            try:
                (timing,) = measure(
                    {"network": model}, example_inputs, batch_sizes=(batch,), threads=(threads,),
                    runtimes=(found,), rounds=rounds, clock=clock,
                )  # fmt: skip
            except UnsupportedError:
                continue  # no ONNX form
            latency[runtime] = timing.latency.p50 / 1e3
    return EfficiencyReport(
        name or type(model).__name__, device, dtype, batch, threads, tuple(rows), latency
    )


def _with_time(row: LayerEfficiency, seconds: float, peak: float) -> LayerEfficiency:
    efficiency = None if row.operations is None else row.operations / (peak * seconds)
    return LayerEfficiency(**{**row.__dict__, "seconds": seconds, "efficiency": efficiency})


# Figures


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    with whole_file(Path(path)) as partial:
        figure.savefig(partial, dpi=120, format="png")


_ARITHMETIC, _MEMORY = "#2a6f97", "#d1495b"


def waterline_figure(reports: Sequence[EfficiencyReport], path: Path) -> None:
    """Draws waterlines, one panel a network.

    A layer is a bar as wide as its operations and as high as its intensity, in the order of
    execution; where the bar does not reach its memory's ridge (the dark step) it is memory bound.
    Operators without arithmetic have no width; their share of the best time is in the title.

    Args:
        reports: networks, side by side.
        path: of the PNG.
    """
    figure = _figure(5.6 * len(reports), 4.2)
    for number, report in enumerate(reports, start=1):
        axes = figure.add_subplot(1, len(reports), number)
        rows = [row for row in report.layers if row.kind == "arithmetic"]
        widths = np.array([row.operations or 0.0 for row in rows]) / 1e9
        heights = np.array([row.intensity or 0.0 for row in rows])
        ridges = np.array([report.peak / _bandwidth(report, row) for row in rows])
        edges = np.concatenate([[0.0], np.cumsum(widths)])
        colors = [_MEMORY if h < r else _ARITHMETIC for h, r in zip(heights, ridges, strict=True)]
        axes.bar(edges[:-1], heights, widths, align="edge", color=colors, linewidth=0, alpha=0.85)
        axes.step(edges, np.append(ridges, ridges[-1:]), where="post", color="black", linewidth=1)
        axes.set_yscale("log")
        axes.set_xlabel("operations, in order of execution (G)")
        axes.set_ylabel("operations a byte")
        silent = sum(r.best_seconds or 0.0 for r in report.layers if r.kind == "memory")
        share = silent / report.best_seconds if report.best_seconds else 0.0
        axes.set_title(
            f"{report.name}, batch {report.batch}: best efficiency {report.bound:.2f}\n"
            f"(without arithmetic: {100 * share:.0f} % of the best time)",
            fontsize=9,
        )
    _save(figure, path)


def _bandwidth(report: EfficiencyReport, row: LayerEfficiency) -> float:
    return report.device.bandwidth(row.memory)


def roofline_figure(report: EfficiencyReport, path: Path) -> None:
    """Draws the roofs of all memories, and each layer at its intensity and measured rate.

    Args:
        report: a network; without measured times layers lie on their roofs.
        path: of the PNG.
    """
    figure = _figure(7.2, 4.8)
    axes = figure.add_subplot(1, 1, 1)
    rows = [row for row in report.layers if row.kind == "arithmetic" and row.intensity]
    intensities = [row.intensity or 1.0 for row in rows] or [1.0]
    low, high = min(intensities) / 3, max(*intensities, 2 * _last_ridge(report)) * 3
    grid = np.geomspace(low, high, 200)
    for memory in report.device.memories:
        if memory.bytes_per_second is None:
            continue
        roof = np.minimum(report.peak, grid * memory.bytes_per_second.value)
        axes.plot(grid, roof / 1e9, linewidth=1, label=memory.name)
    for measured, marker in ((True, "o"), (False, "x")):
        chosen = [row for row in rows if (row.seconds is not None) == measured]
        if not chosen:
            continue
        rates = [(r.operations or 0.0) / (r.seconds or r.best_seconds or 1.0) for r in chosen]
        total = sum(r.seconds or r.best_seconds or 0.0 for r in chosen)
        sizes = [8 + 300 * (r.seconds or r.best_seconds or 0.0) / total for r in chosen]
        axes.scatter(
            [r.intensity or 1.0 for r in chosen], np.array(rates) / 1e9, s=sizes, marker=marker,
            color=_ARITHMETIC, alpha=0.6, linewidths=0.5,
            label="measured in torch (area: time)" if measured else "modelled",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte")
    axes.set_ylabel("operations a second (G)")
    axes.set_title(f"{report.name}, batch {report.batch}, on {report.device.name}", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    _save(figure, path)


def _last_ridge(report: EfficiencyReport) -> float:
    return report.peak / report.device.bandwidth()


def efficiency_gap_plot(
    reports: Mapping[str, Sequence[EfficiencyReport]],
    accuracies: Mapping[str, Sequence[float]],
    path: Path,
    *,
    runtime: str = "torch",
) -> None:
    """Draws ideal and actual latency of families of networks against their accuracy.

    Every network is two points at one height: open where its operations at the peak rate would put
    it, filled where it was measured. On the logarithmic axis the line between them is
    ``log(1 / efficiency)`` long. Better models move the open points, better kernels the filled
    ones towards them.

    Args:
        reports: of each family, by name.
        accuracies: of each report, percent.
        path: of the PNG.
        runtime: whose latency is drawn.

    Raises:
        InputError: if a report has no accuracy, or was not measured in that runtime.
    """
    figure = _figure(7.2, 4.8)
    axes = figure.add_subplot(1, 1, 1)
    for family, found in reports.items():
        scores = accuracies.get(family, ())
        if len(scores) != len(found) or not found:
            raise InputError(f"{family} has {len(found)} reports and {len(scores)} accuracies")
        for report in found:
            report.efficiency(runtime)  # raises where it was not measured
        ideal = [1e3 * r.ideal_seconds / r.batch for r in found]
        actual = [1e3 * r.latency[runtime] / r.batch for r in found]
        (line,) = axes.plot(actual, scores, marker="o", label=family)
        color = line.get_color()
        axes.plot(ideal, scores, marker="o", markerfacecolor="none", color=color, linestyle="--")
        for a, b, y in zip(ideal, actual, scores, strict=True):
            axes.plot([a, b], [y, y], color=color, linewidth=0.8, alpha=0.6)
    axes.set_xscale("log")
    axes.set_xlabel(f"ms a sample: ideal (open), {runtime} (filled)")
    axes.set_ylabel("accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    _save(figure, path)


def write_report(report: EfficiencyReport, folder: Path, *, plans: Sequence[Any] = ()) -> None:
    """Writes ``roofline.json``, ``roofline.png``, ``waterline.png`` and ``report.html``.

    Args:
        report: of a network.
        folder: is created.
        plans: of :func:`gossamer.hardware.fused_block.plan_blocks`, shown below the layers.
    """
    folder = Path(folder)
    report.plot_roofline(folder / "roofline.png")
    report.plot_waterline(folder / "waterline.png")
    value = report.to_json() | {"blocks": [asdict(plan) for plan in plans]}
    write_json(folder / "roofline.json", value)
    write_text(folder / "report.html", _page(report, folder, plans))


def _page(report: EfficiencyReport, folder: Path, plans: Sequence[Any]) -> str:
    """One page that needs no other file: the plots are in it."""
    images = "".join(
        f'<img alt="{name}" src="data:image/png;base64,'
        f'{base64.b64encode((folder / f"{name}.png").read_bytes()).decode()}">'
        for name in ("waterline", "roofline")
    )
    said = [
        f"{report.operations / 1e9:.3f} G operations, {report.bytes / 1e6:.2f} MB (counted)",
        f"{1e3 * report.ideal_seconds:.3f} ms at the peak rate, {1e3 * report.best_seconds:.3f} ms "
        f"by the waterline: best efficiency {report.bound:.3f} (modelled)",
        *(
            f"{1e3 * seconds:.3f} ms in {runtime}: efficiency {report.efficiency(runtime):.3f} "
            "(measured)"
            for runtime, seconds in report.latency.items()
        ),
        *(f"{name}: no model, measured only" for name in report.measured_only),
        *(f"{p.name}: {p.said}" for p in plans),
    ]
    head = ("layer", "operator", "M operations", "kB", "operations a byte", "memory",
            "best efficiency", "best ms", "measured ms", "measured efficiency")  # fmt: skip
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in table_row(row)) + "</tr>"
        for row in report.layers
    )
    title = escape(f"{report.name}, batch {report.batch}, {report.dtype}, on {report.device.name}")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{title}: gossamer</title>\n<style>body{{font:16px system-ui;margin:2rem auto;"
        "max-width:70rem;padding:0 1rem}img{max-width:100%}table{border-collapse:collapse;"
        "font-size:.85rem}td,th{padding:.15rem .5rem;border-bottom:1px solid #ccc;"
        f"text-align:left}}</style>\n</head>\n<body>\n<h1>{title}</h1>\n<ul>"
        + "".join(f"<li>{escape(line)}</li>" for line in said)
        + f"</ul>\n{images}\n<table><thead><tr>"
        + "".join(f"<th>{name}</th>" for name in head)
        + f"</tr></thead><tbody>{rows}</tbody></table>\n</body>\n</html>\n"
    )


def table_row(row: LayerEfficiency) -> tuple[str, ...]:
    """The cells of an operator: layer, operator, M operations, kB, operations a byte, memory, best
    efficiency, best ms, measured ms, measured efficiency."""

    def cell(value: float | None, scale: float, digits: int) -> str:
        return "" if value is None else f"{value * scale:,.{digits}f}"

    arithmetic = row.kind == "arithmetic"
    return (
        row.module or "(network)",
        row.operator + (" (measured only)" if row.kind == "measured only" else ""),
        cell(row.operations, 1e-6, 2),
        cell(row.bytes, 1e-3, 1),
        cell(row.intensity, 1, 1),
        row.memory or "",
        cell(row.bound if arithmetic else None, 1, 3),
        cell(row.best_seconds, 1e3, 3),
        cell(row.seconds, 1e3, 3),
        cell(row.efficiency if arithmetic else None, 1, 3),
    )
