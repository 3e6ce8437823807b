"""OTOv3: train once, and get a structurally smaller network without fine-tuning.

The parameters of a network fall into zero-invariant groups (:class:`~.groups.Groups`): zeroing a
group silences a channel, head or operator exactly. The optimizers here drive a target number of
groups to exact zero *while* training, so surgery afterwards changes no output:

- :class:`DHSPG`: partitions the groups once into candidates and others by a redundancy score,
  shrinks the candidates along a direction that lowers the loss and the group's norm together,
  and projects those that leave their half-space to zero.
- :class:`H2SPG`: the same for whole operators, choosing candidates so that a path from input to
  output remains (:mod:`.erasing`).
- :class:`HESSO`: no penalty and no projection; batches of the least important groups decay
  linearly to zero, period by period, to the exact target.
- :class:`HSPG` (no partition, constant penalty) and :class:`ProximalGroupLasso` are the
  baselines.

Papers: Chen, Ding, Zhu, Chen, Wu, Zharkov, Liang, "OTOv3: Automatic Architecture-Agnostic Neural
Network Training and Compression from Structured Pruning to Erasing Operators", 2023,
arXiv:2312.09411 (H2SPG, sections 3-4); "OTOv2: Automatic, Generic, User-Friendly", ICLR 2023
(DHSPG, algorithm 3); "Only Train Once", NeurIPS 2021 (HSPG); "HESSO: Towards Automatic Efficient
and User Friendly Any Neural Network Training and Pruning", 2024 (HESSO and CRIC).

Differences from the published code, each with its reason:

- The penalty factor of DHSPG is never capped below the lower end of the interval in which it
  shrinks the norm; the published cap is, so norms fall but groups never reach zero
  (``published_cap=True`` restores it).
- Adam's moments start at zero with the textbook bias correction; the published code starts them
  at the first gradient *and* corrects (``Adam(published=True)``).
- HESSO's cosine term counts a gradient aligned with the weights as *redundant* (shrinking such a
  group lowers the loss), as OTOv2's does; the published sign is the opposite
  (``published_sign=True``). What rounding gives back is replaced by the next candidates, so the
  target is hit exactly. The decay takes all steps of a period (``published_decay=True``: one
  fewer).
- Where a projection would overshoot the target, the groups deepest outside their half-space go
  (the published code draws at random).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from gossamer.compress.prune import allocation, erasing
from gossamer.compress.prune.groups import Groups
from gossamer.core import surgery
from gossamer.core.dependency import Dependency, analyse
from gossamer.core.errors import InputError
from gossamer.core.fit import Log, Supervised, cosine, fit
from gossamer.core.graph import Graph
from gossamer.core.network import Network
from gossamer.core.task import Batch, Task, evaluating

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sgd:
    """Stochastic gradient descent as the update under a group optimizer.

    Attributes:
        momentum: 0 for none.
        nesterov: look ahead.
    """

    momentum: float = 0.9
    nesterov: bool = True
    #: DHSPG's published defaults for this base: penalty, amplification, cap.
    penalty: float = 1e-3
    amplify: float = 2.0
    cap: float = 10.0

    def direction(self, x: Tensor, gradient: Tensor, state: dict[str, Any], decay: float) -> Tensor:
        """The vector that, times the learning rate, is subtracted from ``x``."""
        gradient = gradient + decay * x if decay else gradient
        if self.momentum == 0.0:
            return gradient.clone()
        if "momentum" not in state:
            state["momentum"] = gradient.clone()
        else:
            state["momentum"].mul_(self.momentum).add_(gradient)
        if self.nesterov:
            return gradient + self.momentum * state["momentum"]
        return state["momentum"].clone()


@dataclass(frozen=True)
class Adam:
    """Adam or AdamW as the update under a group optimizer.

    Attributes:
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        decoupled: weight decay beside the moments (AdamW) instead of in the gradient.
        published: start the moments at the first gradient and its square and correct them all
            the same, as the authors' code does (its first step is .316 times too small).
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decoupled: bool = True
    published: bool = False
    penalty: float = 1e-2
    amplify: float = 20.0
    cap: float = 1e3

    def direction(self, x: Tensor, gradient: Tensor, state: dict[str, Any], decay: float) -> Tensor:
        """The vector that, times the learning rate, is subtracted from ``x``."""
        first, second = self.betas
        if decay and not self.decoupled:
            gradient = gradient + decay * x
        if "step" not in state:
            state["step"] = 0
            start = gradient if self.published else torch.zeros_like(gradient)
            state["first"] = start.clone()
            state["second"] = start.square()
        state["step"] += 1
        if not (self.published and state["step"] == 1):
            state["first"].lerp_(gradient, 1.0 - first)
            state["second"].mul_(second).addcmul_(gradient, gradient, value=1.0 - second)
        mean = state["first"] / (1.0 - first ** state["step"])
        root = (state["second"] / (1.0 - second ** state["step"])).sqrt_()
        result = mean / root.add_(self.eps)
        return result.add_(x, alpha=decay) if decay and self.decoupled else result


Base = Sgd | Adam


