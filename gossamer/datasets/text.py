"""Text files as tasks: labelled texts in Parquet or CSV, and plain text for language models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gossamer.core.errors import InputError, first_line
from gossamer.core.language import LanguageModelling, TextClassification
from gossamer.datasets.splits import carve
from gossamer.datasets.tokenizers import Characters, Tokenizer, Words

VALIDATION = ("validation", "valid", "val", "dev")


def text_classification(
    path: str | Path,
    *,
    text: str = "text",
    label: str = "label",
    classes: Sequence[str] | None = None,
    tokenizer: Tokenizer | None = None,
    length: int = 64,
    score: Literal["accuracy", "matthews"] = "accuracy",
    seed: int = 0,
    limit: int | None = None,
) -> TextClassification:
    """Opens labelled texts.

    The file has a column of texts, one of labels and, if it likes, one called ``split``. Splits
    that are missing are carved out of the training texts, classes in proportion; where the file has
    development splits but no test split (CoLA), all of those are the test split.

    Args:
        path: a Parquet or CSV file.
        text: name of the column of texts.
        label: name of the column of labels (integers or names).
        classes: names of the classes. Default: the labels.
        tokenizer: text to ids. Default: words of the training texts.
        length: tokens a text; longer ones are cut, shorter ones padded.
        score: "accuracy" or "matthews".
        seed: of the splits that are carved.
        limit: at most so many training texts.

    Raises:
        InputError: if the file cannot be read or lacks a column.
    """
    path = Path(path)
    table = _table(path)
    for column in (text, label):
        if column not in table:
            raise InputError(f"{path.name} has no column {column!r}; it has {', '.join(table)}")
    texts = ["" if t is None else str(t) for t in table[text]]
    names = sorted(set(table[label]), key=lambda v: (str(type(v)), v))
    if len(names) < 2:
        raise InputError(f"the texts of {path.name} all have the same label")
    labels = torch.tensor([names.index(value) for value in table[label]])
    splits = np.array([str(s) for s in table.get("split", ["train"] * len(texts))])
    rows = _rows(splits, labels, seed)
    if limit is not None and limit < len(rows["train"]):
        _, chosen = carve(labels[rows["train"]], limit, seed=seed, purpose="limit")
        rows["train"] = rows["train"][chosen]
    if tokenizer is None:
        tokenizer = Words(texts[row] for row in rows["train"])
    ids = torch.zeros(len(texts), length, dtype=torch.long)
    for row, content in enumerate(texts):
        found = tokenizer.encode(content)[:length]
        # A text without a token would be all padding, over which nothing can be averaged.
        found = found or [1]
        ids[row, : len(found)] = torch.tensor(found)
    return TextClassification(
        {split: (ids[chosen], labels[chosen]) for split, chosen in rows.items()},
        [str(c) for c in (classes if classes is not None else names)],
        name=path.stem,
        tokens=len(tokenizer),
        score=score,
    )


def _rows(splits: np.ndarray, labels: Tensor, seed: int) -> dict[str, np.ndarray]:
    """Rows of each split; what is missing is carved out of the training rows."""
    found = {name: np.flatnonzero(splits == name) for name in dict.fromkeys(splits)}
    train = found.get("train", found.get("all", np.flatnonzero(splits == splits[0])))
    development = [name for name in found if name.startswith(VALIDATION)]
    test, validation = found.get("test"), None
    if test is not None and development:
        validation = np.concatenate([found[name] for name in development])
    elif development:
        test = np.concatenate([found[name] for name in development])
    if test is None:
        stay, carved = carve(labels[train], round(0.2 * len(train)), seed=seed, purpose="test")
        train, test = train[stay], train[carved]
    if validation is None:
        stay, carved = carve(
            labels[train], round(0.1 * len(train)), seed=seed, purpose="validation"
        )
        train, validation = train[stay], train[carved]
    return {"train": train, "validation": validation, "test": test}


def _table(path: Path) -> dict[str, list]:
    import pyarrow.csv
    import pyarrow.parquet

    try:
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(path).to_pydict()
        if path.suffix in (".csv", ".tsv"):
            options = pyarrow.csv.ParseOptions(
                delimiter="," if path.suffix == ".csv" else "\t", newlines_in_values=True
            )
            return pyarrow.csv.read_csv(path, parse_options=options).to_pydict()
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}") from error
    raise InputError(f"{path} is neither Parquet (.parquet) nor CSV (.csv, .tsv)")


def language_modelling(
    path: str | Path | Mapping[str, str | Path],
    *,
    tokenizer: Tokenizer | None = None,
    length: int = 128,
    limit: int | None = None,
) -> LanguageModelling:
    """Opens plain text (UTF-8) for a language model.

    Args:
        path: one file, of which the first 90 % train, the next 5 % validate and the last 5 % test;
            or files by split ("train", "validation", "test"). Where only the validation file is
            missing, it is the last 5 % of the training file.
        tokenizer: text to ids. Default: characters of the training text.
        length: tokens in a block.
        limit: at most so many training tokens.

    Raises:
        InputError: if a file cannot be read, or is too short.
    """
    if isinstance(path, Mapping):
        texts = {split: _read(Path(file)) for split, file in path.items()}
        name = Path(next(iter(path.values()))).stem
        if "train" not in texts:
            raise InputError("a language model needs a training text")
        if "validation" not in texts:
            cut = round(0.95 * len(texts["train"]))
            texts["validation"] = texts["train"][cut:]
            texts["train"] = texts["train"][:cut]
    else:
        whole, name = _read(Path(path)), Path(path).stem
        first, second = round(0.9 * len(whole)), round(0.95 * len(whole))
        texts = {
            "train": whole[:first], "validation": whole[first:second], "test": whole[second:]
        }  # fmt: skip
    if tokenizer is None:
        tokenizer = Characters(texts["train"])
    splits = {split: torch.tensor(tokenizer.encode(content)) for split, content in texts.items()}
    if limit is not None:
        splits["train"] = splits["train"][:limit]
    return LanguageModelling(splits, name=name, tokens=len(tokenizer), length=length)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not readable as UTF-8 text: {first_line(error)}") from error
