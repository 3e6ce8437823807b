"""Removable units: known groups, and an oracle that needs no label."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gossamer.core.dependency import Dependency, analyse
from gossamer.core.errors import InputError
from tests.core.small_networks import NETWORKS, build


def members(dependency: Dependency, name: str) -> dict[tuple[str, int], list[int]]:
    (family,) = [f for f in dependency.families if f.name == name]
    return {(m.name, m.axis): m.owner.tolist() for m in family.members}


def test_a_residual_stream_is_one_family_and_flattening_makes_blocks():
    module, inputs = build("residual")
    dependency = analyse(module, inputs)
    assert [(f.name, f.units, f.exactness) for f in dependency.families] == [
        ("stem", 8, "exact"),
        ("conv1", 8, "exact"),
    ]
    stream = members(dependency, "stem")
    eight = list(range(8))
    assert stream["stem.weight", 0] == stream["conv2.weight", 0] == eight
    assert stream["conv1.weight", 1] == stream["bn2.running_var", 0] == eight
    assert stream["head.weight", 1] == [i // 4 for i in range(32)]


def test_concatenation_is_read_with_offsets():
    module, inputs = build("dense")
    dependency = analyse(module, inputs)
    first, second = members(dependency, "a"), members(dependency, "b")
    nothing = [-1]
    assert first["bn.weight", 0] == [*range(6), *nothing * 4]
    assert second["bn.weight", 0] == [*nothing * 6, *range(4)]
    assert second["c.weight", 1] == [*nothing * 6, *range(4)]
    # The convolution that classifies keeps its outputs.
    assert not any(m.name == "head.weight" and m.axis == 0 for f in dependency.families
                   for m in f.members)  # fmt: skip


def test_heads_and_their_positions_are_two_families():
    module, inputs = build("attention")
    dependency = analyse(module, inputs)
    assert sorted(f.units for f in dependency.families if f.name == "qkv") == [4, 4]
    owners = [
        {(m.name, m.axis): m.owner.tolist() for m in f.members}
        for f in dependency.families
        if f.name == "qkv"
    ]
    expected = [[i // 4 for i in range(16)], [i % 4 for i in range(16)]]
    assert sorted(o["proj.weight", 1] for o in owners) == sorted(expected)
    assert sorted(o["qkv.weight", 0] for o in owners) == sorted(3 * e for e in expected)
    stream = next(f for f in dependency.families if f.units == 16)
    assert stream.exactness == "approximate"


def test_grouped_queries_leave_with_their_key_and_value_head():
    module, inputs = build("grouped query")
    dependency = analyse(module, inputs)
    tables = [{(m.name, m.axis): m.owner.tolist() for m in f.members} for f in dependency.families]
    (shared,) = [t for t in tables if ("k.weight", 0) in t and t["k.weight", 0][:4] == [0] * 4]
    assert shared["k.weight", 0] == [0] * 4 + [1] * 4
    assert shared["q.weight", 0] == [0] * 8 + [1] * 8
    # Rotary positions tie a position to its partner half a head away, and the frequency table.
    (rotary,) = [t for t in tables if ("frequency", 0) in t]
    assert rotary["q.weight", 0] == [0, 1, 0, 1] * 4
    assert rotary["frequency", 0] == [0, 1]


def test_depthwise_and_grouped_convolutions():
    module, inputs = build("mobile")
    mobile = analyse(module, inputs)
    table = members(mobile, "expand")
    assert table["depth.weight", 0] == list(range(8)) == table["excite.weight", 0]
    assert ("depth.weight", 1) not in table
    grouped = analyse(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 1, groups=4),
                                    nn.Conv2d(12, 2, 1)), (torch.randn(2, 3, 4, 4),))  # fmt: skip
    owners = {
        f.units: {(m.name, m.axis): m.owner.tolist() for m in f.members} for f in grouped.families
    }
    assert owners[4]["0.weight", 0] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert owners[4]["1.weight", 0] == [i // 3 for i in range(12)]
    assert owners[3]["1.weight", 0] == [i % 3 for i in range(12)]
    assert owners[2]["1.weight", 1] == [0, 1]


def test_what_an_unknown_operator_touches_is_fixed_and_named():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 6)
            self.c = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.linalg.matrix_exp(torch.diag_embed(self.a(x))).sum(-1)
            return self.c(F.relu(self.b(y)))

    dependency = analyse(Odd(), (torch.randn(2, 4),))
    assert [f.name for f in dependency.families] == ["b"]
    assert dependency.pins and "no rule" in dependency.pins[0].why


@pytest.mark.parametrize("name", NETWORKS)
def test_units_are_complete_and_minimal(name):
    """Whatever a unit's producers compute, nothing changes once its readers ignore it.

    And every reader is needed: if one that reads the unit directly does not ignore it, the output
    changes. The test knows the eager network only.
    """
    module, inputs = build(name)
    dependency = analyse(module, inputs)
    generator = torch.Generator().manual_seed(0)
    for family in dependency.families:
        consumers = [m for m in family.members if m.role == "consumer"]
        if family.exactness != "exact" or not consumers:
            continue
        unit = int(torch.randint(family.units, (1,), generator=generator))
        outputs = []
        for noise in (0.0, 1.0):
            changed = copy.deepcopy(module).double()
            state = changed.state_dict(keep_vars=True)
            with torch.no_grad():
                for member in family.members:
                    own = member.owner == unit
                    tensor = state.get(member.name)
                    if tensor is None or not own.any():
                        continue
                    view = tensor.movedim(member.axis, 0)
                    if member.role == "consumer":
                        view[own] = 0
                    elif member.parameter and member.role == "producer":
                        view[own] += noise * torch.randn(view[own].shape, generator=generator)
            moved = [x.double() if x.is_floating_point() else x for x in inputs]
            with torch.no_grad():
                result = changed(*moved)
            outputs.append(result if isinstance(result, tuple) else (result,))
        contracted = {m.name for m in family.members if m.role == "producer"} & {
            m.name for m in consumers
        }
        if contracted:
            continue  # one tensor plays both parts (a tied embedding, a repeated layer)
        if any(m.name.startswith(("q", "k.")) for m in family.members):
            continue  # positions within a head are contracted between activations
        for a, b in zip(*outputs, strict=True):
            assert torch.allclose(a, b, atol=1e-9), family.name


def test_costs_are_predicted_without_surgery():
    from gossamer.core import surgery

    for name in NETWORKS:
        module, inputs = build(name)
        dependency = analyse(module, inputs)
        removal = {f.index: torch.arange(f.units) < f.units // 2 for f in dependency.families}
        predicted = dependency.cost(removal)
        small = surgery.remove(module, dependency, removal).module
        counted = analyse(small, inputs).graph
        assert predicted.macs == counted.macs, name
        held = sum(p.numel() for p in small.parameters())
        # Constants that move into a bias that was not there add parameters.
        assert held >= predicted.parameters
        if "leftovers" not in name:
            assert predicted.parameters == held, name


def test_bad_removals_are_refused():
    module, inputs = build("residual")
    dependency = analyse(module, inputs)
    with pytest.raises(InputError, match="would lose all"):
        dependency.removed_atoms({0: torch.ones(8, dtype=torch.bool)})
    with pytest.raises(InputError, match="has 8 units"):
        dependency.removed_atoms({0: torch.ones(3, dtype=torch.bool)})
    with pytest.raises(InputError, match="no family 7"):
        dependency.removed_atoms({7: torch.ones(3, dtype=torch.bool)})
