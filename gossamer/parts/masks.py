"""Masks that stay on: weights that were pruned are zero after every step of any optimizer.

A zero weight does not stay zero by itself: its gradient, its momentum and weight decay bring it
back. A :class:`Masks` zeroes gradients before the optimizer's step and weights after it, and the
optimizer's state when the mask changes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gossamer.core.errors import InputError, UnsupportedError
from gossamer.core.graph import Graph, level_of
from gossamer.core.network import Network
from gossamer.parts.packed import PackedNetwork
from gossamer.parts.sparse import SparseTensor

SPARSE = "sparse"
"""The storage format of a tensor whose zeros stay zeros."""


def multiplied_weights(
    module: nn.Module, example_inputs: Sequence[Any], *, skip: Collection[str] = ()
) -> dict[str, int]:
    """The weights that inputs are multiplied with (kernels and matrices), in execution order.

    Found in the traced graph, so any kind of layer counts; embeddings (which are looked up),
    biases and normalisation do not.

    Args:
        module: the network.
        example_inputs: for tracing it.
        skip: names of parameters or modules that are left out.

    Returns:
        Name in ``module.named_parameters()`` to multiply-accumulates of one sample.

    Raises:
        UnsupportedError: if the network cannot be traced or nothing is left.
        InputError: if a name of ``skip`` is no part of the network.
    """
    known = {name for name, _ in module.named_parameters()}
    for name in skip:
        if not any(own == name or own.startswith(f"{name}.") for own in known):
            raise InputError(f"the network has no part {name!r:.60} to leave out")
    graph = Graph.trace(module, example_inputs)
    found: dict[str, int] = {}
    for operator in graph.operators:
        for name in operator.weights:
            left_out = any(name == s or name.startswith(f"{s}.") for s in skip)
            if operator.macs and name in known and graph.tensors[name].ndim > 1 and not left_out:
                found[name] = found.get(name, 0) + operator.macs
    if not found:
        raise UnsupportedError("the network has no weights that could be pruned")
    return found


class Masks:
    """Which weights of a network stay.

    Args:
        module: the network; its weights are not touched before :meth:`hold_weights`.
        kept: for each masked parameter a bool tensor of its shape, True where the weight stays.

    Raises:
        InputError: if a name or a shape does not fit.
    """

    def __init__(self, module: nn.Module, kept: Mapping[str, Tensor]) -> None:
        parameters = dict(module.named_parameters())
        for name, mask in kept.items():
            if name not in parameters:
                raise InputError(f"the network has no parameter {name} to mask")
            if parameters[name].shape != mask.shape or mask.dtype != torch.bool:
                raise InputError(
                    f"the mask of {name} is {mask.dtype} {tuple(mask.shape)}, the parameter "
                    f"{tuple(parameters[name].shape)}"
                )
        self._module = module
        self._level = level_of(module)
        self._parameters = {name: parameters[name] for name in kept}
        self.kept = {name: mask.to(parameters[name].device) for name, mask in kept.items()}

    @classmethod
    def full(cls, module: nn.Module, names: Collection[str]) -> Masks:
        """Masks under which every weight of ``names`` stays.

        Raises:
            InputError: if the module has no parameter of a name.
        """
        parameters = dict(module.named_parameters())
        for name in names:
            if name not in parameters:
                raise InputError(f"the network has no parameter {name} to mask")
        return cls(module, {n: torch.ones_like(parameters[n], dtype=torch.bool) for n in names})

    @classmethod
    def of_zeros(cls, network: Network, module: nn.Module) -> Masks:
        """Masks that keep the zeros of a network whose tensors are stored sparse.

        Args:
            network: says which tensors those are.
            module: a copy of the network's module, to be trained.
        """
        level = level_of(module)
        sparse = {level + name for name, form in network.storage.items() if form == SPARSE}
        return cls(
            module, {n: p.detach() != 0 for n, p in module.named_parameters() if n in sparse}
        )

    def storage(self) -> dict[str, str]:
        """What a :class:`~gossamer.core.network.Network` says of the masked tensors."""
        return {name.removeprefix(self._level): SPARSE for name in self.kept}

    def stored(self) -> dict[str, Any]:
        """What a step says of its network when these masks are on: formats, packed form, runtime.

        Empty where nothing is masked, so that a step can say it of any network.
        """
        if not self.kept:
            return {}
        sparse = {n: SparseTensor.of(p.masked_fill(~self._mask(n), 0.0))
                  for n, p in self._parameters.items()}  # fmt: skip
        packed = PackedNetwork.of(self._module, sparse)
        return {"storage": self.storage(), "packed": packed, "runtime": "packed"}

    @property
    def total(self) -> int:
        """Weights that are masked or not."""
        return sum(mask.numel() for mask in self.kept.values())

    @property
    def remaining(self) -> int:
        """Weights that stay."""
        return sum(int(mask.sum()) for mask in self.kept.values())

    @property
    def sparsity(self) -> float:
        """Share of the weights that is gone."""
        return 1.0 - self.remaining / self.total

    def narrow(self, kept: Mapping[str, Tensor]) -> None:
        """Removes more weights: what stays has to be in the old and the new masks."""
        for name, mask in kept.items():
            self.kept[name] = self.kept[name] & mask.to(self.kept[name].device)

    def hold_gradients(self) -> None:
        """Zeroes the gradients of removed weights (before the optimizer's step)."""
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                parameter.grad.mul_(self._mask(name))

    @torch.no_grad()
    def hold_weights(self) -> None:
        """Zeroes removed weights (after the optimizer's step)."""
        for name, parameter in self._parameters.items():
            # Not a product: that would leave NaN and -0 behind.
            parameter.masked_fill_(~self._mask(name), 0.0)

    @torch.no_grad()
    def hold_optimizer(self, optimizer: Optimizer) -> None:
        """Zeroes what the optimizer remembers of removed weights (after the masks changed)."""
        for name, parameter in self._parameters.items():
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value.masked_fill_(~self._mask(name), 0.0)

    def _mask(self, name: str) -> Tensor:
        # Training moves the parameters, their masks follow.
        device = self._parameters[name].device
        if self.kept[name].device != device:
            self.kept[name] = self.kept[name].to(device)
        return self.kept[name]
