"""Exact certificates for votes of many models, of which one poisoned sample changes few.

The training data lie in buckets, and each bucket feeds some models: one (deep partition
aggregation, DPA) or several (finite aggregation, FA). An inserted or removed sample changes the
models that its bucket feeds, and no other. From the gaps between the votes follows how many buckets
must change before the answer can: below that the answer is certain, whatever was inserted or
removed.

Two rules turn the logits of the models into an answer. A *vote* takes the most frequent first
choice. A *run-off election* (ROE) takes the two most frequent first choices, and then the one of
them that more models prefer. Everywhere, of two equals the class with the smaller index is first.

Source: Rezaei, Banihashem, Chegini & Feizi, "Run-Off Election: Improved Provable Defense against
Data Poisoning Attacks", ICML 2023, arXiv:2302.02300; Levine & Feizi, "Deep Partition Aggregation",
ICLR 2021; Wang, Levine & Feizi, "Improved Certified Defenses against Data Poisoning with
(Deterministic) Finite Aggregation", ICML 2022. The table of the paper's dynamic program is replaced
by its closed form, :func:`units_against_two`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numba
import numpy as np

from gossamer.core.errors import InputError

Rule = Literal["vote", "roe"]
RULES: tuple[Rule, ...] = ("vote", "roe")

NEVER = np.iinfo(np.int32).max
"""Where no number of changed buckets is enough."""


class Certified(NamedTuple):
    """Answers with their certificates.

    Attributes:
        labels: the answers, ``[samples]``.
        radii: for each, how many training samples may be inserted or removed, in any mixture,
            without changing it, ``[samples]``. A changed sample is one removed and one inserted.
    """

    labels: np.ndarray
    radii: np.ndarray


def certify(logits: np.ndarray, rule: Rule = "roe", spread: np.ndarray | None = None) -> Certified:
    """Answers and certified radii from the logits of all models.

    Only the order of a model's own logits counts, so anything that keeps it (probabilities, scaled
    scores) gives the same.

    Args:
        logits: ``[samples, models, classes]``. May be mapped from a file: memory beyond the answer
            does not grow with the samples.
        rule: "vote" or "roe".
        spread: the models that each bucket feeds, ``[buckets, models of a bucket]``, see
            :func:`gossamer.evaluate.training_partition.finite_spread`. Default: every model has a
            bucket of its own (DPA).

    Raises:
        InputError: if the logits are not numbers of that shape, or ``spread`` names other models.
    """
    if rule not in RULES:
        raise InputError(f"a rule is {' or '.join(RULES)}, not {rule!r:.40}")
    if getattr(logits, "ndim", 0) != 3 or logits.dtype.kind not in "fiu":
        shape = list(getattr(logits, "shape", ()))
        raise InputError(
            f"logits are numbers [samples, models, classes]; these are {shape} of "
            f"{getattr(logits, 'dtype', type(logits).__name__)}"
        )
    samples, models, classes = logits.shape
    if models < 1 or classes < 2:
        raise InputError(
            f"{models} models with {classes} classes elect nothing; 1 and 2 are needed"
        )
    if spread is not None:
        spread = _checked_spread(spread, models)
    labels = np.empty(samples, dtype=np.int64)
    radii = np.empty(samples, dtype=np.int64)
    runoff = rule == "roe"
    step = max(1, (1 << 24) // (models * classes))
    for low in range(0, samples, step):
        part = logits[low : low + step]
        if part.dtype.type not in (np.float32, np.float64):
            # Halves fit into singles, integers of up to 32 bits into doubles.
            part = part.astype(np.float32 if part.dtype == np.float16 else np.float64)
        part = np.ascontiguousarray(part)
        where = slice(low, low + step)
        if spread is None:
            right = _certify_disjoint(part, runoff, labels[where], radii[where])
        else:
            right = _certify_spread(part, runoff, spread, labels[where], radii[where])
        if right >= 0:
            raise InputError(f"the logits of sample {low + right} hold NaN, which has no order")
    return Certified(labels, radii)


def certified_accuracy(
    certified: Certified, truth: np.ndarray, sizes: Sequence[int] | np.ndarray
) -> np.ndarray:
    """How much is right for certain under poisoning of each size, in percent.

    Args:
        certified: answers and radii.
        truth: true classes ``[samples]``.
        sizes: inserted and removed training samples together; 0 gives the clean accuracy.

    Returns:
        For each size the share of samples that are answered right with at least that radius.

    Raises:
        InputError: if there are no samples, or not as many true classes, or a size is negative.
    """
    truth = np.asarray(truth)
    if truth.shape != certified.labels.shape or not len(truth):
        raise InputError(
            f"{len(certified.labels)} answers are not compared with labels {list(truth.shape)}"
        )
    wanted = np.atleast_1d(np.asarray(sizes))
    if len(wanted) and wanted.min() < 0:
        raise InputError(f"a poisoning has 0 samples or more, not {wanted.min()}")
    safe = np.sort(certified.radii[certified.labels == truth])
    return 100.0 * (len(safe) - np.searchsorted(safe, wanted, side="left")) / len(truth)


def check_labels(labels: np.ndarray, classes: int, what: str = "the labels") -> np.ndarray:
    """The labels, if they are whole numbers of classes.

    Raises:
        InputError: naming the first that is none.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise InputError(f"{what} are whole numbers [samples], not {labels.dtype} {labels.shape}")
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise InputError(
            f"{what} have class {labels[wrong[0]]} at {wrong[0]}, but there are {classes} classes "
            "(counted from 0)"
        )
    return labels.astype(np.int64)


