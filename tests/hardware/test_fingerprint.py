"""Reading a network's design from numbers."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gossamer.hardware.trace_shapes as trace_shapes
from gossamer.core.errors import InputError
from gossamer.hardware.block_recovery import recover, warped_distance
from gossamer.hardware.execution_trace import CLASSES, Trace, trace
from gossamer.hardware.fingerprint import DeepPeep, features, find_motif, leaks
from gossamer.hardware.kernel_times import SIZES_ONLY, DeviceProfile, Line, fit_line
from gossamer.hardware.trace_layers import read_layers
from gossamer.hardware.trace_shapes import read_sizes
from gossamer.models.compact_blocks import FAMILIES, random_network

attack = DeepPeep(SIZES_ONLY)


def identified(seen: Trace) -> str:
    return attack.identify(seen).family


def test_depthwise_separable_from_sizes() -> None:
    shapes = [(32, 112), (32, 112), (64, 112), (64, 56), (128, 56), (128, 56), (128, 56)]
    shapes += [(128, 28), (256, 28), (256, 28), (256, 28)]
    seen = Trace.of_events([4 * c * h * h for c, h in shapes], side=112)
    assert identified(seen) == "depthwise-separable"
    spec = attack.recover(seen, "depthwise-separable")
    assert [layer.channels for layer in spec.layers] == [c for c, _ in shapes]
    assert [layer.height for layer in spec.layers] == [h for _, h in shapes]
    assert [layer.stride for layer in spec.layers] == [1, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1]
    assert spec.parameters["strides"] == [1, 2, 1, 2, 1]
    assert [block.outputs for block in spec.blocks[1:]] == [64, 128, 128, 256, 256]


def fire_trace(modules: int = 1, *, swapped: bool = False) -> Trace:
    """Input of 96 x 55 x 55; squeeze 16, expand 64 and 64 (or 48 and 64, in either order)."""
    allocated, freed, before = [4 * 96 * 55 * 55], [0], 96
    for _ in range(modules):
        first, second = (64, 48) if swapped else (64, 64)
        sizes = (16, first, second, first + second)
        allocated += [4 * c * 55 * 55 for c in sizes]
        gone = (before, 0, 16, first + second)
        freed += [4 * c * 55 * 55 for c in gone]
        before = first + second
    return Trace.of_events(allocated, freed=freed, channels=3, side=55)


def test_fire_module_from_sizes() -> None:
    seen = fire_trace()
    assert (seen.allocated[0, 1:] / 4).tolist() == [48400, 193600, 193600, 387200]
    assert identified(seen) == "fire"
    found = attack.recover(seen, "fire").parameters
    assert (found["squeeze"], found["expand1"], found["expand3"]) == (16, 64, 64)


def test_branches_in_any_order() -> None:
    assert identified(fire_trace(3, swapped=True)) == "fire"
    assert attack.recover(fire_trace(3, swapped=True), "fire").parameters["expand1"] == 64


def test_dense_block_from_sizes() -> None:
    allocated, freed, width = [64], [0], 64
    for _ in range(4):
        allocated += [32, width + 32]
        freed += [0, width + 32]
        width += 32
    unit = 4 * 28 * 28
    seen = Trace.of_events(
        [unit * c for c in allocated], freed=[unit * c for c in freed], channels=3, side=28
    )
    assert identified(seen) == "dense"
    spec = attack.recover(seen, "dense")
    assert spec.parameters["growth"] == 32
    joins = read_layers(seen, SIZES_ONLY)
    assert [joins.events[e].channels for e in joins.dense] == [96, 128, 160, 192]
    assert (np.diff(joins.live[list(joins.dense)]) > 0).all() and joins.ramps()


def test_inverted_residual_from_sizes() -> None:
    allocated, freed = [24], [0]
    for _ in range(3):  # expand, filter, narrow, add
        allocated += [144, 144, 24, 24]
        freed += [0, 144, 144, 48]
    unit = 4 * 56 * 56
    seen = Trace.of_events(
        [unit * c for c in allocated], freed=[unit * c for c in freed], channels=3, side=56
    )
    assert identified(seen) == "inverted residual"
    assert attack.recover(seen, "inverted residual").parameters["expansion"] == 6.0
    assert len(read_layers(seen, SIZES_ONLY).adds) == 3


def recorded(family: str, seed: int, **options: object) -> Trace:
    return trace(
        random_network(family, seed=seed), (3, 32), level="L2", repeats=2, warmup=1,
        **options,  # type: ignore[arg-type]
    )  # fmt: skip


def test_weights_do_not_matter_and_names_are_not_used() -> None:
    one = recorded("dense", 3)
    other_weights = random_network("dense", seed=3)
    with torch.no_grad():
        for parameter in other_weights.parameters():
            parameter.normal_()
    two = trace(other_weights, (3, 32), level="L1", repeats=1, warmup=1)
    assert np.array_equal(one.allocated, two.allocated)
    assert np.array_equal(one.freed, two.freed)
    assert attack.identify(one.sizes_only()) == attack.identify(two.sizes_only())
    order = np.random.default_rng(0).permutation(len(one.classes))
    shuffled = Trace(**{**vars(one), "classes": one.classes[order]})
    timed = DeepPeep(made_up_profile())
    assert timed.identify(shuffled) == timed.identify(one) == timed.identify(one.at("L1"))
    assert timed.recover(shuffled, "dense") == timed.recover(one.at("L1"), "dense")


def made_up_profile() -> DeviceProfile:
    lines = {
        (k, kind): Line(2e-5, 1e-10) for k in (1, 3, 5, 7)
        for kind in ("dense", "grouped", "depthwise")
    }  # fmt: skip
    return DeviceProfile(lines, Line(1e-5, 1e-10), Line(5e-6, 1e-10))  # type: ignore[arg-type]


def test_a_trace_holds_numbers_only() -> None:
    seen = recorded("fire", 0)
    for name, value in vars(seen).items():
        assert name == "level" or (isinstance(value, np.ndarray) and value.dtype.kind in "iuf")
    lower = seen.at("L1")
    assert lower.classes.size == 0 and lower.allocated is seen.allocated
    lowest = seen.at("L0")
    assert lowest.events == 0 and lowest.starts.size == 0 and lowest.live.size == 0
    with pytest.raises(InputError, match="does not show level L2"):
        lower.at("L2")
    with pytest.raises(InputError, match="shows no sizes"):
        attack.identify(lowest)
    # Nothing the attack is made of takes a module.
    for name in ("identify", "recover"):
        given = list(inspect.signature(getattr(DeepPeep, name)).parameters)
        assert given[:2] == ["self", "trace"]
    assert "nn" not in vars(trace_shapes)


def test_batches_double_activations_and_not_weights() -> None:
    module = random_network("residual", seed=0)
    seen = trace(module, (3, 32), batches=(1, 2, 4), repeats=1, warmup=1)
    assert np.array_equal(2 * seen.allocated[0], seen.allocated[1])
    assert np.array_equal(4 * seen.allocated[0], seen.allocated[2])
    slope, constant = seen.memory_line()
    weights = sum(4 * p.numel() for p in module.parameters())
    weights += sum(b.numel() * b.element_size() for b in module.buffers())
    assert constant == pytest.approx(weights, rel=1e-9)
    assert np.allclose(seen.activation_bytes(), seen.allocated[0])
    assert slope == pytest.approx(seen.peak[0] - weights)


def true_shapes(module: torch.nn.Module, x: torch.Tensor) -> dict[int, list[tuple[int, int]]]:
    """Channels and rows of the outputs of convolutions, by bytes."""
    found: dict[int, list[tuple[int, int]]] = {}

    def look(_m: object, _x: object, y: torch.Tensor) -> None:
        found.setdefault(4 * y.numel(), []).append((y.shape[1], y.shape[2]))

    hooks = [m.register_forward_hook(look) for m in module.modules()
             if isinstance(m, torch.nn.Conv2d)]  # fmt: skip
    with torch.inference_mode():
        module.eval()(x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_channels_and_strides_of_recorded_traces(family: str) -> None:
    module = random_network(family, seed=5)
    truth = true_shapes(module, torch.zeros(1, 3, 32, 32))
    seen = trace(module, (3, 32), level="L2", batches=(1,), repeats=1, warmup=0)
    events = read_sizes(seen.at("L1").sizes_only())
    convolutions = [e for e in events if CLASSES[seen.classes[e.index]] == "conv"]
    right = sum((e.channels, e.height) == truth[int(e.size)].pop(0) for e in convolutions)
    assert right >= 0.9 * len(convolutions)


def test_rounded_allocations() -> None:
    shapes = [(10, 15), (20, 15), (20, 8), (24, 8)]
    exact = [4 * c * h * h for c, h in shapes]
    seen = Trace.of_events([-(-size // 512) * 512 for size in exact], side=15)
    assert [e.channels for e in read_sizes(seen, rounding=512)][:2] == [10, 20]
    assert read_sizes(seen)[0].channels != 10  # taken for exact


def test_motif() -> None:
    sequence = np.array([9, 1, 2, 3, 1, 2, 3, 1, 2, 3, 8])
    found = find_motif(sequence)
    assert (found.start, found.length, found.repeats) == (1, 3, 3)
    assert found.coverage == pytest.approx(9 / 11)
    # One of five symbols differs: 20 % of the length.
    near = np.array([1, 2, 3, 4, 5, 1, 2, 7, 4, 5, 1, 2, 3, 4, 6])
    assert find_motif(near).length == 5 and find_motif(near, tolerance=0.1).repeats < 3
    assert find_motif(np.arange(8)).length == 0


def test_leaks_in_bits() -> None:
    families = ["plain", "dense"] * 200
    draw = np.random.default_rng(0)
    rows = [{"tells": float(f == "dense"), "silent": float(draw.integers(4))} for f in families]
    found = leaks(rows, families)
    assert found["tells"] == pytest.approx(1.0, abs=0.01) and found["silent"] < 0.02
    assert list(found) == ["tells", "silent"]


def test_lines_and_distances() -> None:
    line = fit_line([1e6, 2e6, 8e6], [3e-5, 4e-5, 1e-4])
    assert line.start == pytest.approx(2e-5) and line.slope == pytest.approx(1e-11)
    a = np.array([[0.0], [1.0], [2.0]])
    assert warped_distance(a, a) == 0.0
    assert warped_distance(a, np.array([[0.0], [1.0], [1.0], [2.0]])) == 0.0
    assert warped_distance(a, a + 1.0) == pytest.approx(2 / 3)


def test_noise_keeps_sizes_and_features_are_finite() -> None:
    seen = recorded("shuffle", 1)
    noisy = seen.noisy(0.3, seed=1)
    assert np.array_equal(noisy.allocated, seen.allocated)
    assert not np.array_equal(noisy.durations, seen.durations)
    described = features(seen.at("L1"), made_up_profile())
    assert np.isfinite(list(described.values())).all()


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "t_start,dur,alloc,free,class\n0,1e-5,4096,0,conv\n2e-5,,4096,4096,norm\n", "utf-8"
    )
    seen = Trace.from_csv(path, channels=1, side=8)
    assert seen.level == "L2" and seen.allocated.tolist() == [[4096, 4096]]
    assert np.isnan(seen.durations[0, 1])
    assert [e.channels for e in read_sizes(seen)] == [16, 16]
    path.write_text("t_start,dur,alloc,free\n0,1,many,0\n", "utf-8")
    with pytest.raises(InputError, match="line 2: alloc is 'many'"):
        Trace.from_csv(path)
    path.write_text("t_start,dur,alloc\n0,1,2\n", "utf-8")
    with pytest.raises(InputError, match="no column free"):
        Trace.from_csv(path)
    path.write_text("t_start,dur,alloc,free\n0,1,-2,0\n", "utf-8")
    with pytest.raises(InputError, match="not below 0"):
        Trace.from_csv(path)
    with pytest.raises(InputError, match="there is no trace"):
        Trace.from_csv(tmp_path / "none.csv")


def test_tracing_leaves_every_modules_mode_as_it_was() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).train()
    network[1].eval()  # frozen
    trace(network, (3, 8), batches=(1,), repeats=1, warmup=0, other_sides=False)
    assert [module.training for module in network.modules()] == [True, True, False, True]


def test_only_kernels_that_were_timed_are_looked_for() -> None:
    lines = {(k, g): Line(1e-6, 1e-9) for k in (1, 3) for g in ("dense", "grouped", "depthwise")}
    profile = DeviceProfile(lines, Line(1e-6, 1e-12), Line(1e-6, 1e-12))  # type: ignore[arg-type]
    seen = Trace.of_events(
        [4 * 16 * 64, 4 * 32 * 64],
        durations=[profile.convolution(3, 1, 3, 16, 8, 1), profile.convolution(1, 1, 16, 32, 8, 1)],
        channels=3, side=8,
    )  # fmt: skip
    spec = recover(seen, "plain", profile)
    assert [layer.kernel for layer in spec.layers] == [3, 1]


@pytest.mark.parametrize("family", ["dense", "fire"])
def test_joins_of_single_positions_are_no_blocks(family: str) -> None:
    seen = Trace.of_events([64, 32, 96, 32], freed=[0, 0, 96, 96], channels=3, side=1)
    spec = recover(seen, family, SIZES_ONLY)
    assert (spec.blocks, spec.confidence) == ((), 0.0)
