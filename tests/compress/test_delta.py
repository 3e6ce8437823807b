"""Delta pruning: enumerated moments, worked values of q, AdamR against Adam, files, merging."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gossamer
from gossamer.compress.delta import (
    Change,
    Delta,
    LowRankUpdate,
    Selection,
    SparseDelta,
    TaskBank,
    advise,
    analytic_divisor,
    anchored_finetune,
    delta,
    input_moments,
    low_rank_delta,
    merge,
    merge_deltas,
    mse_divisor,
    output_bound,
    output_error,
    search_divisor,
    steady_mean,
    sub_gaussian,
)
from gossamer.compress.recipe import Recipe
from gossamer.core.errors import InputError
from gossamer.core.files import write_tensors
from gossamer.core.fit import Supervised, fit, sgd
from gossamer.core.network import Network
from gossamer.core.saved import save_network
from gossamer.core.task import Classification
from gossamer.datasets.digits import digits
from gossamer.models.plain import mlp
from gossamer.parts.anchored_adam import AdamR
from gossamer.parts.seeded import SeededTensor

C = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)


def enumerated(c: torch.Tensor, p: float, q: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Output errors and probabilities of all masks."""
    masks = torch.tensor(list(itertools.product((0.0, 1.0), repeat=len(c))), dtype=torch.float64)
    chance = ((1 - p) ** masks * p ** (1 - masks)).prod(1)
    return (c * (1 - masks / q)).sum(1), chance


def pair(seed: int = 0, widths: tuple[int, ...] = (64, 16, 10)) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    base = mlp(widths)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return base, tuned


def drawn(base: nn.Module, tuned: nn.Module) -> Delta:
    return Delta.from_models(base, tuned)


# The output error


@pytest.mark.parametrize(
    ("q", "bias", "variance"),
    [(0.1, 0.0, 128.25), (0.3, 5 / 3, 14.25), (0.5, 2.0, 5.13), (1.0, 2.25, 1.2825)],
)
def test_mean_and_variance_are_those_of_all_masks(q: float, bias: float, variance: float) -> None:
    error, chance = enumerated(C, 0.9, q)
    mean = float((error * chance).sum())
    assert mean == pytest.approx(bias, abs=1e-9)
    assert float((error.square() * chance).sum()) - mean**2 == pytest.approx(variance)
    found = output_error(C, 0.9, q)
    assert [float(v) for v in found] == [pytest.approx(bias), pytest.approx(variance)]


def test_least_squares_divisor() -> None:
    assert pytest.approx(2.152) == 0.1 + 0.9 * 14.25 / 6.25
    assert float(mse_divisor(0.9, C.sum().square(), C.square().sum())) == 1.0  # clipped
    mean, variance = output_error(C, 0.9, 2.152)
    assert float(mean**2 + variance) == pytest.approx(5.9596, abs=1e-4)
    # Inside the range: no other q of a fine grid has a smaller error.
    c = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    best = float(mse_divisor(0.9, c.sum().square(), c.square().sum()))
    errors = {q: sum(map(float, (output_error(c, 0.9, q)[0] ** 2, output_error(c, 0.9, q)[1])))
              for q in [best, *(0.1 + 0.001 * k for k in range(900))]}  # fmt: skip
    assert min(errors, key=lambda q: errors[q]) == best
    one = torch.tensor([3.0])
    assert float(mse_divisor(0.99, one.sum().square(), one.square().sum())) == pytest.approx(1.0)
    for n in (10, 1000):
        equal = torch.full((n,), 2.0, dtype=torch.float64)
        q = mse_divisor(0.9, equal.sum().square(), equal.square().sum())
        assert float(q) == pytest.approx(0.1 + 0.9 / n)


