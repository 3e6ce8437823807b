"""Training: a rule does one update, :func:`fit` does everything else.

A :class:`Rule` is a small stateful object whose :meth:`~Rule.step` performs one update; it owns
its optimizers, teachers, second networks and master weights. :func:`fit` owns devices and mixed
precision (through accelerate), data order, progress, validation, early stop, checkpoints and
resuming.

Everything random in step ``s`` of epoch ``e`` is a function of (seed, e, s), so a run that was
killed and resumed goes through the same states, bit for bit on one thread, as one that was not.
"""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gossamer.core.errors import InputError
from gossamer.core.files import load_state, save_state
from gossamer.core.progress import progress
from gossamer.core.task import Batch, Task, seed_of, to_device

log = logging.getLogger(__name__)

Log = dict[str, Tensor | float]


@dataclass
class Run:
    """Where a training run stands; rules read it through ``self.run``.

    Attributes:
        accelerator: accelerate's, for its device, ``autocast()`` and ``backward(loss)``.
        seed: of the run.
        epochs: planned epochs.
        steps_per_epoch: steps in one epoch.
        epoch: the current epoch, from 0.
        step: steps done before the current one, over all epochs.
    """

    accelerator: Any
    seed: int
    epochs: int
    steps_per_epoch: int
    epoch: int = 0
    step: int = 0

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    @property
    def fraction(self) -> float:
        """Share of the run that is done, 0 at the first step."""
        return self.step / max(1, self.total_steps)

    @property
    def device(self) -> torch.device:
        """Where batches arrive and networks live."""
        return self.accelerator.device


class Rule(ABC):
    """One way to update a network.

    Modules and optimizers that are attributes of the rule are moved to the run's device, saved
    and restored by :func:`fit`. Other state goes through :meth:`extra_state`.

    Attributes:
        network: the network that is validated and kept.
        run: set by :func:`fit` before the first step.
    """

    network: nn.Module
    run: Run

    @abstractmethod
    def step(self, batch: Batch) -> Log:
        """Performs one update; returns what to log."""

    def begin(self) -> None:  # noqa: B027 (an optional hook)
        """Called once before the first step, when ``self.run`` is known."""

    def end_epoch(self) -> None:  # noqa: B027
        """Called after the last step of each epoch, before validation."""

    def finish(self) -> None:  # noqa: B027
        """Called once after the last step."""

    def extra_state(self) -> dict[str, Any]:
        """Tensors and plain values beside modules and optimizers, nested as one likes."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Restores what :meth:`extra_state` returned."""

    def backward(self, loss: Tensor) -> None:
        """Back-propagates ``loss`` under the run's precision."""
        self.run.accelerator.backward(loss)

    def modules(self) -> dict[str, nn.Module]:
        """The rule's modules by attribute name (anything trained, averaged or frozen)."""
        return {name: value for name, value in vars(self).items() if isinstance(value, nn.Module)}

    def optimizers(self) -> dict[str, Optimizer]:
        """The rule's optimizers by attribute name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Optimizer)}

    def state(self) -> dict[str, Any]:
        """Everything needed to go on from here."""
        return {
            "modules": {name: module.state_dict() for name, module in self.modules().items()},
            "optimizers": {name: opt.state_dict() for name, opt in self.optimizers().items()},
            "extra": self.extra_state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state` returned."""
        for name, module in self.modules().items():
            module.load_state_dict(state["modules"][name])
        for name, optimizer in self.optimizers().items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.load_extra_state(state["extra"])


def cosine(fraction: float) -> float:
    """Learning-rate multiplier 1 to 0 along half a cosine."""
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, fraction)))


def warm_cosine(warm: float = 0.1) -> Callable[[float], float]:
    """Linear warm-up over the first ``warm`` of training, then half a cosine."""

    def multiplier(fraction: float) -> float:
        if fraction < warm:
            return (fraction + 1e-3) / (warm + 1e-3)
        return cosine((fraction - warm) / (1.0 - warm))

    return multiplier


def constant(fraction: float) -> float:
    """Learning-rate multiplier 1."""
    return 1.0


