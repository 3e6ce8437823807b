"""A systolic array as a model: cycles, utilisation and traffic of each layer, and what raises them.

An array of ``R x C`` processing elements multiplies matrices in *folds*, each holding one operand
(or the outputs) still while the others stream through. A depthwise convolution is one tiny matrix
product for each channel, so most elements idle. DRACO replaces it by a group convolution of a few
channels a group: more multiplications in fewer cycles. That is a choice of the network
(:func:`gossamer.parts.regroup.regroup`), found here without changing the chip
(:func:`co_optimise`).

Sources: Jha, Ravishankar, Mittal, Kaushik, Mandal and Chandra, "DRACO: Co-optimizing hardware
utilization, and performance of DNNs on systolic accelerator", ISVLSI 2020, arXiv:2006.15103. The
closed forms of the output-, weight- and input-stationary arrays are those of SCALE-Sim (Samajdar et
al., "A systematic methodology for characterizing scalability of DNN accelerators using SCALE-Sim",
ISPASS 2020), whose figures they reproduce. The row-stationary model is a reconstruction from Chen,
Emer and Sze, "Eyeriss" (ISCA 2016); so are the weights of the energy and the rule that selects.

Everything here is modelled, nothing measured: the time of a CPU or GPU does not follow it.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import nn

from gossamer.core.errors import BudgetError, InputError
from gossamer.core.files import whole_file
from gossamer.core.graph import Graph, level_of
from gossamer.core.groups import regrouped
from gossamer.core.layers import Layer, layers, unmodelled
from gossamer.hardware.group_size import intensity
from gossamer.parts.front import undominated
from gossamer.parts.regroup import Converted, Select, grouped, regroup

Dataflow = Literal["rs", "os", "ws", "is"]
DATAFLOWS: Mapping[Dataflow, str] = {
    "rs": "row stationary", "os": "output stationary", "ws": "weight stationary",
    "is": "input stationary",
}  # fmt: skip
WIDTHS = (1, 2, 4, 8, 16, 32)
"""Group widths that a network is tried with."""


@dataclass(frozen=True)
class Traffic:
    """Words that move for one layer and sample.

    Attributes:
        inputs: of the input feature map.
        weights: of the filters.
        outputs: of the output feature map, partial sums among them.
    """

    inputs: int
    weights: int
    outputs: int

    @property
    def total(self) -> int:
        """All words."""
        return self.inputs + self.weights + self.outputs


@dataclass(frozen=True)
class EnergyWeights:
    """Relative energy of an operation; those of Eyeriss, as the paper's table is not published.

    Attributes:
        mac: a multiply-accumulate.
        register: an access to a register file; there are four for each MAC.
        buffer: a word to or from the SRAM.
        dram: a word to or from the DRAM.
    """

    mac: float = 1.0
    register: float = 1.0
    buffer: float = 6.0
    dram: float = 200.0


@dataclass(frozen=True)
class LayerRun:
    """One layer on an array, one sample; modelled.

    Attributes:
        layer: its module.
        kind: "convolution", "linear" or "product".
        group_width: input channels of one group.
        groups: how many.
        macs: multiply-accumulates, counted.
        cycles: with perfect memory.
        folds: of all groups (row stationary: passes).
        mapping_efficiency: share of elements that a fold has work for, mean over folds.
        utilisation: MACs over cycles and elements.
        reuse: MACs for each value of weights and activations, counted.
        sram: words between SRAM and array.
        dram: words between DRAM and SRAM.
        stall_cycles: waited for the DRAM; 0 where its bandwidth is not given.
    """

    layer: str
    kind: str
    group_width: int
    groups: int
    macs: int
    cycles: int
    folds: int
    mapping_efficiency: float
    utilisation: float
    reuse: float
    sram: Traffic
    dram: Traffic
    stall_cycles: int

    def energy(self, weights: EnergyWeights | None = None) -> float:
        """Modelled energy in units of one MAC."""
        w = weights or EnergyWeights()
        on_chip = self.macs * (w.mac + 4.0 * w.register) + self.sram.total * w.buffer
        return on_chip + self.dram.total * w.dram


@dataclass(frozen=True)
class Profile:
    """A network on an array, one sample; modelled.

    Attributes:
        runs: of its layers, in order.
        elements: processing elements of the array.
        unmodelled: MACs of each operator that multiplies and has no model; they are not among the
            runs and not in any sum.
    """

    runs: tuple[LayerRun, ...]
    elements: int
    unmodelled: Mapping[str, int]

    @property
    def cycles(self) -> int:
        """Of all layers, with perfect memory."""
        return sum(run.cycles for run in self.runs)

    @property
    def latency_cycles(self) -> int:
        """Of all layers, waiting for the DRAM included."""
        return self.cycles + sum(run.stall_cycles for run in self.runs)

    @property
    def macs(self) -> int:
        """Of all layers."""
        return sum(run.macs for run in self.runs)

    @property
    def mean_utilisation(self) -> float:
        """Plain mean over layers, whatever their size: the figure that DRACO reports."""
        return sum(run.utilisation for run in self.runs) / len(self.runs)

    @property
    def overall_utilisation(self) -> float:
        """All MACs over all cycles and elements; very different from the mean over layers."""
        return self.macs / (self.cycles * self.elements)

    @property
    def dram_words(self) -> int:
        """Between DRAM and SRAM."""
        return sum(run.dram.total for run in self.runs)

    def energy(self, weights: EnergyWeights | None = None) -> float:
        """Modelled energy in units of one MAC."""
        return sum(run.energy(weights) for run in self.runs)


@dataclass(frozen=True)
class SystolicArray:
    """An array of processing elements and its memories.

    Attributes:
        rows: of elements.
        columns: of elements.
        dataflow: what stays: "rs" filter rows, "os" outputs, "ws" weights, "is" inputs.
        sram_kb: of inputs, weights and outputs, each double-buffered (half active, half filled
            meanwhile); None holds everything.
        word_bytes: bytes of a value.
        bandwidth: DRAM words a cycle; None is always enough.
        overlap_folds: filling and draining are paid once a layer, as arrays that start a fold
            while the last one drains do. SCALE-Sim pays them in every fold.
        cross_group: row stationary only: several groups may be on the array at once, which takes
            a network that can feed them. Without it the paper's claim holds, with it the depthwise
            network is already fast.

    Raises:
        InputError: if a size is not positive or the dataflow is unknown.
    """

    rows: int = 64
    columns: int = 64
    dataflow: Dataflow = "rs"
    sram_kb: tuple[float, float, float] | None = (64.0, 64.0, 64.0)
    word_bytes: int = 1
    bandwidth: float | None = None
    overlap_folds: bool = False
    cross_group: bool = False

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise InputError(
                f"an array has at least one row and one column, not {self.rows} x {self.columns}"
            )
        if self.dataflow not in DATAFLOWS:
            raise InputError(
                f"there is no dataflow {self.dataflow!r:.40}; there are {', '.join(DATAFLOWS)}"
            )
        if self.word_bytes < 1 or not all(size > 0 for size in self.sram_kb or ()):
            raise InputError("words have at least one byte, and memories more than 0 kB")
        if self.bandwidth is not None and not self.bandwidth > 0.0:
            raise InputError(f"the bandwidth is more than 0 words a cycle, not {self.bandwidth:g}")

    @property
    def elements(self) -> int:
        """How many there are."""
        return self.rows * self.columns

    def run(self, layer: Layer) -> LayerRun:
        """Models one layer."""
        plan = self._rows_stay(layer) if self.dataflow == "rs" else self._operand_stays(layer)
        stalls = 0
        if self.bandwidth is not None:
            stalls = max(0, math.ceil(plan.dram.total / self.bandwidth) - plan.cycles)
        utilisation = layer.macs / (plan.cycles * self.elements)
        return LayerRun(
            layer=layer.module or layer.name,
            kind=layer.kind,
            group_width=layer.group_width,
            groups=layer.groups,
            macs=layer.macs,
            cycles=plan.cycles,
            folds=plan.folds,
            mapping_efficiency=utilisation if plan.mapped is None else plan.mapped,
            utilisation=utilisation,
            reuse=intensity(layer),
            sram=plan.sram,
            dram=plan.dram,
            stall_cycles=stalls,
        )

    def profile(
        self, chosen: Iterable[Layer] | Graph, *, unmodelled_macs: Mapping[str, int] | None = None
    ) -> Profile:
        """Models a network.

        Args:
            chosen: layers, or a graph whose layers are taken.
            unmodelled_macs: operators that are missing among the layers; of a graph they are found.

        Raises:
            InputError: if there is no layer that multiplies.
        """
        missing = dict(unmodelled_macs or {})
        if isinstance(chosen, Graph):
            missing |= without_model(chosen)
            chosen = layers(chosen)
        runs = tuple(self.run(layer) for layer in chosen)
        if not runs:
            raise InputError("the network has no convolution, linear layer or product to model")
        return Profile(runs, self.elements, missing)

    def _operand_stays(self, layer: Layer) -> _Plan:
        """Output, weight and input stationary: SCALE-Sim's closed form, group after group."""
        m, k, n = layer.positions, layer.taps * layer.group_width, layer.features // layer.groups
        across, down, stream = {"os": (m, n, k), "ws": (k, n, m), "is": (k, m, n)}[self.dataflow]
        row_folds, column_folds = -(-across // self.rows), -(-down // self.columns)
        folds = row_folds * column_folds
        # Stationary operands are loaded row by row before their fold; outputs need no loading.
        load = 0 if self.dataflow == "os" else self.rows
        skew = self.rows + self.columns - 2
        if self.overlap_folds:
            # The next operand is loaded behind the one in use, which takes as long as it takes.
            cycles = folds * max(stream, load) + load + skew
        else:
            cycles = folds * (stream + load + skew)
        inputs, weights, outputs = layer.input_elements // layer.groups, k * n, m * n
        if self.dataflow == "os":
            sram = Traffic(m * k * column_folds, k * n * row_folds, outputs)
            # Column folds are the outer loop: the filters of one are reused by all row folds.
            dram = Traffic(
                inputs * (1 if self._fits(inputs, 0) else column_folds),
                weights * (1 if self._fits(k * min(n, self.columns), 1) else row_folds),
                outputs,
            )
        elif self.dataflow == "ws":
            sram = Traffic(m * k * column_folds, weights, outputs * row_folds)
            dram = Traffic(
                inputs * (1 if self._fits(inputs, 0) else column_folds),
                weights,
                outputs * row_folds,
            )
        else:
            sram = Traffic(m * k, weights * column_folds, outputs * row_folds)
            dram = Traffic(
                inputs,
                weights * (1 if self._fits(weights, 1) else column_folds),
                outputs * row_folds,
            )
        groups = layer.groups
        return _Plan(
            groups * cycles,
            groups * folds,
            across * down / (folds * self.elements),
            _times(sram, groups),
            _times(dram, groups),
        )

    def _rows_stay(self, layer: Layer) -> _Plan:
        """Row stationary: sets of (filter rows) x (output rows), as many as fit and share data.

        Element ``(i, j)`` of a set slides filter row ``i`` over input row ``i + j``. A set is one
        pair of an input channel and a filter; sets run together if they are of one group.
        """
        high, wide = layer.kernel
        out_rows, out_columns = layer.output_size
        set_rows, set_columns = min(high, self.rows), min(out_rows, self.columns)
        strips = -(-out_rows // self.columns) * -(-high // self.rows)
        room = (self.rows // set_rows) * (self.columns // set_columns)
        filters = layer.features // layer.groups
        pairs = layer.group_width * filters
        if self.cross_group:
            passes = -(-layer.groups * pairs // room) * strips
        else:
            passes = layer.groups * -(-pairs // room) * strips
        # Filters first: an input row is shared by all filters of a pass.
        together = min(filters, room)
        depth = min(layer.group_width, max(1, room // together))
        rereads, sums = -(-filters // together), -(-layer.group_width // depth)
        inputs, outputs = layer.input_elements // layer.groups, layer.positions * filters
        weights = layer.weights // layer.groups
        sram = Traffic(inputs * rereads, weights * strips, outputs * (2 * sums - 1))
        dram = Traffic(
            inputs * (1 if self._fits(inputs, 0) else rereads),
            weights * (1 if self._fits(weights, 1) else strips),
            outputs,
        )
        groups = layer.groups
        return _Plan(
            passes * out_columns * wide, passes, None, _times(sram, groups), _times(dram, groups)
        )

    def _fits(self, words: int, memory: int) -> bool:
        if self.sram_kb is None:
            return True
        return words * self.word_bytes <= 1024.0 * self.sram_kb[memory] / 2.0


@dataclass(frozen=True)
class _Plan:
    cycles: int
    folds: int
    mapped: float | None
    sram: Traffic
    dram: Traffic


def without_model(graph: Graph) -> dict[str, int]:
    """MACs of the operators that multiply and are no layers, by module and operator."""
    found: dict[str, int] = {}
    for op in unmodelled(graph):
        name = f"{op.module or op.name} ({op.op})"
        found[name] = found.get(name, 0) + op.macs
    return found


def _times(traffic: Traffic, count: int) -> Traffic:
    return Traffic(count * traffic.inputs, count * traffic.weights, count * traffic.outputs)


# Co-optimisation


@dataclass(frozen=True)
class Candidate:
    """A network whose flagged layers have groups of one width; modelled but for its score.

    Attributes:
        group_width: channels of one group.
        macs: counted, of one sample.
        parameters: counted, of the whole network.
        cycles: stalls included.
        mean_utilisation: plain mean over layers.
        overall_utilisation: all MACs over all cycles and elements.
        dram_words: of one sample.
        energy: in units of one MAC.
        score: what training gave, higher is better; None where nobody trained.
        efficient: whether no other candidate is as good in cycles, mean utilisation, MACs and
            score and better in one of them.
    """

    group_width: int
    macs: int
    parameters: int
    cycles: int
    mean_utilisation: float
    overall_utilisation: float
    dram_words: int
    energy: float
    score: float | None = None
    efficient: bool = False


@dataclass(frozen=True)
class Search:
    """What :func:`co_optimise` found.

    Attributes:
        array: it was done for.
        flagged: names of the layers that were changed.
        original: the network as it is.
        candidates: one for each group width.
    """

    array: SystolicArray
    flagged: tuple[str, ...]
    original: Candidate
    candidates: tuple[Candidate, ...]

    @property
    def front(self) -> list[Candidate]:
        """The candidates that no other dominates."""
        return [candidate for candidate in self.candidates if candidate.efficient]

    def choose(
        self,
        objective: Literal["latency", "utilisation", "energy"] = "latency",
        *,
        max_macs: int | None = None,
        max_parameters: int | None = None,
        min_score: float | None = None,
    ) -> Candidate:
        """The best candidate within limits.

        Args:
            objective: fewest cycles, highest mean utilisation or least energy.
            max_macs: of one sample.
            max_parameters: of the network.
            min_score: of training.

        Raises:
            InputError: if a least score is asked and nobody trained.
            BudgetError: if no candidate is within the limits; the nearest one is named.
        """
        if min_score is not None and any(c.score is None for c in self.candidates):
            raise InputError("a least score needs candidates that were trained; give a score")
        key: Callable[[Candidate], float] = {
            "latency": lambda c: c.cycles,
            "utilisation": lambda c: -c.mean_utilisation,
            "energy": lambda c: c.energy,
        }[objective]

        def excess(c: Candidate) -> float:
            over = [0.0]
            if max_macs is not None:
                over.append(c.macs / max(1, max_macs) - 1.0)
            if max_parameters is not None:
                over.append(c.parameters / max(1, max_parameters) - 1.0)
            if min_score is not None:
                over.append((min_score - (c.score or 0.0)) / (abs(min_score) or 1.0))
            return max(over)

        within = [c for c in self.candidates if excess(c) == 0.0]
        if not within:
            near = min(self.candidates, key=excess)
            raise BudgetError(
                f"no group width is within the limits; the nearest is {near.group_width} with "
                f"{near.macs:,} MACs, {near.parameters:,} parameters"
                + (f" and a score of {near.score:g}" if near.score is not None else "")
            )
        return min(within, key=key)

    def convert(
        self, module: nn.Module, group_width: int, *, warm_start: bool = False, seed: int = 0
    ) -> tuple[nn.Module, list[Converted]]:
        """The network with the flagged layers changed, as ``gossamer.parts.regroup`` does it."""
        level = level_of(module)
        names = {name.removeprefix(level) for name in self.flagged}
        return regroup(
            module, group_width=group_width, select=lambda layer: layer.name in names,
            warm_start=warm_start, seed=seed,
        )  # fmt: skip


def co_optimise(
    graph: Graph,
    array: SystolicArray,
    *,
    widths: Sequence[int] = WIDTHS,
    select: Select = grouped,
    threshold: float = 0.5,
    score: Callable[[int], float] | None = None,
) -> Search:
    """Changes the groups of badly used layers and models what it gives.

    Layers that are selected and use less than ``threshold`` of the array are flagged; for each
    width all of them get groups of that width, the same over the whole network. Nothing is built:
    the layers' shapes are enough. (The published procedure is not specified in detail; threshold
    and choice are reconstructions.)

    Args:
        graph: the network.
        array: what it shall run on.
        widths: to try.
        select: which layers may change; grouped ones by default.
        threshold: utilisation below which a layer is flagged.
        score: trains the network of a width (see :meth:`Search.convert`) and returns its score.

    Raises:
        InputError: if no layer is flagged.
    """
    chosen, missing = layers(graph), without_model(graph)
    original = array.profile(chosen, unmodelled_macs=missing)
    flagged = {
        layer.name
        for layer, run in zip(chosen, original.runs, strict=True)
        if layer.weight is not None and select(layer) and run.utilisation < threshold
    }
    if not flagged:
        raise InputError(
            f"the network has no grouped convolution that uses less than {100 * threshold:g} % of "
            "the array; select other layers or raise the threshold"
        )
    found = []
    for width in widths:
        changed = [
            regrouped(layer, group_width=width) if layer.name in flagged else layer
            for layer in chosen
        ]
        extra = sum(layer.weights for layer in _own(changed)) - sum(
            layer.weights for layer in _own(chosen)
        )
        found.append(
            _candidate(width, array.profile(changed, unmodelled_macs=missing),
                       graph.parameters + extra, score(width) if score else None)
        )  # fmt: skip
    efficient = undominated(
        [(c.cycles, -c.mean_utilisation, c.macs, -(c.score or 0.0)) for c in found]
    )
    widest = max((layer.group_width for layer in chosen if layer.name in flagged), default=1)
    return Search(
        array,
        tuple(str(la.weight).removesuffix(".weight") for la in _own(chosen) if la.name in flagged),
        _candidate(widest, original, graph.parameters, None),
        tuple(replace(c, efficient=e) for c, e in zip(found, efficient, strict=True)),
    )


def _candidate(
    width: int, profile: Profile, parameters: int, score: float | None
) -> Candidate:  # fmt: skip
    return Candidate(
        width, profile.macs + sum(profile.unmodelled.values()), parameters,
        profile.latency_cycles, profile.mean_utilisation, profile.overall_utilisation,
        profile.dram_words, profile.energy(), score,
    )  # fmt: skip


def _own(chosen: Iterable[Layer]) -> list[Layer]:
    """Layers with a weight of their own, each weight once."""
    return list({layer.weight: layer for layer in chosen if layer.weight is not None}.values())


def width_at(
    make: Callable[[float], Sequence[Layer]],
    cost: Callable[[Sequence[Layer]], float],
    target: float,
    *,
    low: float = 0.1,
    high: float = 2.0,
    trials: int = 10,
) -> float:
    """The width multiplier at which a network costs as much as another one.

    With ``cost`` the MACs it keeps them constant while groups become wider (the paper's networks of
    equal MACs); with ``cost`` the cycles it finds the plain control, a narrower or wider network
    of the same latency.

    Args:
        make: layers of the network at a width multiplier.
        cost: grows with the multiplier.
        target: to come near.
        low: smallest multiplier.
        high: largest multiplier.
        trials: halvings of the interval; channels are whole numbers, so few are enough.

    Returns:
        The multiplier tried whose cost is nearest to the target.
    """
    tried: dict[float, float] = {}
    for _ in range(trials):
        middle = 0.5 * (low + high)
        tried[middle] = cost(make(middle)) - target
        low, high = (middle, high) if tried[middle] < 0 else (low, middle)
    return min(tried, key=lambda width: abs(tried[width]))


# Topologies in SCALE-Sim's columns

COLUMNS = (
    "Layer name", "IFMAP Height", "IFMAP Width", "Filter Height", "Filter Width", "Channels",
    "Num Filter", "Strides",
)  # fmt: skip
_REPEATED = re.compile(r"^(?P<name>.*) \(x(?P<count>[1-9]\d{0,8})\)$")
_LARGEST_FILE = 1 << 24
_LARGEST_SIZE = 1 << 24


def topology(chosen: Iterable[Layer]) -> str:
    """Layers as a topology file of SCALE-Sim.

    Inputs are as large as the windows reach, so that padding is in them. There is no column for
    groups: a row is one group, and its name ends in ``(x32)`` where the layer has 32 of them; the
    tool's figures of that row times 32 are the layer's. (A depthwise layer in one row, as files
    that circulate have it, is one filter over all channels, which is another layer.) A row has one
    stride; a layer with two is refused.

    Raises:
        InputError: if a layer has different strides.
    """
    text = io.StringIO()
    text.write(", ".join(COLUMNS) + ",\n")
    for layer in chosen:
        if layer.stride[0] != layer.stride[1]:
            raise InputError(f"{layer.name} has two strides; a topology file has room for one")
        # SCALE-Sim takes "DP" anywhere in a name for its own notation of depthwise layers.
        name = (layer.module or layer.name).replace(",", " ").replace("DP", "Dp")
        if layer.groups > 1:
            name += f" (x{layer.groups})"
        reach = [
            (out - 1) * stride + taps
            for out, stride, taps in zip(layer.output_size, layer.stride, layer.kernel, strict=True)
        ]
        numbers = (
            *reach, *layer.kernel, layer.group_width, layer.features // layer.groups,
            layer.stride[0],
        )  # fmt: skip
        text.write(", ".join([name, *map(str, numbers)]) + ",\n")
    return text.getvalue()


def write_topology(chosen: Iterable[Layer], path: Path) -> None:
    """Writes :func:`topology` in one rename."""
    text = topology(chosen)
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_topology(path: Path) -> list[Layer]:
    """Reads a topology file of SCALE-Sim.

    Output sizes are the tool's, ``ceil((H - k + s) / s)``, one more than a convolution has where
    the stride does not divide. ``(x32)`` at the end of a name is 32 groups, see :func:`topology`;
    "DP" in a name is the tool's depthwise layer, one filter for each channel.

    Raises:
        InputError: if the file is missing or a row is no layer; the row is named.
    """
    try:
        if Path(path).stat().st_size > _LARGEST_FILE:
            raise InputError(f"{path} is too large to be a topology")
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the topology {path}: {error}") from error
    rows = [row for row in csv.reader(io.StringIO(text)) if any(cell.strip() for cell in row)]
    if len(rows) < 2:
        raise InputError(f"{path} has no layers; its first line is a header")
    return [_row(cells, f"row {number} of {path}") for number, cells in enumerate(rows[1:], 2)]


def _row(cells: Sequence[str], where: str) -> Layer:
    cells = [cell.strip() for cell in cells]
    try:
        height, width, high, wide, channels, filters, stride = map(int, cells[1:8])
    except ValueError as error:
        raise InputError(
            f"{where} is no layer: after the name come {len(COLUMNS) - 1} whole numbers"
        ) from error
    numbers = (height, width, high, wide, channels, filters, stride)
    if min(numbers) < 1 or max(numbers) > _LARGEST_SIZE or high > height or wide > width:
        raise InputError(f"{where} is no layer: a size is not positive or the filter is too large")
    name, groups = cells[0], 1
    if match := _REPEATED.match(name):
        name, groups = match["name"], int(match["count"])
    elif "DP" in name:
        groups, channels = channels, 1
    return Layer(
        name, name, "convolution", channels * groups, filters * groups, groups, (high, wide),
        (stride, stride), input_size=(height, width),
        output_size=(-(-(height - high + stride) // stride), -(-(width - wide + stride) // stride)),
    )  # fmt: skip
