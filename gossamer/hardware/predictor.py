"""How long a network will take on this device, told from its operators.

Three predictors, all over the operators that ONNX Runtime really runs
(:mod:`gossamer.hardware.onnx_operators`):

- :class:`LookupTable` adds up the times of single operators, each timed once by itself on this
  device and kept;
- :class:`Roofline` knows nothing but the device's description: an operator takes as long as its
  multiplications at the peak rate or its bytes at the bandwidth, and what starting it costs;
- :class:`LearnedTimes` is fitted to the table's entries, so that operators nobody has timed have a
  time at once.

None of them knows what operators cost each other (caches that one fills and the next one needs);
:func:`errors` says how far off each is on networks that were not used to make it.

Source: the table is that of Cai et al., "ProxylessNAS", ICLR 2019 (appendix B), per operator
instead of per block; the roofline is Williams et al., CACM 2009.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np

from gossamer.core.errors import InputError
from gossamer.core.files import read_json, write_json
from gossamer.hardware.calibrate import cached_place
from gossamer.hardware.device import Device
from gossamer.hardware.onnx_operators import OnnxOperator, alone, session

log = logging.getLogger(__name__)

_FORMAT = 1
_TOGETHER = 1 << 28  # bytes of operators that are timed in one model


class Predictor(Protocol):
    """Tells the time of a network from its operators."""

    def predict(self, operators: Sequence[OnnxOperator]) -> float:
        """Milliseconds of one call."""
        ...


class LookupTable:
    """Times of single operators on this device.

    Args:
        threads: of ONNX Runtime; times hold for this many.
        times: milliseconds by signature.
        path: file that grows with the table; None keeps it in memory.

    Raises:
        InputError: if the file is not a table, or one for other threads.
    """

    def __init__(
        self, *, threads: int = 1, times: Mapping[str, float] | None = None,
        path: Path | None = None,
    ) -> None:  # fmt: skip
        self.threads = threads
        self.times = dict(times or {})
        self.path = path
        if path is not None and path.is_file():
            self.times |= _read(path, threads)

    @classmethod
    def of_machine(cls, *, threads: int = 1, cache: Path | None = None) -> LookupTable:
        """The table of this machine, kept in the user's cache beside its description."""
        place = cached_place(cache, threads=threads)
        return cls(threads=threads, path=place.with_suffix(".operators.json"))

    def known(self, operators: Sequence[OnnxOperator]) -> float:
        """The share of the operators that the table has a time for."""
        known = sum(operator.signature in self.times for operator in operators)
        return known / max(1, len(operators))

    def measure(self, operators: Iterable[OnnxOperator], *, runs: int = 10) -> int:
        """Times the operators the table does not have.

        Many stand side by side in one model, whose runs the runtime's own clock records, so an
        operator's time has neither the call nor its neighbours in it. The shortest run is kept:
        entries of one table are made at different moments, and what else the machine does only
        ever adds to a time.

        Args:
            operators: some or all of one or several networks.
            runs: of each operator.

        Returns:
            How many were timed.
        """
        new = {o.signature: o for o in operators if o.signature not in self.times}
        waiting = list(new.values())
        while waiting:
            some = [waiting.pop(0)]
            total = some[0].bytes
            while waiting and total + waiting[0].bytes <= _TOGETHER:
                total += waiting[0].bytes
                some.append(waiting.pop(0))
            for operator, spent in zip(some, time_alone(some, self.threads, runs), strict=True):
                self.times[operator.signature] = spent
        if new and self.path is not None:
            try:
                write_json(self.path, {"format": _FORMAT, "threads": self.threads,
                                       "milliseconds": self.times})  # fmt: skip
            except InputError as error:  # a home that cannot be written is no reason to fail
                log.warning("%s", error)
        return len(new)

    def predict(self, operators: Sequence[OnnxOperator]) -> float:
        """Milliseconds of one call; operators without a time are timed first."""
        self.measure(operators)
        return sum(self.times[operator.signature] for operator in operators)


def time_alone(operators: Sequence[OnnxOperator], threads: int, runs: int) -> list[float]:
    """Milliseconds of each operator's shortest run by itself, by the runtime's own clock."""
    versions = _versions(operators)
    with TemporaryDirectory() as folder:
        runner = session(
            alone(operators, versions), threads=threads, profile=Path(folder) / "profile"
        )
        names = [output.name for output in runner.get_outputs()]
        for _ in range(runs + 1):
            runner.run(names, {})
        events = json.loads(Path(runner.end_profiling()).read_text())
    spent: dict[str, list[float]] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            spent.setdefault(name.removesuffix("_kernel_time"), []).append(event["dur"] / 1e3)
    # The first run touches memory for the first time.
    return [float(min(spent[f"alone{i}"][1:])) for i in range(len(operators))]


def _versions(operators: Sequence[OnnxOperator]) -> dict[str, int]:
    return {"": 20} | {o.domain: 1 for o in operators if o.domain}


