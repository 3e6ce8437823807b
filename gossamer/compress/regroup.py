"""Other groups for a network's depthwise or grouped convolutions, then fine-tuning.

A depthwise convolution does little arithmetic for each value it moves. Wider groups (E2GC,
arXiv:2006.15100; DRACO, arXiv:2006.15103) multiply its MACs, keep a matrix unit busier and give the
layer more capacity; started from the old kernels on the block diagonal, the wider network answers
as the old one does before it trains. Which width pays on which machine is the question of
:mod:`gossamer.hardware.group_size` and :mod:`gossamer.hardware.systolic`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from gossamer.compress.finetune import finetune
from gossamer.core.errors import InputError
from gossamer.core.network import Network
from gossamer.core.task import Task
from gossamer.parts import regroup as groups_of
from gossamer.parts.masks import SPARSE


def regroup(
    network: Network,
    task: Task,
    *,
    group_width: int | None = None,
    groups: int | None = None,
    select: Literal["depthwise", "grouped"] = "depthwise",
    warm_start: bool = True,
    epochs: int = 10,
    batch_size: int = 128,
    lr: float = 0.02,
    weight_decay: float = 5e-4,
    seed: int = 0,
    checkpoint: Path | None = None,
    cpu: bool = False,
) -> Network:
    """Changes the groups of convolutions and trains on (a step of a recipe).

    Args:
        network: unchanged.
        task: its data.
        group_width: channels of one group (8 if no number of groups is given).
        groups: a constant number of groups instead.
        select: depthwise convolutions only, or all grouped ones.
        warm_start: start from the old kernels; otherwise from drawn ones.
        epochs: passes over the training split; 0 leaves the converted network as it is.
        batch_size: samples a batch.
        lr: learning rate at the start; falls to 0 along half a cosine.
        weight_decay: of matrices and kernels.
        seed: of drawn kernels and the data order.
        checkpoint: file that holds the run's state; an interrupted run resumes from it.
        cpu: stay on the CPU although there is a GPU.

    Returns:
        The trained network. Its cost is real in ONNX Runtime.

    Raises:
        InputError: if a width and a number of groups are both given, or below 1.
        UnsupportedError: if there is no such convolution.
    """
    if group_width is not None and groups is not None:
        raise InputError("regroup takes a group_width or a number of groups, not both")
    if group_width is None and groups is None:
        group_width = 8
    module, converted = groups_of.regroup(
        network.module,
        group_width=group_width,
        groups=groups,
        select=groups_of.depthwise if select == "depthwise" else groups_of.grouped,
        warm_start=warm_start,
        seed=seed,
    )
    options = {
        "group_width": group_width, "groups": groups, "select": select, "warm_start": warm_start,
        "epochs": epochs, "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay,
        "seed": seed,
    }  # fmt: skip
    report = {
        "layers": {c.name: {"before": c.before, "groups": c.groups} for c in converted},
        "kept": all(c.kept for c in converted),
    }
    # Zeros that an earlier step made stay, but not those of the new connections.
    fresh = {f"{c.name}.weight" for c in converted}
    sparse = {
        name: form for name, form in network.storage.items() if form == SPARSE and name not in fresh
    }
    start = dataclasses.replace(
        network, module=module, storage=sparse, runtime="onnxruntime", write_onnx=None, packed=None
    )
    trained = finetune(
        start, task, epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay,
        seed=seed, checkpoint=checkpoint, cpu=cpu,
    )  # fmt: skip
    return dataclasses.replace(trained, steps=network.steps).after(
        "regroup", options, report | dict(trained.steps[-1]["report"])
    )