class GroupOptimizer(Optimizer):
    """A base update, then something done to whole groups; groups once zeroed stay zero.

    Args:
        module: whose trainable parameters are updated.
        groups: its zero-invariant groups.
        lr: learning rate.
        base: the update under it.
        weight_decay: on matrices and kernels.
        decay_vectors: decay biases and normalisation parameters too.

    Attributes:
        groups: as given.
        progress: what must survive a checkpoint beside the moments: tensors and numbers. Always
            there: ``step`` (updates done) and ``zeroed`` (``[total]`` bool).
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Groups,
        *,
        lr: float = 0.1,
        base: Base | None = None,
        weight_decay: float = 5e-4,
        decay_vectors: bool = False,
    ) -> None:
        self.groups = groups
        self.base: Base = Sgd() if base is None else base
        self.progress: dict[str, Any] = {
            "step": 0,
            "zeroed": torch.zeros(groups.total, dtype=torch.bool, device=groups.device),
        }
        parameters = [p for p in module.parameters() if p.requires_grad]
        vectors = 1 if not decay_vectors else -1
        split = [
            {"params": [p for p in parameters if p.ndim > vectors], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim <= vectors], "weight_decay": 0.0},
        ]
        super().__init__([part for part in split if part["params"]], {"lr": lr})

    @property
    def zeroed(self) -> Tensor:
        """Which groups were set to zero for good, ``[total]`` bool."""
        return self.progress["zeroed"]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        directions: dict[int, Tensor] = {}
        rates: dict[int, float] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                directions[id(p)] = self.base.direction(
                    p, p.grad, self.state[p], group["weight_decay"]
                )
                rates[id(p)] = float(group["lr"])
        self.before(directions, rates)
        for group in self.param_groups:
            for p in group["params"]:
                if id(p) in directions:
                    p.add_(directions[id(p)], alpha=-rates[id(p)])
        self.after(rates)
        # Momentum and Adam's moments would bring zeroed groups back.
        if bool(self.zeroed.any()):
            self.groups.silence_(self.zeroed)
        self.progress["step"] += 1
        return loss

    def before(self, directions: Mapping[int, Tensor], rates: Mapping[int, float]) -> None:
        """Called before the base update; may shrink parameters in place."""

    def after(self, rates: Mapping[int, float]) -> None:
        """Called after the base update, before zeroed groups are zeroed again."""

    def statistics(self, directions: Mapping[int, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x.d, |x|^2 and |d|^2 of each group, each ``[total]``."""
        dots, squares, lengths = [], [], []
        for entry in self.groups.entries:
            direction = directions.get(id(entry.tensor))
            if direction is None:
                direction = torch.zeros_like(entry.tensor)
            dots.append(entry.tensor * direction)
            squares.append(entry.tensor.square())
            lengths.append(direction.square())
        return self.groups.sum(dots), self.groups.sum(squares), self.groups.sum(lengths)

    def state_dict(self) -> dict[str, Any]:
        """The state with :attr:`progress`; nested plain values and tensors."""
        state = super().state_dict()
        state["progress"] = {
            key: value.clone() if isinstance(value, Tensor) else value
            for key, value in self.progress.items()
        }
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        super().load_state_dict(
            {"state": state_dict["state"], "param_groups": state_dict["param_groups"]}
        )
        self.progress = {
            key: value.to(self.groups.device).clone() if isinstance(value, Tensor) else value
            for key, value in state_dict["progress"].items()
        }


def redundancy(cosine: Tensor, average: Tensor, live: Tensor | None = None) -> Tensor:
    """OTOv2's redundancy score of groups (high = remove).

    Half of the cosine between x and its gradient (aligned: shrinking lowers the loss) and half of
    the inverse average magnitude, each divided by its L2 norm over the live groups. A group that
    is already zero would absorb the whole second norm, so it stays out of both.

    Args:
        cosine: cosine(x, d) of each group.
        average: |x| / number of elements.
        live: which groups count. Default: those with a magnitude.
    """
    live = average > 0 if live is None else live & (average > 0)
    inverse = 1.0 / (average + 1e-6)
    result = torch.zeros_like(cosine)
    for part in (cosine, inverse):
        norm = torch.linalg.vector_norm(part[live]).clamp(min=1e-30)
        result += 0.5 * part / norm
    return torch.where(live, result, torch.inf)


def penalty_factor(
    dot: Tensor,
    norm: Tensor,
    length: Tensor,
    *,
    penalty: float,
    amplify: float,
    cap: float,
    published_cap: bool = False,
) -> Tensor:
    """DHSPG's factor lambda_g of the direction d = g + lambda_g x/|x| (OTOv2, section 3.2).

    Where x.g >= 0 it is ``penalty``. Elsewhere any value strictly between l_min = -x.g/|x| and
    l_max = -|g|^2 |x|/(x.g) makes d lower both the loss and |x|: amplify * l_min clipped to
    [penalty, penalty * cap], or the middle of the interval where that is l_max or more.

    Args:
        dot: x.g of each group.
        norm: |x|.
        length: |g|.
        penalty: lambda.
        amplify: multiple of l_min.
        cap: largest factor as a multiple of the penalty, but never at or below l_min.
        published_cap: let the cap cut below l_min, as the authors' code does.
    """
    norm = norm.clamp(min=1e-30)
    low = -dot / norm
    high = torch.where(dot < 0, -length.square() * norm / dot, torch.inf)
    wanted = amplify * low
    factor = wanted.clamp(penalty, penalty * cap)
    if not published_cap:
        factor = torch.where(factor <= low, wanted, factor)
    factor = torch.where(factor >= high, 0.5 * (low + high), factor)
    return torch.where(dot >= 0, penalty, factor)


