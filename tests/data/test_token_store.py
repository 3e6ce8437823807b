"""The store of tokens: its bytes, random access, and what happens to damaged files."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core.errors import InputError
from gossamer.data.token_store import (
    TokenStore,
    decode_codes,
    encode_codes,
    entropy_bytes,
    write_store,
)


def published_decoder(content: bytes) -> list[int]:
    """The reading rule, byte by byte: 255 sets a carry, anything else ends a code."""
    codes, carry = [], 0
    for byte in content:
        if byte == 255:
            carry += 255
        else:
            codes.append(byte + carry)
            carry = 0
    return codes


# The format


def test_bytes_of_known_codes() -> None:
    content, offsets = encode_codes(np.array([[0, 254, 255, 390, 17]]))
    assert list(content) == [0, 254, 255, 0, 255, 135, 17]
    assert offsets.tolist() == [0, 7]
    assert decode_codes(content).tolist() == [0, 254, 255, 390, 17]


def test_every_code_comes_back() -> None:
    codes = np.arange(391).reshape(-1, 17)
    content, offsets = encode_codes(codes)
    assert decode_codes(content).tolist() == list(range(391))
    assert published_decoder(content) == list(range(391))
    assert offsets[-1] == 255 + 2 * (391 - 255)
    content, _ = encode_codes(np.array([[510, 65535, 509]]))
    assert decode_codes(content).tolist() == [510, 65535, 509] == published_decoder(content)


@given(st.lists(st.lists(st.integers(0, 900), min_size=3, max_size=3), max_size=20))
def test_any_codes_come_back(images: list[list[int]]) -> None:
    codes = np.array(images, dtype=np.int64).reshape(-1, 3)
    content, offsets = encode_codes(codes)
    assert decode_codes(content).tolist() == codes.ravel().tolist() == published_decoder(content)
    for image, start, end in zip(codes, offsets, offsets[1:], strict=False):
        assert decode_codes(content[start:end]).tolist() == image.tolist()


def test_sizes_of_the_paper() -> None:
    assert entropy_bytes(1024, 391) == pytest.approx(1102.2, abs=0.05)
    assert 1_281_167 * entropy_bytes(1024, 391) == pytest.approx(1.412e9, rel=1e-3)


def test_codes_that_have_no_bytes_are_refused() -> None:
    with pytest.raises(InputError, match="codes are 0 or more, not -1"):
        encode_codes(np.array([[-1]]))
    with pytest.raises(InputError, match="in the middle of one"):
        decode_codes(bytes([3, 255]))


# A store


def written(path, *, compress=True, images=30, codes=300):
    generator = torch.Generator().manual_seed(0)
    train = torch.randint(codes, (images, 4, 4), generator=generator)
    labels = torch.arange(images) % 3
    blocks = [(train[:13], labels[:13]), (train[13:], labels[13:])]
    test = torch.full((2, 4, 4), 255)
    store = write_store(
        path,
        {"train": blocks, "test": [(test, torch.tensor([2, 0]))]},
        codebook=torch.randn(codes, 8, generator=generator),
        classes=["a", "b", "c"],
        name="random",
        compress=compress,
        about={"pixels": [3, 32, 32]},
    )
    return store, train, labels


@pytest.mark.parametrize("compress", [True, False])
def test_images_are_found_at_random(tmp_path, compress) -> None:
    _, train, labels = written(tmp_path / "s", compress=compress)
    store = TokenStore(tmp_path / "s")
    rows = np.array([29, 0, 13, 12, 13])
    assert torch.equal(store.splits["train"].fetch(rows), train[torch.from_numpy(rows)])
    assert torch.equal(store.splits["train"].labels, labels)
    assert torch.equal(store.splits["test"].fetch(np.arange(2)), torch.full((2, 4, 4), 255))
    assert store.splits["train"].fetch(np.array([], dtype=int)).shape == (0, 4, 4)
    assert torch.equal(torch.cat(list(store.splits["train"].blocks(7))), train)
    counts = torch.bincount(train.flatten(), minlength=300)
    counts[255] += 32
    assert store.verify().tolist() == counts.tolist()
    assert store.about["pixels"] == [3, 32, 32]
    assert isinstance(store.splits["train"].content, np.memmap) != compress


def test_others_can_read_it(tmp_path) -> None:
    """With nothing but gzip, numpy and the three lines of the reading rule."""
    _, train, labels = written(tmp_path / "s")
    folder = tmp_path / "s" / "train"
    content = gzip.decompress((folder / "codes.bin.gz").read_bytes())
    raw = gzip.decompress((folder / "offsets.npy.gz").read_bytes())
    offsets = np.load(io.BytesIO(raw), allow_pickle=False)
    assert published_decoder(content[offsets[5] : offsets[6]]) == train[5].flatten().tolist()
    assert [int(x) for x in (folder / "labels.txt").read_text().split()] == labels.tolist()


def test_the_same_codes_make_the_same_bytes(tmp_path) -> None:
    written(tmp_path / "a")
    written(tmp_path / "b")
    for file in (tmp_path / "a").rglob("*"):
        if file.is_file():
            other = tmp_path / "b" / file.relative_to(tmp_path / "a")
            assert file.read_bytes() == other.read_bytes()


def test_a_failing_writer_leaves_nothing_and_a_foreign_folder_stays(tmp_path) -> None:
    def broken():
        yield torch.zeros(2, 4, 4, dtype=torch.long), torch.tensor([0, 1])
        raise InputError("the disk of images went away")

    options = {"codebook": torch.randn(4, 2), "classes": ["a", "b"], "name": "x"}
    with pytest.raises(InputError, match="went away"):
        write_store(tmp_path / "s", {"train": broken()}, **options)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "photos").mkdir()
    with pytest.raises(InputError, match="is no store of tokens; choose another place"):
        write_store(tmp_path / "photos", {"train": []}, **options)
    for codes, labels, message in (
        (torch.full((1, 2, 2), 4), [0], "codes from 4 to 4 do not fit a store of 4 codes"),
        (torch.zeros(1, 2, 2, dtype=torch.long), [2], "labels from 2 to 2"),
        (torch.zeros(2, 2, 2, dtype=torch.long), [0], "do not belong"),
        (torch.zeros(0, 2, 2, dtype=torch.long), [], "split of x is empty"),
    ):
        with pytest.raises(InputError, match=message):
            blocks = [(codes, torch.tensor(labels, dtype=torch.long))]
            write_store(tmp_path / "t", {"train": blocks}, **options)
    assert not (tmp_path / "t").exists()


# Damage


def _edit(change):
    def apply(folder):
        record = json.loads((folder / "store.json").read_text())
        change(record)
        (folder / "store.json").write_text(json.dumps(record))

    return apply


def _cut(name, by=5):
    def apply(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[:-by])

    return apply


def _replace(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def _npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_cut("train/codes.bin"), "codes.bin is truncated: .* bytes are promised"),
        (_cut("train/offsets.npy"), "truncated or no array of offsets"),
        (_cut("train/labels.txt"), "labels for 30 images"),
        (_cut("codebook.safetensors"), "truncated or no codebook"),
        (_replace("train/labels.txt", b"9\n" * 30), "has label 9, but there are 3 classes"),
        (_replace("train/labels.txt", b"x\n" * 30), "a line is no number"),
        (_replace("train/offsets.npy", _npy(np.arange(31) * 4)), "do not go up from 0"),
        (_replace("train/offsets.npy", _npy(np.arange(4))), "has 4 offsets; 30 images need 31"),
        (_replace("train/offsets.npy", pickle.dumps([1])), "no array of offsets"),
        (
            _replace("train/offsets.npy", _npy(np.array([{}] * 31), allow_pickle=True)),
            "no array of offsets",
        ),
        (_replace("store.json", b"{"), "not valid JSON"),
        (_replace("store.json", b"[]"), "does not describe a store"),
        (_edit(lambda r: r.update(format="zip")), "does not describe a store"),
        (_edit(lambda r: r.update(codes=10**9)), "codes are read"),
        (_edit(lambda r: r.update(codes=299)), "is no codebook of 299 codes"),
        (_edit(lambda r: r.update(grid=[1 << 30, 1])), "sides of 1 to 4096"),
        (_edit(lambda r: r["splits"]["train"].update(images=10**12)), "images in"),
        (_edit(lambda r: r["splits"].update({"../x": {"images": 1, "bytes": 1}})), "names a split"),
        (lambda folder: (folder / "train" / "codes.bin").unlink(), "is missing"),
        (lambda folder: (folder / "store.json").unlink(), "it has no store.json"),
    ],
)
def test_damage_is_one_sentence(tmp_path, harm, message) -> None:
    written(tmp_path / "s", compress=False)
    harm(tmp_path / "s")
    with pytest.raises(InputError, match=message):
        TokenStore(tmp_path / "s")


def test_damaged_images_are_named(tmp_path) -> None:
    written(tmp_path / "s", compress=False, codes=300)
    path = tmp_path / "s" / "test" / "codes.bin"
    good = path.read_bytes()  # (FF 00) * 32
    for place, byte, message in (
        (0, 7, "image 0 of .* hold 17 codes"),
        (33, 255, "image 1 of .* hold 15 codes"),
        (63, 255, "image 1 of .* and part of one"),
        (1, 45, "image 0 of .* it has code 300, and there are 300 codes"),
    ):
        path.write_bytes(good[:place] + bytes([byte]) + good[place + 1 :])
        with pytest.raises(InputError, match=message):
            TokenStore(tmp_path / "s").verify()


def test_a_small_file_cannot_fill_the_memory(tmp_path) -> None:
    """More than was promised is never unpacked."""
    written(tmp_path / "s")
    bomb = gzip.compress(bytes(200 << 20))
    (tmp_path / "s" / "train" / "codes.bin.gz").write_bytes(bomb)
    with pytest.raises(InputError, match="too long"):
        TokenStore(tmp_path / "s")


@given(st.sampled_from(["codes.bin.gz", "offsets.npy.gz", "labels.txt"]), st.data())
def test_any_damage_is_refused_or_harmless(tmp_path_factory, name, data) -> None:
    folder = tmp_path_factory.mktemp("fuzz") / "s"
    written(folder, images=5)
    path = folder / "train" / name
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(place, len(content)))]))
    with contextlib.suppress(InputError):
        TokenStore(folder).verify()
