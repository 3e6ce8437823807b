"""A machine in a few figures: peak rates, memories and bandwidths, each with its source.

Descriptions are small YAML files::

    name: NVIDIA A100 (SXM, 80 GB)
    kind: gpu
    macs_per_second:
      float32: {value: 9.75e12, source: "data sheet: 19.5 TFLOPS, two operations a MAC"}
    memories:
      - name: L2
        bytes: {value: 40.0e6, source: data sheet}
      - name: HBM2e
        bytes: {value: 80.0e9, source: data sheet}
        bytes_per_second: {value: 2.039e12, source: data sheet}

Memories go from the nearest to the farthest; the last one holds everything. A figure nobody knows
is left out. A few descriptions come with gossamer (:func:`known_devices`); ``calibrate`` in
:mod:`gossamer.hardware.calibrate` measures one of this machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml

from gossamer.core.errors import InputError, first_line
from gossamer.core.files import whole_file

DTYPES = ("float32", "tf32", "float16", "bfloat16", "float8", "int8", "float64")
"""Number formats a rate can be given for."""

_LARGEST_FILE = 1 << 20
# No machine of one box is outside these: a figure that is has a wrong unit.
_MACS_PER_SECOND = (1e6, 1e18)
_BYTES_PER_SECOND = (1e6, 1e16)
_BYTES = (16.0, 1e15)
_SECONDS = (1e-9, 1.0)


@dataclass(frozen=True)
class Figure:
    """A number of a device and where it is from.

    Attributes:
        value: in the unit its place names.
        source: "data sheet …", "measured …".
    """

    value: float
    source: str


@dataclass(frozen=True)
class Memory:
    """One level of memory.

    Attributes:
        name: as "L2".
        bytes: capacity; None where nobody knows.
        bytes_per_second: of reading and writing together; None where nobody knows.
    """

    name: str
    bytes: Figure | None = None
    bytes_per_second: Figure | None = None


@dataclass(frozen=True)
class Device:
    """A machine that networks run on.

    Attributes:
        name: in words.
        kind: "cpu", "gpu" or "accelerator".
        macs_per_second: peak multiply-accumulates per second by number format.
        memories: from the nearest to the farthest.
        threads: the figures hold for this many; None for all of the machine.
        operator_seconds: what starting one operator costs by runtime ("torch", "onnxruntime").
    """

    name: str
    kind: Literal["cpu", "gpu", "accelerator"]
    macs_per_second: Mapping[str, Figure]
    memories: tuple[Memory, ...]
    threads: int | None = None
    operator_seconds: Mapping[str, Figure] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self)

    def peak(self, dtype: str = "float32") -> float:
        """Peak multiply-accumulates per second.

        Raises:
            InputError: if the description has no figure for that number format.
        """
        if dtype not in self.macs_per_second:
            raise InputError(
                f"{self.name} has no peak rate for {dtype}; it has "
                f"{', '.join(self.macs_per_second)}"
            )
        return self.macs_per_second[dtype].value

    def memory(self, name: str | None = None) -> Memory:
        """A memory with a known bandwidth, the farthest one by default.

        Raises:
            InputError: if there is none of that name whose bandwidth is known.
        """
        for memory in reversed(self.memories):
            if memory.bytes_per_second is not None and name in (None, memory.name):
                return memory
        known = [m.name for m in self.memories if m.bytes_per_second is not None]
        raise InputError(
            f"{self.name} has no bandwidth for {name or 'any memory'}; it has {', '.join(known)}"
        )

    def holding(self, count: float) -> tuple[str, float]:
        """The nearest memory with a known bandwidth that holds so many bytes: name, bytes a second.

        The farthest such memory holds everything.
        """
        known = [
            (memory, memory.bytes_per_second)
            for memory in self.memories
            if memory.bytes_per_second is not None
        ]
        for memory, rate in known:
            if memory.bytes is not None and memory.bytes.value >= count:
                return memory.name, rate.value
        memory, rate = known[-1]
        return memory.name, rate.value

    def bandwidth(self, name: str | None = None) -> float:
        """Bytes per second of a memory, the farthest one by default."""
        figure = self.memory(name).bytes_per_second
        assert figure is not None
        return figure.value

    def ridge(self, dtype: str = "float32", memory: str | None = None) -> float:
        """Multiply-accumulates per byte from which on arithmetic is the limit, not memory."""
        return self.peak(dtype) / self.bandwidth(memory)

    def to_yaml(self) -> str:
        """The description as a file."""
        value: dict[str, Any] = {"name": self.name, "kind": self.kind}
        if self.threads is not None:
            value["threads"] = self.threads
        value["macs_per_second"] = {d: _plain(f) for d, f in self.macs_per_second.items()}
        value["memories"] = [
            {
                "name": m.name,
                **({"bytes": _plain(m.bytes)} if m.bytes else {}),
                **({"bytes_per_second": _plain(m.bytes_per_second)} if m.bytes_per_second else {}),
            }
            for m in self.memories
        ]
        if self.operator_seconds:
            value["operator_seconds"] = {r: _plain(f) for r, f in self.operator_seconds.items()}
        return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)

    def write(self, path: Path) -> None:
        """Writes the description as YAML."""
        with whole_file(path) as partial:
            partial.write_text(self.to_yaml(), encoding="utf-8")


def known_devices() -> list[str]:
    """Names of the descriptions that come with gossamer."""
    folder = files("gossamer.hardware") / "devices"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name != "__init__.py")


def read_device(source: str | Path) -> Device:
    """Reads a description.

    Args:
        source: a YAML file, or a name among :func:`known_devices`.

    Raises:
        InputError: if there is no such file, it is no description, or a figure is impossible; the
            sentence names the figure.
    """
    path = Path(source)
    if str(source) in known_devices():
        text = (files("gossamer.hardware") / "devices" / f"{source}.yaml").read_text("utf-8")
    elif not path.is_file():
        raise InputError(
            f"there is no device file {path}; devices that come with gossamer: "
            f"{', '.join(known_devices())}"
        )
    elif path.stat().st_size > _LARGEST_FILE:
        raise InputError(f"{path} is too large to describe a device")
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not a text file") from error
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not YAML: {first_line(error)}") from error
    try:
        return _device(value)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _device(value: Any) -> Device:
    fields = _mapping(
        value, "a device", {"name", "kind", "threads", "macs_per_second", "memories",
                            "operator_seconds"},
    )  # fmt: skip
    for needed in ("name", "kind", "macs_per_second", "memories"):
        if needed not in fields:
            raise InputError(f"a device needs {needed}")
    kind = fields["kind"]
    if kind not in ("cpu", "gpu", "accelerator"):
        raise InputError(f"kind is {kind!r}; it must be cpu, gpu or accelerator")
    threads = fields.get("threads")
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise InputError(f"threads is {threads!r}; it must be a whole number of at least 1")
    memories = fields["memories"]
    if not isinstance(memories, list) or not memories:
        raise InputError("memories must be a list of at least one memory")
    return Device(
        name=_text(fields["name"], "name"),
        kind=kind,
        macs_per_second=_figures(fields["macs_per_second"], "macs_per_second"),
        memories=tuple(_memory(m) for m in memories),
        threads=threads,
        operator_seconds=_figures(fields.get("operator_seconds") or {}, "operator_seconds"),
    )


def _memory(value: Any) -> Memory:
    fields = _mapping(value, "a memory", {"name", "bytes", "bytes_per_second"})
    name = _text(fields.get("name"), "the name of a memory")
    return Memory(
        name,
        _figure(fields["bytes"], f"bytes of {name}") if "bytes" in fields else None,
        _figure(fields["bytes_per_second"], f"bytes_per_second of {name}")
        if "bytes_per_second" in fields
        else None,
    )


def _figures(value: Any, where: str) -> dict[str, Figure]:
    if not isinstance(value, dict):
        raise InputError(f"{where} must be names with figures")
    return {str(name): _figure(figure, f"{where} of {name}") for name, figure in value.items()}


def _figure(value: Any, where: str) -> Figure:
    fields = _mapping(value, where, {"value", "source"})
    number = fields.get("value")
    if isinstance(number, str):  # YAML reads 2e12 as a text
        try:
            number = float(number)
        except ValueError:
            number = None
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise InputError(f"{where} has no value that is a number")
    return Figure(float(number), _text(fields.get("source"), f"the source of {where}"))


def _mapping(value: Any, what: str, allowed: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{what} must be a mapping of {', '.join(sorted(allowed))}")
    for key in value:
        if key not in allowed:
            raise InputError(f"{what} has {key!r}; it can have {', '.join(sorted(allowed))}")
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{what} is missing; it must be a text")
    return value


def _plain(figure: Figure) -> dict[str, Any]:
    return {"value": figure.value, "source": figure.source}


def _check(device: Device) -> None:
    if not device.macs_per_second:
        raise InputError("a device needs a peak rate of at least one number format")
    for dtype, figure in device.macs_per_second.items():
        if dtype not in DTYPES:
            raise InputError(f"{dtype} is no number format; there are {', '.join(DTYPES)}")
        _inside(figure, _MACS_PER_SECOND, f"macs_per_second of {dtype}")
    for runtime, figure in device.operator_seconds.items():
        _inside(figure, _SECONDS, f"operator_seconds of {runtime}")
    if all(m.bytes_per_second is None for m in device.memories):
        raise InputError("a device needs the bandwidth of at least one memory")
    nearer: Memory | None = None
    names: set[str] = set()
    for memory in device.memories:
        if memory.name in names:
            raise InputError(f"two memories are called {memory.name}")
        names.add(memory.name)
        if memory.bytes:
            _inside(memory.bytes, _BYTES, f"bytes of {memory.name}")
        if memory.bytes_per_second:
            _inside(
                memory.bytes_per_second, _BYTES_PER_SECOND, f"bytes_per_second of {memory.name}"
            )
        if nearer is not None:
            _order(nearer, memory)
        nearer = memory


def _inside(figure: Figure, limits: tuple[float, float], where: str) -> None:
    low, high = limits
    if not math.isfinite(figure.value) or not low <= figure.value <= high:
        raise InputError(
            f"{where} is {figure.value:g}, which no machine has ({low:g} to {high:g}); check its "
            "unit"
        )


def _order(nearer: Memory, farther: Memory) -> None:
    if nearer.bytes and farther.bytes and nearer.bytes.value > farther.bytes.value:
        raise InputError(
            f"{nearer.name} is larger than {farther.name}; memories go from the nearest (smallest) "
            "to the farthest"
        )
    near, far = nearer.bytes_per_second, farther.bytes_per_second
    if near and far and near.value < far.value:
        raise InputError(
            f"{nearer.name} is slower than {farther.name}; memories go from the nearest (fastest) "
            "to the farthest"
        )
