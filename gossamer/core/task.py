"""What a network is for.

A :class:`Task` owns the data and the metric: it yields batches of a split in an order that is a
function of (seed, epoch) alone, says what the loss of a batch is and scores a network on a split.
Every method of gossamer that trains or measures takes one, so no method owns a loader or a metric.

Splits are named ``"train"``, ``"validation"`` and ``"test"``. A validation split is always carved
from training data; the test split is for the final measurement only.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError

Batch = Any
"""What a task yields. Only the task looks inside; rules hand it back to the task."""

SPLITS = ("train", "validation", "test")


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed that is a function of all ``parts`` (so streams never overlap by accident)."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def order_of(size: int, shuffle: bool, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch goes through ``size`` samples, ``[size]``."""
    order = np.arange(size)
    if shuffle:
        np.random.default_rng(seed_of("order", seed, epoch)).shuffle(order)
    return order


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode and no gradients inside the block; every module's mode is restored after."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def device_of(model: Any) -> torch.device:
    """The device of a model's first tensor; the CPU for anything that owns none."""
    if isinstance(model, nn.Module):
        for tensor in model.parameters():
            return tensor.device
        for tensor in model.buffers():
            return tensor.device
    return torch.device("cpu")


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Moves every tensor of a nested batch to ``device``."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


