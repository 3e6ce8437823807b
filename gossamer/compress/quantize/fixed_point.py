"""Training in fixed point, with a word length of each layer that adapts while training.

Weights live on fixed-point grids ``<WL, FL>`` (:mod:`gossamer.parts.fixed_point`), a grid for each
weight tensor; gradients update a float master copy. Two operations repeat. *PushDown* finds the
smallest format whose rounding leaves the histogram of the weights as it is; *PushUp* adds bits as
long as gradients disagree, so that small updates are not rounded away. The network that comes out
is in fixed point, and partly sparse: no float phase follows.

Source: Kummer, Sidak, Reichmann and Gansterer, "Adaptive Precision Training (AdaPT): A dynamic
fixed point quantized training approach for DNNs", arXiv:2107.13490v4, and its published code. The
MuPPET baseline: Rajagopal, Vink, Venieris and Bouganis, "Multi-precision policy enforced training
(MuPPET)", ICML 2020, arXiv:2006.09049.

What differs from the published code, each on purpose: the divergence is one (the code passes
probabilities where log-probabilities are due), of the whole tensor (not its first row), with
rounding to nearest and a tolerance; formats are searched downwards from the current one; losses
are averaged over as many as there are; multiply-adds are those of the operators.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gossamer.core.errors import InputError
from gossamer.core.fit import Log, Rule, cosine, fit
from gossamer.core.graph import Graph, level_of
from gossamer.core.network import Network
from gossamer.core.task import Batch, Task
from gossamer.parts.fixed_point import FixedPoint, FixedPointTensor, integer_bits
from gossamer.parts.masks import Masks
from gossamer.parts.packed import PackedNetwork
from gossamer.parts.straight_through import straight_through
from gossamer.parts.swap import swapped

START = FixedPoint(8, 4)
"""The format in which training starts."""

Strategy = Literal["min", "mean", "max"]
_STRATEGIES: tuple[Strategy, ...] = ("min", "mean", "max")

# Choosing formats


def divergence(weights: Tensor, rounded: Tensor, bins: int, *, smoothing: float = 1e-12) -> float:
    """How much of a histogram rounding loses: KL(histogram of weights || that of rounded), nats.

    Both histograms span the weights' range; what rounding carried across its ends counts in the
    last bins.

    Args:
        weights: any shape, not empty.
        rounded: as many.
        bins: of the histograms.
        smoothing: added to every share, so that an empty bin costs much but not infinitely much.
    """
    low, high = float(weights.min()), float(weights.max())
    if low == high:
        return 0.0
    shares = []
    for values in (weights, rounded.clamp(low, high)):
        counts = torch.histc(values.float(), bins, low, high).double()
        share = counts / counts.sum() + smoothing
        shares.append(share / share.sum())
    p, q = shares
    return max(0.0, float((p * (p / q).log()).sum()))


def push_down(
    weights: Tensor, current: FixedPoint, *, bins: int, epsilon: float = 0.01
) -> FixedPoint:
    """The smallest format that leaves the histogram of the weights as it is (PushDown).

    Fractional bits first, at the current word length and down to 4 (or to the current number, if
    that is smaller); then the word, which keeps the integer bits that the largest magnitude needs.
    The search for fractional bits halves above 16, where the divergence falls steadily, and steps
    downwards below, up to the first loss.

    Args:
        weights: the float master copy.
        current: where the search starts; returned if it already loses information.
        bins: of the histograms.
        epsilon: largest divergence that counts as none, in nats. (The paper's is 0, which with
            many bins and finite tensors almost never occurs.)
    """
    weights = weights.detach()

    def lossless(format: FixedPoint) -> bool:
        return divergence(weights, format.quantize(weights), bins) <= epsilon

    if not lossless(current):
        return current
    word, fraction = current.word_length, current.fraction
    lowest = min(4, fraction)
    low = 16
    while fraction > 16:
        middle = (low + fraction) // 2
        if lossless(FixedPoint(word, middle)):
            fraction = middle
        else:
            low = middle + 1
        if low >= fraction:
            break
    if fraction <= 16:
        while fraction > lowest and lossless(FixedPoint(word, fraction - 1)):
            fraction -= 1
    needed = fraction + 1 + max(0, integer_bits(weights))
    for shorter in range(max(1, needed), word):
        if lossless(FixedPoint(shorter, fraction)):
            return FixedPoint(shorter, fraction)
    return FixedPoint(word, fraction)


def push_up(
    diversity: float, smallest: FixedPoint, *, strategy: Strategy = "min", buffer: int = 8
) -> FixedPoint:
    """Adds the bits that learning needs to the smallest lossless format (PushUp).

    Args:
        diversity: of the gradients since the last switch, see :func:`gradient_diversity`.
        smallest: from :func:`push_down`.
        strategy: which of two suggestions is followed, the smaller, their mean or the larger.
        buffer: integer bits at least.
    """
    level = math.log(diversity) - 1.0 if diversity > 0 else -1.0
    bits = 1
    if level > 0:
        square = level * level
        first = max(math.ceil(1.0 / square), 1)
        second = max(math.ceil(min(32.0 * square, 32.0)) - smallest.fraction, 0)
        chosen = {
            "min": min(first, second),
            "mean": math.ceil((first + second) / 2),
            "max": max(first, second),
        }
        bits = chosen[strategy]
    fraction = min(smallest.fraction + bits, 32)
    word = min(max(smallest.word_length, fraction) + 1, 32)
    fraction = min(fraction, 32 - buffer)
    return FixedPoint(max(min(fraction + buffer, 32), word), fraction)


def gradient_diversity(total: float, norms: float) -> float:
    """Sum of the norms over the norm of the sum: 1 for equal gradients, large where they disagree.

    Args:
        total: norm of the sum of the gradients.
        norms: sum of their norms.

    Returns:
        At least 1; 0 if there was no gradient.
    """
    if norms == 0.0:
        return 0.0
    return math.inf if total == 0.0 else norms / total


def next_lookback(
    diversity: float, lookback: int, *, bounds: tuple[int, int] = (10, 100), weight: float = 0.33
) -> int:
    """How many gradients the next switch waits for.

    Args:
        diversity: of the gradients so far; where they disagree fewer are needed.
        lookback: the present number.
        bounds: the smallest and largest number.
        weight: of the new suggestion in the running mean (mu).
    """
    low, high = bounds
    wanted = high if diversity <= 0 else math.ceil(_tidy(min(max(high / diversity, low), high)))
    return min(high, math.ceil(_tidy(wanted * weight + lookback * (1.0 - weight))))


def _tidy(value: float) -> float:
    # 100 * .33 + 100 * .67 is a hair above 100; its ceiling must not be 101.
    return round(value, 9)


# Networks that compute in fixed point


class FixedPointNetwork(nn.Module):
    """A network that always computes with fixed-point weights, and trains its float master copy.

    While training weights are rounded at random (up with a probability equal to what is lost),
    otherwise to nearest, as they are stored.

    Args:
        network: holds the master copy; not copied.
        start: the format of every parameter at first; None for float.
        round_inputs: whether linear layers and convolutions round their inputs to their weight's
            format.

    Raises:
        InputError: if the network has no weights, or with ``round_inputs`` no layers.
    """

    def __init__(
        self, network: nn.Module, start: FixedPoint | None, *, round_inputs: bool = False
    ) -> None:
        super().__init__()
        self.network = network
        self.round_inputs = round_inputs
        floating = {n: p for n, p in network.named_parameters() if p.is_floating_point()}
        self.weight_names = [name for name, p in floating.items() if p.ndim > 1]
        if not self.weight_names:
            raise InputError("the network has no weight tensors that fixed point could store")
        self.leaders: dict[str, str] = {}
        leader = self.weight_names[0]
        for name in floating:
            if name in self.weight_names:
                leader = name
            self.leaders[name] = leader
        self.formats: dict[str, FixedPoint | None] = dict.fromkeys(floating, start)
        self._layers = [
            (module, f"{path}.weight".lstrip("."))
            for path, module in network.named_modules()
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        ]
        if round_inputs and not self._layers:
            raise InputError("the network has no linear layers or convolutions to round inputs of")

    def set_format(self, leader: str, format: FixedPoint | None) -> None:
        """Gives a weight tensor, and the vectors that follow it, another format."""
        for name, own in self.leaders.items():
            if own == leader:
                self.formats[name] = format

    def weights(self, *, stochastic: bool) -> dict[str, Tensor]:
        """Rounded parameters by name, with gradients to the master copy; float ones are absent."""
        result = {}
        for name, parameter in self.network.named_parameters():
            format = self.formats.get(name)
            if format is not None:
                value = format.quantize(parameter.detach(), stochastic=stochastic)
                result[name] = straight_through(parameter, value)
        return result

    @contextlib.contextmanager
    def computing_with(self, weights: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """Inside the block the network computes with these weights, and on rounded inputs."""
        handles = []
        if self.round_inputs:
            for module, name in self._layers:
                if (format := self.formats.get(name)) is not None:
                    hook = partial(_rounded_input, format)
                    handles.append(module.register_forward_pre_hook(hook))
        try:
            with swapped(self.network, weights) as network:
                yield network
        finally:
            for handle in handles:
                handle.remove()

    def forward(self, *inputs: Any, **named: Any) -> Any:
        with self.computing_with(self.weights(stochastic=self.training)) as network:
            return network(*inputs, **named)

    def packed(self, activations: FixedPoint | None = None) -> PackedNetwork:
        """The integer codes of all parameters in fixed point, and everything else as it is.

        Args:
            activations: the format in which inputs of linear layers and convolutions are rounded
                when the packed network runs, which then multiplies integers; None for float.
        """
        parameters = dict(self.network.named_parameters())
        tensors = {}
        for name, format in self.formats.items():
            if format is not None:
                inputs = activations if parameters[name].ndim > 1 else None
                tensors[name] = FixedPointTensor.of(parameters[name], format, inputs)
        return PackedNetwork.of(self.network, tensors)

    def word_lengths(self) -> dict[str, int]:
        """Word length of each weight tensor; 32 in float."""
        formats = {name: self.formats[name] for name in self.weight_names}
        return {name: 32 if f is None else f.word_length for name, f in formats.items()}


def _rounded_input(format: FixedPoint, module: nn.Module, inputs: tuple[Any, ...]) -> Any:
    x, *others = inputs
    return straight_through(x, format.quantize(x.detach())), *others


@torch.no_grad()
def variance_scaling_(network: nn.Module, *, scale: float = 1.0, seed: int = 0) -> None:
    """Starts a network anew as the paper does: truncated normal weights, uniform biases.

    Weights have standard deviation ``sqrt(scale / fan-in)`` and are cut at two of them; biases of
    linear layers and convolutions are uniform up to ``1 / sqrt(fan-in)``. Other parameters (of
    normalisations) stay.

    Args:
        network: changed in place.
        scale: the paper's s.
        seed: of the draws.

    Raises:
        InputError: if the scale is not above 0.
    """
    if not scale > 0:
        raise InputError(f"the scale of initial weights is above 0, not {scale:g}")
    generator = torch.Generator().manual_seed(seed)
    biases = []
    fan_in = 1
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            fan_in = max(1, math.prod(parameter.shape[1:]))
            sigma = math.sqrt(scale / fan_in)
            fresh = torch.empty(parameter.shape)
            nn.init.trunc_normal_(
                fresh, std=sigma, a=-2.0 * sigma, b=2.0 * sigma, generator=generator
            )
            parameter.copy_(fresh)
            biases.append((f"{name.removesuffix('weight')}bias", fan_in))
    parameters = dict(network.named_parameters())
    for name, fan_in in biases:
        if (bias := parameters.get(name)) is not None:
            fresh = torch.rand(bias.shape, generator=generator)
            bias.copy_((2.0 * fresh - 1.0) / math.sqrt(fan_in))


# Rules


class ReduceOnPlateau:
    """Learning-rate multiplier that falls when the training loss stops falling.

    Args:
        factor: of a reduction.
        patience: epochs without a lower loss that are waited for.
        threshold: a loss counts as lower if it is below the best by this share.
    """

    def __init__(self, *, factor: float = 0.1, patience: int = 5, threshold: float = 1e-4) -> None:
        self.factor, self.patience, self.threshold = factor, patience, threshold
        self.best = math.inf
        self.stale = 0
        self.multiplier = 1.0

    def see(self, loss: float) -> None:
        """Takes the mean training loss of an epoch that ended."""
        if loss < self.best * (1.0 - self.threshold):
            self.best, self.stale = loss, 0
            return
        self.stale += 1
        if self.stale > self.patience:
            self.multiplier *= self.factor
            self.stale = 0

    def state(self) -> dict[str, Any]:
        """For checkpoints."""
        best = None if self.best == math.inf else self.best
        return {"best": best, "stale": self.stale, "multiplier": self.multiplier}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state`."""
        self.best = math.inf if state["best"] is None else float(state["best"])
        self.stale, self.multiplier = int(state["stale"]), float(state["multiplier"])


