"""Worked graphs, every order and eviction of small ones, and plans that run on real bytes."""

from __future__ import annotations

import heapq
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gossamer.cli import main
from gossamer.core.errors import BudgetError, InputError
from gossamer.core.graph import Graph
from gossamer.hardware.memory_graph import MemoryGraph, minimum_peak
from gossamer.hardware.memory_map import draw_map
from gossamer.hardware.scratchpad import budgets, schedule
from gossamer.hardware.scratchpad_baselines import (
    baseline,
    baselines,
    fewest_bytes,
    linear_allocation,
)
from gossamer.hardware.scratchpad_divide import Effort, construct, improve
from gossamer.hardware.scratchpad_first_fit import first_fit
from gossamer.hardware.scratchpad_plan import BrokenPlan, Plan, Stay, replay
from gossamer.hardware.scratchpad_rows import peak_rows, solve_rows
from gossamer.hardware.scratchpad_window import Found, Window


def graph_of(text: str, sizes: list[int]) -> MemoryGraph:
    """ "->a; a->b" and the sizes of the tensors in order."""
    ops = []
    for part in text.split(";"):
        inputs, output = part.strip().split("->")
        ops.append(([t for t in inputs.split(",") if t], [output]))
    return MemoryGraph(ops, {op[1][0]: size for op, size in zip(ops, sizes, strict=True)})


A = graph_of("->a; a->b; b->c; a,c->d", [10, 100, 100, 90])
B = graph_of("->x; x->p1; x->q1; p1->p2; q1->q2; p2,q2->y", [4, 8, 8, 1, 1, 2])
C = graph_of("->t0; t0->t1; ->t2; t1->t3; t3->t4; t2,t4->t5; t5->t6", [4, 2, 2, 2, 1, 3, 3])
D = graph_of("->big; ->small; ->m; m->n; small,n->o; big,o->z", [10, 1, 4, 4, 1, 1])


def optimum(graph: MemoryGraph, budget: int, *, free: bool, solver: str) -> int | None:
    """What a solver alone comes to, without baselines; None if it proves that there is no plan."""
    if solver == "rows":
        rows = solve_rows(graph, budget, order=None if free else graph.order)
        assert rows.plan is not None or rows.infeasible
        if rows.plan is None:
            return None
        assert rows.plan.optimal or rows.bound == rows.plan.extra_bytes
        return replay(graph, rows.plan).extra_bytes
    found = Window.whole(graph, graph.order, budget, reorder=free).solve(seconds=30)
    if not isinstance(found, Found):
        assert found is False
        return None
    assert found.cost == found.bound
    plan = Plan(budget, found.order, found.stays, found.spills, found.cost)
    return replay(graph, plan).extra_bytes


@pytest.mark.parametrize("solver", ["rows", "window"])
@pytest.mark.parametrize(
    ("graph", "budget", "fixed", "free"),
    [
        (A, 200, 20, 20), (A, 209, 20, 20), (A, 210, 0, 0),
        (B, 12, 32, 10), (B, 13, 32, 0), (B, 14, 32, 0), (B, 20, 0, 0),
        (C, 6, 4, 0), (C, 7, 0, 0),
        (D, 17, 20, 0), (D, 18, 2, 0),
    ],
)  # fmt: skip
def test_worked_graphs(graph, budget, fixed, free, solver):
    assert optimum(graph, budget, free=False, solver=solver) == fixed
    assert optimum(graph, budget, free=True, solver=solver) == free
    for order, cost in (("fixed", fixed), ("free", free)):
        plan = schedule(graph, budget, order=order, seconds=20)
        assert (plan.extra_bytes, plan.status, plan.gap) == (cost, "optimal", 0.0)
        assert replay(graph, plan).extra_bytes == cost


def test_worked_budgets():
    assert [g.required for g in (A, B)] == [200, 12]
    assert minimum_peak(B).bytes == 13 == peak_rows(B)[0]
    assert budgets(B).half == 12  # 12.5, in whole bytes
    assert max(B.footprints(B.order)) == 20
    assert max(C.footprints(C.order)) == 6


def test_bytes_alone_miss_fragmentation():
    relaxed = Window.whole(C, C.order, 6, reorder=False).solve(seconds=10, addresses=False)
    assert isinstance(relaxed, Found) and relaxed.cost == 0
    # Both policies keep everything; the allocator then fails, and says so.
    for policy in ("belady", "greedy"):
        failed = baseline(C, 6, C.order, policy)
        assert (failed.extra_bytes, failed.plan) == (0, None) and failed.arena_bytes > 6


