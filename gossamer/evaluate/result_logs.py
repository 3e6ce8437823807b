"""Per-sample results as other programs write them.

``lm-evaluation-harness`` writes a JSON Lines file a task (``samples_TASK_DATE.jsonl``) into a
folder of the model: each line has ``doc_id``, ``doc`` and the metrics that ``metrics`` names. HELM
writes, for a run, ``run_spec.json`` (with the model), ``instances.json`` (ids and texts) and
``per_instance_stats.json`` (for each instance, statistics with ``name.name``, ``sum`` and
``count``). Classifiers leave arrays of logits beside labels (``.npz``), and everything else is a
table whose columns have other names. All become rows for
:class:`~gossamer.evaluate.evaluation_pool.EvaluationPool`.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from gossamer.core.errors import InputError, first_line
from gossamer.core.files import read_json

pc: Any = pyarrow.compute

Rows = list[dict[str, Any]]
ROLES = ("model", "sample", "score")


def read_harness(folder: Path, *, metric: str | None = None) -> tuple[Rows, Rows]:
    """Reads a folder of lm-evaluation-harness samples.

    Args:
        folder: of one model, or with a subfolder for each model; the folder's name is the model's.
        metric: which of a task's metrics. Default: the first that is a number.

    Returns:
        Measurements and samples.

    Raises:
        InputError: if there is no such file, or a line is not JSON with the fields it needs.
    """
    measurements, samples = [], {}
    paths = sorted(folder.rglob("samples_*.jsonl"))
    if not paths:
        raise InputError(f"{folder} holds no samples_*.jsonl of lm-evaluation-harness")
    for path in paths:
        task = path.stem.removeprefix("samples_").rsplit("_", 1)[0]
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                    name, score = _harness_score(record, metric)
                    identity = f"{task}/{record['doc_id']}"
                except (ValueError, KeyError, TypeError) as error:
                    raise InputError(f"{path}, line {number}, is not usable: {error}") from error
                measurements.append(
                    {
                        "model": path.parent.name,
                        "sample": identity,
                        "score": score,
                        "kind": "binary" if score in (0.0, 1.0) and name == "acc" else "numeric",
                    }
                )
                document = record.get("doc")
                text = document.get("question") if isinstance(document, dict) else document
                samples[identity] = {
                    "id": identity,
                    "text": text if isinstance(text, str) else json.dumps(document),
                    "task": task,
                }
    return measurements, list(samples.values())


def _harness_score(record: dict[str, Any], metric: str | None) -> tuple[str, float]:
    names = [metric] if metric is not None else record.get("metrics") or ["acc", "exact_match"]
    for name in names:
        value = record.get(name)
        if isinstance(value, bool | int | float):
            return name, float(value)
    raise KeyError(f"no number under {', '.join(names)}")


def read_helm(folder: Path, *, metric: str = "exact_match") -> tuple[Rows, Rows]:
    """Reads HELM runs.

    Args:
        folder: of one run, or with runs below it.
        metric: name of the statistic.

    Returns:
        Measurements and samples; instances without that statistic are left out.

    Raises:
        InputError: if there is no run, or one has not the fields it needs.
    """
    measurements, samples = [], {}
    paths = sorted(folder.rglob("per_instance_stats.json"))
    if not paths:
        raise InputError(f"{folder} holds no per_instance_stats.json of HELM")
    for path in paths:
        try:
            run = read_json(path.parent / "run_spec.json")
            model = run["adapter_spec"]["model"]
            scenario = run["name"].split(":")[0]
            for instance in read_json(path.parent / "instances.json"):
                identity = f"{scenario}/{instance['id']}"
                samples[identity] = {
                    "id": identity, "text": instance["input"]["text"], "task": scenario,
                }  # fmt: skip
            for entry in read_json(path):
                for stat in entry["stats"]:
                    if stat["name"]["name"] == metric and stat.get("count"):
                        measurements.append(
                            {
                                "model": model,
                                "sample": f"{scenario}/{entry['instance_id']}",
                                "score": stat["sum"] / stat["count"],
                                "kind": "numeric",
                            }
                        )
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"the run in {path.parent} is not usable: no {error}") from error
    if not measurements:
        raise InputError(f"no run in {folder} has the statistic {metric}")
    return measurements, list(samples.values())


def read_table(path: Path) -> Any:
    """Measurements from Parquet, CSV or JSON Lines with the columns model, sample, score.

    Raises:
        InputError: if the file cannot be read.
    """
    readers = {
        ".parquet": pyarrow.parquet.read_table, ".csv": pyarrow.csv.read_csv,
        ".jsonl": pyarrow.json.read_json,
    }  # fmt: skip
    if path.suffix not in readers:
        raise InputError(f"{path} is no .parquet, .csv or .jsonl file")
    try:
        return readers[path.suffix](path)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def renamed(
    table: Any, columns: Mapping[str, str], *, sample_pattern: str | None = None
) -> tuple[Any, Any]:
    """Measurements and samples of a table whose columns have other names.

    Args:
        table: a row for each measurement.
        columns: the column of ``model``, ``sample`` and ``score``; those that are left out have
            their own name. Several columns, with commas between them, are joined by "/".
        sample_pattern: a regular expression for the last of the sample's columns; its first group,
            or all that it finds, is what counts there. For names that say who saw the sample when.

    Returns:
        Measurements, binary where scores are true or false; and samples, with a column for each one
        that the sample's name was joined of.

    Raises:
        InputError: if a column is missing, or the expression is none or does not fit a name.
    """
    other = sorted(set(columns) - set(ROLES))
    if other:
        raise InputError(f"there is no {other[0]!r:.40} in a measurement, only {', '.join(ROLES)}")
    sources = {role: columns.get(role, role).split(",") for role in ROLES}
    for name in (name for names in sources.values() for name in names):
        if name not in table.column_names:
            raise InputError(
                f"the table has no column {name!r:.60}; it has {', '.join(table.column_names)}"
            )
    if len(sources["score"]) > 1:
        raise InputError("a score is one column")
    try:
        words = {name: pc.cast(table[name], pa.string()) for r in ROLES[:2] for name in sources[r]}
    except pa.ArrowException as error:
        raise InputError(f"the table is not usable: {first_line(error)}") from error
    if sample_pattern is not None:
        last = sources["sample"][-1]
        words[last] = _found(words[last], sample_pattern)
    model, sample = (
        pc.binary_join_element_wise(*(words[name] for name in sources[role]), "/")
        for role in ROLES[:2]
    )
    score = table[sources["score"][0]]
    kind = "binary" if pa.types.is_boolean(score.type) else "numeric"
    measurements = pa.table(
        {"model": model, "sample": sample, "score": score, "kind": [kind] * len(table)}
    )
    # The first of the rows of each sample says what it is.
    keys = pa.table({"id": sample, "row": np.arange(len(table))}).group_by("id")
    first = keys.aggregate([("row", "min")]).sort_by("row_min")
    parts = sources["sample"] if len(sources["sample"]) > 1 else []
    about = {name: table[name].take(first["row_min"]) for name in parts if name != "id"}
    return measurements, pa.table({"id": first["id"], **about})


def _found(names: Any, pattern: str) -> Any:
    try:
        find = re.compile(pattern).search
    except re.error as error:
        raise InputError(f"{pattern!r:.60} is no regular expression: {error}") from error
    coded = names.combine_chunks().dictionary_encode()
    shorter = []
    for name in coded.dictionary.to_pylist():
        match = find(name)
        if match is None:
            raise InputError(f"{pattern!r:.60} does not fit the sample {name!r:.80}")
        shorter.append(match[1] if match.re.groups else match[0])
    return pa.DictionaryArray.from_arrays(coded.indices, shorter).cast(pa.string())


def read_logits(path: Path, *, metric: str = "correct") -> tuple[Any, Any]:
    """Reads logits of classifiers on the same samples.

    Args:
        path: an ``.npz`` file with ``label`` (or ``labels``), whole numbers ``[n]``, and for each
            model an array of logits ``[n, classes]``, whose name is the model's.
        metric: "correct": whether the largest logit is the label's; "log-probability": of the
            label, nats.

    Returns:
        Measurements, and samples with their ``label``; a sample's id is its number.

    Raises:
        InputError: if there is no such metric, the file cannot be read, or its arrays do not belong
            together.
    """
    if metric not in ("correct", "log-probability"):
        raise InputError(f"of logits there is correct and log-probability, no {metric!r:.40}")
    from scipy.special import log_softmax

    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not an .npz file that can be read: {error!s:.200}") from error
    labels = arrays.pop("labels", None) if "label" not in arrays else arrays.pop("label")
    if labels is None or labels.ndim != 1 or labels.dtype.kind not in "iu" or not arrays:
        raise InputError(
            f"{path} holds no whole numbers called label and an array of logits for each model"
        )
    label = labels.astype(np.int64)
    every = np.arange(len(label))
    pieces = []
    for name, logits in arrays.items():
        if logits.ndim != 2 or len(logits) != len(label) or logits.dtype.kind != "f":
            raise InputError(
                f"{name} of {path} is {logits.dtype} {list(logits.shape)}; logits "
                f"[{len(label)}, classes] are needed"
            )
        if len(label) and not 0 <= label.min() <= label.max() < logits.shape[1]:
            raise InputError(
                f"{path} has labels outside of the {logits.shape[1]} classes of {name}"
            )
        if not np.isfinite(logits).all():
            raise InputError(f"{name} of {path} holds NaN or infinity")
        wide = logits.astype(np.float64)
        score = (
            (wide.argmax(1) == label).astype(np.float64)
            if metric == "correct"
            else log_softmax(wide, axis=1)[every, label]
        )
        kind = "binary" if metric == "correct" else "numeric"
        pieces.append(
            pa.table(
                {
                    "model": [name] * len(label), "sample": every.astype(str), "score": score,
                    "kind": [kind] * len(label),
                }
            )
        )  # fmt: skip
    return pa.concat_tables(pieces), pa.table({"id": every.astype(str), "label": label})
