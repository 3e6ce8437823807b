"""Packed networks: one file in which every tensor is stored by a codec of its own.

The file is safetensors; its size is that of the stored arrays plus a header of names and shapes.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, fx, nn

from gossamer.core.errors import InputError
from gossamer.core.files import write_tensors
from gossamer.core.graph import Graph, GraphNetwork, level_of
from gossamer.parts.padding import padded, pair
from gossamer.parts.stored import Kernel, Stored

CODECS: dict[str, str] = {
    "uniform": "gossamer.parts.grids:QTensor",
    "sparse": "gossamer.parts.sparse:SparseTensor",
    "seeded": "gossamer.parts.seeded:SeededTensor",
    "binary": "gossamer.parts.binary_kernels:BinaryTensor",
    "fixed-point": "gossamer.parts.fixed_point:FixedPointTensor",
    "codebook": "gossamer.parts.codebook:CodebookTensor",
    "scaled": "gossamer.parts.scaled:ScaledTensor",
}
"""Where the class of each codec lives; imported when a file uses it."""


@dataclass(frozen=True)
class PackedNetwork:
    """A network's state as it is stored: encoded tensors, the rest as it is, and ties.

    Names are those that the original modules gave.

    Attributes:
        tensors: encoded tensors by name.
        plain: everything else (batch-norm statistics, skipped parameters) by name.
        ties: names that share another name's tensor.
        about: JSON values kept in the file's header.
    """

    tensors: Mapping[str, Stored]
    plain: Mapping[str, Tensor]
    ties: Mapping[str, str]
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, network: nn.Module, tensors: Mapping[str, Stored]) -> PackedNetwork:
        """The state of a network of which some tensors are encoded.

        Args:
            network: its other tensors are kept as they are.
            tensors: by the names of ``network.state_dict()``.

        Raises:
            InputError: if the network has no tensor of a name.
        """
        level = level_of(network)
        state = network.state_dict()
        for name in tensors:
            if name not in state:
                raise InputError(f"the network has no tensor {name}")
        first = {id(p): name for name, p in network.named_parameters()}
        ties = {
            name: first[id(p)]
            for name, p in network.named_parameters(remove_duplicate=False)
            if first[id(p)] != name
        }
        plain = {
            name: tensor.detach().cpu().clone()
            for name, tensor in state.items()
            if name not in tensors and name not in ties
        }
        return cls(
            {name.removeprefix(level): stored for name, stored in tensors.items()},
            {name.removeprefix(level): tensor for name, tensor in plain.items()},
            {a.removeprefix(level): b.removeprefix(level) for a, b in ties.items()},
        )

    def nbytes(self) -> int:
        """Bytes of the encoded tensors."""
        return sum(stored.nbytes() for stored in self.tensors.values())

    def plain_nbytes(self) -> int:
        """Bytes of what is stored as it is."""
        return sum(t.numel() * t.element_size() for t in self.plain.values())

    def state_dict(self) -> dict[str, Tensor]:
        """The decoded state."""
        state = {name: stored.decode() for name, stored in self.tensors.items()}
        state |= dict(self.plain)
        return state | {name: state[other] for name, other in self.ties.items()}

    def load_into(self, network: nn.Module) -> None:
        """Puts the decoded state into ``network``.

        Raises:
            InputError: at the first name or shape that does not fit.
        """
        level = level_of(network)
        own = network.state_dict()
        state = {level + name: tensor for name, tensor in self.state_dict().items()}
        for name in [*own, *state]:
            if name not in state or name not in own:
                where = "packed file" if name not in state else "network"
                raise InputError(f"the {where} has no tensor {name}")
            if own[name].shape != state[name].shape:
                raise InputError(
                    f"{name} has shape {tuple(own[name].shape)} in the network and "
                    f"{tuple(state[name].shape)} in the packed file"
                )
        network.load_state_dict(state)

    def runner(self, network: nn.Module, example_inputs: Sequence[Tensor]) -> nn.Module:
        """The network as it runs from its packed form.

        Tensors with a kernel stay packed in memory; the others are decoded once.

        Args:
            network: for its structure; unchanged. Its tensors have the names of this file.
            example_inputs: for tracing it.

        Raises:
            InputError: if a tensor of the network is missing here or has another shape.
        """
        graph = Graph.trace(network, example_inputs)
        level = level_of(network)
        # A network that runs a graph cannot tell which of its buffers the original's state had.
        whole = not isinstance(network, GraphNetwork)
        needed = network.state_dict().keys() if whole else dict(network.named_parameters()).keys()
        # Not copied: what has a kernel need not become float, and the rest is replaced.
        shared = {id(tensor): tensor for tensor in graph.tensors.values()}
        made = copy.deepcopy(graph.network(), shared).eval()
        program = made.program
        kernels: dict[str, Kernel] = {}
        for name, tensor in graph.tensors.items():
            own = self._name_of(name, level)
            stored = self.tensors.get(own)
            kernel = stored.kernel() if stored is not None else None
            if stored is not None and kernel is not None and stored.shape == tensor.shape:
                kernels[name] = kernel
            elif stored is not None or own in self.plain:
                self._decode_into(program, name, own)
            elif name in needed:
                raise InputError(f"the packed file has no tensor {own}")
            else:
                # A constant of the trace, or a buffer that no state has (a mask, frequencies).
                _place(program, name, tensor.clone())
        for name, kernel in kernels.items():
            _use(program, name, kernel)
            if any(n.op == "get_attr" and n.target == name for n in program.graph.nodes):
                self._decode_into(program, name, self._name_of(name, level))
        for node in list(program.graph.nodes):
            call = program.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(call, _Call):
                call.kernel = call.kernel.settle(program, node)
        program.graph.eliminate_dead_code()
        program.graph.lint()
        program.recompile()
        program.delete_all_unused_submodules()
        return made

    def _name_of(self, name: str, level: str) -> str:
        """What a tensor of a traced network is called here."""
        own = name.removeprefix(level)
        return self.ties.get(own, own)

    def _decode_into(self, program: nn.Module, name: str, own: str) -> None:
        """Gives a traced network a tensor that is float in memory."""
        value = self.tensors[own].decode() if own in self.tensors else self.plain[own].clone()
        tensor = _tensor(program, name)
        if value.shape != tensor.shape:
            raise InputError(
                f"{own} has shape {tuple(tensor.shape)} in the network and "
                f"{tuple(value.shape)} in the packed file"
            )
        _place(program, name, value.to(tensor.dtype))

    def save(self, path: Path) -> None:
        """Writes one safetensors file, in one rename.

        The file is :meth:`nbytes` + :meth:`plain_nbytes` + a header of names and shapes.
        """
        tensors: dict[str, Tensor] = {}
        records: dict[str, Any] = {}
        for i, (name, stored) in enumerate(self.tensors.items()):
            for key, array in stored.arrays().items():
                tensors[f"{i}.{key}"] = array.detach().cpu().contiguous().clone()
            records[name] = [stored.codec, stored.record()]
        for name, tensor in self.plain.items():
            tensors[f"={name}"] = tensor.detach().cpu().contiguous().clone()
        header = {"tensors": records, "ties": dict(self.ties)}
        if self.about:
            header["about"] = dict(self.about)
        write_tensors(Path(path), tensors, {"gossamer": json.dumps(header, separators=(",", ":"))})

    @classmethod
    def load(cls, path: Path) -> PackedNetwork:
        """Reads what :meth:`save` wrote.

        Raises:
            InputError: if the file is missing, truncated, damaged or of another kind.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["gossamer"])
                held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            tensors = {}
            for i, (name, (codec, record)) in enumerate(header["tensors"].items()):
                prefix = f"{i}."
                arrays = {
                    k.removeprefix(prefix): t for k, t in held.items() if k.startswith(prefix)
                }
                tensors[str(name)] = _codec(codec).restore(record, arrays)
            plain = {name[1:]: t for name, t in held.items() if name.startswith("=")}
            ties = {str(name): str(other) for name, other in header["ties"].items()}
            about = dict(header.get("about", {}))
            unknown = [other for other in ties.values() if other not in tensors | plain]
            if unknown:
                raise InputError(f"{path} ties a name to {unknown[0]}, which it does not hold")
        except FileNotFoundError as error:
            raise InputError(f"{path} does not exist") from error
        except (
            SafetensorError,
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            IndexError,
            OSError,
            RecursionError,
            RuntimeError,
            OverflowError,
        ) as error:
            raise InputError(f"{path} is not a packed network, or it is damaged") from error
        return cls(tensors, plain, ties, about)


