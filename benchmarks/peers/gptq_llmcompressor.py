"""Rounds one layer with llm-compressor's GPTQ, inside llm-compressor's own environment.

Called by ``benchmarks/gptq.py`` with the file of a weight and a Hessian, options as JSON and the
file to write. Scales are those of compressed-tensors' own observer arithmetic, found beforehand for
the whole weight, as llm-compressor does; only the rounding is timed.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import metadata
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from safetensors.torch import load_file, save_file


def main() -> None:
    source, options, target = sys.argv[1:4]
    settings: dict[str, Any] = json.loads(options)
    torch.set_num_threads(settings["threads"])
    held = load_file(source)
    weight, hessian, group = held["weight"], held["hessian"], settings["group"]
    order = settings["order"]
    arguments = QuantizationArgs(
        num_bits=4, symmetric=True, strategy="group", group_size=group,
        actorder=None if order == "none" else order,
    )  # fmt: skip
    cut = weight.unflatten(1, (-1, group))
    scale, zero = calculate_qparams(cut.amin(2), cut.amax(2), arguments)
    # A stack of one layer: the function takes several of the same shape, and works in place.
    stack = [tensor[None].clone() for tensor in (weight, hessian, scale, zero)]
    began = time.perf_counter()
    found, _, fallback = quantize_weight(*stack, None, arguments, blocksize=128, percdamp=0.01)
    seconds = time.perf_counter() - began
    if bool(fallback.any()):
        raise RuntimeError("the peer rounded to nearest")
    save_file({"weight": found[0].float().contiguous()}, target)
    print(json.dumps({"seconds": seconds, "version": metadata.version("llmcompressor")}))


if __name__ == "__main__":
    main()
