"""How many networks can be pruned to half of their width, and are right afterwards?

Every network is built without weights, randomised (so that zero-initialised layers hide nothing),
analysed, pruned of a random half of every family's units, and verified, in a process of its own
with a time limit. Torch-Pruning, where it is installed (here, or in the environment whose Python
``--peer-python`` names), gets the same network in its default usage.

    python benchmarks/prune_coverage.py --json coverage.json
    python benchmarks/prune_coverage.py --networks my_list.txt --jobs 2

A list has one network a line: a timm name, or ``transformers:ConfigClass``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

TIMM = [
    "resnet18", "resnet50", "resnext50_32x4d", "seresnet50", "resnetv2_50", "resnest14d",
    "res2net50_26w_4s", "wide_resnet50_2", "skresnet18", "ecaresnet26t", "gcresnet33ts",
    "densenet121", "dpn68", "dla34", "vgg11_bn", "inception_v3", "inception_v4", "xception41",
    "nasnetalarge", "hrnet_w18_small", "darknet53", "cspresnet50", "cspdarknet53", "repvgg_a0",
    "regnetx_002", "regnety_002", "mobilenetv2_100", "mobilenetv3_small_100",
    "mobilenetv4_conv_small", "mnasnet_100", "efficientnet_b0", "efficientnetv2_rw_t",
    "ghostnet_100", "tinynet_e", "lcnet_050", "rexnet_100", "selecsls42b", "vovnet39a",
    "dm_nfnet_f0", "nf_resnet50", "convnext_atto", "convnextv2_atto", "poolformer_s12",
    "caformer_s18", "mixer_s32_224", "resmlp_12_224", "gmlp_s16_224", "convmixer_768_32",
    "vit_tiny_patch16_224", "deit_tiny_patch16_224", "cait_xxs24_224", "xcit_nano_12_p16_224",
    "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "coat_tiny", "coatnet_nano_rw_224",
    "maxvit_nano_rw_256", "mvitv2_tiny", "levit_128s", "mobilevit_xxs", "mobilevitv2_050",
    "edgenext_xx_small", "efficientformer_l1", "fastvit_t8", "pvt_v2_b0", "twins_svt_small",
    "crossvit_tiny_240", "visformer_tiny", "tnt_s_patch16_224", "pit_ti_224", "volo_d1_224",
    "beit_base_patch16_224", "focalnet_tiny_srf", "davit_tiny", "nest_tiny", "hardcorenas_a",
    "halonet26t", "lambda_resnet26t", "bat_resnext26ts", "sequencer2d_s", "mambaout_femto",
    "repvit_m0_9", "starnet_s1", "rdnet_tiny", "inception_next_atto", "tiny_vit_5m_224",
]  # fmt: skip

TRANSFORMERS = [
    "GPT2Config", "LlamaConfig", "MistralConfig", "Qwen2Config", "Qwen3Config", "GemmaConfig",
    "OPTConfig", "BertConfig", "DistilBertConfig", "RobertaConfig", "T5Config", "ViTConfig",
    "SwinConfig", "WhisperConfig", "PhiConfig", "GPTNeoXConfig", "ElectraConfig",
    "ConvNextConfig",
]  # fmt: skip

SMALL = {
    "hidden_size": 64, "n_embd": 64, "d_model": 64, "dim": 64, "embed_dim": 32,
    "num_hidden_layers": 2, "n_layer": 2, "num_layers": 2, "n_layers": 2, "encoder_layers": 2,
    "decoder_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "d_kv": 16, "intermediate_size": 128, "ffn_dim": 128, "d_ff": 128,
    "hidden_dim": 128, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": 50,
    "max_position_embeddings": 64, "n_positions": 64, "image_size": 64, "patch_size": 8,
    "embedding_size": 64, "word_embed_proj_dim": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "num_mel_bins": 16,
    "max_source_positions": 32, "begin_suppress_tokens": None, "use_cache": False,
}  # fmt: skip


def build(name: str) -> tuple[Any, tuple[Any, ...]]:
    """The network and inputs of the smallest size it admits."""
    import torch

    torch.manual_seed(0)
    if name.startswith("transformers:"):
        return _transformer(name.partition(":")[2])
    import timm

    name = name.rpartition(":")[2]
    module = timm.create_model(name, pretrained=False).eval()
    channels, *default = module.default_cfg["input_size"]
    sizes = [64, 96, 128, 160, 192, 224, default[0]]
    for size in [s for s in sizes if s <= default[0]]:
        inputs = (torch.randn(2, channels, size, size),)
        try:
            with torch.no_grad():
                module(*inputs)
        except Exception:
            continue
        return module, inputs
    raise RuntimeError("no input size works")


def _transformer(config_class: str) -> tuple[Any, tuple[Any, ...]]:
    """A small network of a configuration class: the first head and input that run."""
    import torch
    import transformers

    known = getattr(transformers, config_class)
    default = known()
    options = {key: value for key, value in SMALL.items() if hasattr(default, key)}
    if hasattr(default, "depths"):  # stages with widths of their own
        keys = ("hidden_sizes", "num_heads", "depths", "embed_dim", "image_size", "patch_size")
        stages = {
            "image_size": 64, "patch_size": 2, "embed_dim": 32, "depths": [2, 2],
            "num_heads": [2, 4], "window_size": 4,
        }  # fmt: skip
        if hasattr(default, "hidden_sizes") and not hasattr(default, "num_heads"):
            stages = {"hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 2, 1]}
        options = {k: v for k, v in stages.items() if k in keys or hasattr(default, k)}
    tokens = (torch.randint(3, 50, (2, 16)),)
    images = (torch.randn(2, 3, 64, 64),)
    mel = (torch.randn(2, options.get("num_mel_bins", 80), 64),)
    heads = (
        "AutoModelForCausalLM", "AutoModelForSequenceClassification",
        "AutoModelForImageClassification", "AutoModel",
    )  # fmt: skip
    reasons = []
    # Some classes derive what others let one set: leave those out if they object.
    for left_out in ((), ("head_dim",), ("head_dim", "num_key_value_heads"), tuple(options)):
        chosen = {k: v for k, v in options.items() if k not in left_out}
        # Of an encoder and a decoder the encoder alone is taken.
        for name in ("AutoModel",) if getattr(default, "is_encoder_decoder", False) else heads:
            try:
                config = known(**chosen)
                for key, value in (("rotary_dim", 8), ("n_inner", 128)):
                    if hasattr(config, key):
                        setattr(config, key, value)
                model = getattr(transformers, name).from_config(config).eval()
            except Exception as error:
                reasons.append(f"{name}: {error}")
                continue
            encoder = getattr(model, "get_encoder", None)
            if name == "AutoModel" and encoder is not None and config.is_encoder_decoder:
                model = encoder()
            for inputs in (tokens, images, mel):
                try:
                    with torch.no_grad():
                        model(*inputs)
                except Exception as error:
                    reasons.append(f"{name}: {error}")
                    continue
                return model, inputs
    raise RuntimeError(f"no head of {config_class} runs: {reasons[0][:300]}")


def randomise(module: Any) -> None:
    """Gives every vector and every constant tensor random values: nothing hides behind a zero."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim <= 1 or parameter.std() < 1e-3:
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.7 + 0.2 * values if parameter.ndim <= 1 else 0.1 * values)


