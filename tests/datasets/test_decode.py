"""Decoding: exact pixels where the format is exact, one sentence where a file is broken."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gossamer.core.errors import InputError
from gossamer.datasets.decode import decode, probe

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF"])
def test_exact_formats(tmp_path: Path, kind: str) -> None:
    content = encode(Image.fromarray(PIXELS), kind)
    found = decode(content, "x", channels=3, size=(6, 8))
    assert np.array_equal(found, PIXELS.transpose(2, 0, 1))
    (tmp_path / "x").write_bytes(content)
    assert np.array_equal(decode(tmp_path / "x", "x", channels=3, size=(6, 8)), found)
    header = probe(content, "x")
    assert (header.width, header.height, header.channels) == (8, 6, 3)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_formats(kind: str) -> None:
    smooth = np.tile(np.arange(0, 160, 10, dtype=np.uint8)[None, :, None], (16, 1, 3))
    found = decode(encode(Image.fromarray(smooth), kind), "x", channels=3, size=(16, 16))
    assert np.abs(found.transpose(1, 2, 0).astype(int) - smooth).max() <= 6


def test_grey_is_the_luma() -> None:
    found = decode(encode(Image.fromarray(PIXELS), "PNG"), "x", channels=1, size=(6, 8))
    luma = PIXELS @ np.array([0.299, 0.587, 0.114])
    assert np.abs(found[0] - luma).max() <= 1.0
    assert probe(encode(Image.fromarray(PIXELS[..., 0]), "PNG"), "x").channels == 1


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    deep = np.array([[0, 257, 257 * 128, 65535]], dtype=np.uint16)
    found = decode(encode(Image.fromarray(deep), "PNG"), "x", channels=1, size=(1, 4))
    assert found.tolist() == [[[0, 1, 128, 255]]]


def test_palettes_and_transparency_become_colour() -> None:
    flat = Image.new("RGB", (4, 4), (10, 20, 30))
    for image in (flat.quantize(4), flat.convert("RGBA"), flat.convert("CMYK")):
        kind = "TIFF" if image.mode == "CMYK" else "PNG"
        found = decode(encode(image, kind), "x", channels=3, size=(4, 4))
        assert np.abs(found[:, 0, 0].astype(int) - [10, 20, 30]).max() <= 3


def test_other_proportions_are_cropped_at_the_centre() -> None:
    wide = np.zeros((4, 12, 3), dtype=np.uint8)
    wide[:, 4:8] = 200  # what a square crop keeps
    found = decode(encode(Image.fromarray(wide), "PNG"), "x", channels=3, size=(4, 4))
    assert (found == 200).all()
    tall = np.zeros((36, 12, 3), dtype=np.uint8)
    tall[12:24] = 200
    found = decode(encode(Image.fromarray(tall), "PNG"), "x", channels=3, size=(6, 6))
    assert (found[:, 1:5] == 200).all() and (found >= 150).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "PPM", "TIFF"])
def test_truncated_images_are_named(kind: str) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = encode(Image.fromarray(noise), kind)
    assert probe(content, "x").ends == (kind in ("JPEG", "PNG"))
    for kept in (0, 3, len(content) // 3, len(content) * 9 // 10):
        with pytest.raises(InputError, match=r"dog\.img cannot be read as an image, it is corrupt"):
            decode(content[:kept], "dog.img", channels=3, size=(64, 64))
        if kept:
            try:
                assert not probe(content[:kept], "dog.img").ends
            except InputError as error:
                assert "dog.img" in str(error)


def test_formats_that_start_programs_are_not_opened() -> None:
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(InputError, match="not one of JPEG, PNG"):
        decode(script, "x", channels=3, size=(4, 4))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_small_file_cannot_claim_a_huge_image() -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + kind + content + check

    size = (12_000).to_bytes(4, "big") * 2
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + b"\x08\x02\0\0\0")
    bomb += chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    with pytest.raises(InputError, match="has 12000 x 12000 pixels; more than 100,000,000"):
        probe(bomb, "x")
