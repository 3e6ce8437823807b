"""Delta pruning: fine-tuned networks stored as one base and sparse differences.

Most of what fine-tuning changed can be dropped. DARE drops each entry with probability p and
divides the others by 1 - p; DAREx-q divides by a larger q, which trades bias for variance and holds
where p is extreme; DAREx-L2 trains with AdamR (:mod:`gossamer.parts.anchored_adam`) so that the
differences are small. Where they are large and training is over, the important entries are kept
instead. Several differences can be kept beside one base, or added into one network.

Source: Deng, Zhao, Vakilian, Chen, Li and Thrampoulidis, "DARE the Extreme: Revisiting
Delta-Parameter Pruning For Fine-Tuned Models", ICLR 2025, arXiv:2410.09344, and its published code
where the paper is silent. Merging baselines: task arithmetic (Ilharco et al., ICLR 2023,
arXiv:2212.04089) and TIES (Yadav et al., NeurIPS 2023, arXiv:2306.01708).

What differs from the published code, each on purpose: masks are drawn for each tensor by name, not
in the order of a dict; the analytic rule uses |S| where the code has the signed sum (``signed``
gives theirs) and scans in float64 without the guard that ends the scan early (``guard`` gives it);
inputs that pad a text count in mean inputs as any other.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.compress.prune.post_training import LayerInputs, kept_in_rows, wanda_scores
from gossamer.compress.prune.rate_distortion import calibration_inputs
from gossamer.core.errors import InputError
from gossamer.core.fit import Log, Rule, Supervised, cosine, fit
from gossamer.core.graph import GraphNetwork, level_of
from gossamer.core.network import Network
from gossamer.core.saved import WEIGHTS_FILE, read_weights
from gossamer.core.task import (
    Batch,
    Task,
    device_of,
    evaluating,
    logits_of,
    seed_of,
    to_device,
)
from gossamer.parts.anchored_adam import AdamR
from gossamer.parts.masks import multiplied_weights
from gossamer.parts.packed import PackedNetwork
from gossamer.parts.seeded import (
    SeededTensor,
    Unit,
    divided,
    key_of,
    random_kept,
    threshold_of,
)
from gossamer.parts.sparse import SparseTensor
from gossamer.parts.stored import Stored
from gossamer.parts.swap import swapped

Weights = nn.Module | Mapping[str, Tensor]
"""A network, or its parameters by the names that the original modules gave."""
Divisor = float | Mapping[str, Tensor]
"""q: one for the network, or for each tensor ``[1]`` or ``[rows]``."""
Method = Literal["random", "rows", "columns", "magnitude", "wanda"]
"""Which entries stay: random ones, random rows or columns of matrices, the largest of each tensor,
or in each row the largest by |D_ij| times the norm of input j."""
METHODS: tuple[Method, ...] = ("random", "rows", "columns", "magnitude", "wanda")
DECODER = ("mlp", "self_attn")
"""What of a decoder is dropped in the paper; everything else is copied."""

_ROWS = "rows:"


# What fine-tuning changed ---------------------------------------------------------------------


def parameters_of(weights: Weights) -> dict[str, Tensor]:
    """Parameters by the names that the original modules gave; tied ones once."""
    if isinstance(weights, nn.Module):
        level = level_of(weights)
        return {n.removeprefix(level): p.detach() for n, p in weights.named_parameters()}
    return dict(weights)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The parameters and buffers of a network on disk.

    Args:
        path: a folder written by gossamer, a folder with ``model.safetensors``, or a safetensors
            file.

    Raises:
        InputError: if it is none of these.
    """
    path = Path(path)
    for file in (path / WEIGHTS_FILE, path / "model.safetensors"):
        if file.is_file():
            return read_weights(file)
    if path.is_dir():
        raise InputError(f"{path} holds neither {WEIGHTS_FILE} nor model.safetensors")
    return read_weights(path)


def _part_of(name: str, parts: Collection[str]) -> bool:
    return any(f".{part}." in f".{name}." for part in parts)


def fingerprint_of(base: Mapping[str, Tensor], names: Collection[str]) -> str:
    """Changes when one of the named base weights does."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(names):
        if name in base:
            digest.update(name.encode())
            bits = base[name].detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(bits.numpy().tobytes())
    return digest.hexdigest()


def _vocabulary(module: nn.Module) -> set[str]:
    """Parameters whose rows are tokens: tables, and the layer that answers tokens."""
    level, found = level_of(module), set()
    output = getattr(module, "get_output_embeddings", lambda: None)()
    tables = {id(m) for m in module.modules() if isinstance(m, nn.Embedding)} | {id(output)}
    for path, owner in module.named_modules():
        if id(owner) in tables:
            found |= {f"{path}.{n}".removeprefix(level) for n, _ in owner.named_parameters()}
    return found


@dataclass(frozen=True)
class Change(ABC):
    """What is added to a base network, and what replaces parts of it.

    Attributes:
        rest: tensors of the fine-tuned network as they are (heads, buffers, what is left out).
        rows: rows of a larger vocabulary that the base does not have.
        base: fingerprint of the base weights that are added to.
    """

    rest: Mapping[str, Tensor]
    rows: Mapping[str, Tensor]
    base: str

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """The tensors that are added to."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """What is added to one tensor."""

    def state(self, base: Weights) -> dict[str, Tensor]:
        """The tensors of the network that base and change give.

        Raises:
            InputError: if the base is not the one that this was taken from.
        """
        own = parameters_of(base)
        if fingerprint_of(own, self.names) != self.base:
            raise InputError(
                "the weights of the base are not those that the delta was taken from; "
                "use the same base network"
            )
        state = dict(self.rest)
        for name in self.names:
            added = self.tensor(name)
            start = own[name][: len(added)]
            made = (start.to(added.dtype) + added.to(start.device)).to(start.dtype)
            if name in self.rows:
                made = torch.cat([made, self.rows[name].to(made)])
            state[name] = made
        return state

    def apply(self, base: Weights, structure: nn.Module | None = None) -> nn.Module:
        """The network that base and change give, in evaluation mode.

        Args:
            base: unchanged.
            structure: a network with the fine-tuned one's modules, unchanged. Default: the base.

        Raises:
            InputError: if the base is another one, or the structure does not fit.
        """
        if structure is None:
            if not isinstance(base, nn.Module):
                raise InputError("weights alone give no network; give its structure too")
            structure = base
        module = copy.deepcopy(structure)
        load_into(module, self.state(base))
        return module.eval()


def load_into(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Puts tensors into a network; tables of another height are exchanged, ties stay tied.

    Raises:
        InputError: if the network has no tensor of a name.
    """
    level = level_of(module)
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for owner in module.modules():
        for leaf, parameter in owner._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((owner, leaf))
    own = dict(module.named_parameters(remove_duplicate=False))
    buffers = dict(module.named_buffers())
    for name, tensor in state.items():
        full = level + name
        if full in buffers:
            buffers[full].copy_(tensor)
        elif full in own and own[full].shape == tensor.shape:
            with torch.no_grad():
                own[full].copy_(tensor)
        elif full in own and own[full].shape[1:] == tensor.shape[1:]:
            new = nn.Parameter(tensor.to(own[full]), own[full].requires_grad)
            for owner, leaf in places[id(own[full])]:
                owner._parameters[leaf] = new
                for size in ("num_embeddings", "out_features"):
                    if hasattr(owner, size):
                        setattr(owner, size, len(tensor))
        elif full in own or not isinstance(module, GraphNetwork):
            raise InputError(f"the network has no tensor {name} of shape {tuple(tensor.shape)}")