class _HalfSpace(GroupOptimizer):
    """Shrinks candidate groups and projects those that leave their half-space to zero."""

    def __init__(
        self,
        module: nn.Module,
        groups: Groups,
        *,
        start: int,
        penalty: float | None,
        epsilon: float,
        limit: int,
        lr: float,
        base: Base | None,
        weight_decay: float,
        decay_vectors: bool,
    ) -> None:
        super().__init__(
            module,
            groups,
            lr=lr,
            base=base,
            weight_decay=weight_decay,
            decay_vectors=decay_vectors,
        )
        if not 0.0 <= epsilon < 1.0:
            raise InputError(f"epsilon must be in [0, 1), not {epsilon}")
        self.start = start
        self.penalty = self.base.penalty if penalty is None else penalty
        self.epsilon = epsilon
        self.progress["limit"] = limit
        self.progress["candidates"] = torch.zeros_like(self.zeroed)

    def factor(self, dot: Tensor, norm: Tensor, length: Tensor) -> Tensor:
        """lambda_g of each group."""
        return torch.full_like(dot, self.penalty)

    def choose(self, dot: Tensor, norm: Tensor, length: Tensor) -> None:
        """Called in every step, before candidates are used."""

    def before(self, directions: Mapping[int, Tensor], rates: Mapping[int, float]) -> None:
        groups = self.groups
        dot, square, length = self.statistics(directions)
        norm, length = square.sqrt(), length.sqrt()
        self.choose(dot, norm, length)
        active = self.progress["candidates"] & ~self.zeroed & (square > 0)
        if not bool(active.any()):
            return
        factor = self.factor(dot, norm, length) / norm.clamp(min=1e-30)
        factor = torch.where(active, factor, 0.0)
        padded = torch.cat([factor, factor.new_zeros(1)])
        inner = []
        for entry in groups.entries:
            rate = rates.get(id(entry.tensor), 0.0)
            x = entry.tensor
            shrink = 1.0 - rate * entry.spread(padded)
            direction = directions.get(id(x))
            product = x * x * shrink
            # x . trial, before the parameters move.
            inner.append(product if direction is None else product - rate * x * direction)
        inside = groups.sum(inner)
        for entry in groups.entries:
            rate = rates.get(id(entry.tensor), 0.0)
            entry.tensor.mul_(1.0 - rate * entry.spread(padded))
        if self.progress["step"] < self.start:
            return
        leaves = active & (inside < self.epsilon * square)
        room = self.progress["limit"] - int(self.zeroed.sum())
        if int(leaves.sum()) > room:
            depth = torch.where(leaves, inside / square.clamp(min=1e-30), torch.inf)
            deepest = torch.argsort(depth, stable=True)[: max(0, room)]
            leaves = torch.zeros_like(leaves)
            leaves[deepest] = True
        self.progress["zeroed"] = self.zeroed | leaves
        if int(self.zeroed.sum()) >= self.progress["limit"]:
            # The target is reached: candidates that are left train like the others.
            self.progress["candidates"] = self.zeroed.clone()


