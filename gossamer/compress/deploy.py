"""A network as it would be deployed: its files, their bytes, and what runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from gossamer.compress.workspace import PACKED
from gossamer.core.export import OnnxRunner, write_onnx
from gossamer.core.network import Network
from gossamer.core.saved import GRAPH_FILE, load_network, save_network
from gossamer.parts.packed import PackedNetwork


@dataclass(frozen=True)
class Deployed:
    """What was written, read again.

    Attributes:
        onnx: the ONNX file; every network has one, also where nothing is gained by it.
        packed: the packed file, or None.
        nbytes: of what is deployed: the ONNX file, or the packed file and the network's structure
            where the network's runtime is "packed".
        run: the deployed form, loaded from its files: inputs to outputs.
    """

    onnx: Path
    packed: Path | None
    nbytes: int
    run: Callable[..., Any]


def deploy(
    network: Network,
    folder: Path,
    *,
    threads: int = 1,
    metadata: Mapping[str, Any] | None = None,
    name: str = "model.onnx",
) -> Deployed:
    """Writes a network's deployed form and loads it again.

    Args:
        network: any.
        folder: gets the ONNX file and, for a packed form, the packed file and the structure.
        threads: of ONNX Runtime.
        metadata: of the files.
        name: of the ONNX file.

    Raises:
        UnsupportedError: if the network cannot be exported.
    """
    folder.mkdir(parents=True, exist_ok=True)
    onnx = folder / name
    write_onnx(network, onnx, metadata=metadata)
    if network.packed is None:
        return Deployed(onnx, None, onnx.stat().st_size, OnnxRunner(onnx, threads=threads))
    save_network(folder, network.module, network.example_inputs, metadata)
    network.packed.save(folder / PACKED)
    if network.runtime != "packed":
        runner = OnnxRunner(onnx, threads=threads)
        return Deployed(onnx, folder / PACKED, onnx.stat().st_size, runner)
    size = (folder / PACKED).stat().st_size + (folder / GRAPH_FILE).stat().st_size
    return Deployed(onnx, folder / PACKED, size, packed_runner(folder))


def packed_runner(folder: Path) -> nn.Module:
    """The network of a folder as it runs from its packed file.

    Raises:
        InputError: if a file is missing, damaged or does not fit the other.
    """
    structure, inputs, _ = load_network(folder)
    return PackedNetwork.load(folder / PACKED).runner(structure, inputs)
