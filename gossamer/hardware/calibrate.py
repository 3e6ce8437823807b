"""The ceilings of this machine, measured: a :class:`~gossamer.hardware.device.Device` of it.

A ceiling is what nothing exceeds, so each figure is the best of many repeats: the peak rate is that
of the fastest large matrix product (torch or ONNX Runtime, several sizes), a bandwidth that of the
fastest of three sweeps (read, copy, triad) over a working set that fits into one cache and not into
the one before. What starting an operator costs is no ceiling; it is a median. Each figure's source
says how and when it was measured.

A machine is calibrated once: :func:`machine_device` keeps the description in the user's cache.

Source: McCalpin, "Memory bandwidth and machine balance in current high performance computers"
(STREAM), 1995, for the triad and what its bytes are; Williams et al., "Roofline: an insightful
visual performance model", CACM 2009, for measured ceilings.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numba
import numpy as np
import torch
from torch import nn

from gossamer.core.errors import InputError
from gossamer.core.experiment import device_name
from gossamer.core.progress import progress
from gossamer.hardware.device import Device, Figure, Memory, read_device
from gossamer.hardware.measure import torch_threads

log = logging.getLogger(__name__)

_FORMAT = 1
"""Raised when what is measured changes: descriptions in caches are then measured again."""

_int_mm: Any = torch.ops.aten._int_mm.default
_SIZES = (256, 512, 1024)
_GPU_SIZES = (2048, 4096, 8192)
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True)
class Cache:
    """A data cache as the machine reports it.

    Attributes:
        name: "L1", "L2", "L3".
        bytes: capacity of one.
        cores: how many cores share one.
    """

    name: str
    bytes: int
    cores: int


def calibrate(
    *, threads: int = 1, device: Literal["cpu", "cuda"] = "cpu", seconds: float = 20.0
) -> Device:
    """Measures the ceilings of this machine.

    Args:
        threads: the figures hold for this many; a GPU has no such number.
        device: "cuda" measures the GPU that torch sees first.
        seconds: what the measurement may take, about.

    Returns:
        Peak rates of float32, bfloat16 and int8 (a GPU: also tf32 and float16), bandwidths and
        capacities of caches and memory, and what starting an operator costs in torch and (on a CPU)
        in ONNX Runtime.

    Raises:
        InputError: if there are fewer processors than threads, or no GPU.
    """
    if device == "cuda":
        return _calibrate_gpu(seconds)
    cores = _cores()
    if not 1 <= threads <= cores:
        raise InputError(f"{threads} threads cannot be measured here; this machine has {cores}")
    began = f"measured {date.today().isoformat()}"
    share = seconds / 20  # of one measurement among about as many
    with torch_threads(threads), progress() as bar:
        shown = bar.add_task("calibrating", total=5)
        rates = {}
        for dtype in ("float32", "bfloat16", "int8"):
            rates[dtype] = measure_peak(dtype, threads=threads, seconds=4 * share, when=began)
            bar.advance(shown)
        memories = _memories(threads, 6 * share, began)
        bar.advance(shown)
        starts = {
            "torch": Figure(_torch_start(share), f"{began}: an element-wise module on one number"),
            "onnxruntime": Figure(
                _onnx_start(threads, share), f"{began}: an element-wise node on one number"
            ),
        }
        bar.advance(shown)
    return Device(
        _name(threads), "cpu", rates, tuple(memories), threads=threads, operator_seconds=starts
    )


def machine_device(
    cache: Path | None = None, *, threads: int = 1, device: Literal["cpu", "cuda"] = "cpu"
) -> Device:
    """This machine's description, calibrated once and then read from the user's cache.

    Args:
        cache: folder for descriptions. Default: ``gossamer/devices`` in ``$XDG_CACHE_HOME`` or
            ``~/.cache``.
        threads: the figures hold for this many.
        device: "cuda" for the GPU.

    Returns:
        The description; measured anew (about 20 seconds) if there is none for this processor,
        number of threads and version of torch, or if the file is damaged.
    """
    place = cached_place(cache, threads=threads, device=device)
    found = _kept(place, device)
    if found is not None:
        return found
    measured = calibrate(threads=threads, device=device)
    try:
        measured.write(place)
    except InputError as error:  # a home that cannot be written is no reason to fail
        log.warning("%s", error)
    return measured


def device_at_hand(cache: Path | None = None, *, threads: int = 1) -> Device:
    """This machine's description if it was calibrated, or its float32 ceilings measured briefly.

    Args:
        cache: see :func:`machine_device`.
        threads: the figures hold for this many.

    Returns:
        The kept description; else one of float32 and the memories, measured in about two seconds
        and not kept, as its sources say.
    """
    found = _kept(cached_place(cache, threads=threads), "cpu")
    if found is not None:
        return found
    return _brief(threads)


@functools.cache
def _brief(threads: int) -> Device:
    when = f"measured briefly {date.today().isoformat()}"
    with torch_threads(threads):
        peak = measure_peak("float32", threads=threads, seconds=0.4, when=when)
        memories = _memories(threads, 0.5, when, sweeps=("copy",))
    return Device(_name(threads), "cpu", {"float32": peak}, tuple(memories), threads=threads)


def _kept(place: Path, device: str) -> Device | None:
    """The description in a cache, or None if there is none that is whole and of this kind."""
    if not place.is_file():
        return None
    try:
        found = read_device(place)
    except InputError as error:
        log.warning("%s; measuring again", error)
        return None
    if found.kind != ("gpu" if device == "cuda" else "cpu"):
        log.warning("%s describes a %s; measuring again", place, found.kind)
        return None
    return found


def cached_place(
    cache: Path | None = None, *, threads: int = 1, device: Literal["cpu", "cuda"] = "cpu"
) -> Path:
    """Where :func:`machine_device` keeps the description of this machine.

    The name has the processor, the threads, the version of torch and what the machine's caches are.
    """
    if cache is None:
        # A relative folder is invalid by the XDG specification, and ignored as it demands.
        home = Path(os.environ.get("XDG_CACHE_HOME") or "")
        cache = (home if home.is_absolute() else Path.home() / ".cache") / "gossamer" / "devices"
    name = device_name() if device == "cpu" else torch.cuda.get_device_name()
    key = repr((_FORMAT, name, device, threads, torch.__version__, reported_caches()))
    readable = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40]
    digest = sha256(key.encode()).hexdigest()[:12]
    return Path(cache) / f"{readable}-{threads}-{digest}.yaml"


def _name(threads: int) -> str:
    return f"{device_name()} ({threads} {'thread' if threads == 1 else 'threads'})"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Peak rates


def measure_peak(
    dtype: str = "float32", *, threads: int = 1, seconds: float = 4.0, when: str = "measured"
) -> Figure:
    """Multiply-accumulates per second of the fastest large matrix product.

    Args:
        dtype: "float32", "bfloat16" or "int8".
        threads: of torch and ONNX Runtime.
        seconds: what all sizes and runtimes may take together.
        when: what the source begins with.

    Returns:
        The rate; its source has the runtime and the size that reached it.

    Raises:
        InputError: if no runtime here multiplies numbers of that format.
    """
    products: dict[str, Callable[[str, int, int], Callable[[], Any] | None]] = {
        f"torch {torch.__version__}": _torch_product
    }
    try:
        import onnxruntime

        products[f"ONNX Runtime {onnxruntime.__version__}"] = _onnx_product
    except ImportError:  # an optional runtime
        pass
    best, how = 0.0, ""
    for runtime, make in products.items():
        for size in _SIZES:
            try:
                call = make(dtype, size, threads)
            except (AttributeError, ImportError, RuntimeError) as error:
                log.debug("%s has no product of %s: %s", runtime, dtype, error)
                continue
            if call is None:
                continue
            with torch_threads(threads):
                spent = _fastest(call, seconds / (len(products) * len(_SIZES)))
            if size**3 / spent > best:
                best, how = size**3 / spent, f"product of {size} x {size} matrices in {runtime}"
    if not best:
        raise InputError(f"nothing here multiplies matrices of {dtype}")
    return Figure(best, f"{when}: {how}, {threads} {'thread' if threads == 1 else 'threads'}")


def _torch_product(dtype: str, size: int, threads: int) -> Callable[[], Any]:
    if dtype == "int8":
        a, b = (torch.ones(size, size, dtype=torch.int8) for _ in range(2))
        return lambda: _int_mm(a, b)
    kind = getattr(torch, dtype)
    a, b = (torch.ones(size, size, dtype=kind) for _ in range(2))
    out = torch.empty(size, size, dtype=kind)
    return lambda: torch.mm(a, b, out=out)


def _onnx_product(dtype: str, size: int, threads: int) -> Callable[[], Any] | None:
    from onnx import TensorProto, helper, numpy_helper

    if dtype == "float32":
        x, y = (np.ones((size, size), np.float32) for _ in range(2))
        kinds, operator = (TensorProto.FLOAT, TensorProto.FLOAT), "MatMul"
    elif dtype == "int8":
        x, y = np.ones((size, size), np.uint8), np.ones((size, size), np.int8)
        kinds, operator = (TensorProto.UINT8, TensorProto.INT32), "MatMulInteger"
    else:
        return None
    graph = helper.make_graph(
        [helper.make_node(operator, ["a", "b"], ["c"])],
        "product",
        [helper.make_tensor_value_info("a", kinds[0], [size, size])],
        [helper.make_tensor_value_info("c", kinds[1], [size, size])],
        [numpy_helper.from_array(y, "b")],
    )
    session = _session(graph, threads)
    return lambda: session.run(None, {"a": x})


def _session(graph: Any, threads: int, *, optimise: bool = True) -> Any:
    import onnxruntime
    from onnx import helper

    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _fastest(call: Callable[[], Any], seconds: float) -> float:
    call()
    best = math.inf
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return best


# Memories


def reported_caches(folder: Path = _CACHES) -> list[Cache]:
    """The data caches of the first core, from the nearest; empty where the system does not tell.

    Args:
        folder: of Linux's description.
    """
    found: list[Cache] = []
    for index in sorted(folder.glob("index*")):
        try:
            kind = (index / "type").read_text().strip()
            size = (index / "size").read_text().strip()
            level = int((index / "level").read_text())
            sharing = (index / "shared_cpu_list").read_text().strip()
            match = re.fullmatch(r"(\d+)([KMG]?)", size)
            if kind == "Instruction" or match is None:
                continue
            scale = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[match[2]]
            found.append(Cache(f"L{level}", int(match[1]) * scale, _count(sharing)))
        except (OSError, ValueError):
            continue
    return sorted(found, key=lambda c: c.bytes)


def _count(processors: str) -> int:
    """How many processors a list as "0-3,8" names."""
    total = 0
    for part in processors.split(","):
        low, _, high = part.partition("-")
        total += int(high or low) - int(low) + 1
    return max(1, total)


def measure_bandwidth(
    low: int,
    high: int,
    *,
    threads: int = 1,
    seconds: float = 1.0,
    when: str = "measured",
    sweeps: Sequence[str] = ("read", "copy", "triad"),
) -> Figure:
    """Bytes per second of reading and writing working sets between two sizes.

    Args:
        low: bytes of the smallest working set of one thread.
        high: bytes of the largest.
        threads: each has a working set of its own.
        seconds: what it may take.
        when: what the source begins with.
        sweeps: which of read, copy ``a = b + s`` and triad ``a = b + s c``.

    Returns:
        The best of the sweeps over three sizes;
        bytes read and bytes written count alike, lines that are only fetched to be overwritten do
        not.
    """
    sizes = sorted({round(low + (high - low) * part / 2) for part in range(3)})
    best, how = 0.0, ""
    with ThreadPoolExecutor(threads) as pool:
        for size in sizes:
            for name in sweeps:
                arrays, sweep = _SWEEPS[name]
                length = max(64, size // (4 * arrays) // 16 * 16)
                # A call of at least a millisecond, so that neither the clock nor threads matter.
                times = max(1, 25_000_000 // (threads * length * arrays))
                sets = [
                    [np.ones(length, np.float32) for _ in range(arrays)] for _ in range(threads)
                ]

                def call(sweep: Any = sweep, sets: Any = sets, times: int = times) -> None:
                    if threads == 1:
                        sweep(*sets[0], times)
                    else:
                        list(pool.map(lambda own: sweep(*own, times), sets))

                spent = _fastest(call, seconds / (len(sizes) * len(sweeps)))
                rate = threads * times * length * 4 * arrays / spent
                if rate > best:
                    best, how = rate, f"{name} of {_words(length * 4 * arrays)}"
    each = f", each of {threads} threads" if threads > 1 else ", 1 thread"
    return Figure(best, f"{when}: {how}{each}")


@numba.njit(nogil=True, fastmath=True)
def _read(a: np.ndarray, times: int) -> float:
    total = np.float32(0)
    for turn in range(times):
        a[0] = turn  # a sum that does not depend on the turn would be computed once
        for i in range(a.size):
            total += a[i]
    return float(total)


@numba.njit(nogil=True, fastmath=True)
def _copy(a: np.ndarray, b: np.ndarray, times: int) -> None:
    for turn in range(times):
        s = np.float32(turn)
        for i in range(a.size):
            a[i] = b[i] + s


@numba.njit(nogil=True, fastmath=True)
def _triad(a: np.ndarray, b: np.ndarray, c: np.ndarray, times: int) -> None:
    for turn in range(times):
        s = np.float32(turn)
        for i in range(a.size):
            a[i] = b[i] + s * c[i]


_SWEEPS: Mapping[str, tuple[int, Any]] = {
    "read": (1, _read),
    "copy": (2, _copy),
    "triad": (3, _triad),
}


def _memories(
    threads: int, seconds: float, when: str, sweeps: Sequence[str] = tuple(_SWEEPS)
) -> list[Memory]:
    caches = reported_caches()
    share = seconds / (len(caches) + 1)
    found: list[tuple[str, Figure, Figure]] = []
    nearer = 0
    for cache in caches:
        # What one of the threads has of it: a private cache whole, a shared one in part.
        own = cache.bytes / min(threads, cache.cores)
        low, high = max(own / 4, 2 * nearer), own * 3 / 4
        reached = Figure(
            float(cache.bytes * max(1, threads // cache.cores)),
            "reported by the system"
            + (f", of {threads} cores" if threads > 1 and cache.cores == 1 else ""),
        )
        if low < high:
            rate = measure_bandwidth(int(low), int(high), threads=threads, seconds=share, when=when)
            found.append((cache.name, reached, rate))
        nearer = int(own)
    total = _installed()
    large = min(max(256 << 20, 8 * caches[-1].bytes if caches else 0), total // 4)
    rate = measure_bandwidth(
        large // threads, large // threads, threads=threads, seconds=share, when=when,
        sweeps=sweeps,
    )  # fmt: skip
    found.append(("memory", Figure(float(total), "reported by the system"), rate))
    # A nearer memory is never slower; where noise says so, the better figure holds for both.
    memories: list[Memory] = []
    floor: Figure | None = None
    for name, capacity, rate in reversed(found):
        if floor is not None and rate.value < floor.value:
            rate = Figure(floor.value, f"{floor.source} (here no faster than farther memory)")
        floor = rate
        memories.insert(0, Memory(name, capacity, rate))
    return memories


def _installed() -> int:
    import psutil

    return int(psutil.virtual_memory().total)


def _words(size: int) -> str:
    for unit, scale in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            return f"{size / scale:.0f} {unit}"
    return f"{size} bytes"


# Starting an operator


def _torch_start(seconds: float) -> float:
    length = 100
    chain = nn.Sequential(*(nn.Tanh() for _ in range(length))).eval()
    number = torch.ones(1)

    def call() -> None:
        with torch.inference_mode():
            chain(number)

    return _typical(call, seconds) / length


def _onnx_start(threads: int, seconds: float) -> float:
    """The slope over the number of nodes: what a call costs beside them is not an operator's."""
    from onnx import TensorProto, helper

    number = np.ones(1, np.float32)
    spent: list[float] = []
    lengths = (10, 210)
    for length in lengths:
        nodes = [helper.make_node("Tanh", [f"t{i}"], [f"t{i + 1}"]) for i in range(length)]
        ends = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])
            for name in ("t0", f"t{length}")
        ]
        graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:])
        session = _session(graph, threads, optimise=False)

        def call(session: Any = session) -> None:
            session.run(None, {"t0": number})

        spent.append(_typical(call, seconds / 2))
    return max(1e-8, (spent[1] - spent[0]) / (lengths[1] - lengths[0]))