Schedule = Callable[[float], float] | ReduceOnPlateau


@dataclass(frozen=True)
class Numerics:
    """What is done to the loss and to gradients.

    Attributes:
        normalise: divide the gradient of each parameter by its norm.
        quantize_gradients: round gradients (at random) to the format of their parameter first.
        round_inputs: round inputs of linear layers and convolutions to their weight's format.
        l1: weight of the weights' absolute values in the loss.
        l2: weight of half their squares.
        accumulate: minibatches an update.

    Raises:
        InputError: if a value cannot be used.
    """

    normalise: bool = True
    quantize_gradients: bool = True
    round_inputs: bool = False
    l1: float = 1e-4
    l2: float = 0.0
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.l1 < 0 or self.l2 < 0 or self.accumulate < 1:
            raise InputError(
                f"penalties are 0 or more and updates take 1 minibatch or more, not {self.l1:g}, "
                f"{self.l2:g} and {self.accumulate}"
            )


PLAIN = Numerics(normalise=False, quantize_gradients=False)
"""Gradients as they are."""


class FixedPointTraining(Rule):
    """Trains through fixed-point weights of formats that stay (and in float, with None).

    What :class:`AdaptivePrecision` and :class:`BlockFloating` have in common, and the baseline of
    a fixed word length.

    Args:
        network: its parameters become the float master copy, changed in place.
        task: data and loss.
        start: format of every parameter; None trains in float.
        numerics: what is done to the loss and to gradients.
        optimizer: owns the network's parameters. Default: :func:`published_sgd`.
        schedule: learning-rate multiplier over the fraction of training done, or by plateau.
        masks: of weights that were pruned and stay zero.
    """

    def __init__(
        self,
        network: nn.Module,
        task: Task,
        *,
        start: FixedPoint | None = START,
        numerics: Numerics = Numerics(),
        optimizer: Optimizer | None = None,
        schedule: Schedule = cosine,
        masks: Masks | None = None,
    ) -> None:
        self.fixed = FixedPointNetwork(network, start, round_inputs=numerics.round_inputs)
        self.network = self.fixed
        self.task = task
        self.optimizer = optimizer or published_sgd(network)
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.schedule = schedule
        self.numerics = numerics
        self.masks = masks
        self.log: list[list[list[float]]] = []
        self._epoch_loss = [0.0, 0.0]

    @property
    def master(self) -> nn.Module:
        """The float network."""
        return self.fixed.network

    def modules(self) -> dict[str, nn.Module]:
        return {"network": self.network}

    def before_step(self) -> None:
        """Called before weights are rounded."""

    def observe(self, loss: float, gradients: Mapping[str, Tensor]) -> None:
        """Called before each update with the loss (its penalties included) and the gradients."""

    def observations(self, name: str) -> tuple[float, float]:
        """Lookback and bins of a weight tensor, for the record of the step; 0 where none."""
        return 0.0, 0.0

    def step(self, batch: Batch) -> Log:
        rate = self.schedule
        multiplier = rate.multiplier if isinstance(rate, ReduceOnPlateau) else rate(
            self.run.fraction
        )  # fmt: skip
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
        first = self.run.step % self.numerics.accumulate == 0
        if first:
            self.optimizer.zero_grad(set_to_none=True)
        self.before_step()
        weights = self.fixed.weights(stochastic=True)
        with self.run.accelerator.autocast(), self.fixed.computing_with(weights) as network:
            outputs = self.task.outputs(network, batch)
            fitted = self.task.criterion(outputs, batch)
        loss = fitted + self._penalty(weights)
        self.backward(loss / self.numerics.accumulate)
        words = self._record(weights)
        seen = float(loss.detach()) + words
        self._epoch_loss[0] += seen
        self._epoch_loss[1] += 1.0
        if (self.run.step + 1) % self.numerics.accumulate == 0 or self._last():
            self._update(seen)
        return {"loss": seen}

    def _last(self) -> bool:
        return self.run.step + 1 == self.run.total_steps

    def _penalty(self, weights: Mapping[str, Tensor]) -> Tensor:
        parameters = dict(self.master.named_parameters())
        total = torch.zeros((), device=self.run.device)
        for name in self.fixed.weight_names:
            w = weights.get(name, parameters[name])
            if self.numerics.l1:
                total = total + self.numerics.l1 * w.abs().sum()
            if self.numerics.l2:
                total = total + 0.5 * self.numerics.l2 * w.square().sum()
        return total

    @torch.no_grad()
    def _record(self, weights: Mapping[str, Tensor]) -> float:
        """Writes down what this step costs; returns the word-length penalty P, which is constant.

        P has no gradient: it moves what watches the loss (plateaus, the strategy), not the weights.
        """
        parameters = dict(self.master.named_parameters())
        names = self.fixed.weight_names
        counts = torch.stack([weights.get(n, parameters[n]).count_nonzero() for n in names])
        sizes = [parameters[n].numel() for n in names]
        densities = [c / s for c, s in zip(counts.tolist(), sizes, strict=True)]
        words = list(self.fixed.word_lengths().values())
        self.log.append(
            [
                [float(word), density, *self.observations(name)]
                for name, word, density in zip(names, words, densities, strict=True)
            ]
        )
        return sum(w / 32 * d for w, d in zip(words, densities, strict=True)) / len(names)

    @torch.no_grad()
    def _update(self, loss: float) -> None:
        if self.masks is not None:
            self.masks.hold_gradients()
        gradients = {}
        for name, parameter in self.master.named_parameters():
            gradient = parameter.grad
            if gradient is None:
                continue
            format = self.fixed.formats.get(name)
            if self.numerics.quantize_gradients and format is not None:
                gradient = format.quantize(gradient, stochastic=True)
            if self.numerics.normalise:
                norm = gradient.norm()
                gradient = gradient / torch.where(norm > 0, norm, torch.ones_like(norm))
            parameter.grad = gradients[name] = gradient
        self.observe(loss, gradients)
        self.optimizer.step()
        if self.masks is not None:
            self.masks.hold_weights()

    def end_epoch(self) -> None:
        if isinstance(self.schedule, ReduceOnPlateau):
            self.schedule.see(self._epoch_loss[0] / max(1.0, self._epoch_loss[1]))
        self._epoch_loss = [0.0, 0.0]

    def extra_state(self) -> dict[str, Any]:
        formats = {
            name: None if f is None else [f.word_length, f.fraction]
            for name, f in self.fixed.formats.items()
        }
        plateau = self.schedule.state() if isinstance(self.schedule, ReduceOnPlateau) else None
        # Part of an update may have been accumulated.
        parts = {n: p.grad for n, p in self.master.named_parameters() if p.grad is not None}
        return {
            "formats": formats,
            "plateau": plateau,
            "gradients": parts if self.numerics.accumulate > 1 else {},
            "epoch_loss": self._epoch_loss,
            "log": torch.tensor(self.log),
        }

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        for name, found in state["formats"].items():
            self.fixed.formats[name] = None if found is None else FixedPoint(*found)
        if isinstance(self.schedule, ReduceOnPlateau):
            self.schedule.load(state["plateau"])
        parameters = dict(self.master.named_parameters())
        for name, gradient in state["gradients"].items():
            parameters[name].grad = gradient.to(parameters[name].device)
        self._epoch_loss = [float(value) for value in state["epoch_loss"]]
        self.log = state["log"].tolist()