class Supervised(Rule):
    """The plain rule: minimise the task's loss, with hooks for most methods that add a little.

    Args:
        network: what is trained.
        task: gives the loss.
        optimizer: owns the network's parameters. Default: SGD with Nesterov momentum .9,
            learning rate .1 and weight decay 5e-4 (none on vectors).
        schedule: learning-rate multiplier as a function of the fraction of training done.
        criterion: ``(outputs, batch) -> loss`` in place of the task's (a teacher's, for example).
        penalty: ``() -> Tensor`` added to the loss.
        after_backward: called between backward and the optimizer's step.
        after_step: called after the optimizer's step.
        clip: largest gradient norm, or None.
    """

    def __init__(
        self,
        network: nn.Module,
        task: Task,
        *,
        optimizer: Optimizer | None = None,
        schedule: Callable[[float], float] = cosine,
        criterion: Callable[[Any, Batch], Tensor] | None = None,
        penalty: Callable[[], Tensor] | None = None,
        after_backward: Callable[[], None] | None = None,
        after_step: Callable[[], None] | None = None,
        clip: float | None = None,
    ) -> None:
        self.network = network
        self.task = task
        self.optimizer = optimizer or sgd(network)
        self.schedule = schedule
        self.criterion = criterion or task.criterion
        self.penalty = penalty
        self.after_backward = after_backward
        self.after_step = after_step
        self.clip = clip
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def step(self, batch: Batch) -> Log:
        multiplier = self.schedule(self.run.fraction)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
        self.optimizer.zero_grad(set_to_none=True)
        with self.run.accelerator.autocast():
            loss = self.criterion(self.task.outputs(self.network, batch), batch)
            if self.penalty is not None:
                loss = loss + self.penalty()
        self.backward(loss)
        if self.after_backward is not None:
            self.after_backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.clip)
        self.optimizer.step()
        if self.after_step is not None:
            self.after_step()
        return {"loss": loss.detach()}


def sgd(
    network: nn.Module, *, lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 5e-4
) -> torch.optim.SGD:
    """SGD with Nesterov momentum; weight decay on matrices and kernels, none on vectors."""
    if lr < 0.0 or weight_decay < 0.0:
        raise InputError(
            f"learning rate and weight decay are 0 or more, not {lr:g} and {weight_decay:g}"
        )
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        [group for group in groups if group["params"]], lr=lr, momentum=momentum, nesterov=True
    )


@dataclass
class History:
    """What happened in a run.

    Attributes:
        loss: mean training loss of each epoch.
        score: validation score of each validated epoch (None where it was not validated).
        epochs: epochs done.
        steps: steps done.
        seconds: time spent in this process (a resumed run counts only its own).
        stopped_early: whether patience or the time limit ended it.
    """

    loss: list[float] = field(default_factory=list)
    score: list[float | None] = field(default_factory=list)
    epochs: int = 0
    steps: int = 0
    seconds: float = 0.0
    stopped_early: bool = False


