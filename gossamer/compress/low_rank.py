"""Low-rank layers whose components are ordered and dropped while they train (Maestro).

Every linear map is written as ``W = U V`` from the start. *Low-rank ordered decomposition* (LoD)
truncates one layer a step to a random number of leading components, so that these learn the most;
a *hierarchical group lasso* (HGL) shrinks trailing components, which are dropped after each epoch.
The result is a smaller network and a nested family: any further truncation is a valid network.
Cutting a trained network by its singular values, the classic way, is here too (:func:`svd`).

Source: Horvath, Laskaridis, Rajput and Wang, "Maestro: Uncovering low-rank structures via
trainable decomposition", ICML 2024, arXiv:2308.14929, and its published code.

What differs from the published code, each on purpose: the sampler hands over whole ranks (it
passes a fraction and rounds up, which adds a component for some pairs); layers are known by name,
not by their order of execution; a layer without components answers its bias at the right size; a
factorised layer that would not be smaller is multiplied out also where the two are equal.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from gossamer.core.errors import BudgetError, InputError, UnsupportedError
from gossamer.core.fit import Log, Rule, Supervised, constant, fit
from gossamer.core.graph import Graph, GraphNetwork, argument, level_of, op_name
from gossamer.core.network import Network
from gossamer.core.task import Batch, Task, device_of, logits_of, seed_of, to_device
from gossamer.parts.batchnorm import recalibrate_on

TINY = 1e-24  # below this a sum of squares counts as 0; its square root has no gradient there

Sampler = Literal["per_layer", "across_layers", "full"]
Order = Literal["importance", "energy", "uniform"]

# Penalty


def tail_norms(factor: Tensor) -> Tensor:
    """``||factor[b:]||_F`` for every component ``b``, ``[components]``.

    Args:
        factor: one row a component, ``[components, size]``.
    """
    squares = factor.float().square().sum(1)
    return squares.flip(0).cumsum(0).flip(0).clamp(min=TINY).sqrt()


def hierarchical_group_lasso(u: Tensor, v: Tensor) -> Tensor:
    """``sum_b ||U[:, b:]||_F + ||V[b:]||_F``: the last component is in every group.

    Args:
        u: ``[outputs, components]``.
        v: ``[components, inputs]``.

    Source: arXiv:2308.14929, equation 4.
    """
    return tail_norms(u.T).sum() + tail_norms(v).sum()


def importance(u: Tensor, v: Tensor, *, hierarchical: bool = True) -> Tensor:
    """What each component is worth, ``[components]``.

    Args:
        u: ``[outputs, components]``.
        v: ``[components, inputs]``.
        hierarchical: ``||U[:, b:]||_F ||V[b:]||_F`` (never increasing), or of component b alone.
    """
    if hierarchical:
        return tail_norms(u.T) * tail_norms(v)
    return u.float().norm(dim=0) * v.float().norm(dim=1)


# Layers


class LowRankLayer(nn.Module):
    """``nn.Linear`` or ``nn.Conv2d`` with the weight ``U V``, of which any prefix can be used.

    A convolution is one with ``rank`` filters of the original geometry and no bias, then one of
    1 x 1 pixels. The factors start at ``P sqrt(S)`` and ``sqrt(S) Q^T`` of the singular value
    decomposition of the layer's weight.

    Args:
        layer: unchanged.
        rank: leading components at the start. Default: all, which is the layer itself.

    Attributes:
        u: ``[outputs, components]``.
        v: ``[components, inputs * kernel pixels]``.
        rank: components in use; the others are masked.
        sampled: components in this pass, or None for ``rank``.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int | None = None) -> None:
        super().__init__()
        weight = layer.weight.detach()
        left, values, right = torch.linalg.svd(weight.double().flatten(1), full_matrices=False)
        rank = len(values) if rank is None else min(rank, len(values))
        roots = values[:rank].sqrt()
        self.u = nn.Parameter((left[:, :rank] * roots).to(weight.dtype))
        self.v = nn.Parameter((roots.unsqueeze(1) * right[:rank]).to(weight.dtype))
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        self.kernel = tuple(weight.shape[1:])
        self.convolution = isinstance(layer, nn.Conv2d)
        if isinstance(layer, nn.Conv2d):
            self.geometry: dict[str, Any] = {
                "stride": layer.stride,
                "padding": layer.padding,
                "dilation": layer.dilation,
                "padding_mode": layer.padding_mode,
            }
            self.borders = list(layer._reversed_padding_repeated_twice)
        self.full_rank = len(values)
        self.rank = rank
        self.sampled: int | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        """Outputs, and inputs times kernel pixels."""
        return self.u.shape[0], self.v.shape[1]

    def size_at(self, rank: int) -> int:
        """Weights at a rank as exported: factorised, or dense where that is not larger."""
        outputs, inputs = self.sizes
        return min(rank * (outputs + inputs), outputs * inputs)

    def factors(self) -> tuple[Tensor, Tensor]:
        """U and V of the components in use."""
        return self.u[:, : self.rank], self.v[: self.rank]

    def forward(self, x: Tensor) -> Tensor:
        rank = self.rank if self.sampled is None else min(self.sampled, self.rank)
        if rank == 0:
            return self.constant()(x)
        u, v = self.u[:, :rank], self.v[:rank]
        if not self.convolution:
            return F.linear(F.linear(x, v), u, self.bias)
        return F.conv2d(self._convolved(x, v), u[:, :, None, None], self.bias)

    def _convolved(self, x: Tensor, v: Tensor) -> Tensor:
        kernels = v.view(-1, *self.kernel)
        padding: Any = self.geometry["padding"]
        if self.geometry["padding_mode"] != "zeros":
            x = F.pad(x, self.borders, mode=self.geometry["padding_mode"])
            padding = 0
        stride, dilation = self.geometry["stride"], self.geometry["dilation"]
        return F.conv2d(x, kernels, None, stride, padding, dilation)

    def constant(self) -> BiasOnly:
        """What is left of the layer without components."""
        bias = self.u.new_zeros(len(self.u)) if self.bias is None else self.bias
        if not self.convolution:
            return BiasOnly(bias, None)
        return BiasOnly(bias, (self.kernel[1:], self.borders, self.geometry))

    def exported(self) -> nn.Module:
        """Plain layers with the same answers; dense where two factors are not smaller."""
        outputs, inputs = self.sizes
        u, v = (factor.detach() for factor in self.factors())
        if self.rank == 0:
            return copy.deepcopy(self.constant())
        if self.rank * (outputs + inputs) >= outputs * inputs:
            weight = (u.double() @ v.double()).to(u.dtype)
            return self._plain(weight.view(outputs, *self.kernel), self.bias, self.convolution)
        first = self._plain(v.reshape(self.rank, *self.kernel), None, self.convolution)
        if self.convolution:
            u = u[:, :, None, None]
        return nn.Sequential(first, self._plain(u, self.bias, False))

    def _plain(self, weight: Tensor, bias: Tensor | None, spatial: bool) -> nn.Module:
        """A layer with this weight; ``spatial`` if it has the geometry of the original."""
        outputs, inputs = weight.shape[:2]
        # The weights are put in below: drawing random ones would disturb the caller's generator.
        with torch.device("meta"):
            layer = (
                nn.Conv2d(
                    inputs,
                    outputs,
                    tuple(weight.shape[2:]),  # type: ignore[arg-type]
                    bias=bias is not None,
                    **(self.geometry if spatial else {}),
                )
                if weight.ndim == 4
                else nn.Linear(inputs, outputs, bias=bias is not None)
            )
        layer.weight = nn.Parameter(weight.clone())
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone())
        return layer


