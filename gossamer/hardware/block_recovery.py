"""Stage 2 of an audit: the hyper-parameters of a network's blocks, from a trace of numbers.

Channels and strides follow from sizes, kernel size and groups from the calibrated time model, block
parameters from the channels around joins. :meth:`BlockSpec.build` makes the recovered network, and
:func:`replay_distance` compares its trace with the observed one. A reconstruction: the paper (Jha
et al., arXiv:2007.15248) says only that hyper-parameters can be determined.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from gossamer.core.errors import GossamerError, UnsupportedError
from gossamer.hardware.execution_trace import Trace, trace
from gossamer.hardware.kernel_times import DeviceProfile
from gossamer.hardware.trace_layers import Layer, Reading, read_layers
from gossamer.models.compact_blocks import (
    DenseLayer,
    Fire,
    InvertedResidual,
    Residual,
    ShuffleUnit,
    convolution,
)
from gossamer.models.mobilenet import SeparableBlock


@dataclass(frozen=True)
class RecoveredLayer:
    """One layer.

    Attributes:
        event: its place in the trace.
        inputs: channels that come in; 0: unknown.
        channels: channels that go out; 0: unknown.
        height: rows of its output.
        stride: of its resolution.
        kernel: side of its kernel; 0: unknown, nothing was timed.
        groups: of its channels; 0: unknown.
    """

    event: int
    inputs: int
    channels: int
    height: int
    stride: int
    kernel: int = 0
    groups: int = 0


@dataclass(frozen=True)
class Block:
    """One block of the family, or a layer between blocks.

    Attributes:
        kind: the family, "convolution" or "pool".
        inputs: channels that come in.
        outputs: channels that go out.
        stride: of the resolution.
        kernel: side of its largest kernel.
        groups: of its grouped convolutions that are not depthwise.
        inner: channels inside: of a fire module (squeeze, 1 x 1, 3 x 3), of a dense layer the
            growth and, if there is one, its bottleneck, else the width in the middle.
        height: rows of its output.
    """

    kind: str
    inputs: int
    outputs: int
    stride: int
    kernel: int
    groups: int
    inner: tuple[int, ...]
    height: int


@dataclass(frozen=True)
class BlockSpec:
    """What stage 2 recovers.

    Attributes:
        family: of the blocks.
        layers: all layers that work.
        blocks: in order, the layers between them included.
        parameters: of the family, medians over blocks: expansion, growth, squeeze …
        confidence: share of the events whose channels are known, times the share of the layers
            that blocks explain.
        in_channels: of the input.
    """

    family: str
    layers: tuple[RecoveredLayer, ...]
    blocks: tuple[Block, ...]
    parameters: dict[str, Any]
    confidence: float
    in_channels: int

    def build(self, *, classes: int = 10) -> nn.Sequential:
        """The recovered network with fresh weights.

        Args:
            classes: logits; sizes show them too, but they are no part of a block.

        Raises:
            UnsupportedError: if channels are unknown.
        """
        layers: list[nn.Module] = []
        width = self.in_channels
        for block in self.blocks:
            if min(block.inputs, block.outputs) < 1 or block.inputs != width:
                raise UnsupportedError("the recovered blocks do not fit onto each other")
            layers.append(_module(block))
            width = block.outputs
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]
        return nn.Sequential(*layers)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "family": self.family,
            "parameters": self.parameters,
            "confidence": self.confidence,
            "blocks": [asdict(block) for block in self.blocks],
            "layers": [asdict(layer) for layer in self.layers],
        }


def _module(block: Block) -> nn.Module:
    a, b, s = block.inputs, block.outputs, block.stride
    kernel, inner = block.kernel or 3, block.inner
    if block.kind == "pool":
        return nn.MaxPool2d(s)
    if block.kind == "residual":
        return Residual(a, b, s)
    if block.kind == "dense":
        return DenseLayer(a, inner[0], bottleneck=len(inner) > 1)
    if block.kind == "fire":
        return Fire(a, *inner)
    if block.kind == "depthwise-separable":
        return SeparableBlock(a, b, stride=s, groups=a)
    if block.kind == "inverted residual":
        return InvertedResidual(a, b, stride=s, expansion=inner[0] // a, kernel=kernel)
    if block.kind == "shuffle":
        return ShuffleUnit(a, b, stride=s, groups=block.groups or 2)
    return convolution(a, b, kernel, stride=s, groups=block.groups or 1)


def recover(trace: Trace, family: str, profile: DeviceProfile) -> BlockSpec:
    """Solves for layers and blocks of a network whose family is known.

    Args:
        trace: of level L1 or above.
        family: of its blocks.
        profile: of the device; without times kernels and groups stay unknown.
    """
    reading = read_layers(trace, profile)
    layers = [
        RecoveredLayer(x.event, x.inputs, x.channels, x.height, x.stride) for x in reading.layers
    ]
    if reading.timed:
        layers = _kernels(layers, reading.layers, trace, profile)
    blocks = _blocks(family, reading, layers)
    known = np.mean([e.channels > 0 for e in reading.events])
    explained = sum(b.kind == family for b in blocks) / max(1, len(blocks) - 1)
    return BlockSpec(
        family, tuple(layers), tuple(blocks), _parameters(family, blocks),
        float(known * min(1.0, explained)) if family != "plain" else float(known),
        int(trace.probes[0, 1]),
    )  # fmt: skip


def _kernels(
    layers: list[RecoveredLayer], seen: Sequence[Layer], trace: Trace, profile: DeviceProfile
) -> list[RecoveredLayer]:
    """Kernel sizes and groups of least error in time, one choice for each place in a block."""
    own = np.all(trace.probes[:, 1:] == trace.probes[0, 1:], axis=1)
    batches, durations = trace.probes[own, 0], trace.durations[own]
    slots: dict[tuple[Any, ...], list[int]] = {}
    for i, layer in enumerate(seen):
        key = (i == 0, float(np.sign(layer.change - 1)), layer.lights)
        if layer.inputs and layer.channels:
            slots.setdefault(key, []).append(i)
    chosen = list(layers)
    for places in slots.values():
        options: dict[tuple[int, int], list[float]] = {}
        for i in places:
            layer = layers[i]
            spent = np.log(durations[:, layer.event])
            for kernel in sorted({k for k, _ in profile.convolutions}):
                for groups in _groups(layer):
                    # Depthwise is one choice whatever the width; so are so many groups.
                    depthwise = groups == layer.inputs == layer.channels and groups > 1
                    modelled = [
                        profile.convolution(
                            kernel, groups, layer.inputs, layer.channels, layer.height, int(b)
                        )
                        for b in batches
                    ]
                    error = float(np.median(np.abs(spent - np.log(np.maximum(modelled, 1e-12)))))
                    options.setdefault((kernel, 0 if depthwise else groups), []).append(error)
        whole = {o: float(np.median(e)) for o, e in options.items() if len(e) == len(places)}
        kernel, groups = min(whole, key=lambda o: whole[o])
        for i in places:
            chosen[i] = replace(chosen[i], kernel=kernel, groups=groups or chosen[i].channels)
    return chosen


def _groups(layer: RecoveredLayer) -> list[int]:
    common = math.gcd(layer.inputs, layer.channels)
    found = [g for g in (1, 2, 3, 4, 8) if common % g == 0 and g < common]
    return [*found, layer.inputs] if layer.inputs == layer.channels > 1 else found or [1]


def _blocks(family: str, reading: Reading, layers: list[RecoveredLayer]) -> list[Block]:
    spans = _spans(family, reading)
    blocks, i = [], 0
    while i < len(layers):
        size = spans.get(i, 0)
        own = layers[i : i + max(1, size)]
        first, last = own[0], own[-1]
        stride = math.prod(x.stride for x in own)
        if not size:
            pooled = first.stride > 1 and first.inputs == first.channels and i
            kind = "pool" if pooled else "convolution"
            plain = "plain" if family == "plain" and i and not pooled else kind
            blocks.append(
                Block(
                    plain, first.inputs, first.channels, stride, first.kernel, 1, (), first.height
                )
            )
            i += 1
            continue
        outputs, inner = last.channels, tuple(x.channels for x in own[:-1])
        if family == "dense":
            outputs = first.inputs + last.channels
            inner = (last.channels, *inner)
        elif family == "fire":
            outputs = own[1].channels + own[2].channels
            inner = (own[0].channels, own[1].channels, own[2].channels)
        elif family == "shuffle":
            joins = [e for e in reading.concats if last.event < e < _next(layers, i + size)]
            outputs = reading.events[joins[0]].channels if joins else own[2].channels
            stride = own[1].stride
        elif family == "residual":
            outputs, stride = own[1].channels, own[0].stride * own[1].stride
        kernel = max((x.kernel for x in own), default=0)
        groups = first.groups if family == "shuffle" else 1
        blocks.append(
            Block(family, first.inputs, outputs, stride, kernel, groups, inner, last.height)
        )
        i += size
    return blocks


def _next(layers: list[RecoveredLayer], place: int) -> float:
    return layers[place].event if place < len(layers) else math.inf


def _spans(family: str, reading: Reading) -> dict[int, int]:
    """Where blocks of the family begin among the layers, and how many layers they have."""
    layers = reading.layers
    spans: dict[int, int] = {}
    if family in ("dense", "fire"):
        for join in reading.dense if family == "dense" else reading.fire:
            before = [i for i, layer in enumerate(layers) if layer.event < join]
            if family == "fire":
                if len(before) > 2:
                    spans[before[-1] - 2] = 3
            else:
                trunk = reading.events[join].parts[0]
                inside = [i for i in before if layers[i].event > trunk]
                if inside:  # none where the resolution is one position: layers end there
                    spans[inside[0]] = len(inside)
        return spans
    i = 1
    while i < len(layers):
        a, b, c = (layers[i + k] if i + k < len(layers) else None for k in range(3))
        size = 0
        if family == "inverted residual" and b and c:
            size = 3 if a.change >= 2 and b.change == 1 and c.change <= 0.5 else 0  # type: ignore[union-attr]
        elif family == "shuffle" and b and c:
            fits = a.change <= 0.5 and b.change == 1 and c.change > 1  # type: ignore[union-attr]
            pools = i + 3 < len(layers) and b.stride > 1
            size = (4 if pools else 3) if fits else 0
        elif family == "depthwise-separable" and a and b:
            size = 2 if a.change == 1 else 0
        elif family == "residual" and a and b:
            projected = c is not None and (a.stride > 1 or a.change != 1)
            size = 3 if projected else 2
        if size:
            spans[i] = size
        i += size or 1
    return spans


def _parameters(family: str, blocks: list[Block]) -> dict[str, Any]:
    own = [block for block in blocks if block.kind == family]
    found: dict[str, Any] = {
        "blocks": len(own),
        "depth": {str(h): n for h, n in Counter(block.height for block in own).items()},
        "width": blocks[0].outputs if blocks else 0,
        "strides": [block.stride for block in own],
    }
    if not own:
        return found
    if family == "fire":
        found |= dict(zip(("squeeze", "expand1", "expand3"), own[0].inner, strict=True))
    elif family == "dense":
        found["growth"] = int(np.median([block.inner[0] for block in own]))
    elif family == "inverted residual":
        found["expansion"] = float(np.median([block.inner[0] / block.inputs for block in own]))
    elif family == "shuffle":
        found["groups"] = int(np.median([block.groups for block in own]))
    if family != "fire":
        found["kernel"] = int(np.median([block.kernel for block in own]))
    return found


def replay_distance(
    spec: BlockSpec, seen: Trace, profile: DeviceProfile, *, repeats: int = 3
) -> float | None:
    """Runs the recovered network and compares its trace with the observed one.

    Args:
        spec: what was recovered.
        seen: the observed trace.
        profile: not used for sizes; without times only sizes are compared.
        repeats: recorded passes.

    Returns:
        Dynamic time warping of the logarithms of sizes (and times), over the length of the path; 0
        is the same; None if the network could not be built or run.
    """
    batch, channels, side = seen.probes[0].tolist()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = spec.build()
        again = trace(
            module, (channels, side), batches=(batch,), repeats=repeats, warmup=1,
            other_sides=False,
        )  # fmt: skip
    except GossamerError:
        return None
    timed = profile.timed and not np.isnan(seen.durations).any()
    return warped_distance(_points(seen, timed), _points(again, timed))


def _points(seen: Trace, timed: bool) -> np.ndarray:
    sizes = np.log2(seen.allocated[0] + 1)
    times = np.log2(seen.durations[0] + 1e-7) if timed else np.zeros_like(sizes)
    return np.stack([sizes, times], 1)


def warped_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Dynamic time warping of two sequences ``[length, features]``, mean step of the best path."""
    steps = np.abs(a[:, None] - b[None]).sum(-1)
    total = np.full((len(a) + 1, len(b) + 1), np.inf)
    total[0, 0] = 0.0
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            total[i, j] = steps[i - 1, j - 1] + min(
                total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]
            )
    return float(total[-1, -1] / max(len(a), len(b)))