def published_sgd(
    network: nn.Module, *, lr: float = 0.05, momentum: float = 0.9, weight_decay: float = 0.0
) -> torch.optim.SGD:
    """Nesterov SGD on the master copy."""
    if not lr > 0 or not 0 < momentum < 1 or weight_decay < 0:
        raise InputError(
            f"training in fixed point needs a learning rate above 0, a momentum between 0 and 1 "
            f"and a weight decay of 0 or more, not {lr:g}, {momentum:g} and {weight_decay:g}"
        )
    parameters = [p for p in network.parameters() if p.requires_grad]
    return torch.optim.SGD(
        parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=True
    )


@dataclass(frozen=True)
class Adaptation:
    """How formats adapt.

    Attributes:
        lookback: smallest and largest number of gradients between two switches.
        resolution: smallest and largest number of bins of the histograms.
        buffer: integer bits at least.
        epsilon: largest divergence that counts as none, nats.
        weight: of a new lookback in the running one (mu).
        strategy: where PushUp's strategy starts, and falls back to.
        published_average: average losses as the published code does, whose mean is too large by
            one part in the lookback, so that the strategy changes less often.

    Raises:
        InputError: if a value cannot be used.
    """

    lookback: tuple[int, int] = (10, 100)
    resolution: tuple[int, int] = (1, 100)
    buffer: int = 8
    epsilon: float = 0.01
    weight: float = 0.33
    strategy: Strategy = "min"
    published_average: bool = False

    def __post_init__(self) -> None:
        for what, bounds in (("lookback", self.lookback), ("resolution", self.resolution)):
            if len(bounds) != 2 or not 1 <= bounds[0] <= bounds[1]:
                raise InputError(
                    f"{what} is a smallest and a largest number from 1 on, not {list(bounds)}"
                )
        if not 0 <= self.buffer <= 31 or self.epsilon < 0 or not 0 <= self.weight <= 1:
            raise InputError(
                f"buffer is 0 to 31 bits, epsilon 0 or more and weight 0 to 1, not {self.buffer}, "
                f"{self.epsilon:g} and {self.weight:g}"
            )


