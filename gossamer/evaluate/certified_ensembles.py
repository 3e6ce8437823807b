"""Ensembles whose answers no small poisoning of the training data can change, with proofs.

The training data are split by content, each part trains a model, and the models elect the answer.
Since one sample reaches few models, the margin of the election says how many samples would have to
be inserted or removed before the answer can change: an exact certificate for each answer.

Six methods: disjoint parts (``"dpa"``), overlapping ones (``"fa"``: k * d models, each sample
reaches d), and boosted disjoint ones (``"dpa*"``: d models with other seeds for each part, whose
logits are summed; as costly as ``"fa"``, but each sample still reaches one); each under a plain
vote or a run-off election, see :mod:`gossamer.evaluate.vote_certificates`.

Source: Rezaei, Banihashem, Chegini & Feizi, "Run-Off Election: Improved Provable Defense against
Data Poisoning Attacks", ICML 2023, arXiv:2302.02300, and its published code where the paper is
silent.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gossamer.core.errors import InputError
from gossamer.core.progress import progress
from gossamer.core.task import Source
from gossamer.evaluate.part_learners import PartLearner, PartModels
from gossamer.evaluate.training_partition import (
    ContentHash,
    Partition,
    disjoint_partition,
    finite_partition,
    pixel_sum,
)
from gossamer.evaluate.vote_certificates import RULES, Certified, Rule, certify, check_labels

log = logging.getLogger(__name__)

Method = Literal["dpa", "fa", "dpa*"]
METHODS: tuple[Method, ...] = ("dpa", "fa", "dpa*")

LOGITS_AT_ONCE = 1 << 24
"""Numbers; certifying many images holds no more logits than this in memory."""
IMAGES_AT_ONCE = 256


class PoisonCertifiedEnsemble:
    """Base models on parts of the training data, and an election with a certificate.

    The certificate is about everything from the raw training images on: the learner must be
    deterministic and measure nothing on images outside of a part. It counts inserted and removed
    samples; a changed one is both.

    Args:
        learner: fits a model to each part.
        k: the data are split so that a base model learns from about one of ``k`` parts.
        d: models that a sample reaches ("fa") or that are summed ("dpa*"); 1 for "dpa".
        method: "dpa", "fa" or "dpa*".
        content_hash: says which bucket a sample goes to.
        seed: of the shifts of "fa".

    Raises:
        InputError: if the method is unknown, or ``k`` or ``d`` is less than 1.
    """

    partition: Partition

    def __init__(
        self,
        learner: PartLearner,
        *,
        k: int = 50,
        d: int = 1,
        method: Method = "dpa",
        content_hash: ContentHash = pixel_sum,
        seed: int = 0,
    ) -> None:
        if method not in METHODS:
            raise InputError(f"a method is {', '.join(METHODS)}, not {method!r:.40}")
        if k < 1 or d < 1:
            raise InputError(f"k and d are 1 or more, not {k} and {d}")
        if method == "dpa" and d != 1:
            raise InputError(f'"dpa" trains one model a part, not {d}; "fa" and "dpa*" take d')
        self.learner = learner
        self.k = k
        self.d = d
        self.method = method
        self.content_hash = content_hash
        self.seed = seed
        self.classes = 0
        self.warning: str | None = None
        self._models: list[PartModels] = []

    @property
    def members(self) -> int:
        """Models that vote."""
        return self.k * self.d if self.method == "fa" else self.k

    def fit(self, source: Source, classes: int) -> PoisonCertifiedEnsemble:
        """Splits the data and trains all base models.

        Args:
            source: labelled raw images, all that there are, without augmentation.
            classes: how many.

        Raises:
            InputError: if there are no images, or a label is out of range.
        """
        if not len(source):
            raise InputError("there are no images to learn from")
        labels = check_labels(source.labels.numpy(), classes, "the training labels")
        self.partition = (
            finite_partition(source, self.k, self.d, self.content_hash, self.seed)
            if self.method == "fa"
            else disjoint_partition(source, self.k, self.content_hash)
        )
        self.classes = classes
        self.warning = self.partition.warning(labels, classes)
        if self.warning is not None:
            log.warning("%s", self.warning)
        versions = self.d if self.method == "dpa*" else 1
        self._models = [
            self.learner.fit(source, classes, self.partition.parts, version=version)
            for version in range(versions)
        ]
        return self

    def logits(self, images: Tensor) -> Tensor:
        """Logits ``[n, models, classes]`` of raw images ``[n, channels, height, width]``.

        Those of "dpa*" are sums over the versions of each part's model. It is logits that must be
        summed: if the models answer probabilities, which is another method, that is said once.

        Raises:
            InputError: if nothing was fitted.
        """
        if not self._models:
            raise InputError("the ensemble has not been fitted")
        total: Tensor | None = None
        for models in self._models:
            answer = models.logits(images)
            if len(self._models) > 1 and total is None and are_probabilities(answer):
                log.warning(
                    "the base networks answer probabilities, not logits; sums of those are not "
                    "what dpa* stands for, so take the last softmax off"
                )
            total = answer if total is None else total + answer
        assert total is not None
        return total

    def certify(self, source: Source, rules: Sequence[Rule] = RULES) -> dict[Rule, Certified]:
        """Answers and certified radii for many images; memory does not grow with their number.

        Args:
            source: raw images; their labels are not looked at.
            rules: of the election; all are held on the same logits.

        Returns:
            Answers and radii of each rule.
        """
        found: dict[Rule, list[Certified]] = {rule: [] for rule in rules}
        with progress() as bar:
            shown = bar.add_task("certifying", total=len(source))
            for images in self._blocks(source):
                logits = self.logits(images).numpy()
                for rule in rules:
                    found[rule].append(certify(logits, rule, self.partition.spread))
                bar.advance(shown, len(images))
        empty = np.empty(0, np.int64)
        return {
            rule: Certified(
                np.concatenate([empty, *(part.labels for part in parts)]),
                np.concatenate([empty, *(part.radii for part in parts)]),
            )
            for rule, parts in found.items()
        }

    def _blocks(self, source: Source) -> Iterator[Tensor]:
        most = LOGITS_AT_ONCE // (self.members * max(1, self.classes))
        step = max(1, min(IMAGES_AT_ONCE, most))
        for low in range(0, len(source), step):
            yield source.fetch(np.arange(low, min(low + step, len(source))))


def are_probabilities(answers: Tensor) -> bool:
    """Whether every model's answers are at least 0 and sum to 1."""
    sums = answers.sum(-1)
    return bool((answers >= 0).all()) and bool(torch.isclose(sums, torch.ones(()), atol=1e-4).all())
