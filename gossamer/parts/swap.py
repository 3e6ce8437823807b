"""Runs a network with other weights than its own, and puts everything back.

Methods that train through quantized, masked or perturbed weights need the forward pass to see a
substitute while the optimizer keeps updating the original. Overwriting ``parameter.data`` and
restoring it loses the gradient's path and is easily left half done; here the parameter *objects*
are exchanged for the length of a block. Optimizers hold the objects, so they never notice; every
place that shares a tied parameter sees the same substitute; buffers (batch-norm statistics) stay
the network's own and are updated as usual.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from gossamer.core.errors import InputError


@contextlib.contextmanager
def swapped(network: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """Inside the block ``network`` computes with ``weights``.

    Gradients flow to the substitutes and through them to whatever they were computed from.

    Args:
        network: restored after the block, also after an error.
        weights: substitutes by name, as in ``network.named_parameters()``; of a tied parameter
            any of its names will do. Shapes must agree.

    Yields:
        ``network``.

    Raises:
        InputError: if a name is unknown, a shape differs or a tied parameter is given twice.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    own: dict[str, nn.Parameter] = {}
    # The same module reached by two paths is one place: its own list of parameters is asked.
    for owner in network.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((owner, name))
    for name, parameter in network.named_parameters(remove_duplicate=False):
        own[name] = parameter
    plan: dict[int, tuple[nn.Parameter, Tensor]] = {}
    for name, value in weights.items():
        if name not in own:
            raise InputError(f"the network has no parameter {name}")
        parameter = own[name]
        if parameter.shape != value.shape:
            raise InputError(
                f"{name} has shape {tuple(parameter.shape)}, its substitute {tuple(value.shape)}"
            )
        if id(parameter) in plan:
            raise InputError(f"{name} is tied to another parameter that is substituted too")
        plan[id(parameter)] = (parameter, value)
    try:
        for key, (_, value) in plan.items():
            for owner, name in places[key]:
                # Not setattr: that refuses plain tensors in the place of a parameter.
                owner._parameters[name] = value  # type: ignore[assignment]
        yield network
    finally:
        for key, (parameter, _) in plan.items():
            for owner, name in places[key]:
                owner._parameters[name] = parameter
