"""What a unit's activations say of its worth: zeros, ranks, and what its readers would miss.

Three criteria that need samples but no labels. All look at what the layers that *read* a unit get
to see, so activation functions and normalisations behind the unit are counted:

- **APoZ**: the average share of zeros; a unit that is mostly zero is worth little (Hu et al.,
  "Network trimming", arXiv:1607.03250);
- **HRank**: the average rank of a unit's feature maps; maps of low rank hold little (Lin et al.,
  CVPR 2020, arXiv:2002.10179);
- **ThiNet**: units leave greedily, next the one without which the readers' outputs change least,
  given those that have left before (Luo, Wu and Lin, ICCV 2017, arXiv:1707.06342, algorithm 1). The
  paper then scales the channels that stay by least squares:
  :func:`gossamer.compress.prune.reconstruction.refit`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from gossamer.compress.prune.groups import Entry, Groups
from gossamer.compress.prune.layer_values import LayerValues, as_module
from gossamer.core.errors import UnsupportedError
from gossamer.core.graph import argument, op_name
from gossamer.core.task import Task, device_of, to_device
from gossamer.parts.padding import padded

if TYPE_CHECKING:
    from gossamer.core.dependency import Dependency

Scores = list[Tensor]


def nonzero_share(
    module: nn.Module, dependency: Dependency, task: Task, *, batches: int = 8,
    batch_size: int = 64, seed: int = 0,
) -> Scores:  # fmt: skip
    """APoZ turned round: the share of a unit's activations that are not zero, 0 to 1.

    Args:
        module: whose units are scored; families that no convolution or linear layer reads get 1.
        dependency: its removable families.
        task: gives samples of "train".
        batches: how many batches are averaged.
        batch_size: samples a batch.
        seed: chooses the batches.

    Raises:
        UnsupportedError: if no convolution or linear layer reads a removable unit.
    """

    groups, readers = _readers(module, dependency, ("conv1d", "conv2d", "conv3d", "linear"))
    total, count = _zeros(groups), _zeros(groups)
    for reader, seen in _seen(module, dependency, readers, task, batches, batch_size, seed):
        owner = readers[reader.weight].owner
        flat = seen.flatten(2) if seen.ndim > 2 else seen.unsqueeze(2)
        _add(total, owner, (flat != 0).float().mean((0, 2)))
        _add(count, owner, torch.ones(len(owner), device=groups.device))
    known = count[:-1] > 0
    return groups.split(torch.where(known, total[:-1] / count[:-1].clamp(min=1), 1.0))


def map_rank(
    module: nn.Module, dependency: Dependency, task: Task, *, batches: int = 8,
    batch_size: int = 64, seed: int = 0,
) -> Scores:  # fmt: skip
    """HRank: the average rank of a unit's feature maps.

    Args:
        module: whose units are scored; families without maps (of linear layers, say) get the mean
            score of the others, so that their ranks decide nothing.
        dependency: its removable families.
        task: gives samples of "train".
        batches: how many batches are averaged.
        batch_size: samples a batch.
        seed: chooses the batches.

    Raises:
        UnsupportedError: if no convolution reads a removable unit.
    """
    groups, readers = _readers(module, dependency, ("conv2d",))
    total, count = _zeros(groups), _zeros(groups)
    for reader, seen in _seen(module, dependency, readers, task, batches, batch_size, seed):
        owner = readers[reader.weight].owner
        _add(total, owner, torch.linalg.matrix_rank(seen.float()).float().mean(0))
        _add(count, owner, torch.ones(len(owner), device=groups.device))
    known = count[:-1] > 0
    scores = total[:-1] / count[:-1].clamp(min=1)
    return groups.split(torch.where(known, scores, scores[known].mean()))


def greedy_reconstruction(
    module: nn.Module, dependency: Dependency, task: Task, *, positions: int = 10,
    batches: int = 4, batch_size: int = 64, seed: int = 0,
) -> Scores:  # fmt: skip
    """ThiNet: the order in which units would leave, as a share of the family.

    For each family the readers' outputs are sampled at random positions and channels; what each
    unit adds to them is known, and the unit leaves next with which the sum over all that left has
    the smallest square. Work grows with the square of the units and the number of samples.

    Args:
        module: whose units are scored; families that no convolution or linear layer reads get 1.
        dependency: its removable families.
        task: gives samples of "train".
        positions: sampled of each image and reader (the paper takes 10).
        batches: of samples.
        batch_size: samples a batch.
        seed: chooses batches, positions and channels.

    Raises:
        UnsupportedError: if no convolution or linear layer reads a removable unit.
    """
    groups, readers = _readers(module, dependency, ("conv2d", "linear"))
    generator = torch.Generator().manual_seed(seed)
    parts: dict[int, list[Tensor]] = {}
    for reader, seen in _seen(module, dependency, readers, task, batches, batch_size, seed):
        entry = readers[reader.weight]
        layer = as_module(reader.node, entry.tensor)
        given = _contributions(layer, seen, positions, generator)
        units = torch.zeros(len(given), groups.total + 1, device=groups.device)
        units.index_add_(1, entry.owner, given)
        for family in groups.family[entry.owner[entry.owner < groups.total]].unique().tolist():
            mine = (groups.family == family).nonzero().flatten()
            parts.setdefault(int(family), []).append(units[:, mine])
    scores = torch.ones(groups.total, device=groups.device)
    for family, found in parts.items():
        scores[groups.family == family] = _leaving_order(torch.cat(found))
    return groups.split(scores)


def _leaving_order(given: Tensor) -> Tensor:
    """When each unit leaves, ``[units]`` in (0, 1], of what it adds, ``[samples, units]``.

    With G the products of the columns, the square of a sum over a set grows by
    ``2 sum of G[set, c] + G[c, c]`` when c joins it.
    """
    products = given.double().T @ given.double()
    units = len(products)
    growth = products.diagonal().clone()
    order = torch.zeros(units, dtype=torch.float64, device=given.device)
    for place in range(units):
        chosen = int(growth.argmin())
        order[chosen] = place + 1
        growth += 2.0 * products[chosen]
        growth[chosen] = torch.inf
    return (order / units).to(torch.float32)


def _contributions(
    reader: nn.Module, seen: Tensor, positions: int, generator: torch.Generator
) -> Tensor:
    """What each input channel adds to sampled outputs, ``[samples, input channels]``."""
    if isinstance(reader, nn.Linear):
        # The positions of a linear layer are whatever lies between batch and features.
        rows = seen.movedim(1, -1).flatten(0, -2)
        chosen = torch.randint(len(rows), (positions * len(seen),), generator=generator)
        weight = reader.weight.detach()
        filters = torch.randint(len(weight), (len(chosen),), generator=generator)
        return rows[chosen.to(rows.device)] * weight[filters.to(rows.device)]
    assert isinstance(reader, nn.Conv2d)
    kernel, dilation = reader.kernel_size, reader.dilation
    x, zeros = padded(seen, kernel, reader.padding, dilation)
    # [batch, channels * taps, places]
    windows = F.unfold(x, kernel, dilation, (zeros[0], zeros[1]), reader.stride)
    batch, _, places = windows.shape
    at = torch.randint(places, (batch, positions), generator=generator).to(x.device)
    rows = windows.gather(2, at.unsqueeze(1).expand(-1, windows.shape[1], -1))
    rows = rows.permute(0, 2, 1).reshape(batch * positions, x.shape[1], -1)
    weight = reader.weight.detach().flatten(2)
    filters = torch.randint(len(weight), (len(rows),), generator=generator).to(x.device)
    return (rows * weight[filters]).sum(2)


def _zeros(groups: Groups) -> Tensor:
    return torch.zeros(groups.total + 1, device=groups.device)


def _add(total: Tensor, owner: Tensor, values: Tensor) -> None:
    total.index_add_(0, owner, values.to(total))


@dataclass(frozen=True)
class _Reader:
    weight: str
    node: fx.Node


def _readers(
    module: nn.Module, dependency: Dependency, kinds: tuple[str, ...]
) -> tuple[Groups, dict[str, Entry]]:
    """The weights of such operators that read removable units, with their entries."""
    groups = Groups.of(module, dependency, roles=("consumer",))
    nodes = LayerValues(dependency.graph, kinds).places
    found: dict[str, Entry] = {}
    for entry in groups.entries:
        plain = all(_groups(node) == 1 for node in nodes.get(entry.name, ()))
        if entry.name in nodes and entry.axis == 1 and plain:
            found[entry.name] = entry
    if not found:
        raise UnsupportedError(
            f"no {' or '.join(kinds)} reads a removable unit, so its activations cannot be seen; "
            "use another criterion"
        )
    return groups, found


def _groups(node: fx.Node) -> int:
    return 1 if op_name(node.target) == "linear" else argument(node, 6, "groups", 1)


def _seen(
    module: nn.Module, dependency: Dependency, readers: Mapping[str, Entry], task: Task,
    batches: int, batch_size: int, seed: int,
) -> Iterator[tuple[_Reader, Tensor]]:  # fmt: skip
    """What each reader gets of each batch, with its channels on axis 1."""
    device = device_of(module)
    stream = task.batches("train", batch_size=batch_size, seed=seed, shuffle=True)
    inputs: list[tuple[_Reader, Tensor]] = []

    def keep(name: str, node: fx.Node, given: Tensor, _: Any) -> None:
        # A reader that runs twice in a pass is counted both times.
        if name in readers:
            linear = op_name(node.target) == "linear"
            # A copy: what runs later may write over it.
            inputs.append(
                (_Reader(name, node), (given.movedim(-1, 1) if linear else given).clone())
            )

    values = LayerValues(dependency.graph, ("conv1d", "conv2d", "conv3d", "linear"))
    run = values.watching(keep)
    with torch.no_grad():
        for _, batch in zip(range(batches), stream, strict=False):
            task.outputs(run, to_device(batch, device))
            yield from inputs
            inputs.clear()
