"""Where a run keeps what it must not lose.

Everything finished (the dense network, each step of a recipe, each trial of the planner) is a file
or folder that appeared in one rename. A run that was killed and is started again with the same
folder finds it there; a run with other settings is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gossamer.compress.recipe import Recipe
from gossamer.core.errors import InputError
from gossamer.core.files import read_json, whole_folder, write_json
from gossamer.core.network import Network
from gossamer.core.saved import load_network, save_network
from gossamer.core.task import Task
from gossamer.parts.packed import PackedNetwork

WORK = ".work"
PACKED = "packed.safetensors"


class Workspace:
    """The working folder of one run.

    Args:
        folder: the run's output folder; the workspace is ``.work`` in it.
        settings: what decides the run's course, JSON values.

    Raises:
        InputError: if the folder holds a run with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder) / WORK
        path = self.folder / "settings.json"
        settings = json.loads(json.dumps(settings))
        self._sweep()
        if path.exists():
            before = read_json(path)
            if not isinstance(before, dict):
                raise InputError(f"{path} is not the record of a run; remove {self.folder}")
            changed = [k for k in settings if before.get(k) != settings[k]]
            if changed:
                raise InputError(
                    f"{folder} holds a run with another {changed[0].replace('_', ' ')}; choose "
                    f"another --out, or remove {self.folder} to start anew"
                )
        else:
            write_json(path, dict(settings))

    def _sweep(self) -> None:
        """Removes what a killed run was writing; the caller holds the folder."""
        half = (*self.folder.rglob(".*.part"), *self.folder.rglob(".*.old"))
        for path in (*half, *self.folder.parent.glob(".report.json.*.part")):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def path(self, name: str) -> Path:
        """A place in the workspace."""
        return self.folder / name

    def record(self, name: str) -> dict[str, Any] | None:
        """A finished record, or None."""
        path = self.path(f"{name}.json")
        return read_json(path) if path.exists() else None

    def records(self, name: str) -> Iterator[dict[str, Any]]:
        """All finished records of a folder, in the order of their names."""
        for path in sorted(self.path(name).glob("*.json")):
            yield read_json(path)

    def keep(self, name: str, value: Mapping[str, Any]) -> None:
        """Writes a finished record."""
        write_json(self.path(f"{name}.json"), dict(value))

    def apply(
        self,
        recipe: Recipe,
        network: Network,
        task: Task,
        *,
        seed: int,
        cpu: bool = False,
        name: str = "steps",
    ) -> Network:
        """Runs a recipe; steps that are already finished are read instead.

        Each step starts from the files of the one before, whether that was finished just now or
        by a run that was killed since: both go through the same states.
        """
        teacher = network
        seeds = recipe.seeds(seed)
        for number, (step, own) in enumerate(zip(recipe.steps, seeds, strict=True)):
            place = self.path(f"{name}/{number}-{step.name}")
            if not place.exists():
                state = self.path(f"{name}/{number}.state")
                made = step.apply(
                    network, task, teacher=teacher, seed=own, checkpoint=state, cpu=cpu
                )
                with whole_folder(place) as partial:
                    _write(made, partial)
                for old in self.path(name).glob(f"{number}.*state"):
                    old.unlink()
            network = _read(place, network)
        return network

    def clear(self, name: str) -> None:
        """Removes a folder or record that is no longer needed."""
        shutil.rmtree(self.path(name), ignore_errors=True)
        self.path(f"{name}.json").unlink(missing_ok=True)


def _write(network: Network, folder: Path) -> None:
    about = {
        "origin": dict(network.origin),
        "steps": [dict(step) for step in network.steps],
        "storage": dict(network.storage),
        "runtime": network.runtime,
    }
    save_network(folder, network.module, network.example_inputs, about)
    if network.write_onnx is not None:
        network.write_onnx(folder / "deployed.onnx")
    if network.packed is not None:
        network.packed.save(folder / PACKED)


def _read(folder: Path, before: Network) -> Network:
    module, _, about = load_network(folder)
    if lacking := sorted({"origin", "steps", "storage", "runtime"} - set(about)):
        raise InputError(f"{folder} is not a finished step: its record lacks {lacking[0]}")
    deployed, packed = folder / "deployed.onnx", folder / PACKED
    return replace(
        before,
        module=module,
        origin=about["origin"],
        steps=tuple(about["steps"]),
        storage=about["storage"],
        runtime=about["runtime"],
        write_onnx=CopyOf(deployed) if deployed.exists() else None,
        packed=PackedNetwork.load(packed) if packed.exists() else None,
    )


class CopyOf:
    """Writes a copy of a file: the deployed form of a network that was read back."""

    def __init__(self, source: Path) -> None:
        self.source = source

    def __call__(self, path: Path) -> None:
        shutil.copyfile(self.source, path)
