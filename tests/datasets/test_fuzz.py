"""Broken files: whatever the bytes, a reader answers or says one sentence.

A quick number of examples runs with the tests; ten thousand a reader with
``pytest tests/datasets/test_fuzz.py --hypothesis-profile=fuzz``.
"""

from __future__ import annotations

import gzip
import io
import random
import resource
import struct
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from gossamer.core.errors import GossamerError
from gossamer.core.experiment import Claim, Pick, Result
from gossamer.core.files import load_state, read_json, save_state
from gossamer.core.task import Preprocess
from gossamer.datasets import open_task
from gossamer.datasets.cifar import read_binary, read_plain_pickle, read_python
from gossamer.datasets.decode import decode, probe
from gossamer.datasets.idx import class_names, read_idx
from gossamer.datasets.tables import read_table
from gossamer.models.build import load_weights
from gossamer.models.resnet import digits_resnet

pytestmark = pytest.mark.filterwarnings("ignore")

MEMORY = 10 << 30
"""Bytes of address space; torch alone takes about five gigabytes of it."""


SEEDS = st.integers(0, 2**63)
"""Hypothesis draws seeds, not bytes: that is ten times as many broken files in the same time."""


def broken(valid: bytes, seed: int) -> bytes:
    """Random bytes, or a valid file with bytes changed, cut out, doubled, inserted or cut off."""
    drawn = random.Random(seed)
    if drawn.random() < 0.1:
        return drawn.randbytes(drawn.randrange(200))
    content = bytearray(valid)
    for _ in range(drawn.randint(1, 4)):
        # The first and last bytes of a file hold most of its structure.
        reach = drawn.choice([len(valid), len(valid), min(64, len(valid))])
        at = drawn.randint(0, reach)
        at = len(valid) - at if drawn.random() < 0.5 else at
        length = drawn.randint(1, 16)
        match drawn.choice(["change", "flip", "cut", "double", "insert", "end"]):
            case "change":
                content[at : at + length] = drawn.randbytes(length)
            case "flip" if at < len(content):
                content[at] ^= 1 << drawn.randrange(8)
            case "cut":
                del content[at : at + length]
            case "double":
                content[at:at] = content[at : at + length]
            case "insert":
                content[at:at] = drawn.choice([b"\0", b"\xff", drawn.randbytes(1)]) * length
            case "end":
                del content[at:]
    return bytes(content)


def png() -> bytes:
    return image("PNG")