@dataclass(frozen=True)
class Delta(Change):
    """What fine-tuning changed, whole.

    Attributes:
        changes: fine-tuned minus base, by name; of a grown or cut vocabulary the common rows.
        relative_size: norm of the changes over the norm of the base weights they belong to.
    """

    changes: Mapping[str, Tensor] = field(default_factory=dict)
    relative_size: float = 0.0

    @property
    def names(self) -> list[str]:
        return list(self.changes)

    def tensor(self, name: str) -> Tensor:
        return self.changes[name]

    @property
    def entries(self) -> int:
        """How many numbers changed or might have."""
        return sum(change.numel() for change in self.changes.values())

    @classmethod
    def from_models(
        cls,
        base: Weights,
        tuned: nn.Module,
        *,
        include: Collection[str] | None = None,
        exclude: Collection[str] = ("classifier",),
    ) -> Delta:
        """The difference of two networks.

        Args:
            base: before fine-tuning.
            tuned: after it. Its buffers, and parameters that are left out or are single numbers,
                are kept as they are.
            include: parts of names that are taken (:data:`DECODER` for decoders). Default: all.
            exclude: parts of names that are left out (heads).

        Raises:
            InputError: if the networks differ in more than their weights.
        """
        before, after = parameters_of(base), parameters_of(tuned)
        level = level_of(tuned)
        rest = {n.removeprefix(level): b.detach().clone() for n, b in tuned.named_buffers()
                if n in tuned.state_dict()}  # fmt: skip
        tables = _vocabulary(tuned)
        changes: dict[str, Tensor] = {}
        rows: dict[str, Tensor] = {}
        squares = [0.0, 0.0]
        for name, value in after.items():
            taken = include is None or _part_of(name, include)
            # A single number has no entries of which some could stay.
            plain = not value.is_floating_point() or not value.ndim
            if not taken or _part_of(name, exclude) or plain:
                rest[name] = value.clone()
                continue
            if name not in before:
                raise InputError(f"the networks differ: the base has no parameter {name}")
            start = before[name].to(value.device)
            if start.shape != value.shape:
                if name not in tables or start.shape[1:] != value.shape[1:]:
                    raise InputError(
                        f"the networks differ: {name} has shape {tuple(start.shape)} in the base "
                        f"and {tuple(value.shape)} in the fine-tuned network"
                    )
                common = min(len(start), len(value))
                if len(value) > common:
                    rows[name] = value[common:].clone()
                start, value = start[:common], value[:common]
            changes[name] = value.float() - start.float()
            squares[0] += float(changes[name].double().square().sum())
            squares[1] += float(start.double().square().sum())
        extra = [n for n in before if n not in after and n not in rest and not _part_of(n, exclude)]
        if extra and isinstance(base, nn.Module):
            raise InputError(f"the networks differ: only the base has a parameter {extra[0]}")
        if not changes:
            raise InputError("nothing is left of the networks to take a difference of")
        if not all(bool(torch.isfinite(change).all()) for change in changes.values()):
            raise InputError("the difference of the networks holds NaN or infinity")
        return cls(
            rest, rows, fingerprint_of(before, changes), changes,
            math.sqrt(squares[0] / squares[1]) if squares[1] else math.inf,
        )  # fmt: skip

    def keep(
        self,
        p: float,
        method: Method = "random",
        *,
        moments: Mapping[str, InputMoments] | None = None,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """Which entries stay: bool, by name.

        Args:
            p: drop rate in [0, 1).
            method: see :data:`Method`.
            moments: of the inputs of each layer, for "wanda" (:func:`input_moments`); tensors
                without are ranked by magnitude.
            seed: of random methods.
        """
        _check_rate(p, method)
        if method == "wanda" and moments is None:
            raise InputError("wanda ranks by what weights are multiplied with; give moments")
        kept: dict[str, Tensor] = {}
        for name, change in self.changes.items():
            found = (moments or {}).get(name)
            if method in ("random", "rows", "columns"):
                mask = random_kept(change.shape, threshold_of(p), key_of(seed, name), _unit(method))
            elif method == "wanda" and found is not None:
                scores = wanda_scores(change.flatten(1), found.norms.to(change))
                mask = kept_in_rows(scores, p).view_as(change)
            else:
                mask = kept_in_rows(change.abs().reshape(1, -1), p).view_as(change)
            kept[name] = mask.to(change.device)
        return kept

    def drop(
        self,
        p: float,
        *,
        method: Method = "random",
        q: Divisor | None = None,
        moments: Mapping[str, InputMoments] | None = None,
        seed: int = 0,
        coded: Literal["seed", "index"] = "seed",
    ) -> SparseDelta:
        """Drops a share ``p`` of the entries and divides the others by ``q``.

        Args:
            p: drop rate in [0, 1).
            method: see :data:`Method`.
            q: what remains is divided by it. Default: 1 - p for random methods (DARE), 1 for those
                that keep important entries.
            moments: see :meth:`keep`.
            seed: of random methods.
            coded: of random methods: store a seed, or places.

        Raises:
            InputError: if an option is out of range.
        """
        _check_rate(p, method)
        random = method in ("random", "rows", "columns")
        if q is None:
            q = 1.0 - p if random else 1.0
        _check_divisor(q)
        tensors: dict[str, Stored] = {}
        kept = (
            {} if random and coded == "seed" else self.keep(p, method, moments=moments, seed=seed)
        )
        for name, change in self.changes.items():
            by = _divisor_of(q, name)
            if name in kept:
                sparse = divided(change.masked_fill(~kept[name], 0.0), by)
                tensors[name] = SparseTensor.of(sparse)
            else:
                tensors[name] = SeededTensor.of(
                    change, p, divisor=by, seed=seed, name=name, unit=_unit(method)
                )
        return SparseDelta(self.rest, self.rows, self.base, tensors)


@dataclass(frozen=True)
class SparseDelta(Change):
    """A change of which little is stored.

    Attributes:
        tensors: what is added, by name, in stored form.
    """

    tensors: Mapping[str, Stored] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return list(self.tensors)

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name].decode()

    @property
    def entries(self) -> int:
        """How many numbers there were."""
        return sum(math.prod(stored.shape) for stored in self.tensors.values())

    @property
    def stored(self) -> int:
        """How many numbers are stored of them."""
        return sum(stored.arrays()["v"].numel() for stored in self.tensors.values())

    def nbytes(self) -> int:
        """Bytes of all that is stored, without the file's header."""
        return self._packed().nbytes() + self._packed().plain_nbytes()

    def _packed(self) -> PackedNetwork:
        plain = dict(self.rest) | {_ROWS + name: rows for name, rows in self.rows.items()}
        return PackedNetwork(self.tensors, plain, {}, {"delta of": self.base})

    def save(self, path: str | Path) -> None:
        """Writes one file, in one rename."""
        self._packed().save(Path(path))

    @classmethod
    def load(cls, path: str | Path) -> SparseDelta:
        """Reads what :meth:`save` wrote.

        Raises:
            InputError: if the file is missing, damaged or holds no delta.
        """
        packed = PackedNetwork.load(Path(path))
        base = packed.about.get("delta of")
        if not isinstance(base, str) or packed.ties:
            raise InputError(f"{path} holds a packed network, not a delta")
        rows = {n.removeprefix(_ROWS): t for n, t in packed.plain.items() if n.startswith(_ROWS)}
        rest = {n: t for n, t in packed.plain.items() if not n.startswith(_ROWS)}
        return cls(rest, rows, base, packed.tensors)


