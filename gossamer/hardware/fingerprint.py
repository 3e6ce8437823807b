"""Which design a network has, read from the side effects of running it: an audit of one's own.

Dense connections concatenate, residual ones add, fire modules run two branches from a narrow
tensor, shuffles copy, depthwise layers are cheap: :class:`DeepPeep` names the family of a
network's blocks from a :class:`~gossamer.hardware.execution_trace.Trace`, which holds numbers only,
and :func:`~gossamer.hardware.block_recovery.recover` solves for the hyper-parameters.
:func:`audit` does both to a network of the user's and tells what leaks at each level.

Source: Jha, Mittal, Kumar and Mattela, "DeepPeep: exploiting design ramifications to decipher the
architecture of compact DNNs", ACM JETC 2020 (arXiv:2007.15248) for the two stages and the marks of
the families. Features, rules and thresholds are a reconstruction.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numba
import numpy as np
from torch import nn

from gossamer.core.errors import InputError
from gossamer.hardware.block_recovery import BlockSpec, recover, replay_distance
from gossamer.hardware.execution_trace import Level, Trace, trace
from gossamer.hardware.kernel_times import DeviceProfile, calibrate_device
from gossamer.hardware.trace_layers import Reading, read_layers
from gossamer.models.compact_blocks import FAMILIES

CHEAP = 0.25
"""A kernel is cheap below this share of a dense 3 x 3 convolution with the same output."""
ALTERNATING = 0.5
"""The same where sizes alternate as those of depthwise-separable pairs."""


@dataclass(frozen=True)
class Motif:
    """The repeated block of a trace.

    Attributes:
        start: its first event.
        length: its events; 0 if nothing repeats.
        repeats: how often it is found.
        coverage: share of the trace's events inside repeats.
    """

    start: int
    length: int
    repeats: int
    coverage: float


@dataclass(frozen=True)
class Identification:
    """Stage 1: the family of blocks.

    Attributes:
        family: one of :data:`~gossamer.models.compact_blocks.FAMILIES`.
        scores: strength of each family's mark, 0 to 1, as the rules read it.
        motif: the block.
    """

    family: str
    scores: Mapping[str, float]
    motif: Motif


class DeepPeep:
    """Reads traces. It is given numbers only, never a network.

    Args:
        profile: times of kernels on the device of the traces; with
            :data:`~gossamer.hardware.kernel_times.SIZES_ONLY` only sizes are read.
        cheap: share of a dense convolution's time below which a kernel is cheap.
    """

    def __init__(self, profile: DeviceProfile, *, cheap: float = CHEAP) -> None:
        self.profile = profile
        self.cheap = cheap

    def identify(self, trace: Trace) -> Identification:
        """Names the family of a network's blocks by readable rules.

        Args:
            trace: of level L1 or above; classes of kernels are not used.

        Raises:
            InputError: if the trace is of level L0.
        """
        reading = read_layers(trace, self.profile)
        scores = self._scores(reading)
        motif = find_motif(symbols(reading))
        order = (
            "dense", "fire", "shuffle", "inverted residual", "depthwise-separable", "residual",
        )  # fmt: skip
        family = next((name for name in order if scores[name] >= 0.5), "plain")
        return Identification(family, scores, motif)

    def recover(self, trace: Trace, family: str) -> BlockSpec:
        """Solves for the hyper-parameters of a network's blocks, given their family.

        Raises:
            InputError: if the family is unknown or the trace of level L0.
        """
        if family not in FAMILIES:
            raise InputError(f"{family!r} is no family of blocks: {', '.join(FAMILIES)}")
        return recover(trace, family, self.profile)

    def _scores(self, reading: Reading) -> dict[str, float]:
        layers = reading.layers
        count = max(1, len(layers) - 1)  # without the stem
        joins = max(1, len(reading.concats))
        dense, fire = len(reading.dense), len(reading.fire)
        ramps = reading.ramps()
        pairs, inverted, shuffled = 0, 0, 0
        triples = list(zip(layers[1:], layers[2:], layers[3:], strict=False))
        for a, b, c in triples:
            if a.change >= 2 and b.change == 1 and c.change <= 0.5:
                inverted += 1
            if a.change <= 0.5 and b.change == 1 and c.change > 1 and a.lights > layers[0].lights:
                shuffled += 1
        i = 1
        while i + 1 < len(layers):
            a, b = layers[i], layers[i + 1]
            if a.change == 1 and (a.relative < ALTERNATING or not reading.timed):
                cheaper_next = b.change == 1 and b.relative < a.relative
                pairs += not cheaper_next
                i += 1 if cheaper_next else 2
            else:
                i += 1
        cheap = sum(layer.change == 1 and layer.relative < self.cheap for layer in layers[1:])
        separable = 2 * pairs / count if pairs >= 2 else 0.0
        if reading.timed and cheap == 0:
            separable *= 0.5
        if 2 * len(reading.adds) >= pairs or reading.concats:
            separable *= 0.4
        scores = {
            "dense": dense / joins if dense and ramps else 0.0,
            "fire": fire / joins,
            "shuffle": 3 * shuffled / count if reading.adds or reading.concats else 0.0,
            "inverted residual": 3 * inverted / count if not reading.concats else 0.0,
            "depthwise-separable": separable,
            "residual": 3 * len(reading.adds) / count if not reading.concats else 0.0,
        }
        scores = {name: min(1.0, float(score)) for name, score in scores.items()}
        return scores | {"plain": 1.0 - max(scores.values())}


# Motifs


def symbols(reading: Reading) -> np.ndarray:
    """What each event looks like, ``[events]``: its ratio of sizes, its joins, whether it works."""
    heads = {layer.event for layer in reading.layers}
    joined = {event: 1 for event in reading.adds} | {event: 2 for event in reading.concats}
    found = []
    for event in reading.events:
        before = reading.events[event.source].size if event.source >= 0 else event.size
        ratio = round(math.log2(event.size / before)) if event.size and before else 0
        kind = joined.get(event.index, 0)
        found.append((max(-3, min(3, ratio)) + 3) * 8 + kind * 2 + (event.index in heads))
    return np.array(found, np.int64)


def find_motif(sequence: np.ndarray, *, tolerance: float = 0.2, coverage: float = 0.6) -> Motif:
    """The shortest motif whose approximate repeats cover enough of a sequence.

    Args:
        sequence: ``[events]``, whole numbers.
        tolerance: largest edit distance of a repeat, as a share of the motif's length.
        coverage: share of the events that repeats must cover.

    Returns:
        The motif; the one of most coverage if none covers enough; of length 0 if none repeats.
    """
    start, length, repeats, covered = _motif(
        np.ascontiguousarray(sequence, np.int64), tolerance, coverage
    )
    return Motif(int(start), int(length), int(repeats), float(covered))


@numba.njit(cache=True)
def _motif(sequence, tolerance, coverage):  # pragma: no cover (compiled)
    size = len(sequence)
    best = (0, 0, 0, 0.0)
    for length in range(2, size // 2 + 1):
        allowed = int(tolerance * length)
        found = (0, 0, 0, 0.0)
        for start in range(0, size - 2 * length + 1):
            place, repeats = start, 0
            while place + length <= size:
                if _edits(sequence[start : start + length], sequence[place : place + length],
                          allowed) <= allowed:  # fmt: skip
                    repeats += 1
                    place += length
                else:
                    place += 1
            share = repeats * length / size
            if repeats > 1 and share > found[3]:
                found = (start, length, repeats, share)
        if found[3] >= coverage:
            return found
        if found[3] > best[3]:
            best = found
    return best


@numba.njit(cache=True)
def _edits(a, b, allowed):  # pragma: no cover (compiled)
    size = len(a)
    row = np.arange(size + 1)
    for i in range(1, size + 1):
        diagonal = row[0]
        row[0] = i
        least = i
        for j in range(1, size + 1):
            kept = diagonal + (a[i - 1] != b[j - 1])
            diagonal = row[j]
            row[j] = min(kept, row[j] + 1, row[j - 1] + 1)
            least = min(least, row[j])
        if least > allowed:
            return least
    return row[size]


# Features, for learned attacks and for what leaks


def features(trace: Trace, profile: DeviceProfile) -> dict[str, float]:
    """Numbers that describe a trace of level L1, by name."""
    reading = read_layers(trace, profile)
    layers = reading.layers
    count = max(1, len(layers))
    changes = np.array([layer.change for layer in layers[1:]] or [1.0])
    relative = np.array([layer.relative for layer in layers[1:] if layer.change == 1] or [1.0])
    relative = np.nan_to_num(relative, nan=1.0, posinf=1.0)
    lights = np.array([layer.lights for layer in layers] or [0])
    slope, constant = trace.memory_line()
    motif = find_motif(symbols(reading))
    tripled = list(zip(layers[1:], layers[2:], layers[3:], strict=False))
    return {
        "events": float(trace.events),
        "layers": float(count),
        "share of equal sizes": float(np.mean(changes == 1)),
        "share of growing sizes": float(np.mean(changes > 1)),
        "share of shrinking sizes": float(np.mean(changes < 1)),
        "largest expansion": float(np.log2(changes.max())),
        "largest contraction": float(np.log2(changes.min())),
        "adds a layer": len(reading.adds) / count,
        "concatenations a layer": len(reading.concats) / count,
        "concatenations to the trunk": len(reading.dense) / count,
        "concatenations of branches": len(reading.fire) / count,
        "expand, filter, narrow": sum(
            a.change >= 2 and b.change == 1 and c.change <= 0.5 for a, b, c in tripled
        ) / count,
        "median time of equal sizes": float(np.log(np.median(relative) + 1e-6)),
        "least time of equal sizes": float(np.log(relative.min() + 1e-6)),
        "cheap layers": float(np.mean(relative < CHEAP)),
        "element-wise events a layer": float(lights.mean()),
        "most element-wise events": float(lights.max()),
        "motif": float(motif.length),
        "covered by the motif": motif.coverage,
        "activations to weights": float(math.log((slope + 1) / (abs(constant) + 1))),
    }  # fmt: skip


def aggregate_features(trace: Trace) -> dict[str, float]:
    """Numbers that describe what level L0 shows: latency and peak memory over batch and side."""
    slope, constant = trace.memory_line()
    first = max(float(trace.latency[0]), 1e-9)
    ratios = {
        f"latency of probe {i}": float(np.log(t / first)) for i, t in enumerate(trace.latency)
    }
    peaks = {
        f"peak of probe {i}": float(np.log(p / trace.peak[0])) for i, p in enumerate(trace.peak)
    }
    return {
        "latency": float(np.log(first)),
        "activations": float(np.log(slope + 1)),
        "weights": float(np.log(abs(constant) + 1)),
        **ratios, **peaks,
    }  # fmt: skip


def class_features(trace: Trace) -> dict[str, float]:
    """Shares of each class of kernels, without times and sizes; level L2."""
    from gossamer.hardware.execution_trace import CLASSES

    if not len(trace.classes):
        raise InputError(f"a trace of level {trace.level} shows no classes of kernels")
    counts = Counter(trace.classes.tolist())
    return {name: counts[i] / len(trace.classes) for i, name in enumerate(CLASSES)}


def leaks(
    described: Sequence[Mapping[str, float]], families: Sequence[str], *, bins: int = 4
) -> dict[str, float]:
    """Mutual information of each feature (binned) and the family, in bits, largest first.

    Args:
        described: features of each network.
        families: of each network.
        bins: equally filled ones.

    Returns:
        Estimates with the Miller-Madow correction, which can fall below zero; cut off there.
    """
    names = sorted(set(families))
    labels = np.array([names.index(f) for f in families])
    found = {}
    for feature in described[0]:
        values = np.array([row[feature] for row in described])
        edges = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1]))
        placed = np.searchsorted(edges, values, side="right")
        table = np.zeros((len(edges) + 1, len(names)))
        np.add.at(table, (placed, labels), 1)
        found[feature] = max(0.0, _entropy(table.sum(0)) + _entropy(table.sum(1)) - _entropy(table))
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _entropy(counts: np.ndarray) -> float:
    """Bits, with Miller and Madow's correction."""
    counts = counts[counts > 0]
    shares = counts / counts.sum()
    return float(
        -(shares * np.log2(shares)).sum() + (counts.size - 1) / (2 * counts.sum() * np.log(2))
    )