@dataclass
class _Watched:
    """What is known of one weight tensor since its last switch."""

    lookback: int
    resolution: int
    total: Tensor | None = None  # sum of the gradients
    norms: float = 0.0
    count: int = 0


class AdaptivePrecision(FixedPointTraining):
    """AdaPT: formats follow the histogram of the weights and the diversity of the gradients.

    Args:
        network: its parameters become the float master copy, changed in place.
        task: data and loss.
        adaptation: how formats adapt.
        start: format of every parameter at first.
        numerics: what is done to the loss and to gradients.
        optimizer: owns the network's parameters. Default: :func:`published_sgd`.
        schedule: learning-rate multiplier over the fraction of training done, or by plateau.
        masks: of weights that were pruned and stay zero.
    """

    def __init__(
        self,
        network: nn.Module,
        task: Task,
        *,
        adaptation: Adaptation = Adaptation(),
        start: FixedPoint = START,
        numerics: Numerics = Numerics(),
        optimizer: Optimizer | None = None,
        schedule: Schedule = cosine,
        masks: Masks | None = None,
    ) -> None:
        super().__init__(
            network, task, start=start, numerics=numerics, optimizer=optimizer,
            schedule=schedule, masks=masks,
        )  # fmt: skip
        self.adaptation = adaptation
        self.strategy: Strategy = adaptation.strategy
        self.watched = {
            name: _Watched(adaptation.lookback[0], adaptation.resolution[0])
            for name in self.fixed.weight_names
        }
        self._losses: deque[float] = deque(maxlen=adaptation.lookback[1])

    def observations(self, name: str) -> tuple[float, float]:
        watched = self.watched[name]
        return float(watched.lookback), float(watched.resolution)

    def observe(self, loss: float, gradients: Mapping[str, Tensor]) -> None:
        self._adapt_strategy(loss)
        seen = {name: gradients[name] for name in self.watched if name in gradients}
        if not seen:
            return
        for name, gradient in seen.items():
            watched = self.watched[name]
            watched.total = gradient.clone() if watched.total is None else watched.total + gradient
        totals = [self.watched[name].total for name in seen]
        norms = torch.stack(
            [g.norm() for g in seen.values()] + [t.norm() for t in totals if t is not None]
        ).tolist()
        for i, name in enumerate(seen):
            self._watch(name, norms[i], norms[len(seen) + i])

    def _watch(self, name: str, norm: float, total: float) -> None:
        watched, adaptation = self.watched[name], self.adaptation
        watched.norms += norm
        watched.count += 1
        diversity = gradient_diversity(total, watched.norms)
        low, high = adaptation.lookback
        watched.lookback = next_lookback(
            diversity, watched.lookback, bounds=(low, high), weight=adaptation.weight
        )
        if watched.lookback == high:
            watched.resolution = min(watched.resolution + 1, adaptation.resolution[1])
        elif watched.lookback == low:
            watched.resolution = max(watched.resolution - 1, adaptation.resolution[0])
        if watched.count >= watched.lookback:
            self._switch(name, diversity)
            watched.total, watched.norms, watched.count = None, 0.0, 0

    def _switch(self, name: str, diversity: float) -> None:
        current = self.fixed.formats[name]
        assert current is not None
        master = self.master.get_parameter(name)
        smallest = push_down(
            master, current, bins=self.watched[name].resolution, epsilon=self.adaptation.epsilon
        )
        chosen = push_up(diversity, smallest, strategy=self.strategy, buffer=self.adaptation.buffer)
        self.fixed.set_format(name, chosen)

    def _adapt_strategy(self, loss: float) -> None:
        """More bits where the loss does not fall below its mean over the lookback."""
        lookbacks = [watched.lookback for watched in self.watched.values()]
        window = round(sum(lookbacks) / len(lookbacks))
        recent = list(self._losses)[-window:]
        if recent:
            mean = sum(recent) / len(recent)
            if self.adaptation.published_average:
                mean = (sum(recent) + loss) / len(recent)
            if abs(mean) <= abs(loss):
                place = _STRATEGIES.index(self.strategy)
                self.strategy = _STRATEGIES[min(place + 1, len(_STRATEGIES) - 1)]
            else:
                self.strategy = self.adaptation.strategy
        self._losses.append(loss)

    def extra_state(self) -> dict[str, Any]:
        return super().extra_state() | {
            "strategy": self.strategy,
            "losses": list(self._losses),
            "watched": {name: vars(watched) for name, watched in self.watched.items()},
        }

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        super().load_extra_state(state)
        self.strategy = state["strategy"]
        self._losses.extend(state["losses"])
        for name, found in state["watched"].items():
            total = found["total"]
            device = self.master.get_parameter(name).device
            self.watched[name] = _Watched(
                **{**found, "total": None if total is None else total.to(device)}
            )