class DHSPG(_HalfSpace):
    """Dual half-space projected gradient: groups to exact zero at a target sparsity.

    Args:
        module: what is trained.
        groups: its zero-invariant groups.
        target: share of groups to zero.
        start: step at which groups are partitioned and shrinking begins.
        lr: learning rate.
        base: SGD or Adam.
        penalty: lambda. Default: 1e-3 for SGD, 1e-2 for Adam.
        amplify: multiple of the interval's lower end. Default: 2 for SGD, 20 for Adam.
        cap: largest factor over lambda. Default: 10 for SGD, 1e3 for Adam.
        epsilon: half-space threshold; larger projects sooner.
        tolerance: share of groups added to the candidates; the first to leave their half-space
            fill the target, the others are released. Not added with ``divisible`` > 1.
        divisible: units kept in each family are a multiple of this.
        published_cap: see :func:`penalty_factor`.
        weight_decay: on matrices and kernels.
        decay_vectors: decay biases and normalisation parameters too.

    Raises:
        InputError: if the target is not a share or the start is negative.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Groups,
        *,
        target: float,
        start: int,
        lr: float = 0.1,
        base: Base | None = None,
        penalty: float | None = None,
        amplify: float | None = None,
        cap: float | None = None,
        epsilon: float = 0.0,
        tolerance: float = 0.05,
        divisible: int = 1,
        published_cap: bool = False,
        weight_decay: float = 5e-4,
        decay_vectors: bool = False,
    ) -> None:
        _check(target, start)
        super().__init__(
            module,
            groups,
            start=start,
            penalty=penalty,
            epsilon=epsilon,
            limit=round(target * groups.total),
            lr=lr,
            base=base,
            weight_decay=weight_decay,
            decay_vectors=decay_vectors,
        )
        self.amplify = self.base.amplify if amplify is None else amplify
        self.cap = self.base.cap if cap is None else cap
        self.target = target
        self.tolerance = tolerance if divisible == 1 else 0.0
        self.divisible = divisible
        self.published_cap = published_cap

    def factor(self, dot: Tensor, norm: Tensor, length: Tensor) -> Tensor:
        return penalty_factor(
            dot,
            norm,
            length,
            penalty=self.penalty,
            amplify=self.amplify,
            cap=self.cap,
            published_cap=self.published_cap,
        )

    def choose(self, dot: Tensor, norm: Tensor, length: Tensor) -> None:
        if self.progress["step"] != self.start:
            return
        aligned = dot / (norm * length).clamp(min=1e-30)
        score = redundancy(aligned, norm / self.groups.elements)
        count = round((self.target + self.tolerance) * self.groups.total)
        quantum = torch.full((len(self.groups.sizes),), self.divisible, device=score.device)
        live = torch.ones_like(self.zeroed)
        self.progress["candidates"] = allocation.lowest(
            -score, self.groups.family, live, quantum, count
        )


class HSPG(_HalfSpace):
    """Half-space projected gradient without a partition: one penalty on all groups (baseline).

    Args:
        module: what is trained.
        groups: its zero-invariant groups.
        start: step at which projecting begins; shrinking begins at once.
        lr: learning rate.
        base: SGD or Adam.
        penalty: lambda; it alone decides how many groups end at zero.
        epsilon: half-space threshold.
        limit: stop projecting at this share of zero groups.
        weight_decay: on matrices and kernels.
        decay_vectors: decay biases and normalisation parameters too.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Groups,
        *,
        start: int,
        lr: float = 0.1,
        base: Base | None = None,
        penalty: float = 1e-3,
        epsilon: float = 0.0,
        limit: float = 1.0,
        weight_decay: float = 5e-4,
        decay_vectors: bool = False,
    ) -> None:
        # Every family keeps a unit.
        most = min(round(limit * groups.total), groups.total - len(groups.sizes))
        super().__init__(
            module,
            groups,
            start=start,
            penalty=penalty,
            epsilon=epsilon,
            limit=most,
            lr=lr,
            base=base,
            weight_decay=weight_decay,
            decay_vectors=decay_vectors,
        )

    def choose(self, dot: Tensor, norm: Tensor, length: Tensor) -> None:
        if int(self.zeroed.sum()) < self.progress["limit"]:
            # The strongest unit of each family is no candidate, so no family dies.
            strongest = torch.zeros(len(self.groups.sizes), device=norm.device)
            strongest.scatter_reduce_(0, self.groups.family, norm, "amax")
            self.progress["candidates"] = norm < strongest[self.groups.family]


class H2SPG(_HalfSpace):
    """Hierarchical half-space projected gradient: erases whole operators.

    The redundancy score is averaged over the warm-up; at ``start`` operators are taken in order
    of it, those whose loss would cut the last path from input to output are skipped.

    Args:
        module: what is trained.
        space: its erasing search space; its candidates become the groups.
        erase: how many operators; fewer are erased where validity allows no more.
        start: step at which operators are chosen and shrinking begins.
        lr: learning rate.
        base: SGD or Adam.
        penalty: as for :class:`DHSPG`.
        amplify: as for :class:`DHSPG`.
        cap: as for :class:`DHSPG`.
        epsilon: half-space threshold.
        memory: weight of the past in the running average of the score (the paper gives no
            value; .9 is ours).
        weight_decay: on matrices and kernels.
        decay_vectors: decay biases and normalisation parameters too.

    Raises:
        InputError: if the number of operators or the start is negative.
    """

    def __init__(
        self,
        module: nn.Module,
        space: erasing.Space,
        *,
        erase: int,
        start: int,
        lr: float = 0.1,
        base: Base | None = None,
        penalty: float | None = None,
        amplify: float | None = None,
        cap: float | None = None,
        epsilon: float = 0.0,
        memory: float = 0.9,
        weight_decay: float = 5e-4,
        decay_vectors: bool = False,
    ) -> None:
        if erase < 0 or start < 0:
            raise InputError("the number of operators to erase and the start must not be negative")
        groups = Groups.whole(module, [candidate.parameters for candidate in space.candidates])
        super().__init__(
            module,
            groups,
            start=start,
            penalty=penalty,
            epsilon=epsilon,
            limit=erase,
            lr=lr,
            base=base,
            weight_decay=weight_decay,
            decay_vectors=decay_vectors,
        )
        self.space = space
        self.erase = erase
        self.memory = memory
        self.amplify = self.base.amplify if amplify is None else amplify
        self.cap = self.base.cap if cap is None else cap
        self.progress["score"] = torch.zeros(groups.total, device=groups.device)

    def factor(self, dot: Tensor, norm: Tensor, length: Tensor) -> Tensor:
        return penalty_factor(
            dot, norm, length, penalty=self.penalty, amplify=self.amplify, cap=self.cap
        )

    def choose(self, dot: Tensor, norm: Tensor, length: Tensor) -> None:
        if self.progress["step"] > self.start:
            return
        aligned = dot / (norm * length).clamp(min=1e-30)
        score = redundancy(aligned, norm / self.groups.elements)
        average = self.progress["score"]
        average.mul_(self.memory).add_(score, alpha=1.0 - self.memory)
        if self.progress["step"] == self.start:
            chosen = erasing.choose(self.space, average.tolist(), self.erase)
            if len(chosen) < self.erase:
                log.warning(
                    "only %d of %d operators can be erased before the last path from input to "
                    "output is cut",
                    len(chosen),
                    self.erase,
                )
            self.progress["limit"] = len(chosen)
            self.progress["candidates"][chosen] = True