@dataclass(frozen=True)
class Preprocess:
    """How a raw image becomes an input: resized, scaled to 0..1, then normalised per channel.

    Attributes:
        channels: 1 (grey) or 3 (RGB).
        height: pixels.
        width: pixels.
        mean: one number per channel, subtracted after scaling to 0..1.
        std: one number per channel, divided by after that.
        scale: raw values are divided by this (255 for 8-bit images, 16 for the digits).
    """

    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 255.0

    def __call__(self, images: Tensor) -> Tensor:
        """Normalises raw images of the right size, ``[batch, channels, height, width]``."""
        mean = torch.tensor(self.mean, device=images.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(1, -1, 1, 1)
        return (images.float() / self.scale - mean) / std

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Preprocess:
        """Reads what :meth:`to_json` wrote.

        Raises:
            InputError: if a field is missing or of the wrong kind.
        """
        try:
            result = cls(
                channels=int(value["channels"]),
                height=int(value["height"]),
                width=int(value["width"]),
                mean=tuple(float(v) for v in value["mean"]),
                std=tuple(float(v) for v in value["std"]),
                scale=float(value["scale"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"the preprocessing record is not usable: {error!r}") from error
        sizes, scales = (result.height, result.width), (*result.std, result.scale)
        if not all(1 <= side <= 1 << 14 for side in sizes):
            raise InputError(
                f"the preprocessing record is not usable: its sides are not 1 to {1 << 14} pixels"
            )
        if not all(math.isfinite(x) for x in (*result.mean, *scales)) or 0.0 in scales:
            raise InputError("the preprocessing record is not usable: it divides by 0 or infinity")
        if len(result.mean) != result.channels or len(result.std) != result.channels:
            raise InputError("the preprocessing record needs one mean and one std per channel")
        return result


class Task(ABC):
    """Data, loss and metric of one job.

    Attributes:
        name: what the job is called in reports.
        metric: name and unit of :meth:`score`; higher is better.
        example_inputs: a small batch of inputs for tracing, on the CPU.
    """

    name: str
    metric: str
    example_inputs: tuple[Tensor, ...]

    @abstractmethod
    def size(self, split: str) -> int:
        """How many samples ``split`` holds (0 when there is no such split)."""

    @abstractmethod
    def batches(
        self,
        split: str,
        *,
        batch_size: int = 128,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        shuffle: bool | None = None,
    ) -> Iterator[Batch]:
        """Yields the batches of one epoch, on the CPU.

        Args:
            split: ``"train"``, ``"validation"`` or ``"test"``.
            batch_size: samples a batch; the last may be smaller.
            seed: with ``epoch``, decides order and augmentation.
            epoch: counts from 0.
            start: skip this many batches (to resume inside an epoch) at no cost.
            shuffle: shuffled and augmented, or in stored order and plain. Default: only "train".
        """

    @abstractmethod
    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        """The positional arguments of the network for ``batch``."""

    @abstractmethod
    def criterion(self, outputs: Any, batch: Batch) -> Tensor:
        """The loss (a scalar) of outputs that were already computed."""

    @abstractmethod
    def score(self, model: Callable[..., Any], split: str = "validation") -> float:
        """The metric of ``model`` on ``split``, in evaluation mode and without gradients.

        Args:
            model: a module, or anything that maps the inputs of a batch to outputs (an ONNX
                Runtime session, a packed network).
            split: which samples.
        """

    def outputs(self, model: Callable[..., Any], batch: Batch) -> Any:
        """What ``model`` answers for ``batch``."""
        return model(*self.inputs(batch))

    def decisions(self, outputs: Any) -> Tensor:
        """What the network decides: the index of the largest logit along the axis of classes."""
        return logits_of(outputs).argmax(1)

    def loss(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """The loss (a scalar) of ``model`` on ``batch``."""
        return self.criterion(self.outputs(model, batch), batch)

    def steps_per_epoch(self, split: str, batch_size: int) -> int:
        """How many batches one epoch of ``split`` has."""
        return -(-self.size(split) // batch_size)

    def rows_of(
        self, split: str, batch_size: int, seed: int, epoch: int, start: int, shuffle: bool | None
    ) -> Iterator[tuple[int, bool, np.ndarray]]:
        """Which samples each batch has, for the arguments of :meth:`batches`.

        Yields:
            The batch's number, whether the epoch is shuffled, and the rows.

        Raises:
            InputError: if there is no such split.
        """
        if not self.size(split):
            raise InputError(f"{self.name} has no {split} split")
        shuffle = split == "train" if shuffle is None else shuffle
        order = order_of(self.size(split), shuffle, seed, epoch)
        for step in range(start, self.steps_per_epoch(split, batch_size)):
            yield step, shuffle, order[step * batch_size : (step + 1) * batch_size]

    def describe(self) -> dict[str, Any]:
        """What a report says of the task, as JSON values."""
        return {
            "name": self.name,
            "metric": self.metric,
            "samples": {split: self.size(split) for split in SPLITS},
        }

    def fingerprint(self) -> str:
        """Changes when the data or the split changes; guards resumed runs."""
        return self.digest_of(())

    def digest_of(self, tensors: Iterable[Tensor]) -> str:
        """A fingerprint of :meth:`describe` and of tensors."""
        digest = hashlib.blake2b(repr(self.describe()).encode(), digest_size=8)
        for tensor in tensors:
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


class Labelled(Task):
    """Samples with one label each, scored by top-1 accuracy in percent; a batch ends in labels.

    Attributes:
        classes: the names of the classes, in label order.
        label_smoothing: of the cross-entropy.
        evaluation_batch_size: samples a batch when scoring.
    """

    metric = "top-1 accuracy (%)"
    classes: tuple[str, ...]
    label_smoothing: float = 0.0
    evaluation_batch_size: int = 256

    def criterion(self, outputs: Any, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(
            logits_of(outputs), batch[1], label_smoothing=self.label_smoothing
        )

    def logits(self, model: Callable[..., Any], split: str) -> tuple[Tensor, Tensor]:
        """All logits ``[n, classes]`` and labels ``[n]`` of a split, in stored order."""
        device = device_of(model)
        logits, labels = [], []
        with evaluating(model):
            for batch in self.batches(split, batch_size=self.evaluation_batch_size, shuffle=False):
                logits.append(logits_of(self.outputs(model, to_device(batch, device))).cpu())
                labels.append(batch[1])
        return torch.cat(logits), torch.cat(labels)

    def score(self, model: Callable[..., Any], split: str = "validation") -> float:
        logits, labels = self.logits(model, split)
        return 100.0 * (logits.argmax(1) == labels).float().mean().item()

    def class_scores(self, model: Callable[..., Any], split: str) -> dict[str, float | None]:
        """Accuracy in percent of each class (None for a class without samples)."""
        logits, labels = self.logits(model, split)
        right = (logits.argmax(1) == labels).float()
        return {
            name: 100.0 * right[labels == k].mean().item() if (labels == k).any() else None
            for k, name in enumerate(self.classes)
        }


class Source(Protocol):
    """Labelled images that can be fetched by index."""

    def __len__(self) -> int: ...

    def fetch(self, indices: np.ndarray) -> Tensor:
        """Raw images ``[n, channels, height, width]`` (uint8 or float) of these rows."""
        ...

    @property
    def labels(self) -> Tensor:
        """Class indices ``[n]``, int64."""
        ...


Augment = Callable[[Tensor, torch.Generator], Tensor]
"""Raw images of a batch and a generator in, augmented raw images out."""


class Classification(Labelled):
    """Images with one label each, scored by top-1 accuracy in percent.

    Args:
        splits: one source a split; ``"train"`` and ``"validation"`` are needed, ``"test"`` too
            for anything that reports.
        preprocess: how raw images become inputs.
        classes: the names of the classes, in label order.
        name: for reports.
        augment: applied to raw training batches.
        label_smoothing: of the cross-entropy.
        evaluation_batch_size: samples a batch when scoring.

    Raises:
        InputError: if there are fewer than two classes, a split is empty or a label is out of
            range.
    """

    def __init__(
        self,
        splits: Mapping[str, Source],
        preprocess: Preprocess,
        classes: Sequence[str],
        *,
        name: str,
        augment: Augment | None = None,
        label_smoothing: float = 0.0,
        evaluation_batch_size: int = 256,
    ) -> None:
        self.name = name
        self.splits = dict(splits)
        self.preprocess = preprocess
        self.classes = tuple(map(str, classes))
        self.augment = augment
        self.label_smoothing = label_smoothing
        self.evaluation_batch_size = evaluation_batch_size
        if len(self.classes) < 2:
            raise InputError(
                f"{name} has only one class ({', '.join(self.classes) or 'none'}); "
                "a classifier needs at least two"
            )
        for split in ("train", "validation"):
            if split not in self.splits:
                raise InputError(f"{name} has no {split} split")
        for split, source in self.splits.items():
            if len(source) == 0:
                raise InputError(f"the {split} split of {name} is empty")
            low, high = int(source.labels.min()), int(source.labels.max())
            if low < 0 or high >= len(self.classes):
                raise InputError(
                    f"the {split} split of {name} has label {low if low < 0 else high}, "
                    f"but there are {len(self.classes)} classes"
                )
        self.example_inputs = (
            preprocess(self.splits["train"].fetch(np.arange(min(2, len(self.splits["train"]))))),
        )

    def size(self, split: str) -> int:
        return len(self.splits[split]) if split in self.splits else 0

    def batches(
        self,
        split: str,
        *,
        batch_size: int = 128,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        shuffle: bool | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for step, shuffled, rows in self.rows_of(split, batch_size, seed, epoch, start, shuffle):
            source = self.splits[split]
            images = source.fetch(rows)
            if shuffled and self.augment is not None:
                generator = torch.Generator().manual_seed(seed_of("augment", seed, epoch, step))
                images = self.augment(images, generator)
            yield self.preprocess(images), source.labels[torch.from_numpy(rows)]

    def inputs(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return (batch[0],)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {
            "classes": list(self.classes),
            "preprocess": self.preprocess.to_json(),
        }

    def fingerprint(self) -> str:
        return self.digest_of(self.splits[split].labels for split in sorted(self.splits))


def logits_of(outputs: Any) -> Tensor:
    """The logits among a network's outputs (a tensor, a tuple, or transformers' output)."""
    if isinstance(outputs, Tensor):
        return outputs
    if hasattr(outputs, "logits"):
        return outputs.logits
    if isinstance(outputs, tuple | list) and outputs and isinstance(outputs[0], Tensor):
        return outputs[0]
    raise InputError(
        f"the network answers a {type(outputs).__name__}, in which no logits are found"
    )
