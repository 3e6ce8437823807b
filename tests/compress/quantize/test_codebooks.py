import copy
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import gossamer
from gossamer.compress.quantize.codebooks import (
    Learning,
    _Decode,
    _Layout,
    calibration_batches,
    cluster_weights,
    codebook,
    codebook_bits,
    compress,
    describe_neurons,
    drop_unused,
    even_sizes,
    footprint,
    formula_bits,
    group_neurons,
    index_gradient,
    kmeans_values,
    learn_codebook,
    nearest_entries,
    output_error,
    refit,
    reorder,
)
from gossamer.compress.recipe import Recipe
from gossamer.core.errors import InputError
from gossamer.core.fit import Supervised, fit, sgd
from gossamer.core.network import Network
from gossamer.datasets.digits import digits
from gossamer.models.plain import ConvNet, mlp
from gossamer.parts.codebook import (
    CodebookKernel,
    CodebookTensor,
    index_bits,
    pack_indices,
    unpack_indices,
)
from gossamer.parts.packed import PackedNetwork


@pytest.fixture(scope="module", autouse=True)
def single_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def task():
    return digits(seed=0)


@pytest.fixture(scope="module")
def trained(task):
    torch.manual_seed(0)
    module = ConvNet(1, 8, (8, "pool", 16, "pool"), (32,))
    fit(Supervised(module, task, optimizer=sgd(module, lr=0.05)), task, epochs=12, batch_size=64)
    return module.eval()


def layer_problem(seed=0, side=24, samples=256):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(side, side, generator=g) / torch.rand(side, side, generator=g).sqrt()
    turn = torch.randn(side, side, generator=g) * torch.logspace(0, -1.5, side)
    x, fresh = (torch.randn(n, side, generator=g) @ turn.T for n in (samples, 1000))
    return weight, x, fresh


# What it takes


def test_bits_by_the_formula():
    assert codebook_bits(10_000, 4) == 20_064
    assert codebook_bits(10_000, 4, tables=8, groups=8) == 20_536
    assert codebook_bits(10_000, 4, tables=8, each_weight_chooses=True) == 50_512
    assert codebook_bits(10_000, 4, groups=8, scales=True) == 20_192
    assert codebook_bits(10_000, 4, entry_bits=32) == 20_128
    with pytest.raises(InputError, match="2 to 256 entries"):
        codebook_bits(10, 1)


def test_stored_bytes_are_those_of_the_formula(tmp_path):
    weight = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    assert cluster_weights(weight, 4).nbytes() == 2508 + 2  # 20,064 bits and one scale
    single = nn.Linear(1024, 1024, bias=False)
    for entries in (3, 4, 8, 16):
        for grouping in ("scales", "tables"):
            stored = cluster_weights(
                single.weight, entries, sizes=even_sizes(1024, 8), grouping=grouping
            )
            PackedNetwork.of(single, {"weight": stored}).save(tmp_path / "p")
            size = (tmp_path / "p").stat().st_size
            assert stored.nbytes() == len(stored.arrays()["b"])
            assert abs(8 * size / formula_bits(stored) - 1) < 0.02
    assert [index_bits(k) for k in (1, 2, 3, 4, 5, 8, 9, 256)] == [1, 1, 1.6, 2, 3, 3, 4, 8]


@settings(max_examples=60, deadline=None)
@given(entries=st.integers(1, 256), count=st.integers(1, 70), seed=st.integers(0, 5))
def test_indices_come_back(entries, count, seed):
    g = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, entries, (count,), generator=g).to(torch.uint8)
    packed = pack_indices(indices, entries)
    assert packed.numel() == math.ceil(count * index_bits(entries) / 8 - 1e-9)
    assert torch.equal(unpack_indices(packed, entries, count), indices)


# k-means


def best_by_dynamic_programming(values, clusters):
    """Sum of squared errors of the best table: every start of every run is tried."""
    x = values.double().sort().values
    n = len(x)
    sums = torch.cat([torch.zeros(1).double(), x.cumsum(0)])
    squares = torch.cat([torch.zeros(1).double(), x.square().cumsum(0)])
    i, j = torch.arange(n + 1)[:, None], torch.arange(n + 1)[None]
    cost = squares[j] - squares[i] - (sums[j] - sums[i]).square() / (j - i).clamp(min=1)
    cost = torch.where(j > i, cost.clamp(min=0), math.inf)
    best = cost[0].clone()
    best[0] = 0.0
    for _ in range(clusters - 1):
        best = torch.minimum(best, (best[:, None] + cost).amin(0))
    return float(best[n])


