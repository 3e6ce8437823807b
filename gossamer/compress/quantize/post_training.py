"""Post-training int8: integer weights and activations without training, run by ONNX Runtime.

The network is exported with batch normalisation folded, a few batches of training data show the
range of every activation, and ONNX Runtime's quantizer writes a graph of quantize/dequantize
pairs that its kernels fuse into integer convolutions and matrix products. Activations are
asymmetric uint8, weights symmetric int8 with one scale an output channel: the pair that x86
kernels are written for (signed activations fall back to code several times slower than float).

Sources: Jacob et al., "Quantization and training of neural networks for efficient
integer-arithmetic-only inference", arXiv:1712.05877; per-channel weights: Krishnamoorthi,
arXiv:1806.08342, section 3.1.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gossamer.core.errors import GossamerError, InputError, UnsupportedError
from gossamer.core.export import (
    METADATA_KEY,
    OnnxRunner,
    shorten_names,
    strip,
    write_onnx,
)
from gossamer.core.network import Network
from gossamer.core.task import Task
from gossamer.hardware.measure import Comparison, compare, measure

Calibration = Literal["minmax", "entropy", "percentile"]
"""How ranges are read off the calibration batches: their extremes, the range that loses least
information, or the 99.999th percentile of magnitudes."""


def int8(
    network: Network,
    task: Task,
    *,
    calibration: Calibration = "minmax",
    samples: int = 512,
    batch_size: int = 64,
    per_channel: bool = True,
    symmetric_activations: bool = False,
    reduce_range: bool = False,
    format: Literal["qdq", "qoperator"] = "qdq",
    skip_operators: Collection[str] = (),
) -> Network:
    """Quantizes weights and activations to 8 bits (a step of a recipe; the last one).

    The result's ``write_onnx`` writes the integer file. Its module stays the float network, from
    which any later step starts again; what is deployed and measured is the file.

    Args:
        network: unchanged.
        task: its training split gives the calibration samples (without augmentation).
        calibration: how ranges are read off.
        samples: calibration samples, taken evenly over the training split.
        batch_size: samples a calibration batch.
        per_channel: one weight scale for each output channel, else one a tensor.
        symmetric_activations: signed activations around zero (for accelerators that need them;
            slow on x86).
        reduce_range: 7-bit weights, for processors without VNNI, whose int16 sums can overflow.
        format: "qdq" or ONNX Runtime's older "qoperator", which is a little smaller.
        skip_operators: ONNX operator types that stay float, as "Gemm".

    Returns:
        The network with an integer file; the report has its bytes and those of the float file,
        and the validation scores of both in ONNX Runtime.

    Raises:
        UnsupportedError: if the network cannot be exported or quantized.
        InputError: if there are no calibration samples.
    """
    if samples < 1 or batch_size < 1:
        raise InputError("calibration needs at least one sample and a batch size of at least 1")
    with tempfile.TemporaryDirectory() as folder:
        floating = Path(folder) / "float.onnx"
        # The float file of this module: a file that an earlier step prepared is not quantized.
        write_onnx(Network(network.module, network.example_inputs), floating)
        quantized = _quantized(
            floating,
            _calibration_inputs(task, samples, batch_size),
            folder=Path(folder),
            calibration=calibration,
            per_channel=per_channel,
            symmetric_activations=symmetric_activations,
            reduce_range=reduce_range,
            format=format,
            skip_operators=skip_operators,
        )
        report = {
            "float_bytes": floating.stat().st_size,
            "int8_bytes": len(quantized),
            "float_score": task.score(OnnxRunner(floating), "validation"),
            "int8_score": task.score(OnnxRunner(quantized), "validation"),
        }
    return network.after(
        "int8",
        {
            "calibration": calibration,
            "samples": samples,
            "batch_size": batch_size,
            "per_channel": per_channel,
            "symmetric_activations": symmetric_activations,
            "reduce_range": reduce_range,
            "format": format,
            "skip_operators": sorted(skip_operators),
        },
        report,
        storage={**network.storage, **_storage(network, quantized, per_channel)},
        runtime="onnxruntime",
        write_onnx=_Writer(quantized),
        packed=None,
    )


@dataclass(frozen=True)
class _Writer:
    """Writes the integer file it holds."""

    data: bytes

    def __call__(self, path: Path) -> None:
        Path(path).write_bytes(self.data)

    def __repr__(self) -> str:
        return f"int8 file of {len(self.data)} bytes"


def _calibration_inputs(task: Task, samples: int, batch_size: int) -> list[tuple[Any, ...]]:
    """Batches at even distances over the training split, in stored order and without augmentation.

    A stored order may be sorted by class, so the first batches alone would show one class.
    """
    available = task.size("train")
    if available == 0:
        raise InputError(f"{task.name} has no training samples to calibrate int8 with")
    # Small batches from many places rather than few large ones.
    chunk = max(1, min(batch_size, available // 16))
    # Whole batches only: the histograms of entropy and percentile need batches of one size.
    batches = available // chunk
    wanted = max(1, min(batches, -(-samples // chunk)))
    chosen = np.unique(np.linspace(0, batches - 1, wanted).round().astype(int))
    result = []
    for start in chosen:
        stream = task.batches("train", batch_size=chunk, start=int(start), shuffle=False)
        result.append(task.inputs(next(iter(stream))))
    return result


def _quantized(
    floating: Path,
    inputs: Sequence[tuple[Any, ...]],
    *,
    folder: Path,
    calibration: Calibration,
    per_channel: bool,
    symmetric_activations: bool,
    reduce_range: bool,
    format: Literal["qdq", "qoperator"],
    skip_operators: Collection[str],
) -> bytes:
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    methods = {
        "minmax": CalibrationMethod.MinMax,
        "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }
    formats = {"qdq": QuantFormat.QDQ, "qoperator": QuantFormat.QOperator}
    if calibration not in methods or format not in formats:
        raise InputError(
            f"int8 knows the calibrations {', '.join(methods)} and the formats "
            f"{', '.join(formats)}, not {calibration} and {format}"
        )
    runner = OnnxRunner(floating)

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = iter([runner.feed(*batch) for batch in inputs])

        def get_next(self) -> Any:
            return next(self.feeds, None)

    ready, result = folder / "ready.onnx", folder / "int8.onnx"
    with _quiet():
        try:
            quant_pre_process(floating, ready, skip_symbolic_shape=True)
            kinds = sorted({node.op_type for node in onnx.load(ready).graph.node})
            quantize_static(
                ready,
                result,
                Reader(),
                quant_format=formats[format],
                op_types_to_quantize=[kind for kind in kinds if kind not in skip_operators],
                per_channel=per_channel,
                reduce_range=reduce_range,
                activation_type=QuantType.QInt8 if symmetric_activations else QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=methods[calibration],
                extra_options={"ActivationSymmetric": symmetric_activations},
            )
        except GossamerError:
            raise
        except Exception as error:  # the quantizer's errors share no class
            text = str(error).strip().splitlines()
            raise UnsupportedError(
                "ONNX Runtime cannot quantize this network to int8: "
                f"{text[0] if text else type(error).__name__}"
            ) from error
    model = onnx.load(result)
    original = {entry.key: entry.value for entry in onnx.load(floating).metadata_props}
    if METADATA_KEY in original and METADATA_KEY not in {e.key for e in model.metadata_props}:
        entry = model.metadata_props.add()
        entry.key, entry.value = METADATA_KEY, original[METADATA_KEY]
    strip(model)
    shorten_names(model)
    return model.SerializeToString()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # The quantizer logs its advice on the root logger.
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _storage(network: Network, quantized: bytes, per_channel: bool) -> dict[str, str]:
    """Format of each weight matrix or kernel that the file holds as int8, by shape and size.

    The exporter folds and renames, so tensors are matched by their number of elements.
    """
    import onnx

    model = onnx.ModelProto.FromString(quantized)
    sizes = [
        int(np.prod(tensor.dims))
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1
    ]
    kind = "int8/channel" if per_channel else "int8/tensor"
    storage = {}
    for name, parameter in network.module.named_parameters():
        if parameter.ndim > 1 and parameter.numel() in sizes:
            sizes.remove(parameter.numel())
            storage[name] = kind
    return storage


@dataclass(frozen=True)
class Payoff:
    """Whether a step made the deployed network better on this machine.

    Attributes:
        speed: time before over time after, with its spread.
        bytes_ratio: deployed bytes after over before.
        score_before: validation score of the deployed file before.
        score_after: and after.
        pays: see :func:`pays`.
    """

    speed: Comparison
    bytes_ratio: float
    score_before: float
    score_after: float
    pays: bool

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


def pays(
    before: Network,
    after: Network,
    task: Task,
    *,
    batch_size: int = 64,
    threads: int = 1,
    max_drop: float = 1.0,
    need_speed: bool = True,
    rounds: int = 20,
) -> Payoff:
    """Measures whether a step is worth keeping (for a planner).

    It pays if the validation score falls by at most ``max_drop`` and the file is smaller, and,
    where speed is asked for, the file is measured faster beyond the noise.

    Args:
        before: without the step.
        after: with it.
        task: its validation split is scored.
        batch_size: of the timed call.
        threads: of ONNX Runtime.
        max_drop: points of the score that may be lost.
        need_speed: whether it has to be faster too; otherwise it must only not be slower.
        rounds: of the measurement.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = {"before": Path(folder) / "before.onnx", "after": Path(folder) / "after.onnx"}
        write_onnx(before, files["before"])
        write_onnx(after, files["after"])
        first, second = measure(
            files,
            before.example_inputs,
            batch_sizes=(batch_size,),
            threads=(threads,),
            rounds=rounds,
        )
        ratio = files["after"].stat().st_size / files["before"].stat().st_size
        scores = [task.score(OnnxRunner(path), "validation") for path in files.values()]
    speed = compare(first, second)
    fast_enough = speed.winner == "after" if need_speed else speed.winner != "before"
    good = scores[0] - scores[1] <= max_drop
    return Payoff(speed, ratio, scores[0], scores[1], bool(fast_enough and good and ratio < 1.0))
