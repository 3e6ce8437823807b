"""Networks on disk: ``weights.safetensors`` beside ``network.json``.

The JSON holds the traced graph itself (operators with their arguments), so a pruned network loads
without the code that once defined it, and without running anybody's code: only ATen operators and
arithmetic on sizes are resolved, and none of them can open a file or call back.
"""

from __future__ import annotations

import contextlib
import io
import keyword
import math
import operator
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from gossamer.core.errors import InputError, UnsupportedError
from gossamer.core.files import read_json, write_json, write_tensors
from gossamer.core.graph import Graph, GraphNetwork, level_of, module_of

FORMAT = 1
GRAPH_FILE = "network.json"
WEIGHTS_FILE = "weights.safetensors"

_ARITHMETIC = {
    f.__name__: f
    for f in (
        operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv,
        operator.mod, operator.neg, operator.getitem, operator.pow, operator.eq, operator.ne,
        operator.lt, operator.le, operator.gt, operator.ge, operator.and_, operator.or_,
        math.ceil, math.floor, torch.sym_float, torch.sym_int, torch.sym_max, torch.sym_min,
        torch.sym_not,
    )
}  # fmt: skip
# The strings an operator may take choose between computations; any other string could be a path.
_HARMLESS_STRINGS = {
    "equation", "approximate", "rounding_mode", "mode", "indexing", "padding", "reduce",
    "padding_mode", "interpolation", "ord",
}  # fmt: skip
# Operators whose kernels trust their arguments: they take storages and packed buffers as they are,
# or skip the checks of indices, so a doctored file could reach memory that is not its own.
_TRUSTING = ("sparse", "fbgemm", "cudnn", "miopen", "mkldnn", "mps", "quantized", "resize", "set_")
# Private operators are skipped as a whole, but for those that traces of real networks hold.
_PRIVATE = {
    "_softmax", "_log_softmax", "_to_copy", "_unsafe_view", "_prelu_kernel", "_weight_norm",
    "_convolution", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
    "_native_multi_head_attention", "_transformer_encoder_layer_fwd", "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d", "_scaled_dot_product_flash_attention_for_cpu", "_upsample_bicubic2d_aa",
    "_upsample_bilinear2d_aa",
}  # fmt: skip
_PATH = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)
_SIZES = {"sym_size", "sym_numel", "sym_stride", "item"}
_DTYPES = {
    str(d): d
    for d in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
        torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
    )
}  # fmt: skip
_LAYOUTS = {str(torch.strided): torch.strided}
_MEMORY = {str(m): m for m in (torch.contiguous_format, torch.preserve_format, torch.channels_last)}


def save_network(
    folder: Path,
    module: nn.Module,
    example_inputs: Sequence[Any],
    about: Mapping[str, Any] | None = None,
) -> None:
    """Writes a network's graph and weights.

    Args:
        folder: gets ``network.json`` and ``weights.safetensors``, each in one rename.
        module: the network.
        example_inputs: positional arguments for tracing it.
        about: JSON values kept beside the graph (labels, preprocessing, recipe).

    Raises:
        UnsupportedError: if the network cannot be traced or has an operator that cannot be saved.
    """
    graph = Graph.trace(module, example_inputs)
    level = level_of(module)
    content = {
        "format": FORMAT,
        "about": dict(about or {}),
        "inputs": [
            {"shape": list(x.shape), "dtype": str(x.dtype)}
            for x in graph.example_inputs
            if isinstance(x, Tensor)
        ],
        "dynamic_batch": graph.dynamic,
        "tensors": {name.removeprefix(level): kind for name, kind in graph.kinds.items()},
        "nodes": [_node_to_json(node, level) for node in graph.fx.nodes],
        "outputs": _spec_to_json(graph.outputs),
    }
    # Copies of their own: safetensors refuses tensors that share memory.
    for name in graph.kinds:
        if not _PATH.fullmatch(name):
            raise UnsupportedError(f"the tensor {name!r:.80} cannot be saved under that name")
    tensors = {
        name.removeprefix(level): tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in graph.tensors.items()
    }
    write_tensors(Path(folder) / WEIGHTS_FILE, tensors)
    write_json(folder / GRAPH_FILE, content)