@pytest.mark.parametrize("count", [200, 1500])
@pytest.mark.parametrize("entries", [2, 4, 16])
@pytest.mark.parametrize("kind", ["normal", "heavy", "two", "skew"])
def test_kmeans_is_within_a_hundredth_of_the_optimum(entries, kind, count):
    for seed in range(2):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(count, generator=g)
        if kind == "heavy":
            x = x / torch.rand(count, generator=g)
        elif kind == "two":
            x = 0.1 * x + (torch.rand(count, generator=g) < 0.3)
        elif kind == "skew":
            x = x.exp()
        table = kmeans_values(x, entries)
        error = float((x[:, None] - table).square().amin(1).double().sum())
        assert error <= 1.01 * best_by_dynamic_programming(x, entries) + 1e-6


def test_kmeans_of_brute_force():
    x = torch.tensor([0.0, 1.0, 1.5, 4.0, 4.2, 9.0, 9.9, 10.0])
    best = min(
        sum(float((x[a:b] - x[a:b].mean()).square().sum()) for a, b in ((0, i), (i, j), (j, 8)))
        for i in range(1, 7)
        for j in range(i + 1, 8)
    )
    table = kmeans_values(x, 3)
    assert float((x[:, None] - table).square().amin(1).sum()) == pytest.approx(best)


def test_kmeans_on_few_values():
    x = torch.tensor([2.0, -1.0, 2.0, 5.0])
    assert kmeans_values(x, 3).tolist() == [-1.0, 2.0, 5.0]
    assert kmeans_values(x, 4).tolist() == [-1.0, 2.0, 5.0, 5.0]
    weight = torch.tensor([[1.0, -2.0], [0.5, 1.0]])
    for entries in (3, 8):
        assert torch.equal(cluster_weights(weight, entries).decode(), weight)
    # two entries of symmetric weights: the sign times the mean magnitude
    half = torch.rand(500, generator=torch.Generator().manual_seed(0)) + 0.5
    x = torch.cat([half, -half])
    table = kmeans_values(x, 2)
    torch.testing.assert_close(table, torch.tensor([-1.0, 1.0]) * half.mean())


def test_nearest_entries_of_tables_in_any_order():
    g = torch.Generator().manual_seed(0)
    rows, tables = torch.randn(7, 50, generator=g), torch.randn(7, 5, generator=g)
    expected = (rows[:, :, None] - tables[:, None]).abs().argmin(2)
    assert torch.equal(nearest_entries(rows, tables).long(), expected)
    assert torch.equal(
        nearest_entries(rows, tables[:1]).long(), (rows[..., None] - tables[0]).abs().argmin(2)
    )


def test_zeros_of_pruned_weights_stay():
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 32, generator=g) * (torch.rand(16, 32, generator=g) < 0.4)
    for grouping in ("scales", "tables"):
        start = cluster_weights(weight, 4, sizes=even_sizes(16, 4), grouping=grouping, zeros=True)
        assert bool((start.decode()[weight == 0] == 0).all())
        x = torch.randn(64, 32, generator=g)
        learning = Learning(steps=150, warm_up=10, index_lr=0.05)
        learned = learn_codebook(weight, start, x, x @ weight.T, learning=learning, zeros=True)
        assert learned.moves > 0
        assert bool((learned.stored.decode()[weight == 0] == 0).all())


# Neurons side by side


def test_neurons_are_grouped_by_their_distributions():
    g = torch.Generator().manual_seed(0)
    kinds = torch.randint(0, 3, (60,), generator=g)
    rows = torch.randn(60, 200, generator=g) * torch.tensor([0.05, 0.2, 1.0])[kinds][:, None]
    found = group_neurons(describe_neurons(rows), 3)
    assert torch.equal(found, kinds)
    halves = group_neurons(describe_neurons(rows), 2)
    spread = rows.std(1)
    assert float(spread[halves == 0].max()) <= float(spread[halves == 1].min())
    assert torch.bincount(halves).tolist() == [30, 30]


