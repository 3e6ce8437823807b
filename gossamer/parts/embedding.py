"""Features of many images by one network, one batch after another, kept on disk if asked.

The features of an image are what the network's last linear layer reads (its penultimate
features), or the output of a layer that is named, averaged over positions.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError, first_line
from gossamer.core.files import read_json, write_json
from gossamer.core.progress import progress
from gossamer.core.task import device_of, evaluating, logits_of
from gossamer.parts.taps import layer_of

log = logging.getLogger(__name__)

FEATURES, LOGITS, STATE = "features.npy", "logits.npy", "state.json"
BLOCK = 4096
"""Images between two notes of how far a cached run has come."""


class Images(Protocol):
    """Raw images that are fetched by row."""

    def __len__(self) -> int: ...

    def fetch(self, rows: np.ndarray, /) -> Tensor: ...


@dataclass(frozen=True)
class Embedded:
    """What a network makes of many images.

    Attributes:
        features: ``[n, d]`` float32; a memory map if they are kept on disk.
        logits: ``[n, classes]`` float32, likewise.
        layer: where the features were read.
    """

    features: np.ndarray
    logits: np.ndarray
    layer: str


def embed(
    images: Images,
    network: nn.Module,
    preprocess: Callable[[Tensor], Tensor],
    *,
    layer: str | None = None,
    batch_size: int = 256,
    cache: Path | None = None,
    fingerprint: str = "",
) -> Embedded:
    """Features and logits of all images, in order; one batch is in memory at a time.

    Args:
        images: raw images.
        network: answers logits; runs in evaluation mode on the device it is on.
        preprocess: raw images in, the network's inputs out.
        layer: whose output is the feature; maps and tokens are averaged over positions. Default:
            the input of the last linear layer.
        batch_size: images a batch.
        cache: a folder that keeps the result. A run that was killed goes on there, and a second
            run with the same network, layer and ``fingerprint`` reads it.
        fingerprint: changes when the images change.

    Raises:
        InputError: if there is no such layer, or the features are not finite.
    """
    if len(images) == 0:
        raise InputError("there are no images to embed")
    reader = _Reader(network, preprocess, layer)
    first = reader(images.fetch(np.arange(min(2, len(images)))))
    shapes = [(len(images), part.shape[1]) for part in first]
    key = {
        "network": weights_digest(network),
        "layer": reader.name,
        "preprocess": repr(preprocess),
        "images": fingerprint,
        "shapes": [list(shape) for shape in shapes],
    }
    done, (features, logits) = _storage(cache, key, shapes)
    with progress() as bar:
        shown = bar.add_task("embedding images", total=len(images), completed=done)
        noted = done
        for start in range(done, len(images), batch_size):
            stop = min(start + batch_size, len(images))
            part, answers = reader(images.fetch(np.arange(start, stop)))
            if not np.isfinite(part).all():
                raise InputError(
                    f"the network's features of images {start} to {stop - 1} are not finite; look "
                    "at its weights and at the preprocessing"
                )
            features[start:stop], logits[start:stop] = part, answers
            bar.update(shown, completed=stop)
            if cache is not None and (stop - noted >= BLOCK or stop == len(images)):
                for stored in (features, logits):
                    assert isinstance(stored, np.memmap)
                    stored.flush()
                write_json(cache / STATE, {"done": stop, "key": key})
                noted = stop
    return Embedded(features, logits, reader.name)


def pixels(images: Images, *, scale: float = 255.0, batch_size: int = 4096) -> np.ndarray:
    """The images themselves as features, ``[n, channels * height * width]`` on the scale 0..1.

    Args:
        images: raw images.
        scale: raw values are divided by this.
        batch_size: images fetched at a time.
    """
    parts = [
        images.fetch(np.arange(start, min(start + batch_size, len(images)))).flatten(1).float()
        for start in range(0, len(images), batch_size)
    ]
    return (torch.cat(parts) / scale).numpy()


def weights_digest(network: nn.Module) -> str:
    """A fingerprint of a network's parameters and buffers."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class _Reader:
    """Raw images in; their features and logits out."""

    def __init__(
        self, network: nn.Module, preprocess: Callable[[Tensor], Tensor], layer: str | None
    ) -> None:
        self.network = network
        self.preprocess = preprocess
        self.layer = layer
        if layer is not None:
            layer_of(network, layer)
        self.name = layer or "the input of the last linear layer"

    def __call__(self, raw: Tensor) -> tuple[np.ndarray, np.ndarray]:
        seen: list[Any] = []

        def read(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            # A linear layer may run several times, and others after it: the last one counts.
            seen[:] = [output if self.layer is not None else inputs[0]]

        heads = (
            [layer_of(self.network, self.layer)]
            if self.layer is not None
            else [module for module in self.network.modules() if isinstance(module, nn.Linear)]
        )
        handles = [module.register_forward_hook(read) for module in heads]
        try:
            with evaluating(self.network):
                inputs = self.preprocess(raw).to(device_of(self.network))
                logits = logits_of(self.network(inputs)).float()
        finally:
            for handle in handles:
                handle.remove()
        if not seen:
            raise InputError(
                "no linear layer ran, so the penultimate features are not known; name a layer"
            )
        if not isinstance(seen[0], Tensor) or len(seen[0]) != len(raw):
            raise InputError(f"{self.name} gives no features of single images; name another layer")
        return _pooled(seen[0]).cpu().numpy(), logits.flatten(1).cpu().numpy()


def _pooled(features: Tensor) -> Tensor:
    features = features.float()
    if features.ndim == 4:
        return features.mean((2, 3))
    return features.mean(1) if features.ndim == 3 else features.flatten(1)


def _storage(
    cache: Path | None, key: dict[str, Any], shapes: list[tuple[int, int]]
) -> tuple[int, list[np.ndarray]]:
    """How many rows are done, and the arrays that hold them."""
    if cache is None:
        return 0, [np.empty(shape, dtype=np.float32) for shape in shapes]
    files = [cache / FEATURES, cache / LOGITS]
    cache.mkdir(parents=True, exist_ok=True)
    if (cache / STATE).exists():
        state = read_json(cache / STATE)
        known = isinstance(state, dict) and state.get("key") == key
        if known and all(file.exists() for file in files):
            stored = [np.lib.format.open_memmap(file, mode="r+") for file in files]
            if [list(array.shape) for array in stored] == key["shapes"]:
                return min(int(state["done"]), shapes[0][0]), list(stored)
        if not known:
            log.info("%s holds the features of other images or another network; anew", cache)
        (cache / STATE).unlink()
    return 0, [
        np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
        for file, shape in zip(files, shapes, strict=True)
    ]


def read_features(path: Path, names: Sequence[str]) -> np.ndarray:
    """Features that somebody else computed, in the order of ``names``.

    Args:
        path: ``.npy`` (``[n, d]``, a row for each name in order; mapped, not read) or
            ``.parquet`` with the columns ``name`` and ``embedding`` (lists of one length).
        names: of the images.

    Raises:
        InputError: if the file cannot be read, or images are missing.
    """
    import pyarrow as pa
    import pyarrow.parquet

    try:
        if path.suffix == ".npy":
            found = np.load(path, mmap_mode="r", allow_pickle=False)
            if found.ndim != 2 or len(found) != len(names) or found.dtype.kind != "f":
                raise InputError(
                    f"{path} holds {found.dtype} of shape {list(found.shape)}; floats "
                    f"[{len(names)}, d] are needed, a row for each image"
                )
            return found
        table = pyarrow.parquet.read_table(path, columns=["name", "embedding"])
        place = {name: row for row, name in enumerate(table["name"].to_pylist())}
        missing = [name for name in names if name not in place]
        if missing:
            raise InputError(
                f"{path} has no embedding of {len(missing)} of {len(names)} images, "
                f"{missing[0]} first"
            )
        stacked = np.array(table["embedding"].to_pylist(), dtype=np.float32)
        if stacked.ndim != 2:
            raise InputError(f"the embeddings in {path} differ in length")
        return stacked[[place[name] for name in names]]
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} holds no features that can be read: {first_line(error)}"
        ) from error
