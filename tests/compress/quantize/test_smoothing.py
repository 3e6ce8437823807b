"""Scaling channels: worked numbers, and outputs that stay."""

import copy

import pytest
import torch
from torch import nn

from gossamer.compress.quantize.gptq import round_to_nearest
from gossamer.compress.quantize.language_models import quantize
from gossamer.compress.quantize.smoothing import (
    Channels,
    Shared,
    activation_aware,
    find_shared,
    rescale,
    smooth,
    smoothing_factors,
    unchanged,
)
from gossamer.core.errors import InputError, UnsupportedError
from gossamer.models.language import causal_llama
from gossamer.parts.scaled import NumberFormat, WeightFormat

GROUPS = WeightFormat(NumberFormat("int", 4), 16)


def _linear_layers(model):
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]


def _watched(model, names, x):
    def runs():
        model(x)
        yield lambda inputs: inputs

    return Channels.of(model, names, runs())


def test_two_channels_by_hand():
    x = torch.tensor([[1.0, 10.0], [-2.0, -20.0]])
    network = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2))
    norm, layer = network
    layer.weight.data = torch.tensor([[0.5, -0.2], [0.1, 0.4]])
    factors = smoothing_factors(x.abs().amax(0), layer.weight.abs().amax(0), 0.5)
    torch.testing.assert_close(factors, torch.tensor([2.0, 7.07107]))
    before = x @ layer.weight.T
    weight = norm.weight.detach().clone()
    rescale(network, Shared("0", ("1",)), factors)
    torch.testing.assert_close(norm.weight, weight / factors)
    both = torch.tensor([1.0, 2.82843])
    torch.testing.assert_close((x / factors).abs().amax(0), both)
    torch.testing.assert_close(layer.weight.abs().amax(0), both)
    torch.testing.assert_close((x / factors) @ layer.weight.T, before)


def test_shares_of_zero_and_one():
    a, w = torch.tensor([4.0, 0.25]), torch.tensor([2.0, 0.5])
    torch.testing.assert_close(smoothing_factors(a, w, 1.0), a)
    torch.testing.assert_close(smoothing_factors(a, w, 0.0), 1 / w)
    assert smoothing_factors(torch.zeros(1), torch.ones(1), 0.5).item() == pytest.approx(1e-5)
    with pytest.raises(InputError, match="between 0 and 1"):
        smoothing_factors(a, w, 1.5)


def test_who_shares_what():
    torch.manual_seed(0)
    model = causal_llama(20, width=32, layers=2, heads=4, hidden=64).eval()
    ids = torch.randint(0, 20, (2, 8))
    inside = [name for name in _linear_layers(model) if name != "lm_head"]
    found = find_shared(model, lambda: model(ids), inside)
    expected = []
    for i in range(2):
        at = f"model.layers.{i}"
        attention = tuple(f"{at}.self_attn.{part}_proj" for part in "qkv")
        expected.append(Shared(f"{at}.input_layernorm", attention))
        parts = (f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj")
        expected.append(Shared(f"{at}.post_attention_layernorm", parts))
    assert found == expected
    gated = find_shared(model, lambda: model(ids), inside, gated=True)
    assert Shared("model.layers.1.mlp.up_proj", ("model.layers.1.mlp.down_proj",)) in gated
    assert Shared("model.layers.0.self_attn.v_proj", ("model.layers.0.self_attn.o_proj",)) in gated
    assert len(gated) == 8


def test_what_is_not_gated_is_not_scaled():
    """Between up and down of a plain block stands a nonlinearity, through which no scale passes."""

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            return self.down_proj(nn.functional.gelu(self.up_proj(x)))

    model = Plain().eval()
    x = torch.randn(3, 8)
    found = find_shared(model, lambda: model(x), ["up_proj", "down_proj"], gated=True)
    assert found == []


def test_a_language_model_computes_what_it_did():
    torch.manual_seed(0)
    model = causal_llama(20, width=32, layers=2, heads=4, hidden=64).eval()
    ids = torch.randint(0, 20, (2, 8))
    inside = [name for name in _linear_layers(model) if name != "lm_head"]
    shared = find_shared(model, lambda: model(ids), inside, gated=True)
    with torch.no_grad():
        before = model(ids).logits
        channels = _watched(model, [g.readers[0] for g in shared], ids)
        first = shared[0].readers[0]
        ratio = channels.reach(first, "absmax").max() / channels.reach(first, "absmax").min()
        norms = [g for g in shared if "norm" in g.producer]
        smooth(model, norms, channels, alpha=1.0)
        after = _watched(model, [first], ids).reach(first, "absmax")
        torch.testing.assert_close(after, torch.ones(32), rtol=1e-3, atol=1e-3)
        assert ratio > 1.5
        activation_aware(model, shared, channels, GROUPS)
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-3, atol=1e-4)


