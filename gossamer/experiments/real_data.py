"""Where experiments find the data that are not part of gossamer."""

from __future__ import annotations

import os
from pathlib import Path

from gossamer.core.errors import InputError


def folder_of(name: str) -> Path:
    """The folder of a data set: ``$GOSSAMER_DATA/name``.

    Raises:
        InputError: if the variable is not set or there is no such folder.
    """
    root = os.environ.get("GOSSAMER_DATA")
    if root is None:
        raise InputError(f"set GOSSAMER_DATA to the folder that holds {name} to run this")
    if not (Path(root) / name).is_dir():
        raise InputError(f"{root} holds no {name}")
    return Path(root) / name
