"""Quantized distillation and differentiable quantization: few-bit students under a teacher.

A small network with few-bit weights loses accuracy when it learns alone. *Quantized distillation*
trains it under a teacher and through its quantized weights: each step computes with Q(w), and the
gradient updates a float shadow w. *Differentiable quantization* freezes w and the assignment of
weights to levels as a function of the level positions, and learns the positions. Both end in a
packed file of codes, scales and level tables whose size is the formula's.

Source: Polino, Pascanu and Alistarh, "Model compression via distillation and quantization",
ICLR 2018, arXiv:1802.05668 (algorithms 1 and 2), and its published code where the paper is silent.

What differs from the published code, each on purpose: the divergence is averaged over the batch
(``reduction="mean"`` gives theirs); parameters are left in float by module, not by index, since
the first and last *index* are a weight and a bias; indices of the "complicated" gradient are the
true extremes of each bucket; the student's logits do not pass through a ReLU.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from gossamer.compress.distil import DistillationCriterion, module_of
from gossamer.core.errors import InputError
from gossamer.core.fit import Log, Rule, Supervised, cosine, fit
from gossamer.core.network import Network
from gossamer.core.task import Batch, Task, device_of, to_device
from gossamer.parts.distillation import Ask
from gossamer.parts.grids import (
    FrozenUnits,
    Gradient,
    QTensor,
    Scheme,
    SortedAssignment,
    fake_quantize,
    quantile_points,
    quantize_tensor,
    redistribute,
    uniform_points,
)
from gossamer.parts.packed import PackedNetwork
from gossamer.parts.packing import huffman_mean_bits
from gossamer.parts.swap import swapped

# Which parameters


def quantized_names(network: nn.Module, skip: Collection[str] = ()) -> list[str]:
    """The parameters that are quantized, by name; tied ones once.

    All of them, biases and norm parameters too, as the paper does; ``skip`` names modules (with
    everything below them) or parameters that stay float.

    Raises:
        InputError: if ``skip`` names something that is not there.
    """
    known = {name for name, _ in network.named_modules()}
    known |= {name for name, _ in network.named_parameters(remove_duplicate=False)}
    for name in skip:
        if name not in known:
            raise InputError(f"the network has no module or parameter {name} to skip")
    return [
        name
        for name, parameter in network.named_parameters()
        if parameter.is_floating_point()
        and parameter.numel()
        and not any(name == part or name.startswith(f"{part}.") for part in skip)
    ]


# Networks that compute with quantized weights


@dataclass(frozen=True)
class UniformOptions:
    """How weights are rounded to a uniform grid; fields as in ``quantize_tensor``."""

    bits: int = 4
    bucket: int | None = 256
    scheme: Scheme = "linear"
    stochastic: bool = False
    gradient: Gradient = "straight"


class UniformlyQuantized(nn.Module):
    """A network that always computes with its quantized weights, and trains its float shadow.

    Args:
        network: holds the shadow; not copied.
        options: how weights are rounded.
        skip: modules or parameters that stay float.
    """

    def __init__(
        self, network: nn.Module, options: UniformOptions, skip: Collection[str] = ()
    ) -> None:
        super().__init__()
        self.network = network
        self.options = options
        self.names = quantized_names(network, skip)

    def weights(self) -> dict[str, Tensor]:
        """Quantized weights by name, with gradients to the shadow."""
        options = self.options
        parameters = dict(self.network.named_parameters())
        return {
            name: fake_quantize(
                parameters[name],
                bits=options.bits,
                bucket=options.bucket,
                scheme=options.scheme,
                # Rounding at random is for training; what is evaluated is what is stored.
                stochastic=options.stochastic and self.training,
                gradient=options.gradient,
            )
            for name in self.names
        }

    def forward(self, *inputs: Any, **named: Any) -> Any:
        with swapped(self.network, self.weights()):
            return self.network(*inputs, **named)

    @torch.no_grad()
    def clamp(self) -> None:
        """Clamps the shadow to [-1, 1] ("truncated" only), as the published code does."""
        if self.options.gradient == "truncated":
            parameters = dict(self.network.named_parameters())
            for name in self.names:
                parameters[name].clamp_(-1.0, 1.0)

    def packed(self) -> PackedNetwork:
        """Codes and scales of the quantized weights, and everything else in float."""
        return pack_uniform(self.network, self.options, names=self.names)


class LearnedLevels(nn.Module):
    """A frozen network that computes with learned level positions; only these are trainable.

    Args:
        network: gives the weights; copied, since its batch-norm statistics will change.
        levels: level positions of each quantized tensor (one number for all, or one each).
        bucket: values a bucket, or None.
        start: "quantile" places levels at evenly spaced percentiles of the scaled weights,
            "uniform" evenly between a bucket's minimum and maximum.
        skip: modules or parameters that stay float.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        levels: int | Sequence[int] = 16,
        bucket: int | None = 256,
        start: Literal["quantile", "uniform"] = "quantile",
        skip: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.names = quantized_names(self.network, skip)
        self.bucket = bucket
        self.start: Literal["quantile", "uniform"] = start
        self.points = nn.ParameterList()
        self._units: list[FrozenUnits] = []
        self._assigned: list[SortedAssignment] = []
        self._scaled_on: torch.device | None = None
        self.place(levels)

    def place(self, levels: int | Sequence[int]) -> None:
        """Puts the levels at their starting positions (and assigns every weight anew)."""
        counts = [levels] * len(self.names) if isinstance(levels, int) else list(levels)
        if len(counts) != len(self.names) or any(not 2 <= count <= 1 << 16 for count in counts):
            raise InputError("learned levels need 2 to 65536 levels for each quantized tensor")
        self._scale()
        self.points = nn.ParameterList(
            nn.Parameter(
                quantile_points(unit.unit, count)
                if self.start == "quantile"
                else uniform_points(count).to(unit.unit)
            )
            for unit, count in zip(self._units, counts, strict=True)
        )
        self._assigned = []

    def _scale(self) -> None:
        """Scales the frozen weights, where they live now."""
        parameters = dict(self.network.named_parameters())
        self._units = [FrozenUnits.of(parameters[name], self.bucket) for name in self.names]
        self._assigned = []
        self._scaled_on = device_of(self.network)

    def counts(self) -> list[int]:
        """Levels of each tensor."""
        return [points.numel() for points in self.points]

    def assignments(self) -> list[Tensor]:
        """Level index of each weight, int64 ``[n]``, for each tensor."""
        if self._scaled_on != device_of(self.network):
            self._scale()
        if not self._assigned:
            self._assigned = [
                SortedAssignment(unit.unit, points)
                for unit, points in zip(self._units, self.points, strict=True)
            ]
            return [assigned.codes for assigned in self._assigned]
        pairs = zip(self._assigned, self.points, strict=True)
        return [assigned.update(points) for assigned, points in pairs]

    def weights(self) -> dict[str, Tensor]:
        """Quantized weights by name, with gradients to the level positions."""
        codes = self.assignments()
        items = zip(self.names, self._units, self.points, codes, strict=True)
        # A copy of the codes: the next step changes them in place, before or after backward.
        return {name: unit.decode(points, c.clone()) for name, unit, points, c in items}

    def forward(self, *inputs: Any, **named: Any) -> Any:
        with swapped(self.network, self.weights()):
            return self.network(*inputs, **named)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        result = super().load_state_dict(state_dict, strict, assign)
        self._scale()
        return result

    @torch.no_grad()
    def sort(self, optimizer: Optimizer | None = None) -> None:
        """Sorts levels that have crossed, and their momenta with them."""
        for points in self.points:
            order = torch.argsort(points, stable=True)
            points.copy_(points[order])
            if optimizer is None:
                continue
            for key, value in optimizer.state.get(points, {}).items():
                if isinstance(value, Tensor) and value.shape == points.shape:
                    optimizer.state[points][key] = value[order]

    def packed(self) -> PackedNetwork:
        """Codes, scales and level tables, and everything else in float."""
        codes = self.assignments()
        items = zip(self.names, self._units, self.points, codes, strict=True)
        tensors = {name: _to_cpu(u.quantized(p.detach(), c)) for name, u, p, c in items}
        return PackedNetwork.of(self.network, tensors)