class TaskBank:
    """One base in memory and the deltas of many tasks on disk, loaded when they are asked for.

    Args:
        base: the network that all were fine-tuned from.
        files: of the deltas, by task.
    """

    def __init__(self, base: nn.Module, files: Mapping[str, str | Path]) -> None:
        self.base = base
        self.files = {name: Path(file) for name, file in files.items()}

    def network(self, task: str, structure: nn.Module | None = None) -> nn.Module:
        """The network of one task.

        Raises:
            InputError: if there is no such task, or its file does not fit the base.
        """
        if task not in self.files:
            raise InputError(f"there is no task {task!r:.60}; there are {', '.join(self.files)}")
        return SparseDelta.load(self.files[task]).apply(self.base, structure)

    def nbytes(self) -> int:
        """Bytes of the base's weights and of all files."""
        base = sum(p.numel() * p.element_size() for p in parameters_of(self.base).values())
        return base + sum(file.stat().st_size for file in self.files.values())


def _unit(method: Method) -> Unit:
    return method if method in ("rows", "columns") else "entries"


def _check_rate(p: float, method: str) -> None:
    if method not in METHODS:
        raise InputError(f"the method is one of {', '.join(METHODS)}, not {method!r:.40}")
    threshold_of(p)


def _check_divisor(q: Divisor) -> None:
    for value in q.values() if isinstance(q, Mapping) else (torch.tensor(float(q)),):
        if not bool((value > 0.0).all()):
            raise InputError("q is what remaining entries are divided by, so it is above 0")


def _divisor_of(q: Divisor, name: str) -> float | Tensor:
    if not isinstance(q, Mapping):
        return float(q)
    if name not in q:
        raise InputError(f"there is no q for {name}")
    return q[name]


# The output error of one layer ----------------------------------------------------------------


def sub_gaussian(p: float) -> float:
    """Phi(p): variance proxy of a centred Bernoulli variable, times 2; 1/2 at p = 1/2."""
    if not 0.0 < p < 1.0:
        raise InputError(f"the drop rate is between 0 and 1, not {p}")
    if abs(p - 0.5) < 1e-9:
        return 0.5
    return (1.0 - 2.0 * p) / math.log((1.0 - p) / p)


def output_error(c: Tensor, p: float, q: float) -> tuple[Tensor, Tensor]:
    """Mean and variance of ``sum_j c_j (1 - m_j / q)`` over masks, for each row of ``c``.

    Args:
        c: ``[..., inputs]``, delta times input.
        p: drop rate.
        q: divisor.
    """
    return (
        (1.0 - (1.0 - p) / q) * c.sum(-1),
        p * (1.0 - p) / q**2 * c.square().sum(-1),
    )


def output_bound(c: Tensor, p: float, gamma: float) -> Tensor:
    """DARE's output error exceeds this with probability ``gamma`` at most (the appendix's form)."""
    return (
        math.sqrt(sub_gaussian(p)) / (1.0 - p) * c.square().sum(-1).sqrt()
        * math.sqrt(math.log(2.0 / gamma))
    )  # fmt: skip


def mse_divisor(p: float, square_of_sum: Tensor, sum_of_squares: Tensor) -> Tensor:
    """q of the least mean squared output error, ``(1 - p) + p Q / S^2``, not above 1.

    Args:
        p: drop rate.
        square_of_sum: S^2 of each row, or its mean over inputs.
        sum_of_squares: Q of each row, or its mean over inputs.
    """
    safe = torch.where(square_of_sum > 0.0, square_of_sum, torch.ones_like(square_of_sum))
    best = (1.0 - p) + p * sum_of_squares / safe
    return torch.where(square_of_sum > 0.0, best, torch.ones_like(best)).clamp(max=1.0)


def analytic_divisor(
    c: Tensor,
    p: float,
    eta: float,
    *,
    confidence: float = 0.95,
    signed: bool = False,
    guard: float | None = None,
) -> Tensor:
    """q of each row by the bound of the output error, on the grid of thousandths.

    Args:
        c: delta times mean input, ``[rows, inputs]``.
        p: drop rate.
        eta: weight of bias against spread; found by search.
        confidence: of the bound.
        signed: use S as it is, as the published code does, in place of |S|.
        guard: end the scan when this share of the rows no longer improves (.8 in the published
            code, whose float16 sums tie often). Default: scan all.

    Returns:
        ``[rows]``.
    """
    c = c.double()
    total, energy = c.sum(1), c.square().sum(1)
    total = total if signed else total.abs()
    first = max(1, int(1000 * (1.0 - p)))
    grid = torch.arange(first, 999, dtype=torch.float64, device=c.device) / 1000.0
    if not len(grid):
        return torch.full((len(c),), 0.998, dtype=torch.float64, device=c.device)
    shift = eta * (1.0 - (1.0 - p) / grid)
    spread = eta**2 * sub_gaussian(p) / (4.0 * grid**2)
    level = math.log(2.0 / (1.0 - confidence))
    found = []
    for part in range(0, len(c), 4096):
        rows = slice(part, part + 4096)
        values = (shift[:, None] * total[rows] + spread[:, None] * energy[rows] + level).abs()
        found.append(values)
    values = torch.cat(found, 1)
    if guard is not None and len(grid) > 1:
        stuck = (values[1:] >= values.cummin(0).values[:-1]).double().mean(1) >= guard
        if bool(stuck.any()):
            values = values[: int(stuck.nonzero()[0]) + 2]
    return grid[values.argmin(0)]