class Concatenating(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 5, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(11), nn.Linear(11, 4)

    def forward(self, x):
        x = F.relu(self.a(x))
        x = F.relu(self.norm(torch.cat([x, self.b(x)], 1)))
        return self.head(x.mean((2, 3)))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.one, self.two = nn.Conv2d(12, 7, 3, padding=1), nn.Conv2d(7, 12, 3, padding=1)
        self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.head = nn.Linear(12 * 16, 4)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        x = x + self.two(F.relu(self.one(x)))
        return self.head(F.max_pool2d(F.relu(self.grouped(x)), 2).flatten(1))


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.norm = nn.Linear(8, 16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.into(x.flatten(1, 2))
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, n, 3, 4, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, 16)
        x = x + self.out(y)
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x.mean(1))


NETWORKS = {
    "mlp": lambda: mlp((64, 20, 15, 4)),
    "conv": lambda: ConvNet(1, 8, (6, "pool", 8), (10,), classes=4),
    "residual": Residual,
    "concatenation": Concatenating,
    "attention": Attending,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_reordering_changes_nothing(name):
    torch.manual_seed(1)
    network = NETWORKS[name]().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
    x = torch.randn(6, 1, 8, 8)
    found = reorder(network, (x,), groups=4)
    with torch.no_grad():
        torch.testing.assert_close(found.module(x), network(x), rtol=0, atol=1e-6)
    moved = [o for o in found.orders.values() if not torch.equal(o, torch.arange(len(o)))]
    assert moved and found.sizes
    parameters = dict(found.module.named_parameters())
    for weight, sizes in found.sizes.items():
        assert sum(sizes) == len(parameters[weight]) and len(sizes) > 1
    first = next(iter(found.sizes))
    if name in ("mlp", "conv"):
        spreads = [
            float(part.detach().std(1).mean())
            for part in parameters[first].flatten(1).split(list(found.sizes[first]))
        ]
        assert spreads == sorted(spreads)


# Gradients of indices


def test_default_gradient_favours_the_farthest():
    values = torch.tensor([-1.0, -0.2, 0.1, 1.5])[:, None]
    logits = torch.tensor([0.0, 3.0, 0.0, 0.0])[:, None]
    shares = torch.softmax(logits, 0)
    expected = torch.tensor([0.043317, 0.870049, 0.043317, 0.043317])[:, None]
    torch.testing.assert_close(shares, expected, atol=1e-6, rtol=0)
    assert float((shares * values).sum()) == pytest.approx(-0.148019, abs=1e-6)
    found = index_gradient(logits, values, torch.tensor([-0.2]), "softmax")
    expected = torch.tensor([-0.036905, -0.045226, 0.010743, 0.071388])[:, None]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("falloff", ["bell", "inverse"])
def test_proximal_gradient_favours_neighbours(falloff):
    values = torch.tensor([-1.0, -0.2, 0.1, 1.5])[:, None]
    logits = torch.tensor([0.0, 3.0, 0.0, 0.0])[:, None]
    found = index_gradient(
        logits, values, torch.tensor([-0.2]), "proximal", spacing=2.5 / 3, falloff=falloff
    )[:, 0]
    assert float(found[1]) == 0.0
    assert float(found[2]) > -float(found[0]) > 0 and -float(found[0]) > float(found[3]) > 0


def test_gradients_of_tables_and_scales_are_exact():
    g = torch.Generator().manual_seed(0)
    n, groups = 60, 3
    group = torch.arange(n) * groups // n
    index = torch.randint(0, 4, (n,), generator=g)
    logits = F.one_hot(index, 4).T.double()
    tables = torch.randn(groups, 4, generator=g).double().requires_grad_()
    scales = torch.rand(groups, generator=g).double().requires_grad_()
    direction = torch.randn(n, generator=g).double()
    for many in (True, False):
        layout = _Layout(group if many else torch.zeros_like(group), group, groups, 4)
        if not many:
            tables = tables[:1].detach().requires_grad_()
            layout = _Layout(torch.zeros_like(group), group, 1, 4)

        def value(tables, scales, layout=layout):
            made = _Decode.apply(logits, tables, scales, index, layout, Learning())
            return (made * direction).sum()

        value(tables, scales).backward()
        step = 1e-6
        for tensor in (tables, scales):
            for place in range(tensor.numel()):
                moved = torch.zeros(tensor.numel()).double()
                moved[place] = step
                moved = moved.view_as(tensor)
                ends = []
                for sign in (1, -1):
                    both = (t + sign * moved if t is tensor else t for t in (tables, scales))
                    ends.append(value(*both).item())
                numeric = (ends[0] - ends[1]) / (2 * step)
                assert float(tensor.grad.flatten()[place]) == pytest.approx(numeric, abs=1e-6)
        tables.grad = scales.grad = None


# Learning


def test_learning_orders_the_methods():
    """Together is better than tables alone, which is better than k-means (mean of four layers)."""
    errors = {"k-means": 0.0, None: 0.0, "softmax": 0.0, "proximal": 0.0}
    for seed in range(4):
        weight, x, fresh = layer_problem(seed, samples=512)
        start = cluster_weights(weight, 4)
        errors["k-means"] += output_error(start, fresh, fresh @ weight.T)
        for gradient in (None, "softmax", "proximal"):
            learning = Learning(gradient=gradient, steps=300, index_lr=0.03, warm_up=50, lr=3e-3)
            learned = learn_codebook(weight, start, x, x @ weight.T, learning=learning)
            errors[gradient] += output_error(learned.stored, fresh, fresh @ weight.T)
            assert learned.error <= learned.error_before
            assert (learned.moves > 0) == (gradient is not None)
    assert errors[None] < errors["k-means"]
    assert max(errors["softmax"], errors["proximal"]) < 0.6 * errors[None]


def test_proximal_moves_do_not_jump():
    weight, x, _ = layer_problem(2)
    start = cluster_weights(weight, 8)
    shares = {}
    for gradient in ("softmax", "proximal"):
        learning = Learning(gradient=gradient, steps=300, index_lr=0.02, temperature=0.3)
        learned = learn_codebook(weight, start, x, x @ weight.T, learning=learning)
        shares[gradient] = learned.jumps / learned.moves
    assert shares["proximal"] < 0.5 * shares["softmax"]


def test_all_unused_entries_are_revived_together():
    """Five entries of one value: four of them take the values of the worst represented weights."""
    weight, x, _ = layer_problem(3)
    start = cluster_weights(weight, 8)
    tables = start.tables.clone()
    tables[:, 4:] = tables[:, 3:4]
    nearest = (weight[..., None] - tables[0].float()).abs().argmin(2)
    few = CodebookTensor.of(nearest, tables, start.scales, start.sizes, start.shape)
    assert len(nearest.unique()) == 4
    learning = Learning(steps=51, warm_up=0, index_lr=1e-6, lr=1e-6)
    learned = learn_codebook(weight, few, x, x @ weight.T, learning=learning)
    assert learned.stored.entries == 8
    assert learned.error < 0.5 * learned.error_before


def test_candidates_limit_where_weights_go():
    weight, x, _ = layer_problem(3)
    start = cluster_weights(weight, 16)
    rank = start.tables[0].float().argsort().argsort()
    learning = Learning(steps=300, index_lr=0.05, candidates=3, lr=1e-6)
    learned = learn_codebook(weight, start, x, x @ weight.T, learning=learning)
    assert learned.moves > 0
    if learned.stored.entries == 16:
        steps = rank[learned.stored.indices.long()] - rank[start.indices.long()]
        assert int(steps.abs().max()) <= 2
    best = learn_codebook(weight, start, x, x @ weight.T, learning=Learning(steps=0))
    assert best.error <= learned.error_before


@pytest.mark.parametrize("grouping", ["scales", "tables"])
def test_refit_is_the_least_squares_solution(grouping):
    g = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(3, 6, 3, bias=False)
    x = torch.randn(20, 3, 6, 6, generator=g)
    with torch.no_grad():
        target = conv(x)
    start = cluster_weights(conv.weight, 4, sizes=(2, 4), grouping=grouping)
    made = refit(start, x, target, layer=F.conv2d)
    before, after = (output_error(s, x, target, layer=F.conv2d) for s in (start, made))
    assert after < before
    # by hand: one regression for each table
    row_scale = 1.0 if start.scales is None else start.scales.float()[start.group_of_row]
    for table in range(len(start.tables)):
        rows = slice(None) if len(start.tables) == 1 else start.group_of_row == table
        columns = []
        for entry in range(4):
            part = (start.indices == entry).float()
            part = part * (row_scale if isinstance(row_scale, float) else row_scale[:, None])
            columns.append(F.conv2d(x, part.view_as(conv.weight))[:, rows].flatten())
        a = torch.stack(columns, 1).double()
        exact = torch.linalg.lstsq(a, target[:, rows].flatten().double()).solution
        torch.testing.assert_close(made.tables[table].double(), exact, rtol=2e-3, atol=1e-4)


def test_refit_never_makes_it_worse_and_leaves_the_unused():
    for seed in range(5):
        weight, x, _ = layer_problem(seed)
        start = cluster_weights(weight, 6, sizes=even_sizes(24, 3), grouping="tables")
        start = CodebookTensor.of(
            start.indices.clamp(max=3), start.tables, None, start.sizes, start.shape
        )
        made = refit(start, x, x @ weight.T)
        errors = [output_error(s, x, x @ weight.T) for s in (start, made)]
        assert errors[1] <= errors[0]
        assert torch.equal(made.tables[:, 4:], start.tables[:, 4:])


def test_unused_entries_are_dropped():
    stored = CodebookTensor.of(
        torch.tensor([[3, 0], [3, 3]], dtype=torch.uint8),
        torch.tensor([[1.0, 2.0, 4.0, 8.0]]).half(), None, (2,), (2, 2),
    )  # fmt: skip
    made = drop_unused(stored)
    assert made.entries == 2 and torch.equal(made.decode(), stored.decode())


# Stored form and kernels


def some_tensor(entries, grouping="scales", shape=(21, 10, 3), groups=3, seed=0):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return cluster_weights(weight, entries, sizes=even_sizes(shape[0], groups), grouping=grouping)


@pytest.mark.parametrize("entries", [2, 3, 4, 5, 8, 16, 200])
@pytest.mark.parametrize("columns", [7, 40])
@pytest.mark.parametrize("grouping", ["scales", "tables"])
def test_kernels_agree(entries, columns, grouping):
    stored = some_tensor(entries, grouping, (21, columns))
    x, bias = torch.randn(5, 2, columns), torch.randn(21)
    expected = F.linear(x, stored.decode(), bias)
    blocks = CodebookKernel(stored, block=4)
    assert torch.equal(blocks.decode(3, 19), stored.decode()[3:19])
    torch.testing.assert_close(blocks.linear(x, bias), expected)
    buckets = CodebookKernel(stored, method="buckets")
    torch.testing.assert_close(buckets.linear(x, bias), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(buckets.linear(x[0, 0], None), expected[0, 0] - bias)


def test_kernel_of_convolutions():
    for conv in (
        nn.Conv2d(4, 10, 3, padding=1, stride=2),
        nn.Conv2d(4, 10, (3, 2), groups=2, dilation=2, bias=False),
    ):
        stored = cluster_weights(conv.weight, 4, sizes=(3, 7))
        with torch.no_grad():
            conv.weight.copy_(stored.decode())
        kernel = CodebookKernel(stored, block=3)
        x = torch.randn(2, 4, 9, 9)
        found = kernel.conv2d(x, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        torch.testing.assert_close(found, conv(x))


@pytest.mark.parametrize("entries", [3, 4, 9])
def test_file_round_trip_and_run(entries, task, trained, tmp_path, monkeypatch):
    names = [n for n, p in trained.named_parameters() if p.ndim > 1]
    network = copy.deepcopy(trained)
    tensors = {}
    for i, name in enumerate(names):
        weight = network.get_parameter(name)
        grouping, sizes = ("tables", even_sizes(len(weight), 3)) if i % 2 else ("scales", None)
        tensors[name] = cluster_weights(weight, entries, sizes=sizes, grouping=grouping)
        weight.data.copy_(tensors[name].decode())
    packed = PackedNetwork.of(network, tensors)
    packed.save(tmp_path / "p")
    read = PackedNetwork.load(tmp_path / "p")
    for name, value in network.state_dict().items():
        assert torch.equal(read.state_dict()[name], value)

    def inflating(stored):
        raise AssertionError("a weight became float as a whole")

    with monkeypatch.context() as patch:
        patch.setattr(CodebookTensor, "decode", inflating)
        runner = read.runner(network, task.example_inputs)
        x = next(iter(task.batches("validation", batch_size=50)))[0]
        with torch.no_grad():
            torch.testing.assert_close(runner(x), network(x))
    # Nothing of the size of a weight is float in memory.
    assert not any(w.numel() >= 256 for w in runner.parameters())
    rows = {row["tensor"]: row for row in footprint(read)}
    assert sum(row["bytes"] for row in rows.values()) == packed.nbytes() + packed.plain_nbytes()
    assert rows[names[2]]["values"] == network.get_parameter(names[2]).numel()
    assert rows[names[2]]["bits"] < index_bits(entries) + 1


@settings(
    deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_files_give_one_sentence(data, tmp_path):
    good = tmp_path / "good"
    if not good.exists():
        layer = nn.Linear(9, 6)
        stored = cluster_weights(layer.weight, 5, sizes=(2, 4))
        PackedNetwork.of(layer, {"weight": stored}).save(good)
    content = bytearray(good.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(len(content) // 2, len(content))) :]
    (tmp_path / "p").write_bytes(content)
    try:
        read = PackedNetwork.load(tmp_path / "p")
        read.state_dict()
        for stored in read.tensors.values():
            stored.kernel().linear(torch.zeros(1, stored.shape[1]), None)
    except InputError as error:
        assert "\n" not in str(error)


# A whole network


def test_compressing_a_network(task, trained):
    calibration = calibration_batches(task, 256)
    assert [len(x) for (x,) in calibration] == [64] * 4
    before = copy.deepcopy(trained.state_dict())
    scores, errors = {}, {}
    for name, learning in {
        "k-means": None,
        "joint": Learning(steps=250, index_lr=0.03, warm_up=50),
    }.items():
        made = compress(trained, task.example_inputs, calibration, groups=4, learning=learning)
        assert all(torch.equal(v, before[k]) for k, v in trained.state_dict().items())
        assert list(made.tensors) == ["0.weight", "4.weight", "9.weight", "11.weight"]
        for key, stored in made.tensors.items():
            assert torch.equal(made.module.get_parameter(key), stored.decode())
            assert made.layers[key]["weight_error"] > 0.001
        scores[name] = task.score(made.module, "validation")
        errors[name] = made.layers
    assert scores["joint"] > scores["k-means"]
    last = errors["joint"]["11.weight"]
    assert last["output_error"] < 0.5 * last["output_error_before"]


def test_layers_see_the_compressed_prefix_and_aim_at_the_float_network():
    """A bias of the first layer that its codebook cannot hold is made up for by the second."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 6, bias=False), nn.Linear(6, 5, bias=False))
    x = torch.randn(400, 8)
    made = compress(
        network, (x[:2],), [(x,)], entries=2, groups=1, learning=Learning(steps=0), rearrange=False
    )
    first = made.tensors["0.weight"].decode()
    with torch.no_grad():
        target = network(x)
        start = cluster_weights(network[1].weight, 2)
        seen = refit(start, x @ first.T, target)
        apart = refit(start, network[0](x), target)
    found = made.tensors["1.weight"].decode()
    torch.testing.assert_close(found, seen.decode(), rtol=2e-3, atol=1e-4)
    assert not torch.allclose(apart.decode(), seen.decode(), rtol=1e-2)
    report = made.layers["1.weight"]
    exact = float((x @ first.T @ seen.decode().T - target).square().sum() / target.square().sum())
    assert report["output_error"] == pytest.approx(exact, rel=1e-2)


def test_embeddings_ends_and_skipped_layers(task, trained):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(30, 8)
            self.one, self.two, self.head = nn.Linear(8, 12), nn.Linear(12, 9), nn.Linear(9, 4)

        def forward(self, ids):
            return self.head(F.relu(self.two(F.relu(self.one(self.embed(ids)))))).mean(1)

    ids = torch.randint(0, 30, (4, 6))
    options = {"learning": None, "groups": 2}
    made = compress(Words(), (ids,), [], embeddings=True, skip=["one"], **options)
    assert set(made.tensors) == {"embed.weight", "two.weight", "head.weight"}
    assert len(made.module.embed.weight.unique()) <= 8
    made = compress(Words(), (ids,), [], ends=False, **options)
    assert set(made.tensors) == {"two.weight"}
    made = compress(Words(), (ids,), [], ends=False, skip=["head"], **options)
    assert set(made.tensors) == {"two.weight"}  # the last layer is the head, skipped or not
    with pytest.raises(InputError, match="needs calibration samples"):
        compress(Words(), (ids,), [])


def test_killed_and_resumed(task, trained, tmp_path, monkeypatch):
    import gossamer.compress.quantize.codebooks as module

    calibration = calibration_batches(task, 128)
    options = {"groups": 2, "learning": Learning(steps=20, warm_up=5), "seed": 3}
    whole = compress(trained, task.example_inputs, calibration, **options)
    real, calls = module.learn_codebook, []

    def dying(*args, **kwargs):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*args, **kwargs)

    file = tmp_path / "state"
    monkeypatch.setattr(module, "learn_codebook", dying)
    with pytest.raises(KeyboardInterrupt):
        compress(trained, task.example_inputs, calibration, checkpoint=file, **options)
    calls[:] = [1] * 3  # two more layers are left
    resumed = compress(trained, task.example_inputs, calibration, checkpoint=file, **options)
    assert len(calls) == 5
    for name, stored in whole.tensors.items():
        assert torch.equal(resumed.tensors[name].decode(), stored.decode())
    with pytest.raises(InputError, match="other settings"):
        compress(
            trained, task.example_inputs, calibration, checkpoint=file, **{**options, "seed": 4}
        )


def test_a_checkpoint_of_other_layers_is_refused(task, trained, tmp_path):
    def run(**options):
        options = {"learning": None, "rearrange": False, "checkpoint": tmp_path / "state"} | options
        return compress(trained, task.example_inputs, [], **options)

    first = next(iter(run().tensors))
    for other in ({"skip": [first]}, {"ends": False}):
        with pytest.raises(InputError, match="other settings"):
            run(**other)


# The step


def test_the_step(task, trained, tmp_path):
    network = Network(trained, task.example_inputs, storage={"9.weight": "sparse"})
    before = copy.deepcopy(trained.state_dict())
    with torch.no_grad():
        trained.get_parameter("9.weight")[:, ::2] = 0.0
    made = codebook(network, task, entries=3, steps=30, samples=128, index_lr=0.1)
    trained.load_state_dict(before)
    assert made.runtime == "packed" and made.storage["0.weight"].startswith("codebook")
    layers = made.steps[-1]["report"]["layers"]
    assert sum(row["moves"] for row in layers.values()) > 0  # short as it is
    assert float((made.module.get_parameter("9.weight") == 0).float().mean()) >= 0.5
    made.packed.save(tmp_path / "p")
    runner = PackedNetwork.load(tmp_path / "p").runner(made.module, task.example_inputs)
    x = next(iter(task.batches("validation")))[0]
    with torch.no_grad():
        torch.testing.assert_close(runner(x), made.module.eval()(x))
    wrong = {
        "bits": (9, "1 to 8 bits"), "entries": (1, "2 to 256 entries"), "groups": (0, "one group"),
        "samples": (0, "at least one sample"), "lr": (0.0, "above 0"),
        "grouping": ("rows", "grouping is"), "skip": (["nothing"], "no part 'nothing'"),
    }  # fmt: skip
    for option, (value, sentence) in wrong.items():
        with pytest.raises(InputError, match=sentence):
            codebook(network, task, **{"steps": 1, "samples": 64, option: value})


def test_inside_shrink(task, trained, tmp_path):
    recipe = Recipe.of(
        ("prune", {"macs": 0.8, "epochs": 0}),
        ("codebook", {"bits": 4, "groups": 2, "steps": 120, "samples": 256, "index_lr": 0.03}),
    )
    shrunk = gossamer.shrink(trained, task, recipe=recipe, out=tmp_path / "o")
    packed = shrunk.report["packed"]
    assert packed["agreement"] > 0.95
    assert packed["bytes"] < 0.4 * packed["float_bytes"]


def test_a_language_model_with_grouped_queries_and_tied_embeddings(tmp_path):
    pytest.importorskip("transformers", reason="no peer: transformers")
    from gossamer.models.language import causal_llama

    torch.manual_seed(0)
    model = causal_llama(
        40, width=16, layers=2, heads=4, key_value_heads=2, hidden=24, length=32, tied=True
    ).eval()
    ids = torch.randint(0, 40, (3, 12))
    found = reorder(model, (ids,), groups=3)
    assert found.orders
    with torch.no_grad():
        expected, moved = model(ids).logits, found.module(ids).logits
        torch.testing.assert_close(moved, expected, rtol=0, atol=1e-5)
        made = compress(model, (ids,), [(ids,)] * 4, groups=3, learning=Learning(steps=10))
        assert len(made.tensors) == 2 * 7 + 1  # the tied table is the head
        PackedNetwork.of(made.module, made.tensors).save(tmp_path / "p")
        runner = PackedNetwork.load(tmp_path / "p").runner(made.module, (ids,))
        torch.testing.assert_close(runner(ids).logits, made.module(ids).logits)