PUBLISHED_PROFILE = (22, 22, 10, 15, 45)
"""Epochs that MuPPET spent at each level in training ResNet-20 on CIFAR-10."""


@dataclass(frozen=True)
class SwitchPolicy:
    """When MuPPET goes on to its next word length.

    After each epoch the diversity of the gradients (the last minibatch's of each epoch at this
    level, at most ``resolution`` of them; sum of squared norms over squared norm of the sum, mean
    over tensors) is compared with its largest value at this level. A ratio above ``alpha + beta
    exp(-decay e)`` in the ``e``-th epoch of the level is a violation; ``violations`` of them
    switch. The constants are ours: the published ones are not known to us.

    Attributes:
        profile: epochs at each level instead of all that.
    """

    alpha: float = 1.0
    beta: float = 1.5
    decay: float = 0.5
    violations: int = 2
    resolution: int = 3
    profile: tuple[int, ...] | None = None


class BlockFloating(FixedPointTraining):
    """MuPPET's policy for weights: one word length for the network, which grows in steps.

    Each tensor is scaled by a power of two of its own, so that its largest weight fits (block
    floating point). The last level trains in float. Of MuPPET's scheme this takes the weights;
    activations stay float, as in the runs it is compared with.

    Args:
        network: its parameters become the float master copy, changed in place.
        task: data and loss.
        levels: word lengths in order; None for float.
        policy: when to go on.
        numerics: what is done to the loss and to gradients.
        optimizer: owns the network's parameters. Default: :func:`published_sgd`.
        schedule: learning-rate multiplier over the fraction of training done, or by plateau.
        masks: of weights that were pruned and stay zero.
    """

    def __init__(
        self,
        network: nn.Module,
        task: Task,
        *,
        levels: Sequence[int | None] = (8, 12, 14, 16, None),
        policy: SwitchPolicy = SwitchPolicy(),
        numerics: Numerics = PLAIN,
        optimizer: Optimizer | None = None,
        schedule: Schedule = cosine,
        masks: Masks | None = None,
    ) -> None:
        super().__init__(
            network, task, start=None, numerics=numerics, optimizer=optimizer,
            schedule=schedule, masks=masks,
        )  # fmt: skip
        self.levels = tuple(levels)
        self.policy = policy
        self.level = 0
        self.spent = [0] * len(self.levels)
        self._gradients: deque[dict[str, Tensor]] = deque(maxlen=policy.resolution)
        self._last_gradients: dict[str, Tensor] = {}
        self._largest = 0.0
        self._violations = 0
        self.before_step()

    def before_step(self) -> None:
        word = self.levels[self.level]
        for name, parameter in self.master.named_parameters():
            if name in self.fixed.formats:
                self.fixed.formats[name] = None if word is None else block_format(parameter, word)

    def observe(self, loss: float, gradients: Mapping[str, Tensor]) -> None:
        if (self.run.step + 1) % self.run.steps_per_epoch == 0:
            self._last_gradients = {
                name: gradients[name].clone()
                for name in self.fixed.weight_names
                if name in gradients
            }

    def end_epoch(self) -> None:
        super().end_epoch()
        self.spent[self.level] += 1
        if self.level < len(self.levels) - 1 and self._goes_on():
            self.level += 1
            self._gradients.clear()
            self._largest, self._violations = 0.0, 0
        self.before_step()  # what is validated has the scales of the weights as they are now

    def _goes_on(self) -> bool:
        policy, spent = self.policy, self.spent[self.level]
        if policy.profile is not None:
            return spent >= policy.profile[self.level]
        self._gradients.append(self._last_gradients)
        ratios = []
        for name in self._last_gradients:
            held = [g[name] for g in self._gradients]
            together = float(sum(held[1:], held[0]).square().sum())
            apart = float(torch.stack([g.square().sum() for g in held]).sum())
            if together > 0:
                ratios.append(apart / together)
        diversity = sum(ratios) / max(1, len(ratios))
        self._largest = max(self._largest, diversity)
        threshold = policy.alpha + policy.beta * math.exp(-policy.decay * spent)
        if diversity > 0 and self._largest / diversity > threshold:
            self._violations += 1
        return self._violations >= policy.violations

    def extra_state(self) -> dict[str, Any]:
        return super().extra_state() | {
            "level": self.level,
            "spent": self.spent,
            "held": list(self._gradients),
            "last": self._last_gradients,
            "largest": self._largest,
            "violations": self._violations,
        }

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        super().load_extra_state(state)
        device = next(self.master.parameters()).device
        self.level, self.spent = int(state["level"]), list(state["spent"])
        self._gradients.extend(
            {name: g.to(device) for name, g in held.items()} for held in state["held"]
        )
        self._last_gradients = {name: g.to(device) for name, g in state["last"].items()}
        self._largest, self._violations = float(state["largest"]), int(state["violations"])