@dataclass(frozen=True)
class InputMoments:
    """What a layer is multiplied with, over calibration inputs.

    Attributes:
        mean: ``[inputs]``.
        second: mean of x x^T, ``[inputs, inputs]``.
        count: positions.
    """

    mean: Tensor
    second: Tensor
    count: int

    @property
    def norms(self) -> Tensor:
        """L2 norm of each input over all positions, ``[inputs]``."""
        return (self.second.diagonal() * self.count).sqrt()


def input_moments(
    module: nn.Module, example_inputs: Sequence[Any], inputs: Sequence[tuple[Any, ...]]
) -> dict[str, InputMoments]:
    """Moments of the inputs of every multiplied weight, by the names of :func:`parameters_of`.

    Args:
        module: the fine-tuned network; a convolution's inputs are its patches.
        example_inputs: for tracing it.
        inputs: calibration inputs, batch by batch.
    """
    module = copy.deepcopy(module).cpu().eval()
    names = list(multiplied_weights(module, example_inputs))
    watched = LayerInputs(module, example_inputs, names)
    sums: dict[str, list[Any]] = {}

    def see(name: str, rows: Tensor) -> None:
        total = sums.setdefault(name, [0.0, 0.0, 0])
        total[0] = total[0] + rows.sum(0)
        total[1] = total[1] + rows.T @ rows
        total[2] += len(rows)

    watched.visit(list(watched.places), to_device(list(inputs), torch.device("cpu")), see)
    level = level_of(module)
    return {
        name.removeprefix(level): InputMoments(s / n, m / n, n) for name, (s, m, n) in sums.items()
    }


# Choosing q -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Search:
    """A search over one number.

    Attributes:
        value: the best.
        score: its mean score.
        tried: every value with its score.
    """

    value: float
    score: float
    tried: tuple[tuple[float, float], ...]


def steady_mean(scores: Sequence[float]) -> float:
    """The mean; of three scores or more the one furthest from the median is left out."""
    values = np.asarray(scores, dtype=np.float64)
    if len(values) >= 3:
        values = np.delete(values, np.abs(values - np.median(values)).argmax())
    return float(values.mean())


def search_divisor(
    score: Callable[[float, int], float],
    p: float,
    *,
    seeds: Sequence[int] = (0, 1, 2, 3),
    step: float = 0.05,
    patience: int = 4,
    below: bool = False,
) -> Search:
    """Searches q in [1 - p, 1] by a score, first coarse, then in tenths of the step.

    Args:
        score: ``(q, mask seed)`` to a number, higher is better.
        p: drop rate.
        seeds: of the masks; scores are averaged (:func:`steady_mean`).
        step: of the coarse grid.
        patience: coarse steps without a better score after which it ends.
        below: whether the fine grid may go below 1 - p (the published code's way with decoders).
    """
    low = 1.0 - p
    tried: dict[float, float] = {}

    def visit(q: float) -> float:
        q = round(q, 6)
        if q not in tried:
            tried[q] = steady_mean([score(q, seed) for seed in seeds])
        return tried[q]

    best, stale, at = None, 0, low
    while at <= 1.0 + 1e-9 and stale < patience:
        found = visit(at)
        if best is None or found > tried[best]:
            best, stale = round(at, 6), 0
        else:
            stale += 1
        at += step
    if best is None:
        raise InputError("the search for q tried nothing")
    begin = max(0.1 * step if below else low + 0.1 * step, best - 0.9 * step)
    for q in np.arange(begin, min(best + step, 1.0) + 1e-9, 0.1 * step):
        visit(float(q))
    value = max(tried, key=lambda q: tried[q])
    return Search(value, tried[value], tuple(tried.items()))


def search_eta(
    score: Callable[[float, int], float],
    *,
    seeds: Sequence[int] = (0, 1, 2, 3),
    low: float = 0.003,
    high: float = 3.0,
    coarse: int = 13,
    fine: int = 8,
) -> Search:
    """Searches the weight of the analytic rule on a geometric grid, then between the neighbours.

    The published values (.27 to 1.01) belong to a scan in float16 that ends early; an exact one
    wants others, so the grid is wide.

    Args:
        score: ``(eta, mask seed)`` to a number, higher is better.
        seeds: of the masks.
        low: least eta.
        high: largest eta.
        coarse: steps of the first grid.
        fine: steps of the second.
    """
    tried: dict[float, float] = {}

    def visit(etas: Sequence[float]) -> float:
        for eta in etas:
            tried[eta] = steady_mean([score(eta, seed) for seed in seeds])
        return max(tried, key=lambda eta: tried[eta])

    grid = [float(eta) for eta in np.geomspace(low, high, coarse)]
    best = grid.index(visit(grid))
    around = np.geomspace(grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)], fine + 2)
    value = visit([float(eta) for eta in around[1:-1] if float(eta) not in tried])
    return Search(value, tried[value], tuple(tried.items()))


class OutputChange:
    """How far a pruned network's answers are from the unpruned one's, on inputs without labels.

    With "hidden" the mean |difference| of the last hidden state (of networks of transformers; of
    others, of the logits); with "top" the mean squared difference of the unpruned network's
    largest logits.

    Args:
        module: unpruned.
        inputs: batches of inputs.
        measure: "hidden" (encoders) or "top" (decoders).
        top: how many logits.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Sequence[tuple[Any, ...]],
        *,
        measure: Literal["hidden", "top"] = "hidden",
        top: int = 5,
    ) -> None:
        self.measure = measure
        self.top = top
        self.inputs = to_device(list(inputs), device_of(module))
        with evaluating(module):
            self.wanted = [self._answer(module, batch) for batch in self.inputs]

    def _answer(self, module: nn.Module, batch: tuple[Any, ...]) -> Tensor:
        config = getattr(module, "config", None)
        if self.measure == "hidden" and hasattr(config, "output_hidden_states"):
            return module(*batch, output_hidden_states=True).hidden_states[-1]
        return logits_of(module(*batch))

    def __call__(self, module: nn.Module) -> float:
        """The change of ``module``'s answers."""
        total, count = 0.0, 0
        with evaluating(module):
            for batch, wanted in zip(self.inputs, self.wanted, strict=True):
                found = self._answer(module, batch)
                if self.measure == "top":
                    total += float(top_difference(found, wanted, self.top)) * len(wanted)
                else:
                    total += float((found - wanted).abs().mean()) * len(wanted)
                count += len(wanted)
        return total / count


def top_difference(found: Tensor, wanted: Tensor, top: int = 5) -> Tensor:
    """Mean squared difference of the largest logits of ``wanted`` ``[..., classes]``."""
    values, places = wanted.topk(min(top, wanted.shape[-1]), dim=-1)
    return (found.gather(-1, places) - values).square().mean()


