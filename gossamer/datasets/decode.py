"""Encoded images into arrays, with one sentence for what cannot be decoded.

Only formats whose decoders run no other program are opened (not EPS, for example).
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from gossamer.core.errors import InputError, first_line

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "PPM", "TIFF")
SUFFIXES = (
    ".jpg .jpeg .png .bmp .gif .webp .ppm .pgm .pbm .pnm .tif .tiff".split()  # noqa: SIM905
)
END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
"""What stands near the end of a file that is not truncated."""
TAIL_BYTES = 4096
MAX_PIXELS = 100_000_000


@dataclass(frozen=True)
class Header:
    """What the first bytes of an image say.

    Attributes:
        width: pixels.
        height: pixels.
        channels: 1 for grey, 3 for anything with colour.
        ends: whether the mark that ends a file of this format was seen (False where the format
            has none: then only decoding tells).
    """

    width: int
    height: int
    channels: int
    ends: bool


def probe(content: Path | bytes, name: str) -> Header:
    """Reads the header of an image, and looks for its end, without decoding it.

    Args:
        content: a file or its bytes.
        name: of the image, for errors.

    Raises:
        InputError: if it is no image, or unreadable.
    """
    image = _open(content, name)
    with image:
        mark = END_MARKS.get(image.format or "")
        ends = mark is not None and mark in _tail(content, name)
        grey = image.mode in ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L")
        return Header(image.width, image.height, 1 if grey else 3, ends)


def decode(content: Path | bytes, name: str, *, channels: int, size: tuple[int, int]) -> np.ndarray:
    """Decodes an image to 8 bits, at a size.

    An image of other proportions is cropped at its centre; resizing is bilinear with
    antialiasing. Deployment must preprocess like this too.

    Args:
        content: a file or its bytes.
        name: of the image, for errors.
        channels: 1 (grey) or 3 (RGB).
        size: height and width in pixels.

    Returns:
        ``[channels, height, width]``, uint8.

    Raises:
        InputError: if it is corrupt, truncated or no image.
    """
    height, width = size
    mode = "L" if channels == 1 else "RGB"
    image = _open(content, name)
    try:
        with image:
            if image.mode.startswith("I"):
                # Pillow would clip 16-bit grey at 255 instead of scaling it.
                levels = np.asarray(image, dtype=np.float64) / 257.0
                picture = Image.fromarray(np.clip(np.rint(levels), 0, 255).astype(np.uint8))
                picture = picture.convert(mode)
            else:
                # Lets the JPEG decoder skip detail that resizing would throw away.
                image.draft(mode, (width, height))
                picture = image.convert(mode)
            if picture.size != (width, height):
                picture = ImageOps.fit(picture, (width, height), Image.Resampling.BILINEAR)
            pixels = np.array(picture)
    # Decoders meet arbitrary bytes and raise nearly anything (OSError, SyntaxError, struct.error).
    except Exception as error:
        raise _unreadable(name, error) from error
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _open(content: Path | bytes, name: str) -> Image.Image:
    try:
        source = io.BytesIO(content) if isinstance(content, bytes) else content
        image = Image.open(source, formats=FORMATS)
    except Exception as error:  # as in decode
        raise _unreadable(name, error) from error
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise InputError(
            f"{name} has {image.width} x {image.height} pixels; more than {MAX_PIXELS:,} are "
            "refused, because a small file can claim any size"
        )
    return image


def _tail(content: Path | bytes, name: str) -> bytes:
    if isinstance(content, bytes):
        return content[-TAIL_BYTES:]
    try:
        with open(content, "rb") as file:
            file.seek(max(0, content.stat().st_size - TAIL_BYTES))
            return file.read()
    except OSError as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: BaseException) -> InputError:
    detail = first_line(error)
    if "BytesIO" in detail or "cannot identify" in detail:
        detail = f"not one of {', '.join(FORMATS)}"
    return InputError(f"{name} cannot be read as an image, it is corrupt or truncated ({detail})")