def _typical(call: Callable[[], Any], seconds: float) -> float:
    call()
    spent: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(spent) < 5:
        began = time.perf_counter()
        call()
        spent.append(time.perf_counter() - began)
    return float(np.median(spent))


# GPUs


def _calibrate_gpu(seconds: float) -> Device:
    if not torch.cuda.is_available():
        raise InputError("there is no GPU that torch can use")
    when = f"measured {date.today().isoformat()}"
    properties = torch.cuda.get_device_properties(0)
    share = seconds / 8
    rates: dict[str, Figure] = {}
    for dtype in ("float32", "tf32", "float16", "bfloat16", "int8"):
        try:
            rates[dtype] = _gpu_peak(dtype, share, when)
        except RuntimeError as error:  # formats a GPU lacks
            log.debug("no product of %s: %s", dtype, error)
    memories: list[Memory] = []
    cache = int(getattr(properties, "L2_cache_size", 0))
    far = _gpu_bandwidth([max(1 << 28, 8 * cache)], share, when)
    if cache:
        near = _gpu_bandwidth([cache // 4, cache // 2], share, when)
        if near.value < far.value:
            near = Figure(far.value, f"{far.source} (here no faster than farther memory)")
        memories.append(Memory("L2", Figure(float(cache), "reported by the system"), near))
    total = Figure(float(properties.total_memory), "reported by the system")
    memories.append(Memory("memory", total, far))
    number = torch.ones(1, device="cuda")
    length = 1000

    def chain() -> None:
        for _ in range(length):
            torch.tanh(number)
        torch.cuda.synchronize()

    start = Figure(_typical(chain, share) / length, f"{when}: an element-wise kernel on one number")
    return Device(properties.name, "gpu", rates, tuple(memories), operator_seconds={"torch": start})


def _gpu_peak(dtype: str, seconds: float, when: str) -> Figure:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    try:
        best, size = 0.0, 0
        for n in _GPU_SIZES:
            if dtype == "int8":
                a, b = (torch.ones(n, n, dtype=torch.int8, device="cuda") for _ in range(2))
                spent = _gpu_fastest(lambda a=a, b=b: _int_mm(a, b), seconds / 3)
            else:
                kind = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
                # Random numbers: a product of constants draws less power and clocks higher.
                a, b = (torch.randn(n, n, device="cuda").to(kind) for _ in range(2))
                spent = _gpu_fastest(lambda a=a, b=b: torch.mm(a, b), seconds / 3)
            if n**3 / spent > best:
                best, size = n**3 / spent, n
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return Figure(best, f"{when}: product of {size} x {size} matrices in torch")


def _gpu_bandwidth(sizes: Sequence[int], seconds: float, when: str) -> Figure:
    best, how = 0.0, 0
    for size in sizes:
        source = torch.ones(max(256, size // 8), device="cuda")
        target = torch.empty_like(source)
        moved = 8 * source.numel()
        spent = _gpu_fastest(lambda s=source, t=target: t.copy_(s), seconds / len(sizes))
        if moved / spent > best:
            best, how = moved / spent, moved
    return Figure(best, f"{when}: copy of {_words(how)}")


def _gpu_fastest(call: Callable[[], Any], seconds: float) -> float:
    """Seconds of one call among calls that are queued, so that starting them does not count."""
    call()
    queued = 20
    best = math.inf
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        torch.cuda.synchronize()
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        for _ in range(queued):
            call()
        ended.record()
        torch.cuda.synchronize()
        best = min(best, began.elapsed_time(ended) / 1e3 / queued)
    return best