def test_phi_bounds_the_moments_of_a_mask() -> None:
    assert sub_gaussian(0.01) == pytest.approx(0.213270, abs=1e-6)
    assert sub_gaussian(0.9) == pytest.approx(0.364096, abs=1e-6)
    assert sub_gaussian(0.99) == pytest.approx(0.213270, abs=1e-6)
    assert sub_gaussian(0.5) == 0.5
    assert sub_gaussian(0.5 + 1e-6) == pytest.approx(0.5)
    for p in (0.01, 0.2, 0.5, 0.7, 0.99):
        assert sub_gaussian(p) == pytest.approx(sub_gaussian(1 - p))
        for t in (-30.0, -3.0, -0.1, 0.1, 1.0, 8.0):
            moment = (1 - p) * math.exp(-t * p) + p * math.exp(t * (1 - p))
            assert moment <= math.exp(sub_gaussian(p) * t * t / 4) * (1 + 1e-12)


def test_the_bound_holds_for_nine_masks_of_ten() -> None:
    bound = float(output_bound(C, 0.9, 0.1))
    assert bound == pytest.approx(39.4245, abs=1e-4)
    error, chance = enumerated(C, 0.9, 0.1)
    assert float(chance[error.abs() <= bound].sum()) >= 0.9


def test_the_analytic_rule_on_its_grid() -> None:
    c = 0.1 * C[None]
    assert float(analytic_divisor(c, 0.99, 0.05)) == pytest.approx(0.304)
    for eta in (0.2, 0.5, 1.0):
        assert float(analytic_divisor(c, 0.99, eta)) == pytest.approx(0.998)
    # The stationary point of the quadratic in 1/q.
    exact = 0.05 * sub_gaussian(0.99) * float(c.square().sum()) / (2 * 0.01 * float(c.sum()))
    assert float(analytic_divisor(c, 0.99, 0.05)) == pytest.approx(exact, abs=5e-4)
    assert float(analytic_divisor(-c, 0.99, 0.05)) == pytest.approx(0.304)
    assert float(analytic_divisor(-c, 0.99, 0.05, signed=True)) != pytest.approx(0.304)


def test_the_guard_ends_the_scan_when_most_rows_are_stuck() -> None:
    # Four rows are best at once, one far out: with the guard it gets what was seen until then.
    still = torch.tensor([[1e-3, 0.0]] * 4 + [[0.0, 0.0]])
    still[4] = torch.tensor([3.0, -2.8])
    whole = analytic_divisor(still, 0.99, 0.05)
    cut = analytic_divisor(still, 0.99, 0.05, guard=0.8)
    assert float(whole[4]) > 0.5 and float(cut[4]) <= 0.012
    assert torch.equal(whole[:4], cut[:4])


# Dropping


def test_dare_is_q_of_one_minus_p_and_the_ends_are_the_two_networks() -> None:
    base, tuned = pair()
    change = drawn(base, tuned)
    plain, same = change.drop(0.9, seed=3), change.drop(0.9, q=1.0 - 0.9, seed=3)
    for name in change.names:
        assert torch.equal(plain.tensor(name), same.tensor(name))
        kept = change.keep(0.9, seed=3)[name]
        expected = torch.where(kept, change.changes[name], 0.0) / torch.tensor(1.0 - 0.9)
        assert torch.equal(plain.tensor(name), expected)
    whole = change.drop(0.0, q=1.0).apply(base)
    for name, parameter in tuned.named_parameters():
        assert torch.allclose(whole.get_parameter(name), parameter, rtol=0, atol=1e-7)
    none = change.drop(0.5, q=math.inf).apply(base)
    for name, parameter in base.named_parameters():
        assert torch.equal(none.get_parameter(name), parameter)


def test_the_mean_over_masks_is_the_fine_tuned_network() -> None:
    change = torch.linspace(-1, 1, 12).view(3, 4)
    total = torch.zeros(3, 4, dtype=torch.float64)
    for seed in range(10_000):
        total += SeededTensor.of(change, 0.8, divisor=0.2, seed=seed, name="w").decode()
    # Standard deviation of a mean of 10^4: 2 |d| / 100.
    assert torch.all((total / 10_000 - change).abs() <= 4.5 * 0.02 * change.abs() + 1e-9)