class HESSO(GroupOptimizer):
    """Hybrid efficient structured sparse optimizer: exact sparsity, nothing to tune.

    After ``start`` plain steps the pruning steps are divided into periods. At the start of each
    the live groups are scored by five criteria and the least important batch is chosen, which
    then decays linearly to zero over the period.

    Args:
        module: what is trained.
        groups: its zero-invariant groups.
        target: share of groups to zero.
        cost: in place of a share of groups, what the network costs without the groups of a mask
            ``[total]``; then ``target`` is the largest cost allowed, approached in equal parts
            (this is ours: a share of groups is not a share of MACs).
        start: plain steps before pruning.
        steps: pruning steps.
        periods: equal parts of the pruning steps, each zeroing an equal batch.
        lr: learning rate.
        base: SGD or Adam.
        divisible: units kept in each family are a multiple of this.
        weights: of magnitude, average magnitude, cosine, first- and second-order Taylor.
        published_sign: count gradients aligned with the weights as important.
        published_decay: decay over one step fewer, then one step at zero.
        weight_decay: on matrices and kernels.
        decay_vectors: decay biases and normalisation parameters too.

    Raises:
        InputError: if the target is not a share or there are fewer steps than periods.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Groups,
        *,
        target: float,
        start: int,
        steps: int,
        periods: int = 10,
        cost: Callable[[Tensor], float] | None = None,
        lr: float = 0.1,
        base: Base | None = None,
        divisible: int = 1,
        weights: Sequence[float] = (0.2, 0.2, 0.2, 0.2, 0.2),
        published_sign: bool = False,
        published_decay: bool = False,
        weight_decay: float = 5e-4,
        decay_vectors: bool = False,
    ) -> None:
        _check(0.0 if cost is not None else target, start)
        if periods < 1 or steps < periods:
            raise InputError(
                f"{steps} pruning steps cannot be divided into {periods} periods; train longer "
                "or ask for fewer periods"
            )
        super().__init__(
            module,
            groups,
            lr=lr,
            base=base,
            weight_decay=weight_decay,
            decay_vectors=decay_vectors,
        )
        self.start = start
        self.periods = periods
        self.period = steps // periods
        self.target = round(target * groups.total) if cost is None else target
        self.cost = cost
        self.divisible = divisible
        self.weights = tuple(weights)
        self.published_sign = published_sign
        self.published_decay = published_decay
        self.progress["batch"] = torch.zeros_like(self.zeroed)
        self.progress["protection"] = torch.zeros(groups.total, device=groups.device)

    def importance(self, dot: Tensor, norm: Tensor, length: Tensor, live: Tensor) -> Tensor:
        """The weighted criteria, each divided by its L2 norm over live groups, ``[total]``."""
        aligned = dot / (norm * length).clamp(min=1e-30)
        parts = (
            norm,
            norm / self.groups.elements,
            1.0 + aligned if self.published_sign else 1.0 - aligned,
            dot.abs(),
            0.5 * dot.square(),
        )
        result = torch.zeros_like(norm)
        for weight, part in zip(self.weights, parts, strict=True):
            result += weight * part / torch.linalg.vector_norm(part[live]).clamp(min=1e-30)
        protection = self.progress["protection"]
        return result + protection / torch.linalg.vector_norm(protection[live]).clamp(min=1e-30)

    def before(self, directions: Mapping[int, Tensor], rates: Mapping[int, float]) -> None:
        since = self.progress["step"] - self.start
        number, at = divmod(since, self.period)
        if since < 0 or number >= self.periods or at != 0:
            return
        dot, square, length = self.statistics(directions)
        live = ~self.zeroed
        score = self.importance(dot, square.sqrt(), length.sqrt(), live)
        self.progress["batch"] = self._least(score, live, (number + 1) / self.periods)

    def _least(self, score: Tensor, live: Tensor, share: float) -> Tensor:
        """The least important live groups that bring pruning to ``share`` of its target."""
        groups = self.groups
        quantum = torch.full((len(groups.sizes),), self.divisible, device=score.device)
        if self.cost is None:
            count = round(self.target * share) - int(self.zeroed.sum())
            return allocation.lowest(score, groups.family, live, quantum, count)
        cost, zeroed = self.cost, self.zeroed
        full = cost(torch.zeros_like(zeroed))
        goal = full + min(0.0, self.target - full) * share
        return allocation.reach(
            score, groups.family, live, quantum, lambda mask: cost(mask | zeroed), goal
        )

    def after(self, rates: Mapping[int, float]) -> None:
        since = self.progress["step"] - self.start
        number, at = divmod(since, self.period)
        if since < 0 or number >= self.periods:
            return
        left = self.period - at - (2 if self.published_decay else 1)
        batch = self.progress["batch"]
        if left <= 0:
            self.progress["zeroed"] = self.zeroed | batch
        else:
            self.groups.scale_(torch.where(batch, left / (left + 1), 1.0))

    @torch.no_grad()
    def protect(
        self,
        loss: Callable[[], float],
        *,
        shares: Sequence[float] = (0.25, 0.5, 0.75),
        cycles: int = 10,
    ) -> int:
        """CRIC: finds groups that look redundant but are indispensable, and protects them.

        The candidates (the least important groups up to the target) that were not tried before
        are the violators. In one family at a time the least important quarter, half and three
        quarters of its violators are set to zero, the loss over that of the intact network is
        recorded and the weights are restored; a violator's protection is the mean ratio of the
        trials that zeroed it. With the protection in the score new candidates appear; this goes on
        until there are no new violators. To be called between backward and the first pruning
        step, with gradients in place.

        Args:
            loss: evaluates the network on a fixed batch; must not change it (evaluation mode).
            shares: of a family's violators that are zeroed together.
            cycles: at most.

        Returns:
            Cycles used.
        """
        groups = self.groups
        gradients = {
            id(p): p.grad
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        }
        dot, square, length = self.statistics(gradients)
        live = ~self.zeroed
        before = max(float(loss()), 1e-12)
        tried = torch.zeros_like(live)
        kept = {id(e.tensor): (e.tensor, e.tensor.clone()) for e in groups.entries}
        for cycle in range(cycles):
            score = self.importance(dot, square.sqrt(), length.sqrt(), live)
            violators = self._least(score, live, 1.0) & ~tried
            if not bool(violators.any()):
                return cycle
            tried |= violators
            for family in groups.family[violators].unique().tolist():
                units = torch.nonzero(violators & (groups.family == family)).flatten()
                units = units[torch.argsort(score[units], stable=True)]
                total = torch.zeros_like(score)
                trials = torch.zeros_like(score)
                ratio = 1.0
                for share in sorted(shares):
                    chosen = units[: max(1, round(share * len(units)))]
                    which = torch.zeros_like(live)
                    which[chosen] = True
                    groups.silence_(which)
                    ratio = float(loss()) / before
                    for tensor, value in kept.values():
                        tensor.copy_(value)
                    total[chosen] += ratio
                    trials[chosen] += 1
                # Units past the largest share get what that share cost.
                mean = torch.where(trials > 0, total / trials.clamp(min=1), ratio)
                self.progress["protection"][units] = mean[units]
        return cycles


class ProximalGroupLasso(GroupOptimizer):
    """Group lasso by proximal SGD (baseline): x_g max(0, 1 - lr penalty/|x_g|) after each step.

    Zero groups may come back, and the penalty alone decides how many there are.

    Args:
        module: what is trained.
        groups: its zero-invariant groups.
        start: plain steps before the penalty acts.
        lr: learning rate.
        base: SGD or Adam.
        penalty: lambda.
        weight_decay: on matrices and kernels.
        decay_vectors: decay biases and normalisation parameters too.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Groups,
        *,
        start: int = 0,
        lr: float = 0.1,
        base: Base | None = None,
        penalty: float = 1e-3,
        weight_decay: float = 5e-4,
        decay_vectors: bool = False,
    ) -> None:
        super().__init__(
            module,
            groups,
            lr=lr,
            base=base,
            weight_decay=weight_decay,
            decay_vectors=decay_vectors,
        )
        self.start = start
        self.penalty = penalty

    def after(self, rates: Mapping[int, float]) -> None:
        if self.progress["step"] < self.start or not rates:
            return
        rate = max(rates.values())
        norm = self.groups.norms()
        shrink = (1.0 - rate * self.penalty / norm.clamp(min=1e-30)).clamp(min=0.0)
        self.groups.scale_(shrink)


