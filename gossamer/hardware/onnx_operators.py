"""The operators that ONNX Runtime really runs: fused, laid out and with their shapes.

The runtime rewrites a network before it runs it (normalisations folded, activations fused, maps
blocked by channels, quantized patterns joined), so what a network costs is said by the operators
after that. They are read from the runtime's own rewritten model, and their shapes from one call.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    ValueInfoProto,
    helper,
    load,
    numpy_helper,
)

from gossamer.core.errors import InputError, first_line

_LARGEST_WHOLE = 1 << 16  # elements of integer inputs whose values are kept

_MULTIPLY = {
    "Conv", "FusedConv", "QLinearConv", "ConvInteger", "MatMul", "FusedMatMul", "Gemm", "FusedGemm",
    "MatMulInteger", "QLinearMatMul", "QGemm", "DynamicQuantizeMatMul", "MatMulIntegerToFloat",
}  # fmt: skip


@dataclass(frozen=True)
class OnnxOperator:
    """One operator as the runtime runs it, with the shapes of one call.

    Attributes:
        name: of the node.
        kind: operator type, as "FusedConv".
        domain: whose operator it is; "com.microsoft.nchwc" for maps blocked by channels.
        shapes: of the inputs, weights included; () for one that is left out.
        dtypes: of the inputs.
        constant: which inputs are weights.
        outputs: shapes of the outputs.
        attributes: of the node, JSON values.
        macs: multiply-accumulates of the call.
        bytes: read and written by the call, each tensor once.
        node: the node itself.
        whole: values of small inputs of whole numbers (sizes, indices, zero points) by place.
    """

    name: str
    kind: str
    domain: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    constant: tuple[bool, ...]
    outputs: tuple[tuple[int, ...], ...]
    attributes: Mapping[str, Any]
    macs: int
    bytes: int
    node: NodeProto
    whole: Mapping[int, np.ndarray]

    @property
    def signature(self) -> str:
        """What the operator's time depends on; equal for equal work."""
        return json.dumps(
            [
                self.domain, self.kind, self.shapes, self.dtypes, self.constant, self.outputs,
                self.attributes,
            ],
            sort_keys=True, separators=(",", ":"),
        )  # fmt: skip

    def floats(self, name: str, default: Sequence[float]) -> list[float]:
        """An attribute of several numbers."""
        value = self.attributes.get(name)
        return [float(v) for v in value] if isinstance(value, list) else list(default)


def session(model: bytes | str, *, threads: int = 1, profile: Path | None = None) -> Any:
    """A session that runs a model as it is, without rewriting it.

    Args:
        model: the file, or its bytes.
        threads: inside an operator.
        profile: where a record of every operator's time goes, as the beginning of a file's name.
    """
    import onnxruntime

    options = _options(threads)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return onnxruntime.InferenceSession(
        model, options, providers=["CPUExecutionProvider"], enable_fallback=0
    )


