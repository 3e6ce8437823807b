"""What a network costs on this machine: time, memory, energy, bytes of the deployed file.

Machines are noisy and drift, so contenders take turns (A B A B ...) in one run and are compared
round by round; a difference inside the spread of those rounds has no winner. What cannot be read
(energy on most machines) is None, never an estimate.
"""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gossamer.core.cost import Cost, Latency
from gossamer.core.errors import InputError, UnsupportedError
from gossamer.core.export import OnnxRunner, write_onnx
from gossamer.core.network import Network
from gossamer.core.progress import progress
from gossamer.core.task import device_of, to_device
from gossamer.hardware import peak_memory

log = logging.getLogger(__name__)

Runtime = Literal["torch", "torch-compile", "onnxruntime"]
Contender = Network | nn.Module | Path | OnnxRunner | Callable[..., Any]
"""A network (exported for ONNX Runtime, its module for torch), a module, an ONNX file, a runner, or
any callable (measured as it is, under its runtime's name "torch")."""


@dataclass(frozen=True)
class Timing:
    """Times of one contender under one setting.

    Attributes:
        name: the contender's.
        runtime: what ran it.
        batch: samples in a call.
        threads: threads the runtime was given.
        rounds: milliseconds a call, ``[rounds, calls]``; contenders of one run share the rounds.
        joules: energy of one call, or None where it cannot be read.
    """

    name: str
    runtime: str
    batch: int
    threads: int
    rounds: np.ndarray
    joules: float | None = None

    @property
    def latency(self) -> Latency:
        """The summary over all calls."""
        times = self.rounds.ravel()
        low, middle, high, tail = np.percentile(times, [25, 50, 75, 95])
        return Latency(
            p50=float(middle),
            p95=float(tail),
            batch=self.batch,
            threads=self.threads,
            runtime=self.runtime,
            calls=times.size,
            spread=float((high - low) / middle) if middle > 0 else 0.0,
        )


@dataclass(frozen=True)
class Comparison:
    """Two contenders of one run, round by round.

    Attributes:
        ratio: time of a over time of b: above 1, b is faster. Median over rounds.
        low: 5th percentile of the rounds' ratios.
        high: 95th percentile.
        winner: name of the faster one, or None: the rounds do not agree, or differ by less than
            the margin.
        rounds: how many.
    """

    ratio: float
    low: float
    high: float
    winner: str | None
    rounds: int

    def __str__(self) -> str:
        verdict = f"{self.winner} is faster" if self.winner else "no winner inside the noise"
        return f"{self.ratio:.2f}x ({self.low:.2f} to {self.high:.2f}; {verdict})"


def compare(a: Timing, b: Timing, *, margin: float = 0.02) -> Comparison:
    """Ratio of two contenders' times with its spread; no winner inside the noise.

    Args:
        a: one contender.
        b: another of the same run.
        margin: differences of the median ratio below this never have a winner.

    Raises:
        InputError: if they were not measured in turns, or under different settings.
    """
    if a.rounds.shape[0] != b.rounds.shape[0] or (a.batch, a.threads) != (b.batch, b.threads):
        raise InputError(
            f"{a.name} and {b.name} were not measured in one run under one setting; measure them "
            "together"
        )
    ratios = np.median(a.rounds, axis=1) / np.median(b.rounds, axis=1)
    low, middle, high = (float(v) for v in np.percentile(ratios, [5, 50, 95]))
    winner = None
    # With few rounds percentiles are hardly more than the extremes, which is as strict as it gets.
    if len(ratios) >= 5:
        if low > 1.0 and middle > 1.0 + margin:
            winner = b.name
        elif high < 1.0 and middle < 1.0 - margin:
            winner = a.name
    return Comparison(middle, low, high, winner, len(ratios))