def _check(target: float, start: int) -> None:
    if not 0.0 <= target < 1.0:
        raise InputError(f"the share of groups to zero must be in [0, 1), not {target}")
    if start < 0:
        raise InputError(f"pruning cannot start at step {start}")


class SparseTraining(Supervised):
    """The supervised rule with a group optimizer: logs sparsity, runs CRIC when asked.

    Args:
        network: what is trained.
        task: gives the loss.
        optimizer: a group optimizer.
        schedule: learning-rate multiplier.
        protect: run CRIC right before HESSO's first pruning step.
    """

    def __init__(
        self,
        network: nn.Module,
        task: Task,
        *,
        optimizer: GroupOptimizer,
        schedule: Callable[[float], float] = cosine,
        protect: bool = False,
    ) -> None:
        super().__init__(
            network,
            task,
            optimizer=optimizer,
            schedule=schedule,
            after_backward=self._protect if protect else None,
        )
        self.batch: Batch = None

    def step(self, batch: Batch) -> Log:
        self.batch = batch
        logged = super().step(batch)
        assert isinstance(self.optimizer, GroupOptimizer)
        return logged | {"sparsity": self.optimizer.zeroed.float().mean()}

    def _protect(self) -> None:
        optimizer = self.optimizer
        if not isinstance(optimizer, HESSO) or optimizer.progress["step"] != optimizer.start:
            return

        def loss() -> float:
            modes = {module: module.training for module in self.network.modules()}
            self.network.eval()
            try:
                return float(self.task.loss(self.network, self.batch))
            finally:
                for module, mode in modes.items():
                    module.training = mode

        optimizer.protect(loss)


