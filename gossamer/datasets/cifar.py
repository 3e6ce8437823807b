"""CIFAR-10: Parquet files of encoded images, the binary version, and torchvision's own files.

torchvision keeps CIFAR-10 as the authors' Python pickles. A pickle is a program; here its few
instructions that make dicts, lists, numbers, text and one array of bytes are interpreted by our
own small reader, and anything else is refused, so nothing in the file can run.

Krizhevsky, "Learning multiple layers of features from tiny images" (2009).
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gossamer.core.errors import InputError
from gossamer.core.task import Augment, Classification
from gossamer.datasets.arrays import ArraySource
from gossamer.datasets.augment import compose, flip, shift
from gossamer.datasets.encoded import EncodedSource
from gossamer.datasets.idx import class_names
from gossamer.datasets.splits import assemble
from gossamer.datasets.tables import read_table, table_sources

CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
SIDE = 32
PIXELS = 3 * SIDE * SIDE
TRAIN_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
PARQUET = ("{split}_jpeg.parquet", "{split}_png.parquet")


def cifar10(
    path: str | Path,
    *,
    seed: int = 0,
    image_size: tuple[int, int] | None = None,
    channels: int | None = None,
    limit: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    augment: Augment | None = None,
) -> Classification:
    """Opens CIFAR-10.

    Args:
        path: a folder with ``train_jpeg.parquet`` and ``test_jpeg.parquet`` (columns ``label`` and
            ``image``; class names in ``classes.json``), with the binary version
            (``data_batch_1.bin``), or with torchvision's files (``data_batch_1``); or the folder
            around the ``cifar-10-batches-...`` of one of them.
        seed: of the validation split (10 % of the training images).
        image_size: height and width in pixels. Default: 32 x 32.
        channels: 1 or 3. Default: 3.
        limit: at most about this many training images.
        mean: per channel. Default: measured on the training split.
        std: per channel. Default: measured on the training split.
        augment: of raw training batches. Default: flips, and shifts by up to an eighth.

    Raises:
        InputError: if a file is missing, truncated or corrupt, or a pickle holds anything but
            plain data.
    """
    sources, classes, name = cifar_sources(path, image_size=image_size, channels=channels)
    _, width = sources["train"].size
    return assemble(
        sources["train"],
        classes,
        name=name,
        seed=seed,
        test=sources["test"],
        limit=limit,
        mean=mean,
        std=std,
        augment=augment or compose(flip(), shift(max(1, width // 8))),
    )


def cifar_sources(
    path: str | Path,
    *,
    image_size: tuple[int, int] | None = None,
    channels: int | None = None,
) -> tuple[dict[str, ArraySource] | dict[str, EncodedSource], Sequence[str], str]:
    """The "train" and "test" images of CIFAR-10 as they are stored, the classes, and a name.

    Args:
        path: as for :func:`cifar10`.
        image_size: height and width in pixels. Default: 32 x 32.
        channels: 1 or 3. Default: 3.

    Raises:
        InputError: if a file is missing, truncated or corrupt, or a pickle holds anything but
            plain data.
    """
    found = find_cifar(Path(path))
    if found is None:
        raise InputError(
            f"{path} has no train_jpeg.parquet, data_batch_1.bin or data_batch_1 of CIFAR-10"
        )
    place, kind = found
    size = image_size or (SIDE, SIDE)
    pattern = _parquet_pattern(place)
    if kind == "parquet" and pattern is not None:
        tables = {
            split: read_table(place / pattern.format(split=split)) for split in ("train", "test")
        }
        encoded = table_sources(tables, image_size=size, channels=channels or 3)
        beside = place / "classes.json"
        classes = class_names(beside) if beside.exists() else CLASSES
        return encoded, classes, "cifar10 (JPEG)" if "jpeg" in pattern else "cifar10"
    read, suffix = (read_binary, ".bin") if kind == "binary" else (read_python, "")
    train = [read(place / (name + suffix)) for name in TRAIN_BATCHES]
    test = read(place / ("test_batch" + suffix))
    arrays = {
        "train": _source(
            [images for images, _ in train], [labels for _, labels in train], channels, size
        ),
        "test": _source([test[0]], [test[1]], channels, size),
    }
    return arrays, CLASSES, "cifar10"


def find_cifar(root: Path) -> tuple[Path, str] | None:
    """The folder with CIFAR-10 in or below ``root`` and its kind, if there is one."""
    places = (root, root / "cifar-10-batches-bin", root / "cifar-10-batches-py")
    for place in places:
        if (place / "data_batch_1.bin").is_file():
            return place, "binary"
        if (place / "data_batch_1").is_file():
            return place, "python"
    if _parquet_pattern(root):
        return root, "parquet"
    return None


def read_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads a file of the binary version: records of one label and 3,072 pixels.

    Returns:
        Images ``[n, 3, 32, 32]`` and labels ``[n]``, uint8.

    Raises:
        InputError: if it is missing or its length is not a whole number of records.
    """
    content = _bytes(path)
    record = 1 + PIXELS
    if not content or len(content) % record:
        raise InputError(
            f"{path} is truncated or not CIFAR-10's binary version: {len(content)} bytes are not "
            f"a whole number of records of {record}"
        )
    rows = np.frombuffer(content, dtype=np.uint8).reshape(-1, record)
    return rows[:, 1:].reshape(-1, 3, SIDE, SIDE).copy(), rows[:, 0].copy()