def test_activation_aware_scales_help_what_matters():
    torch.manual_seed(0)
    network = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 24, bias=False)).eval()
    network[0].weight.data[5] = 40.0
    network[1].weight.data[:, 5] /= 40.0
    x = torch.randn(200, 32)
    shared = [Shared("0", ("1",))]
    expected = network(x).detach()

    def error(network):
        rounded = copy.deepcopy(network)
        rounded[1].weight.data = round_to_nearest(network[1].weight, GROUPS).decode()
        return float((rounded(x) - expected).detach().square().mean())

    scaled = copy.deepcopy(network)
    chosen = activation_aware(scaled, shared, _watched(scaled, ["1"], x), GROUPS)
    torch.testing.assert_close(scaled(x), expected, rtol=1e-3, atol=1e-3)
    assert chosen["0"] > 0
    assert error(scaled) < 0.5 * error(network)


def test_ranges_reach_from_the_smallest_to_the_largest():
    network = nn.Sequential(nn.Linear(2, 2))
    x = torch.tensor([[1.0, -3.0], [2.0, -1.0]])
    channels = _watched(network, ["0"], x)
    assert channels.reach("0", "absmax").tolist() == [2.0, 3.0]
    assert channels.reach("0", "range").tolist() == [1.0, 2.0]
    assert channels.mean["0"].tolist() == [1.5, 2.0]


def test_padding_does_not_count():
    network, x = nn.Sequential(nn.Linear(2, 2)), torch.tensor([[[1.0, -3.0], [9.0, 9.0]]])

    def runs():
        network(x)
        yield lambda inputs: inputs[:, 0]

    channels = Channels.of(network, ["0"], runs())
    assert channels.mean["0"].tolist() == [1.0, 3.0]
    assert channels.largest["0"].tolist() == [1.0, -3.0]


def test_layers_that_stay_float_are_scaled_with_the_others():
    torch.manual_seed(0)
    model = causal_llama(20, width=32, layers=2, heads=4, hidden=64).eval()
    ids = torch.randint(0, 20, (4, 8))
    skip = ["model.layers.0.mlp.gate_proj", "model.layers.1.self_attn.q_proj"]
    for options in ({"smoothing": 0.7}, {"algorithm": "awq"}):
        made = quantize(model, [ids], group_size=16, skip=skip, **options)
        assert not {f"{name}.weight" for name in skip} & set(made.tensors)
        with torch.no_grad():
            near = (made.module(ids).logits - model(ids).logits).norm() / model(ids).logits.norm()
        assert float(near) < 0.3


def test_a_second_reader_is_noticed():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.layer = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            y = self.norm(x)
            return y + self.layer(y)

    torch.manual_seed(0)
    network, x = Residual(), torch.randn(4, 8)
    shared = find_shared(network, lambda: network(x), ["layer"])
    assert shared == [Shared("norm", ("layer",))]
    with (
        pytest.raises(UnsupportedError, match="also read by something"),
        unchanged(network, lambda: network(x)),
    ):
        rescale(network, shared[0], torch.full((8,), 3.0))