def image(kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def idx(*shape: int) -> bytes:
    count = int(np.prod(shape))
    header = b"\0\0\x08" + bytes([len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
    return header + bytes(k % 256 for k in range(count))


def python_batch(protocol: int) -> bytes:
    buffer = io.BytesIO()
    value = {b"data": np.zeros((2, 3072), np.uint8), "labels": [1, 2], "names": ["a", "b"]}
    ForkingPickler(buffer, protocol).dump(value)
    return buffer.getvalue()


def table() -> pa.Table:
    return pa.table({"image": [png()] * 12, "label": [k % 3 for k in range(12)]})


def on_disk(write: Callable[[Path], object]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "f")
        return (Path(folder) / "f").read_bytes()


def arrow(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table().schema) as stream:
        stream.write_table(table())


def small() -> torch.nn.Module:
    return digits_resnet((2, 2, 2), blocks_per_stage=1)


def result(path: Path) -> None:
    rows = ({"seed": 0, "x": 1.0, "c": "a"}, {"seed": 0, "x": 2.0, "c": "b"})
    claim = Claim("t", Pick("x", {"c": "a"}), "<", Pick("x", {"c": "b"}), beyond=1.0)
    Result("s", "quick", rows, (claim,), about={"date": "d"}).write(path)


def preprocess(path: Path) -> Preprocess:
    value = read_json(path)
    return Preprocess.from_json(value)


def state() -> dict[str, Any]:
    return {"a": torch.arange(4.0), "b": [1, (2, "x")], "c": {0: {"d": None}}}


# Name: a valid file, the suffix its reader looks at, and the reader.
READERS: dict[str, tuple[Callable[[], bytes], str, Callable[[Path], object]]] = {
    "idx images": (lambda: idx(3, 4, 5), "", lambda path: read_idx(path, axes=3)),
    "idx labels": (lambda: idx(9), "", lambda path: read_idx(path, axes=1)),
    "idx gzipped": (lambda: gzip.compress(idx(3, 4, 5)), ".gz", lambda p: read_idx(p, axes=3)),
    "cifar binary": (lambda: bytes(range(256)) * 12 + b"\1", "", read_binary),
    "cifar pickle 0": (lambda: python_batch(0), "", read_python),
    "cifar pickle 2": (lambda: python_batch(2), "", read_python),
    "cifar pickle 4": (lambda: python_batch(4), "", read_python),
    "parquet": (lambda: on_disk(lambda p: pq.write_table(table(), p)), ".parquet", open_task),
    "arrow": (lambda: on_disk(arrow), ".arrow", read_table),
    "class names": (lambda: b'["a", "b\\u00e4", "c"]', ".json", class_names),
    "result": (lambda: on_disk(result), ".json", lambda path: Result.read(path).verdict()),
    "preprocessing": (
        lambda: b'{"channels": 1, "height": 8, "width": 8, "mean": [0.1], "std": [1], "scale": 2}',
        ".json",
        preprocess,
    ),
    "state": (lambda: on_disk(lambda path: save_state(path, state())), "", load_state),
    "weights safetensors": (
        lambda: on_disk(lambda path: save_file(small().state_dict(), path)),
        ".safetensors",
        lambda path: load_weights(small(), path),
    ),
    "weights torch": (
        lambda: on_disk(lambda path: torch.save(small().state_dict(), path)),
        ".pt",
        lambda path: load_weights(small(), path),
    ),
}


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Iterator[None]:
    """A reader that believes a length it should not takes down this process, not the machine."""
    old = resource.getrlimit(resource.RLIMIT_AS)
    most = MEMORY if old[1] == resource.RLIM_INFINITY else min(MEMORY, old[1])
    resource.setrlimit(resource.RLIMIT_AS, (most, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, old)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def survives(read: Callable[[], object]) -> None:
    """Any other exception than ours fails the test."""
    try:
        read()
    except GossamerError as error:
        assert str(error).strip() and "\n" not in str(error)


@pytest.mark.parametrize("name", READERS)
@given(seed=SEEDS)
def test_readers_of_files(name: str, place: Path, seed: int) -> None:
    _, suffix, read = READERS[name]
    path = place / f"file{suffix}"
    path.write_bytes(broken(VALID[name], seed))
    survives(lambda: read(path))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "PPM", "TIFF"])
@given(seed=SEEDS)
def test_decoders(kind: str, seed: int) -> None:
    content = broken(IMAGES[kind], seed)
    survives(lambda: probe(content, "x"))

    def read() -> None:
        pixels = decode(content, "x", channels=3, size=(8, 8))
        assert pixels.shape == (3, 8, 8) and pixels.dtype == np.uint8

    survives(read)


@given(content=st.binary(max_size=80))
def test_pickles_of_random_instructions(content: bytes) -> None:
    survives(lambda: read_plain_pickle(b"\x80\x02" + content + b".", "x"))


@pytest.mark.parametrize("name", ["state.json", "arrow", "dataset_dict.json"])
@given(seed=SEEDS)
def test_saved_datasets(name: str, place: Path, seed: int) -> None:
    folder = place / name
    if not folder.exists():
        split = datasets.Dataset.from_dict({"image": [png()] * 12, "label": [0, 1, 2] * 4})
        datasets.DatasetDict(train=split, test=split).save_to_disk(folder)
        VALID[name] = _target(folder, name).read_bytes()
    _target(folder, name).write_bytes(broken(VALID[name], seed))
    survives(lambda: open_task(folder))


def _target(folder: Path, name: str) -> Path:
    if name == "arrow":
        return next((folder / "train").glob("*.arrow"))
    return folder / name if name == "dataset_dict.json" else folder / "train" / name


VALID = {name: make() for name, (make, _, _) in READERS.items()}
IMAGES = {kind: image(kind) for kind in ("JPEG", "PNG", "BMP", "GIF", "WEBP", "PPM", "TIFF")}


@pytest.mark.parametrize("name", READERS)
def test_the_valid_files_are_read(name: str, place: Path) -> None:
    """So that the fuzzing begins with files that reach all of the reader."""
    _, suffix, read = READERS[name]
    path = place / f"valid{suffix}"
    path.write_bytes(VALID[name])
    read(path)