class Selection:
    """Ways to choose q for one delta and one drop rate; none of them sees the test split.

    Args:
        delta: to be pruned by a random method.
        base: its base.
        tuned: the fine-tuned network; unchanged.
        task: gives validation scores, and inputs of its training split.
        p: drop rate.
        method: "random", "rows" or "columns".
        seeds: of the masks that a choice is averaged over.
        samples: calibration inputs.
        measure: of :class:`OutputChange`.
        seed: of the choice of inputs and of training.
    """

    def __init__(
        self,
        delta: Delta,
        base: Weights,
        tuned: nn.Module,
        task: Task,
        p: float,
        *,
        method: Method = "random",
        seeds: Sequence[int] = (0, 1, 2, 3),
        samples: int = 50,
        measure: Literal["hidden", "top"] = "hidden",
        seed: int = 0,
    ) -> None:
        _check_rate(p, method)
        if not p > 0.0:
            raise InputError("with nothing dropped there is nothing to choose: q is 1")
        if not seeds:
            raise InputError("a choice of q needs one mask seed or more")
        self.delta, self.task, self.p, self.seeds, self.seed = delta, task, p, tuple(seeds), seed
        self.tuned = copy.deepcopy(tuned).eval()
        self.base = parameters_of(base)
        self.measure: Literal["hidden", "top"] = measure
        self.inputs = calibration_inputs(
            task, samples=samples, source="data", seed=seed, batch_size=min(samples, 64)
        )
        if delta.rows:
            raise InputError("q is chosen for networks of the base's vocabulary; give q itself")
        self._masked = {s: self._drawn(method, s) for s in self.seeds}
        self._moments: dict[str, InputMoments] | None = None

    def _drawn(self, method: Method, seed: int) -> dict[str, Tensor]:
        kept = self.delta.keep(self.p, method, seed=seed)
        return {n: change.masked_fill(~kept[n], 0.0) for n, change in self.delta.changes.items()}

    @contextlib.contextmanager
    def pruned(self, q: Divisor, seed: int) -> Iterator[nn.Module]:
        """The pruned network inside the block."""
        level = level_of(self.tuned)
        weights = {
            level + name: self.base[name][: len(change)].to(change)
            + divided(change, _divisor_of(q, name))
            for name, change in self._masked[seed].items()
        }
        with swapped(self.tuned, weights) as module:
            yield module

    def score(self, q: Divisor, seed: int) -> float:
        """Validation score."""
        with self.pruned(q, seed) as module:
            return self.task.score(module, "validation")

    def closeness(self) -> Callable[[Divisor, int], float]:
        """Minus the change of outputs, as a function of q and mask seed."""
        change = OutputChange(self.tuned, self.inputs, measure=self.measure)

        def close(q: Divisor, seed: int) -> float:
            with self.pruned(q, seed) as module:
                return -change(module)

        return close

    @property
    def moments(self) -> dict[str, InputMoments]:
        """Of the fine-tuned network's inputs."""
        if self._moments is None:
            self._moments = input_moments(self.tuned, self.task.example_inputs, self.inputs)
        return self._moments

    def validated(self, *, step: float = 0.05, below: bool = False) -> Search:
        """One q by validation score (q_v)."""
        return search_divisor(self.score, self.p, seeds=self.seeds, step=step, below=below)

    def unlabelled(self, *, step: float = 0.05, below: bool = False) -> Search:
        """One q by change of outputs (q_e)."""
        return search_divisor(self.closeness(), self.p, seeds=self.seeds, step=step, below=below)

    def per_layer(
        self,
        eta: float | Literal["validation", "output"] = "validation",
        *,
        confidence: float = 0.95,
        signed: bool = False,
        guard: float | None = None,
    ) -> tuple[dict[str, Tensor], float]:
        """One q for each layer by the analytic rule.

        Args:
            eta: its weight, or what to search it by: validation score or change of outputs.
            confidence: of the bound.
            signed: see :func:`analytic_divisor`.
            guard: see :func:`analytic_divisor`.

        Returns:
            q of each tensor (of a bias that of its weight, of tensors that are not multiplied
            with the mean), and eta.
        """
        products = {n: self._mean_products(n) for n in self.moments if n in self.delta.changes}

        def rule(eta: float) -> dict[str, Tensor]:
            found = {
                n: analytic_divisor(
                    c, self.p, eta, confidence=confidence, signed=signed, guard=guard
                ).mean()
                for n, c in products.items()
            }
            return self._spread({n: q.float().view(1) for n, q in found.items()})

        if not isinstance(eta, str):
            return rule(eta), eta
        score = self.score if eta == "validation" else self.closeness()
        found = search_eta(lambda e, seed: score(rule(e), seed), seeds=self.seeds).value
        return rule(found), found

    def least_squares(self) -> dict[str, Tensor]:
        """q of each row by :func:`mse_divisor`, with moments in place of mean inputs."""
        found = {}
        for name, moments in self.moments.items():
            if name not in self.delta.changes:
                continue
            d = self.delta.changes[name].flatten(1).double().cpu()
            bias = self._bias_of(name)
            b = torch.zeros(len(d)).double() if bias is None else bias.double().cpu()
            square = ((d @ moments.second) * d).sum(1) + 2 * b * (d @ moments.mean) + b.square()
            energy = d.square() @ moments.second.diagonal() + b.square()
            found[name] = mse_divisor(self.p, square, energy).float()
        return self._spread(found)

    def learned(
        self,
        *,
        lr: float = 1e-2,
        epochs: int = 20,
        batch_size: int = 8,
        half_period: int = 200,
        patience: int = 5,
        top: int = 5,
    ) -> dict[str, Tensor]:
        """One q for each layer, learned: the largest logits shall stay as they were.

        Args:
            lr: of AdamW.
            epochs: passes over the calibration inputs at most.
            batch_size: inputs a step.
            half_period: steps of the cosine.
            patience: epochs without a gain on 5 % held-out inputs.
            top: how many logits.
        """
        layers = [n for n in self.moments if n in self.delta.changes]
        batches = to_device(self.inputs, device_of(self.tuned))
        with evaluating(self.tuned):
            wanted = torch.cat([logits_of(self.tuned(*batch)) for batch in batches]).cpu().clone()
        together = tuple(torch.cat(list(part)).cpu() for part in zip(*self.inputs, strict=True))
        task = _Matching(together, wanted, top)
        network = _Rescaled(self, self.seeds[0], layers)
        rule = _LearnRescaling(network, task, lr=lr, half_period=half_period)
        fit(rule, task, epochs=epochs, batch_size=batch_size, seed=self.seed,
            validate="validation", patience=patience, title="learning q",
            cpu=device_of(self.tuned).type == "cpu")  # fmt: skip
        q = task.best[1] if task.best is not None else network.q.detach()
        return self._spread({n: q[i].view(1).cpu() for i, n in enumerate(layers)})

    def _bias_of(self, name: str) -> Tensor | None:
        """The delta of the bias of a layer, ``[rows]``."""
        bias = self.delta.changes.get(f"{name.removesuffix('weight')}bias")
        fits = bias is not None and bias.shape == self.delta.changes[name].shape[:1]
        return bias if name.endswith("weight") and fits else None

    def _mean_products(self, name: str) -> Tensor:
        """Delta times mean input, the bias as one more column, ``[rows, inputs + 1]``."""
        change = self.delta.changes[name].flatten(1).double().cpu()
        bias = self._bias_of(name)
        products = change * self.moments[name].mean
        return products if bias is None else torch.cat([products, bias.double().cpu()[:, None]], 1)

    def _spread(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """q of all tensors from those of the layers."""
        if not found:
            raise InputError("no layer of the delta is multiplied with inputs; give q itself")
        mean = torch.stack([q.mean() for q in found.values()]).mean().view(1)
        result = {name: mean for name in self.delta.changes} | dict(found)
        for name, q in found.items():
            if self._bias_of(name) is not None:
                result[f"{name.removesuffix('weight')}bias"] = q
        return result


class _Rescaled(nn.Module):
    """The pruned network with one learnable q for each layer."""

    def __init__(self, selection: Selection, seed: int, layers: Sequence[str]) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.full((len(layers),), 1.0 - selection.p))
        self._held = (selection, seed, tuple(layers))  # no module of ours: it is not trained

    def forward(self, *inputs: Any) -> Any:
        selection, seed, layers = self._held
        q = self.q.clamp(min=1e-3)
        by = selection._spread({name: q[i : i + 1] for i, name in enumerate(layers)})
        level = level_of(selection.tuned)
        weights = {
            level + name: selection.base[name][: len(change)].to(change)
            + change / by[name].to(change.device).view(-1, *(1,) * (change.ndim - 1))
            for name, change in selection._masked[seed].items()
        }
        with swapped(selection.tuned, weights) as module:
            return module(*inputs)


