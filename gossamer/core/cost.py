"""What a network costs.

Counted values (from the graph), modelled values (from a description of a device) and measured
values (from a clock or a file) never share a field, so no table can mix them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Latency:
    """Measured wall-clock time of one call, in milliseconds.

    Attributes:
        p50: median.
        p95: 95th percentile.
        batch: samples in the call.
        threads: threads the runtime was given.
        runtime: "torch", "torch-compile", "onnxruntime" or the name of a packed kernel.
        calls: timed calls after warm-up.
        spread: interquartile range divided by the median, the noise of the measurement.
    """

    p50: float
    p95: float
    batch: int
    threads: int
    runtime: str
    calls: int
    spread: float


@dataclass(frozen=True)
class Cost:
    """Costs of one network; a field is None where nobody counted or measured it.

    Attributes:
        parameters: counted, elements.
        macs: counted, dense multiply-accumulates of one sample.
        macs_effective: counted, those that remain when zero weights are skipped.
        bytes_moved: counted, weights and activations read and written once per operator, one
            sample, float32.
        activation_bytes: counted, peak of live activations, one sample, float32.
        modelled_latency_ms: modelled for a described device.
        file_bytes: measured, bytes of the deployed file.
        latency: measured.
        peak_memory_bytes: measured, growth of resident memory during inference.
        energy_joules: measured (RAPL or NVML), one call; None where it cannot be read.
    """

    parameters: int | None = None
    macs: int | None = None
    macs_effective: int | None = None
    bytes_moved: int | None = None
    activation_bytes: int | None = None
    modelled_latency_ms: float | None = None
    file_bytes: int | None = None
    latency: Latency | None = None
    peak_memory_bytes: int | None = None
    energy_joules: float | None = None
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)
