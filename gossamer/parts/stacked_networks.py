"""Many networks of one architecture, trained and run as one batched program.

The weights of all members lie in one tensor with an axis of members in front, and
``torch.func.vmap`` turns one call into batched operators, so the cost of starting an operator is
paid once for all members. Each member has data of its own (of any size), a seed, an optimizer state
and a learning rate of its own.

Members train in chunks of one fixed size, the last one filled up with idle members, and always with
whole batches. So every operator has the same shape whatever the other members learn from, and the
weights of a member are a function of its own samples, its seed and its place in the chunk, to the
bit: what a certificate against poisoned data needs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from gossamer.core.errors import InputError
from gossamer.core.fit import Log, Rule, cosine, fit, sgd
from gossamer.core.task import Task, device_of, evaluating, order_of, seed_of, to_device

CHUNK = 50
"""Members that train together, unless said otherwise."""

Fetch = Callable[[np.ndarray, torch.Generator], tuple[Tensor, Tensor]]
"""Inputs and targets of these rows, in their order; the generator is for augmentation."""

Criterion = Callable[[Tensor, Tensor], Tensor]
"""The loss (a scalar) of one member's outputs and targets."""


class StackedNetworks(nn.Module):
    """Networks of one architecture with their weights in one tensor.

    Parameters and buffers ``[...]`` of a member become parameters and buffers ``[members, ...]``;
    the dots of their names become slashes.

    Args:
        networks: the members, alike but for the values of their weights. Not kept.

    Raises:
        InputError: if there is none, or they are not alike.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        if not networks:
            raise InputError("there is no network to stack")
        shapes = [{n: t.shape for n, t in _tensors(network)} for network in networks]
        for number, found in enumerate(shapes):
            if found != shapes[0]:
                raise InputError(f"network {number} is not made like network 0; they do not stack")
        self.count = len(networks)
        # In a tuple, so that it is no submodule: its own weights are never used.
        self._template = (copy.deepcopy(networks[0]).requires_grad_(False),)
        parameters, buffers = stack_module_state(list(networks))
        # A parameter that appears twice in a member appears twice in the answer, too.
        for name, value in parameters.items():
            learned = dict(networks[0].named_parameters())[name].requires_grad
            self.register_parameter(_flat(name), nn.Parameter(value.detach(), learned))
        for name, value in buffers.items():
            self.register_buffer(_flat(name), value)
        self._parameter_names = tuple(parameters)
        self._buffer_names = tuple(buffers)

    def forward(self, inputs: Tensor, *, shared: bool = False) -> Tensor:
        """What all members answer, ``[members, batch, ...]``.

        Args:
            inputs: ``[members, batch, ...]``; or ``[batch, ...]`` for all of them.
            shared: whether all members get the same inputs.
        """
        template = self._template[0].train(self.training)
        own = dict(self.named_parameters()) | dict(self.named_buffers())

        def answer(state: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(template, state, (x,))

        state = {name: own[_flat(name)] for name in self._parameter_names + self._buffer_names}
        # Dropout draws for each member on its own.
        together = vmap(answer, in_dims=(0, None if shared else 0), randomness="different")
        return together(state, inputs)

    @torch.no_grad()
    def member(self, number: int) -> nn.Module:
        """A copy of one member as a plain network, on the device of the stack."""
        if not 0 <= number < self.count:
            raise InputError(f"there is no member {number} among {self.count} networks")
        network = copy.deepcopy(self._template[0]).to(device_of(self)).train(self.training)
        own = dict(self.named_parameters()) | dict(self.named_buffers())
        for name, tensor in _tensors(network):
            tensor.copy_(own[_flat(name)][number])
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(own[_flat(name)].requires_grad)
        return network


def _flat(name: str) -> str:
    return name.replace(".", "/")


def _tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from network.named_parameters()
    yield from network.named_buffers()


class MemberBatches(Task):
    """What the members of one stack learn from, each its own samples.

    A member goes through its samples ``epochs`` times, shuffled anew each time by a function of its
    seed; the passes are joined and cut into whole batches. So it takes
    ``ceil(epochs * samples / batch size)`` steps, and a part smaller than a batch fills it by
    repetition. A member whose steps are done idles on its first batch.

    Args:
        rows: the samples of each member; a member without samples idles.
        fetch: makes inputs and targets of them.
        criterion: for :meth:`score`.
        epochs: passes over each member's samples.
        batch_size: samples of each member in a step.
        seeds: of the members' orders.
        example_inputs: a small batch of one member's inputs.

    Attributes:
        steps: of each member, ``[members]``.
    """

    name = "members of a stack"
    metric = "minus the mean loss"

    def __init__(
        self,
        rows: Sequence[np.ndarray],
        fetch: Fetch,
        criterion: Criterion,
        *,
        epochs: int,
        batch_size: int,
        seeds: Sequence[int],
        example_inputs: tuple[Tensor, ...] = (),
    ) -> None:
        self.rows = [np.asarray(own, dtype=np.int64) for own in rows]
        self.fetch = fetch
        self.epochs = epochs
        self.batch_size = batch_size
        self.seeds = list(seeds)
        self.example_inputs = example_inputs
        self.steps = torch.tensor([-(-epochs * len(own) // batch_size) for own in self.rows])
        self._criterion = criterion
        self._orders: np.ndarray | None = None

    def size(self, split: str) -> int:
        return sum(map(len, self.rows)) if split == "train" else 0

    def steps_per_epoch(self, split: str, batch_size: int) -> int:
        return int(self.steps.max())

    def batches(
        self,
        split: str,
        *,
        batch_size: int = 128,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        shuffle: bool | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs ``[members, batch, ...]`` and targets of each step (``batch_size`` is the own)."""
        if self._orders is None:
            self._orders = self._whole_orders()
        for step in range(start, self.steps_per_epoch(split, batch_size)):
            at = torch.where(step < self.steps, step, 0).numpy()[:, None] * self.batch_size
            places = at + np.arange(self.batch_size)
            rows = np.take_along_axis(self._orders, places, axis=1)
            generator = torch.Generator().manual_seed(seed_of("members", seed, epoch, step))
            inputs, targets = self.fetch(rows.ravel(), generator)
            yield inputs.unflatten(0, rows.shape), targets.unflatten(0, rows.shape)

    def _whole_orders(self) -> np.ndarray:
        """The samples of every member in the order of learning, ``[members, steps * batch]``."""
        length = max(1, int(self.steps.max())) * self.batch_size
        # A row that idle members may fetch; what they make of it is thrown away.
        idle = next(own[0] for own in self.rows if len(own))
        orders = np.full((len(self.rows), length), idle)
        for own, order, steps, seed in zip(
            self.rows, orders, self.steps.tolist(), self.seeds, strict=True
        ):
            wanted = steps * self.batch_size
            passes = -(-wanted // len(own)) if len(own) else 0
            for number in range(passes):
                low = number * len(own)
                order[low : min(low + len(own), wanted)] = own[
                    order_of(len(own), True, seed, number)[: wanted - low]
                ]
        return orders

    def inputs(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return (batch[0],)

    def criterion(self, outputs: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.criteria(outputs, batch[1]).mean()

    def criteria(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of each member, ``[members]``."""
        return vmap(self._criterion)(outputs, targets)

    def score(self, model: Callable[..., Any], split: str = "train") -> float:
        device = device_of(model)
        with evaluating(model):
            losses = [
                float(self.loss(model, to_device(batch, device))) for batch in self.batches(split)
            ]
        return -float(np.mean(losses))

    def fingerprint(self) -> str:
        return self.digest_of([*map(torch.from_numpy, self.rows), torch.tensor(self.seeds)])

    def describe(self) -> dict[str, Any]:
        settings = {"epochs": self.epochs, "batch_size": self.batch_size}
        return super().describe() | settings | {"members": len(self.rows)}


class StackedTraining(Rule):
    """Minimises every member's loss by one optimizer that works element by element.

    The rate of each member follows the schedule at its own fraction of its own steps. A step that
    is smaller than the optimizer's is made by going that share of the way (what SGD and the Adams
    do is proportional to their rate).

    Args:
        network: the stack.
        task: gives batches and losses.
        optimizer: owns the stack's parameters, and treats each element alone (SGD, Adam ...).
        schedule: learning-rate multiplier as a function of the fraction of training done.
    """

    def __init__(
        self,
        network: StackedNetworks,
        task: MemberBatches,
        *,
        optimizer: Optimizer,
        schedule: Callable[[float], float] = cosine,
    ) -> None:
        self.network = network
        self.task = task
        self.optimizer = optimizer
        self.schedule = schedule

    def step(self, batch: tuple[Tensor, Tensor]) -> Log:
        device = self.run.device
        steps = self.task.steps
        active = (self.run.step < steps).to(device)
        rates = torch.tensor(
            [
                self.schedule(self.run.step / total) if self.run.step < total else 0.0
                for total in steps.tolist()
            ],
            device=device,
        )
        self.optimizer.zero_grad(set_to_none=True)
        whole_rate = bool((rates == 1.0).all())
        before = [] if whole_rate else [p.detach().clone() for p in self.network.parameters()]
        idle = not bool(active.all())
        buffers = [b.clone() for b in self.network.buffers()] if idle else []
        with self.run.accelerator.autocast():
            losses = self.task.criteria(self.network(batch[0]), batch[1])
        self.backward(losses.sum())
        self.optimizer.step()
        with torch.no_grad():
            for parameter, old in zip(self.network.parameters(), before, strict=not whole_rate):
                moved = torch.lerp(old, parameter, _along(rates, parameter))
                # Not by a rate of 0: what an idle member computes may be infinite.
                parameter.copy_(torch.where(_along(active, parameter), moved, old))
            for buffer, old in zip(self.network.buffers(), buffers, strict=idle):
                buffer.copy_(torch.where(_along(active, buffer), buffer, old))
            # A member that has diverged is its own affair: the others go on.
            seen = losses[active & losses.isfinite()]
            return {"loss": seen.mean() if len(seen) else losses.new_zeros(())}


def _along(values: Tensor, tensor: Tensor) -> Tensor:
    """``[members]`` as ``[members, 1, ...]``, to go with ``tensor``."""
    return values.view(-1, *(1,) * (tensor.ndim - 1))


class TrainedStacks:
    """All members of a training: the stacks of fixed size that they were trained in.

    Args:
        stacks: trained, in order.
        count: members; those of the last stack behind it only filled it up.
    """

    def __init__(self, stacks: Sequence[StackedNetworks], count: int) -> None:
        self.stacks = list(stacks)
        self.count = count

    def __len__(self) -> int:
        return self.count

    def member(self, number: int) -> nn.Module:
        """A copy of one member as a plain network."""
        if not 0 <= number < self.count:
            raise InputError(f"there is no member {number} among {self.count} networks")
        size = self.stacks[0].count
        return self.stacks[number // size].member(number % size)

    def outputs(self, inputs: Tensor) -> Tensor:
        """What all members answer to the same inputs, in evaluation mode, on the CPU.

        Args:
            inputs: ``[batch, ...]``.

        Returns:
            ``[members, batch, ...]``.
        """
        answers = []
        for stack in self.stacks:
            with evaluating(stack):
                answers.append(stack(inputs.to(device_of(stack)), shared=True).cpu())
        return torch.cat(answers)[: self.count]


def train_stacked(
    make_model: Callable[[int], nn.Module],
    rows: Sequence[np.ndarray],
    fetch: Fetch,
    *,
    epochs: int,
    seeds: Sequence[int],
    criterion: Criterion = cross_entropy,
    batch_size: int = 128,
    optimizer: Callable[[nn.Module], Optimizer] = sgd,
    schedule: Callable[[float], float] = cosine,
    chunk: int = CHUNK,
    seed: int = 0,
    precision: str = "no",
    title: str = "training networks",
) -> TrainedStacks:
    """Trains many networks, each on its own samples, a chunk of them at a time.

    Args:
        make_model: makes the network of a member; called with the member's number, under its seed.
        rows: the samples of each member, in an order that is a function of the samples. A member
            without samples stays as it was made.
        fetch: makes inputs and targets of rows; those of all members of a step come at once.
        epochs: passes of each member over its own samples.
        seeds: of each member's initial weights and data order.
        criterion: the loss of one member.
        batch_size: samples of each member in a step.
        optimizer: made from a stack; one that treats each element alone. Default: SGD with Nesterov
            momentum .9, learning rate .1 and weight decay 5e-4 (on everything, since all stacked
            tensors have axes to spare).
        schedule: learning-rate multiplier as a function of a member's fraction of its steps.
        chunk: members that train together, at most; the members are shared out evenly. Weights are
            a function of it and of the number of members (to the last bits).
        seed: of augmentation and dropout.
        precision: "no" (float32) or "bf16".
        title: of the progress bar.

    Raises:
        InputError: if seeds and rows differ in number, or there is nothing to train.
    """
    if len(rows) != len(seeds) or not rows:
        raise InputError(f"{len(rows)} members with {len(seeds)} seeds cannot be trained")
    if epochs < 0 or batch_size < 1 or chunk < 1:
        raise InputError(
            "epochs are 0 or more, batches and chunks 1 or more, "
            f"not {epochs}, {batch_size} and {chunk}"
        )
    stacks = []
    chunk = -(-len(rows) // -(-len(rows) // chunk))
    for low in range(0, len(rows), chunk):
        own = list(rows[low : low + chunk])
        own_seeds = list(seeds[low : low + chunk])
        filling = chunk - len(own)
        own += [np.empty(0, np.int64)] * filling
        own_seeds += own_seeds[-1:] * filling
        # A member that fills up is made like the last one, so that make_model knows its number.
        numbers = [min(low + place, len(rows) - 1) for place in range(chunk)]
        stack = StackedNetworks(
            [_seeded(make_model, n, s) for n, s in zip(numbers, own_seeds, strict=True)]
        )
        task = MemberBatches(
            own, fetch, criterion, epochs=epochs, batch_size=batch_size, seeds=own_seeds
        )
        if int(task.steps.max()):
            rule = StackedTraining(stack, task, optimizer=optimizer(stack), schedule=schedule)
            part = f"{title} {low + 1} to {low + len(rows[low : low + chunk])} of {len(rows)}"
            fit(
                rule, task, epochs=1, batch_size=batch_size, seed=seed_of("stack", seed, low),
                precision=precision, title=part,
            )  # fmt: skip
        stacks.append(stack.eval())
    return TrainedStacks(stacks, len(rows))


def _seeded(make_model: Callable[[int], nn.Module], number: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("initial weights", seed))
        return make_model(number)