class _Matching(Task):
    """Inputs with the logits that the unpruned network gives them; 5 % are held out."""

    name = "matching the unpruned network"
    metric = "minus the squared difference of the largest logits"

    def __init__(self, inputs: tuple[Tensor, ...], wanted: Tensor, top: int) -> None:
        self._held_out = max(1, round(0.05 * len(wanted)))
        if len(wanted) <= self._held_out:
            raise InputError("learning q needs two calibration inputs or more")
        self._inputs, self._wanted, self._top = inputs, wanted, top
        self.example_inputs = tuple(x[:2] for x in inputs)
        self.best: tuple[float, Tensor] | None = None

    def size(self, split: str) -> int:
        held = {"train": len(self._wanted) - self._held_out, "validation": self._held_out}
        return held.get(split, 0)

    def batches(
        self,
        split: str,
        *,
        batch_size: int = 128,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        shuffle: bool | None = None,
    ) -> Iterator[Batch]:
        first = 0 if split == "train" else self.size("train")
        for _, _, own in self.rows_of(split, batch_size, seed, epoch, start, shuffle):
            rows = torch.from_numpy(own + first)
            yield tuple(x[rows] for x in self._inputs), self._wanted[rows]

    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        return batch[0]

    def criterion(self, outputs: Any, batch: Batch) -> Tensor:
        return top_difference(logits_of(outputs), batch[1], self._top)

    def score(self, model: Callable[..., Any], split: str = "validation") -> float:
        with evaluating(model):
            device = device_of(model)
            found = [float(self.loss(model, to_device(batch, device)))
                     for batch in self.batches(split, batch_size=self.size(split))]  # fmt: skip
        score = -sum(found) / len(found)
        if isinstance(model, _Rescaled) and (self.best is None or score > self.best[0]):
            self.best = (score, model.q.detach().clamp(min=1e-3).cpu().clone())
        return score


class _LearnRescaling(Rule):
    def __init__(self, network: _Rescaled, task: Task, *, lr: float, half_period: int) -> None:
        self.network = network
        self._task = task
        self._lr, self._half_period = lr, half_period
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=lr)

    def step(self, batch: Batch) -> Log:
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr * cosine(self.run.step / self._half_period)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._task.loss(self.network, batch)
        self.backward(loss)
        self.optimizer.step()
        return {"loss": loss.detach()}


@dataclass(frozen=True)
class Advice:
    """What to do with a delta.

    Attributes:
        train: fine-tune again, with AdamR.
        method: of :meth:`Delta.drop`.
        rescale: "dare" (q = 1 - p), "search" (DAREx-q) or "none" (q = 1).
        reason: one sentence.
    """

    train: bool
    method: Method
    rescale: Literal["dare", "search", "none"]
    reason: str


def advise(
    delta: Delta, p: float, *, can_train: bool, large: float = 0.1, extreme: float = 0.95
) -> Advice:
    """Chooses a way of pruning a delta.

    The paper says "large" and "extreme" without numbers; the thresholds are ours.

    Args:
        delta: what is to be pruned.
        p: drop rate.
        can_train: whether the network may be fine-tuned anew.
        large: a delta is large from this norm on, relative to its base weights.
        extreme: a drop rate is extreme from here on.
    """
    threshold_of(p)
    size = f"its norm is {100 * delta.relative_size:.3g} % of the base's"
    if delta.relative_size >= large and can_train:
        return Advice(True, "random", "search", f"the delta is large ({size}): train it smaller")
    if delta.relative_size >= large:
        return Advice(
            False, "wanda", "none", f"the delta is large ({size}): keep what is important"
        )
    if p >= extreme:
        return Advice(False, "random", "search", f"the delta is small ({size}), the rate extreme")
    return Advice(False, "random", "dare", f"the delta is small ({size}), the rate moderate")


# Low-rank updates -----------------------------------------------------------------------------


