"""How often each class is missed and wrongly claimed, for any set of images.

Source: Bertucci et al., "DendroMap", IEEE VIS 2022, arXiv:2205.06935 (the class table).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gossamer.core.errors import InputError


@dataclass(frozen=True)
class ClassTable:
    """Counts and rates of each class among some images; a rate of 0 / 0 is 0.

    Attributes:
        actual: images of the class, ``[classes]``.
        predicted: images that the network takes for it, ``[classes]``.
        right: images for which both are true, ``[classes]``.
    """

    actual: np.ndarray
    predicted: np.ndarray
    right: np.ndarray

    @property
    def accuracy(self) -> np.ndarray:
        """Share of a class that is recognised, ``[classes]``."""
        return _ratio(self.right, self.actual)

    @property
    def false_negative_rate(self) -> np.ndarray:
        """Share of a class that is missed: wrong / actual, ``[classes]``."""
        return _ratio(self.actual - self.right, self.actual)

    @property
    def false_positive_rate(self) -> np.ndarray:
        """Share of what is taken for a class that is another: wrong / predicted, ``[classes]``.

        This is the paper's definition; elsewhere it is called the false discovery rate.
        """
        return _ratio(self.predicted - self.right, self.predicted)


def class_table(y_true: np.ndarray, y_pred: np.ndarray, classes: int) -> ClassTable:
    """Counts classes among images whose class is known (not -1).

    Args:
        y_true: classes ``[n]``.
        y_pred: predicted classes ``[n]``.
        classes: how many there are.

    Raises:
        InputError: if the lengths differ or a class is out of range.
    """
    y_true, y_pred = np.asarray(y_true, dtype=np.int64), np.asarray(y_pred, dtype=np.int64)
    if y_true.shape != y_pred.shape or y_true.ndim != 1:
        raise InputError(f"there are {len(y_true)} classes and {len(y_pred)} predictions")
    known = y_true >= 0
    y_true, y_pred = y_true[known], y_pred[known]
    if len(y_true) and (max(y_true.max(), y_pred.max()) >= classes or y_pred.min() < 0):
        raise InputError(f"a class is out of range: there are {classes}")
    return ClassTable(
        actual=np.bincount(y_true, minlength=classes),
        predicted=np.bincount(y_pred, minlength=classes),
        right=np.bincount(y_true[y_true == y_pred], minlength=classes),
    )


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.where(whole > 0, part / np.maximum(whole, 1), 0.0)
