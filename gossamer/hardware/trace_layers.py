"""The working layers of a trace, and the joins between them.

A reconstruction (see :mod:`gossamer.hardware.fingerprint`). An event works if its size differs from
its source's, or if it takes much longer than an element-wise kernel of that size; everything else
is element-wise. Python keeps a block's input alive a little longer than the block needs it, so two
equal tensors that die together are an addition only behind a layer with more element-wise events
than the first layer has.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from gossamer.hardware.execution_trace import Trace
from gossamer.hardware.kernel_times import DeviceProfile
from gossamer.hardware.trace_shapes import Event, read_sizes

HEAVY = 2.0
"""An event of equal size works if it takes so many times a normalisation."""


@dataclass(frozen=True)
class Layer:
    """An event that works, with the element-wise ones behind it.

    Attributes:
        event: its place in the trace.
        inputs: channels that come in; 0 where sizes fit none.
        channels: channels that go out.
        height: rows of its output.
        stride: of the resolution.
        change: channels that go out over channels that come in.
        lights: element-wise events behind it, additions among them, that allocate.
        relative: its time over that of a dense 3 x 3 convolution with its output; infinite where
            nothing was timed.
    """

    event: int
    inputs: int
    channels: int
    height: int
    stride: int
    change: float
    lights: int
    relative: float


@dataclass(frozen=True)
class Reading:
    """Everything the rules look at.

    Attributes:
        events: with channels and resolutions.
        layers: that work, in order; pooling to one position and what follows is left out.
        adds: events that add.
        concats: events that concatenate.
        dense: concatenations of a layer's output to the trunk.
        fire: concatenations of two branches from one narrower tensor.
        live: bytes an image, live at each event.
        timed: whether times were seen.
    """

    events: tuple[Event, ...]
    layers: tuple[Layer, ...]
    adds: tuple[int, ...]
    concats: tuple[int, ...]
    dense: tuple[int, ...]
    fire: tuple[int, ...]
    live: np.ndarray
    timed: bool

    def ramps(self) -> bool:
        """Whether concatenations of one resolution hold ever more memory."""
        found = [(self.events[e].height, self.live[e]) for e in self.dense]
        pairs = [(a, b) for a, b in itertools.pairwise(found) if a[0] == b[0]]
        return bool(found) and all(b[1] > a[1] for a, b in pairs)


def read_layers(trace: Trace, profile: DeviceProfile) -> Reading:
    """Reads layers and joins off a trace of level L1.

    Raises:
        InputError: if the trace shows no events.
    """
    events = read_sizes(trace, rounding=profile.rounding)
    own = np.all(trace.probes[:, 1:] == trace.probes[0, 1:], axis=1)
    batches, durations = trace.probes[own, 0], trace.durations[own]
    timed = profile.timed and not np.isnan(durations).any()
    heavy = [_works(e, events, trace, durations, profile, timed) for e in events]
    concats = [e.index for e in events if e.join == "concat" and not heavy[e.index]]
    head = np.maximum.accumulate(np.where(heavy, np.arange(len(events)), 0))
    behind: dict[int, list[int]] = {e.index: [] for e in events if heavy[e.index]}
    joined = -1
    for e in events:
        joined = e.index if e.index in concats else joined
        light = not heavy[e.index] and e.index not in concats and trace.allocated[0, e.index]
        if light and int(head[e.index]) > joined:
            behind.setdefault(int(head[e.index]), []).append(e.index)
    usual = len(next(iter(behind.values()), []))
    adds = []
    for lights in behind.values():
        flagged = [i for i in lights if events[i].join == "add"]
        if flagged and len(lights) > usual:
            adds.append(flagged[-1])
    layers: list[Layer] = []
    for e in events:
        if not heavy[e.index]:
            continue
        if e.height == 1:  # the classifier begins
            break
        source = events[e.source] if e.source >= 0 else None
        inputs = source.channels if source else int(trace.probes[0, 1])
        relative = np.inf
        if timed and e.channels:
            dense = [
                profile.convolution(3, 1, e.channels, e.channels, e.height, int(b)) for b in batches
            ]
            relative = float(np.median(durations[:, e.index] / np.maximum(dense, 1e-12)))
        change = e.channels / inputs if e.channels and inputs else 1.0
        layers.append(
            Layer(
                e.index, inputs, e.channels, e.height, e.stride, change, len(behind[e.index]),
                relative,
            )
        )  # fmt: skip
    dense = [c for c in concats if _appends(events[c])]
    fire = [c for c in concats if _branches(events[c], events, head)]
    return Reading(
        tuple(events), tuple(layers), tuple(adds), tuple(concats),
        tuple(c for c in dense if c not in fire), tuple(fire),
        (trace.live[0] - trace.live[0, 0] + trace.allocated[0, 0]) / trace.probes[0, 0], timed,
    )  # fmt: skip


def _works(
    event: Event, events: list[Event], trace: Trace, durations: np.ndarray, profile: DeviceProfile,
    timed: bool,
) -> bool:  # fmt: skip
    if event.join == "concat" or not trace.allocated[0, event.index]:
        return False
    if event.source < 0 or events[event.source].size != event.size:
        return True
    if not timed:
        return event.join != "add"
    own = np.all(trace.probes[:, 1:] == trace.probes[0, 1:], axis=1)
    light = profile.norm.at(trace.allocated[own, event.index])
    # Other programs only make a kernel slower: the least is the truest.
    return bool(np.min(durations[:, event.index] / light) > HEAVY)


def _appends(event: Event) -> bool:
    """Whether a layer's output goes behind the oldest tensor there is."""
    return event.parts[0] == event.held[0]


def _branches(event: Event, events: list[Event], group: np.ndarray) -> bool:
    """Whether one tensor, narrower than both parts, was live when the later branch began."""
    if len(event.parts) != 2:
        return False
    older, newest = event.parts
    began = events[int(group[newest])]
    narrow = min(events[older].size, events[newest].size)
    # The older branch may itself hold several tensors; what feeds both is older than its layer.
    return any(t < group[older] and events[t].size < narrow for t in began.held)