def prune(name: str) -> dict[str, Any]:
    """One network, in this process."""
    import torch

    from gossamer.core import surgery
    from gossamer.core.dependency import analyse

    torch.set_num_threads(1)
    module, inputs = build(name)
    randomise(module)
    began = time.monotonic()
    dependency = analyse(module, inputs)
    generator = torch.Generator().manual_seed(2)
    removal = {}
    for family in dependency.families:
        order = torch.randperm(family.units, generator=generator)
        removal[family.index] = order < family.units // 2
    analysed = time.monotonic() - began
    result = surgery.remove(module, dependency, removal)
    before = dependency.graph
    after = analyse(result.module, inputs).graph
    return {
        "macs_kept": after.macs / before.macs,
        "params_kept": sum(p.numel() for p in result.module.parameters()) / before.parameters,
        "verified": result.verified,
        "seconds_prune": analysed + result.seconds,
        "seconds_verify": result.seconds_verify,
        "pinned": [[pin.operator, pin.why, pin.line] for pin in dependency.pins],
        "way": result.way,
        "exactness": result.exactness,
        "error": result.error,
        "notes": list(result.notes),
        "dynamic_batch": before.dynamic,
    }


def prune_with_peer(name: str) -> dict[str, Any]:
    """Torch-Pruning in its default usage: magnitude, half of the channels, classifier ignored."""
    import torch
    import torch_pruning as tp

    torch.set_num_threads(1)
    module, inputs = build(name)
    randomise(module)
    before, _ = tp.utils.count_ops_and_params(module, inputs)
    with torch.no_grad():
        expected = module(*inputs)
    shape = getattr(expected, "logits", expected)
    ignored = [
        m
        for m in module.modules()
        if isinstance(m, torch.nn.Linear) and m.out_features == shape.shape[-1]
    ]
    pruner = tp.pruner.MagnitudePruner(
        module, inputs, tp.importance.MagnitudeImportance(p=2), pruning_ratio=0.5,
        ignored_layers=ignored,
    )  # fmt: skip
    pruner.step()
    with torch.no_grad():
        found = module(*inputs)
    found = getattr(found, "logits", found)
    after, _ = tp.utils.count_ops_and_params(module, inputs)
    if found.shape != shape.shape:
        return {"outcome": "wrong output shape"}
    kept = after / before
    return {"outcome": "pruned" if kept <= 0.6 else "hardly pruned", "macs_kept": kept}


