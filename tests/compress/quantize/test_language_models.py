"""Formats for language models: what is quantized, how it is calibrated, and what it costs."""

import copy
import math

import pytest
import torch
from torch import nn

import gossamer
from gossamer.compress.quantize.gptq import gptq
from gossamer.compress.quantize.language_models import (
    SCENARIOS,
    SCHEMES,
    RoundedInputs,
    Scenario,
    ServingTimes,
    blocks,
    greedy,
    machines_needed,
    measure_serving,
    quantize,
    quantize_lm,
    queries_per_usd,
    recommend,
    recovery_report,
    rouge,
    serving_cost,
)
from gossamer.compress.recipe import Recipe
from gossamer.core.errors import InputError
from gossamer.core.export import OnnxRunner, write_onnx
from gossamer.core.fit import Supervised, fit
from gossamer.core.language import LanguageModelling
from gossamer.core.network import Network
from gossamer.datasets.digits import digits
from gossamer.models.language import causal_llama, llama2c
from gossamer.models.plain import mlp
from gossamer.parts.scaled import NumberFormat, WeightFormat

TOKENS = 24


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _stream(count, seed):
    """A text whose next token depends on the last two, mostly."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(0, 6, (count,), generator=generator).tolist()
    ids = [1, 2]
    for draw in draws:
        ids.append((5 * ids[-1] + ids[-2] % 2 + draw // 5 * draw) % TOKENS)
    return torch.tensor(ids)


@pytest.fixture(scope="module")
def task():
    splits = {"train": _stream(20000, 0), "validation": _stream(2000, 1), "test": _stream(2000, 2)}
    return LanguageModelling(splits, name="rule", tokens=TOKENS, length=32)


@pytest.fixture(scope="module")
def model(task):
    torch.manual_seed(0)
    made = causal_llama(TOKENS, width=32, layers=2, heads=4, hidden=96, length=64)
    optimizer = torch.optim.AdamW(made.parameters(), lr=5e-3)
    fit(Supervised(made, task, optimizer=optimizer), task, epochs=2, batch_size=16, seed=0)
    return made.eval()


@pytest.fixture(scope="module")
def text(task):
    batches = task.batches("train", batch_size=8, seed=0)
    return [batch for batch, _ in zip(batches, range(8), strict=False)]


def _logits(network, ids):
    with torch.no_grad():
        return network(ids).logits


def test_what_is_quantized(model, text):
    assert blocks(model) == ["model.layers.0", "model.layers.1"]
    before = copy.deepcopy(model.state_dict())
    made = quantize(model, text, group_size=16, skip=["model.layers.1.mlp"])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    names = {name.removesuffix(".weight") for name in made.tensors}
    assert len(names) == 7 + 4
    assert "lm_head" not in names and not any("layers.1.mlp" in name for name in names)
    after = made.module.state_dict()
    for name, value in before.items():
        assert torch.equal(after[name], value) != (name in made.tensors), name
    for name, stored in made.tensors.items():
        assert torch.equal(after[name], stored.decode())


def test_each_part_keeps_its_mode(model, text):
    """A frozen part stays in evaluation mode inside a model that trains."""
    mixed = copy.deepcopy(model).train()
    frozen = next(m for m in mixed.modules() if isinstance(m, nn.Linear))
    frozen.eval()
    made = quantize(mixed, text, scheme="W8A8-INT", algorithm="rtn").module
    modes = [module.training for module in made.modules()]
    assert modes.count(False) == 1 and modes[0]


def test_what_runs_is_what_was_simulated(model, text):
    ids = text[0]
    for scheme in SCHEMES:
        made = quantize(model, text, scheme=scheme, group_size=16 if scheme[1] == "4" else None)
        simulated = _logits(made.module, ids)
        # Sums in another order may tip a later rounding of an input by one code.
        assert (_logits(made.running(), ids) - simulated).abs().max() < 0.05 * simulated.std()
        rounds = [m for m in made.module.modules() if isinstance(m, RoundedInputs)]
        assert len(rounds) == (0 if scheme == "W4A16-INT" else 14)


def test_later_layers_see_the_outputs_of_quantized_ones(model, text):
    made = quantize(model, text, group_size=16, clip=False)
    # The first block quantized, the second as it was: its inputs are what calibrates it.
    half = copy.deepcopy(model)
    for name, stored in made.tensors.items():
        if "layers.0" in name:
            half.get_parameter(name).data = stored.decode()
    for network, expected in ((half, True), (model, False)):
        layer = "model.layers.1.self_attn.q_proj"
        inputs = []
        handle = network.get_submodule(layer).register_forward_pre_hook(
            lambda _, args, seen=inputs: seen.append(args[0])
        )
        for ids in text:
            _logits(network, ids)
        handle.remove()
        x = torch.cat(inputs).flatten(0, 1)
        again = gptq(
            model.get_parameter(f"{layer}.weight"),
            x.T @ x,
            made.scheme.weights,
            dtype=torch.float32,
        )
        same = (again.tensor.codes == made.tensors[f"{layer}.weight"].codes).float().mean()
        assert (same > 0.995) == expected


def test_tuning_pays_in_four_bits(model, task, text):
    found = {}
    for name, options in {
        "nearest": {"algorithm": "rtn", "clip": False}, "gptq": {"clip": False}
    }.items():  # fmt: skip
        made = quantize(model, text, group_size=32, **options)
        found[name] = -task.score(made.module, "validation")
    plain = -task.score(model, "validation")
    assert plain < math.log(TOKENS) - 1  # it has learnt the rule
    assert found["gptq"] - plain < 0.7 * (found["nearest"] - plain)


def test_padding_is_left_out(model, text):
    ids = text[0]
    mask = torch.ones_like(ids)
    padded = torch.cat([ids, torch.zeros(8, 16, dtype=torch.long)], 1)
    longer = torch.cat([mask, torch.zeros(8, 16, dtype=torch.long)], 1)
    alone = quantize(model, [(ids, mask)], group_size=16)
    beside = quantize(model, [(padded, longer)], group_size=16)
    poisoned = quantize(model, [padded], group_size=16)

    def alike(a, b):
        pairs = [(a.tensors[n].codes == b.tensors[n].codes).float().mean() for n in a.tensors]
        return float(torch.stack(pairs).mean())

    assert alike(alone, beside) > 0.999
    assert alike(alone, poisoned) < 0.99


def test_other_networks_have_all_linear_layers_quantized():
    torch.manual_seed(0)
    network = mlp((64, 32, 16, 10)).eval()
    x = torch.randn(100, 64)
    made = quantize(network, x.split(25), scheme="W8A8-INT")
    assert len(made.tensors) == 3
    torch.testing.assert_close(made.module(x), network(x), rtol=0.1, atol=0.02)


def test_static_activations_are_worse_with_an_outlier(model, text):
    loud = copy.deepcopy(model)
    with torch.no_grad():
        for layer in loud.model.layers:
            layer.input_layernorm.weight[3] *= 30
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                part.weight[:, 3] /= 30
    ids = text[1]
    expected = _logits(loud, ids)
    torch.testing.assert_close(expected, _logits(model, ids), rtol=1e-3, atol=1e-3)
    errors = {}
    for name, options in {
        "static": {"static_activations": True}, "plain": {}, "smooth": {"smoothing": 0.8}
    }.items():  # fmt: skip
        made = quantize(loud, text, scheme="W8A8-INT", algorithm="rtn", **options)
        errors[name] = float((_logits(made.module, ids) - expected).square().mean())
    assert errors["smooth"] < errors["plain"] < errors["static"]


def test_recovery_of_itself_is_whole(model, task, text):
    nearest = quantize(model, scheme=_four_bits(), algorithm="rtn", clip=False).module
    rows = recovery_report(model, {"same": model, "int4": nearest}, task, new_tokens=8)
    same, int4 = rows
    assert same["perplexity"] == pytest.approx(task.perplexity(model, "test"), rel=1e-5)
    assert (same["recovery"], same["agreement"], same["rouge_l"]) == (100.0, 100.0, 100.0)
    assert same["divergence"] == pytest.approx(0.0, abs=1e-9)
    assert int4["divergence"] > 0 and int4["agreement"] < 100
    assert int4["perplexity"] == pytest.approx(task.perplexity(nearest, "test"), rel=1e-5)


def _four_bits():
    return SCHEMES["W4A16-INT"]


def test_greedy_texts_are_those_of_transformers(model, text):
    prompts = text[0][:3, :8]
    expected = model.generate(
        prompts, max_new_tokens=6, do_sample=False, use_cache=False, pad_token_id=0,
        eos_token_id=None, attention_mask=torch.ones_like(prompts),
    )  # fmt: skip
    assert torch.equal(greedy(model, prompts, 6), expected[:, 8:])


def test_rouge_by_hand():
    # police killed the gunman / police kill the gunman; and in another order
    assert rouge([1, 2, 3, 4], [1, 5, 3, 4]) == (0.75, 0.75)
    assert rouge([1, 2, 3, 4], [3, 4, 5, 1]) == (0.75, 0.5)
    assert rouge([1, 1], [1]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert rouge([], []) == (1.0, 1.0) and rouge([1], []) == (0.0, 0.0)


def test_prices_by_hand():
    times = ServingTimes(100, {1: 50.0, 10: 200.0}, {1: 10.0, 10: 40.0})
    cost = serving_cost(times, Scenario("x", 200, 90), usd_per_hour=2.0)
    assert cost.latency_s == pytest.approx(0.1 + 0.9)
    assert cost.queries_per_usd == pytest.approx(1800.0)
    # ten together: 400 ms to read, 3600 ms to write
    assert (cost.best_batch, cost.max_qps) == (10, pytest.approx(2.5))
    assert cost.max_queries_per_usd == pytest.approx(4500.0)
    assert queries_per_usd(3600.0, qps=2.0) == pytest.approx(2.0)
    faster = serving_cost(ServingTimes(100, {1: 90.0}, {1: 9.0}), SCENARIOS[0], usd_per_hour=2.0)
    slower = serving_cost(times, SCENARIOS[0], usd_per_hour=2.0)
    assert recommend({"a": slower, "b": faster}, asynchronous=False) == "b"
    assert recommend({"a": slower, "b": faster}, asynchronous=True) == "a"
    assert machines_needed(810, 100, reserve=0.1) == 9
    with pytest.raises(InputError, match="positive price"):
        queries_per_usd(0.0, qps=1.0)
    with pytest.raises(InputError, match="batch size of 1"):
        serving_cost(ServingTimes(1, {2: 1.0}, {2: 1.0}), SCENARIOS[0], usd_per_hour=1.0)


def test_serving_is_timed(model, text):
    made = quantize(model, text, scheme="W8A8-INT").running()
    found = measure_serving(
        {"float": model, "int8": made}, TOKENS, prompt=16, batches=(1, 4), decode_steps=2, rounds=3
    )
    for times in found.values():
        assert set(times.decode_ms) == {1, 4}
        # sixteen tokens cost less at once than one after the other
        assert times.prefill_ms[1] < 16 * times.decode_ms[1]


def test_the_published_network_survives(real_data):
    network = llama2c(real_data("weights_stories260k"))
    generator = torch.Generator().manual_seed(0)
    ids = torch.ones(16, 1, dtype=torch.long)
    with torch.no_grad():
        for _ in range(63):
            share = network(ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(share, 1, generator=generator)], 1)
    stories = LanguageModelling(
        {"train": ids[:8].flatten(), "validation": ids[8:].flatten()},
        name="stories", tokens=512, length=64,
    )  # fmt: skip
    plain = stories.perplexity(network)
    assert plain < 5
    for scheme, most in (("W8A8-FP", 1.05), ("W8A8-INT", 1.02), ("W4A16-INT", 1.25)):
        options = {"group_size": 32} if scheme == "W4A16-INT" else {}
        made = quantize(network, [ids[:8]], scheme=scheme, **options)
        assert stories.perplexity(made.module) < most * plain


# A step of a recipe


def test_the_step(model, task):
    network = Network(model, task.example_inputs)
    made = quantize_lm(network, task, group_size=16, samples=16)
    assert network.module is model and not network.steps
    assert made.runtime == "packed" and made.steps[-1]["step"] == "quantize-lm"
    assert len(made.storage) == 14
    with torch.no_grad():
        runner = made.packed.runner(made.module, task.example_inputs)
        found, expected = runner(*task.example_inputs), made.module(*task.example_inputs).logits
    found = found if isinstance(found, torch.Tensor) else found[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scheme", ["W8A8-INT", "W8A8-FP"])
def test_rounded_inputs_are_exported(tmp_path, scheme):
    torch.manual_seed(0)
    network, x = mlp((64, 32, 10)).eval(), torch.randn(6, 64)
    made = quantize(network, scheme=scheme, algorithm="rtn").module
    write_onnx(Network(made, (x,)), tmp_path / "m.onnx")
    found = torch.as_tensor(OnnxRunner(tmp_path / "m.onnx")(x))
    torch.testing.assert_close(found, made(x), rtol=1e-3, atol=1e-4)


def test_the_step_inside_shrink(tmp_path):
    torch.manual_seed(0)
    task = digits(seed=0)
    network = mlp((64, 48, 32, 10))
    fit(Supervised(network, task), task, epochs=8, batch_size=64, seed=0)
    before = task.score(network, "test")
    result = gossamer.shrink(
        network, task, recipe=Recipe.of(("quantize-lm", {"samples": 64, "scheme": "W8A8-INT"})),
        out=tmp_path / "out", cpu=True,
    )  # fmt: skip
    report = result.report
    assert report["runtime"] == "packed"
    assert report["after"]["score"] > before - 3
    assert report["packed"]["agreement"] > 0.99
    assert report["packed"]["bytes"] < 0.6 * report["packed"]["float_bytes"]


# Bad input


def test_bad_input(model, text):
    with pytest.raises(InputError, match="no calibration text"):
        quantize(model)
    with pytest.raises(InputError, match="no scheme"):
        quantize(model, text, scheme="W2A2")
    with pytest.raises(InputError, match="algorithm"):
        quantize(model, text, algorithm="magic")
    with pytest.raises(InputError, match="between 0 and 1"):
        quantize(model, text, smoothing=2.0)
    with pytest.raises(InputError, match="to skip"):
        quantize(model, text, skip=["nowhere"])
    with pytest.raises(InputError, match="no linear layers"):
        quantize(nn.Conv2d(1, 1, 1), text)
    with pytest.raises(InputError, match="mask of shape"):
        quantize(model, [(text[0], text[0][:, :3])])
    with pytest.raises(InputError, match="does not take calibration"):
        quantize(mlp((64, 10)), [torch.randn(3, 5)])
    with pytest.raises(InputError, match="leaves activations"):
        quantize(model, text, static_activations=True)
    with pytest.raises(InputError, match="no normalisation"):
        quantize(mlp((64, 10)), [torch.randn(3, 64)], smoothing=0.5)
    with pytest.raises(InputError, match="integers of 4 or 8"):
        WeightFormat(NumberFormat("int", 2))