def _options(threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return options


def rewritten(path: Path, *, threads: int = 1) -> ModelProto:
    """The model as ONNX Runtime rewrites it for this machine.

    Raises:
        InputError: if the file is not a model that ONNX Runtime can load.
    """
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "rewritten.onnx"
        options = _options(threads)
        options.optimized_model_filepath = str(written)
        try:
            onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
        except Exception as error:  # the runtime's errors share no class
            raise InputError(
                f"{path} cannot be loaded by ONNX Runtime: {first_line(error)}"
            ) from error
        return load(str(written))


def onnx_operators(
    path: Path, feed: Mapping[str, np.ndarray], *, threads: int = 1
) -> list[OnnxOperator]:
    """The operators of one call, in the order in which they run.

    Args:
        path: the model.
        feed: inputs of the call by name.
        threads: inside an operator, which the runtime's choices may depend on.

    Raises:
        InputError: if the model cannot be loaded, or does not take these inputs.
    """
    model = rewritten(path, threads=threads)
    values = _values(model, feed, threads)
    constant = {tensor.name for tensor in model.graph.initializer}
    return [_operator(node, values, constant) for node in model.graph.node]


def _values(
    model: ModelProto, feed: Mapping[str, np.ndarray], threads: int
) -> dict[str, np.ndarray]:
    """Every tensor of one call."""
    shown = ModelProto()
    shown.CopyFrom(model)
    known = {output.name for output in shown.graph.output}
    wanted = [n for node in shown.graph.node for n in node.output if n and n not in known]
    shown.graph.output.extend(ValueInfoProto(name=name) for name in wanted)
    try:
        runner = session(shown.SerializeToString(), threads=threads)
        names = [output.name for output in runner.get_outputs()]
        arrays = dict(zip(names, runner.run(None, dict(feed)), strict=True))
    except Exception as error:  # the runtime's errors share no class
        raise InputError(f"the model does not run on its inputs: {first_line(error)}") from error
    arrays |= feed
    arrays |= {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    return {name: value for name, value in arrays.items() if isinstance(value, np.ndarray)}


def _operator(
    node: NodeProto, values: Mapping[str, np.ndarray], constant: set[str]
) -> OnnxOperator:
    inputs = [values.get(name) for name in node.input]
    outputs = [values.get(name) for name in node.output]
    shapes = tuple(() if value is None else value.shape for value in inputs)
    its = tuple(() if value is None else value.shape for value in outputs)
    return OnnxOperator(
        name=node.name,
        kind=node.op_type,
        domain=node.domain,
        shapes=shapes,
        dtypes=tuple("" if value is None else str(value.dtype) for value in inputs),
        constant=tuple(name in constant for name in node.input),
        outputs=its,
        attributes={a.name: _plain(a) for a in sorted(node.attribute, key=lambda a: a.name)},
        macs=_macs(node.op_type, shapes, its[0] if its else ()),
        bytes=sum(value.nbytes for value in (*inputs, *outputs) if value is not None),
        node=node,
        whole={
            place: value
            for place, value in enumerate(inputs)
            if value is not None and value.dtype.kind in "iu" and value.size <= _LARGEST_WHOLE
        },
    )


def _plain(attribute: AttributeProto) -> Any:
    value = helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, int | float | str):
        return value
    if attribute.type in (AttributeProto.INTS, AttributeProto.FLOATS):
        return list(value)
    return str(value)[:200]


def _macs(kind: str, shapes: Sequence[tuple[int, ...]], output: tuple[int, ...]) -> int:
    if kind not in _MULTIPLY or not shapes:
        return 0
    quantized = kind.startswith("QLinear") or kind == "QGemm"
    if "Conv" in kind:
        # Kernels are [outputs, inputs of a group, height, width]; blocked ones are padded.
        weight = shapes[3] if quantized else shapes[1]
        return math.prod(output) * math.prod(weight[1:])
    if kind.endswith("Gemm"):
        weight = shapes[3] if quantized else shapes[1]
        return math.prod(output) * (math.prod(weight) // max(1, output[-1]))
    return math.prod(output) * shapes[0][-1] if shapes[0] else 0


def alone(operators: Sequence[OnnxOperator], versions: Mapping[str, int]) -> bytes:
    """A model in which each operator stands by itself, on inputs that the model holds.

    Args:
        operators: what is put in; the n-th is called "alone<n>".
        versions: of each domain's operators.
    """
    rng = np.random.default_rng(0)
    nodes, tensors, outputs = [], [], []
    for number, operator in enumerate(operators):
        node = NodeProto()
        node.CopyFrom(operator.node)
        node.name = f"alone{number}"
        shaped = zip(operator.shapes, operator.dtypes, strict=True)
        for place, (shape, dtype) in enumerate(shaped):
            if not dtype:
                node.input[place] = ""
                continue
            node.input[place] = f"in{number}_{place}"
            value = operator.whole.get(place)
            drawn = _drawn(rng, shape, dtype) if value is None else value
            tensors.append(numpy_helper.from_array(drawn, node.input[place]))
        for place, name in enumerate(node.output):
            if name:
                node.output[place] = f"out{number}_{place}"
                outputs.append(ValueInfoProto(name=node.output[place]))
        nodes.append(node)
    graph = GraphProto(name="alone", node=nodes, initializer=tensors, output=outputs)
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid(d, v) for d, v in versions.items()],
        ir_version=10,
    )
    return model.SerializeToString()


def _drawn(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    kind = np.dtype(dtype)
    if kind.kind == "f":
        # Positive and not small: scales, variances and divisors are among them.
        return np.asarray(0.5 + rng.random(shape), kind)
    return np.ones(shape, kind)