@dataclass(frozen=True)
class LowRankUpdate:
    """What LoRA adds to one weight: ``scale * up @ down``.

    Attributes:
        down: A, ``[rank, inputs]``.
        up: B, ``[outputs, rank]``.
        scale: alpha / rank.
        down_start: A before training (B begins at zero). Default: zero.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0
    down_start: Tensor | None = None

    def product(self) -> Tensor:
        """What is added, ``[outputs, inputs]``."""
        return self.scale * (self.up @ self.down)

    def drop(self, p: float, *, q: float | None = None, seed: int = 0, name: str) -> LowRankUpdate:
        """Drops entries of both factors' deltas.

        Args:
            p: drop rate in [0, 1).
            q: divisor. Default: 1 - p.
            seed: of the masks.
            name: of the weight.
        """
        q = 1.0 - p if q is None else q
        _check_divisor(q)
        start = torch.zeros_like(self.down) if self.down_start is None else self.down_start

        def dropped(change: Tensor, factor: str) -> Tensor:
            key = key_of(seed, f"{name}.{factor}")
            kept = random_kept(change.shape, threshold_of(p), key).to(change.device)
            return divided(change.masked_fill(~kept, 0.0), q)

        down = start + dropped(self.down - start, "down")
        return LowRankUpdate(down, dropped(self.up, "up"), self.scale, self.down_start)


def low_rank_delta(base: Weights, updates: Mapping[str, LowRankUpdate]) -> Delta:
    """The products of low-rank updates as a delta, to be pruned as any other.

    Args:
        base: what they are added to.
        updates: by the name of the weight.

    Raises:
        InputError: if a name or shape does not fit.
    """
    own = parameters_of(base)
    changes: dict[str, Tensor] = {}
    for name, update in updates.items():
        if name not in own:
            raise InputError(f"the networks differ: the base has no parameter {name}")
        product = update.product()
        if product.shape != own[name].flatten(1).shape:
            raise InputError(
                f"the networks differ: {name} has shape {tuple(own[name].shape)} in the base and "
                f"{tuple(product.shape)} in the update"
            )
        changes[name] = product.view_as(own[name]).float()
    above = sum(float(c.double().square().sum()) for c in changes.values())
    below = sum(float(own[n].double().square().sum()) for n in changes)
    size = math.sqrt(above / below) if below else math.inf
    return Delta({}, {}, fingerprint_of(own, changes), changes, size)


# Several fine-tuned networks in one -----------------------------------------------------------


def merge_deltas(
    deltas: Sequence[Change],
    *,
    weights: Sequence[float] | None = None,
    method: Literal["sum", "ties"] = "sum",
    density: float = 0.2,
) -> Delta:
    """Adds the changes of several networks of one base.

    What replaces parts of the base (buffers, heads) is averaged with the weights.

    Args:
        deltas: sparse or whole.
        weights: of the tasks. Default: 1 / number, the average.
        method: "sum", or "ties": only the largest entries of each tensor, of each place the sign
            with the larger total, and the mean of those that agree, times the sum of the weights.
        density: share that "ties" keeps.

    Raises:
        InputError: if the deltas are of different networks or the options are out of range.
    """
    if not deltas:
        raise InputError("there is nothing to merge")
    weights = [1.0 / len(deltas)] * len(deltas) if weights is None else list(weights)
    if len(weights) != len(deltas) or not all(map(math.isfinite, weights)):
        raise InputError(f"{len(deltas)} networks need as many finite weights, not {weights}")
    if method not in ("sum", "ties") or not 0.0 < density <= 1.0:
        raise InputError(f"networks are merged by sum or ties of a density in (0, 1], not {method}")
    first = deltas[0]
    for other in deltas[1:]:
        if other.base != first.base or set(other.names) != set(first.names):
            raise InputError("the deltas belong to networks that differ, so they cannot be merged")
        if other.rows or first.rows or set(other.rest) != set(first.rest):
            raise InputError("networks of other vocabularies or heads cannot be merged")
    changes = {}
    for name in first.names:
        stacked = torch.stack([delta.tensor(name) for delta in deltas])
        changes[name] = _ties(stacked, weights, density) if method == "ties" else torch.tensordot(
            torch.tensor(weights, dtype=stacked.dtype, device=stacked.device), stacked, 1
        )  # fmt: skip
    total = sum(weights)
    shares = [w / total for w in weights] if total else [1.0 / len(weights)] * len(weights)
    rest: dict[str, Tensor] = {}
    for name, tensor in first.rest.items():
        if any(delta.rest[name].shape != tensor.shape for delta in deltas):
            raise InputError(f"{name} has another shape in each network, so they cannot be merged")
        rest[name] = tensor
        if tensor.is_floating_point():
            parts = [s * delta.rest[name] for s, delta in zip(shares, deltas, strict=True)]
            rest[name] = torch.stack(parts).sum(0)
    return Delta(rest, {}, first.base, changes)


def _ties(stacked: Tensor, weights: Sequence[float], density: float) -> Tensor:
    flat = stacked.flatten(1)
    kept = kept_in_rows(flat.abs(), 1.0 - density)
    trimmed = torch.where(kept, flat, 0.0)
    sign = trimmed.sum(0).sign()
    agree = (trimmed.sign() == sign) & (trimmed != 0.0)
    by = torch.tensor(weights, dtype=flat.dtype, device=flat.device)[:, None] * agree
    mean = (by * trimmed).sum(0) / by.sum(0).masked_fill(by.sum(0) == 0.0, 1.0)
    return (sum(weights) * mean).view(stacked.shape[1:])


# Steps of recipes -----------------------------------------------------------------------------


def delta(
    network: Network,
    task: Task,
    *,
    base: str,
    drop: float = 0.9,
    method: Method = "random",
    q: float
    | Literal[
        "dare", "validation", "output", "per-layer", "per-layer-output", "learned", "mse"
    ] = "validation",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = ("classifier",),
    masks: int = 4,
    samples: int = 50,
    file: str | None = None,
    seed: int = 0,
) -> Network:
    """Drops most of what fine-tuning changed (a step of a recipe).

    One network alone gets no smaller by it; what is small is the delta beside a base that others
    share, written to ``file``. So the runtime in which the gain is real is that of a
    :class:`TaskBank`, and the network is stored as any dense one.

    Args:
        network: fine-tuned; unchanged.
        task: for choosing q (its validation split, inputs of its training split).
        base: folder or safetensors file of the network before fine-tuning (:func:`read_tensors`).
        drop: share of the changes that is dropped.
        method: see :data:`Method`.
        q: the divisor, or how it is chosen: 1 - p ("dare"), one q by validation score or by change
            of outputs, one for each layer by the analytic rule (its weight found by validation
            score, "per-layer", or by change of outputs) or learned, or one for each row by least
            squares ("mse"). Methods that keep important entries divide by 1 unless a number is
            given.
        include: parts of names that are taken. Default: all.
        exclude: parts of names that are left out.
        masks: seeds that a choice is averaged over.
        samples: calibration inputs.
        file: where the sparse delta is written.
        seed: of the masks.

    Returns:
        The network of base and sparse delta.

    Raises:
        InputError: if the base is of another network or an option is out of range.
    """
    _check_rate(drop, method)
    if masks < 1:
        raise InputError(f"a choice of q needs one mask seed or more, not {masks}")
    before = read_tensors(base)
    module = copy.deepcopy(network.module).cpu()
    change = Delta.from_models(before, module, include=include, exclude=exclude)
    random = method in ("random", "rows", "columns")
    chosen: Divisor | None = None
    moments = None
    about: dict[str, Any] = {}
    if isinstance(q, int | float):
        chosen = float(q)
    elif random and q != "dare" and drop > 0.0:
        selection = Selection(
            change, before, module, task, drop, method=method, samples=samples, seed=seed,
            seeds=[seed_of(seed, "mask", number) for number in range(masks)],
        )  # fmt: skip
        chosen, about = _chosen(selection, q)
    if method == "wanda":
        inputs = calibration_inputs(
            task, samples=samples, source="data", seed=seed, batch_size=min(samples, 64)
        )
        moments = input_moments(module, network.example_inputs, inputs)
    sparse = change.drop(drop, method=method, q=chosen, moments=moments, seed=seed)
    if file is not None:
        sparse.save(file)
    made = sparse.apply(before, module)
    options = {
        "base": str(base), "drop": drop, "method": method, "q": q,
        "include": None if include is None else list(include), "exclude": list(exclude),
        "masks": masks, "samples": samples, "file": file, "seed": seed,
    }  # fmt: skip
    report = about | {
        "entries": sparse.entries, "stored": sparse.stored, "delta_bytes": sparse.nbytes(),
        "relative_size": change.relative_size, "kept_whole": sorted(change.rest), "file": file,
        "validation_score": task.score(made, "validation"),
    }  # fmt: skip
    return network.after("delta", options, report, module=made)


def _chosen(selection: Selection, how: str) -> tuple[Divisor, dict[str, Any]]:
    match how:
        case "validation" | "output":
            found = selection.validated() if how == "validation" else selection.unlabelled()
            return found.value, {"q": found.value}
        case "per-layer" | "per-layer-output":
            q, eta = selection.per_layer("validation" if how == "per-layer" else "output")
            return q, {"eta": eta, "q": _means(q)}
        case "learned":
            q = selection.learned()
        case "mse":
            q = selection.least_squares()
        case _:
            raise InputError(f"there is no way {how!r:.40} to choose q")
    return q, {"q": _means(q)}


def _means(q: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(value.mean()) for name, value in q.items()}


def merge(
    network: Network,
    task: Task,
    *,
    base: str,
    others: Sequence[str],
    method: Literal["dare", "task-arithmetic", "average", "ties"] = "dare",
    drop: float = 0.9,
    weights: Sequence[float] | None = None,
    density: float = 0.2,
    masks: int = 4,
    seed: int = 0,
) -> Network:
    """Adds what several networks learned from one base (a step of a recipe).

    Args:
        network: fine-tuned; unchanged.
        task: of the merged network; what is left open is chosen by its validation score.
        base: of all networks (:func:`read_tensors`).
        others: other networks fine-tuned from it, likewise.
        method: "dare" drops entries of each delta and chooses one q for the merged network;
            "task-arithmetic" and "ties" choose a common factor in the same way; "average" has none.
        drop: drop rate of "dare".
        weights: of this network and the others, relative to each other. Default: all equal.
        density: share that "ties" keeps.
        masks: mask seeds over which q is averaged.
        seed: of the masks.

    Returns:
        The merged network.

    Raises:
        InputError: if the networks differ or an option is out of range.
    """
    if not others:
        raise InputError("there is nothing to merge: others names no network")
    if method not in ("dare", "task-arithmetic", "average", "ties"):
        raise InputError(f"networks are not merged by {method!r:.40}")
    if masks < 1:
        raise InputError(f"a choice of q needs one mask seed or more, not {masks}")
    before = read_tensors(base)
    modules = [copy.deepcopy(network.module).cpu()]
    for path in others:
        module = copy.deepcopy(modules[0])
        held = read_tensors(path)
        own = parameters_of(module)
        for name, value in own.items():
            if name not in held or held[name].shape != value.shape:
                raise InputError(f"the networks differ: {path} has no {name} of the same shape")
        level = level_of(module)
        known = {n.removeprefix(level) for n in module.state_dict()}
        load_into(module, {n: tensor for n, tensor in held.items() if n in known})
        modules.append(module)
    deltas = [Delta.from_models(before, module, exclude=()) for module in modules]
    given = [1.0] * len(deltas) if weights is None else list(weights)
    if len(given) != len(deltas) or not sum(given) > 0.0:
        raise InputError(f"{len(deltas)} networks need as many weights of a positive sum")
    common = [weight / sum(given) for weight in given]

    def merged(factor: float, mask: int = 0) -> Delta:
        by = [factor * w for w in common]
        if method != "dare":
            kind = "ties" if method == "ties" else "sum"
            return merge_deltas(deltas, weights=by, method=kind, density=density)
        # One key for each network, or all would keep the same places.
        drawn = [d.drop(drop, q=1.0, seed=seed_of(mask, i)) for i, d in enumerate(deltas)]
        return merge_deltas(drawn, weights=by)

    def score(factor: float, mask: int) -> float:
        return task.score(merged(factor, mask).apply(before, modules[0]), "validation")

    factor = 1.0
    if method == "dare":
        seeds = [seed_of(seed, "mask", number) for number in range(masks)]
        _check_rate(drop, "random")
        if drop > 0.0:
            # Equal weights count 1 each, as in DARE; a common factor and q are one number.
            count = len(deltas)
            found = search_divisor(lambda q, mask: score(count / q, mask), drop, seeds=seeds)
            factor = count / found.value
    elif method != "average":
        grid = [len(deltas) * step / 10 for step in range(1, 11)]
        factor = max(grid, key=lambda f: score(f, 0))
    made = merged(factor, seed).apply(before, modules[0])
    options = {
        "base": str(base), "others": list(others), "method": method, "drop": drop,
        "weights": None if weights is None else list(weights), "density": density,
        "masks": masks, "seed": seed,
    }  # fmt: skip
    report = {"factor": factor, "validation_score": task.score(made, "validation")}
    return network.after("merge", options, report, module=made)


def anchored_finetune(
    network: Network,
    task: Task,
    *,
    base: str | None = None,
    epochs: int = 10,
    batch_size: int = 128,
    lr: float = 1e-3,
    decay: float = 1e-4,
    norm: Literal["l2", "l1"] = "l2",
    seed: int = 0,
    checkpoint: Path | None = None,
    cpu: bool = False,
) -> Network:
    """Fine-tunes with AdamR, so that the delta can be pruned (a step of a recipe).

    Args:
        network: unchanged.
        task: its data.
        base: weights to stay near (:func:`read_tensors`). Default: those of ``network``.
        epochs: passes over the training split.
        batch_size: samples a batch.
        lr: learning rate at the start; falls to 0 along half a cosine.
        decay: strength of the pull.
        norm: of the distance that is penalised.
        seed: of the data order.
        checkpoint: file that holds the run's state.
        cpu: stay on the CPU although there is a GPU.

    Raises:
        InputError: if an option is out of range or the base is of another network.
    """
    module = copy.deepcopy(network.module)
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    reference = None
    if base is not None:
        held, level = read_tensors(base), level_of(module)
        for name, value in trained.items():
            own = name.removeprefix(level)
            if own not in held or held[own].shape != value.shape:
                raise InputError(f"the networks differ: {base} has no {own} of the same shape")
        reference = [held[name.removeprefix(level)] for name in trained]
    optimizer = AdamR(trained.values(), reference, lr=lr, weight_decay=decay, norm=norm)
    rule = Supervised(module, task, optimizer=optimizer)
    history = fit(rule, task, epochs=epochs, batch_size=batch_size, seed=seed,
                  checkpoint=checkpoint, cpu=cpu, title="fine-tuning near the base")  # fmt: skip
    options = {
        "base": base, "epochs": epochs, "batch_size": batch_size, "lr": lr, "decay": decay,
        "norm": norm, "seed": seed,
    }  # fmt: skip
    report = {"loss": history.loss[-1] if history.loss else None}
    return network.after("anchored-finetune", options, report, module=module.cpu())
