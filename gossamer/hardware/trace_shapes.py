"""From sizes alone: which tensors join, and the channels and resolution of every event.

All of it is a reconstruction (the paper publishes only that hyper-parameters follow from memory
footprints: Jha et al., "DeepPeep", arXiv:2007.15248): live tensors are followed through allocations
and frees, joins are sums and pairs of live sizes, and channels are bytes over positions, where the
resolution halves wherever that makes channels whole at every image side that was probed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gossamer.core.errors import InputError
from gossamer.hardware.execution_trace import Trace

EQUAL = 0.02
"""Sizes that differ by less than this share are equal."""
_BEAM = 24
_SUBSETS = 12  # live tensors among which frees are looked for

Join = Literal["", "add", "concat"]


@dataclass(frozen=True)
class Event:
    """What the sizes say of one event.

    Attributes:
        index: in the trace.
        size: bytes an image of its output (that of its input for an event in place).
        source: the event whose output it reads, as far as one can tell; -1: the network's input.
        join: whether it adds or concatenates live tensors.
        parts: events whose outputs are joined, from the oldest.
        held: events whose outputs were live when it began, from the oldest.
        died: events whose outputs were freed after it.
        channels: of its output; 0 where none fits.
        height: rows of its output; 0 where none fits.
        stride: of its resolution against its source's.
    """

    index: int
    size: float
    source: int
    join: Join
    parts: tuple[int, ...]
    held: tuple[int, ...]
    died: tuple[int, ...]
    channels: int = 0
    height: int = 0
    stride: int = 1


def same(a: float, b: float) -> bool:
    """Whether two sizes are equal but for rounding."""
    return abs(a - b) <= EQUAL * max(a, b, 1e-9)


def read_sizes(trace: Trace, *, value_bytes: int = 4, rounding: int = 1) -> list[Event]:
    """Follows the live tensors of a trace and solves for channels and resolutions.

    Args:
        trace: of level L1 or above.
        value_bytes: bytes of a number.
        rounding: allocations are multiples of so many bytes (512 in CUDA's allocator).

    Raises:
        InputError: if the trace shows no events.
    """
    if not trace.events:
        raise InputError(f"a trace of level {trace.level} shows no sizes of events")
    sides = _probes_of_sides(trace)
    batch = int(trace.probes[0, 0])
    flow = _live_tensors(trace.allocated[0] / batch, trace.freed[0] / batch)
    return _solve(flow, trace.allocated[sides], trace.probes[sides], value_bytes, rounding)


def _probes_of_sides(trace: Trace) -> list[int]:
    """The first probe, and one for each other side of its batch size."""
    first = trace.probes[0]
    chosen = {int(first[2]): 0}
    for place, (batch, channels, side) in enumerate(trace.probes.tolist()):
        if (batch, channels) == (first[0], first[1]):
            chosen.setdefault(side, place)
    return list(chosen.values())


def _live_tensors(allocated: np.ndarray, freed: np.ndarray) -> list[Event]:
    events: list[Event] = []
    sizes: dict[int, float] = {}
    live: list[int] = []
    for i, (size, gone) in enumerate(zip(allocated.tolist(), freed.tolist(), strict=True)):
        held = tuple(live)
        newest = held[-1] if held else -1
        if not size:  # in place
            size = sizes.get(newest, 0.0)
            died = _freed(live[:-1], sizes, gone)
        else:
            died = _freed(live, sizes, gone)
            sizes[i] = size
            live.append(i)
        join, parts = _join(size, held, sizes, died) if allocated[i] else ("", ())
        for tensor in died:
            live.remove(tensor)
        events.append(Event(i, size, newest, join, parts, held, died))
    return events


def _freed(live: Sequence[int], sizes: dict[int, float], gone: float) -> tuple[int, ...]:
    """Which live tensors sum to the freed bytes; the fewest and newest ones."""
    if not gone:
        return ()
    newest = [t for t in reversed(live)][:_SUBSETS]
    for count in range(1, len(newest) + 1):
        for chosen in itertools.combinations(newest, count):
            if abs(sum(sizes[t] for t in chosen) - gone) <= 1e-6 * gone:
                return tuple(sorted(chosen))
    return ()


def _join(
    size: float, held: tuple[int, ...], sizes: dict[int, float], died: tuple[int, ...]
) -> tuple[Join, tuple[int, ...]]:
    """Whether an output is the sum of live tensors, or of the size of two that die with it."""
    if len(held) < 2:
        return "", ()
    newest, older = held[-1], held[-2::-1]
    for tensor in older[:_SUBSETS]:
        if abs(sizes[tensor] + sizes[newest] - size) <= 1e-6 * size and newest in died:
            return "concat", (tensor, newest)
    if len(held) > 2 and abs(sum(sizes[t] for t in held) - size) <= 1e-6 * size:
        return "concat", held
    if newest in died and sizes[newest] == size:
        for tensor in older:
            if tensor in died and sizes[tensor] == size:
                return "add", (tensor, newest)
    return "", ()


@dataclass(frozen=True)
class _Shape:
    """Channels and the height at every side."""

    channels: int
    heights: tuple[int, ...]


def _solve(
    flow: list[Event], allocated: np.ndarray, probes: np.ndarray, value_bytes: int, rounding: int
) -> list[Event]:
    start = _Shape(int(probes[0, 1]), tuple(int(side) for side in probes[:, 2]))
    unit = value_bytes * probes[:, 0]
    # A state is what it costs, the shape of every event so far, and its source.
    beam: list[tuple[float, tuple[_Shape | None, ...], tuple[int, ...]]] = [(0.0, (), ())]
    for event in flow:
        sizes = allocated[:, event.index]
        following = []
        for cost, shapes, sources in beam:
            options = _options(event, sizes, shapes, start, unit, rounding)
            following += [
                (cost + more, (*shapes, shape), (*sources, source))
                for more, shape, source in options
            ]
        best: dict[tuple[object, ...], tuple[float, tuple[_Shape | None, ...], tuple[int, ...]]]
        best = {}
        for state in sorted(following, key=lambda state: state[0]):
            alive = {*event.held, event.index} - set(event.died)
            best.setdefault(tuple(state[1][t] for t in sorted(alive)), state)
        beam = list(best.values())[:_BEAM]
    _, shapes, sources = beam[0]
    solved = []
    for event, shape, source in zip(flow, shapes, sources, strict=True):
        before = start if source < 0 else shapes[source]
        known = shape is not None
        stride = round(before.heights[0] / shape.heights[0]) if shape and before else 1
        solved.append(
            Event(
                event.index, event.size, source, event.join, event.parts, event.held, event.died,
                shape.channels if known else 0, shape.heights[0] if known else 0, max(1, stride),
            )
        )  # fmt: skip
    return solved


def _options(
    event: Event, sizes: np.ndarray, shapes: tuple[_Shape | None, ...], start: _Shape,
    unit: np.ndarray, rounding: int,
) -> list[tuple[float, _Shape | None, int]]:  # fmt: skip
    """What an output can be: cost, shape and source. Costs order what sizes leave open."""
    if not sizes[0]:
        return [(0.0, shapes[event.source] if event.source >= 0 else start, event.source)]
    found: dict[_Shape, tuple[float, int]] = {}
    if event.join:
        parts = [shapes[t] for t in event.parts]
        heights = {p.heights if p else None for p in parts}
        if len(heights) == 1 and parts[0] is not None:
            total = sum(p.channels for p in parts if p)
            channels = total if event.join == "concat" else parts[0].channels
            return [(0.0, _Shape(channels, parts[0].heights), event.parts[-1])]
    sources = event.held[::-1] or (-1,)
    for age, source in enumerate(sources):
        before = start if source < 0 else shapes[source]
        if before is None:
            continue
        for heights, price in _resolutions(before.heights):
            channels = _channels(sizes, heights, unit, rounding)
            if channels is None:
                continue
            shape = _Shape(channels, heights)
            halved = heights != before.heights
            change = channels / before.channels
            cost = price + 1.2 * min(age, 2) + (3.0 if event.join else 0.0)
            if not halved:
                cost += 0.0 if change == 1 else 1.0
            elif heights[0] > 1 or before.heights[0] <= 2:
                cost += {1.0: 0.6, 2.0: 0.9}.get(change, 1.5)
            else:
                cost += 0.6 if change == 1 else 1.6
            if shape not in found or cost < found[shape][0]:
                found[shape] = (cost, source)
    if not found:
        return [(20.0, None, sources[0])]
    return [(cost, shape, source) for shape, (cost, source) in found.items()]


def _resolutions(heights: tuple[int, ...]) -> list[tuple[tuple[int, ...], float]]:
    """Where a layer can take a resolution, with the price of being unusual."""
    kept = {heights: 0.0}
    for new, price in (
        (tuple(-(-h // 2) for h in heights), 0.0),
        (tuple(h // 2 for h in heights), 0.05),
        (tuple((h - 1) // 2 for h in heights), 0.3),
        (tuple(1 for _ in heights), 0.1),
        (tuple(-(-h // 4) for h in heights), 0.8),
        (tuple(h - 2 for h in heights), 0.9),
    ):
        if min(new) >= 1:
            kept.setdefault(new, price)
    return list(kept.items())


def _channels(
    sizes: np.ndarray, heights: tuple[int, ...], unit: np.ndarray, rounding: int
) -> int | None:
    """The whole number of channels that makes every size, if there is one."""
    positions = unit * np.square(np.array(heights, float))
    channels = int(sizes[0] // positions[0]) if rounding > 1 else round(sizes[0] / positions[0])
    if channels < 1:
        return None
    made = np.ceil(channels * positions / rounding) * rounding
    return channels if np.array_equal(made, sizes) else None
