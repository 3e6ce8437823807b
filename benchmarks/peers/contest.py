"""The work that is the same for every contender of ``benchmarks/shrink_vs_peers.py``.

Every contender starts from the same adapted weights, is trained on by the same loop over the same
samples in the same order, and is scored by the same code. This file knows none of them, so it runs
inside any of their environments.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer.core.fit import Supervised, cosine, fit, sgd, warm_cosine
from gossamer.core.task import Classification
from gossamer.datasets.cifar import cifar10
from gossamer.models.resnet import cifar_resnet

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""What the published weights were trained with."""


@dataclass(frozen=True)
class Setting:
    """How long everyone trains, and on what.

    Attributes:
        depth: of the CIFAR ResNet.
        adapt_images: training images of the adaptation to JPEG; None for all 45,000.
        adapt_epochs: passes over them.
        adapt_lr: peak learning rate of the adaptation.
        tune_images: training images of the fine-tuning; None for all.
        tune_epochs: passes over them, for every contender.
        batch_size: samples a batch, everywhere.
        trial_images: training (and validation) images of the short trials that choose, for every
            contender, scope and allocation first (at ``trial_lr``) and the learning rate then.
        trial_lr: learning rate of the first trials.
        other_lrs: learning rates tried beside it.
        trial_seed: seed of the trials.
        seeds: of the final runs, none of them the trials' seed.
        calibration: images that int8 is calibrated with, for everyone.
    """

    depth: int
    adapt_images: int | None
    adapt_epochs: int
    adapt_lr: float
    tune_images: int | None
    tune_epochs: int
    batch_size: int
    trial_images: int
    trial_lr: float
    other_lrs: tuple[float, ...]
    trial_seed: int
    seeds: tuple[int, ...]
    calibration: int = 512


SETTINGS = {
    "quick": Setting(
        depth=20,
        adapt_images=20_000,
        adapt_epochs=2,
        adapt_lr=0.04,
        tune_images=4_000,
        tune_epochs=2,
        batch_size=64,
        trial_images=2_000,
        trial_lr=0.02,
        other_lrs=(0.01, 0.05),
        trial_seed=100,
        seeds=(0, 1, 2),
    ),
    "full": Setting(
        depth=56,
        adapt_images=None,
        adapt_epochs=2,
        adapt_lr=0.04,
        tune_images=None,
        tune_epochs=20,
        batch_size=64,
        trial_images=10_000,
        trial_lr=0.02,
        other_lrs=(0.01, 0.05),
        trial_seed=100,
        seeds=(0, 1, 2),
    ),
}
SETTINGS["standard"] = replace(SETTINGS["quick"], tune_images=None)
"""Two epochs over all training images; everything else as in quick."""


def data_folder() -> Path:
    """The folder of data sets: ``GOSSAMER_DATA``, or ``../shared/data`` beside the checkout."""
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    return Path(os.environ.get("GOSSAMER_DATA", default))


def open_task(images: int | None) -> Classification:
    """CIFAR-10 (JPEG) with at most ``images`` training images; the test split is whole."""
    return cifar10(data_folder() / "cifar10", limit=images, mean=MEAN, std=STD)


def empty_network(depth: int) -> nn.Module:
    """The dense network, which takes published and adapted weights alike."""
    return cifar_resnet(depth)


def adapted_file(work: Path, setting: Setting) -> Path:
    """Where the adapted weights are kept; the name changes with the settings of the adaptation."""
    parts = (
        setting.depth, setting.adapt_images, setting.adapt_epochs, setting.adapt_lr,
        setting.batch_size,
    )  # fmt: skip
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4).hexdigest()
    return work / f"resnet{setting.depth}-adapted-{digest}.safetensors"


def adapt(setting: Setting, target: Path) -> None:
    """Trains the published weights on the JPEG images, once for everyone; can be resumed."""
    from safetensors.torch import save_file

    from gossamer.core.files import whole_file
    from gossamer.models.build import load_weights

    task = open_task(setting.adapt_images)
    network = empty_network(setting.depth)
    load_weights(
        network, data_folder() / "weights_cifar10_resnet" / f"resnet{setting.depth}.safetensors"
    )
    network.to(memory_format=torch.channels_last)
    rule = Supervised(
        network, task, optimizer=sgd(network, lr=setting.adapt_lr), schedule=warm_cosine()
    )
    fit(
        rule,
        task,
        epochs=setting.adapt_epochs,
        batch_size=setting.batch_size,
        seed=0,
        checkpoint=target.with_suffix(".state"),
        cpu=True,
    )
    network.to(memory_format=torch.contiguous_format)
    with whole_file(target) as beside:
        save_file({k: v.contiguous() for k, v in network.state_dict().items()}, beside)


def train(
    module: nn.Module,
    task: Classification,
    setting: Setting,
    *,
    lr: float,
    seed: int,
    epochs: int | None = None,
    teacher: nn.Module | None = None,
) -> float:
    """Fine-tunes in place, the same for every contender; returns the seconds it took.

    Args:
        module: a pruned (or dense) network.
        task: its data.
        setting: epochs and batch size.
        epochs: other than the setting's (trials are shorter).
        lr: at the start; falls to 0 along half a cosine.
        seed: of order and augmentation.
        teacher: when given, the loss is mixed with the teacher's answers (distillation).
    """
    criterion: Any = None
    if teacher is not None:
        from gossamer.compress.distil import DistillationCriterion

        criterion = DistillationCriterion(task, teacher)
    module.to(memory_format=torch.channels_last)
    rule = Supervised(
        module, task, optimizer=sgd(module, lr=lr), schedule=cosine, criterion=criterion
    )
    began = time.monotonic()
    fit(
        rule,
        task,
        epochs=setting.tune_epochs if epochs is None else epochs,
        batch_size=setting.batch_size,
        seed=seed,
        cpu=True,
    )
    seconds = time.monotonic() - began
    module.to(memory_format=torch.contiguous_format)
    return seconds