def block_format(weights: Tensor, word_length: int) -> FixedPoint:
    """The format of a word length whose range just holds the largest magnitude."""
    return FixedPoint(word_length, max(-64, min(64, word_length - 1 - integer_bits(weights))))


def scaled_profile(epochs: int, profile: Sequence[int] = PUBLISHED_PROFILE) -> tuple[int, ...]:
    """A switch profile for another number of epochs, each level at least one epoch long."""
    ends = [sum(profile[: i + 1]) * epochs / sum(profile) for i in range(len(profile))]
    lengths, at = [], 0
    for end in ends:
        lengths.append(max(1, round(end) - at))
        at += lengths[-1]
    return tuple(lengths)


# What it would cost on a machine whose time grows with the word length


@dataclass(frozen=True)
class Performance:
    """The paper's analytical model: every number here is modelled, none measured.

    Attributes:
        quantized_cost: bit-weighted multiply-adds of the training's forward passes, with the
            overhead of adapting.
        float_cost: the same with 32 bits everywhere and no sparsity.
        train_speedup: forward passes in fixed point and backward passes in float against float.
        inference_speedup: with the last formats and densities.
        size_ratio: bits of the last weights that are not zero against 32 bits for each.
        size_ratio_by_layer: the published code's, which does not weight layers by their size.
        overhead: share of the adapting in ``quantized_cost``.
    """

    quantized_cost: float
    float_cost: float
    train_speedup: float
    inference_speedup: float
    size_ratio: float
    size_ratio_by_layer: float
    overhead: float


