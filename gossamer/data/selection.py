"""Which samples to keep, given a score for each, and the index file that says so.

One convention holds in the whole room: a high score means hard, rare or informative, so that
"hard" keeps high scores. An index file has a row for every sample that was scored (its name, label,
score, whether and in which order it is kept); it is never a copy of the data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from gossamer.core.errors import InputError, first_line
from gossamer.core.files import whole_file
from gossamer.core.task import Classification, Source

Order = Literal["hard", "easy", "middle", "random"]
ORDERS: tuple[Order, ...] = ("hard", "easy", "middle", "random")


@dataclass(frozen=True)
class Selection:
    """What was kept of a collection, and why.

    Attributes:
        names: of all samples, ``n``.
        scores: ``[n]``; NaN for a method that does not score.
        kept: rows that stay, the best first.
        labels: class names ``n``, or None.
        about: the method, its options, the seed and the fingerprint of the data, as JSON values.
    """

    names: Sequence[str]
    scores: np.ndarray
    kept: np.ndarray
    labels: Sequence[str] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fraction(self) -> float:
        """Share of the samples that stay."""
        return len(self.kept) / max(1, len(self.names))


def keep_count(total: int, fraction: float) -> int:
    """How many of ``total`` samples a fraction is, at least one.

    Raises:
        InputError: if the fraction is not above 0 and at most 1.
    """
    if not 0.0 < fraction <= 1.0:
        raise InputError(f"the fraction to keep lies above 0 and is at most 1, not {fraction:g}")
    return max(1, round(fraction * total))


def keep(
    scores: np.ndarray,
    fraction: float,
    *,
    order: Order = "hard",
    labels: np.ndarray | None = None,
    balance: float = 0.0,
    drop_hardest: float = 0.0,
    seed: int = 0,
) -> np.ndarray:
    """Rows to keep, the best first.

    What a smaller fraction keeps, a larger one keeps too (without rounding of class shares).

    Args:
        scores: ``[n]``, high is hard; infinity is allowed (never learned), NaN is not.
        fraction: of the samples that stay.
        order: "hard" keeps high scores, "easy" low ones, "middle" those nearest to the median in
            rank, "random" ignores the scores. Ties go to the lower row.
        labels: class indices ``[n]``; needed for ``balance``.
        balance: share of ``fraction * class size`` that each class keeps at least, by its own best
            (Sorscher et al. 2022, appendix, use one half); the rest is filled over all classes.
        drop_hardest: this share of the hardest samples is never kept: among them are those with
            wrong labels (as in coverage-centric selection, Zheng et al. 2023).
        seed: of "random".

    Raises:
        InputError: if a score is NaN or an option is out of range.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 1 or np.isnan(scores).any():
        raise InputError(f"{int(np.isnan(scores).sum())} of {len(scores)} scores are NaN")
    if not 0.0 <= balance <= 1.0 or not 0.0 <= drop_hardest < 1.0:
        raise InputError(
            f"balance lies in 0..1 and the share that is dropped in [0, 1), not {balance:g} and "
            f"{drop_hardest:g}"
        )
    if balance > 0.0 and (labels is None or len(labels) != len(scores)):
        raise InputError("keeping classes in balance needs a label for every sample")
    total = len(scores)
    wanted = keep_count(total, fraction)
    ranked = _ranked(scores, order, seed)
    if drop_hardest > 0.0:
        hardest = np.argsort(-scores, kind="stable")[: round(drop_hardest * total)]
        ranked = ranked[~np.isin(ranked, hardest)]
        if len(ranked) < wanted:
            raise InputError(
                f"{wanted} samples are to stay, but only {len(ranked)} are left once the hardest "
                f"{drop_hardest:g} are dropped"
            )
    if balance == 0.0 or labels is None:
        return ranked[:wanted]
    place = place_in_class(labels[ranked])
    sizes = np.bincount(labels, minlength=int(labels.max()) + 1)
    owed = np.floor(balance * fraction * sizes + 1e-9)[labels[ranked]]
    # First what each class is owed, then the best of the rest; a stable sort keeps the ranking.
    first = np.argsort(place >= owed, kind="stable")[:wanted]
    return ranked[np.sort(first)]