def units_against_two(first: int, second: int) -> int:
    """Poisoned samples that lower two gaps to 0 or below, where one lowers them by 2 and 1.

    The closed form of the dynamic program of arXiv:2302.02300 (Certv2 for DPA).

    Args:
        first: the gap to one class.
        second: the gap to another.
    """
    return int(_against_two(max(first, 0), max(second, 0)))


def units_against_one(votes: np.ndarray, a: int, b: int, spread: np.ndarray) -> int:
    """Changed buckets before ``b`` can beat ``a`` in first choices (Certv1 for FA).

    Args:
        votes: first choice of each model ``[models]``.
        a: the class that is ahead.
        b: the class that is to beat it.
        spread: the models that each bucket feeds, ``[buckets, models of a bucket]``.
    """
    votes = np.asarray(votes)
    gap = int((votes == a).sum()) - int((votes == b).sum()) + int(b > a)
    values = 1 + (votes == a).astype(np.int64) - (votes == b)
    powers = values[_checked_spread(spread, len(votes))].sum(1)
    return int(_greedy(np.bincount(powers), gap))


def _checked_spread(spread: np.ndarray, models: int) -> np.ndarray:
    spread = np.asarray(spread)
    if spread.ndim != 2 or spread.dtype.kind not in "iu" or 0 in spread.shape:
        raise InputError(
            "a spread is whole numbers [buckets, models of a bucket], not "
            f"{spread.dtype} {list(spread.shape)}"
        )
    if spread.min() < 0 or spread.max() >= models:
        raise InputError(
            f"the spread names model {spread.max() if spread.min() >= 0 else spread.min()}, but "
            f"there are {models}"
        )
    ordered = np.sort(spread, axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise InputError("the spread names a model twice for one bucket")
    return np.ascontiguousarray(spread, dtype=np.int32)


@numba.njit(cache=True, nogil=True)
def _half_up(gap: int) -> int:
    return (gap + 1) // 2 if gap > 0 else 0


@numba.njit(cache=True, nogil=True)
def _against_two(i: int, j: int) -> int:
    return max((i + 1) // 2, (j + 1) // 2, (i + j + 2) // 3)


@numba.njit(cache=True, nogil=True)
def _greedy(counts: np.ndarray, gap: int) -> int:
    """Fewest buckets whose powers sum to the gap; ``counts[p]`` buckets have power ``p``."""
    used = 0
    for power in range(len(counts) - 1, 0, -1):
        if gap <= 0:
            return used
        needed = (gap + power - 1) // power
        if needed <= counts[power]:
            return used + needed
        used += counts[power]
        gap -= counts[power] * power
    return used if gap <= 0 else NEVER


@numba.njit(cache=True, nogil=True)
def _turned(logits: np.ndarray, columns: np.ndarray) -> None:
    """Writes ``[classes, models]``, so that loops over models become vector instructions."""
    models, classes = logits.shape
    for i in range(models):
        for c in range(classes):
            columns[c, i] = logits[i, c]


@numba.njit(cache=True, nogil=True)
def _first_choices(
    columns: np.ndarray, highest: np.ndarray, votes: np.ndarray, counts: np.ndarray
) -> bool:
    """Writes each model's first choice, and how often each class is one; False with NaN."""
    classes, models = columns.shape
    broken = 0
    for i in range(models):
        highest[i] = columns[0, i]
        votes[i] = 0
        broken += highest[i] != highest[i]
    for c in range(1, classes):
        column = columns[c]
        for i in range(models):
            value = column[i]
            broken += value != value
            ahead = value > highest[i]
            votes[i] = np.int32(c) if ahead else votes[i]
            highest[i] = value if ahead else highest[i]
    counts[:] = 0
    for i in range(models):
        counts[votes[i]] += 1
    return broken == 0


@numba.njit(cache=True, nogil=True)
def _leaders(counts: np.ndarray) -> tuple[int, int]:
    """The two classes with most votes, of equals the smaller indices."""
    first, second = 0, -1
    for c in range(1, len(counts)):
        if counts[c] > counts[first]:
            first, second = c, first
        elif second < 0 or counts[c] > counts[second]:
            second = c
    return first, second


@numba.njit(cache=True, nogil=True)
def _preferring(columns: np.ndarray, a: int, b: int) -> int:
    """How many models prefer ``a`` to ``b``; with equal logits, the smaller index."""
    of_a, of_b = columns[a], columns[b]
    count = 0
    if a < b:
        for i in range(len(of_a)):
            count += of_a[i] >= of_b[i]
    else:
        for i in range(len(of_a)):
            count += of_a[i] > of_b[i]
    return count


@numba.njit(cache=True, nogil=True)
def _elected(columns: np.ndarray, counts: np.ndarray) -> tuple[int, int]:
    """Winner and loser of the run-off election."""
    one, two = _leaders(counts)
    for_one = _preferring(columns, one, two)
    against = columns.shape[1] - for_one
    if for_one > against or (for_one == against and one < two):
        return one, two
    return two, one


@numba.njit(cache=True, nogil=True)
def _gap(counts: np.ndarray, a: int, b: int) -> int:
    """``a`` beats ``b`` if and only if this is positive."""
    return counts[a] - counts[b] + (1 if b > a else 0)


@numba.njit(cache=True, nogil=True)
def _certify_disjoint(
    logits: np.ndarray, runoff: bool, labels: np.ndarray, radii: np.ndarray
) -> int:
    """DPA; returns the first sample with NaN, or -1."""
    samples, models, classes = logits.shape
    columns = np.empty((classes, models), logits.dtype)
    highest = np.empty(models, logits.dtype)
    votes = np.empty(models, np.int32)
    counts = np.empty(classes, np.int64)
    for s in range(samples):
        _turned(logits[s], columns)
        if not _first_choices(columns, highest, votes, counts):
            return s
        if not runoff:
            label, _ = _leaders(counts)
            units = NEVER
            for c in range(classes):
                if c != label:
                    units = min(units, _half_up(_gap(counts, label, c)))
        else:
            label, loser = _elected(columns, counts)
            units = NEVER
            # Pushed out of the first two: by the two classes that are nearest.
            least = second = NEVER
            for c in range(classes):
                if c != label:
                    gap = max(_gap(counts, label, c), 0)
                    if gap < least:
                        least, second = gap, least
                    elif gap < second:
                        second = gap
            if second < NEVER:
                units = _against_two(least, second)
            # Beaten there, by a class that is there or gets there.
            for c in range(classes):
                if c != label:
                    enter = 0 if c == loser else _half_up(_gap(counts, loser, c))
                    wants = _preferring(columns, label, c)
                    win = _half_up(2 * wants - models + (1 if c > label else 0))
                    units = min(units, max(enter, win))
        labels[s] = label
        radii[s] = units - 1
    return -1


@numba.njit(cache=True, nogil=True)
def _units_one(powers: np.ndarray, a: int, b: int, gap: int, width: int, hist: np.ndarray) -> int:
    """Buckets before ``b`` beats ``a``; ``powers[c, j]`` models of bucket ``j`` vote for ``c``."""
    if gap <= 0:
        return 0
    hist[:] = 0
    of_a, of_b = powers[a], powers[b]
    for j in range(len(of_a)):
        hist[width + of_a[j] - of_b[j]] += 1
    return _greedy(hist, gap)


@numba.njit(cache=True, nogil=True)
def _units_two(
    powers: np.ndarray, a: int, b: int, c: int, gap: int, width: int, hist: np.ndarray
) -> int:
    """Buckets before the sum of the gaps to ``b`` and ``c`` is gone."""
    if gap <= 0:
        return 0
    hist[:] = 0
    of_a, of_b, of_c = powers[a], powers[b], powers[c]
    for j in range(len(of_a)):
        hist[width + 2 * of_a[j] - of_b[j] - of_c[j]] += 1
    return _greedy(hist, gap)


@numba.njit(cache=True, nogil=True)
def _units_round_two(
    columns: np.ndarray,
    label: int,
    rival: int,
    gap: int,
    spread: np.ndarray,
    prefer: np.ndarray,
    hist: np.ndarray,
) -> int:
    """Buckets before ``rival`` beats the label in the second round."""
    if gap <= 0:
        return 0
    hist[:] = 0
    of_label, of_rival = columns[label], columns[rival]
    for i in range(len(of_label)):
        ahead = of_label[i] > of_rival[i]
        prefer[i] = ahead or (of_label[i] == of_rival[i] and label < rival)
    buckets, width = spread.shape
    for j in range(buckets):
        power = 0
        for m in range(width):
            power += prefer[spread[j, m]]
        hist[2 * power] += 1
    return _greedy(hist, gap)


@numba.njit(cache=True, nogil=True)
def _at_least(gap: int, power: int) -> int:
    """Buckets that are needed however strong each is."""
    return (gap + power - 1) // power if gap > 0 else 0


@numba.njit(cache=True, nogil=True)
def _certify_spread(
    logits: np.ndarray, runoff: bool, spread: np.ndarray, labels: np.ndarray, radii: np.ndarray
) -> int:
    """FA; returns the first sample with NaN, or -1.

    A minimum over classes and pairs is sought; what a lower bound shows to be no smaller than the
    smallest so far is not counted out.
    """
    samples, models, classes = logits.shape
    buckets, width = spread.shape
    columns = np.empty((classes, models), logits.dtype)
    highest = np.empty(models, logits.dtype)
    votes = np.empty(models, np.int32)
    counts = np.empty(classes, np.int64)
    prefer = np.empty(models, np.uint8)
    powers = np.empty((classes, buckets), np.int16)
    hist = np.empty(3 * width + 1, np.int64)
    alone = np.empty(classes, np.int64)
    for s in range(samples):
        _turned(logits[s], columns)
        if not _first_choices(columns, highest, votes, counts):
            return s
        powers[:] = 0
        for j in range(buckets):
            for m in range(width):
                powers[votes[spread[j, m]], j] += 1
        units = NEVER
        if not runoff:
            label, _ = _leaders(counts)
            for c in range(classes):
                gap = _gap(counts, label, c)
                if c != label and _at_least(gap, 2 * width) < units:
                    units = min(units, _units_one(powers, label, c, gap, width, hist))
            labels[s] = label
            radii[s] = units - 1
            continue
        label, loser = _elected(columns, counts)
        # Beaten in the second round; the loser of it, who is there already, comes first.
        for turn in range(-1, classes):
            c = loser if turn < 0 else turn
            if c == label or (turn >= 0 and c == loser):
                continue
            enter_gap = 0 if c == loser else _gap(counts, loser, c)
            wants = _preferring(columns, label, c)
            win_gap = 2 * wants - models + (1 if c > label else 0)
            if max(_at_least(enter_gap, 2 * width), _at_least(win_gap, 2 * width)) >= units:
                continue
            enter = _units_one(powers, loser, c, enter_gap, width, hist)
            if enter < units:
                win = _units_round_two(columns, label, c, win_gap, spread, prefer, hist)
                units = min(units, max(enter, win))
        # Pushed out of the first two.
        for c in range(classes):
            alone[c] = NEVER
            gap = _gap(counts, label, c)
            if c != label and _at_least(gap, 2 * width) < units:
                alone[c] = _units_one(powers, label, c, gap, width, hist)
        for b in range(classes):
            for c in range(b + 1, classes):
                bound = max(alone[b], alone[c])
                if bound >= units:
                    continue
                # A class that is ahead already has votes to give to the other: no clipping at 0.
                gap = _gap(counts, label, b) + _gap(counts, label, c)
                if _at_least(gap, 3 * width) < units:
                    both = _units_two(powers, label, b, c, gap, width, hist)
                    units = min(units, max(bound, both))
        labels[s] = label
        radii[s] = units - 1
    return -1