def _to_cpu(q: QTensor) -> QTensor:
    return QTensor(
        codes=q.codes.cpu(),
        low=q.low.cpu(),
        high=q.high.cpu(),
        shape=q.shape,
        bits=q.bits,
        levels=q.levels,
        bucket=q.bucket,
        scheme=q.scheme,
        points=None if q.points is None else q.points.cpu(),
        mean=q.mean,
    )


# Stored form


def pack_uniform(
    network: nn.Module,
    options: UniformOptions,
    *,
    skip: Collection[str] = (),
    names: Sequence[str] | None = None,
) -> PackedNetwork:
    """Rounds a network's weights to a uniform grid.

    For a network whose weights already are on the grid this loses nothing.

    Args:
        network: unchanged.
        options: bits, bucket and scheme (always to the nearest level).
        skip: modules or parameters that stay float.
        names: the parameters to quantize, in place of ``skip``.
    """
    parameters = dict(network.named_parameters())
    chosen = quantized_names(network, skip) if names is None else names
    tensors = {}
    for name in chosen:
        w = parameters[name].detach().cpu()
        if options.gradient == "truncated":
            w = w.clamp(-1.0, 1.0)
        tensors[name] = quantize_tensor(
            w, bits=options.bits, bucket=options.bucket, scheme=options.scheme
        )
    return PackedNetwork.of(network, tensors)