def load_network(folder: Path) -> tuple[GraphNetwork, tuple[Tensor, ...], dict[str, Any]]:
    """Reads what :func:`save_network` wrote.

    Returns:
        The network (in evaluation mode), example inputs of the right shapes, and ``about``.

    Raises:
        InputError: if a file is missing, truncated, doctored or of another kind.
    """
    path = Path(folder) / GRAPH_FILE
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is not a network written by gossamer")
    tensors = read_weights(Path(folder) / WEIGHTS_FILE)
    try:
        network, inputs = _restore(content, tensors)
        # A graph that fails prints where, beside raising it.
        with torch.inference_mode(), contextlib.redirect_stderr(io.StringIO()):
            network(*inputs)
    except InputError:
        raise
    except Exception as error:  # a doctored file can break a graph in any way
        raise InputError(
            f"{path} does not describe a network that runs: {_first(error)}"
        ) from error
    about = content.get("about")
    return network, inputs, dict(about) if isinstance(about, dict) else {}


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        InputError: if it is missing, truncated or not safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is not a whole safetensors file: {_first(error)}") from error


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# Writing -------------------------------------------------------------------------------------


def _node_to_json(node: fx.Node, level: str) -> dict[str, Any]:
    record: dict[str, Any] = {"name": node.name, "op": node.op}
    if node.op == "call_function":
        record["target"] = _target_to_json(node.target)
        record["module"] = module_of(node)
    elif node.op == "get_attr":
        record["target"] = str(node.target).removeprefix(level)
    if node.args:
        record["args"] = [_value_to_json(a) for a in node.args]
    if node.kwargs:
        record["kwargs"] = {k: _value_to_json(v) for k, v in node.kwargs.items()}
    return record


def _target_to_json(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        if not _harmless(target):
            raise UnsupportedError(f"the operator {target} cannot be saved")
        return str(target)
    name = getattr(target, "__name__", str(target))
    if _ARITHMETIC.get(name) is not target:
        raise UnsupportedError(f"the operator {name} cannot be saved")
    return f"arithmetic.{name}"


def _harmless(target: torch._ops.OpOverload) -> bool:
    name = target.name().removeprefix("aten::").partition(".")[0]
    schema = target._schema
    return (
        target.namespace == "aten"
        and (not name.startswith("_") or name in _PRIVATE)
        and not any(word in name for word in _TRUSTING)
        # What yields no tensor is there for its side effects: seeds, modes, lists.
        and (name in _SIZES or any("Tensor" in str(value.type) for value in schema.returns))
        and all(
            argument.name in _HARMLESS_STRINGS
            for argument in schema.arguments
            if "str" in str(argument.type).lower() and "stride" not in str(argument.type).lower()
        )
    )


def _value_to_json(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list | tuple):
        return [_value_to_json(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.dtype):
        return {"dtype": str(value)}
    if isinstance(value, torch.device):
        return {"device": "cpu"}
    if isinstance(value, torch.layout):
        return {"layout": str(value)}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value)}
    raise UnsupportedError(f"an argument of type {type(value).__name__} cannot be saved")


def _spec_to_json(spec: pytree.TreeSpec) -> Any:
    if spec.is_leaf():
        return None
    children = [_spec_to_json(child) for child in spec.children()]
    if spec.type is tuple:
        return {"tuple": children}
    if spec.type is list:
        return {"list": children}
    # A dictionary, or one of transformers' output classes: names with values.
    names = spec.context if spec.type is dict else spec.context[0]
    return {"dict": [list(map(str, names)), children]}


# Reading -------------------------------------------------------------------------------------