def test_a_mask_depends_on_name_and_seed_alone() -> None:
    base, tuned = pair()
    change = drawn(base, tuned)
    turned = Delta(change.rest, {}, change.base, dict(reversed(list(change.changes.items()))))
    one, two = change.keep(0.7, seed=5), turned.keep(0.7, seed=5)
    assert all(torch.equal(one[n], two[n]) for n in one)
    other = change.keep(0.7, seed=6)
    assert any(not torch.equal(one[n], other[n]) for n in one)
    # Written down once: a file of seeds must mean the same masks in years.
    written = SeededTensor.of(torch.arange(12.0) + 1, 0.5, divisor=1.0, seed=1, name="w")
    assert written.values.tolist() == KEPT_OF_TWELVE


def test_magnitude_keeps_the_largest_and_wanda_the_largest_of_each_row() -> None:
    base, tuned = nn.Linear(4, 2, bias=False), nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        base.weight.zero_()
        tuned.weight.copy_(torch.tensor([[4.0, -3.0, 2.0, 1.0], [0.4, 0.3, -0.2, 0.1]]))
    change = drawn(base, tuned)
    assert change.drop(0.5, method="magnitude").tensor("weight").tolist() == [
        [4.0, -3.0, 2.0, 1.0],
        [0.0, 0.0, 0.0, 0.0],
    ]
    x = torch.tensor([[0.1, 0.1, 1.0, 10.0], [0.1, -0.1, -1.0, 10.0]])
    moments = input_moments(tuned, (x,), [(x,)])
    assert moments["weight"].norms.tolist() == pytest.approx((x.square().sum(0).sqrt()).tolist())
    assert torch.allclose(moments["weight"].mean, x.double().mean(0))
    kept = change.drop(0.5, method="wanda", moments=moments).tensor("weight")
    assert (kept != 0).tolist() == [[False, False, True, True]] * 2
    assert kept[0].tolist() == [0.0, 0.0, 2.0, 1.0]


@pytest.mark.parametrize("method", ["rows", "columns"])
def test_whole_rows_or_columns_go(method: Any) -> None:
    base, tuned = pair(widths=(64, 200, 10))
    kept = drawn(base, tuned).keep(0.75, method)["1.weight"]
    assert (kept == (kept[:, :1] if method == "rows" else kept[:1])).all()
    assert 0.1 < float(kept.float().mean()) < 0.4
    stored = drawn(base, tuned).drop(0.75, method=method)
    assert torch.equal(stored.tensor("1.weight") != 0, kept)


def test_a_tensor_of_which_nothing_stays_is_read_back(tmp_path: Path) -> None:
    base, tuned = pair(widths=(64, 200, 10))
    sparse = drawn(base, tuned).drop(0.9999, method="rows", seed=1)
    assert sparse.stored < 10
    sparse.save(tmp_path / "delta")
    loaded = SparseDelta.load(tmp_path / "delta")
    assert all(torch.equal(loaded.tensor(n), sparse.tensor(n)) for n in sparse.names)


def test_stored_values_that_do_not_fit_their_seed_are_refused() -> None:
    whole = SeededTensor.of(torch.arange(40.0), 0.5, divisor=0.5, seed=1, name="w")
    shape, threshold, key, unit = whole.record()
    arrays = whole.arrays()
    assert torch.equal(SeededTensor.restore(whole.record(), arrays).decode(), whole.decode())
    wrong: list[tuple[Any, dict[str, torch.Tensor]]] = [
        ([shape, threshold, key + 1, unit], arrays),
        ([shape, -1, key, unit], arrays),
        ([shape, threshold, key, "diagonals"], arrays),
        ([(1 << 39,), threshold, key, unit], arrays),
        ([shape, threshold, key, unit], arrays | {"v": arrays["v"][1:]}),
        ([shape, threshold, key, unit], arrays | {"q": torch.ones(3)}),
    ]
    for record, held in wrong:
        with pytest.raises(ValueError):
            SeededTensor.restore(record, held)


# Files


