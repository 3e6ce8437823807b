"""Files that are either whole or absent.

Everything gossamer writes is written beside its final place and made visible in one rename, so a
kill, a full disk or a second run never leaves half a result. State (tensors and plain values
together) is one safetensors file whose header carries the JSON part: one rename publishes both.
Nothing here unpickles.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.core.errors import InputError

if TYPE_CHECKING:
    import torch

# torch is imported only where tensors are written or read, so that the catalogue stays light.


# Temporary files and folders are private; what appears in their place is as open as the user's
# other files. (The mask can only be read by setting it, so this is done once, at import.)
_UMASK = os.umask(0)
os.umask(_UMASK)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; renames it into place if the block succeeds.

    Args:
        path: where the file will appear; its folder is created.

    Raises:
        InputError: if the disk is full or the place cannot be written.
    """
    path = Path(path)
    partial: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
        partial = Path(name)
        yield partial
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(partial, 0o666 & ~_UMASK)
        os.replace(partial, path)
        partial = None
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {(error.strerror or str(error)).lower()}; "
            "nothing was left behind"
        ) from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``path``; moves it into place if the block succeeds.

    An existing folder at ``path`` is replaced only at that moment.

    Args:
        path: where the folder will appear.

    Raises:
        InputError: if the disk is full or the place cannot be written.
    """
    path = Path(path)
    partial: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
        yield partial
        os.chmod(partial, 0o777 & ~_UMASK)
        old = partial.with_suffix(".old")
        if path.exists():
            os.rename(path, old)
        os.rename(partial, path)
        partial = None
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {(error.strerror or str(error)).lower()}; "
            "nothing was left behind"
        ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` (UTF-8) to ``path`` in one rename."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON to ``path`` in one rename."""
    write_text(path, json.dumps(value, indent=1, sort_keys=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        InputError: if it is missing, not UTF-8 or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Holds ``folder`` for this process; a second run on it is refused at once.

    The lock is the operating system's: it goes with the process, also when that is killed.

    Raises:
        InputError: if another run holds the folder.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / ".lock", "a+")  # noqa: SIM115 (held as long as the block runs)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"{folder} is in use by another run; wait for it or choose another --out"
            ) from error
        yield


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file in one rename.

    Args:
        path: the file.
        tensors: by name; contiguous, and none shares memory with another.
        metadata: of the file's header.

    Raises:
        InputError: if the disk is full or the place cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with whole_file(path) as partial:
        try:
            save_file(dict(tensors), partial, None if metadata is None else dict(metadata))
        except SafetensorError as error:
            # It tells of a full disk in words only.
            found = re.search(r"os error (\d+)", str(error))
            code = int(found.group(1)) if found else errno.EIO
            raise OSError(code, os.strerror(code)) from error


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Writes a nested state (dicts, lists, tensors, plain values) as one safetensors file.

    Args:
        path: the file; it appears in one rename.
        state: nested dicts and lists whose leaves are tensors or JSON values. Keys that are
            integers (as in optimizer states) are kept as integers.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = _lift(state, "", tensors)
    write_tensors(path, tensors, {"state": json.dumps(tree)})


def load_state(path: Path) -> dict[str, Any]:
    """Reads what :func:`save_state` wrote.

    Raises:
        InputError: if the file is missing, truncated or not a state file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = _lower(json.loads(metadata["state"]), tensors)
        if not isinstance(state, dict):
            raise TypeError(type(state).__name__)
        return state
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (
        SafetensorError,
        KeyError,
        TypeError,
        ValueError,
        OSError,
        RecursionError,
        MemoryError,
    ) as error:
        raise InputError(f"{path} is not a state file of gossamer, or it is truncated") from error


def _lift(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        # A copy of its own: safetensors refuses tensors that share memory.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"$tensor": name}
    if isinstance(value, Mapping):
        items = [[key, _lift(item, f"{name}/{key}", tensors)] for key, item in value.items()]
        return {"$items": items}
    if isinstance(value, list | tuple):
        kind = "$tuple" if isinstance(value, tuple) else "$list"
        return {kind: [_lift(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name} holds a {type(value).__name__}, which a state file cannot keep")


def _lower(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    match kind:
        case "$tensor":
            return tensors[content]
        case "$items":
            return {key: _lower(item, tensors) for key, item in content}
        case "$tuple":
            return tuple(_lower(item, tensors) for item in content)
        case "$list":
            return [_lower(item, tensors) for item in content]
    raise ValueError(kind)
