"""Bytes stored and time of an epoch of reading: tokens against JPEG of the same images.

One epoch is every image of the training split once, in a random order, in batches, ready for the
network: decoded codes as maps of embeddings, or decoded JPEG as normalised pixels. Readers take
turns in one process, one thread; the network is not part of the time. With ``--train`` the step of
a small vision transformer is.

    python benchmarks/tokens.py --json benchmarks/results/tokens.json

Images are the frames of CamVid (``camvid/train.parquet`` in the folder that GOSSAMER_DATA names),
cropped to squares; labels play no part and are made up. By default the tokenizer's encoder is not
trained and its codes are the centres of a k-means, which are used more evenly than those of a
trained one: the bytes with gzip are then near their most.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor, nn

from gossamer.core.experiment import about
from gossamer.core.task import Classification, Preprocess
from gossamer.data.token_store import TokenStore, entropy_bytes
from gossamer.data.tokenizer import perplexity, train_tokenizer
from gossamer.data.tokens import TokenTask, TokenViT, tokenize
from gossamer.datasets.encoded import EncodedSource
from gossamer.models.token_vit import MapViT

BATCH = 64


def frames(path: Path, side: int) -> Classification:
    """CamVid's training frames as squares, with labels that mean nothing."""
    contents = pq.read_table(path, columns=["image"])["image"].to_pylist()
    names = [f"frame {number}" for number in range(len(contents))]
    labels = torch.arange(len(contents)) % 2
    source = EncodedSource(contents, names, labels, channels=3, size=(side, side))
    preprocess = Preprocess(3, side, side, (0.4, 0.4, 0.4), (0.3, 0.3, 0.3))
    # The store wants both splits; only the first is measured.
    splits = {"train": source, "validation": source.take(np.arange(2))}
    return Classification(splits, preprocess, ["even", "odd"], name="CamVid frames")


def jpegs(images: Any, quality: int) -> list[bytes]:
    """The training images as JPEG files."""
    source = images.splits["train"]
    files = []
    for start in range(0, len(source), 256):
        raw = source.fetch(np.arange(start, min(start + 256, len(source)))).float()
        raw = (raw * 255 / images.preprocess.scale).round().to(torch.uint8)
        for image in raw.permute(0, 2, 3, 1).numpy():
            buffer = io.BytesIO()
            Image.fromarray(image.squeeze()).save(buffer, "JPEG", quality=quality)
            files.append(buffer.getvalue())
    return files


def timed(
    readers: dict[str, Callable[[int], Iterator[Tensor]]],
    rounds: int,
    use: dict[str, Callable[[Tensor], None]],
) -> dict[str, list[float]]:
    """Seconds of each epoch, the readers taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for epoch in range(rounds + 1):
        for name, reader in readers.items():
            began = time.perf_counter()
            for batch in reader(epoch):
                use[name](batch)
            if epoch:  # the first warms up
                seconds[name].append(time.perf_counter() - began)
    return seconds


def step_of(network: nn.Module) -> Callable[[Tensor], None]:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)

    def step(batch: Tensor) -> None:
        optimizer.zero_grad()
        network(batch).square().mean().backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", default=str(Path(os.environ.get("GOSSAMER_DATA", ".")) / "cifar10")
    )
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--patch", type=int, default=8)
    parser.add_argument("--codes", type=int, default=391)
    parser.add_argument("--epochs", type=int, default=0, help="of the tokenizer")
    parser.add_argument("--quality", type=int, default=85)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--train", action="store_true", help="also time a network's step")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    place = Path(os.environ.get("GOSSAMER_DATA", "../shared/data")) / "camvid" / "train.parquet"
    images = frames(place, given.side)
    tokenizer = train_tokenizer(
        images, patch=given.patch, codes=given.codes, width=16, epochs=given.epochs
    )
    files = jpegs(images, given.quality)
    labels = images.splits["train"].labels
    with tempfile.TemporaryDirectory() as folder:
        stores = {
            "tokens": tokenize(images, Path(folder) / "gzip", tokenizer),
            "tokens, mapped": tokenize(images, Path(folder) / "raw", tokenizer, compress=False),
        }
        p = images.preprocess
        channels, size = p.channels, (p.height, p.width)

        def pixels(epoch: int) -> Iterator[Tensor]:
            # Nothing decoded is kept: a training set does not fit into memory.
            source = EncodedSource(
                files, [str(i) for i in range(len(files))], labels, channels=channels, size=size,
                cache_bytes=0,
            )  # fmt: skip
            order = np.random.default_rng(epoch).permutation(len(files))
            for start in range(0, len(order), BATCH):
                yield p(source.fetch(order[start : start + BATCH]))

        def tokens_of(store: TokenStore) -> Callable[[int], Iterator[Tensor]]:
            task = TokenTask(store)

            def read(epoch: int) -> Iterator[Tensor]:
                for codes, _ in task.batches("train", batch_size=BATCH, epoch=epoch):
                    yield store.codebook[codes].permute(0, 3, 1, 2).contiguous()

            return read

        readers = {f"JPEG, quality {given.quality}": pixels}
        readers |= {name: tokens_of(store) for name, store in stores.items()}
        nothing = {name: lambda batch: None for name in readers}
        seconds = {"reading": timed(readers, given.rounds, nothing)}
        if given.train:
            grid = stores["tokens"].grid[0]
            sizes = {"width": 48, "depth": 2, "heads": 4}
            use = {
                name: step_of(
                    MapViT(channels, 10, side=given.side, patch=2 * given.patch, **sizes)
                    if name.startswith("JPEG")
                    else TokenViT(stores[name].codebook, 10, side=grid, patch=2, **sizes)
                )
                for name in readers
            }
            seconds["reading and training"] = timed(readers, max(1, given.rounds // 2), use)
        stored = {f"JPEG, quality {given.quality}": sum(map(len, files))}
        stored |= {name: store.stored_bytes()["train"] for name, store in stores.items()}
        extra = stores["tokens"].stored_bytes()
        even = perplexity(stores["tokens"].verify())
    report: dict[str, Any] = {
        "about": about(data=images.name, side=given.side, grid=list(stores["tokens"].grid)),
        "images": len(labels),
        "bytes": stored,
        "bytes_per_image": {name: size / len(labels) for name, size in stored.items()},
        "uniform_bytes_per_image": entropy_bytes(
            stores["tokens"].grid[0] * stores["tokens"].grid[1], given.codes
        ),
        "perplexity": even,
        "codebook_bytes": extra["codebook"],
        "tokenizer_bytes": extra["tokenizer"],
        "epochs": {},
    }
    reference = f"JPEG, quality {given.quality}"
    for what, found in seconds.items():
        ratios = {
            name: np.array(found[reference]) / np.array(values) for name, values in found.items()
        }
        report["epochs"][what] = {
            name: {
                "seconds": float(np.median(values)),
                "times_as_fast": float(np.median(ratios[name])),
                "range": [float(ratios[name].min()), float(ratios[name].max())],
            }
            for name, values in found.items()
        }
    print(json.dumps(report, indent=1))
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