@pytest.mark.parametrize("coded", ["seed", "index"])
def test_a_file_gives_the_same_logits(tmp_path: Path, coded: Any) -> None:
    base, tuned = pair(widths=(64, 1000, 10))
    change = drawn(base, tuned)
    q = {n: torch.linspace(0.2, 0.9, len(c)) for n, c in change.changes.items()}
    sparse = change.drop(0.9, q=q, seed=2, coded=coded)
    sparse.save(tmp_path / "delta.safetensors")
    loaded = SparseDelta.load(tmp_path / "delta.safetensors")
    x = torch.randn(20, 1, 8, 8)
    assert torch.equal(loaded.apply(base)(x), sparse.apply(base)(x))
    kept = sum(int(mask.sum()) for mask in change.keep(0.9, seed=2).values())
    assert sum(int((loaded.tensor(name) != 0).sum()) for name in change.names) == kept
    assert loaded.stored == kept or coded == "index"
    per_value = (tmp_path / "delta.safetensors").stat().st_size / (4 * kept)
    assert per_value < (1.35 if coded == "seed" else 1.6)


def test_many_tasks_beside_one_base(tmp_path: Path) -> None:
    base, tuned = pair(widths=(64, 128, 10))
    _, other = pair(widths=(64, 128, 10))
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    networks = {"a": tuned, "b": other}
    for name, network in networks.items():
        drawn(base, network).drop(0.95, q=0.3).save(tmp_path / name)
    bank = TaskBank(base, {name: tmp_path / name for name in networks})
    x = torch.randn(5, 1, 8, 8)
    for name, network in networks.items():
        expected = drawn(base, network).drop(0.95, q=0.3).apply(base)
        assert torch.equal(bank.network(name)(x), expected(x))
    one = sum(p.numel() * 4 for p in base.parameters())
    assert bank.nbytes() < one * (1 + 2 * 0.05) + 6000
    with pytest.raises(InputError, match="there is no task 'c'; there are a, b"):
        bank.network("c")


def test_what_cannot_be_a_delta_is_refused(tmp_path: Path) -> None:
    base, tuned = pair()
    change = drawn(base, tuned)
    change.drop(0.9).save(tmp_path / "d")
    whole = (tmp_path / "d").read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a packed network, or it is damaged"):
        SparseDelta.load(tmp_path / "cut")
    with pytest.raises(InputError, match=r"1\.weight has shape \(8, 64\) in the base"):
        Delta.from_models(mlp((64, 8, 10)), tuned)
    with pytest.raises(InputError, match="only the base has a parameter"):
        Delta.from_models(mlp((64, 16, 10, 10)), tuned)
    with pytest.raises(InputError, match="not those that the delta was taken from"):
        SparseDelta.load(tmp_path / "d").apply(tuned)
    with pytest.raises(InputError, match=r"in \[0, 1\), not 1"):
        change.drop(1.0)
    with pytest.raises(InputError, match="q is what remaining entries are divided by"):
        change.drop(0.5, q=0.0)
    with pytest.raises(InputError, match="give moments"):
        change.drop(0.5, method="wanda")
    with pytest.raises(InputError, match="networks that differ"):
        merge_deltas([change, drawn(tuned, base)])


def test_heads_buffers_and_ties() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Linear(6, 3))
    base[2].weight = base[0].weight
    tuned = copy.deepcopy(base)
    tuned.train()
    with torch.no_grad():
        tuned(torch.randn(30, 6) + 2)
        for parameter in tuned.parameters():
            parameter.add_(torch.randn_like(parameter))
    change = Delta.from_models(base, tuned, exclude=("3",))
    assert [n for n in change.names if "weight" in n] == ["0.weight", "1.weight"]
    pruned = change.drop(0.9, seed=1).apply(base)
    assert torch.equal(pruned.get_buffer("1.running_mean"), tuned.get_buffer("1.running_mean"))
    assert torch.equal(pruned.get_parameter("3.weight"), tuned.get_parameter("3.weight"))
    assert pruned.get_parameter("2.weight") is pruned.get_parameter("0.weight")