@dataclass(frozen=True)
class Construction:
    """What construction made of a trained network.

    Attributes:
        module: the smaller network.
        groups: units (or operators) there were.
        removed: how many of them are gone.
        parameters: of the smaller network.
        macs: of the smaller network, for one sample.
        error: largest difference between its outputs and the full network's, on fresh inputs.
        notes: what surgery had to say.
    """

    module: nn.Module
    groups: int
    removed: int
    parameters: int
    macs: int
    error: float
    notes: tuple[str, ...] = ()


def construct(
    module: nn.Module, dependency: Dependency, *, which: Tensor | None = None
) -> Construction:
    """Cuts the groups that are exactly zero out of a network; its outputs stay.

    Args:
        module: trained; unchanged, on the CPU.
        dependency: its removable families.
        which: groups to cut, ``[total]`` bool over silenceable families, in place of those that
            are zero (then the outputs change).
    """
    groups = Groups.of(module, dependency, silenceable=True)
    removed = groups.zero() if which is None else which.to(groups.device)
    removed = _spare_last(groups, removed)
    removal = groups.removal(removed)
    result = surgery.remove(module, dependency, removal, verify=True)
    cost = dependency.cost(removal)
    return Construction(
        module=result.module,
        groups=groups.total,
        removed=int(removed.sum()),
        parameters=cost.parameters or 0,
        macs=cost.macs or 0,
        error=output_difference(module, result.module, dependency.graph.example_inputs),
        notes=result.notes,
    )


def output_difference(
    full: nn.Module, small: nn.Module, example_inputs: Sequence[Any], *, seed: int = 0
) -> float:
    """Largest absolute difference of two networks' outputs in evaluation mode, random inputs."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [
        torch.randn(x.shape, generator=generator)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for x in example_inputs
    ]
    answers = []
    for network in (full, small):
        with evaluating(network):
            answers.append([t for t in pytree.tree_leaves(network(*inputs))])
    return max(
        float((one - two).abs().max())
        for one, two in zip(*answers, strict=True)
        if isinstance(one, Tensor)
    )


def _spare_last(groups: Groups, removed: Tensor) -> Tensor:
    """Surgery keeps one unit of every family, also of one that is zero throughout."""
    left = torch.zeros(len(groups.sizes), dtype=torch.long, device=groups.device)
    left.index_add_(0, groups.family, (~removed).long())
    starts = torch.tensor(groups.sizes).cumsum(0) - torch.tensor(groups.sizes)
    first = starts.to(groups.device)[left == 0]
    removed = removed.clone()
    removed[first] = False
    return removed


def otov3(
    network: Network,
    task: Task,
    *,
    optimizer: Literal["hesso", "dhspg", "h2spg", "hspg", "group-lasso"] = "hesso",
    target: float = 0.5,
    macs: float | None = None,
    parameters: float | None = None,
    erase: int = 3,
    epochs: int = 60,
    batch_size: int = 128,
    lr: float = 0.1,
    base: Base | None = None,
    weight_decay: float = 5e-4,
    start: float = 0.2,
    duration: float = 0.4,
    periods: int = 10,
    divisible: int = 1,
    penalty: float | None = None,
    epsilon: float = 0.0,
    protect: bool = False,
    schedule: Callable[[float], float] = cosine,
    seed: int = 0,
    checkpoint: Path | None = None,
    cpu: bool = False,
) -> Network:
    """Trains a network once and constructs the smaller one; no fine-tuning.

    Args:
        network: fresh or pretrained; unchanged.
        task: what it learns.
        optimizer: HESSO (exact target, nothing to tune), DHSPG, H2SPG (erases operators), or
            the baselines HSPG and proximal group lasso (their penalty decides how much goes).
        target: share of groups to remove (HESSO, DHSPG; an upper limit for HSPG).
        macs: keep at most this share of the MACs, in place of ``target`` (HESSO).
        parameters: keep at most this share of the parameters, in place of ``target`` (HESSO).
        erase: operators to erase (H2SPG).
        epochs: of the one training run.
        batch_size: samples a batch.
        lr: learning rate.
        base: SGD or Adam under the optimizer. Default: SGD with Nesterov momentum .9.
        weight_decay: on matrices and kernels.
        start: share of training before pruning begins.
        duration: share of training over which HESSO prunes; the rest recovers.
        periods: of HESSO.
        divisible: units kept in each family are a multiple of this (HESSO, DHSPG).
        penalty: lambda. Default: each optimizer's.
        epsilon: half-space threshold.
        protect: run CRIC before HESSO prunes.
        schedule: learning-rate multiplier over the fraction of training.
        seed: of data order and inputs.
        checkpoint: file that holds the run's state; an interrupted run resumes from it.
        cpu: stay on the CPU although there is a GPU.

    Raises:
        InputError: if options do not fit together, or training is too short.
        BudgetError: if MACs or parameters cannot be met.
        UnsupportedError: if the network cannot be traced or has nothing to remove.
    """
    module = copy.deepcopy(network.module)
    if optimizer == "h2spg":
        graph = Graph.trace(module, network.example_inputs)
        space = erasing.Space.of(graph)
        before = graph
        dependency = None
    else:
        dependency = analyse(module, network.example_inputs)
        before = dependency.graph
        space = None
    full = {"parameters": before.parameters, "macs": before.macs}
    budgets = {"parameters": parameters, "macs": macs}
    given = {name: value for name, value in budgets.items() if value is not None}
    if given and (optimizer != "hesso" or len(given) > 1):
        raise InputError("one budget of MACs or parameters can be given, to HESSO only")
    for name, value in given.items():
        if not 0.0 < value <= 1.0:
            raise InputError(f"{name} must be a share in (0, 1], not {value}")
    device = torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
    module.to(device)
    total = epochs * task.steps_per_epoch("train", batch_size)
    begin = round(start * total)
    chosen = _optimizer(
        module,
        dependency,
        space,
        optimizer,
        target=target,
        budget={name: value * full[name] for name, value in given.items()},
        erase=erase,
        start=begin,
        steps=round(duration * total),
        periods=periods,
        divisible=divisible,
        penalty=penalty,
        epsilon=epsilon,
        lr=lr,
        base=base,
        weight_decay=weight_decay,
    )
    rule = SparseTraining(module, task, optimizer=chosen, schedule=schedule, protect=protect)
    history = fit(
        rule,
        task,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        checkpoint=checkpoint,
        cpu=cpu,
        title=optimizer,
    )
    module.cpu().eval()
    if not _reads(before, module):
        # Moving to the GPU and back made new buffers; the trace must read those of now.
        before = Graph.trace(module, network.example_inputs)
        dependency = None if dependency is None else Dependency(before)
    if space is not None:
        gone = torch.nonzero(chosen.groups.zero()).flatten().tolist()
        if not space.is_valid(gone):
            raise InputError("every path from input to output became zero; lower the penalty")
        small = erasing.erase(module, before, erasing.Space.of(before), gone)
        made = Construction(
            module=small,
            groups=chosen.groups.total,
            removed=len(gone),
            parameters=sum(p.numel() for p in small.parameters()),
            macs=Graph.trace(small, network.example_inputs).macs,
            error=output_difference(module, small, network.example_inputs),
        )
        names = [space.candidates[i].name for i in gone]
    else:
        assert dependency is not None
        made = construct(module, dependency)
        names = []
    report = {
        "groups": made.groups,
        "removed": made.removed,
        "sparsity": made.removed / made.groups,
        "erased": names,
        "output_difference": made.error,
        "parameters": [full["parameters"], made.parameters],
        "macs": [full["macs"], made.macs],
        "loss": history.loss[-1] if history.loss else None,
        "seconds": history.seconds,
        "notes": list(made.notes),
    }
    options = {
        "optimizer": optimizer,
        **({} if given else {"target": target}),
        **given,
        "erase": erase,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "start": start,
        "duration": duration,
        "periods": periods,
        "divisible": divisible,
        "seed": seed,
    }
    return network.after("otov3", options, report, module=made.module)


def _reads(graph: Graph, module: nn.Module) -> bool:
    """Whether a trace's tensors are still those of the module."""
    now = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return all(
        now[name].data_ptr() == tensor.data_ptr()
        for name, tensor in graph.tensors.items()
        if graph.kinds[name] != "constant"
    )