def performance(
    multiply_adds: Sequence[float],
    word_lengths: Tensor,
    densities: Tensor,
    *,
    sizes: Sequence[int] | None = None,
    lookbacks: Tensor | None = None,
    resolutions: Tensor | None = None,
    accumulate: int = 1,
    samples: int = 1,
) -> Performance:
    """What training and inference would gain where a product costs as much as its word is long.

    Args:
        multiply_adds: of each weight tensor for one sample, ``[tensors]``.
        word_lengths: of each step, ``[steps, tensors]``.
        densities: shares of weights that are not zero, likewise.
        sizes: weights of each tensor; needed for the sizes and the overhead. Default: equal.
        lookbacks: of each step, likewise; None where nothing adapts.
        resolutions: bins, likewise.
        accumulate: minibatches an update.
        samples: that share one adapting step (the batch size); 1 charges it to every sample, as
            the paper's formula does.

    Source: arXiv:2107.13490, section 4.2, and its published code.
    """
    madds = torch.as_tensor(multiply_adds, dtype=torch.float64)
    words, dense = word_lengths.double(), densities.double()
    counts = torch.ones_like(madds) if sizes is None else torch.as_tensor(sizes).double()
    overhead = torch.zeros_like(words)
    if lookbacks is not None and resolutions is not None:
        bits = torch.where(words > 8, 2.0 * (words - 8.0).clamp(min=1e-9).log2(), 1.0)
        look = lookbacks.double()
        probes = 3.0 * counts * bits * resolutions.double() * dense
        sums = (look + 1.0) * counts + 1.0
        overhead = 32.0 * (probes + sums) / (look * accumulate) / samples
    quantized = float((dense * (madds * words + overhead)).sum())
    full = float(madds.sum()) * 32.0 * len(words)
    last = float((dense[-1] * madds * words[-1]).sum())
    return Performance(
        quantized_cost=quantized,
        float_cost=full,
        train_speedup=2.0 * full / (quantized + full),
        inference_speedup=float(madds.sum()) * 32.0 / last if last > 0 else math.inf,
        size_ratio=float((counts * words[-1] * dense[-1]).sum() / (32.0 * counts.sum())),
        size_ratio_by_layer=float(words[-1].mean() * dense[-1].mean() / 32.0),
        overhead=float((dense * overhead).sum()) / quantized if quantized > 0 else 0.0,
    )


def multiply_adds(network: nn.Module, example_inputs: Sequence[Any]) -> dict[str, int]:
    """Multiply-adds (two for each multiply-accumulate) of one sample, by weight tensor.

    Raises:
        UnsupportedError: if the network cannot be traced.
    """
    found: dict[str, int] = {}
    for operator in Graph.trace(network, example_inputs).operators:
        if operator.macs and operator.weights:
            name = operator.weights[0]
            found[name] = found.get(name, 0) + 2 * operator.macs
    return found


def model_performance(
    rule: FixedPointTraining, example_inputs: Sequence[Any], *, samples: int = 1
) -> Performance:
    """:func:`performance` of a finished training, and of the network that it leaves behind.

    Args:
        rule: after ``fit``.
        example_inputs: for tracing the network.
        samples: see :func:`performance`.
    """
    names = rule.fixed.weight_names
    known = multiply_adds(rule.master, example_inputs)
    parameters = dict(rule.master.named_parameters())
    rounded = rule.fixed.weights(stochastic=False)
    deployed = [
        [float(word), float(w.count_nonzero()) / w.numel(), 1.0, 0.0]
        for word, w in zip(
            rule.fixed.word_lengths().values(),
            (rounded.get(name, parameters[name]) for name in names),
            strict=True,
        )
    ]
    adapts = isinstance(rule, AdaptivePrecision)

    def of(log: Sequence[Sequence[Sequence[float]]], adapting: bool) -> Performance:
        table = torch.tensor(log, dtype=torch.float64)
        return performance(
            [known.get(name, 0) for name in names],
            table[..., 0],
            table[..., 1],
            sizes=[parameters[name].numel() for name in names],
            lookbacks=table[..., 2] if adapting else None,
            resolutions=table[..., 3] if adapting else None,
            accumulate=rule.numerics.accumulate,
            samples=samples,
        )

    after = of([deployed], False)
    during = of(rule.log, adapts) if rule.log else after
    return Performance(
        **asdict(during)
        | {
            name: getattr(after, name)
            for name in ("inference_speedup", "size_ratio", "size_ratio_by_layer")
        }
    )


# Rounding after training


def rounded_after_training(
    network: nn.Module, word_length: int | None = None, *, epsilon: float = 0.01, bins: int = 100
) -> FixedPointNetwork:
    """Gives a trained network fixed-point formats without training it (the baseline).

    Args:
        network: not copied; its weights are the master copy.
        word_length: of every tensor, with as many bits before the point as its largest magnitude
            needs; None lets :func:`push_down` choose the smallest lossless word of each tensor.
        epsilon: for PushDown.
        bins: for PushDown.
    """
    made = FixedPointNetwork(network, None)
    parameters = dict(network.named_parameters())
    for name in made.formats:
        if word_length is not None:
            made.formats[name] = block_format(parameters[name], word_length)
    if word_length is None:
        for name in made.weight_names:
            followers = [
                parameters[n].detach().flatten() for n, l in made.leaders.items() if l == name
            ]
            before = max(0, integer_bits(torch.cat(followers)))
            smallest = push_down(
                parameters[name], FixedPoint(32, 24 - before), bins=bins, epsilon=epsilon
            )
            # The vectors that follow may need more bits before the point.
            word = max(smallest.word_length, smallest.fraction + 1 + before)
            made.set_format(name, FixedPoint(min(32, word), smallest.fraction))
    return made


# A step of a recipe


