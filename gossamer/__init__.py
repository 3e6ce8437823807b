"""gossamer: deep learning on a budget.

``gossamer.shrink(model, task, macs=0.5)`` is the main job; the rooms are packages of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gossamer.compress.shrink import shrink
    from gossamer.datasets import open_task

__all__ = ["__version__", "open_task", "shrink"]

_DOORS = {"shrink": "gossamer.compress.shrink", "open_task": "gossamer.datasets"}


def __getattr__(name: str) -> Any:
    # The rooms import torch; the package itself stays light.
    if name in _DOORS:
        import importlib

        return getattr(importlib.import_module(_DOORS[name]), name)
    raise AttributeError(name)