def test_a_grown_vocabulary_takes_the_common_rows() -> None:
    pytest.importorskip("transformers", reason="no peer: transformers")
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=12,
    )  # fmt: skip
    torch.manual_seed(0)
    base = BertForSequenceClassification(config).eval()
    tuned: Any = copy.deepcopy(base)
    tuned.resize_token_embeddings(23)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    change = Delta.from_models(base, tuned)
    name = "bert.embeddings.word_embeddings.weight"
    assert change.changes[name].shape == (20, 8) and change.rows[name].shape == (3, 8)
    assert not [n for n in change.names if n.startswith("classifier")]
    ids = torch.tensor([[1, 21, 22, 5]])
    whole = change.drop(0.0, q=1.0).apply(base)
    assert torch.allclose(whole(ids).logits, tuned(ids).logits, atol=1e-5)
    assert whole.get_submodule("bert.embeddings.word_embeddings").num_embeddings == 23


# AdamR


def _walk(optimizer: Any, module: nn.Module, steps: int) -> None:
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.randn(8, 5)).square().mean().backward()
        optimizer.step()


def test_without_decay_adam_r_is_adam() -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    theirs = copy.deepcopy(ours)
    _walk(AdamR(ours.parameters(), lr=0.01, weight_decay=0.0), ours, 30)
    _walk(torch.optim.Adam(theirs.parameters(), lr=0.01, foreach=False), theirs, 30)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_the_pull_leads_back_and_is_nothing_at_home(norm: Any) -> None:
    torch.manual_seed(0)
    module = nn.Linear(5, 4)
    home = [p.detach().clone() for p in module.parameters()]
    optimizer = AdamR(module.parameters(), lr=0.01, betas=(0.0, 0.9), weight_decay=1e-3, norm=norm)
    _walk(optimizer, module, 10)
    before = [(p - h).abs() for p, h in zip(module.parameters(), home, strict=True)]
    for _ in range(5):
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    after = [(p - h).abs() for p, h in zip(module.parameters(), home, strict=True)]
    assert all(bool((a < b).all()) for a, b in zip(after, before, strict=True))
    # At the reference the first step is Adam's whatever the strength.
    one, two = nn.Linear(5, 4), nn.Linear(5, 4)
    two.load_state_dict(one.state_dict())
    _walk(AdamR(one.parameters(), lr=0.01, weight_decay=5.0, norm=norm), one, 1)
    _walk(AdamR(two.parameters(), lr=0.01, weight_decay=0.0), two, 1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_one_step_of_adam_r_by_hand() -> None:
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = AdamR([p], [torch.tensor([0.0, 0.0])], lr=0.1, weight_decay=0.3)
    p.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    # Corrected second moments are 9 and 16; the decay divides by the root of their mean.
    shrink = 1 - 0.1 * 0.3 / math.sqrt(12.5)
    assert p.tolist() == pytest.approx([shrink - 0.1, 2 * shrink - 0.1], abs=1e-6)


# Choosing


def test_the_search_finds_a_peak_and_averages_without_an_outlier() -> None:
    assert steady_mean([1.0, 2.0, 9.0]) == 1.5
    assert steady_mean([1.0, 3.0]) == 2.0
    found = search_divisor(lambda q, seed: -((q - 0.237) ** 2), 0.9, seeds=(0,))
    assert found.value == pytest.approx(0.237, abs=0.0026)
    assert min(q for q, _ in found.tried) == pytest.approx(0.1)
    low = search_divisor(lambda q, seed: -q, 0.9, seeds=(0,), below=True)
    assert low.value < 0.1
    calls: list[float] = []

    def falling(q: float, seed: int) -> float:
        calls.append(q)
        return -q

    search_divisor(falling, 0.99, seeds=(0,))
    assert max(calls) < 0.22  # four coarse steps without a gain, then fine ones near the best


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, nn.Module, Classification]:
    task = digits(limit=300)
    torch.manual_seed(0)
    base = mlp((64, 32, 10))
    fit(Supervised(base, task, optimizer=sgd(base, lr=0.05)), task, epochs=5, seed=0, cpu=True)
    tuned = copy.deepcopy(base)
    fit(Supervised(tuned, task, optimizer=sgd(tuned, lr=0.05)), task, epochs=10, seed=1, cpu=True)
    return base.eval(), tuned.eval(), task


