"""Tasks on text: one label a text, or the next token of a stream."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.core.task import (
    Batch,
    Labelled,
    Task,
    device_of,
    evaluating,
    logits_of,
    order_of,
    to_device,
)


class TextClassification(Labelled):
    """Texts with one label each; the network takes token ids and the mask of those that are text.

    The two inputs are those of transformers' classifiers: ``(input_ids, attention_mask)``, both
    ``[batch, length]``.

    Args:
        splits: token ids ``[n, length]``, int64, padded at the end, and labels ``[n]`` of each
            split.
        classes: the names of the classes, in label order.
        name: for reports.
        tokens: size of the vocabulary.
        padding: the token that pads.
        score: "accuracy", or "matthews" for the correlation that CoLA is scored by, in percent.
        label_smoothing: of the cross-entropy.

    Raises:
        InputError: if a split is missing or empty, or a token or label is out of range.
    """

    def __init__(
        self,
        splits: Mapping[str, tuple[Tensor, Tensor]],
        classes: Sequence[str],
        *,
        name: str,
        tokens: int,
        padding: int = 0,
        score: Literal["accuracy", "matthews"] = "accuracy",
        label_smoothing: float = 0.0,
    ) -> None:
        self.name = name
        self.classes = tuple(map(str, classes))
        self.splits = dict(splits)
        self.tokens = tokens
        self.padding = padding
        self.label_smoothing = label_smoothing
        self.correlation = score == "matthews"
        if self.correlation:
            self.metric = "Matthews correlation (%)"
        for split in ("train", "validation"):
            if split not in self.splits:
                raise InputError(f"{name} has no {split} split")
        for split, (ids, labels) in self.splits.items():
            _check_tokens(ids, tokens, f"the {split} split of {name}")
            if len(ids) != len(labels):
                raise InputError(
                    f"the {split} split of {name} has {len(ids)} texts and {len(labels)} labels"
                )
            if int(labels.min()) < 0 or int(labels.max()) >= len(self.classes):
                raise InputError(f"the {split} split of {name} has a label without a class")
        first = self.splits["train"][0][:2]
        self.example_inputs = (first, self._mask(first))

    def _mask(self, ids: Tensor) -> Tensor:
        return (ids != self.padding).long()

    def size(self, split: str) -> int:
        return len(self.splits[split][0]) if split in self.splits else 0

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
        for _, _, rows in self.rows_of(split, batch_size, seed, epoch, start, shuffle):
            ids, labels = self.splits[split]
            yield ids[torch.from_numpy(rows)], labels[torch.from_numpy(rows)]

    def inputs(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return batch[0], self._mask(batch[0])

    def score(self, model: Callable[..., Any], split: str = "validation") -> float:
        if not self.correlation:
            return super().score(model, split)
        from sklearn.metrics import matthews_corrcoef

        logits, labels = self.logits(model, split)
        return 100.0 * float(matthews_corrcoef(labels.numpy(), logits.argmax(1).numpy()))

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"classes": list(self.classes), "tokens": self.tokens}

    def fingerprint(self) -> str:
        return self.digest_of(t for split in sorted(self.splits) for t in self.splits[split])


class LanguageModelling(Task):
    """Predict each token of a stream from those before it.

    A sample is a block of ``length`` tokens, of which all but the first are predicted, so every
    token of a split but the first of each block counts once. Training blocks start at another
    phase in each epoch. A batch is token ids ``[batch, length]``; the network answers logits
    ``[batch, length, tokens]`` (as transformers' causal models do).

    Args:
        splits: the token ids of each split, int64 ``[n]``.
        name: for reports.
        tokens: size of the vocabulary.
        length: tokens in a block.
        evaluation_batch_size: blocks a batch when scoring.

    Raises:
        InputError: if a split is missing or shorter than two blocks, or a token is out of range.
    """

    metric = "log-likelihood (nats a token)"

    def __init__(
        self,
        splits: Mapping[str, Tensor],
        *,
        name: str,
        tokens: int,
        length: int = 128,
        evaluation_batch_size: int = 32,
    ) -> None:
        self.name = name
        self.splits = dict(splits)
        self.tokens = tokens
        self.length = length
        self.evaluation_batch_size = evaluation_batch_size
        if length < 2:
            raise InputError(f"a block of a language model has 2 tokens or more, not {length}")
        for split in ("train", "validation"):
            if split not in self.splits:
                raise InputError(f"{name} has no {split} split")
        for split, ids in self.splits.items():
            _check_tokens(ids, tokens, f"the {split} split of {name}")
            if len(ids) < 2 * length:
                raise InputError(
                    f"the {split} split of {name} has {len(ids)} tokens, too few for two blocks "
                    f"of {length}"
                )
        self.example_inputs = (self.splits["train"][: 2 * length].view(2, length),)

    def size(self, split: str) -> int:
        # One block is given up for the phase.
        return (
            len(self.splits[split]) // self.length - (split == "train")
            if (split in self.splits)
            else 0
        )

    def batches(
        self,
        split: str,
        *,
        batch_size: int = 128,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        shuffle: bool | None = None,
    ) -> Iterator[Tensor]:
        # The phase needs the block that the training split gives up.
        moves = split == "train" and shuffle is not False
        phase = int(order_of(self.length, True, seed, epoch)[0]) if moves else 0
        for _, _, rows in self.rows_of(split, batch_size, seed, epoch, start, shuffle):
            stream = self.splits[split][phase:]
            blocks = stream[: self.size(split) * self.length].view(-1, self.length)
            yield blocks[torch.from_numpy(rows)]

    def inputs(self, batch: Tensor) -> tuple[Tensor, ...]:
        return (batch,)

    def criterion(self, outputs: Any, batch: Tensor) -> Tensor:
        logits = logits_of(outputs)
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    def decisions(self, outputs: Any) -> Tensor:
        return logits_of(outputs).argmax(-1)

    def score(self, model: Callable[..., Any], split: str = "validation") -> float:
        """Mean log-likelihood of the predicted tokens, nats (0 would be certainty)."""
        device = device_of(model)
        total, count = 0.0, 0
        with evaluating(model):
            for batch in self.batches(split, batch_size=self.evaluation_batch_size, shuffle=False):
                here: Batch = to_device(batch, device)
                number = batch[:, 1:].numel()
                total += float(self.criterion(self.outputs(model, here), here)) * number
                count += number
        return -total / count

    def perplexity(self, model: Callable[..., Any], split: str = "validation") -> float:
        """The exponential of the mean negative log-likelihood."""
        return math.exp(-self.score(model, split))

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"tokens": self.tokens, "length": self.length}

    def fingerprint(self) -> str:
        return self.digest_of(self.splits[split] for split in sorted(self.splits))


def _check_tokens(ids: Tensor, tokens: int, where: str) -> None:
    if ids.numel() == 0:
        raise InputError(f"{where} is empty")
    if int(ids.min()) < 0 or int(ids.max()) >= tokens:
        raise InputError(f"{where} has a token outside of 0 to {tokens - 1}")