def measure(
    contenders: Mapping[str, Contender],
    inputs: Sequence[Any],
    *,
    batch_sizes: Sequence[int] = (1, 64),
    threads: Sequence[int] = (1,),
    runtimes: Sequence[Runtime] = ("onnxruntime",),
    rounds: int = 20,
    round_ms: float = 20.0,
    warmup_ms: float = 100.0,
    energy: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Times several contenders in turns.

    Under each setting every contender is warmed up, then in each round every contender makes as
    many calls as fill ``round_ms`` (at least one), in an order that alternates.

    Args:
        contenders: by name.
        inputs: positional arguments of one call, batch first; repeated or cut to each batch size.
        batch_sizes: samples in a call.
        threads: threads inside an operator, each tried.
        runtimes: each tried; a contender that is an ONNX file or runner knows only "onnxruntime",
            a plain callable is measured as it is under "torch".
        rounds: turns of every contender.
        round_ms: time a contender has in a round, milliseconds.
        warmup_ms: untimed calls before, milliseconds.
        energy: also read the energy meter around each contender's calls, where there is one.
        clock: in seconds. ``time.process_time`` leaves out what other programs took: for one thread
            on the CPU of a busy machine.

    Returns:
        One timing for each contender, runtime, thread count and batch size that exists.

    Raises:
        UnsupportedError: if a network cannot be exported or compiled.
    """
    if not contenders or min(batch_sizes, default=0) < 1 or min(threads, default=0) < 1:
        raise InputError("measuring needs a contender, and batch sizes and threads of at least 1")
    meter = EnergyMeter.find() if energy else None
    timings: list[Timing] = []
    settings: list[tuple[Runtime, int, int]] = [
        (r, t, b) for r in runtimes for t in threads for b in batch_sizes
    ]
    with (
        tempfile.TemporaryDirectory() as folder,
        progress() as bar,
    ):
        files = _OnnxFiles(Path(folder))
        shown = bar.add_task("measuring", total=len(settings))
        for runtime, count, batch in settings:
            with torch_threads(count):
                calls = {
                    name: call
                    for name, contender in contenders.items()
                    if (call := _call(name, contender, runtime, count, batch, inputs, files))
                }
                timings += _timed(
                    calls, runtime, count, batch, rounds, round_ms, warmup_ms, meter, clock
                )
            bar.advance(shown)
    return timings


def _timed(
    calls: Mapping[str, Callable[[], Any]],
    runtime: str,
    threads: int,
    batch: int,
    rounds: int,
    round_ms: float,
    warmup_ms: float,
    meter: EnergyMeter | None,
    clock: Callable[[], float],
) -> list[Timing]:
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        call()  # compiles, allocates
        spent: list[float] = []
        began = time.perf_counter()
        while not spent or (time.perf_counter() - began) * 1e3 < warmup_ms:
            spent.append(_milliseconds(call, clock))
        repeats[name] = max(1, min(1000, int(round_ms / max(1e-3, float(np.median(spent))))))
    times: dict[str, list[list[float]]] = {name: [] for name in calls}
    joules: dict[str, float] = dict.fromkeys(calls, 0.0)
    readable = meter is not None
    names = list(calls)
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            before = meter.joules() if meter is not None else None
            times[name].append([_milliseconds(calls[name], clock) for _ in range(repeats[name])])
            after = meter.joules() if meter is not None else None
            if before is None or after is None or after < before:
                readable = False  # not a meter, or its counter wrapped
            else:
                joules[name] += after - before
    return [
        Timing(
            name,
            runtime,
            batch,
            threads,
            np.array(times[name]),
            joules[name] / (rounds * repeats[name]) if readable else None,
        )
        for name in names
    ]


def _milliseconds(call: Callable[[], Any], clock: Callable[[], float]) -> float:
    began = clock()
    call()
    return (clock() - began) * 1e3


class _OnnxFiles:
    """Exports each network once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[int, Path] = {}

    def of(self, contender: Network | nn.Module, inputs: Sequence[Any]) -> Path:
        if id(contender) not in self.known:
            network = (
                contender
                if isinstance(contender, Network)
                else Network(contender, tuple(resized(inputs, 2)))
            )
            path = self.folder / f"{len(self.known)}.onnx"
            write_onnx(network, path)
            self.known[id(contender)] = path
        return self.known[id(contender)]


def _call(
    name: str,
    contender: Contender,
    runtime: Runtime,
    threads: int,
    batch: int,
    inputs: Sequence[Any],
    files: _OnnxFiles,
) -> Callable[[], Any] | None:
    """One call without arguments, or None if the contender does not know the runtime."""
    sized = resized(inputs, batch)
    if runtime == "onnxruntime":
        if isinstance(contender, Network | nn.Module):
            runner = OnnxRunner(files.of(contender, inputs), threads=threads)
        elif isinstance(contender, Path):
            runner = OnnxRunner(contender, threads=threads)
        elif isinstance(contender, OnnxRunner):
            runner = contender
        else:
            return None
        feed = runner.feed(*sized)
        return lambda: runner.session.run(None, feed)
    if isinstance(contender, Path | OnnxRunner):
        return None
    module = contender.module if isinstance(contender, Network) else contender
    if not isinstance(module, nn.Module):
        if runtime == "torch-compile":
            return None
        return lambda: module(*sized)
    device = device_of(module)
    moved = to_device(tuple(sized), device)
    function: Callable[..., Any] = module
    if runtime == "torch-compile":
        function = torch.compile(module)

    def call() -> None:
        modes = [(part, part.training) for part in parts if part.training]
        for part, _ in modes:
            part.training = False
        with torch.inference_mode():
            function(*moved)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        for part, mode in modes:
            part.training = mode

    parts = list(module.modules())
    if runtime == "torch-compile":
        try:
            call()
        except Exception as error:  # compilers raise nearly every kind there is
            text = str(error).strip().splitlines()
            raise UnsupportedError(
                f"{name} cannot be compiled by torch.compile: {text[0] if text else error!r}"
            ) from error
    return call


def resized(inputs: Sequence[Any], batch: int) -> tuple[Any, ...]:
    """Inputs repeated or cut to ``batch`` samples."""

    def one(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.ndim == 0:
            return x
        copies = -(-batch // len(x))
        return x.detach().repeat(copies, *[1] * (x.ndim - 1))[:batch].contiguous()

    return pytree.tree_map(one, tuple(inputs))


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Memory


def peak_memory_of(
    contender: Network | nn.Module | Path,
    inputs: Sequence[Any],
    *,
    batch: int = 1,
    threads: int = 1,
) -> int | None:
    """Peak memory of an inference, weights included, in bytes.

    A module on a GPU is measured there by torch's statistics. Everything else is measured as an
    ONNX file in a fresh process: how much its resident memory grows from before the model is
    loaded to the highest point of three calls.

    Args:
        contender: a network, a module or an ONNX file.
        inputs: positional arguments, repeated or cut to ``batch``.
        batch: samples in the call.
        threads: of ONNX Runtime.

    Returns:
        Bytes, or None where the operating system does not tell.
    """
    sized = resized(inputs, batch)
    module = contender.module if isinstance(contender, Network) else contender
    if isinstance(module, nn.Module) and device_of(module).type == "cuda":
        device = device_of(module)
        moved = to_device(tuple(sized), device)
        weights = sum(t.numel() * t.element_size() for t in module.state_dict().values())
        with torch.inference_mode():
            module(*moved)
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            module(*moved)
            torch.cuda.synchronize(device)
        return weights + torch.cuda.max_memory_allocated(device) - before
    with tempfile.TemporaryDirectory() as folder:
        path = contender if isinstance(contender, Path) else None
        if path is None:
            assert not isinstance(contender, Path)
            path = _OnnxFiles(Path(folder)).of(contender, inputs)
        feed = OnnxRunner(path, threads=threads).feed(*sized)
        np.savez(Path(folder) / "inputs.npz", **feed)  # type: ignore[arg-type]
        result = subprocess.run(
            [
                sys.executable,
                "-P",
                str(peak_memory.__file__),
                str(path),
                str(threads),
                str(Path(folder) / "inputs.npz"),
            ],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    try:
        return int(json.loads(result.stdout)["growth"])
    except (ValueError, KeyError, TypeError):
        log.debug("peak memory could not be measured: %s", result.stderr.strip())
        return None


# Energy


class EnergyMeter:
    """A counter of joules that the machine itself keeps.

    Args:
        read: returns joules since some moment, or None.
        source: what is read, in words.
    """

    def __init__(self, read: Callable[[], float | None], source: str) -> None:
        self._read = read
        self.source = source

    def joules(self) -> float | None:
        """The counter now, or None where reading it failed."""
        return self._read()

    @classmethod
    def find(cls, powercap: Path = Path("/sys/class/powercap")) -> EnergyMeter | None:
        """NVML's counter if there is a GPU, otherwise RAPL's packages; None if neither is readable.

        Args:
            powercap: where the kernel shows RAPL.
        """
        if torch.cuda.is_available():
            meter = cls._nvml()
            if meter is not None:
                return meter
        # Packages only (intel-rapl:0); their parts (intel-rapl:0:0) would count twice.
        counters = [
            zone / "energy_uj"
            for zone in sorted(powercap.glob("*rapl:*"))
            if zone.name.count(":") == 1 and "mmio" not in zone.name
        ]

        def read() -> float | None:
            try:
                return sum(int(counter.read_text()) for counter in counters) / 1e6
            except (OSError, ValueError):
                return None

        if not counters or read() is None:
            return None
        return cls(read, f"RAPL, {len(counters)} packages")

    @classmethod
    def _nvml(cls) -> EnergyMeter | None:
        try:
            import pynvml  # type: ignore[import-not-found]

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except Exception as error:  # the library is optional and its errors are its own
            log.debug("NVML cannot be read: %s", error)
            return None

        def read() -> float | None:
            try:
                return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
            except Exception:
                return None

        return cls(read, "NVML")


# All of it


def measured_costs(
    networks: Mapping[str, Network],
    *,
    batch: int = 1,
    threads: int = 1,
    rounds: int = 20,
    round_ms: float = 20.0,
    memory: bool = True,
) -> dict[str, Cost]:
    """Deployed bytes, latency in ONNX Runtime, peak memory and energy of several networks.

    Args:
        networks: by name, measured in turns; all take the first one's example inputs.
        batch: samples in a call.
        threads: of ONNX Runtime.
        rounds: turns of every network.
        round_ms: time of a turn, milliseconds.
        memory: also measure peak memory (a process each).

    Returns:
        Costs by name, with measured fields and the parameter count filled.
    """
    inputs = next(iter(networks.values())).example_inputs
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{i}.onnx" for i, name in enumerate(networks)}
        for name, network in networks.items():
            write_onnx(network, files[name])
        timings = measure(
            files,
            inputs,
            batch_sizes=(batch,),
            threads=(threads,),
            rounds=rounds,
            round_ms=round_ms,
            energy=True,
        )
        return {
            timing.name: Cost(
                parameters=sum(p.numel() for p in networks[timing.name].module.parameters()),
                file_bytes=files[timing.name].stat().st_size,
                latency=timing.latency,
                peak_memory_bytes=peak_memory_of(
                    files[timing.name], inputs, batch=batch, threads=threads
                )
                if memory
                else None,
                energy_joules=timing.joules,
            )
            for timing in timings
        }
