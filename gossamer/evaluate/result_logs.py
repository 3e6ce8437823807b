"""Per-sample results as other programs write them.

``lm-evaluation-harness`` writes a JSON Lines file a task (``samples_TASK_DATE.jsonl``) into a
folder of the model: each line has ``doc_id``, ``doc`` and the metrics that ``metrics`` names. HELM
writes, for a run, ``run_spec.json`` (with the model), ``instances.json`` (ids and texts) and
``per_instance_stats.json`` (for each instance, statistics with ``name.name``, ``sum`` and
``count``). Both become rows for :class:`~gossamer.evaluate.evaluation_pool.EvaluationPool`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from gossamer.core.errors import InputError
from gossamer.core.files import read_json

Rows = list[dict[str, Any]]


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
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet

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
