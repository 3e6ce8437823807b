"""What an execution shows to somebody who shares the machine: times and bytes, no names.

A :class:`Trace` holds numbers only. It has three levels: L0 is latency and peak memory of whole
passes; L1 adds the anonymous sequence of events, each with start, duration, bytes allocated, freed
and live; L2 adds a code for the class of each kernel, as profilers of GPUs show it. What a level
does not show is removed in this file, the boundary beyond which nothing else passes.

The levels and the way traces are collected are a reconstruction; the threat (side effects of
execution on a shared accelerator) is that of Jha et al., "DeepPeep: exploiting design
ramifications to decipher the architecture of compact DNNs", ACM JETC 2020 (arXiv:2007.15248).
"""

from __future__ import annotations

import csv
import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError, UnsupportedError, first_line
from gossamer.hardware.measure import torch_threads

log = logging.getLogger(__name__)

Level = Literal["L0", "L1", "L2"]
LEVELS: tuple[Level, ...] = ("L0", "L1", "L2")
CLASSES = ("conv", "depthwise", "gemm", "elementwise", "copy", "pool", "norm", "other")
"""Classes of kernels that L2 shows; a trace holds their places in this tuple."""

_VIEWS = frozenset(
    [
        "view",
        "_unsafe_view",
        "reshape",
        "transpose",
        "permute",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "expand",
        "expand_as",
        "as_strided",
        "chunk",
        "split",
        "split_with_sizes",
        "slice",
        "select",
        "narrow",
        "detach",
        "t",
        "alias",
        "dropout",
        "unbind",
        "contiguous",
        "view_as",
        "lift_fresh",
        "size",
        "to",
        "item",
        "is_nonzero",
        "movedim",
        "numpy_T",
    ]
)
"""Operators without a kernel unless they allocate."""
_CLASS_OF = {
    "conv2d": "conv", "convolution": "conv", "conv1d": "conv", "linear": "gemm", "addmm": "gemm",
    "matmul": "gemm", "bmm": "gemm", "mm": "gemm", "scaled_dot_product_attention": "gemm",
    "batch_norm": "norm", "layer_norm": "norm", "group_norm": "norm", "cat": "copy",
    "clone": "copy", "copy_": "copy", "contiguous": "copy", "reshape": "copy", "flatten": "copy",
    "stack": "copy", "channel_shuffle": "copy", "native_channel_shuffle": "copy",
}  # fmt: skip
_LARGEST_FILE = 1 << 26


