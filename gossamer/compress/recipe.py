"""Recipes: named steps with options, applied one after the other.

A step is a function ``(network, task, *, options) -> Network``. A recipe is a list of them, read
from and written to YAML::

    steps:
      - prune: {criterion: taylor, macs: 0.5, epochs: 0}
      - distil: {epochs: 10}
      - int8:

What a step needs beside its options it gets by the names of its parameters: ``teacher`` (the dense
network), ``seed``, ``checkpoint`` (a file in which long training survives a kill) and ``cpu``.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import reprlib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gossamer.core.errors import InputError
from gossamer.core.network import Network
from gossamer.core.task import Task, seed_of

STEPS: dict[str, str] = {
    "prune": "gossamer.compress.prune.magnitude:prune",
    "sparsify": "gossamer.compress.prune.sparsify:sparsify",
    "woodfisher": "gossamer.compress.prune.woodfisher:woodfisher",
    "admm": "gossamer.compress.prune.admm:admm",
    "hard-concrete": "gossamer.compress.prune.hard_concrete:hard_concrete",
    "dynamic-sparse": "gossamer.compress.prune.dynamic_sparse:dynamic_sparse",
    "movement": "gossamer.compress.prune.dynamic_sparse:movement",
    "prune-after-training": "gossamer.compress.prune.post_training:prune_after_training",
    "activating-pruning": "gossamer.compress.prune.activation:activating_pruning",
    "bip": "gossamer.compress.prune.bilevel:bip",
    "hydra": "gossamer.compress.prune.bilevel:hydra",
    "adaptive-pruning": "gossamer.compress.prune.pq_index:adaptive_pruning",
    "rate-distortion": "gossamer.compress.prune.rate_distortion:rate_distortion",
    "otov3": "gossamer.compress.prune.half_space:otov3",
    "consensus": "gossamer.compress.prune.polarization:consensus",
    "low-rank": "gossamer.compress.low_rank:low_rank",
    "svd": "gossamer.compress.low_rank:svd",
    "finetune": "gossamer.compress.finetune:finetune",
    "regroup": "gossamer.compress.regroup:regroup",
    "distil": "gossamer.compress.distil:distil",
    "quantized-distillation": "gossamer.compress.quantize.distilled:quantized_distillation",
    "differentiable-quantization": (
        "gossamer.compress.quantize.distilled:differentiable_quantization"
    ),
    "post-mortem": "gossamer.compress.quantize.distilled:post_mortem",
    "fixed-point": "gossamer.compress.quantize.fixed_point:fixed_point",
    "codebook": "gossamer.compress.quantize.codebooks:codebook",
    "binarize": "gossamer.compress.quantize.binary:binarize",
    "quantize-lm": "gossamer.compress.quantize.language_models:quantize_lm",
    "delta": "gossamer.compress.delta:delta",
    "merge": "gossamer.compress.delta:merge",
    "anchored-finetune": "gossamer.compress.delta:anchored_finetune",
    "mgd": "gossamer.compress.segmentation_distillation:mgd",
    "int8": "gossamer.compress.quantize.post_training:int8",
}
"""Where each step lives; imported when a recipe uses it."""

_SUPPLIED = frozenset({"teacher", "seed", "checkpoint", "cpu"})

StepFunction = Callable[..., Network]


def step_function(name: str) -> StepFunction:
    """The function of a step.

    Raises:
        InputError: if there is no such step; the nearest names are offered.
    """
    if name not in STEPS:
        raise InputError(f"there is no step {name!r:.60}; {_nearest(name, STEPS)}")
    module, _, function = STEPS[name].partition(":")
    return getattr(importlib.import_module(module), function)


def _nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=3)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"there are: {', '.join(known)}"


@dataclass(frozen=True)
class Step:
    """One step of a recipe.

    Attributes:
        name: a key of :data:`STEPS`.
        options: keyword arguments of its function, JSON values.

    Raises:
        InputError: if the step or an option is unknown, an option that has no default is missing,
            or a value is of the wrong kind.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        function = step_function(self.name)
        hints = typing.get_type_hints(function)
        takes = [
            p
            for p in inspect.signature(function).parameters.values()
            if p.kind is p.KEYWORD_ONLY and p.name not in _SUPPLIED - {"seed"}
        ]
        known = [p.name for p in takes]
        for option, value in self.options.items():
            if option not in known:
                raise InputError(
                    f"the step {self.name} has no option {option!r:.60}; {_nearest(option, known)}"
                )
            if not _fits(value, hints.get(option, Any)):
                raise InputError(
                    f"the option {option} of {self.name} cannot be {reprlib.repr(value)}; "
                    f"it takes {_words(hints[option])}"
                )
        missing = [p.name for p in takes if p.default is p.empty and p.name not in self.options]
        if missing:
            raise InputError(f"the step {self.name} needs the option {' and '.join(missing)}")

    def apply(
        self,
        network: Network,
        task: Task,
        *,
        teacher: Network,
        seed: int = 0,
        checkpoint: Path | None = None,
        cpu: bool = False,
    ) -> Network:
        """Runs the step."""
        function = step_function(self.name)
        accepted = inspect.signature(function).parameters
        supplied = {"teacher": teacher, "seed": seed, "checkpoint": checkpoint, "cpu": cpu}
        arguments = {k: v for k, v in supplied.items() if k in accepted} | dict(self.options)
        return function(network, task, **arguments)


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if hint is Any:
        return value is None or isinstance(value, bool | int | float | str)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if hint is type(None):
        return value is None
    if hint is float:
        return (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        )
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    if origin is not None and isinstance(origin, type) and issubclass(origin, typing.Collection):
        (part,) = typing.get_args(hint)[:1] or (Any,)
        return isinstance(value, list | tuple) and all(_fits(v, part) for v in value)
    return False  # an object that no file can hold


