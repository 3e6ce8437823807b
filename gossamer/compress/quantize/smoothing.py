"""Scaling channels between a normalisation and the layers behind it, before they are rounded.

A few channels of a language model's activations are far larger than all others, and one scale a
token then leaves nothing for the rest. Dividing a channel by ``m`` in the normalisation and
multiplying the weights that read it by ``m`` changes no output, but moves the difficulty from the
activations to the weights (SmoothQuant), or gives the channels that matter a finer share of the
weights' grid (AWQ). Which layers share an input is found by running the network, so no list of
architectures is needed, and the network is compared with itself afterwards.

Source: Xiao, Lin, Seznec, Wu, Demouth and Han, "SmoothQuant: Accurate and Efficient Post-Training
Quantization for Large Language Models", ICML 2023, arXiv:2211.10438 (equation 4); Lin, Tang, Tang,
Yang, Chen, Wang, Xiao, Dang, Gan and Han, "AWQ: Activation-aware Weight Quantization", MLSys 2024,
arXiv:2306.00978 (equations 4 and 5).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.compress.quantize.gptq import round_to_nearest
from gossamer.core.errors import InputError, UnsupportedError
from gossamer.parts.scaled import WeightFormat

_FLOOR = 1e-5
_KEPT_TOKENS = 512  # a layer's inputs on which AWQ compares its scales

Reach = Literal["absmax", "range"]
"""What the reach of a channel is: its largest magnitude (the paper), or the distance between its
smallest and largest value (as in llm-compressor)."""


@dataclass(frozen=True)
class Shared:
    """Linear layers that read the same channels, and what makes these.

    Attributes:
        producer: name of a normalisation with a weight, or of a linear layer.
        readers: names of the linear layers.
    """

    producer: str
    readers: tuple[str, ...]


def smoothing_factors(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """By how much each channel is divided: ``a^alpha / w^(1 - alpha)`` (equation 4).

    Args:
        activations: reach of each channel over calibration tokens, ``[channels]``.
        weights: largest magnitude of each channel's weights, ``[channels]``.
        alpha: share of the difficulty that goes into the weights, 0 to 1.

    Raises:
        InputError: if ``alpha`` is not in 0 to 1.
    """
    if not 0.0 <= alpha <= 1.0:
        raise InputError(f"the share of smoothing lies between 0 and 1, not at {alpha}")
    return (activations.pow(alpha) / weights.clamp_min(_FLOOR).pow(1.0 - alpha)).clamp_min(_FLOOR)


def find_shared(
    model: nn.Module, run: Callable[[], Any], layers: Sequence[str], *, gated: bool = False
) -> list[Shared]:
    """Which of a network's linear layers read the output of a normalisation.

    Args:
        model: is run once.
        run: calls it on some input.
        layers: names of the linear layers that count. Others that read the same output are named
            too, for what is divided there has to be multiplied in all of them.
        gated: also what is multiplied into the input of ``down_proj`` by ``up_proj``, and what
            attention mixes from ``v_proj`` into ``o_proj`` where both are as wide (both as AWQ
            does).
    """
    modules = dict(model.named_modules())
    made: dict[int, tuple[str, Tensor]] = {}  # tensors are held, or their ids would come again
    readers: dict[str, list[str]] = {}
    handles = []

    def produced(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                made[id(output)] = (name, output)

        return hook

    def consumed(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: Any) -> None:
            source = made.get(id(inputs[0])) if inputs else None
            if source is not None:
                readers.setdefault(source[0], []).append(name)

        return hook

    for name, module in modules.items():
        if "norm" in type(module).__name__.lower() and _weight(module) is not None:
            handles.append(module.register_forward_hook(produced(name)))
        if name in layers or isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(consumed(name)))
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    counted = set(layers)
    found = [
        Shared(producer, tuple(names))
        for producer, names in readers.items()
        if counted.intersection(names)
    ]
    if gated:
        for reader, producer in (("down_proj", "up_proj"), ("o_proj", "v_proj")):
            for name in layers:
                place = name.removesuffix(reader)
                other = place + producer
                if not name.endswith(reader) or other not in modules:
                    continue
                # Without a gate a nonlinearity stands between up and down, and scales do not pass.
                if reader == "down_proj" and f"{place}gate_proj" not in modules:
                    continue
                source, own = _weight(modules[other]), _weight(modules[name])
                if source is not None and own is not None and source.shape[0] == own.shape[1]:
                    found.append(Shared(other, (name,)))
    return found


@contextlib.contextmanager
def watching(
    model: nn.Module, names: Sequence[str], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Calls ``see(name, input)`` whenever one of the modules is called."""
    handles = []
    for name in names:

        def hook(_: nn.Module, inputs: Any, name: str = name) -> None:
            see(name, inputs[0])

        handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Channels:
    """What calibration tells of the input channels of some layers.

    Attributes:
        largest: largest value of each channel, by layer.
        smallest: smallest value.
        mean: mean magnitude.
        sample: some inputs ``[tokens, channels]``.
    """

    largest: dict[str, Tensor]
    smallest: dict[str, Tensor]
    mean: dict[str, Tensor]
    sample: dict[str, Tensor]

    @classmethod
    def of(
        cls, model: nn.Module, names: Sequence[str], runs: Iterator[Callable[[Tensor], Tensor]]
    ) -> Channels:
        """Runs a network over calibration batches.

        Args:
            model: the network.
            names: of the layers.
            runs: each runs one batch when it is asked for, and gives what drops padding from
                the inputs ``[batch, tokens, channels]`` of a layer.
        """
        inputs: dict[str, Tensor] = {}
        found = cls({}, {}, {}, {})
        counts: dict[str, int] = {}
        with watching(model, names, lambda name, x: inputs.update({name: x})), torch.no_grad():
            for drop in runs:
                for name, raw in inputs.items():
                    x = drop(raw).flatten(0, -2).float()
                    counts[name] = counts.get(name, 0) + len(x)
                    high, low, total = x.amax(0), x.amin(0), x.abs().sum(0)
                    if name in found.largest:
                        high = torch.maximum(high, found.largest[name])
                        low = torch.minimum(low, found.smallest[name])
                        total = total + found.mean[name]
                        x = torch.cat([found.sample[name], x])
                    found.largest[name], found.smallest[name] = high, low
                    found.mean[name], found.sample[name] = total, x[:_KEPT_TOKENS]
                inputs.clear()
        for name, count in counts.items():
            found.mean[name] = found.mean[name] / count
        return found

    def reach(self, name: str, how: Reach) -> Tensor:
        """The reach of each channel of a layer's input."""
        if how == "range":
            return self.largest[name] - self.smallest[name]
        return torch.maximum(self.largest[name], -self.smallest[name])