class NoTest(Classification):
    """Refuses to show its test split."""

    def __init__(self, task: Classification) -> None:
        super().__init__(task.splits, task.preprocess, task.classes, name=task.name)

    def batches(self, split: str, **options: Any) -> Any:
        assert split != "test"
        return super().batches(split, **options)


def test_every_choice_leaves_the_test_split_alone(
    trained: tuple[nn.Module, nn.Module, Classification],
) -> None:
    base, tuned, task = trained
    change = drawn(base, tuned)
    select = Selection(change, base, tuned, NoTest(task), 0.9, seeds=(7, 8))
    labelled, unlabelled = select.validated(), select.unlabelled()
    close = select.closeness()
    for found in (labelled, unlabelled):
        assert 0.1 <= found.value <= 1.0
        assert found.score == max(score for _, score in found.tried)
    # q_e is no further from the unpruned answers than DARE and than no rescaling.
    for q in (0.1, 1.0):
        assert sum(close(unlabelled.value, s) for s in (7, 8)) >= sum(close(q, s) for s in (7, 8))
    per_layer, eta = select.per_layer("output")
    assert eta > 0 and per_layer["1.bias"] is per_layer["1.weight"]
    assert len(per_layer["1.weight"]) == 1
    least = select.least_squares()
    assert len(least["1.weight"]) == 32
    for q in (per_layer, least):
        assert all(bool(((v >= 0.1 - 1e-3) & (v <= 1.0)).all()) for v in q.values())


def test_least_squares_is_the_least_mean_error_of_a_layer() -> None:
    torch.manual_seed(3)
    base = nn.Linear(6, 2)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn_like(parameter))
    x = torch.rand(40, 6) + 0.5
    moments = input_moments(tuned, (x,), [(x,)])
    change = drawn(base, tuned)
    d = torch.cat([change.changes["weight"], change.changes["bias"][:, None]], 1).double()
    ones = torch.cat([x, torch.ones(40, 1)], 1).double()

    def error(row: int, q: float) -> float:
        mean, variance = output_error(ones * d[row], 0.7, q)
        return float((mean.square() + variance).mean())

    m = moments["weight"]
    w, b = change.changes["weight"].double(), change.changes["bias"].double()
    square = ((w @ m.second) * w).sum(1) + 2 * b * (w @ m.mean) + b.square()
    energy = w.square() @ m.second.diagonal() + b.square()
    best = mse_divisor(0.7, square, energy)
    for row in range(2):
        grid = [0.3 + 0.01 * k for k in range(71)]
        assert error(row, float(best[row])) <= min(error(row, q) for q in grid) + 1e-9


def test_learned_divisors_match_better_than_dare(
    trained: tuple[nn.Module, nn.Module, Classification],
) -> None:
    base, tuned, task = trained
    select = Selection(drawn(base, tuned), base, tuned, task, 0.9, seeds=(7,), measure="top")
    close = select.closeness()
    learned = select.learned(epochs=10)
    assert set(learned) == {"1.weight", "1.bias", "3.weight", "3.bias"}
    assert close(learned, 7) > close(0.1, 7)


def test_advice_follows_size_and_rate() -> None:
    base, _ = pair()
    sizes = {}
    for size in (0.01, 1.0):
        tuned = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.mul_(1 + size)
        sizes[size] = drawn(base, tuned)
        assert sizes[size].relative_size == pytest.approx(size, rel=1e-4)
    small, large = sizes[0.01], sizes[1.0]
    assert advise(small, 0.9, can_train=True).rescale == "dare"
    assert advise(small, 0.99, can_train=True).rescale == "search"
    assert advise(large, 0.99, can_train=True).train
    assert advise(large, 0.99, can_train=False).method == "wanda"


