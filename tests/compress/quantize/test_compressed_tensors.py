"""The layout that transformers and vLLM load: key by key, and read again bit for bit."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from gossamer.compress.quantize.compressed_tensors import load_compressed, save_compressed
from gossamer.compress.quantize.language_models import SCHEMES, Scheme, quantize
from gossamer.core.errors import InputError
from gossamer.models.language import causal_llama
from gossamer.models.plain import mlp
from gossamer.parts.scaled import NumberFormat, WeightFormat, unpack_nibbles

LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return causal_llama(20, width=32, layers=2, heads=4, hidden=64, length=64, tied=True).eval()


@pytest.fixture(scope="module")
def text():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 20, (4, 16), generator=generator) for _ in range(4)]


def _written(made, folder, **options):
    save_compressed(made, folder, **options)
    config = json.loads((folder / "config.json").read_text())
    return load_file(folder / "model.safetensors"), config


def test_four_bits_key_by_key(model, text, tmp_path):
    made = quantize(model, text, group_size=16, scale_dtype=torch.bfloat16)
    held, config = _written(made, tmp_path / "q", dtype=torch.bfloat16)
    stored = made.tensors[f"{LAYER}.weight"]
    own = {k.removeprefix(f"{LAYER}."): v for k, v in held.items() if k.startswith(LAYER)}
    assert set(own) == {"weight_packed", "weight_scale", "weight_shape"}
    assert own["weight_packed"].dtype == torch.int32 and own["weight_packed"].shape == (32, 8)
    assert own["weight_scale"].dtype == torch.bfloat16 and own["weight_scale"].shape == (32, 4)
    assert own["weight_shape"].tolist() == [32, 64]
    # code i of eight, raised by 8, in bits 4 i to 4 i + 3
    words = own["weight_packed"].long() & 0xFFFFFFFF
    for i in range(8):
        assert torch.equal((words >> (4 * i)) & 15, stored.codes[:, i::8].long() + 8)
    assert held["model.norm.weight"].dtype == torch.bfloat16
    assert "lm_head.weight" not in held  # shares the embedding
    assert config["dtype"] == "bfloat16" and config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    found = config["quantization_config"]
    assert found["quant_method"] == "compressed-tensors"
    assert found["format"] == "pack-quantized"
    assert found["quantization_status"] == "compressed"
    assert found["ignore"] == ["lm_head"]
    group = found["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"] and group["input_activations"] is None
    assert group["weights"] == {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16,
        "dynamic": False, "actorder": "static",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("scheme", "name", "dtype"),
    [
        ("W8A8-INT", "int-quantized", torch.int8),
        ("W8A8-FP", "float-quantized", torch.float8_e4m3fn),
    ],
)
def test_eight_bits_key_by_key(model, text, tmp_path, scheme, name, dtype):
    made = quantize(model, text, scheme=scheme)
    held, config = _written(made, tmp_path / "q")
    assert held[f"{LAYER}.weight"].dtype == dtype
    assert held[f"{LAYER}.weight_scale"].shape == (32, 1)
    assert config["quantization_config"]["format"] == name
    group = config["quantization_config"]["config_groups"]["group_0"]
    kind = "int" if scheme == "W8A8-INT" else "float"
    assert group["input_activations"] == {
        "num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True
    }  # fmt: skip
    assert (group["weights"]["strategy"], group["weights"]["group_size"]) == ("channel", None)


ASYMMETRIC = Scheme("W4", WeightFormat(NumberFormat("int", 4), 16, False), None, "gptq", True)


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "W4A16-INT", "group_size": 16},
        {"scheme": "W4A16-INT", "group_size": 16, "order": "group"},
        {"scheme": ASYMMETRIC},
        {"scheme": "W8A8-INT", "smoothing": 0.8},
        {"scheme": "W8A8-INT", "static_activations": True},
        {"scheme": "W8A8-FP"},
    ],
    ids=lambda options: "-".join(str(getattr(v, "name", v)) for v in options.values()),
)
def test_it_is_read_bit_for_bit(model, text, tmp_path, options):
    made = quantize(model, text, **options)
    held, _ = _written(made, tmp_path / "q")
    if options.get("order") == "group":
        assert held[f"{LAYER}.weight_g_idx"].dtype == torch.int32
    if options["scheme"] is ASYMMETRIC:
        # packed along the outputs
        zero = held[f"{LAYER}.weight_zero_point"]
        assert zero.shape == (4, 4)
        stored = made.tensors[f"{LAYER}.weight"].zero
        assert torch.equal(unpack_nibbles(zero.T.contiguous(), 32).T, stored)
    again = load_compressed(tmp_path / "q")
    assert set(again.tensors) == set(made.tensors)
    for name, stored in made.tensors.items():
        other = again.tensors[name]
        assert torch.equal(other.codes.float(), stored.codes.float())
        assert torch.equal(other.scale, stored.scale)
        assert torch.equal(other.decode(), stored.decode())
    with torch.no_grad():
        assert torch.equal(again.module(text[0]).logits, made.module(text[0]).logits)


def test_the_peer_reads_the_same(model, text, tmp_path):
    if importlib.util.find_spec("compressed_tensors") is None:
        pytest.skip("no peer: compressed-tensors")
    from transformers import AutoModelForCausalLM

    for scheme in SCHEMES:
        made = quantize(model, text, scheme=scheme, group_size=16 if scheme[1] == "4" else None)
        save_compressed(made, tmp_path / scheme)
        found = AutoModelForCausalLM.from_pretrained(tmp_path / scheme, dtype=torch.float32)
        with torch.no_grad():
            expected = made.module(text[0]).logits
            difference = (found(text[0]).logits - expected).abs().max()
        assert difference < 0.02 * expected.std(), scheme


def test_bad_input(model, text, tmp_path):
    made = quantize(model, text, group_size=24)
    with pytest.raises(InputError, match="no multiple"):
        save_compressed(made, tmp_path / "q")
    assert not (tmp_path / "q").exists()
    with pytest.raises(InputError, match="does not exist"):
        load_compressed(tmp_path / "q")

    good = tmp_path / "good"
    held, config = _written(quantize(model, text, group_size=16), good)

    def broken(change_held=None, change_config=None):
        folder = tmp_path / "broken"
        folder.mkdir(exist_ok=True)
        tensors, other = dict(held), json.loads(json.dumps(config))
        if change_held:
            change_held(tensors)
        if change_config:
            change_config(other["quantization_config"])
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(other))
        return folder

    key = f"{LAYER}.weight_scale"
    for change in (
        lambda t: t.update({key: t[key][:, :1].contiguous()}),
        lambda t: t.update({key: t[key] * float("inf")}),
        lambda t: t.pop(f"{LAYER}.weight_packed"),
        lambda t: t.update({f"{LAYER}.weight_shape": torch.tensor([32, 640])}),
    ):
        with pytest.raises(InputError, match="damaged"):
            load_compressed(broken(change))
    with pytest.raises(InputError, match=r"has no tensor model\.norm\.weight"):
        load_compressed(broken(lambda t: t.pop("model.norm.weight")))
    for change in (
        lambda c: c.update(quant_method="gptq"),
        lambda c: c.update(format="int-quantized"),
        lambda c: c["config_groups"]["group_0"]["weights"].update(num_bits=3),
        lambda c: c.pop("config_groups"),
    ):
        with pytest.raises(InputError, match="damaged"):
            load_compressed(broken(None, change))
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text("[1]")
    save_file(dict(held), tmp_path / "plain" / "model.safetensors")
    with pytest.raises(InputError, match="damaged"):
        load_compressed(tmp_path / "plain")
    with pytest.raises(InputError, match="has no tensor"):
        load_compressed(broken(), mlp((4, 2)))
    data = (good / "model.safetensors").read_bytes()
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "config.json").write_text((good / "config.json").read_text())
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="damaged"):
        load_compressed(cut)