@dataclass(frozen=True)
class Trace:
    """Executions of one network, as an observer records them.

    Attributes:
        level: "L0", "L1" or "L2".
        probes: ``[probes, 3]``: batch, channels and side of the input, which the observer chose.
        latency: ``[probes]``, seconds of a whole pass (NaN: not observed).
        peak: ``[probes]``, most bytes live.
        starts: ``[probes, events]``, seconds since the pass began; no events at L0.
        durations: ``[probes, events]``, seconds (NaN: not observed).
        allocated: ``[probes, events]``, bytes that outlive their event.
        freed: ``[probes, events]``, bytes freed after an event and before the next.
        live: ``[probes, events]``, bytes held at the end of an event, weights included, before
            its frees.
        classes: ``[events]``, places in :data:`CLASSES`; empty below L2.
    """

    level: Level
    probes: np.ndarray
    latency: np.ndarray
    peak: np.ndarray
    starts: np.ndarray
    durations: np.ndarray
    allocated: np.ndarray
    freed: np.ndarray
    live: np.ndarray
    classes: np.ndarray

    @property
    def events(self) -> int:
        """How many events a pass has."""
        return self.allocated.shape[1]

    def at(self, level: Level) -> Trace:
        """What a lower level shows of this trace.

        Raises:
            InputError: if this trace does not show so much.
        """
        if level not in LEVELS or LEVELS.index(level) > LEVELS.index(self.level):
            raise InputError(f"a trace of level {self.level} does not show level {level}")
        kept = self
        if level != "L2":
            kept = replace(kept, level=level, classes=np.zeros(0, int))
        if level == "L0":
            none = np.zeros((len(self.probes), 0))
            kept = replace(kept, starts=none, durations=none, allocated=none, freed=none, live=none)
        return kept

    def noisy(self, spread: float, *, seed: int) -> Trace:
        """The trace with log-normal noise on every time.

        Args:
            spread: standard deviation of the logarithm.
            seed: of the noise.
        """
        draw = np.random.default_rng(seed)
        return replace(
            self,
            durations=self.durations * np.exp(spread * draw.standard_normal(self.durations.shape)),
            latency=self.latency * np.exp(spread * draw.standard_normal(self.latency.shape)),
        )

    def sizes_only(self) -> Trace:
        """The trace without any time."""
        return replace(
            self, starts=np.full_like(self.starts, np.nan),
            durations=np.full_like(self.durations, np.nan),
            latency=np.full_like(self.latency, np.nan),
        )  # fmt: skip

    def activation_bytes(self) -> np.ndarray:
        """Bytes an image adds to each allocation, ``[events]``: slope over the batch size."""
        return self._line(self.allocated)[0]

    def memory_line(self) -> tuple[float, float]:
        """Peak bytes an image adds (activations), and those that are always there (weights)."""
        slope, constant = self._line(self.peak[:, None])
        return float(slope[0]), float(constant[0])

    def _line(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        own = np.all(self.probes[:, 1:] == self.probes[0, 1:], axis=1)
        batches = self.probes[own, 0].astype(float)
        if len(set(batches)) < 2:
            return values[0] / batches[0], np.zeros(values.shape[1])
        design = np.stack([batches, np.ones_like(batches)], 1)
        slope, constant = np.linalg.lstsq(design, values[own].astype(float), rcond=None)[0]
        return slope, constant

    @classmethod
    def of_events(
        cls,
        allocated: Sequence[float],
        *,
        freed: Sequence[float] | None = None,
        durations: Sequence[float] | None = None,
        starts: Sequence[float] | None = None,
        classes: Sequence[str] | None = None,
        batch: int = 1,
        channels: int = 3,
        side: int = 224,
        resident: float = 0.0,
    ) -> Trace:
        """A trace of one pass from lists, as a tool of one's own may record them.

        Args:
            allocated: bytes of each event.
            freed: bytes freed after each event. Default: the output of the event before.
            durations: seconds; default: not observed.
            starts: seconds; default: one event after the other.
            classes: of :data:`CLASSES`; makes it a trace of L2.
            batch: images of the pass.
            channels: of the input.
            side: of the input.
            resident: bytes of the weights.

        Raises:
            InputError: if lists differ in length, there is none, a number is impossible or a class
                is unknown.
        """
        size = len(allocated)
        bytes_in = np.asarray(allocated, float)
        out = np.concatenate([[0.0], bytes_in[:-1]]) if freed is None else np.asarray(freed, float)
        spent = np.full(size, np.nan) if durations is None else np.asarray(durations, float)
        began = np.concatenate([[0.0], np.cumsum(spent)[:-1]]) if starts is None else starts
        began = np.asarray(began, float)
        given = [bytes_in, out, spent, began, *([] if classes is None else [classes])]
        if not size or any(len(v) != size for v in given):
            raise InputError("a trace needs an event, and every column as many numbers as events")
        if not np.isfinite([bytes_in, out]).all() or min(bytes_in.min(), out.min()) < 0:
            raise InputError("bytes of a trace are finite and not below 0")
        if (spent < 0).any() or np.isinf(spent).any() or min(batch, channels, side) < 1:
            raise InputError("durations are not below 0; batch, channels and side at least 1")
        unknown = sorted(set(classes or ()) - set(CLASSES))
        if unknown:
            raise InputError(f"{unknown[0]!r} is no class of kernels: {', '.join(CLASSES)}")
        live = resident + np.cumsum(bytes_in) - np.concatenate([[0.0], np.cumsum(out)[:-1]])
        return cls(
            level="L1" if classes is None else "L2",
            probes=np.array([[batch, channels, side]]),
            latency=np.array([began[-1] + spent[-1] - began[0]]),
            peak=np.array([live.max()]),
            starts=began[None], durations=spent[None], allocated=bytes_in[None], freed=out[None],
            live=live[None],
            classes=np.array([CLASSES.index(c) for c in classes or ()], int),
        )  # fmt: skip

    @classmethod
    def from_csv(
        cls, path: Path | str, *, batch: int = 1, channels: int = 3, side: int = 224
    ) -> Trace:
        """Reads a trace of one pass: columns t_start, dur, alloc, free and, if known, class.

        Args:
            path: times in seconds (empty: not observed), sizes in bytes.
            batch: images of the pass.
            channels: of the input.
            side: of the input.

        Raises:
            InputError: if it is no such file; the sentence names the line.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"there is no trace {path}")
        if path.stat().st_size > _LARGEST_FILE:
            raise InputError(f"{path} is larger than 64 MiB, which no trace of one pass is")
        columns: dict[str, list[float]] = {k: [] for k in ("t_start", "dur", "alloc", "free")}
        classes: list[str] = []
        try:
            with path.open(encoding="utf-8", newline="") as file:
                reader = csv.DictReader(file)
                names = reader.fieldnames or []
                missing = [name for name in columns if name not in names]
                if missing:
                    raise InputError(f"{path} has no column {missing[0]}")
                for line, row in enumerate(reader, 2):
                    for name, values in columns.items():
                        text = (row[name] or "").strip()
                        try:
                            values.append(float(text) if text else math.nan)
                        except ValueError:
                            raise InputError(
                                f"{path}, line {line}: {name} is {text!r:.40}, not a number"
                            ) from None
                    if "class" in names:
                        classes.append((row["class"] or "").strip())
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path} is not a CSV file: {first_line(error)}") from error
        try:
            return cls.of_events(
                columns["alloc"], freed=columns["free"], durations=columns["dur"],
                starts=columns["t_start"], classes=classes if "class" in names else None,
                batch=batch, channels=channels, side=side,
            )  # fmt: skip
        except InputError as error:
            raise InputError(f"{path}: {error}") from error


def trace(
    model: nn.Module,
    input_size: tuple[int, int],
    *,
    batches: Sequence[int] = (1, 2, 4),
    level: Level = "L1",
    repeats: int = 30,
    warmup: int = 10,
    other_sides: bool = True,
    seed: int = 0,
) -> Trace:
    """Records executions of one's own network through torch's profiler, on one thread.

    Args:
        model: put into evaluation mode for the time; on the CPU or a GPU.
        input_size: channels and side of the (square) images.
        batches: images of a pass, one probe each.
        level: what the trace shows.
        repeats: recorded passes of a probe; times are medians.
        warmup: passes before.
        other_sides: two more probes with images one pixel wider and narrower, from which strides
            follow; left out where the network does not take them.
        seed: of the input's noise.

    Raises:
        InputError: if a number is below 1 or the level unknown.
        UnsupportedError: if the network does not take such images.
    """
    channels, side = input_size
    if min((*batches, channels, side, repeats), default=0) < 1 or not batches or warmup < 0:
        raise InputError("a trace needs batches, channels, a side and repeats of at least 1")
    if level not in LEVELS:
        raise InputError(f"{level!r} is no level; there are {', '.join(LEVELS)}")
    probes = [(b, channels, side) for b in batches]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch_threads(1), torch.inference_mode():
            try:
                found = [_record(model, p, repeats, warmup, seed) for p in probes]
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                raise UnsupportedError(
                    f"the network does not take images of {channels} x {side} x {side}: "
                    f"{first_line(error)}"
                ) from error
            for other in (side + 1, side - 1) if other_sides else ():
                probe = (batches[0], channels, other)
                try:
                    run = _record(model, probe, 1, 1, seed)
                except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
                    log.info("no probe of side %d: %s", other, first_line(error))
                    continue
                if run.classes == found[0].classes:
                    found.append(run)
                    probes.append(probe)
    finally:
        for module, mode in modes:
            module.training = mode
    if len({len(run.classes) for run in found}) > 1:
        raise UnsupportedError("the number of the network's kernels depends on its input")
    return Trace(
        level="L2",
        probes=np.array(probes),
        latency=np.array([run.latency for run in found]),
        peak=np.array([run.live.max(initial=0.0) for run in found]),
        starts=np.stack([run.starts for run in found]),
        durations=np.stack([run.durations for run in found]),
        allocated=np.stack([run.allocated for run in found]),
        freed=np.stack([run.freed for run in found]),
        live=np.stack([run.live for run in found]),
        classes=np.array([CLASSES.index(c) for c in found[0].classes], int),
    ).at(level)


@dataclass(frozen=True)
class _Recorded:
    """One probe: medians over its passes, ``[events]``."""

    latency: float
    starts: np.ndarray
    durations: np.ndarray
    allocated: np.ndarray
    freed: np.ndarray
    live: np.ndarray
    classes: list[str]


def _record(
    model: nn.Module, probe: tuple[int, int, int], repeats: int, warmup: int, seed: int
) -> _Recorded:
    from torch.profiler import ProfilerActivity, profile, record_function

    batch, channels, side = probe
    held = [*model.parameters(), *model.buffers()]
    device = held[0].device if held else torch.device("cpu")
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, side, side, generator=generator).to(device)
    for _ in range(warmup):
        model(x)
    spent = []
    for _ in range(repeats):
        _wait(device)
        began = time.perf_counter()
        model(x)
        _wait(device)
        spent.append(time.perf_counter() - began)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, profile_memory=True) as profiler:
        for _ in range(repeats):
            with record_function("gossamer_pass"):
                y = model(x)
            _wait(device)
            del y
    raw: Any = profiler.profiler
    passes = _passes(list(raw.kineto_results.events()), device, x)
    first = passes[0]
    same = [p for p in passes if [e.key() for e in p] == [e.key() for e in first]]
    allocated = np.array([e.allocated for e in first], float)
    freed = np.array([e.freed for e in first], float)
    resident = sum(t.numel() * t.element_size() for t in held)
    live = resident + np.cumsum(allocated) - np.concatenate([[0.0], np.cumsum(freed)[:-1]])
    return _Recorded(
        latency=float(np.median(spent)),
        starts=np.median([[e.start - p[0].start for e in p] for p in same], axis=0) / 1e9,
        durations=np.median([[e.duration for e in p] for p in same], axis=0) / 1e9,
        allocated=allocated,
        freed=freed,
        live=live,
        classes=[e.kind for e in first],
    )


@dataclass
class _Event:
    """A kernel: nanoseconds and bytes."""

    start: int
    duration: float
    allocated: int
    freed: int
    kind: str

    def key(self) -> tuple[int, int, str]:
        return self.allocated, self.freed, self.kind


def _passes(events: list[Any], device: torch.device, x: Tensor) -> list[list[_Event]]:
    """The kernels of each marked pass: outermost operators that run one."""
    kind_of_device = f"DeviceType.{'CUDA' if device.type == 'cuda' else 'CPU'}"
    host = [e for e in events if str(e.device_type()) == "DeviceType.CPU" or e.name() == "[memory]"]
    marks = sorted(
        (e.start_ns(), e.start_ns() + e.duration_ns()) for e in host if e.name() == "gossamer_pass"
    )
    kernels: Counter[int] = Counter()
    for e in events:
        on_device = device.type == "cuda" and str(e.device_type()) == kind_of_device
        if on_device and e.name() not in ("[memory]", "gossamer_pass"):
            kernels[e.linked_correlation_id()] += e.duration_ns()
    host.sort(key=lambda e: (e.start_ns(), -e.duration_ns()))
    found: list[list[_Event]] = []
    place = 0
    for begin, end in marks:
        while place < len(host) and host[place].start_ns() < begin:
            place += 1
        own: list[_Event] = []
        name, until, inside = "", -1, Counter[int]()
        while place < len(host) and host[place].start_ns() <= end:
            e = host[place]
            place += 1
            if e.name() == "[memory]":
                if str(e.device_type()) == kind_of_device:
                    _account(own, e.nbytes(), inside if e.start_ns() <= until else None)
            elif e.name().startswith("aten::"):
                if e.start_ns() > until:
                    _drop_view(own, name)
                    name, until = e.name().removeprefix("aten::"), e.start_ns() + e.duration_ns()
                    inside = Counter()
                    own.append(_Event(e.start_ns(), 0.0, 0, 0, _class_of(name)))
                    if device.type != "cuda":
                        own[-1].duration = float(e.duration_ns())
                if device.type == "cuda" and own:
                    own[-1].duration += kernels.get(e.correlation_id(), 0)
                if "depthwise" in e.name() and own:
                    own[-1].kind = "depthwise"
        _drop_view(own, name)
        found.append(own)
    if not found or not found[0]:
        raise UnsupportedError("the profiler recorded no kernel of the network")
    return found


def _account(own: list[_Event], size: int, inside: Counter[int] | None) -> None:
    """Books an allocation or a free; what a kernel frees of its own was scratch."""
    if not own:
        return
    if size > 0:
        own[-1].allocated += size
        if inside is not None:
            inside[size] += 1
    elif inside is not None and inside[-size]:
        inside[-size] -= 1
        own[-1].allocated += size
    else:
        own[-1].freed -= size


def _drop_view(own: list[_Event], name: str) -> None:
    """Removes the last event if it ran no kernel; what was freed after it counts before."""
    if own and name in _VIEWS and not own[-1].allocated:
        last = own.pop()
        if own:
            own[-1].freed += last.freed


def _class_of(name: str) -> str:
    if name in _CLASS_OF:
        return _CLASS_OF[name]
    if "pool" in name or name == "mean":
        return "pool"
    return "elementwise"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
