"""Feature maps of named layers, read while a network runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.core.task import logits_of


def layer_of(network: nn.Module, name: str) -> nn.Module:
    """The layer of a network by its name, as ``decoder`` or ``layer4.1``.

    Raises:
        InputError: if there is none.
    """
    layers = dict(network.named_modules())
    if not name or name not in layers:
        raise InputError(
            f"the network has no layer {name!r:.80} whose features could be read; it has: "
            f"{', '.join(list(dict(network.named_children()))[:8]) or 'none'}"
        )
    return layers[name]


def tapped(network: nn.Module, layer: str | None, ask: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    """The logits of a network and the output of one of its layers, from one pass.

    Args:
        network: the network.
        layer: the layer's name; None reads the logits themselves.
        ask: runs the network once and returns its outputs.

    Raises:
        InputError: if there is no such layer, it was not run, or it answers no tensor.
    """
    if layer is None:
        logits = logits_of(ask())
        return logits, logits
    seen: list[Any] = []
    handle = layer_of(network, layer).register_forward_hook(lambda *call: seen.append(call[2]))
    try:
        logits = logits_of(ask())
    finally:
        handle.remove()
    if not seen or not isinstance(seen[-1], Tensor):
        raise InputError(f"the layer {layer} gave no feature map when the network ran")
    return logits, seen[-1]