def fit(
    rule: Rule,
    task: Task | Mapping[str, Task],
    *,
    epochs: int,
    batch_size: int | Mapping[str, int] = 128,
    seed: int = 0,
    split: str = "train",
    validate: str | None = None,
    patience: int | None = None,
    seconds: float | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 200,
    precision: str = "no",
    cpu: bool = False,
    title: str = "training",
) -> History:
    """Trains by ``rule`` on ``task``.

    Args:
        rule: does the updates; its networks are changed in place.
        task: one task, or several by name: then each batch is a dict of batches, an epoch is one
            pass over the first task, and the others start again as often as needed.
        epochs: passes over the data.
        batch_size: samples a batch (one number, or one per task).
        seed: decides order, augmentation and every random draw inside a step.
        split: which samples to train on.
        validate: name of the split scored after each epoch (None: never). The first task scores.
        patience: stop after this many epochs without a better validation score.
        seconds: stop at the end of the first epoch past this time.
        checkpoint: file that holds the run's state; when it exists the run resumes from it.
        checkpoint_every: steps between checkpoints; every epoch's end is one too.
        precision: "no" (float32) or "bf16".
        cpu: stay on the CPU although there is a GPU.
        title: of the progress bar.

    Returns:
        The history; ``rule.network`` is trained.

    Raises:
        InputError: if the loss is no longer finite, or the checkpoint is of another run.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    tasks = dict(task) if isinstance(task, Mapping) else {"": task}
    first = next(iter(tasks))
    sizes = {
        name: batch_size[name] if isinstance(batch_size, Mapping) else batch_size for name in tasks
    }
    if epochs < 0 or min(sizes.values()) < 1:
        raise InputError(
            f"training needs 0 epochs or more and batches of 1 sample or more, not {epochs} and "
            f"{min(sizes.values())}"
        )
    # accelerate would refuse a second run of this process that wants another precision.
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=precision, cpu=cpu or not torch.cuda.is_available())
    run = Run(
        accelerator=accelerator,
        seed=seed,
        epochs=epochs,
        steps_per_epoch=tasks[first].steps_per_epoch(split, sizes[first]),
    )
    rule.run = run
    for module in rule.modules().values():
        module.to(run.device)
    rule.begin()

    history = History()
    identity = {
        "seed": seed,
        "epochs": epochs,
        "batch_size": sizes,
        "tasks": {name: t.fingerprint() for name, t in tasks.items()},
    }
    losses = torch.zeros(2)  # sum and count of the current epoch
    best = -math.inf
    stale = 0
    if checkpoint is not None and checkpoint.exists():
        saved = load_state(checkpoint)
        if saved["identity"] != identity:
            raise InputError(
                f"{checkpoint} belongs to a run with other settings or data; "
                "remove it to start anew"
            )
        rule.load_state(saved["rule"])
        history = History(**saved["history"])
        run.epoch, run.step, best, stale = (
            saved["epoch"],
            saved["step"],
            -math.inf if saved["best"] is None else saved["best"],
            saved["stale"],
        )
        losses = saved["losses"]

    def keep() -> None:
        if checkpoint is not None and accelerator.is_main_process:
            save_state(
                checkpoint,
                {
                    "identity": identity,
                    "rule": rule.state(),
                    "history": vars(history),
                    "epoch": run.epoch,
                    "step": run.step,
                    "best": None if best == -math.inf else best,
                    "stale": stale,
                    "losses": losses,
                },
            )

    began = time.monotonic()
    devices = [run.device] if run.device.type == "cuda" else []
    with progress() as bar:
        shown = bar.add_task(title, total=run.total_steps, completed=run.step)
        while run.epoch < epochs and not history.stopped_early:
            start = run.step - run.epoch * run.steps_per_epoch
            for batch in _joined(tasks, sizes, split, seed, run.epoch, start):
                with torch.random.fork_rng(devices=devices):
                    _seed_draws(seed_of("step", seed, run.epoch, run.step), run.device)
                    for module in rule.modules().values():
                        if any(p.requires_grad for p in module.parameters()):
                            module.train()
                    logged = rule.step(to_device(batch, run.device))
                run.step += 1
                if "loss" in logged:
                    losses += torch.tensor([float(logged["loss"]), 1.0])
                    if not math.isfinite(float(losses[0])):
                        raise InputError(
                            f"the loss became {float(logged['loss'])} at step {run.step}; lower "
                            "the learning rate, or look for NaN in data and weights"
                        )
                bar.update(shown, completed=run.step)
                if run.step % checkpoint_every == 0:
                    keep()
            rule.end_epoch()
            run.epoch += 1
            history.epochs, history.steps = run.epoch, run.step
            history.loss.append(float(losses[0] / losses[1].clamp(min=1)))
            losses = torch.zeros(2)
            score = tasks[first].score(rule.network, validate) if validate else None
            history.score.append(score)
            log.debug("epoch %d: loss %.4f, score %s", run.epoch, history.loss[-1], score)
            if score is not None:
                best, stale = (score, 0) if score > best else (best, stale + 1)
            out_of_time = seconds is not None and time.monotonic() - began > seconds
            out_of_patience = patience is not None and stale >= patience
            history.stopped_early = run.epoch < epochs and (out_of_time or out_of_patience)
            keep()
    history.seconds = time.monotonic() - began
    rule.finish()
    return history


def _seed_draws(seed: int, device: torch.device) -> None:
    """Seeds the CPU's draws and those of ``device``.

    ``torch.manual_seed`` would seed devices that the run does not use, whose draws nobody restores
    after the step, and costs a fraction of a millisecond where they are not there.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _joined(
    tasks: Mapping[str, Task],
    sizes: Mapping[str, int],
    split: str,
    seed: int,
    epoch: int,
    start: int,
) -> Iterator[Batch]:
    """The batches of one epoch; of several tasks as dicts, the shorter ones repeated."""
    names = list(tasks)

    def stream(name: str) -> Iterable[Batch]:
        return tasks[name].batches(
            split, batch_size=sizes[name], seed=seed, epoch=epoch, start=start
        )

    if names == [""]:
        yield from stream("")
        return

    def endless(name: str) -> Iterator[Batch]:
        # An order of its own: the same task under two names gives two independent shuffles.
        own = seed_of("task", name, seed)
        steps = tasks[name].steps_per_epoch(split, sizes[name])
        at = epoch * tasks[names[0]].steps_per_epoch(split, sizes[names[0]]) + start
        while True:
            yield from tasks[name].batches(
                split, batch_size=sizes[name], seed=own, epoch=at // steps, start=at % steps
            )
            at = (at // steps + 1) * steps

    others = {name: endless(name) for name in names[1:]}
    for batch in stream(names[0]):
        yield {names[0]: batch} | {name: next(batches) for name, batches in others.items()}