def in_process(name: str, mode: str, limit: float, python: str = sys.executable) -> dict[str, Any]:
    """Runs one network in a process of its own; says what went wrong if something did."""
    command = [python, __file__, f"--{mode}", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"more than {limit:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    return {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1][:500]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", type=Path, help="a file with one network a line")
    parser.add_argument("--json", type=Path, help="where to write a row a network")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds a network")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time")
    parser.add_argument("--peer-python", default=sys.executable, help="where the peer is installed")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(prune(options.one)))
        return
    if options.peer:
        print(json.dumps(prune_with_peer(options.peer)))
        return
    peer = [options.peer_python, "-c", "import torch_pruning"]
    peer_installed = subprocess.run(peer, capture_output=True, check=False).returncode == 0
    if options.networks:
        names = options.networks.read_text().split()
    else:
        names = TIMM + [f"transformers:{name}" for name in TRANSFORMERS]

    def one(name: str) -> dict[str, Any]:
        row = {
            "network": name, "macs_kept": None, "params_kept": None, "verified": False,
            "seconds_prune": None, "seconds_verify": None, "pinned": [], "peer": None,
        }  # fmt: skip
        row |= in_process(name, "one", options.limit)
        if peer_installed:
            row["peer"] = in_process(name, "peer", 120.0, options.peer_python)
        good = row["verified"] and row["macs_kept"] <= 0.6
        kept = f"{row['macs_kept']:.3f}" if row["macs_kept"] is not None else "-"
        print(f"{'ok  ' if good else 'MISS'} {name:42s} MACs kept {kept} {row.get('failed', '')}",
              *(f"[{p[0]}: {p[1]}]" for p in row["pinned"]), flush=True)  # fmt: skip
        return row

    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(one, names))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    good = [r for r in rows if r["verified"] and r["macs_kept"] <= 0.6]
    times = [r["seconds_prune"] for r in rows if r["seconds_prune"] is not None]
    share = 100 * len(good) / len(rows)
    print(f"\n{len(good)} of {len(rows)} networks at <= 0.6 of their MACs and verified")
    print(f"{share:.1f} %; median {median(times):.1f} s to prune")
    if peer_installed:
        right = sum((r["peer"] or {}).get("outcome") == "pruned" for r in rows)
        print(f"Torch-Pruning: {right} of {len(rows)}")


if __name__ == "__main__":
    main()