# Low rank, merging, recipes


def test_low_rank_updates() -> None:
    torch.manual_seed(0)
    base = nn.Linear(5, 4, bias=False)
    update = LowRankUpdate(torch.randn(2, 5), torch.randn(4, 2), scale=0.5)
    change = low_rank_delta(base, {"weight": update})
    expected = base.weight + 0.5 * update.up @ update.down
    assert torch.allclose(change.drop(0.0).apply(base).get_parameter("weight"), expected)
    assert torch.allclose(update.drop(0.0, name="weight").product(), update.product())
    total = torch.zeros(4, 5, dtype=torch.float64)
    for seed in range(2000):
        total += update.drop(0.5, seed=seed, name="weight").product()
    # Factors are drawn apart, so the product keeps its mean.
    assert torch.allclose(total / 2000, update.product().double(), atol=0.3)
    start = LowRankUpdate(update.down, update.up, 0.5, down_start=update.down)
    assert torch.equal(start.drop(0.9, name="weight").down, update.down)
    with pytest.raises(InputError, match="the networks differ"):
        low_rank_delta(base, {"weight": LowRankUpdate(torch.zeros(2, 6), torch.zeros(4, 2))})


def test_merging_by_hand() -> None:
    base = nn.Linear(4, 1, bias=False)
    changes = [torch.tensor([[3.0, 1.0, -2.0, 0.1]]), torch.tensor([[-1.0, 0.2, -4.0, 5.0]])]
    deltas: list[Change] = []
    for change in changes:
        tuned = copy.deepcopy(base)
        with torch.no_grad():
            base.weight.zero_()
            tuned.weight.copy_(change)
        deltas.append(drawn(base, tuned))
    average = merge_deltas(deltas).changes["weight"]
    assert torch.allclose(average, (changes[0] + changes[1]) / 2)
    weighted = merge_deltas(deltas, weights=[2.0, -1.0]).changes["weight"]
    assert torch.allclose(weighted, 2 * changes[0] - changes[1])
    # The half of each that is largest: (3, ., -2, .) and (., ., -4, 5); they agree on the third.
    ties = merge_deltas(deltas, weights=[0.5, 0.5], method="ties", density=0.5).changes["weight"]
    assert torch.allclose(ties, torch.tensor([[3.0, 0.0, -3.0, 5.0]]))


@pytest.mark.parametrize("method", ["dare", "task-arithmetic", "average", "ties"])
def test_merged_networks_validate_no_worse_than_what_was_tried(
    trained: tuple[nn.Module, nn.Module, Classification], method: Any, tmp_path: Path
) -> None:
    base, tuned, task = trained
    save_network(tmp_path / "base", base, task.example_inputs)
    save_network(tmp_path / "other", tuned, task.example_inputs)
    network = Network(tuned, task.example_inputs)
    made = merge(
        network, NoTest(task), base=str(tmp_path / "base"), others=[str(tmp_path / "other")],
        method=method, drop=0.5, masks=2,
    )  # fmt: skip
    report = made.steps[-1]["report"]
    assert report["validation_score"] == task.score(made.module, "validation")
    if method == "average":  # of a network with itself
        for name, parameter in tuned.named_parameters():
            assert torch.allclose(made.module.get_parameter(name), parameter, atol=1e-6)
    save_network(tmp_path / "small", mlp((64, 8, 10)), task.example_inputs)
    with pytest.raises(InputError, match="the networks differ"):
        merge(network, task, base=str(tmp_path / "base"), others=[str(tmp_path / "small")])