def read_python(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads one of torchvision's files without unpickling it.

    Returns:
        Images ``[n, 3, 32, 32]`` and labels ``[n]``, uint8.

    Raises:
        InputError: if it is missing, truncated, or holds anything but a batch of CIFAR-10.
    """
    value = read_plain_pickle(_bytes(path), str(path))
    data = value.get("data") if isinstance(value, dict) else None
    labels = value.get("labels") if isinstance(value, dict) else None
    if (
        not isinstance(data, np.ndarray)
        or data.ndim != 2
        or data.shape[1] != PIXELS
        or not isinstance(labels, list)
        or len(labels) != len(data)
        or not all(isinstance(label, int) and 0 <= label < len(CLASSES) for label in labels)
    ):
        raise InputError(f"{path} is not a batch of CIFAR-10: no data and labels that fit")
    return data.reshape(-1, 3, SIDE, SIDE), np.array(labels, dtype=np.uint8)


class _Mark:
    """Where a group of values begins on the stack."""


class _Name:
    """One of the few names that a batch of CIFAR-10 mentions; it is never looked up."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Array:
    """An array whose content is still to come."""

    value: np.ndarray | None = None


class _Type:
    """The dtype of unsigned bytes."""


_ARRAY_MAKERS = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
_NAMES = (*_ARRAY_MAKERS, "numpy ndarray", "numpy dtype", "_codecs encode")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_PLAIN = frozenset(
    (
        *("INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    )
)


def read_plain_pickle(content: bytes, name: str) -> Any:
    """Interprets a pickle of plain data: dicts, lists, tuples, numbers, text, arrays of bytes.

    The instructions come from :mod:`pickletools`, which only takes them apart. No class or
    function that the file names is ever looked up.

    Args:
        content: the pickle, protocol 0 to 4.
        name: of the file, for errors.

    Raises:
        InputError: if it is truncated, or holds anything else.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "STOP":
                return _settled(stack.pop(), name)
            _interpret(opcode.name, argument, stack, memo, name)
    except InputError:
        raise
    # Arbitrary bytes: stacks run empty, keys cannot be hashed, lengths run past the end.
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
        MemoryError,
    ) as error:
        raise InputError(f"{name} is corrupt or truncated: {type(error).__name__}") from error
    raise InputError(f"{name} is truncated")


def _interpret(code: str, argument: Any, stack: list[Any], memo: dict[int, Any], name: str) -> None:
    if code in _PLAIN:
        stack.append(argument)
    elif code in _CONSTANTS:
        stack.append(_CONSTANTS[code])
    elif code in ("PROTO", "FRAME"):
        pass
    elif code == "MARK":
        stack.append(_Mark())
    elif code == "EMPTY_DICT":
        stack.append({})
    elif code == "EMPTY_LIST":
        stack.append([])
    elif code == "EMPTY_TUPLE":
        stack.append(())
    elif code in ("DICT", "LIST", "TUPLE"):
        items = _since_mark(stack)
        stack.append(_pairs(items) if code == "DICT" else items if code == "LIST" else tuple(items))
    elif code in ("TUPLE1", "TUPLE2", "TUPLE3"):
        count = int(code[-1])
        items = stack[-count:]
        if len(items) < count:
            raise IndexError
        stack[-count:] = [tuple(items)]
    elif code in ("APPEND", "APPENDS"):
        items = _since_mark(stack) if code == "APPENDS" else [stack.pop()]
        _of(list, stack[-1]).extend(items)
    elif code in ("SETITEM", "SETITEMS"):
        items = _since_mark(stack) if code == "SETITEMS" else [stack.pop(-2), stack.pop()]
        _of(dict, stack[-1]).update(_pairs(items))
    elif code in ("PUT", "BINPUT", "LONG_BINPUT"):
        memo[int(argument)] = stack[-1]
    elif code == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif code in ("GET", "BINGET", "LONG_BINGET"):
        stack.append(memo[int(argument)])
    elif code == "GLOBAL":
        stack.append(_known_name(argument, name))
    elif code == "STACK_GLOBAL":
        what, where = stack.pop(), stack.pop()
        stack.append(_known_name(f"{where} {what}", name))
    elif code == "REDUCE":
        arguments, function = stack.pop(), stack.pop()
        stack.append(_call(_of(_Name, function).name, _of(tuple, arguments), name))
    elif code == "BUILD":
        state = stack.pop()
        _build(stack[-1], _of(tuple, state), name)
    else:
        raise InputError(f"{name} is refused: it holds more than plain data ({code})")


def _known_name(name: str, file: str) -> _Name:
    if name not in _NAMES:
        raise InputError(
            f"{file} is refused: it asks for {name.replace(' ', '.')}, which could run code"
        )
    return _Name(name)


def _call(function: str, arguments: tuple[Any, ...], name: str) -> Any:
    """What three functions would return; none of them is called."""
    if function in _ARRAY_MAKERS:
        return _Array()
    if function == "numpy dtype" and arguments and _text(arguments[0]) in ("u1", "|u1"):
        return _Type()
    if function == "_codecs encode" and len(arguments) == 2 and arguments[1] == "latin1":
        return _of(str, arguments[0]).encode("latin1")
    raise InputError(f"{name} is refused: it holds more than plain data ({function})")


def _build(target: Any, state: tuple[Any, ...], name: str) -> None:
    if isinstance(target, _Type):
        return
    _, shape, kind, fortran, content = state
    _of(_Type, kind)
    shape = tuple(_of(int, size) for size in _of(tuple, shape))
    content = content.encode("latin1") if isinstance(content, str) else _of(bytes, content)
    if min(shape, default=0) < 0 or math.prod(shape) != len(content):
        raise InputError(f"{name} is corrupt: an array of {shape} has {len(content)} bytes")
    array = np.frombuffer(content, dtype=np.uint8).reshape(shape, order="F" if fortran else "C")
    _of(_Array, target).value = np.ascontiguousarray(array)


def _settled(value: Any, name: str) -> Any:
    """The value with its arrays in place and its keys as text, one level deep."""
    if not isinstance(value, dict):
        raise InputError(f"{name} holds a {type(value).__name__}, not a dict")
    return {
        _text(key): item.value if isinstance(item, _Array) else item for key, item in value.items()
    }


def _text(value: Any) -> Any:
    return value.decode("latin1") if isinstance(value, bytes) else value


def _of(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} where {kind.__name__} is needed")
    return value


def _since_mark(stack: list[Any]) -> list[Any]:
    at = next((i for i in range(len(stack) - 1, -1, -1) if isinstance(stack[i], _Mark)), None)
    if at is None:
        raise IndexError
    items = stack[at + 1 :]
    del stack[at:]
    return items


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(items[::2], items[1::2], strict=True))


def _source(
    images: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    channels: int | None,
    size: tuple[int, int],
) -> ArraySource:
    return ArraySource(
        torch.from_numpy(np.concatenate(images)),
        torch.from_numpy(np.concatenate(labels)),
        channels=channels,
        size=size,
    )


def _parquet_pattern(root: Path) -> str | None:
    for pattern in PARQUET:
        if all((root / pattern.format(split=split)).is_file() for split in ("train", "test")):
            return pattern
    return None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {(error.strerror or '').lower()}") from error