def place_in_class(labels: np.ndarray) -> np.ndarray:
    """For samples in some order: how many of the same class come before each, ``[n]``."""
    order = np.argsort(labels, kind="stable")
    sizes = np.bincount(labels[order]) if len(labels) else np.zeros(1, dtype=np.int64)
    place = np.empty(len(labels), dtype=np.int64)
    place[order] = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return place


def subset(task: Classification, rows: np.ndarray) -> Classification:
    """The task with these rows of its training split alone; the other splits stay.

    Args:
        task: whose training images were selected from.
        rows: of the training split.

    Raises:
        InputError: if nothing is left.
    """
    rows = np.asarray(rows, dtype=np.int64)
    if len(rows) == 0:
        raise InputError(f"no training image of {task.name} is kept")
    return Classification(
        {**task.splits, "train": _Rows(task.splits["train"], rows)},
        task.preprocess,
        task.classes,
        name=task.name,
        augment=task.augment,
        label_smoothing=task.label_smoothing,
        evaluation_batch_size=task.evaluation_batch_size,
    )


def write_selection(path: Path, selection: Selection) -> None:
    """Writes an index file (Parquet): ``row, name, label, score, kept, rank``.

    ``rank`` counts what is kept from 0 and is null for the rest; the file's metadata hold
    ``gossamer``: what :attr:`Selection.about` says, as JSON.
    """
    total = len(selection.names)
    rank = np.full(total, -1, dtype=np.int64)
    rank[selection.kept] = np.arange(len(selection.kept))
    labels = selection.labels
    table = pa.table(
        {
            "row": pa.array(np.arange(total)),
            "name": pa.array(list(selection.names), pa.string()),
            "label": pa.array(list(labels) if labels is not None else [None] * total, pa.string()),
            "score": pa.array(np.asarray(selection.scores, dtype=np.float64)),
            "kept": pa.array(rank >= 0),
            "rank": pa.array(rank, mask=rank < 0),
        }
    )
    about = json.dumps(dict(selection.about), allow_nan=False)
    with whole_file(path) as partial:
        pyarrow.parquet.write_table(table.replace_schema_metadata({"gossamer": about}), partial)


def read_selection(path: Path) -> Selection:
    """Reads what :func:`write_selection` wrote.

    Raises:
        InputError: if it is missing, truncated or no index file.
    """
    try:
        table = pyarrow.parquet.read_table(path)
        about = json.loads((table.schema.metadata or {})[b"gossamer"])
        rank = table["rank"].fill_null(-1).to_numpy()
        kept = np.flatnonzero(rank >= 0)
        labels = table["label"].to_pylist()
        return Selection(
            names=table["name"].to_pylist(),
            scores=table["score"].to_numpy().astype(np.float64),
            kept=kept[np.argsort(rank[kept], kind="stable")],
            labels=None if None in labels else labels,
            about=about,
        )
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"{path} is no index file of gossamer: {first_line(error)}") from error


class _Rows:
    """Some rows of a source."""

    def __init__(self, source: Source, rows: np.ndarray) -> None:
        self.source = source
        self.rows = rows
        self.labels = source.labels[rows]

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, indices: np.ndarray) -> Any:
        return self.source.fetch(self.rows[indices])


def _ranked(scores: np.ndarray, order: Order, seed: int) -> np.ndarray:
    match order:
        case "hard":
            return np.argsort(-scores, kind="stable")
        case "easy":
            return np.argsort(scores, kind="stable")
        case "middle":
            ascending = np.argsort(scores, kind="stable")
            off = np.abs(np.arange(len(scores)) - (len(scores) - 1) / 2.0)
            return ascending[np.argsort(off, kind="stable")]
        case "random":
            return np.random.default_rng(seed).permutation(len(scores))
    raise InputError(f"samples are kept {', '.join(ORDERS)}, not {order!r:.40}")