def test_the_step_writes_a_delta_that_gives_its_network(
    trained: tuple[nn.Module, nn.Module, Classification], tmp_path: Path
) -> None:
    base, tuned, task = trained
    write_tensors(
        tmp_path / "base.safetensors", {n: p.clone() for n, p in base.state_dict().items()}
    )
    before = copy.deepcopy(tuned.state_dict())
    network = Network(tuned, task.example_inputs)
    for q in ("dare", "mse", "per-layer", 0.4):
        made = delta(
            network, NoTest(task), base=str(tmp_path / "base.safetensors"), drop=0.8, q=q,
            masks=2, file=str(tmp_path / "delta"), seed=4,
        )  # fmt: skip
        loaded = SparseDelta.load(tmp_path / "delta").apply(base)
        for name, parameter in made.module.named_parameters():
            assert torch.equal(parameter, loaded.get_parameter(name))
    assert all(torch.equal(tuned.state_dict()[n], t) for n, t in before.items())
    wanda = delta(
        network, task, base=str(tmp_path / "base.safetensors"), drop=0.5, method="wanda"
    )  # fmt: skip
    assert wanda.steps[-1]["report"]["stored"] < 0.55 * wanda.steps[-1]["report"]["entries"]
    with pytest.raises(InputError, match="the networks differ"):
        other = Network(mlp((64, 16, 10)), task.example_inputs)
        delta(other, task, base=str(tmp_path / "base.safetensors"))


def test_inside_shrink(
    trained: tuple[nn.Module, nn.Module, Classification], tmp_path: Path
) -> None:
    base, tuned, task = trained
    save_network(tmp_path / "base", base, task.example_inputs)
    recipe = Recipe.of(
        ("anchored-finetune", {"epochs": 1, "decay": 0.01}),
        ("delta", {"base": str(tmp_path / "base"), "drop": 0.5, "masks": 1,
                   "file": str(tmp_path / "delta")}),
    )  # fmt: skip
    made = gossamer.shrink(tuned, task, recipe=recipe, out=tmp_path / "out", cpu=True)
    assert made.report["verified"]
    x = task.example_inputs[0]
    again = SparseDelta.load(tmp_path / "delta").apply(base)
    assert torch.allclose(made.module.eval()(x), again(x), atol=1e-5)


def test_anchored_finetuning_stays_nearer(
    trained: tuple[nn.Module, nn.Module, Classification],
) -> None:
    base, _, task = trained
    network = Network(base, task.example_inputs)
    sizes = {}
    for decay in (0.0, 1.0):
        made = anchored_finetune(network, task, epochs=3, lr=0.01, decay=decay, cpu=True)
        sizes[decay] = drawn(base, made.module).relative_size
    assert 0.0 < sizes[1.0] < 0.7 * sizes[0.0]


KEPT_OF_TWELVE = [1.0, 3.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0]


class Scaled(nn.Module):
    """A layer times one trained number, as in residual networks that begin as the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(64, 16), nn.Linear(16, 10)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(self.inner(x.flatten(1)).relu() * self.scale)


def test_single_numbers_are_kept_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Scaled()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(0.1 * torch.randn_like(p))
    delta = Delta.from_models(base, tuned)
    assert "scale" in delta.rest and "scale" not in delta.changes
    delta.drop(0.5, seed=1).save(tmp_path / "delta")
    again = SparseDelta.load(tmp_path / "delta").apply(base)
    assert float(again.scale) == float(tuned.scale) != 1.0
    whole = delta.apply(base)
    for made, wanted in zip(whole.parameters(), tuned.parameters(), strict=True):
        torch.testing.assert_close(made, wanted)


def test_q_is_chosen_for_a_network_whose_vocabulary_was_cut() -> None:
    class Read(nn.Module):
        def __init__(self, tokens: int) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(tokens, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.table((x.flatten(1).sum(1) > 0).long()))

    torch.manual_seed(0)
    base, tuned = Read(9), Read(5)
    task = digits(limit=60)
    delta = Delta.from_models(base, tuned)
    selection = Selection(delta, base, tuned, task, 0.5, seeds=(0,), samples=8)
    with selection.pruned(0.5, 0) as module:
        expected = delta.drop(0.5, q=0.5, seed=0).state(base)["table.weight"]
        torch.testing.assert_close(module.table.weight.detach(), expected)
