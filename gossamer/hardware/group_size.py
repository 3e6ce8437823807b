"""Which group width suits a machine: arithmetic against data movement of grouped convolutions.

A grouped convolution of ``m`` inputs, ``n`` outputs, ``g`` groups, ``k x k`` taps and ``hw``
output positions multiplies ``m n k^2 hw / g`` times, has ``m n k^2 / g`` weights and moves ``A``
activations whatever ``g`` is. So fewer, wider groups (``G = m / g`` channels) cost more
multiplications and reuse each moved value more often: the *arithmetic intensity* is
``MACs / (weights + A)``. For ``m = n`` and stride 1 it is ``G k^2 hw / (G k^2 + 2 hw)``, which does
not depend on ``m``: a constant width (E2GC) gives every layer of one resolution the same reuse, a
constant number of groups (FgGC, as in ResNeXt) gives early layers little and late ones more than
they can use.

Source: Jha, Saini, Nag and Mittal, "E2GC: Energy-efficient group convolution in deep neural
networks", VLSI Design 2020, arXiv:2006.15100. The paper's rule for the best width is not published
in closed form; the three criteria here (:func:`balanced`, :func:`machine_bound`,
:func:`measured`) are reconstructions, each an option of its own name.

Networks are rebuilt by :func:`gossamer.parts.regroup.regroup`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.cost import Latency
from gossamer.core.errors import InputError
from gossamer.core.graph import Graph
from gossamer.core.groups import divisors, regrouped
from gossamer.core.layers import Layer
from gossamer.hardware.device import Device
from gossamer.hardware.measure import Contender, EnergyMeter, Runtime, Timing, measure
from gossamer.parts.regroup import Select, grouped, regroup

WIDTHS = (1, 2, 4, 8, 16, 32, 64)
"""Group widths that a network is tried with."""
CLOSE = 0.05
"""Networks whose MACs differ by no more than this share are of comparable complexity."""

# Formulas


def activations(layer: Layer) -> int:
    """Values of input and output of one sample, which no grouping changes."""
    return layer.input_elements + layer.output_elements


def intensity(layer: Layer, *, weight_importance: float = 0.5) -> float:
    """Multiply-accumulates for each value moved.

    Args:
        layer: a convolution, one sample.
        weight_importance: share of the importance that weights have; at .5 all values count alike.
            Other shares weigh the two types of data differently (after Jha and Mittal, "Modeling
            data reuse in deep neural networks by taking data-types into cognizance", IEEE
            Transactions on Computers 2021; the form is reconstructed).
    """
    return _intensity([layer], weight_importance)


def _intensity(layers: Iterable[Layer], weight_importance: float = 0.5) -> float:
    if not 0.0 <= weight_importance <= 1.0:
        raise InputError(f"the importance of weights is in 0..1, not {weight_importance}")
    chosen = list(layers)
    weights = sum(layer.weights for layer in chosen)
    moved = 2.0 * (
        weight_importance * weights
        + (1.0 - weight_importance) * sum(activations(layer) for layer in chosen)
    )
    return sum(layer.macs for layer in chosen) / moved if moved else math.inf


def half_reuse_width(positions: int, taps: int) -> float:
    """The width at which intensity is half of its limit (``hw``): ``2 hw / k^2``."""
    return 2.0 * positions / taps


@dataclass(frozen=True)
class GroupRow:
    """One grouped convolution, counted.

    Attributes:
        layer: its module.
        channels: input channels, ``m``.
        features: output channels, ``n``.
        kernel: height and width in taps.
        positions: output positions, ``hw``.
        groups: how many, ``g``.
        group_width: input channels of one, ``G``.
        macs: multiply-accumulates of one sample.
        weights: elements.
        activations: elements of input and output of one sample.
        intensity: multiply-accumulates for each value moved.
    """

    layer: str
    channels: int
    features: int
    kernel: tuple[int, int]
    positions: int
    groups: int
    group_width: int
    macs: int
    weights: int
    activations: int
    intensity: float


def group_table(layers: Iterable[Layer]) -> list[GroupRow]:
    """The counts of each layer, with number *and* width of its groups."""
    return [
        GroupRow(
            layer.module or layer.name, layer.channels, layer.features, layer.kernel,
            layer.positions, layer.groups, layer.group_width, layer.macs, layer.weights,
            activations(layer), intensity(layer),
        )
        for layer in layers
    ]  # fmt: skip


@dataclass(frozen=True)
class Reuse:
    """Several layers together.

    Attributes:
        macs: multiply-accumulates of one sample.
        weights: elements.
        activations: elements moved of one sample.
        intensity: all MACs for each value that all layers move.
        mean_intensity: plain mean over layers.
        weighted_intensity: mean over layers, weighted by their MACs.
    """

    macs: int
    weights: int
    activations: int
    intensity: float
    mean_intensity: float
    weighted_intensity: float


def reuse(layers: Sequence[Layer]) -> Reuse:
    """Sums and means over layers.

    Raises:
        InputError: if there is no layer.
    """
    _some(layers)
    each = [intensity(layer) for layer in layers]
    macs = [layer.macs for layer in layers]
    weighted = sum(i * m for i, m in zip(each, macs, strict=True)) / max(1, sum(macs))
    return Reuse(
        sum(macs),
        sum(layer.weights for layer in layers),
        sum(activations(layer) for layer in layers),
        _intensity(layers),
        sum(each) / len(each),
        weighted,
    )


@dataclass(frozen=True)
class EnergyTable:
    """What operations cost, in units of one multiply-accumulate.

    Attributes:
        mac: of one multiply-accumulate.
        word: of one value to or from DRAM.
    """

    mac: float = 1.0
    word: float = 200.0


def modelled_energy(layers: Iterable[Layer], table: EnergyTable | None = None) -> float:
    """``MACs e_mac + (W + A) e_word`` of one sample: a MODEL, in units of one MAC.

    It rises with the group width throughout, so it ranks networks of comparable MACs and says
    nothing about the best width.
    """
    table = table or EnergyTable()
    return sum(
        layer.macs * table.mac + (layer.weights + activations(layer)) * table.word
        for layer in layers
    )


# Criteria


@dataclass(frozen=True)
class Point:
    """A group width and what it costs, counted.

    Attributes:
        group_width: asked of every layer (layers that it does not divide get a smaller one).
        macs: multiply-accumulates of one sample.
        weights: elements.
        activations: elements moved of one sample.
        intensity: MACs for each value moved.
        balance: relative arithmetic plus relative movement per MAC, see :func:`balanced`.
        modelled_energy: see :func:`modelled_energy`, of the same layers.
    """

    group_width: int
    macs: int
    weights: int
    activations: int
    intensity: float
    balance: float
    modelled_energy: float


def curve(
    layers: Sequence[Layer], widths: Sequence[int] | None = None, *, movement: float = 1.0
) -> list[Point]:
    """What each group width would cost the layers.

    Args:
        layers: grouped convolutions (or any that shall be).
        widths: to try. Default: all divisors of the channels of one layer, powers of two to 64
            for several.
        movement: weight of the movement in the balance.
    """
    _some(layers)
    if widths is None:
        widths = divisors(layers[0].channels) if len(layers) == 1 else WIDTHS
    dense = [regrouped(layer, groups=1) for layer in layers]
    dense_macs, dense_intensity = sum(layer.macs for layer in dense), _intensity(dense)
    points = []
    for width in widths:
        chosen = [regrouped(layer, group_width=width) for layer in layers]
        total = reuse(chosen)
        cost = total.macs / dense_macs + movement * dense_intensity / total.intensity
        points.append(
            Point(
                width, total.macs, total.weights, total.activations, total.intensity, cost,
                modelled_energy(chosen),
            )
        )  # fmt: skip
    return points


def balance(layer: Layer, groups: float, *, movement: float = 1.0) -> float:
    """Arithmetic and movement per MAC, both relative to the dense layer.

    ``J(g) = 1/g + movement (b + c g) / (b + c)`` with ``b`` the weights of the dense layer and
    ``c`` the activations; convex in ``g`` with one minimum.
    """
    b, c = _dense_weights(layer), activations(layer)
    return 1.0 / groups + movement * (b + c * groups) / (b + c)


def balanced_groups(layer: Layer, *, movement: float = 1.0) -> float:
    """The real number of groups that minimises :func:`balance`: ``sqrt((b + c) / (movement c))``.

    Raises:
        InputError: if ``movement`` is not positive.
    """
    if not movement > 0.0:
        raise InputError(f"the weight of the movement is more than 0, not {movement}")
    b, c = _dense_weights(layer), activations(layer)
    return math.sqrt((b + c) / (movement * c))


def balanced(
    layers: Sequence[Layer], widths: Sequence[int] | None = None, *, movement: float = 1.0
) -> int:
    """The width that balances arithmetic and movement (reconstructed criterion).

    For one layer ``m / g*`` (see :func:`balanced_groups`) rounded to the nearest divisor of its
    channels; for several the tried width with the least :attr:`Point.balance`.
    """
    _some(layers)
    if len(layers) == 1 and widths is None:
        best = layers[0].channels / balanced_groups(layers[0], movement=movement)
        return min(divisors(layers[0].channels), key=lambda width: abs(width - best))
    points = curve(layers, widths, movement=movement)
    return min(points, key=lambda point: point.balance).group_width


def machine_balance(device: Device, *, dtype: str = "float32", memory: str | None = None) -> float:
    """MACs for each value moved from which on arithmetic is a device's limit.

    Args:
        device: described machine.
        dtype: number format of values and MACs.
        memory: which memory the values come from, the farthest by default.
    """
    return device.ridge(dtype, memory) * _BYTES[dtype]


def least_width(positions: int, taps: int, beta: float) -> float:
    """The real width at which intensity reaches ``beta``, for ``m = n`` and stride 1.

    ``2 hw beta / (k^2 (hw - beta))``; infinite where ``hw <= beta``.
    """
    if positions <= beta:
        return math.inf
    return 2.0 * positions * beta / (taps * (positions - beta))


def machine_bound(
    layers: Sequence[Layer], beta: float, widths: Sequence[int] | None = None
) -> int | None:
    """The smallest width whose intensity reaches the machine's balance (reconstructed criterion).

    Args:
        layers: grouped convolutions.
        beta: see :func:`machine_balance`.
        widths: see :func:`curve`.

    Returns:
        The width, or None if no width tried reaches it: memory stays the limit.
    """
    reached = [p.group_width for p in curve(layers, widths) if p.intensity >= beta]
    return min(reached) if reached else None


# Comparable complexity


@dataclass(frozen=True)
class Match:
    """A constant number of groups whose MACs come nearest to those of a constant width.

    Attributes:
        group_width: of the one network.
        groups: of the other.
        width_macs: MACs of all layers at the constant width.
        groups_macs: MACs of all layers at the constant number.
        difference: of the second from the first, relative.
    """

    group_width: int
    groups: int
    width_macs: int
    groups_macs: int

    @property
    def difference(self) -> float:
        return self.groups_macs / self.width_macs - 1.0

    @property
    def close(self) -> bool:
        """Whether the two are of comparable complexity (within 5 %)."""
        return abs(self.difference) <= CLOSE


def match_macs(layers: Sequence[Layer], group_width: int, *, select: Select = grouped) -> Match:
    """Finds the number of groups to compare a group width with.

    Args:
        layers: all layers of the network; those that are not selected count as they are.
        group_width: of the one network.
        select: which layers are regrouped.

    Raises:
        InputError: if no layer is selected.
    """
    chosen = [layer for layer in layers if select(layer)]
    _some(chosen)
    rest = sum(layer.macs for layer in layers) - sum(layer.macs for layer in chosen)

    def total(**wish: int) -> int:
        return rest + sum(regrouped(layer, **wish).macs for layer in chosen)

    wanted = total(group_width=group_width)
    candidates = sorted({d for layer in chosen for d in divisors(layer.channels)})
    groups = min(candidates, key=lambda count: abs(total(groups=count) - wanted))
    return Match(group_width, groups, wanted, total(groups=groups))


# Measuring


@dataclass(frozen=True)
class MeasuredPoint:
    """A group width and what it took on this machine.

    Attributes:
        group_width: channels of one group.
        macs: counted, of one sample.
        latency: of one call; batch, threads and runtime are among its fields.
        layout: "contiguous" or "channels_last".
        joules: of one call; None where no meter can be read.
        timing: the rounds, to be compared with those of the other widths.
    """

    group_width: int
    macs: int
    latency: Latency
    layout: str
    joules: float | None
    timing: Timing


def measure_layer(
    layer: Layer,
    widths: Sequence[int] | None = None,
    *,
    batch: int = 8,
    rounds: int = 5,
    round_ms: float = 20.0,
    runtimes: Sequence[Runtime] = ("torch", "onnxruntime"),
    layouts: Sequence[str] = ("contiguous", "channels_last"),
    threads: int = 1,
    device: str = "cpu",
    seed: int = 0,
) -> list[MeasuredPoint]:
    """Times one convolution at every group width, the widths in turns.

    Args:
        layer: its shape.
        widths: to try. Default: all divisors of its channels.
        batch: samples in a call; rankings differ between batches, so it is in every row.
        rounds: turns of every width.
        round_ms: milliseconds a turn.
        runtimes: each tried.
        layouts: of tensors in torch, each tried; ONNX Runtime has its own.
        threads: of the runtime.
        device: of torch ("cuda" lets cuDNN try its algorithms).
        seed: of weights and inputs.

    Returns:
        One point for each width, runtime and layout; energy is that of the meter, where there is
        one.
    """
    shapes = {
        width: regrouped(layer, group_width=width)
        for width in (divisors(layer.channels) if widths is None else widths)
    }
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(batch, layer.channels, *layer.input_size, generator=generator)
    modules = {width: _convolution(shape, generator) for width, shape in shapes.items()}
    points = []
    for runtime in runtimes:
        for layout in layouts if runtime != "onnxruntime" else ("contiguous",):
            contenders: dict[str, Contender] = {
                str(width): module
                if runtime == "onnxruntime"
                else _laid_out(module, inputs, layout, device)
                for width, module in modules.items()
            }
            with torch.backends.cudnn.flags(enabled=True, benchmark=True):
                timings = measure(
                    contenders, (inputs,), batch_sizes=(batch,), threads=(threads,),
                    runtimes=(runtime,), rounds=rounds, round_ms=round_ms, energy=True,
                )  # fmt: skip
            for timing in timings:
                width = int(timing.name)
                points.append(
                    MeasuredPoint(
                        width, shapes[width].macs, timing.latency, layout, timing.joules, timing
                    )
                )
    return points


def measure_networks(
    module: nn.Module,
    inputs: Sequence[Tensor],
    widths: Sequence[int] = WIDTHS,
    *,
    select: Select = grouped,
    batch: int = 1,
    rounds: int = 10,
    round_ms: float = 20.0,
    runtime: Runtime = "onnxruntime",
    threads: int = 1,
) -> list[MeasuredPoint]:
    """Times a network rebuilt at every group width, the networks in turns.

    Args:
        module: unchanged.
        inputs: of one call, batch first.
        widths: to try.
        select: which convolutions are rebuilt.
        batch: samples in a call.
        rounds: turns of every network.
        round_ms: milliseconds a turn.
        runtime: what runs them.
        threads: of the runtime.
    """
    networks = {
        width: regroup(module, group_width=width, select=select, warm_start=True)[0].eval()
        for width in widths
    }
    timings = measure(
        {str(width): network for width, network in networks.items()}, inputs,
        batch_sizes=(batch,), threads=(threads,), runtimes=(runtime,), rounds=rounds,
        round_ms=round_ms, energy=True,
    )  # fmt: skip
    return [
        MeasuredPoint(
            width, Graph.trace(network, inputs).macs, timing.latency, "contiguous",
            timing.joules, timing,
        )
        for (width, network), timing in zip(networks.items(), timings, strict=True)
    ]  # fmt: skip


def measured(points: Sequence[MeasuredPoint]) -> int:
    """The width that took least energy, or least time where no meter could be read.

    Args:
        points: of one layout and runtime.

    Raises:
        InputError: if there is none, or they were measured under different settings.
    """
    if not points:
        raise InputError("there is no measurement to choose a group width from")
    if len({(p.latency.runtime, p.latency.batch, p.latency.threads, p.layout) for p in points}) > 1:
        raise InputError("group widths are compared under one runtime, batch and layout only")
    if all(p.joules is not None for p in points):
        return min(points, key=lambda p: p.joules or 0.0).group_width
    return min(points, key=lambda p: p.latency.p50).group_width


@dataclass(frozen=True)
class MeasuredEnergy:
    """What a meter read.

    Attributes:
        joules: of one call, what the idle machine takes in that time subtracted.
        samples_per_joule: energy efficiency.
        samples_per_second: throughput during the measurement.
        watts: mean power during it, idle power included.
        idle_watts: mean power before it.
        source: the meter.
    """

    joules: float
    samples_per_joule: float
    samples_per_second: float
    watts: float
    idle_watts: float
    source: str


def measure_energy(
    call: Callable[[], Any],
    *,
    samples: int,
    seconds: float = 10.0,
    idle_seconds: float = 2.0,
    meter: EnergyMeter | None = None,
) -> MeasuredEnergy | None:
    """Measures the energy of a call that is repeated.

    Meters here are counters of joules that the machine integrates itself, so nothing is sampled;
    short runs would still measure the idle machine, hence ten seconds.

    Args:
        call: one call; warmed up by one that is not counted.
        samples: that one call handles.
        seconds: of repeating it.
        idle_seconds: of waiting before, to subtract what the idle machine takes.
        meter: what is read. Default: :meth:`EnergyMeter.find`.

    Returns:
        None where no meter can be read (see :func:`modelled_energy` for a model).

    Raises:
        InputError: if a duration is not positive.
    """
    if not (seconds > 0.0 and idle_seconds > 0.0 and samples > 0):
        raise InputError("measuring energy takes more than 0 seconds, idle seconds and samples")
    meter = meter or EnergyMeter.find()
    if meter is None:
        return None
    call()
    idle_watts = _watts(meter, lambda: time.sleep(idle_seconds), idle_seconds)
    count = 0

    def work() -> None:
        nonlocal count
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            call()
            count += 1

    began = time.perf_counter()
    watts = _watts(meter, work, seconds)
    spent = time.perf_counter() - began
    if idle_watts is None or watts is None:
        return None
    joules = (watts - idle_watts) * spent / count
    return MeasuredEnergy(
        joules,
        samples / joules if joules > 0.0 else math.inf,
        samples * count / spent,
        watts,
        idle_watts,
        meter.source,
    )


def _watts(meter: EnergyMeter, work: Callable[[], None], least: float) -> float | None:
    before, began = meter.joules(), time.perf_counter()
    work()
    spent, after = time.perf_counter() - began, meter.joules()
    if before is None or after is None or after < before:
        return None  # not readable, or the counter wrapped
    return (after - before) / max(spent, least)


# Details

_BYTES = {
    "float32": 4, "tf32": 4, "float16": 2, "bfloat16": 2, "float8": 1, "int8": 1, "float64": 8,
}  # fmt: skip


def _dense_weights(layer: Layer) -> int:
    return layer.taps * layer.channels * layer.features


def _some(layers: Sequence[Layer]) -> None:
    if not layers:
        raise InputError("the network has no convolution whose groups could be changed")


def _convolution(layer: Layer, generator: torch.Generator) -> nn.Module:
    module = nn.Conv2d(
        layer.channels, layer.features, layer.kernel, layer.stride, layer.padding, layer.dilation,
        layer.groups, bias=layer.bias,
    )  # fmt: skip
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.05, generator=generator)
    return module.eval()


def _laid_out(module: nn.Module, inputs: Tensor, layout: str, device: str) -> Callable[..., Any]:
    """A call on tensors that already lie as they should; the arguments it is given are ignored."""
    if layout not in ("contiguous", "channels_last"):
        raise InputError(f"a layout is contiguous or channels_last, not {layout!r}")
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    own = copy.deepcopy(module).to(device=device, memory_format=form)  # type: ignore[call-overload]
    x = inputs.to(device).contiguous(memory_format=form)

    def call(*_: Any) -> None:
        with torch.inference_mode():
            own(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    return call