def _words(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(part) for part in typing.get_args(hint))
    if origin is typing.Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    if hint is type(None):
        return "null"
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "a word"}
    return names.get(hint, "a list")


@dataclass(frozen=True)
class Recipe:
    """Steps in order.

    Attributes:
        steps: applied from the first to the last.
    """

    steps: tuple[Step, ...]

    @classmethod
    def of(cls, *steps: tuple[str, Mapping[str, Any]] | str) -> Recipe:
        """A recipe in Python: ``Recipe.of(("prune", {"macs": 0.5}), "int8")``."""
        return cls(tuple(Step(s) if isinstance(s, str) else Step(s[0], dict(s[1])) for s in steps))

    @classmethod
    def from_json(cls, value: Any, source: str = "the recipe") -> Recipe:
        """Reads a mapping with a list of steps.

        Raises:
            InputError: if it is no recipe.
        """
        if not isinstance(value, dict) or not isinstance(value.get("steps"), list):
            raise InputError(f"{source} is not a recipe: it needs a list called steps")
        if unknown := sorted(set(map(str, value)) - {"steps"}):
            raise InputError(f"{source} has an entry {unknown[0]!r:.60}; a recipe has steps only")
        steps = []
        for number, entry in enumerate(value["steps"], 1):
            if isinstance(entry, str):
                steps.append(Step(entry))
            elif isinstance(entry, dict) and len(entry) == 1:
                ((name, options),) = entry.items()
                if options is not None and not isinstance(options, dict):
                    raise InputError(
                        f"step {number} of {source}: the options of {name} are no mapping"
                    )
                steps.append(Step(str(name), {str(k): v for k, v in (options or {}).items()}))
            else:
                raise InputError(f"step {number} of {source} is not a name with options")
        return cls(tuple(steps))

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Reads a YAML file.

        Raises:
            InputError: if it is missing or no recipe.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the recipe {path}: {_reason(error)}") from error
        return cls.from_yaml(text, str(path))

    @classmethod
    def from_yaml(cls, text: str, source: str = "the recipe") -> Recipe:
        """Reads YAML text.

        Raises:
            InputError: if it is no recipe.
        """
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise InputError(f"{source} is not valid YAML: {_reason(error)}") from error
        return cls.from_json(value, source)

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON values."""
        return {"steps": [{step.name: dict(step.options)} for step in self.steps]}

    def to_yaml(self) -> str:
        """The recipe as YAML that :meth:`from_yaml` reads."""
        return yaml.safe_dump(self.to_json(), sort_keys=False)

    def seeds(self, seed: int) -> list[int]:
        """One seed a step, so that equal steps draw different numbers."""
        return [seed_of(seed, number, step.name) for number, step in enumerate(self.steps)]


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return (str(error).splitlines() or [type(error).__name__])[0]