# The audit


@dataclass(frozen=True)
class LeakReport:
    """What running a network tells somebody who shares the machine.

    Attributes:
        identified: the family by level; L0 shows none to the rules.
        recovered: the block that was recovered at L1.
        replay: distance of the recovered network's trace to the observed one, per step; None if it
            could not be built or replayed.
        shows: what each level shows, in words.
    """

    identified: Mapping[str, Identification]
    recovered: BlockSpec
    replay: float | None
    shows: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        first = next(iter(self.identified.values()))
        return {
            "family": first.family,
            "levels": {
                level: {"family": i.family, "scores": dict(i.scores)}
                for level, i in self.identified.items()
            },
            "motif": vars(first.motif),
            "recovered": self.recovered.to_json(),
            "replay_distance": self.replay,
            "shows": dict(self.shows),
        }


def audit_trace(seen: Trace, profile: DeviceProfile, *, replay: bool = True) -> LeakReport:
    """Both stages on a recorded trace.

    Args:
        seen: of level L1 or L2.
        profile: of the device it was recorded on.
        replay: also run the recovered network here and compare traces.

    Raises:
        InputError: if the trace is of level L0.
    """
    attack = DeepPeep(profile)
    levels: dict[Level, Identification] = {"L1": attack.identify(seen.at("L1"))}
    sizes = DeepPeep(DeviceProfile(rounding=profile.rounding)).identify(seen.at("L1").sizes_only())
    identified: dict[str, Identification] = {**levels, "L1, sizes only": sizes}
    spec = attack.recover(seen.at("L1"), levels["L1"].family)
    distance = replay_distance(spec, seen, profile) if replay else None
    slope, constant = seen.memory_line()
    shows = {
        "L0": f"{slope:,.0f} bytes of activations an image at the peak, {constant:,.0f} always",
        "L1": f"{seen.events} events, {sum(1 for s in spec.layers if s.channels)} layers with "
        "channels and resolution",
    }
    if len(seen.classes):
        shares = sorted(class_features(seen).items(), key=lambda item: -item[1])
        shows["L2"] = ", ".join(f"{100 * v:.0f} % {name}" for name, v in shares if v)
    return LeakReport(identified, spec, distance, shows)


def audit(
    model: nn.Module,
    input_size: tuple[int, int],
    *,
    profile: DeviceProfile | None = None,
    repeats: int = 10,
    seed: int = 0,
) -> LeakReport:
    """Traces a network of one's own and attacks the trace.

    Args:
        model: the network.
        input_size: channels and side of its images.
        profile: of this machine. Default: measured now, a few seconds.
        repeats: recorded passes.
        seed: of the input's noise.

    Raises:
        UnsupportedError: if the network does not take such images.
    """
    seen = trace(model, input_size, level="L2", repeats=repeats, warmup=3, seed=seed)
    return audit_trace(seen, calibrate_device() if profile is None else profile)