def fixed_point(
    network: Network,
    task: Task,
    *,
    method: Literal["adapt", "muppet", "fixed", "round"] = "adapt",
    word_length: int = 8,
    fraction: int = 4,
    lookback: Sequence[int] = (10, 100),
    resolution: Sequence[int] = (1, 100),
    buffer: int = 8,
    epsilon: float = 0.01,
    strategy: Strategy = "min",
    quantize_gradients: bool = True,
    round_inputs: bool = False,
    inputs: Sequence[int] | None = None,
    l1: float = 1e-4,
    l2: float = 0.0,
    restart: bool = False,
    init_scale: float = 1.0,
    schedule: Literal["plateau", "cosine"] = "plateau",
    epochs: int = 60,
    batch_size: int = 128,
    lr: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    seed: int = 0,
    checkpoint: Path | None = None,
    cpu: bool = False,
) -> Network:
    """Trains a network in fixed point, or rounds it to fixed point (a step of a recipe).

    Args:
        network: unchanged.
        task: its data.
        method: "adapt" (AdaPT: formats adapt), "muppet" (one word length that grows; ends in
            float if training is long enough), "fixed" (one format throughout) or "round" (no
            training: every tensor at ``word_length`` bits, as many before the point as needed).
        word_length: bits of a word, at first for "adapt".
        fraction: bits behind the point, at first for "adapt".
        lookback: smallest and largest number of gradients between two switches.
        resolution: smallest and largest number of bins of the histograms.
        buffer: integer bits at least.
        epsilon: largest divergence that counts as no loss of information, nats.
        strategy: where PushUp's strategy starts.
        quantize_gradients: round gradients too ("adapt" and "fixed").
        round_inputs: round the inputs of layers to their weight's format while training.
        inputs: word length and fractional bits to which the packed network rounds the inputs of
            linear layers and convolutions, which it then computes in integers; None for float.
        l1: weight of the weights' absolute values in the loss.
        l2: weight of half their squares.
        restart: start from fresh weights (truncated normal) instead of the network's own.
        init_scale: variance of those times fan-in.
        schedule: of the learning rate: a tenth whenever the loss has not fallen for 5 epochs, or
            half a cosine.
        epochs: passes over the training split.
        batch_size: samples a batch.
        lr: learning rate at the start. Gradients of "adapt" and "fixed" have norm 1.
        momentum: Nesterov's.
        weight_decay: of all parameters.
        seed: of data order, random rounding and fresh weights.
        checkpoint: file that holds the run's state; an interrupted run resumes from it.
        cpu: stay on the CPU although there is a GPU.

    Returns:
        The network with every parameter in fixed point, its packed form and the modelled costs.

    Raises:
        InputError: if an option cannot be used.
    """
    if method not in ("adapt", "muppet", "fixed", "round"):
        raise InputError(f"method is adapt, muppet, fixed or round, not {method!r:.40}")
    if strategy not in _STRATEGIES:
        raise InputError(f"strategy is min, mean or max, not {strategy!r:.40}")
    if len(lookback) != 2 or len(resolution) != 2 or (inputs is not None and len(inputs) != 2):
        raise InputError("lookback, resolution and inputs are pairs of whole numbers")
    activations = None if inputs is None else FixedPoint(*inputs)
    if not any(p.ndim > 1 for p in network.module.parameters()):
        raise InputError("the network has no weight tensors that fixed point could store")
    module = copy.deepcopy(network.module)
    masks = Masks.of_zeros(network, module)
    if restart:
        variance_scaling_(module, scale=init_scale, seed=seed)
        masks.hold_weights()
    options: dict[str, Any] = {
        "method": method, "word_length": word_length, "fraction": fraction,
        "lookback": list(lookback), "resolution": list(resolution), "buffer": buffer,
        "epsilon": epsilon, "strategy": strategy, "quantize_gradients": quantize_gradients,
        "round_inputs": round_inputs, "inputs": None if inputs is None else list(inputs),
        "l1": l1, "l2": l2, "restart": restart, "init_scale": init_scale, "schedule": schedule,
        "epochs": epochs, "batch_size": batch_size, "lr": lr, "momentum": momentum,
        "weight_decay": weight_decay, "seed": seed,
    }  # fmt: skip
    report: dict[str, Any] = {}
    if method == "round":
        trained = rounded_after_training(module, word_length)
    else:
        rate: Schedule = ReduceOnPlateau() if schedule == "plateau" else cosine
        optimizer = published_sgd(module, lr=lr, momentum=momentum, weight_decay=weight_decay)
        numerics = Numerics(
            normalise=method != "muppet",
            quantize_gradients=quantize_gradients and method != "muppet",
            round_inputs=round_inputs,
            l1=l1,
            l2=l2,
        )
        shared: dict[str, Any] = {
            "numerics": numerics, "optimizer": optimizer, "schedule": rate, "masks": masks
        }  # fmt: skip
        start = FixedPoint(word_length, fraction)
        rule: FixedPointTraining
        if method == "muppet":
            rule = BlockFloating(module, task, **shared)
        elif method == "fixed":
            rule = FixedPointTraining(module, task, start=start, **shared)
        else:
            adaptation = Adaptation(
                lookback=(lookback[0], lookback[1]),
                resolution=(resolution[0], resolution[1]),
                buffer=buffer,
                epsilon=epsilon,
                strategy=strategy,
            )
            rule = AdaptivePrecision(module, task, adaptation=adaptation, start=start, **shared)
        history = fit(
            rule, task, epochs=epochs, batch_size=batch_size, seed=seed, checkpoint=checkpoint,
            cpu=cpu, title="training in fixed point",
        )  # fmt: skip
        module.cpu()
        trained = rule.fixed
        modelled = model_performance(rule, network.example_inputs, samples=batch_size)
        report = {
            "loss": history.loss[-1] if history.loss else None,
            "modelled": asdict(modelled),
            "seconds": history.seconds,
        }
    packed = trained.packed(activations)
    report["formats"] = {
        name: str(trained.formats[name] or "float") for name in trained.weight_names
    }
    report["packed_bytes"], report["plain_bytes"] = packed.nbytes(), packed.plain_nbytes()
    with torch.no_grad():
        for name, value in trained.weights(stochastic=False).items():
            module.get_parameter(name).copy_(value)
    level = level_of(module)
    storage = {
        name.removeprefix(level): f"fixed-point{f}"
        for name, f in trained.formats.items()
        if f is not None
    }
    return network.after(
        "fixed-point",
        options,
        report,
        module=module,
        storage=storage,
        runtime="packed",
        packed=packed,
    )
