"""Small language models through transformers' own classes, and llama2.c's weights in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError, MissingExtra, first_line
from gossamer.core.files import read_json
from gossamer.core.saved import read_weights


def causal_llama(
    tokens: int,
    *,
    width: int = 128,
    layers: int = 4,
    heads: int = 4,
    key_value_heads: int | None = None,
    hidden: int | None = None,
    length: int = 512,
    tied: bool = False,
    norm_eps: float = 1e-5,
) -> nn.Module:
    """A Llama of any size with random weights: ``transformers.LlamaForCausalLM``.

    Args:
        tokens: size of the vocabulary.
        width: of the residual stream.
        layers: decoder layers.
        heads: of the queries.
        key_value_heads: of keys and values; fewer than ``heads`` is grouped-query attention.
        hidden: width of the feed-forward layers. Default: 8/3 of the width.
        length: longest sequence.
        tied: share the embedding with the head.
        norm_eps: of the normalisation.

    Raises:
        MissingExtra: if transformers is not installed.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise MissingExtra("transformers", "llm") from error
    config = LlamaConfig(
        vocab_size=tokens,
        hidden_size=width,
        intermediate_size=hidden or 8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads or heads,
        head_dim=width // heads,
        max_position_embeddings=length,
        rms_norm_eps=norm_eps,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config)


def pretrained(folder: str | Path) -> nn.Module:
    """A causal language model from a folder in transformers' layout (safetensors only).

    No code of the folder is run and nothing is downloaded.

    Raises:
        InputError: if the folder holds no such model.
        MissingExtra: if transformers is not installed.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise MissingExtra("transformers", "llm") from error
    if not (Path(folder) / "config.json").is_file():
        raise InputError(f"{folder} has no config.json of a language model")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(folder),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
        )
    except Exception as error:  # transformers raises every kind there is
        raise InputError(f"{folder} holds no language model: {first_line(error)}") from error
    model.config.use_cache = False
    return model.eval()


def llama2c(folder: str | Path) -> nn.Module:
    """A model of llama2.c (``config.json``, ``model.safetensors``) as transformers' Llama.

    Args:
        folder: with weights named as in llama2.c.

    Raises:
        InputError: if a file is missing or a tensor does not fit.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    held = read_weights(folder / "model.safetensors")
    try:
        heads, kv_heads = int(config["n_heads"]), int(config["n_kv_heads"])
        model = causal_llama(
            int(config["vocab_size"]),
            width=int(config["dim"]),
            layers=int(config["n_layers"]),
            heads=heads,
            key_value_heads=kv_heads,
            hidden=int(config["hidden_dim"]),
            length=int(config["max_seq_len"]),
            tied=True,
            norm_eps=float(config["norm_eps"]),
        )
        state = {
            "model.embed_tokens.weight": held["tok_embeddings.weight"],
            "lm_head.weight": held["tok_embeddings.weight"],
            "model.norm.weight": held["norm.weight"],
        }
        names = {
            "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
            "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
            "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
            "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
        }  # fmt: skip
        for i in range(int(config["n_layers"])):
            for theirs, ours in names.items():
                tensor = held[f"layers.{i}.{theirs}.weight"]
                if theirs in ("attention.wq", "attention.wk"):
                    tensor = _halves(tensor, heads if theirs.endswith("q") else kv_heads)
                state[f"model.layers.{i}.{ours}.weight"] = tensor
        model.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder} is not a model of llama2.c: {first_line(error)}") from error
    return model.eval()


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of rotary pairs (0, 1), (2, 3) ... to transformers' order: first halves, then second."""
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)
