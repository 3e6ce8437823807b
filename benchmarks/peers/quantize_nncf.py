"""Quantizes an ONNX file to int8 with NNCF, inside NNCF's own environment.

Called by ``benchmarks/shrink_vs_peers.py`` with one JSON request; writes one ONNX file for each
preset and one JSON answer.
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import nncf
import onnx
from safetensors.numpy import load_file


def main() -> None:
    """Answers the request whose path is the only argument."""
    request = json.loads(Path(sys.argv[1]).read_text())
    images = load_file(request["calibration"])["images"]
    batches = [images[i : i + 1] for i in range(len(images))]
    name = onnx.load(request["model"]).graph.input[0].name
    written = {}
    for preset in ("performance", "mixed"):
        model = onnx.load(request["model"])
        quantized = nncf.quantize(
            model,
            nncf.Dataset(batches, lambda x: {name: x}),
            subset_size=len(images),
            preset=nncf.QuantizationPreset(preset),
            target_device=nncf.TargetDevice.CPU,
        )
        path = Path(request["out"]) / f"nncf-{preset}.onnx"
        onnx.save(quantized, path)
        written[preset] = str(path)
    answer = {"version": metadata.version("nncf"), "files": written}
    Path(request["answer"]).write_text(json.dumps(answer, indent=1))


if __name__ == "__main__":
    main()