def test_worked_policies():
    assert baseline(D, 18, D.order, "belady").extra_bytes == 20
    assert baseline(D, 18, D.order, "greedy").extra_bytes == 2
    plan = baseline(A, 200, A.order, "belady").plan
    assert plan is not None and plan.spills == ((2, "a"),) and plan.fills == ((3, "a"),)


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=8),
    st.integers(1, 60),
)
def test_the_greedy_set_is_the_smallest_that_makes_room(sizes, lacking):
    graph = MemoryGraph([([], [f"t{n}"]) for n in range(len(sizes))],
                        {f"t{n}": s for n, s in enumerate(sizes)})  # fmt: skip
    subsets = itertools.chain.from_iterable(
        itertools.combinations(sizes, k) for k in range(len(sizes) + 1)
    )
    enough = [sum(s) for s in subsets if sum(s) >= lacking]
    chosen = fewest_bytes(graph, dict.fromkeys(graph.sizes, 1), lacking)
    assert sum(graph.sizes[t] for t in chosen) == (min(enough) if enough else 0)
    assert len(set(chosen)) == len(chosen)


def brute_force(graph: MemoryGraph, budget: int, *, free: bool) -> int | None:
    """Fewest bytes over all orders, evictions and addresses, by uniform-cost search on states.

    A state is what has run, where everything lies, and what memory has a copy of.
    """
    everything = frozenset(graph.order)
    start = (frozenset(), frozenset(), frozenset())
    heap = [(0, 0, start)]
    ticket = itertools.count(1)
    settled = set()

    def places(taken: dict[str, int], new: list[str]) -> Iterator[dict[str, int]]:
        if not new:
            yield taken
            return
        size = graph.sizes[new[0]]
        for address in range(budget - size + 1):
            if all(
                address + size <= other or other + graph.sizes[t] <= address
                for t, other in taken.items()
            ):
                yield from places({**taken, new[0]: address}, new[1:])

    while heap:
        cost, _, state = heapq.heappop(heap)
        if state in settled:
            continue
        settled.add(state)
        done, lies, copies = state
        if done == everything:
            return cost
        there = dict(lies)
        for op in graph.order:
            if op in done or any(p not in done for p in graph.predecessors[op]):
                continue
            if not free and op != len(done):
                continue
            now = graph.ops[op]
            live = [t for t in there if any(r not in done for r in graph.readers[t])]
            # Each live tensor stays or leaves; one that leaves and has no copy is spilled.
            for stay in itertools.product((True, False), repeat=len(live)):
                kept = {t: there[t] for t, s in zip(live, stay, strict=True) if s}
                gone = [t for t, s in zip(live, stay, strict=True) if not s]
                spilled = [t for t in gone if t not in copies]
                fetched = [t for t in now.inputs if t not in kept]
                if any(t not in copies for t in fetched):  # a spill is not read back in its step
                    continue
                moved = sum(graph.sizes[t] for t in (*spilled, *fetched))
                for taken in places(kept, [*fetched, *now.outputs]):
                    following = (
                        done | {op}, frozenset(taken.items()), copies | frozenset(spilled),
                    )  # fmt: skip
                    if following not in settled:
                        heapq.heappush(heap, (cost + moved, next(ticket), following))
    return None


@st.composite
def small_graphs(draw, least: int = 2, most: int = 5, largest: int = 3) -> MemoryGraph:
    """Random graphs; the last operator reads an early tensor, so that something has to wait."""
    count = draw(st.integers(least, most))
    ops, sizes, tensors = [], {}, []
    for number in range(count):
        some = st.lists(st.sampled_from(tensors or [""]), max_size=3, unique=True)
        inputs = draw(some) if tensors else []
        if tensors and number == count - 1:
            inputs = list(dict.fromkeys([*inputs[:2], draw(st.sampled_from(tensors[:2]))]))
        outputs = [f"t{number}"]
        if draw(st.integers(0, 4)) == 0:
            outputs.append(f"u{number}")
        ops.append((inputs, outputs))
        tensors += outputs
        for tensor in outputs:
            sizes[tensor] = draw(st.integers(1, largest))
    return MemoryGraph(ops, sizes)


@settings(max_examples=60)
@given(small_graphs(least=4), st.sampled_from([0, 0, 0, 1]), st.booleans())
def test_both_programs_agree_with_brute_force(graph, more, free):
    budget = graph.required + more
    expected = brute_force(graph, budget, free=free)
    assert optimum(graph, budget, free=free, solver="window") == expected
    assert optimum(graph, budget, free=free, solver="rows") == expected