class BiasOnly(nn.Module):
    """The bias, expanded to the size the layer's output would have.

    Args:
        bias: ``[outputs]``; zeros that are no parameter if the layer has none.
        window: of a convolution its kernel size, borders (as ``F.pad`` takes them) and geometry.
    """

    def __init__(self, bias: Tensor, window: tuple[Any, Any, Mapping[str, Any]] | None) -> None:
        super().__init__()
        self.bias: Tensor
        if isinstance(bias, nn.Parameter):
            self.bias = bias
        else:
            self.register_buffer("bias", bias)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        if self.window is None:
            return self.bias.expand(*x.shape[:-1], -1)
        kernel, borders, geometry = self.window
        size = []
        for axis in (0, 1):
            before, after = borders[2 - 2 * axis : 4 - 2 * axis]
            reach = geometry["dilation"][axis] * (kernel[axis] - 1) + 1
            length = x.shape[axis - 2] + before + after - reach
            size.append(length // geometry["stride"][axis] + 1)
        return self.bias.view(-1, 1, 1).expand(*x.shape[:-3], -1, *size)


# Networks


class Decomposed(nn.Module):
    """A network whose linear maps are :class:`LowRankLayer`; made by :func:`decompose`.

    Args:
        network: holds the layers; not copied.
        uses: how often each layer's weight is applied to one sample (output pixels, tokens), by
            the layer's path.
        macs: multiply-accumulates of everything else, one sample.
        dense: linear maps that were left as they are, with the reason.

    Attributes:
        layers: by path, in order of execution.
    """

    def __init__(
        self, network: nn.Module, uses: Mapping[str, int], macs: int, dense: Mapping[str, str]
    ) -> None:
        super().__init__()
        self.network = network
        self.uses = dict(uses)
        self.layers: dict[str, LowRankLayer] = {}
        for name in uses:
            layer = network.get_submodule(name)
            assert isinstance(layer, LowRankLayer)
            self.layers[name] = layer
        self.other_macs = macs
        self.dense = dict(dense)
        factors = {id(p) for layer in self.layers.values() for p in (layer.u, layer.v)}
        self.other_parameters = sum(p.numel() for p in network.parameters() if id(p) not in factors)

    def forward(self, *inputs: Any) -> Any:
        return self.network(*inputs)

    def ranks(self) -> dict[str, int]:
        """Components in use, by layer."""
        return {name: layer.rank for name, layer in self.layers.items()}

    def full_ranks(self) -> dict[str, int]:
        """The smaller side of each weight, by layer."""
        return {name: layer.full_rank for name, layer in self.layers.items()}

    def set_ranks(self, ranks: Mapping[str, int]) -> None:
        """Masks all components past ``ranks``, in place.

        Raises:
            InputError: if a layer is unknown or has fewer components.
        """
        for name, rank in ranks.items():
            if name not in self.layers:
                raise InputError(f"the network has no low-rank layer {name:.80}")
            if not 0 <= rank <= self.layers[name].u.shape[1]:
                raise InputError(
                    f"{name} has {self.layers[name].u.shape[1]} components, not {rank}"
                )
        for name, rank in ranks.items():
            self.layers[name].rank = rank

    @contextlib.contextmanager
    def sampled(self, ranks: Mapping[str, int]) -> Iterator[None]:
        """Inside the block the layers of ``ranks`` use that many components at most."""
        try:
            for name, rank in ranks.items():
                self.layers[name].sampled = rank
            yield
        finally:
            for layer in self.layers.values():
                layer.sampled = None

    def penalty(self) -> Tensor:
        """The hierarchical group lasso of all layers, over the components in use."""
        total = [hierarchical_group_lasso(*layer.factors()) for layer in self.layers.values()]
        return torch.stack(total).sum()

    @torch.no_grad()
    def shrink(self, eps: float = 1e-5) -> dict[str, int]:
        """Drops the components whose hierarchical importance is below ``eps``, in place.

        Returns:
            The new ranks.
        """
        for layer in self.layers.values():
            layer.rank = int((importance(*layer.factors()) >= eps).sum())
        return self.ranks()

    def parameters_at(self, ranks: Mapping[str, int] | None = None) -> int:
        """Parameters of the network exported at ``ranks`` (default: the current ones)."""
        ranks = self.ranks() | dict(ranks or {})
        return self.other_parameters + sum(
            layer.size_at(ranks[name]) for name, layer in self.layers.items()
        )

    def macs_at(self, ranks: Mapping[str, int] | None = None, *, factorised: bool = False) -> int:
        """Multiply-accumulates of one sample at ``ranks`` (default: the current ones).

        Args:
            ranks: by layer.
            factorised: as in training, where no layer is multiplied out.
        """
        ranks = self.ranks() | dict(ranks or {})
        total = self.other_macs
        for name, layer in self.layers.items():
            rank = ranks[name]
            size = rank * sum(layer.sizes) if factorised else layer.size_at(rank)
            total += self.uses[name] * size
        return total

    @torch.no_grad()
    def worth(self, order: Order = "importance") -> dict[str, Tensor]:
        """A never increasing number for each component in use, comparable between layers.

        Args:
            order: "importance" (of the hierarchy, as in :meth:`shrink`), "energy" (share of the
                layer's squared components that a cut here would lose) or "uniform" (the same
                share of components in every layer).
        """
        result = {}
        for name, layer in self.layers.items():
            u, v = (factor.double() for factor in layer.factors())
            if order == "importance":
                numbers = importance(u, v).double()
            elif order == "energy":
                squares = (u.square().sum(0) * v.square().sum(1)).flip(0).cumsum(0).flip(0)
                numbers = squares / squares[:1].clamp(min=TINY)
            else:
                numbers = 1.0 - torch.arange(layer.rank) / max(1, layer.rank)
            result[name] = numbers.cpu()
        return result

    def ranks_within(
        self,
        limit: float,
        cost: Callable[[Mapping[str, int]], float],
        *,
        order: Order = "importance",
    ) -> dict[str, int]:
        """The largest ranks in a given order whose cost is within a limit.

        Components leave by their worth, smallest first, over all layers; one stays in each.

        Args:
            limit: in the unit of ``cost``.
            cost: of ranks, as :meth:`parameters_at` or :meth:`macs_at`.
            order: see :meth:`worth`.

        Raises:
            BudgetError: if one component a layer is still too dear; it names the nearest.
        """
        worth = self.worth(order)
        thresholds = torch.cat([*worth.values(), torch.tensor([math.inf])]).unique()

        def ranks_above(threshold: float) -> dict[str, int]:
            return {
                name: max(min(1, len(numbers)), int((numbers >= threshold).sum()))
                for name, numbers in worth.items()
            }

        # The cost never rises with the threshold.
        low, high = 0, len(thresholds) - 1
        least = cost(ranks_above(float(thresholds[high])))
        if least > limit:
            raise BudgetError(
                f"low rank cannot reach {limit:.4g}; the nearest, with one component in each "
                f"layer, is {least:.4g}"
            )
        while low < high:
            middle = (low + high) // 2
            if cost(ranks_above(float(thresholds[middle]))) <= limit:
                high = middle
            else:
                low = middle + 1
        return ranks_above(float(thresholds[low]))

    def share_of_ranks(self, share: float) -> dict[str, int]:
        """That share of every full rank (at least one component), as far as it is in use."""
        return {
            name: min(layer.rank, max(1, round(share * layer.full_rank)))
            for name, layer in self.layers.items()
        }

    def export(self) -> nn.Module:
        """A plain network at the current ranks; this one is unchanged."""
        result = copy.deepcopy(self.network)
        _replace(result, {name: layer.exported() for name, layer in self.layers.items()})
        return result


def decompose(
    module: nn.Module,
    example_inputs: Sequence[Any],
    *,
    skip: Collection[str] = (),
    last: bool = False,
    share: float = 1.0,
) -> Decomposed:
    """Factorises the linear layers and convolutions of a copy of a network.

    Left dense: grouped convolutions, weights that are tied or that a parent reads without calling
    the layer (as torch's own attention does), subclasses with a forward of their own, and, unless
    ``last``, the layer that runs last. At ``share`` 1 the network's answers do not change.

    Args:
        module: unchanged.
        example_inputs: positional arguments, batch first.
        skip: paths of modules that stay dense, with everything below them.
        last: factorise the classifier too.
        share: of the full rank with which layers start (.25 in Pufferfish).

    Raises:
        InputError: if ``skip`` names nothing, or ``share`` is not in (0, 1].
        UnsupportedError: if there is nothing to factorise.
    """
    if not 0.0 < share <= 1.0:
        raise InputError(f"the share of the full rank must be in (0, 1], not {share}")
    network = copy.deepcopy(module)
    if isinstance(network, GraphNetwork):
        _give_layers(network)
    level = level_of(network)
    known = {name for name, _ in network.named_modules()}
    for name in skip:
        if level + name not in known:
            raise InputError(f"the network has no module {name:.80} to skip")
    macs = Graph.trace(network, example_inputs).macs
    uses = _uses(network, example_inputs)
    dense = {}
    counts: dict[int, int] = {}
    for _, owner in network.named_modules():
        for parameter in owner._parameters.values():
            if parameter is not None:
                counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    for name, layer in network.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        if any(f"{name}.".startswith(f"{level}{part}.") for part in skip):
            dense[name] = "skipped"
        elif name not in uses:
            dense[name] = "not called by its parent"
        elif not _plain_layer(layer):
            dense[name] = "grouped, or with a forward of its own"
        elif counts[id(layer.weight)] > 1:
            dense[name] = "tied"
    if uses and not last:
        dense.setdefault(list(uses)[-1], "last")
    uses = {name: count for name, count in uses.items() if name not in dense}
    if not uses:
        raise UnsupportedError(
            "the network has no linear layer or convolution to factorise"
            + (f" ({_reasons(dense)})" if dense else "")
        )
    layers: dict[str, nn.Module] = {}
    for name, count in uses.items():
        old = network.get_submodule(name)
        assert isinstance(old, nn.Linear | nn.Conv2d)
        macs -= count * old.weight.numel()
        full = min(old.weight.flatten(1).shape)
        layers[name] = LowRankLayer(old, max(1, round(share * full)))
    _replace(network, layers)
    return Decomposed(network, uses, macs, dense)


def _reasons(dense: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in list(dense.items())[:3])


def _plain_layer(layer: nn.Linear | nn.Conv2d) -> bool:
    plain = type(layer).forward in (nn.Linear.forward, nn.Conv2d.forward)
    if isinstance(layer, nn.Conv2d):
        plain &= type(layer)._conv_forward is nn.Conv2d._conv_forward and layer.groups == 1
    # A parametrised weight is computed anew for every pass and is no parameter.
    return plain and layer._parameters.get("weight") is not None


def _uses(network: nn.Module, example_inputs: Sequence[Any]) -> dict[str, int]:
    """How often a sample meets each layer's weight, of those that are called, in that order."""
    found: dict[str, int] = {}
    handles = []

    def note(name: str, outputs: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_: nn.Module, inputs: Any, output: Tensor) -> None:
            found[name] = found.pop(name, 0) + output.numel() // outputs

        return hook

    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            handles.append(layer.register_forward_hook(note(name, layer.weight.shape[0])))
    modes = [(part, part.training) for part in network.modules()]
    inputs = to_device(tuple(example_inputs), device_of(network))
    try:
        network.eval()
        with torch.no_grad():
            network(*inputs)
    finally:
        for part, mode in modes:
            part.training = mode
        for handle in handles:
            handle.remove()
    batch = len(next(x for x in inputs if isinstance(x, Tensor)))
    return {name: total // batch for name, total in found.items()}


def _replace(network: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Puts modules in the places of others, wherever these are used."""
    wanted = {id(network.get_submodule(name)): module for name, module in modules.items()}
    for owner in list(network.modules()):
        for name, child in owner._modules.items():
            if child is not None and id(child) in wanted:
                owner._modules[name] = wanted[id(child)]


def _give_layers(network: GraphNetwork) -> None:
    """Makes modules of the linear operators of a network that runs a graph, in place."""
    program = network.program
    readers: dict[str, int] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            readers[str(node.target)] = readers.get(str(node.target), 0) + len(node.users)
    for node in list(program.graph.nodes):
        if node.op != "call_function" or op_name(node.target) not in ("linear", "conv2d"):
            continue
        source, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias", None)
        sources = [n for n in (weight, bias) if n is not None]
        if not all(isinstance(n, fx.Node) and n.op == "get_attr" for n in sources):
            continue
        owner, _, _ = str(weight.target).rpartition(".")
        holder = program.get_submodule(owner)
        own = [str(n.target) for n in sources]
        if own != [f"{owner}.weight", f"{owner}.bias"][: len(own)] or len(own) < len(
            list(holder.parameters())
        ):
            continue
        if any(readers[name] > 1 for name in own):
            continue
        layer = _layer_of(node, holder)
        program.set_submodule(owner, layer)
        with program.graph.inserting_before(node):
            new = program.graph.call_module(owner, (source,))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        program.graph.erase_node(node)
        for read in sources:
            if not read.users:
                program.graph.erase_node(read)
    program.recompile()


def _layer_of(node: fx.Node, holder: nn.Module) -> nn.Linear | nn.Conv2d:
    weight: Tensor = holder.weight  # type: ignore[assignment]
    bias = getattr(holder, "bias", None)
    with torch.device("meta"):
        if op_name(node.target) == "linear":
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        else:
            groups = argument(node, 6, "groups", 1)
            pairs = [
                tuple(argument(node, place, name, default))
                for place, name, default in (
                    (3, "stride", (1, 1)), (4, "padding", (0, 0)), (5, "dilation", (1, 1))
                )
            ]  # fmt: skip
            stride, padding, dilation = (p if len(p) == 2 else p * 2 for p in pairs)
            layer = nn.Conv2d(
                weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]),  # type: ignore[arg-type]
                stride, padding, dilation, groups, bias is not None,
            )  # fmt: skip
    layer.weight = weight  # type: ignore[assignment]
    if bias is not None:
        layer.bias = bias
    return layer


# Training


class PairSampler:
    """Every (layer, rank) once a cycle, in random order.

    Args:
        ranks: by layer; ranks 1 to that number are drawn.
    """

    def __init__(self, ranks: Mapping[str, int]) -> None:
        self.names = list(ranks)
        self.counts = torch.tensor([ranks[name] for name in self.names])
        self.order = torch.zeros(0, dtype=torch.int64)
        self.position = 0

    def __len__(self) -> int:
        return int(self.counts.sum())

    def draw(self, generator: torch.Generator | None = None) -> dict[str, int]:
        """The next pair; nothing if no layer has a component left."""
        if not len(self):
            return {}
        if self.position >= len(self.order):
            self.order = torch.randperm(len(self), generator=generator)
            self.position = 0
        pair = int(self.order[self.position])
        self.position += 1
        ends = self.counts.cumsum(0)
        layer = int(torch.searchsorted(ends, pair, right=True))
        return {self.names[layer]: pair - int(ends[layer] - self.counts[layer]) + 1}


class LowRankTraining(Rule):
    """One step of Maestro: a truncated pass, the penalty on all factors, one update.

    After each epoch components below ``eps`` are dropped; after the last one batch-norm statistics
    are those of the whole network again. Validation in between sees statistics of truncated passes.

    Args:
        network: a decomposed network; changed in place.
        task: gives the loss.
        lam: weight of the hierarchical group lasso.
        sampler: "per_layer" truncates one layer a step, each (layer, rank) once a cycle;
            "across_layers" truncates all at random (the weaker ablation); "full" none.
        eps: smallest importance of a component that stays; 0 keeps all.
        full_pass: adds the loss of the whole network, whose answers then teach the truncated one.
        optimizer: Default: :func:`published_sgd`.
        schedule: learning-rate multiplier as a function of the fraction of training done.

    Attributes:
        macs: multiply-accumulates of all forward passes so far; a backward pass costs about
            twice as much.
        history: ranks after each epoch.
    """

    def __init__(
        self,
        network: Decomposed,
        task: Task,
        *,
        lam: float = 1e-6,
        sampler: Sampler = "per_layer",
        eps: float = 1e-5,
        full_pass: bool = False,
        optimizer: Optimizer | None = None,
        schedule: Callable[[float], float] | None = None,
    ) -> None:
        if not (lam >= 0.0 and eps >= 0.0):
            raise InputError(f"lam and eps are 0 or more, not {lam:g} and {eps:g}")
        if sampler not in ("per_layer", "across_layers", "full"):
            raise InputError(
                f"the sampler is per_layer, across_layers or full, not {sampler!r:.40}"
            )
        self.network = network
        self.task = task
        self.lam = lam
        self.sampler = sampler
        self.eps = eps
        self.full_pass = full_pass
        self.optimizer = optimizer or published_sgd(network)
        self.schedule = schedule or two_drops
        self.pairs = PairSampler(network.ranks())
        self.macs = 0
        self.history: list[list[int]] = []
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    @property
    def decomposed(self) -> Decomposed:
        """The network that is trained."""
        assert isinstance(self.network, Decomposed)
        return self.network

    def draw(self) -> dict[str, int]:
        """Ranks of the layers that the next pass truncates."""
        if self.sampler == "per_layer":
            return self.pairs.draw()
        if self.sampler == "across_layers":
            return {
                name: int(torch.randint(1, rank + 1, ()))
                for name, rank in self.decomposed.ranks().items()
                if rank
            }
        return {}

    def step(self, batch: Batch) -> Log:
        multiplier = self.schedule(self.run.fraction)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
        self.optimizer.zero_grad(set_to_none=True)
        ranks = self.draw()
        samples = len(self.task.inputs(batch)[0])
        with self.run.accelerator.autocast():
            loss: Tensor | float = 0.0
            target: Tensor | None = None
            if self.full_pass:
                outputs = self.task.outputs(self.network, batch)
                loss = self.task.criterion(outputs, batch)
                target = logits_of(outputs).detach().softmax(-1)
                self.macs += samples * self.decomposed.macs_at(factorised=True)
            with self.decomposed.sampled(ranks):
                outputs = self.task.outputs(self.network, batch)
            self.macs += samples * self.decomposed.macs_at(ranks, factorised=True)
            loss = loss + (
                self.task.criterion(outputs, batch)
                if target is None
                else F.cross_entropy(logits_of(outputs), target)
            )
            if self.lam:
                loss = loss + self.lam * self.decomposed.penalty()
        self.backward(loss)
        self.optimizer.step()
        return {"loss": loss.detach()}

    def end_epoch(self) -> None:
        if self.eps:
            before = self.decomposed.ranks()
            if self.decomposed.shrink(self.eps) != before:
                self.pairs = PairSampler(self.decomposed.ranks())
        self.history.append(list(self.decomposed.ranks().values()))

    def finish(self) -> None:
        recalibrate_on(self.network, self.task)

    def extra_state(self) -> dict[str, Any]:
        return {
            "ranks": self.decomposed.ranks(),
            "order": self.pairs.order,
            "position": self.pairs.position,
            "macs": self.macs,
            "history": self.history,
        }

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        self.decomposed.set_ranks(state["ranks"])
        self.pairs = PairSampler(state["ranks"])
        self.pairs.order = state["order"]
        self.pairs.position = state["position"]
        self.macs = state["macs"]
        self.history = list(state["history"])


def two_drops(fraction: float) -> float:
    """The published schedule: a tenth after half of training, a hundredth after three quarters."""
    return 1.0 if fraction < 0.5 else 0.1 if fraction < 0.75 else 0.01


def published_sgd(
    network: nn.Module, *, lr: float = 0.1, weight_decay: float = 1e-4
) -> torch.optim.SGD:
    """SGD with momentum .9; decay of both factors, which together is a nuclear-norm penalty."""
    if lr < 0.0 or weight_decay < 0.0:
        raise InputError(
            f"learning rate and weight decay are 0 or more, not {lr:g} and {weight_decay:g}"
        )
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD([group for group in groups if group["params"]], lr=lr, momentum=0.9)


def search_lam(
    module: nn.Module,
    task: Task,
    train: Callable[[Decomposed, float], None],
    limit: float,
    cost: Callable[[Decomposed], float],
    *,
    skip: Collection[str] = (),
    last: bool = False,
    low: float = 1e-6,
    high: float = 1e-1,
    trials: int = 6,
) -> float:
    """The smallest penalty (by bisection of its logarithm) that shrinks a network to a limit.

    Args:
        module: what each trial starts from; unchanged.
        task: for its example inputs.
        train: ``(network, lam)`` trains a decomposed network for a short run, in place.
        limit: that ``cost`` should not exceed after it.
        cost: of the trained network.
        skip: see :func:`decompose`.
        last: see :func:`decompose`.
        low: smallest penalty.
        high: largest penalty, taken if nothing reaches the limit.
        trials: short runs.
    """
    for _ in range(trials):
        middle = math.sqrt(low * high)
        network = decompose(module, task.example_inputs, skip=skip, last=last)
        train(network, middle)
        if cost(network) <= limit:
            high = middle
        else:
            low = middle
    return high


# Steps of recipes


def low_rank(
    network: Network,
    task: Task,
    *,
    rank: float | None = None,
    parameters: float | None = None,
    macs: float | None = None,
    order: Literal["importance", "uniform"] = "importance",
    lam: float | Literal["auto"] = 1e-6,
    sampler: Sampler = "per_layer",
    eps: float = 1e-5,
    full_pass: bool = False,
    start: float = 1.0,
    skip: Collection[str] = (),
    last: bool = False,
    dense_epochs: int = 0,
    epochs: int = 30,
    tune_epochs: int = 0,
    search_epochs: int = 5,
    batch_size: int = 128,
    lr: float = 0.1,
    tune_lr: float = 0.01,
    weight_decay: float = 1e-4,
    seed: int = 0,
    checkpoint: Path | None = None,
    cpu: bool = False,
) -> Network:
    """Trains a network in factorised form and cuts it to a target (a step of a recipe).

    Args:
        network: trained or not; unchanged.
        task: its data.
        rank: keep at most this share of every layer's full rank. At most one of the three targets
            is given; without one the network has the ranks that training left.
        parameters: keep at most this share of the parameters.
        macs: keep at most this share of the MACs.
        order: in which components leave for ``parameters`` or ``macs``, see
            :meth:`Decomposed.worth`.
        lam: weight of the hierarchical group lasso, or "auto": the smallest that reaches the
            target (``parameters`` or ``macs``) in a short run.
        sampler: see :class:`LowRankTraining`.
        eps: smallest importance of a component that stays after an epoch.
        full_pass: see :class:`LowRankTraining`.
        start: share of the full rank with which layers start; with the sampler "full", ``lam`` 0
            and ``dense_epochs`` this is Pufferfish (.25).
        skip: paths of modules that stay dense.
        last: factorise the classifier too.
        dense_epochs: of plain training before factorising.
        epochs: of factorised training.
        tune_epochs: of plain training after the cut.
        search_epochs: of each short run of "auto".
        batch_size: samples a batch.
        lr: learning rate at the start; falls to a tenth at half and at three quarters.
        tune_lr: constant learning rate after the cut.
        weight_decay: of matrices and kernels.
        seed: of data order and sampled ranks.
        checkpoint: file that holds the run's state; an interrupted run resumes from it.
        cpu: stay on the CPU although there is a GPU.

    Returns:
        A network of plain layers; its record has the ranks and the MACs that training took.

    Raises:
        InputError: if an option is out of range.
        BudgetError: if the target cannot be reached.
        UnsupportedError: if there is nothing to factorise.
    """
    target = _target(rank, parameters, macs)
    stages = {"dense": dense_epochs, "low-rank": epochs, "tune": tune_epochs}
    if min(*stages.values(), search_epochs) < 0:
        raise InputError("low-rank takes no negative number of epochs")
    if lam == "auto" and target[0] not in ("parameters", "macs"):
        raise InputError('lam "auto" needs a target: give a share of parameters or macs')
    module = copy.deepcopy(network.module)
    before = _cost(module, network)

    def stage_file(stage: str) -> Path | None:
        return checkpoint and checkpoint.with_suffix(f".{stage}.state")

    def plain(part: nn.Module, stage: str, rate: float) -> None:
        rule = Supervised(
            part,
            task,
            optimizer=published_sgd(part, lr=rate, weight_decay=weight_decay),
            schedule=constant,
        )
        _fit(rule, stage, stages[stage], stage_file(stage))

    def _fit(rule: Rule, stage: str, length: int, file: Path | None) -> None:
        fit(
            rule,
            task,
            epochs=length,
            batch_size=batch_size,
            seed=seed_of(stage, seed),
            checkpoint=file,
            cpu=cpu,
            title=f"low-rank: {stage}",
        )

    if dense_epochs:
        plain(module, "dense", lr)
        module.cpu()

    def rule_of(part: Decomposed, weight: float) -> LowRankTraining:
        return LowRankTraining(
            part,
            task,
            lam=weight,
            sampler=sampler,
            eps=eps,
            full_pass=full_pass,
            optimizer=published_sgd(part, lr=lr, weight_decay=weight_decay),
        )

    limit = before.get(target[0], 0) * target[1]
    if lam == "auto":
        chosen = search_lam(
            module,
            task,
            lambda part, weight: _fit(rule_of(part, weight), "search", search_epochs, None),
            limit,
            lambda part: part.parameters_at() if target[0] == "parameters" else part.macs_at(),
            skip=skip,
            last=last,
        )
    else:
        chosen = float(lam)
    decomposed = decompose(module, network.example_inputs, skip=skip, last=last, share=start)
    rule = rule_of(decomposed, chosen)
    _fit(rule, "low-rank", epochs, stage_file("low-rank"))
    decomposed.cpu()
    trained = decomposed.ranks()
    small = _cut(decomposed, target, limit, order, task)
    if tune_epochs:
        plain(small, "tune", tune_lr)
        small.cpu()
    options = {
        target[0]: target[1] if target[0] else None,
        "order": order,
        "lam": chosen,
        "sampler": sampler,
        "eps": eps,
        "full_pass": full_pass,
        "start": start,
        "skip": list(skip),
        "last": last,
        "dense_epochs": dense_epochs,
        "epochs": epochs,
        "tune_epochs": tune_epochs,
        "batch_size": batch_size,
        "lr": lr,
        "tune_lr": tune_lr,
        "weight_decay": weight_decay,
        "seed": seed,
    }
    options.pop("", None)
    report = _report(decomposed, before) | {
        "trained_ranks": trained,
        "training_macs": rule.macs,
    }
    return network.after("low-rank", options, report, module=small)


def svd(
    network: Network,
    task: Task,
    *,
    rank: float | None = None,
    parameters: float | None = None,
    macs: float | None = None,
    energy: float | None = None,
    skip: Collection[str] = (),
    last: bool = False,
    epochs: int = 0,
    batch_size: int = 128,
    lr: float = 0.01,
    weight_decay: float = 1e-4,
    seed: int = 0,
    checkpoint: Path | None = None,
    cpu: bool = False,
) -> Network:
    """Cuts a trained network by its singular values (a step of a recipe).

    Args:
        network: trained; unchanged.
        task: its data, for batch-norm statistics and fine-tuning.
        rank: keep this share of every layer's full rank. One of the four is given; with none,
            .5 of the parameters.
        parameters: keep at most this share of the parameters; every layer keeps the same share
            of its energy.
        macs: keep at most this share of the MACs, likewise.
        energy: share of the squared singular values that every layer keeps.
        skip: paths of modules that stay dense.
        last: factorise the classifier too.
        epochs: of fine-tuning the factors.
        batch_size: samples a batch.
        lr: constant learning rate of fine-tuning.
        weight_decay: of matrices and kernels.
        seed: of the data order.
        checkpoint: file that holds the state of fine-tuning.
        cpu: stay on the CPU although there is a GPU.

    Raises:
        InputError: if an option is out of range.
        BudgetError: if the target cannot be reached.
        UnsupportedError: if there is nothing to factorise.
    """
    if energy is not None and not 0.0 < energy <= 1.0:
        raise InputError(f"energy must be a share in (0, 1], not {energy}")
    if energy is not None and (rank, parameters, macs) != (None, None, None):
        raise InputError("give one target, not energy and another")
    if epochs < 0:
        raise InputError("svd takes no negative number of epochs")
    if (rank, parameters, macs, energy) == (None, None, None, None):
        parameters = 0.5
    target = _target(rank, parameters, macs)
    before = _cost(network.module, network)
    decomposed = decompose(
        copy.deepcopy(network.module).cpu(), network.example_inputs, skip=skip, last=last
    )
    if energy is not None:
        # Component b stays if what a cut there would lose is more than may be lost.
        lost = 1.0 - energy
        worth = decomposed.worth("energy")
        decomposed.set_ranks({n: max(1, int((w > lost + 1e-12).sum())) for n, w in worth.items()})
        target = ("energy", energy)
    limit = before.get(target[0], 0) * target[1]
    small = _cut(decomposed, target, limit, "energy", task)
    if epochs:
        rule = Supervised(
            small,
            task,
            optimizer=published_sgd(small, lr=lr, weight_decay=weight_decay),
            schedule=constant,
        )
        fit(
            rule,
            task,
            epochs=epochs,
            batch_size=batch_size,
            seed=seed,
            checkpoint=checkpoint,
            cpu=cpu,
            title="fine-tuning",
        )
        small.cpu()
    options = {
        target[0]: target[1],
        "skip": list(skip),
        "last": last,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "weight_decay": weight_decay,
        "seed": seed,
    }
    return network.after("svd", options, _report(decomposed, before), module=small)


def _target(rank: float | None, parameters: float | None, macs: float | None) -> tuple[str, float]:
    named = (("rank", rank), ("parameters", parameters), ("macs", macs))
    given = {name: value for name, value in named if value is not None}
    if len(given) > 1:
        raise InputError(f"give one target, not {' and '.join(given)}")
    name, value = next(iter(given.items()), ("", 1.0))
    if not 0.0 < value <= 1.0:
        raise InputError(f"{name} must be a share in (0, 1], not {value}")
    return name, value


def _cost(module: nn.Module, network: Network) -> dict[str, int]:
    graph = Graph.trace(module, network.example_inputs)
    return {"parameters": graph.parameters, "macs": graph.macs}


def _cut(
    decomposed: Decomposed, target: tuple[str, float], limit: float, order: Order, task: Task
) -> nn.Module:
    """Truncates to the target and exports, with fresh batch-norm statistics."""
    name, share = target
    if name == "rank":
        decomposed.set_ranks(decomposed.share_of_ranks(share))
    elif name in ("parameters", "macs"):
        cost = decomposed.parameters_at if name == "parameters" else decomposed.macs_at
        if cost() > limit:
            decomposed.set_ranks(decomposed.ranks_within(limit, cost, order=order))
    small = decomposed.export()
    recalibrate_on(small, task)
    return small.eval()


def _report(decomposed: Decomposed, before: Mapping[str, int]) -> dict[str, Any]:
    return {
        "ranks": {
            name: f"{layer.rank} of {layer.full_rank}" for name, layer in decomposed.layers.items()
        },
        "dense": dict(decomposed.dense),
        "parameters": [before["parameters"], decomposed.parameters_at()],
        "macs": [before["macs"], decomposed.macs_at()],
    }