def smooth(
    model: nn.Module,
    shared: Sequence[Shared],
    channels: Channels,
    *,
    alpha: float = 0.8,
    reach: Reach = "absmax",
) -> None:
    """SmoothQuant: moves the difficulty of activations into weights, in place.

    Args:
        model: changed, but for its outputs.
        shared: which layers share an input, see :func:`find_shared`.
        channels: of the first reader of each.
        alpha: 0.5 in the paper, 0.8 in llm-compressor's recipe.
        reach: of a channel.
    """
    for group in shared:
        weights = torch.stack([_matrix(model, name).abs().amax(0) for name in group.readers])
        activations = channels.reach(group.readers[0], reach).to(weights.device)
        factors = smoothing_factors(activations, weights.amax(0).float(), alpha)
        rescale(model, group, factors)


def activation_aware(
    model: nn.Module,
    shared: Sequence[Shared],
    channels: Channels,
    format: WeightFormat,
    *,
    steps: int = 20,
) -> dict[str, float]:
    """AWQ: scales channels by a power of their mean magnitude, the best of some, in place.

    For each shared input the powers ``0, 1 / steps ... 1`` are tried, and the one stays whose
    rounded layers err least on the sample. (The published code compares the output of the whole
    attention or feed-forward block, here it is that of the layers themselves.)

    Args:
        model: changed, but for its outputs.
        shared: which layers share an input.
        channels: of the first reader of each.
        format: to which the layers will be rounded, to nearest.
        steps: of the search.

    Returns:
        The power chosen, by the name of what makes the channels.
    """
    chosen = {}
    for group in shared:
        name = group.readers[0]
        matrices = [_matrix(model, reader).float() for reader in group.readers]
        x = channels.sample[name].to(matrices[0])
        mean = channels.mean[name].to(matrices[0]).clamp_min(_FLOOR)
        best, power, factors = float("inf"), 0.0, torch.ones_like(mean)
        for step in range(steps):
            share = step / steps
            tried = mean.pow(share).clamp_min(_FLOOR)
            tried = tried / (tried.max() * tried.min()).sqrt()
            error = 0.0
            for weight in matrices:
                rounded = round_to_nearest(weight * tried, format).decode().to(weight) / tried
                error += float(((rounded - weight) @ x.T).square().sum())
            if error < best:
                best, power, factors = error, share, tried
        rescale(model, group, factors)
        chosen[group.producer] = power
    return chosen


@torch.no_grad()
def rescale(model: nn.Module, group: Shared, factors: Tensor) -> None:
    """Divides channels where they are made and multiplies them where they are read, in place."""
    producer = model.get_submodule(group.producer)
    weight, bias = _weight(producer), getattr(producer, "bias", None)
    assert weight is not None
    # Rows of a matrix make the channels; a normalisation has one number a channel.
    weight.div_(factors.to(weight).view(-1, *[1] * (weight.ndim - 1)))
    if isinstance(bias, Tensor):
        bias.div_(factors.to(bias))
    for name in group.readers:
        matrix = _matrix(model, name)
        matrix.mul_(factors.to(matrix))


@contextlib.contextmanager
def unchanged(model: nn.Module, run: Callable[[], Tensor]) -> Iterator[None]:
    """Checks that what the block does to a network leaves its outputs as they are.

    Args:
        model: evaluated before and after.
        run: its outputs on some input.

    Raises:
        UnsupportedError: if they differ by more than rounding: then a normalisation's output is
            also read by something else.
    """
    with torch.no_grad():
        before = run().float()
    yield
    with torch.no_grad():
        after = run().float()
    low = next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
    if (after - before).abs().max() > (0.2 if low else 1e-2) * before.std():
        raise UnsupportedError(
            "scaling channels changes what this network computes: a normalisation is also read by "
            "something other than linear layers; quantize it without smoothing or AWQ"
        )


def _weight(module: nn.Module) -> Tensor | None:
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def _matrix(model: nn.Module, name: str) -> Tensor:
    weight = _weight(model.get_submodule(name))
    assert weight is not None
    return weight.detach()