class _Call(nn.Module):
    """A kernel in the place of an operator of a graph."""

    def __init__(self, kernel: Kernel, operator: str, shape: torch.Size) -> None:
        super().__init__()
        self.kernel = kernel
        self.operator = operator
        self.side = tuple(shape[2:])

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] | str = (0, 0),
        dilation: Sequence[int] = (1, 1),
        groups: int = 1,
    ) -> Tensor:
        if self.operator == "linear":
            return self.kernel.linear(x, bias)
        stride, dilation = pair(stride), pair(dilation)
        x, around = padded(x, self.side, padding, dilation)
        return self.kernel.conv2d(x, bias, stride, around, dilation, groups)


_OPERATORS = {
    torch.ops.aten.linear.default: "linear",
    torch.ops.aten.conv2d.default: "conv2d",
    torch.ops.aten.conv2d.padding: "conv2d",
}


def _use(program: fx.GraphModule, name: str, kernel: Kernel) -> None:
    """Puts a kernel where the tensor ``name`` is multiplied with; forgets it if that was all."""
    graph = program.graph
    for source in [n for n in graph.nodes if n.op == "get_attr" and n.target == name]:
        for node in list(source.users):
            if node.target not in _OPERATORS or node.args[1] is not source or source in (
                node.args[0], *node.args[2:]
            ):  # fmt: skip
                continue
            if _OPERATORS[node.target] == "conv2d" and type(kernel).conv2d is Kernel.conv2d:
                continue
            taken = kernel.reads(node.args[0])
            if taken is None:
                continue
            call = f"packed_{node.name}"
            shape = _tensor(program, name).shape
            program.add_module(call, _Call(kernel, _OPERATORS[node.target], shape))
            with graph.inserting_before(node):
                kwargs = {k: v for k, v in node.kwargs.items() if k != "weight"}
                new = graph.call_module(call, (taken, *node.args[2:]), kwargs)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
        if not source.users:
            graph.erase_node(source)
    if not any(n.op == "get_attr" and n.target == name for n in graph.nodes):
        path, _, leaf = name.rpartition(".")
        owner = program.get_submodule(path)
        owner._parameters.pop(leaf, None)
        owner._buffers.pop(leaf, None)


def _tensor(program: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    return getattr(program.get_submodule(path), leaf)


def _place(program: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = program.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, value.is_floating_point())
    else:
        owner._buffers[leaf] = value


def _codec(name: Any) -> type[Stored]:
    if name not in CODECS:
        raise ValueError(f"there is no codec {name!r:.60}")
    module, _, kind = CODECS[name].partition(":")
    return getattr(importlib.import_module(module), kind)
