"""Deployed files: ONNX with a free batch size, ``.pt2``, and the runtime that checks them.

A file is what a user deploys, so it carries what the user needs (preprocessing and class names, as
JSON in the model's metadata) and nothing else: the exporter's traces of source code are removed.
``.pt2`` files are written for users and never read here, since loading one can run code.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from gossamer.core.errors import InputError, UnsupportedError
from gossamer.core.files import whole_file
from gossamer.core.network import Network
from gossamer.core.task import device_of

if TYPE_CHECKING:
    import onnx

log = logging.getLogger(__name__)

METADATA_KEY = "gossamer"
"""Under this key the ONNX metadata hold one JSON object."""


def export_program(
    module: nn.Module, example_inputs: Sequence[Any], *, dynamic_batch: bool = True
) -> torch.export.ExportedProgram:
    """Traces ``module`` in evaluation mode on the CPU.

    Args:
        module: unchanged (a copy is traced if it lives on another device).
        example_inputs: positional arguments, batch first, batch at least 2.
        dynamic_batch: leave the first axis of every input free.

    Raises:
        UnsupportedError: if it cannot be traced, or not with a free batch; the sentence names the
            reason and the source line.
    """
    inputs = pytree.tree_map(_on_cpu, tuple(example_inputs))
    if device_of(module).type != "cpu":
        module = copy.deepcopy(module).cpu()
    free = torch.export.Dim.AUTO
    shapes = pytree.tree_map(
        lambda x: {0: free} if isinstance(x, Tensor) and x.ndim else None, inputs
    )
    name = type(module).__name__
    with _evaluation_mode(module), torch.no_grad(), _quiet():
        try:
            program = torch.export.export(
                module, inputs, dynamic_shapes=shapes if dynamic_batch else None, strict=False
            )
        except Exception as error:  # the tracer raises nearly every kind there is
            raise UnsupportedError(
                f"{name} cannot be traced: {_first_line(error)}{_user_line(error)}"
            ) from error
    if dynamic_batch and not _batch_is_free(program):
        raise UnsupportedError(
            f"{name} fixes its batch size when it is traced, so no file with a free batch can be "
            "written; look for a view or reshape with the batch size as a number"
        )
    return program


def onnx_model(
    module: nn.Module,
    example_inputs: Sequence[Any],
    *,
    dynamic_batch: bool = True,
    metadata: Mapping[str, Any] | None = None,
) -> onnx.ModelProto:
    """Exports ``module`` (batch normalisation folded where it follows a convolution).

    Args:
        module: unchanged.
        example_inputs: positional arguments, batch first, batch at least 2.
        dynamic_batch: leave the batch size free.
        metadata: JSON values to be carried by the file (preprocessing, labels).

    Returns:
        The model. A single input is called "input", a single output "output".

    Raises:
        UnsupportedError: if it cannot be traced, or an operator has no ONNX form; the sentence
            names the operator and the source line.
    """
    import onnx

    program = export_program(module, example_inputs, dynamic_batch=dynamic_batch)
    with _quiet():
        try:
            exported = torch.onnx.export(
                program, (), dynamo=True, external_data=False, verbose=False
            )
        except Exception as error:
            reason = _onnx_reason(error)
            raise UnsupportedError(
                f"{type(module).__name__} cannot be exported to ONNX: {reason}"
            ) from error
    assert exported is not None
    model = onnx.ModelProto.FromString(exported.model_proto.SerializeToString())
    strip(model)
    _name_ends(model)
    if metadata is not None:
        set_metadata(model, metadata)
    return model


def write_onnx(network: Network, path: Path, *, metadata: Mapping[str, Any] | None = None) -> None:
    """Writes the deployed ONNX file of ``network`` in one rename.

    Args:
        network: its own ``write_onnx`` is used where it has one.
        path: the file.
        metadata: JSON values carried by the file.

    Raises:
        UnsupportedError: as :func:`onnx_model`.
        InputError: if the file cannot be written.
    """
    import onnx

    if network.write_onnx is None:
        model = onnx_model(network.module, network.example_inputs, metadata=metadata)
        with whole_file(Path(path)) as partial:
            partial.write_bytes(model.SerializeToString())
        return
    with whole_file(Path(path)) as partial:
        network.write_onnx(partial)
        if metadata is not None:
            model = onnx.load(partial)
            set_metadata(model, metadata)
            partial.write_bytes(model.SerializeToString())


def write_pt2(network: Network, path: Path) -> None:
    """Writes the module as a ``.pt2`` file with a free batch size, in one rename.

    Raises:
        UnsupportedError: if it cannot be traced.
        InputError: if the file cannot be written.
    """
    program = export_program(network.module, network.example_inputs)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    with whole_file(Path(path)) as partial:
        partial.write_bytes(buffer.getvalue())


def set_metadata(model: onnx.ModelProto, metadata: Mapping[str, Any]) -> None:
    """Puts ``metadata`` (JSON values) into the model, in place of what was there."""
    kept = [entry for entry in model.metadata_props if entry.key != METADATA_KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, json.dumps(dict(metadata), sort_keys=True)


def strip(model: onnx.ModelProto) -> None:
    """Removes what no runtime reads: traces of source code, notes, shapes of inner tensors."""
    graph = model.graph
    del graph.value_info[:]
    model.doc_string = graph.doc_string = ""
    kept = [entry for entry in model.metadata_props if entry.key == METADATA_KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    del graph.metadata_props[:]
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]


def shorten_names(model: onnx.ModelProto) -> None:
    """Numbers the inner tensors and drops node names; inputs and outputs keep theirs.

    A quantized graph has a scale, a zero point and two nodes for each tensor, each with a name
    made of the tensor's: in a small network they are a tenth of the file.
    """
    graph = model.graph
    if any(attribute.HasField("g") for node in graph.node for attribute in node.attribute):
        return  # inner graphs may refer to outer names
    fixed = {value.name for value in (*graph.input, *graph.output)} | {""}
    short: dict[str, str] = {}

    def of(name: str) -> str:
        if name in fixed:
            return name
        if name not in short:
            number = len(short)
            short[name] = _letters(number)
            while short[name] in fixed:
                short[name] += "_"
        return short[name]

    for initializer in graph.initializer:
        initializer.name = of(initializer.name)
    for node in graph.node:
        node.name = ""
        node.input[:] = [of(name) for name in node.input]
        node.output[:] = [of(name) for name in node.output]
    del graph.value_info[:]


def _letters(number: int) -> str:
    alphabet = "abcdefghijklmnopqrstuvwxyz0123456789"
    text = alphabet[number % 26]
    number //= 26
    while number:
        text += alphabet[number % 36]
        number //= 36
    return text


class OnnxRunner:
    """An ONNX file as a function of tensors, so that a task can score it.

    Args:
        model: the file, or its bytes.
        threads: threads inside an operator; None leaves it to the runtime.

    Raises:
        InputError: if it is not a model that ONNX Runtime can load.
    """

    def __init__(self, model: Path | str | bytes, *, threads: int | None = 1) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised, not printed
        options.inter_op_num_threads = 1
        if threads is not None:
            options.intra_op_num_threads = threads
        source: str | bytes = model if isinstance(model, bytes) else str(model)
        what = "these bytes" if isinstance(model, bytes) else str(model)
        try:
            # Its fallback prints the error and tries the same provider again.
            self.session = onnxruntime.InferenceSession(
                source, options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
            self.names = [value.name for value in self.session.get_inputs()]
        except Exception as error:  # the runtime's errors share no class
            raise InputError(
                f"{what} cannot be loaded by ONNX Runtime: {_first_line(error)}"
            ) from error

    def feed(self, *inputs: Any) -> dict[str, np.ndarray]:
        """Inputs by name as arrays, in the order of the model's inputs.

        Raises:
            InputError: if there are more or fewer than the model takes.
        """
        flat = [x for x in pytree.tree_leaves(inputs) if x is not None]
        if len(flat) != len(self.names):
            raise InputError(f"the model takes {len(self.names)} inputs, not {len(flat)}")
        return {
            name: np.ascontiguousarray(x.detach().cpu().numpy() if isinstance(x, Tensor) else x)
            for name, x in zip(self.names, flat, strict=True)
        }

    def __call__(self, *inputs: Any) -> Any:
        """Outputs as CPU tensors: one tensor, or a tuple if there are several.

        Raises:
            InputError: if the inputs do not fit the model.
        """
        try:
            results = self.session.run(None, self.feed(*inputs))
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"ONNX Runtime refused the inputs: {_first_line(error)}") from error
        outputs = tuple(torch.from_numpy(np.asarray(result)) for result in results)
        return outputs[0] if len(outputs) == 1 else outputs

    def metadata(self) -> dict[str, Any]:
        """What :func:`set_metadata` put into the file; empty if there is nothing.

        Raises:
            InputError: if the record is damaged.
        """
        try:
            text = self.session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
            if text is None:
                return {}
            value = json.loads(text)
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
            raise InputError("the model's metadata are not valid JSON") from error
        if not isinstance(value, dict):
            raise InputError("the model's metadata are not a JSON object")
        return value


def largest_difference(
    module: nn.Module, runner: OnnxRunner, example_inputs: Sequence[Any], *, seed: int = 0
) -> float:
    """Largest difference between a module and its exported file, relative to the outputs' scale.

    Both compute the example, and random normal inputs of batch 1 and 3 where all inputs are
    floating-point: an export that froze the batch size or an example's values is found out.

    Args:
        module: run in evaluation mode on the CPU.
        runner: its file.
        example_inputs: positional arguments.
        seed: of the random inputs.

    Returns:
        ``max |a - b| / max(1, max |a|)`` over all outputs.
    """
    inputs = pytree.tree_map(_on_cpu, tuple(example_inputs))
    cases = [inputs]
    leaves = pytree.tree_leaves(inputs)
    if all(isinstance(x, Tensor) and x.is_floating_point() and x.ndim for x in leaves):
        generator = torch.Generator().manual_seed(seed)
        for batch in (1, 3):
            cases.append(
                pytree.tree_map(
                    lambda x, n=batch: torch.randn(n, *x.shape[1:], generator=generator), inputs
                )
            )
    if device_of(module).type != "cpu":
        module = copy.deepcopy(module).cpu()
    worst = 0.0
    with _evaluation_mode(module), torch.no_grad():
        for case in cases:
            expected = [x for x in pytree.tree_leaves(_plain(module(*case))) if x is not None]
            got = pytree.tree_leaves(runner(*case))
            if len(expected) != len(got):
                return float("inf")
            for a, b in zip(expected, got, strict=True):
                if a.shape != b.shape:
                    return float("inf")
                scale = max(1.0, float(a.abs().max())) if a.numel() else 1.0
                gap = float((a.double() - b.double()).abs().max()) / scale if a.numel() else 0.0
                # NaN compares false with everything; it must not look like agreement.
                worst = max(worst, gap) if gap == gap else float("inf")
    return worst


def _plain(outputs: Any) -> Any:
    # transformers' outputs are ordered dictionaries that need not be registered with pytree.
    return list(outputs.values()) if isinstance(outputs, Mapping) else outputs


def _on_cpu(x: Any) -> Any:
    return x.detach().cpu() if isinstance(x, Tensor) else x


@contextlib.contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    # core.task.evaluating runs in inference mode, whose tensors a tracer must not keep.
    modes = [(part, part.training) for part in module.modules()]
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what torch's exporters print and warn about; their errors still raise."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    loggers.append(logging.getLogger("torch.fx.experimental.symbolic_shapes"))
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        # The tracer prints the graph so far to stderr when it meets a branch on data.
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _batch_is_free(program: torch.export.ExportedProgram) -> bool:
    names = set(program.graph_signature.user_inputs)
    shapes = [
        node.meta["val"].shape
        for node in program.graph.nodes
        if node.op == "placeholder"
        and node.name in names
        and isinstance(node.meta.get("val"), Tensor)
    ]
    # A size that the trace has pinned is still a SymInt, whose expression is a number.
    return all(
        isinstance(shape[0], torch.SymInt) and not shape[0].node.expr.is_number
        for shape in shapes
        if len(shape)
    )


def _name_ends(model: onnx.ModelProto) -> None:
    """Calls a lone input "input", a lone output "output" and the free axis "batch"."""
    graph = model.graph
    renamed: dict[str, str] = {}
    for values, name in ((graph.input, "input"), (graph.output, "output")):
        taken = {tensor for node in graph.node for tensor in (*node.input, *node.output)}
        taken |= {initializer.name for initializer in graph.initializer}
        if len(values) == 1 and values[0].name != name and name not in taken:
            renamed[values[0].name] = name
            values[0].name = name
    for node in graph.node:
        node.input[:] = [renamed.get(tensor, tensor) for tensor in node.input]
        node.output[:] = [renamed.get(tensor, tensor) for tensor in node.output]
    symbols = [
        value.type.tensor_type.shape.dim[0].dim_param
        for value in graph.input
        if len(value.type.tensor_type.shape.dim)
    ]
    for value in (*graph.input, *graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param and dimension.dim_param in symbols:
                dimension.dim_param = "batch"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def _user_line(error: BaseException) -> str:
    """The innermost source line outside of torch, in words."""
    root = str(Path(torch.__file__).parent)
    ours = __file__
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((root, "<")) and frame.filename != ours
    ]
    if not frames:
        return ""
    last = frames[-1]
    return f", at {last.filename}:{last.lineno}: {(last.line or '').strip()}"


def _onnx_reason(error: BaseException) -> str:
    """Operator and source line of a failed translation, as far as the exporter tells."""
    cause: BaseException | None = error
    text, where = _first_line(error), ""
    while cause is not None:
        match = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", str(cause))
        if match:
            text = f"operator {match.group(1)} has no ONNX form"
        # The exporter's message names its own node; the frame that raised still holds it, with
        # the line of the user's code that made it.
        step = cause.__traceback__
        while step is not None:
            node = step.tb_frame.f_locals.get("node")
            if isinstance(node, fx.Node) and node.meta.get("stack_trace"):
                where = _trace_line(node.meta["stack_trace"])
            step = step.tb_next
        cause = cause.__cause__
    return text + where


def _trace_line(stack_trace: str) -> str:
    places = re.findall(r'File "([^"]+)", line (\d+), in \S+\n\s*(.*)', stack_trace)
    root = str(Path(torch.__file__).parent)
    places = [place for place in places if not place[0].startswith(root)] or places
    if not places:
        return ""
    file, line, code = places[-1]
    return f", at {file}:{line}: {code.strip()}"