def _cost(dependency: Dependency, groups: Groups, what: str) -> Callable[[Tensor], float]:
    """MACs or parameters of the network without the groups of a mask."""
    return lambda mask: float(getattr(dependency.cost(groups.removal(mask)), what))


def _optimizer(
    module: nn.Module,
    dependency: Dependency | None,
    space: erasing.Space | None,
    name: str,
    *,
    target: float,
    budget: Mapping[str, float],
    erase: int,
    start: int,
    steps: int,
    periods: int,
    divisible: int,
    penalty: float | None,
    epsilon: float,
    lr: float,
    base: Base | None,
    weight_decay: float,
) -> GroupOptimizer:
    if space is not None:
        return H2SPG(
            module,
            space,
            erase=erase,
            start=start,
            penalty=penalty,
            epsilon=epsilon,
            lr=lr,
            base=base,
            weight_decay=weight_decay,
        )
    assert dependency is not None
    groups = Groups.of(module, dependency, silenceable=True)
    if name == "hesso":
        cost = None
        for what, value in budget.items():
            target, cost = value, _cost(dependency, groups, what)
        return HESSO(
            module,
            groups,
            target=target,
            cost=cost,
            start=start,
            steps=steps,
            periods=periods,
            divisible=divisible,
            lr=lr,
            base=base,
            weight_decay=weight_decay,
        )
    if name == "dhspg":
        return DHSPG(
            module,
            groups,
            target=target,
            start=start,
            penalty=penalty,
            epsilon=epsilon,
            divisible=divisible,
            lr=lr,
            base=base,
            weight_decay=weight_decay,
        )
    if name == "hspg":
        return HSPG(
            module,
            groups,
            start=start,
            penalty=1e-3 if penalty is None else penalty,
            epsilon=epsilon,
            limit=target,
            lr=lr,
            base=base,
            weight_decay=weight_decay,
        )
    if name == "group-lasso":
        return ProximalGroupLasso(
            module,
            groups,
            start=start,
            penalty=1e-3 if penalty is None else penalty,
            lr=lr,
            base=base,
            weight_decay=weight_decay,
        )
    raise InputError(
        f"there is no optimizer {name}; there are hesso, dhspg, h2spg, hspg and group-lasso"
    )