def huffman_bits(packed: PackedNetwork) -> float:
    """Mean bits a weight would take if all codes shared one Huffman code.

    The histogram is that of level indices over the whole network (arXiv:1802.05668, section 5).
    """
    tensors = [stored for stored in packed.tensors.values() if isinstance(stored, QTensor)]
    counts = torch.zeros(max((q.levels for q in tensors), default=1))
    for q in tensors:
        counts[: q.levels] += q.histogram()
    return huffman_mean_bits(counts)


# Rules


class HalveOnPlateau:
    """Learning-rate multiplier of the published code: halved when validation stops gaining.

    Args:
        gain: a score counts as better if it exceeds the best by this fraction (0.001: 0.1 %).
        patience: stale epochs before a halving.
        rest: epochs after a halving before the next.
        halvings: at most this many. (The published code then stops; here the rate stays at its
            last, smallest value, and ``fit(patience=30)`` gives the stop after 30 stale epochs.)
    """

    def __init__(
        self, *, gain: float = 1e-3, patience: int = 10, rest: int = 8, halvings: int = 11
    ) -> None:
        self.gain, self.patience, self.rest, self.limit = gain, patience, rest, halvings
        self.best = -math.inf
        self.stale = 0
        self.since = 0
        self.halvings = 0

    @property
    def multiplier(self) -> float:
        """Of the initial learning rate."""
        return 0.5**self.halvings

    def see(self, score: float) -> None:
        """Takes the validation score (higher is better) of an epoch that ended."""
        self.since += 1
        needed = self.best if self.best == -math.inf else self.best + self.gain * abs(self.best)
        if score > needed:
            self.best, self.stale = score, 0
            return
        self.stale += 1
        rested = self.halvings == 0 or self.since >= self.rest
        if self.stale >= self.patience and rested and self.halvings < self.limit:
            self.halvings += 1
            self.stale = self.since = 0

    def state(self) -> dict[str, Any]:
        """For checkpoints."""
        best = None if self.best == -math.inf else self.best
        return {"best": best, "stale": self.stale, "since": self.since, "halvings": self.halvings}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state`."""
        self.best = -math.inf if state["best"] is None else float(state["best"])
        self.stale, self.since = int(state["stale"]), int(state["since"])
        self.halvings = int(state["halvings"])


def published_sgd(parameters: Iterable[nn.Parameter], lr: float = 1e-3) -> SGD:
    """The published optimizer: Nesterov SGD, momentum .9, weight decay 2.2e-4 on everything."""
    return SGD(list(parameters), lr=lr, momentum=0.9, weight_decay=2.2e-4, nesterov=True)


class QuantizedDistillation(Supervised):
    """Quantized distillation (arXiv:1802.05668, algorithm 1).

    ``rule.network`` computes with quantized weights whenever it is called, so validation never
    sees the float shadow; that is ``rule.shadow``.

    Args:
        student: its parameters become the float shadow, changed in place.
        task: data and loss.
        teacher: frozen; None trains against labels only (quantized training without a teacher).
        options: bits, bucket, scheme, gradient.
        skip: modules or parameters that stay float.
        temperature: T.
        weight: lambda, share of the teacher.
        reduction: of the divergence.
        ask: for which samples the teacher is asked; None for all.
        optimizer: owns the student's parameters. Default: :func:`published_sgd`.
        schedule: learning-rate multiplier over the fraction of training done, or a
            :class:`HalveOnPlateau`, which then watches the validation score.
    """

    def __init__(
        self,
        student: nn.Module,
        task: Task,
        *,
        teacher: nn.Module | None,
        options: UniformOptions | None = None,
        skip: Collection[str] = (),
        temperature: float = 2.0,
        weight: float = 0.7,
        reduction: Literal["batchmean", "mean"] = "batchmean",
        ask: Ask | None = None,
        optimizer: Optimizer | None = None,
        schedule: Callable[[float], float] | HalveOnPlateau | None = None,
    ) -> None:
        quantized = UniformlyQuantized(student, options or UniformOptions(), skip)
        self.plateau = schedule if isinstance(schedule, HalveOnPlateau) else None
        plateau = self.plateau
        criterion = None
        if teacher is not None:
            criterion = DistillationCriterion(
                task,
                teacher,
                temperature=temperature,
                weight=weight,
                reduction=reduction,
                ask=ask,
            )
        super().__init__(
            quantized,
            task,
            optimizer=optimizer or published_sgd(student.parameters()),
            schedule=(lambda _: plateau.multiplier)
            if plateau is not None
            else schedule
            if callable(schedule)
            else cosine,
            criterion=criterion,
            after_step=quantized.clamp,
        )
        self.quantized = quantized

    @property
    def shadow(self) -> nn.Module:
        """The float student."""
        return self.quantized.network

    def modules(self) -> dict[str, nn.Module]:
        return {"network": self.network}

    def begin(self) -> None:
        self.quantized.clamp()

    def end_epoch(self) -> None:
        if self.plateau is not None:
            self.plateau.see(self.task.score(self.network, "validation"))

    def extra_state(self) -> dict[str, Any]:
        return {} if self.plateau is None else {"plateau": self.plateau.state()}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        if self.plateau is not None:
            self.plateau.load(state["plateau"])


class DifferentiableQuantization(Rule):
    """Differentiable quantization (arXiv:1802.05668, algorithm 2): learns level positions.

    Args:
        network: the trained float network; copied and frozen.
        task: data and loss.
        teacher: frozen; default the network itself, unquantized.
        levels: level positions of each tensor, before redistribution.
        bucket: values a bucket, or None.
        start: where levels begin, see :class:`LearnedLevels`.
        redistribute_batches: minibatches over which gradients are accumulated before the first
            step, to give tensors with larger gradients more levels; 0 keeps ``levels`` everywhere.
            (Tensors with more than ``levels`` levels then take a bit more for each code.)
        skip: modules or parameters that stay float.
        temperature: T.
        weight: lambda, share of the teacher.
        reduction: of the divergence.
        optimizer: makes the optimizer of the level positions. Default: Nesterov SGD with
            ``learning_rate`` and momentum .9.
        learning_rate: of that.
        schedule: learning-rate multiplier over the fraction of training done.
    """

    def __init__(
        self,
        network: nn.Module,
        task: Task,
        *,
        teacher: nn.Module | None = None,
        levels: int = 16,
        bucket: int | None = 256,
        start: Literal["quantile", "uniform"] = "quantile",
        redistribute_batches: int = 5,
        skip: Collection[str] = (),
        temperature: float = 2.0,
        weight: float = 0.7,
        reduction: Literal["batchmean", "mean"] = "batchmean",
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        learning_rate: float = 1e-5,
        schedule: Callable[[float], float] = cosine,
    ) -> None:
        self.network = LearnedLevels(network, levels=levels, bucket=bucket, start=start, skip=skip)
        self.levels = self.network
        self.task = task
        self.criterion = DistillationCriterion(
            task,
            network if teacher is None else teacher,
            temperature=temperature,
            weight=weight,
            reduction=reduction,
        )
        self.redistribute_batches = redistribute_batches
        self._make: Callable[[Iterable[nn.Parameter]], Optimizer] = optimizer or (
            lambda points: SGD(list(points), lr=learning_rate, momentum=0.9, nesterov=True)
        )
        self.schedule = schedule
        self.optimizer = self._prepared()
        self.norms: list[float] = []

    def _prepared(self) -> Optimizer:
        optimizer = self._make(self.levels.points)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        return optimizer

    def modules(self) -> dict[str, nn.Module]:
        return {"network": self.levels}

    def begin(self) -> None:
        # Done again by a resumed run, with the same outcome: it is a function of weights and seed.
        if self.redistribute_batches > 0:
            self.norms = self._gradient_norms()
            self.levels.place(redistribute(self.norms, self.levels.counts()))
            self.levels.to(self.run.device)
            self.optimizer = self._prepared()

    def _gradient_norms(self) -> list[float]:
        """Norms of the loss gradient with respect to each quantized tensor, over a few batches."""
        batch_size = -(-self.task.size("train") // max(1, self.run.steps_per_epoch))
        modes = [(module, module.training) for module in self.levels.modules()]
        self.levels.eval()  # batch-norm statistics are not touched by looking
        weights = {
            name: value.detach().requires_grad_() for name, value in self.levels.weights().items()
        }
        try:
            stream = self.task.batches("train", batch_size=batch_size, seed=self.run.seed, epoch=0)
            for count, batch in enumerate(stream, start=1):
                moved: Batch = to_device(batch, self.run.device)
                with swapped(self.levels.network, weights):
                    outputs = self.task.outputs(self.levels.network, moved)
                    self.criterion(outputs, moved).backward()
                if count == self.redistribute_batches:
                    break
        finally:
            for module, mode in modes:
                module.training = mode
        return [0.0 if w.grad is None else float(w.grad.norm()) for w in weights.values()]

    def step(self, batch: Batch) -> Log:
        multiplier = self.schedule(self.run.fraction)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
        self.optimizer.zero_grad(set_to_none=True)
        with self.run.accelerator.autocast():
            loss = self.criterion(self.task.outputs(self.network, batch), batch)
        self.backward(loss)
        self.optimizer.step()
        self.levels.sort(self.optimizer)
        return {"loss": loss.detach()}


class MixedDistillation(Rule):
    """Alternates one epoch of quantized distillation and one of differentiable quantization.

    An epoch of the second kind learns level positions for the current shadow and leaves the
    shadow at the learned levels, from which the next epoch of the first kind goes on. The last
    epoch is always of the first kind. (The published code has this mode without describing it;
    how the two hand over is our reading.)

    Args:
        student: its parameters become the float shadow, changed in place.
        task: data and loss.
        teacher: frozen, of the first kind of epoch; the second kind learns from the shadow.
        options: bits, bucket, scheme and gradient of the first kind.
        levels_learning_rate: of the second kind.
        skip: modules or parameters that stay float.
        temperature: T.
        weight: lambda, share of the teacher.
        optimizer: of the first kind, owns the student's parameters.
        schedule: of the first kind.
    """

    def __init__(
        self,
        student: nn.Module,
        task: Task,
        *,
        teacher: nn.Module,
        options: UniformOptions | None = None,
        skip: Collection[str] = (),
        temperature: float = 2.0,
        weight: float = 0.7,
        optimizer: Optimizer | None = None,
        schedule: Callable[[float], float] = cosine,
        levels_learning_rate: float = 1e-5,
    ) -> None:
        self.task = task
        self.skip = skip
        self.temperature, self.weight = temperature, weight
        self.levels_learning_rate = levels_learning_rate
        self.first = QuantizedDistillation(
            student,
            task,
            teacher=teacher,
            options=options,
            skip=skip,
            temperature=temperature,
            weight=weight,
            optimizer=optimizer,
            schedule=schedule,
        )
        self.network = self.first.quantized
        self.optimizer = self.first.optimizer
        self.second: DifferentiableQuantization | None = None
        self._saved_second: Mapping[str, Any] | None = None

    def modules(self) -> dict[str, nn.Module]:
        return {"network": self.network}

    def begin(self) -> None:
        self.first.run = self.run
        self.first.begin()

    def _learning_levels(self) -> bool:
        return self.run.epoch % 2 == 1 and self.run.epoch < self.run.epochs - 1

    def _new_second(self) -> DifferentiableQuantization:
        options = self.first.quantized.options
        second = DifferentiableQuantization(
            self.first.shadow,
            self.task,
            levels=2**options.bits,
            bucket=options.bucket,
            redistribute_batches=0,
            skip=self.skip,
            temperature=self.temperature,
            weight=self.weight,
            learning_rate=self.levels_learning_rate,
            schedule=lambda _: 1.0,
        )
        second.run = self.run
        second.levels.to(self.run.device)
        return second

    def step(self, batch: Batch) -> Log:
        if not self._learning_levels():
            return self.first.step(batch)
        if self.second is None:
            self.second = self._new_second()
            if self._saved_second is not None:
                self.second.load_state(self._saved_second)
                self._saved_second = None
        self.second.levels.train()
        return self.second.step(batch)

    @torch.no_grad()
    def end_epoch(self) -> None:
        if self.second is None:
            return
        shadow = dict(self.first.shadow.named_parameters())
        for name, value in self.second.levels.weights().items():
            shadow[name].copy_(value)
        buffers = dict(self.first.shadow.named_buffers())
        for name, value in self.second.levels.network.named_buffers():
            buffers[name].copy_(value)
        self.second = None

    def extra_state(self) -> dict[str, Any]:
        return {} if self.second is None else {"second": self.second.state()}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        self._saved_second = state.get("second")


# Steps of a recipe


def _finished(
    network: Network,
    packed: PackedNetwork,
    step: str,
    options: Mapping[str, Any],
    report: Mapping[str, Any],
) -> Network:
    module = copy.deepcopy(network.module)
    packed.load_into(module)
    storage = {
        name: f"{'uniform' if q.points is None else 'learned'}{q.bits}/{q.bucket or 'tensor'}"
        for name, q in packed.tensors.items()
        if isinstance(q, QTensor)
    }
    return network.after(
        step,
        options,
        {
            **report,
            "packed_bytes": packed.nbytes(),
            "plain_bytes": packed.plain_nbytes(),
            "huffman_bits_per_weight": huffman_bits(packed),
        },
        module=module,
        storage=storage,
        packed=packed,
        runtime="packed",
    )


def post_mortem(
    network: Network,
    task: Task,
    *,
    bits: int = 4,
    bucket: int | None = 256,
    scheme: Scheme = "linear",
    skip: Collection[str] = (),
) -> Network:
    """Rounds the weights of a trained network and does nothing else (the paper's PM baseline).

    Args:
        network: unchanged.
        task: not looked at.
        bits: of a code.
        bucket: values a bucket, or None for one bucket a tensor.
        scheme: how buckets are scaled.
        skip: modules or parameters that stay float.

    Returns:
        The network with every weight at a level.
    """
    packed = pack_uniform(network.module, UniformOptions(bits, bucket, scheme), skip=skip)
    options = {"bits": bits, "bucket": bucket, "scheme": scheme, "skip": list(skip)}
    return _finished(network, packed, "post_mortem", options, {})


def quantized_distillation(
    network: Network,
    task: Task,
    *,
    teacher: nn.Module | Network | None = None,
    bits: int = 4,
    bucket: int | None = 256,
    scheme: Scheme = "linear",
    gradient: Gradient = "straight",
    stochastic: bool = False,
    skip: Collection[str] = (),
    temperature: float = 2.0,
    weight: float = 0.7,
    epochs: int = 40,
    batch_size: int = 25,
    lr: float = 1e-3,
    seed: int = 0,
    checkpoint: Path | None = None,
    cpu: bool = False,
) -> Network:
    """Trains a few-bit student under a teacher (a step of a recipe).

    Args:
        network: the student; unchanged.
        task: its data.
        teacher: a trained network for the same task.
        bits: of a code.
        bucket: values a bucket, or None for one bucket a tensor.
        scheme: how buckets are scaled.
        gradient: what passes back through the quantizer.
        stochastic: round at random while training.
        skip: modules or parameters that stay float.
        temperature: T (the paper takes 1 for translation).
        weight: lambda, share of the teacher.
        epochs: passes over the training split.
        batch_size: samples a batch.
        lr: learning rate at the start; falls to 0 along half a cosine.
        seed: of data order and random rounding.
        checkpoint: file that holds the run's state; an interrupted run resumes from it.
        cpu: stay on the CPU although there is a GPU.

    Returns:
        The network with every weight at a level.

    Raises:
        InputError: if there is no teacher.
    """
    student = copy.deepcopy(network.module)
    rule = QuantizedDistillation(
        student,
        task,
        teacher=module_of(teacher, "quantized_distillation"),
        options=UniformOptions(bits, bucket, scheme, stochastic, gradient),
        skip=skip,
        temperature=temperature,
        weight=weight,
        optimizer=published_sgd(student.parameters(), lr),
    )
    history = fit(
        rule,
        task,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        checkpoint=checkpoint,
        cpu=cpu,
        title="QD",
    )
    options = {
        "bits": bits,
        "bucket": bucket,
        "scheme": scheme,
        "gradient": gradient,
        "stochastic": stochastic,
        "skip": list(skip),
        "temperature": temperature,
        "weight": weight,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
    }
    report = {"loss": history.loss[-1] if history.loss else None}
    packed = rule.quantized.packed()
    return _finished(network, packed, "quantized_distillation", options, report)


def differentiable_quantization(
    network: Network,
    task: Task,
    *,
    teacher: nn.Module | Network | None = None,
    levels: int = 16,
    bucket: int | None = 256,
    start: Literal["quantile", "uniform"] = "quantile",
    redistribute_batches: int = 5,
    skip: Collection[str] = (),
    temperature: float = 2.0,
    weight: float = 0.7,
    epochs: int = 10,
    batch_size: int = 25,
    lr: float = 1e-5,
    seed: int = 0,
    checkpoint: Path | None = None,
    cpu: bool = False,
) -> Network:
    """Learns where the levels of a trained network's weights should lie (a step of a recipe).

    Args:
        network: trained; unchanged.
        task: its data.
        teacher: default the network itself.
        levels: of each tensor, before redistribution.
        bucket: values a bucket, or None for one bucket a tensor.
        start: where levels begin: "quantile" or "uniform".
        redistribute_batches: minibatches of gradients by which levels are shared out; 0 for equal
            shares.
        skip: modules or parameters that stay float.
        temperature: T.
        weight: lambda, share of the teacher.
        epochs: passes over the training split.
        batch_size: samples a batch.
        lr: learning rate of the level positions at the start; falls to 0 along half a cosine.
        seed: of the data order.
        checkpoint: file that holds the run's state; an interrupted run resumes from it.
        cpu: stay on the CPU although there is a GPU.

    Returns:
        The network with every weight at a learned level.
    """
    rule = DifferentiableQuantization(
        network.module,
        task,
        teacher=None if teacher is None else module_of(teacher, "differentiable_quantization"),
        levels=levels,
        bucket=bucket,
        start=start,
        redistribute_batches=redistribute_batches,
        skip=skip,
        temperature=temperature,
        weight=weight,
        learning_rate=lr,
    )
    history = fit(
        rule,
        task,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        checkpoint=checkpoint,
        cpu=cpu,
        title="DQ",
    )
    options = {
        "levels": levels,
        "bucket": bucket,
        "start": start,
        "redistribute_batches": redistribute_batches,
        "skip": list(skip),
        "temperature": temperature,
        "weight": weight,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
    }
    report = {
        "loss": history.loss[-1] if history.loss else None,
        "levels": dict(zip(rule.levels.names, rule.levels.counts(), strict=True)),
    }
    packed = rule.levels.packed()
    return _finished(network, packed, "differentiable_quantization", options, report)