def _read(path: Path, threads: int) -> dict[str, float]:
    value = read_json(path)
    try:
        if value["format"] != _FORMAT or value["threads"] != threads:
            raise InputError(f"{path} is a table of operators for another format or other threads")
        times = {str(k): float(v) for k, v in value["milliseconds"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a table of operators: {error!r}") from error
    if any(not math.isfinite(t) or t < 0 for t in times.values()):
        raise InputError(f"{path} has times that are none")
    return times


@dataclass(frozen=True)
class Roofline:
    """Times from a device's description alone.

    Attributes:
        device: peak rates, bandwidth and what starting an operator costs.
    """

    device: Device

    def predict(self, operators: Sequence[OnnxOperator]) -> float:
        """Milliseconds of one call."""
        return 1e3 * sum(self.seconds(operator) for operator in operators)

    def seconds(self, operator: OnnxOperator) -> float:
        """Of one operator: the later of its arithmetic and its traffic, and its start.

        The traffic is with the nearest memory that holds what the operator touches.
        """
        quantized = any(d in ("int8", "uint8") for d in operator.dtypes)
        dtype = "int8" if quantized and "int8" in self.device.macs_per_second else "float32"
        started = self.device.operator_seconds.get("onnxruntime")
        return max(
            operator.macs / self.device.peak(dtype),
            operator.bytes / self.device.holding(operator.bytes)[1],
        ) + (started.value if started else 0.0)


class LearnedTimes:
    """Times of operators by regression on those of a table.

    A forest of extremely randomized trees (Geurts, Ernst and Wehenkel, Machine Learning, 2006)
    predicts by how much an operator misses the device's roofline, from its sizes and its kind; so
    what is larger than everything seen is still scaled.

    Args:
        device: of the roofline.
        operators: that have a time.
        milliseconds: their times.
        seed: of the forest.

    Raises:
        InputError: if there are fewer than ten operators.
    """

    def __init__(
        self, device: Device, operators: Sequence[OnnxOperator], milliseconds: Sequence[float],
        *, seed: int = 0,
    ) -> None:  # fmt: skip
        from sklearn.ensemble import ExtraTreesRegressor

        if len(operators) < 10 or len(operators) != len(milliseconds):
            raise InputError(
                f"learning times needs ten operators or more with one time each, not "
                f"{len(operators)} and {len(milliseconds)}"
            )
        self.roofline = Roofline(device)
        self.kinds = sorted({f"{o.domain}:{o.kind}" for o in operators})
        self._forest = ExtraTreesRegressor(
            n_estimators=100, min_samples_leaf=2, random_state=seed, n_jobs=1
        )
        ideal = np.array([1e3 * self.roofline.seconds(o) for o in operators])
        # Below a microsecond the runtime's clock has one tick.
        missed = np.log(np.maximum(np.asarray(milliseconds), 5e-4) / ideal)
        self._forest.fit(self._features(operators), missed)

    def _features(self, operators: Sequence[OnnxOperator]) -> np.ndarray:
        return np.array([[*_sizes(o), *self._kind(o)] for o in operators], np.float64)

    def _kind(self, operator: OnnxOperator) -> list[float]:
        own = f"{operator.domain}:{operator.kind}"
        return [float(own == kind) for kind in self.kinds]

    def predict(self, operators: Sequence[OnnxOperator]) -> float:
        """Milliseconds of one call."""
        if not operators:
            return 0.0
        ideal = np.array([1e3 * self.roofline.seconds(o) for o in operators])
        return float((ideal * np.exp(self._forest.predict(self._features(operators)))).sum())


def _sizes(operator: OnnxOperator) -> list[float]:
    """Numbers a time may depend on: work, traffic, channels, positions, taps, groups, stride."""
    weight = operator.shapes[1] if len(operator.shapes) > 1 else ()
    out = operator.outputs[0] if operator.outputs else ()
    kernel = operator.floats("kernel_shape", (1.0,))
    strides = operator.floats("strides", (1.0,))
    channels = out[1] if len(out) == 4 else out[-1] if out else 1
    numbers = (
        operator.macs,
        operator.bytes,
        operator.macs / max(1, operator.bytes),
        math.prod(out),
        channels,
        math.prod(out) / max(1, channels),
        weight[1] if len(weight) == 4 else weight[0] if weight else 0,
        math.prod(kernel),
        float(operator.attributes.get("group", 1)),
    )
    return [*(math.log1p(float(n)) for n in numbers), strides[0]]


@dataclass(frozen=True)
class PredictionError:
    """How far a predictor is off, over networks.

    Attributes:
        mape: mean absolute error relative to the measured time, percent.
        bias: mean signed error relative to the measured time, percent.
        kendall: rank correlation (tau-b) of predicted and measured times.
        networks: how many.
    """

    mape: float
    bias: float
    kendall: float
    networks: int


def errors(predicted: Sequence[float], measured: Sequence[float]) -> PredictionError:
    """How far predicted times are from measured ones.

    Args:
        predicted: one for each network, in any unit.
        measured: in the same unit, above 0.

    Raises:
        InputError: if there are not two networks or more with both.
    """
    from scipy.stats import kendalltau

    if len(predicted) != len(measured) or len(measured) < 2 or min(measured) <= 0:
        raise InputError("errors need two networks or more, with a predicted and a measured time")
    relative = np.asarray(predicted) / np.asarray(measured) - 1.0
    tau: Any = kendalltau(predicted, measured)
    return PredictionError(
        mape=100.0 * float(np.abs(relative).mean()),
        bias=100.0 * float(relative.mean()),
        kendall=float(tau.statistic),
        networks=len(measured),
    )