def _restore(
    content: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[GraphNetwork, tuple[Tensor, ...]]:
    kinds = {_plain_path(name): str(kind) for name, kind in content["tensors"].items()}
    missing = sorted(set(kinds) - set(tensors))
    if missing:
        raise InputError(f"the weights lack {missing[0]}, which {GRAPH_FILE} names")
    if not set(kinds.values()) <= {"parameter", "buffer", "constant"}:
        raise InputError(f"{GRAPH_FILE} names an unknown kind of tensor")
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for record in content["nodes"]:
        args = tuple(_value_from_json(a, nodes) for a in record.get("args", ()))
        kwargs = {
            _plain_name(k): _value_from_json(v, nodes) for k, v in record.get("kwargs", {}).items()
        }
        name, op = _plain_name(record["name"]), record["op"]
        match op:
            case "placeholder":
                default = {"default_value": False} if name == "training" else {}
                node = graph.placeholder(name, **default)
            case "get_attr":
                if record["target"] not in kinds:
                    raise InputError(
                        f"{GRAPH_FILE} reads a tensor {record['target']!r:.80} it lacks"
                    )
                node = graph.get_attr(record["target"])
            case "call_function":
                node = graph.call_function(_target_from_json(record["target"]), args, kwargs)
                path = str(record.get("module", ""))
                node.meta["nn_module_stack"] = {path: (path, "")}
            case "output":
                node = graph.output(args[0])
            case _:
                raise InputError(f"{GRAPH_FILE} has a node of the kind {op!r:.80}")
        nodes[name] = node
    graph.lint()
    held = {
        name: nn.Parameter(tensors[name], requires_grad=tensors[name].is_floating_point())
        if kind == "parameter"
        else tensors[name]
        for name, kind in kinds.items()
    }
    inputs = tuple(
        torch.zeros([_small(s) for s in record["shape"]], dtype=_DTYPES[record["dtype"]])
        for record in content["inputs"]
    )
    restored = Graph(
        graph, held, kinds, _spec_from_json(content["outputs"]),
        dynamic=bool(content["dynamic_batch"]),
        parameters=sum(t.numel() for n, t in held.items() if kinds[n] == "parameter"),
        example_inputs=inputs,
    )  # fmt: skip
    return restored.network().eval(), inputs


# A graph is turned into Python text and compiled. Names of inputs, keyword arguments and tensors
# become part of that text as they are: here they are held to be names.


def _plain_name(name: Any) -> str:
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise InputError(f"{GRAPH_FILE} has a name {name!r:.80}, which is not allowed")
    return name


def _plain_path(path: Any) -> str:
    if not isinstance(path, str) or not _PATH.fullmatch(path):
        raise InputError(f"{GRAPH_FILE} has a tensor {path!r:.80}, a name that is not allowed")
    return path


def _small(size: Any) -> int:
    if not isinstance(size, int) or not 0 < size <= 1 << 16:
        raise InputError(f"{GRAPH_FILE} describes an input of size {size!r:.40}")
    return size


def _target_from_json(name: Any) -> Any:
    kind, _, rest = str(name).partition(".")
    if kind == "arithmetic" and rest in _ARITHMETIC:
        return _ARITHMETIC[rest]
    if kind == "aten":
        packet_name, _, overload = rest.partition(".")
        packet = getattr(torch.ops.aten, packet_name, None)
        if isinstance(packet, torch._ops.OpOverloadPacket) and overload in packet.overloads():
            target = getattr(packet, overload)
            if _harmless(target):
                return target
    raise InputError(f"{GRAPH_FILE} names an operator {name!r:.80}, which is not allowed")


def _value_from_json(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_value_from_json(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "node":
            return nodes[content]
        case "float":
            return float(content)
        case "dtype":
            return _DTYPES[content]
        case "device":
            return torch.device("cpu")
        case "layout":
            return _LAYOUTS[content]
        case "memory_format":
            return _MEMORY[content]
    raise InputError(f"{GRAPH_FILE} has an argument of the kind {kind!r:.80}")


def _spec_from_json(value: Any) -> pytree.TreeSpec:
    return pytree.tree_structure(_template(value))


def _template(value: Any) -> Any:
    if value is None:
        return 0
    ((kind, content),) = value.items()
    match kind:
        case "tuple":
            return tuple(_template(v) for v in content)
        case "list":
            return [_template(v) for v in content]
        case "dict":
            return dict(zip(content[0], map(_template, content[1]), strict=True))
    raise InputError(f"{GRAPH_FILE} has an output of the kind {kind!r:.80}")
