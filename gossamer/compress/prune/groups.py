"""All removable units of a network numbered through, with sums over their parameters.

Criteria and half-space optimizers need the same arithmetic: a number for every unit, summed over
all parameter entries that belong to it, wherever they lie. :class:`Groups` keeps one index map for
each (parameter, axis), so that a sum over a million units costs one reduction and one
``index_add_`` for each tensor and no loop over units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from gossamer.core.dependency import Dependency, Family


@dataclass(frozen=True)
class Entry:
    """One axis of one parameter whose indices belong to units.

    Attributes:
        name: state-dict name.
        tensor: the parameter itself.
        axis: which axis.
        owner: unit of each index, counted over all families, ``[size of axis]``; an index that
            belongs to none has the number ``Groups.total``.
        role: "producer", "accessory" or "consumer".
    """

    name: str
    tensor: Tensor
    axis: int
    owner: Tensor
    role: str

    def reduce(self, values: Tensor) -> Tensor:
        """Sums ``values`` (shaped as the tensor) over all other axes, ``[size of axis]``."""
        other = [axis for axis in range(values.ndim) if axis != self.axis]
        return values.sum(other) if other else values

    def spread(self, values: Tensor) -> Tensor:
        """One value a unit, ``[total + 1]``, laid along the axis and broadcastable."""
        shape = [1] * self.tensor.ndim
        shape[self.axis] = -1
        return values[self.owner].to(self.tensor.dtype).view(shape)


class Groups:
    """Zero-invariant groups: the trainable entries whose zeroing silences a unit.

    Args:
        entries: where the units' parameters are.
        sizes: units of each family.
        names: of the families.

    Attributes:
        total: units over all families.
        family: family of each unit, ``[total]``, counted as in ``sizes``.
        elements: parameter entries of each unit, ``[total]``.
    """

    def __init__(
        self, entries: Iterable[Entry], sizes: Sequence[int], names: Sequence[str] | None = None
    ) -> None:
        self.entries = list(entries)
        self.sizes = tuple(sizes)
        self.names = tuple(names or (str(i) for i in range(len(self.sizes))))
        self.total = sum(self.sizes)
        if not self.entries or self.total == 0:
            raise UnsupportedError(
                "the network has no removable groups with trainable parameters, so there is "
                "nothing to prune"
            )
        self.device = self.entries[0].tensor.device
        self.family = torch.repeat_interleave(
            torch.arange(len(self.sizes)), torch.tensor(self.sizes)
        ).to(self.device)
        self.elements = self.sum([torch.ones_like(entry.tensor) for entry in self.entries])
        #: Position in ``dependency.families`` of each family here.
        self.indices: tuple[int, ...] = tuple(range(len(self.sizes)))

    @classmethod
    def of(
        cls,
        module: nn.Module,
        dependency: Dependency,
        *,
        roles: Sequence[str] = ("producer", "accessory"),
        silenceable: bool = False,
    ) -> Groups:
        """The groups of ``module``.

        Args:
            module: whose parameters are meant.
            dependency: its removable families.
            roles: which members count.
            silenceable: leave out families whose units zero parameters do not silence: those
                that a normalisation or softmax runs over, and those with units that have no
                trainable parameter of their own.
        """
        parameters = dict(module.named_parameters(remove_duplicate=False))
        families = [
            f for f in dependency.families if not silenceable or _is_silenceable(f, parameters)
        ]
        total = sum(family.units for family in families)
        entries: list[Entry] = []
        seen: set[tuple[int, int, int]] = set()
        offset = 0
        for family in families:
            for member in family.members:
                if member.role not in roles or member.name not in parameters:
                    continue
                tensor = parameters[member.name]
                # A shared parameter has several names, but its entries count once.
                key = (id(tensor), member.axis, family.index)
                if key in seen:
                    continue
                seen.add(key)
                owner = member.owner.to(tensor.device)
                owner = torch.where(owner >= 0, owner + offset, total)
                entries.append(Entry(member.name, tensor, member.axis, owner, member.role))
            offset += family.units
        groups = cls(entries, [f.units for f in families], [f.name for f in families])
        groups.indices = tuple(family.index for family in families)
        return groups

    @classmethod
    def whole(cls, module: nn.Module, segments: Sequence[Sequence[str]]) -> Groups:
        """One group for each list of parameter names: operators that are erased as a whole.

        Raises:
            InputError: if the module has no parameter of such a name.
        """
        parameters = dict(module.named_parameters(remove_duplicate=False))
        entries = []
        for unit, names in enumerate(segments):
            for name in names:
                if name not in parameters:
                    raise InputError(f"the network has no parameter {name}")
                tensor = parameters[name]
                axis_size = tensor.shape[0] if tensor.ndim else 1
                owner = torch.full((axis_size,), unit, device=tensor.device)
                entries.append(Entry(name, tensor, 0, owner, "producer"))
        return cls(entries, [1] * len(segments), ["+".join(names) for names in segments])

    def sum(self, values: Sequence[Tensor]) -> Tensor:
        """Sums one tensor of values for each entry over each unit, ``[total]``."""
        result = torch.zeros(self.total + 1, device=self.device)
        for entry, value in zip(self.entries, values, strict=True):
            result.index_add_(0, entry.owner, entry.reduce(value).to(result.dtype))
        return result[: self.total]

    def sum_over(self, value: Callable[[Tensor], Tensor]) -> Tensor:
        """Like :meth:`sum` with ``value(parameter)`` for each entry."""
        return self.sum([value(entry.tensor.detach()) for entry in self.entries])

    def norms(self) -> Tensor:
        """Euclidean norm of each unit's parameters, ``[total]``."""
        return self.sum_over(torch.square).sqrt()

    def zero(self) -> Tensor:
        """Which units are exactly zero, ``[total]`` bool (no squares, so none underflows)."""
        return self.sum_over(lambda p: (p != 0).float()) == 0

    @torch.no_grad()
    def scale_(self, factor: Tensor) -> None:
        """Multiplies each unit's parameters by ``factor`` ``[total]`` in place."""
        padded = torch.cat([factor, factor.new_ones(1)])
        for entry in self.entries:
            entry.tensor.mul_(entry.spread(padded))

    @torch.no_grad()
    def silence_(self, which: Tensor) -> None:
        """Sets the parameters of the units in ``which`` (``[total]`` bool) to exact zero."""
        padded = torch.cat([which, which.new_zeros(1)]).float()
        for entry in self.entries:
            entry.tensor.masked_fill_(entry.spread(padded) > 0, 0.0)

    def split(self, values: Tensor) -> list[Tensor]:
        """``values`` ``[total]`` as one tensor for each family."""
        return list(values.split(list(self.sizes)))

    def removal(self, which: Tensor) -> Mapping[int, Tensor]:
        """``which`` (``[total]`` bool) as surgery takes it; families that lose nothing left out."""
        return {
            index: mask.cpu()
            for index, mask in zip(self.indices, self.split(which), strict=True)
            if bool(mask.any())
        }


def _is_silenceable(family: Family, parameters: Mapping[str, Tensor]) -> bool:
    makes = torch.zeros(family.units + 1, dtype=torch.bool)
    for member in family.members:
        tensor = parameters.get(member.name)
        if member.role != "consumer" and tensor is not None and tensor.requires_grad:
            makes[member.owner] = True  # an index without owner (-1) marks the spare entry
    return family.exactness == "exact" and bool(makes[:-1].all())
