"""What a step of a recipe takes and returns.

A :class:`Network` is a module together with what the module alone does not say: the storage
format of each tensor, the runtime in which its cost is real, what it was made from, and how it is
written as ONNX (a quantized network is another file than its float module).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn


class Packed(Protocol):
    """The stored form of a network that is smaller than its float tensors."""

    def save(self, path: Path) -> None:
        """Writes one file, in one rename."""
        ...

    def runner(self, network: nn.Module, example_inputs: Sequence[Tensor]) -> nn.Module:
        """The network (which gives the structure) as it runs from its packed form."""
        ...


@dataclass(frozen=True)
class Network:
    """A network between two steps of a recipe. Steps never change the one they are given.

    Attributes:
        module: the network; in training-friendly form where there is one.
        example_inputs: a small batch of inputs, on the CPU.
        origin: what it was made from, as JSON values (``{"model": "timm name"}``, ...).
        steps: one record for each step that made it: ``{"step": name, "options": {...},
            "report": {...}}``.
        storage: format of each tensor that is not plain float32, by the name that the original
            modules gave it, as "int8", "uniform4/256" or "sparse" (its zeros stay zeros in later
            training).
        runtime: where its cost is real: "onnxruntime", "torch" or "packed" (the packed form).
        write_onnx: writes the deployed ONNX file, where that is not the plain export of the
            module (a quantized graph, say).
        packed: its packed form, where it has one.
    """

    module: nn.Module
    example_inputs: tuple[Tensor, ...]
    origin: Mapping[str, Any] = field(default_factory=dict)
    steps: tuple[Mapping[str, Any], ...] = ()
    storage: Mapping[str, str] = field(default_factory=dict)
    runtime: str = "onnxruntime"
    write_onnx: Callable[[Path], None] | None = None
    packed: Packed | None = None

    def after(
        self, step: str, options: Mapping[str, Any], report: Mapping[str, Any], **changes: Any
    ) -> Network:
        """This network changed by a step, with the step on record.

        Args:
            step: its name in recipes.
            options: as given, JSON values.
            report: what the step did, JSON values.
            **changes: fields of the new network that differ. With another module everything that
                was made from the old one (its stored forms, its runtime) starts anew, unless it is
                given too.
        """
        if "module" in changes:
            anew = {"storage": {}, "runtime": "onnxruntime", "write_onnx": None, "packed": None}
            changes = anew | changes
        record = {"step": step, "options": dict(options), "report": dict(report)}
        return replace(self, steps=(*self.steps, record), **changes)