@settings(max_examples=30)
@given(small_graphs(most=12, largest=9), st.booleans())
def test_more_memory_never_costs_more(graph, free):
    peak = minimum_peak(graph)
    fixed = max(graph.footprints(graph.order))
    assert graph.required <= peak.bytes <= fixed and peak.proved
    with pytest.raises(BudgetError, match="needs"):
        schedule(graph, graph.required - 1)
    previous = None
    for budget in sorted({graph.required, (graph.required + fixed) // 2, fixed, 2 * fixed}):
        try:
            plan = schedule(graph, budget, order="free" if free else "fixed", seconds=20)
        except BudgetError as error:
            assert "no plan exists" in str(error) and previous is None
            continue
        assert plan.optimal and replay(graph, plan).extra_bytes == plan.extra_bytes
        assert previous is None or plan.extra_bytes <= previous
        previous = plan.extra_bytes
        for other in baselines(graph, budget):
            if other.plan is not None:
                replay(graph, other.plan)
                if free or other.order == "default":
                    assert plan.extra_bytes <= other.extra_bytes
    assert previous == 0  # twice the peak


@settings(max_examples=40)
@given(small_graphs(most=8, largest=9))
def test_the_smallest_peak_is_that_of_all_orders(graph):
    orders = [o for o in itertools.permutations(graph.order) if graph.is_order(o)]
    best = min(max(graph.footprints(o)) for o in orders)
    found = minimum_peak(graph)
    assert (found.bytes, found.bound) == (best, best)
    assert max(graph.footprints(found.order)) == best and graph.is_order(found.order)
    # Without the proof: a valid order and a valid bound.
    rough = minimum_peak(graph, states=1, beam=2)
    assert rough.bound <= best <= rough.bytes and graph.is_order(rough.order)
    firsts = [min(o.index(n) for o in orders) for n in graph.order]
    lasts = [max(o.index(n) for o in orders) for n in graph.order]
    assert graph.windows == list(zip(firsts, lasts, strict=True))


@settings(max_examples=25)
@given(small_graphs(most=14, largest=9), st.booleans(), st.integers(3, 6))
def test_divide_and_conquer_gives_plans_that_run(graph, free, size):
    budget = graph.required + 2
    effort = Effort(window=size, seconds=10)
    order = minimum_peak(graph).order if free else graph.order
    plan = construct(graph, order, budget, effort, reorder=free)
    best = Window.whole(graph, order, budget, reorder=free).solve(seconds=20)
    if plan is None:
        return
    assert isinstance(best, Found)
    replay(graph, plan)
    assert plan.extra_bytes >= best.cost
    better = improve(graph, plan, effort, bound=0, reorder=free)
    replay(graph, better)
    assert best.cost <= better.extra_bytes <= plan.extra_bytes
    if not free:
        assert better.order == graph.order
    # One window over everything is the whole program.
    whole = improve(graph, plan, replace(effort, window=20), bound=0, reorder=free)
    assert whole.extra_bytes == best.cost


def test_a_copy_that_is_read_after_a_window_is_still_written():
    graph = graph_of(
        "->a; ->b; b->c; a,c->d; a,d->e; e->f; a,f->g", [1, 1, 1, 1, 4, 5, 1]
    )  # a cannot be there while f is made
    stays = (
        Stay("a", 0, 1, 0, False), Stay("b", 1, 2, 1, False), Stay("c", 2, 3, 2, False),
        Stay("a", 3, 4, 0, True), Stay("d", 3, 4, 1, False), Stay("e", 4, 5, 5, False),
        Stay("f", 5, 6, 0, False), Stay("a", 6, 6, 5, True), Stay("g", 6, 6, 6, False),
    )  # fmt: skip
    plan = Plan(9, graph.order, stays, ((2, "a"),), 3)
    replay(graph, plan)
    for reorder in (False, True):
        better = improve(graph, plan, Effort(window=4, seconds=20), bound=0, reorder=reorder)
        assert replay(graph, better).extra_bytes == 2


def test_a_budget_need_be_no_multiple_of_the_sizes():
    graph = graph_of(
        "->t0; t0->t1; ->t2; t2,t0,t1->t3; t0->t4; t3->t5; t4,t2->t6; t5,t4,t0,t1->t7",
        [24, 32, 20, 36, 16, 36, 32, 4],
    )
    plan = first_fit(graph, graph.order, 117)
    assert plan is not None and all(s.address % 4 == 0 for s in plan.stays)
    better = improve(graph, plan, Effort(window=4, seconds=20), bound=0, reorder=False)
    assert replay(graph, better).extra_bytes <= plan.extra_bytes


def test_linear_allocation_by_hand():
    graph = MemoryGraph([([], [t]) for t in "abc"], {"a": 4, "b": 3, "c": 2})
    stays = [Stay("a", 0, 1, 0, False), Stay("b", 1, 2, 0, False), Stay("c", 2, 2, 0, False)]
    placed, arena = linear_allocation(graph, stays)
    # The largest first; b above a, c in the gap below b that a leaves.
    assert {s.tensor: s.address for s in placed} == {"a": 0, "b": 4, "c": 0}
    assert arena == 7


def test_the_simulator_refuses_plans_that_do_not_run():
    plan = schedule(A, 200)
    assert replay(A, plan).highest <= 200
    a_back = next(s for s in plan.stays if s.retrieved)

    def broken(sentence: str, **changes) -> None:
        with pytest.raises(BrokenPlan, match=sentence):
            replay(A, replace(plan, **changes))

    others = tuple(s for s in plan.stays if s is not a_back)
    broken("outside", budget=199)
    broken("is not in the scratchpad", stays=others)
    broken("was not spilled", spills=())
    broken("bytes move", extra_bytes=10)
    broken("every operator once", order=(0, 1, 2, 2))
    there = next(s.address for s in plan.stays if s.tensor == "c")
    broken("overlaps", stays=(*others, replace(a_back, address=there)))
    broken("overlaps", stays=tuple(
        replace(s, last=2) if s.tensor == "a" and not s.retrieved else s for s in plan.stays
    ), spills=((3, "a"),))  # fmt: skip
    stale = tuple(replace(s, retrieved=False) if s is a_back else s for s in plan.stays)
    broken("does not make", stays=stale)
    broken("does not make b", order=(0, 2, 1, 3))
    broken("a step", spills=((9, "a"),))


def trace(module: nn.Module, *shape: int) -> Graph:
    return Graph.trace(module, (torch.randn(2, *shape),))


class Residual(nn.Module):
    """A shortcut, an activation in place, an addition in place, views and two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.skip = nn.Conv2d(3, 4, 1, bias=False)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu_(self.norm(self.conv(x)))
        s = self.skip(x)
        y += s
        return (y * self.scale).flatten(1)


def test_reading_a_network():
    graph = trace(Residual().eval(), 3, 5, 5)
    plain = MemoryGraph.from_graph(graph)
    # Input; convolution; normalisation with its ReLU; shortcut; sum, a tensor of its own; product.
    assert [(len(op.inputs), plain.sizes[op.outputs[0]]) for op in plain.ops] == [
        (0, 75), (1, 100), (1, 100), (1, 100), (2, 100), (1, 100),
    ]  # fmt: skip
    assert plain.required == 300 and plain.largest.name == "add_"
    wide = MemoryGraph.from_graph(graph, dtype_bytes=4)
    assert wide.required == 1200
    fused = MemoryGraph.from_graph(graph, fuse=True)
    # Normalisation in the convolution, product in the sum.
    assert [len(op.inputs) for op in fused.ops] == [0, 1, 1, 2]
    loaded = MemoryGraph.from_graph(graph, parameters=True)
    parameters = {t: s for t, s in loaded.sizes.items() if t not in plain.sizes}
    assert parameters == {
        "conv.weight": 12, "conv.bias": 4, "norm.weight": 4, "norm.bias": 4,
        "skip.weight": 12, "scale": 4,
    }  # fmt: skip
    folded = MemoryGraph.from_graph(graph, parameters=True, fuse=True)
    assert set(parameters) - set(folded.sizes) == {"norm.weight"}
    assert loaded.ops[1].outputs[1:] == ("conv.weight", "conv.bias")


def test_a_shared_parameter_is_loaded_once():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(torch.relu(self.linear(x)))

    loaded = MemoryGraph.from_graph(trace(Twice(), 6), parameters=True)
    assert [op.name.split()[0] for op in loaded.ops].count("load") == 1
    assert len(loaded.readers["linear.weight"]) == 2


def test_published_figures_of_resnet_and_densenet():
    kib = 1024
    resnet = trace(torchvision.models.resnet50(weights=None), 3, 224, 224)
    for fuse in (False, True):
        graph = MemoryGraph.from_graph(resnet, fuse=fuse)
        assert graph.required == minimum_peak(graph).bytes == 2352 * kib
    densenet = trace(torchvision.models.densenet121(weights=None), 3, 224, 224)
    graph = MemoryGraph.from_graph(densenet)
    assert max(graph.footprints(graph.order)) == 2058 * kib
    assert graph.required == 1568 * kib  # 256 channels of 56 x 56 read and written
    half = budgets(graph).half
    plan = schedule(graph, half, seconds=60)
    assert replay(graph, plan).extra_bytes == plan.extra_bytes
    others = [b for b in baselines(graph, half) if b.plan is not None]
    assert all(plan.extra_bytes <= b.extra_bytes for b in others)


def test_time_running_out_is_no_proof():
    generator = torch.Generator().manual_seed(0)
    ops, sizes = [([], ["t0"])], {"t0": 7}
    for n in range(1, 60):
        picked = torch.randint(max(0, n - 12), n, (2,), generator=generator).tolist()
        ops.append(([f"t{p}" for p in picked], [f"t{n}"]))
        sizes[f"t{n}"] = int(torch.randint(1, 40, (1,), generator=generator))
    graph = MemoryGraph(ops, sizes)
    peak = minimum_peak(graph)
    bytes_ = budgets(graph, peak)
    for solver in ("cp-sat", "highs", "windows"):
        plan = schedule(graph, bytes_.required + 10, solver=solver, seconds=0.5, peak=peak)
        assert plan.status == "not proved" and 0 < plan.gap <= 1
        assert plan.bound >= 2 * (bytes_.peak - bytes_.required - 10)
        assert replay(graph, plan).extra_bytes == plan.extra_bytes


def test_bad_input_is_said_in_one_sentence():
    with pytest.raises(
        BudgetError, match=r"199 bytes is too small for 3: d, which needs 210 bytes"
    ):
        schedule(MemoryGraph(A.ops, {**A.sizes, "b": 90, "c": 110}), 199)
    with pytest.raises(BudgetError, match="needs"):
        baseline(A, 199, A.order, "belady")
    with pytest.raises(InputError, match="does not run every operator once"):
        schedule(A, 200, order=(1, 0, 2, 3))
    with pytest.raises(InputError, match="must be positive"):
        schedule(A, 200, seconds=0)
    with pytest.raises(InputError, match="reads b before"):
        graph_of("b->a; ->b", [1, 1])
    with pytest.raises(InputError, match="made twice"):
        MemoryGraph([([], ["a"]), ([], ["a"])], {"a": 1})
    with pytest.raises(InputError, match="positive whole number"):
        graph_of("->a", [0])
    with pytest.raises(InputError, match="no operator makes b"):
        MemoryGraph([([], ["a"])], {"a": 1, "b": 2})
    with pytest.raises(InputError, match="no operators"):
        MemoryGraph([], {})
    with pytest.raises(InputError, match="makes nothing"):
        MemoryGraph([([], [])], {})


def test_a_graph_may_have_no_plan_though_every_operator_fits():
    # Worked graph C with t2 read in every step of its life: it cannot leave and come back.
    pinned = graph_of(
        "->t0; t0->t1; t1->t2; t1,t2->t3; t2,t3->t4; t2,t4->t5; t5->t6", [4, 2, 2, 2, 1, 3, 3]
    )
    assert pinned.required == minimum_peak(pinned).bytes == 6
    for free in (False, True):
        assert brute_force(pinned, 6, free=free) is None
        for solver in ("rows", "window"):
            assert optimum(pinned, 6, free=free, solver=solver) is None
            assert optimum(pinned, 7, free=free, solver=solver) == 0
    for solver in ("cp-sat", "highs", "windows", "auto"):
        with pytest.raises(BudgetError, match="no plan exists in 6 bytes although every operator"):
            schedule(pinned, 6, solver=solver, seconds=10)


def test_the_map_is_drawn(tmp_path):
    plan = schedule(B, 12)
    draw_map(B, plan, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    network = ["gossamer_digits_resnet", "--image-size", "8", "--channels", "1"]
    monkeypatch.setattr(sys, "argv", ["gossamer", "hardware", "schedule", *network, *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_command_writes_a_plan_that_runs(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, "--scratchpad", "1MiB", "--out", str(tmp_path / "a"), "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["plan"]["budget_bytes"] == 2**20 and report["plan"]["extra_bytes"] == 0
    assert report["checked"]["peak_bytes"] == report["peak_in_given_order_bytes"]
    assert json.loads((tmp_path / "a" / "plan.json").read_text()) == report
    assert (tmp_path / "a" / "map.png").is_file()
    tight = str(report["required_bytes"])
    assert run(monkeypatch, "--scratchpad", tight, "--order", "fixed", "--seconds", "5") == 0
    assert "checked byte by byte" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("size", "sentence"),
    [("1KB", "1,000 bytes is too small for"), ("12 parsecs", "give a size as 512KB")],
)
def test_the_command_says_what_is_wrong(monkeypatch, capsys, size, sentence):
    assert run(monkeypatch, "--scratchpad", size) == 2
    assert sentence in capsys.readouterr().err
