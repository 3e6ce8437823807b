"""Commands that keep a pool of evaluation results, and rank models on any part of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gossamer.cli.evaluate import evaluate
from gossamer.cli.front import Json, out_console, print_json
from gossamer.core.errors import InputError

if TYPE_CHECKING:
    from gossamer.evaluate.evaluation_pool import EvaluationPool, Found

NEAREST = 100
"""Samples that are taken where neither their number nor a threshold is given."""


@evaluate.command
def collect(
    pool: Path,
    source: Path,
    *,
    kind: Literal["table", "harness", "helm", "logits"] = "table",
    columns: list[str] | None = None,
    sample_pattern: str | None = None,
    samples: Path | None = None,
    metric: str | None = None,
    json_: Json = False,
) -> None:
    """Add per-sample results to a pool.

    Example: gossamer evaluate collect pool/ results.parquet --samples questions.parquet

    Example: gossamer evaluate collect pool/ trials.parquet --columns model=subject
    sample=dataset,image score=correct

    Parameters
    ----------
    pool
        A folder; made if it is new.
    source
        A table (.parquet, .csv, .jsonl) with the columns model, sample, score and, if not numeric,
        kind (binary, numeric, pairwise); or a folder that another program wrote.
    kind
        "harness": lm-evaluation-harness; "helm": HELM; "logits": an .npz file with label [n] and,
        for each model, logits [n, classes].
    columns
        Where a table calls them otherwise: model=COLUMN, sample=COLUMN or score=COLUMN. Several
        columns with commas between them make one name, and samples can be filtered by them.
    sample_pattern
        A regular expression: its first group, or all that it finds in the last of the sample's
        columns, is what counts there.
    samples
        A table with the column id and whatever else is known of the samples.
    metric
        Which metric of another program's. Default: the first of a task. Of logits: correct
        (default) or log-probability.
    json_
        Print what is in the pool as JSON.
    """
    from gossamer.evaluate.evaluation_pool import EvaluationPool
    from gossamer.evaluate.result_logs import (
        read_harness,
        read_helm,
        read_logits,
        read_table,
        renamed,
    )

    described = None if samples is None else read_table(samples)
    found: Any = None
    if kind != "table" and (columns or sample_pattern):
        raise InputError("--columns and --sample-pattern are for tables")
    match kind:
        case "table":
            results = read_table(source)
            if columns or sample_pattern:
                form = "model=, sample= or score=COLUMN"
                roles = dict(_pair(word, "column", form) for word in columns or ())
                results, found = renamed(results, roles, sample_pattern=sample_pattern)
        case "harness":
            results, found = read_harness(source, metric=metric)
        case "helm":
            results, found = read_helm(source, metric=metric or "exact_match")
        case "logits":
            results, found = read_logits(source, metric=metric or "correct")
    described = found if described is None else described
    kept = EvaluationPool(pool)
    kept.add(results, samples=described)
    measured = kept.measured()
    about = {
        "models": len(measured.models), "samples": len(measured.samples),
        "measurements": len(measured.scores.values),
    }  # fmt: skip
    if json_:
        print_json(about)
    else:
        out_console().print(
            f"{pool} holds {about['measurements']:,} measurements of {about['models']:,} models on "
            f"{about['samples']:,} samples."
        )


@evaluate.command
def rank(
    pool: Path,
    *,
    where: list[str] | None = None,
    text: str | None = None,
    like: str | None = None,
    encoder: str = "words",
    top_k: int | None = None,
    threshold: float | None = None,
    method: Literal["pl", "pl-choices", "bt", "elo", "borda", "dowdall", "mean", "win-rate"] = "pl",
    ties: float = 1.0,
    alpha: float = 0.0,
    weighting: Literal["pairs", "models", "samples"] = "pairs",
    anchor: str | None = None,
    bootstrap: int = 200,
    seed: int = 0,
    json_: Json = False,
) -> None:
    """Rank models on a pool, or on the part of it that a description fits.

    Example: gossamer evaluate rank pool/ --where metadata.subject.eq=biology --text "chest X-ray"

    Parameters
    ----------
    pool
        A folder written by gossamer evaluate collect, or a table of measurements.
    where
        Filters COLUMN.OPERATOR=VALUE with eq, ne, gt, ge, lt, le, contains or len; all must hold.
    text
        Samples about this.
    like
        Samples like the one with this id.
    encoder
        "words" compares words and pairs of words; or the name or folder of a transformers encoder,
        whose mean hidden state is compared.
    top_k
        At most so many samples, the nearest to --text or --like. Default: 100.
    threshold
        Only samples whose cosine is above.
    method
        Plackett-Luce on pairs (pl) or on choices of one among several, logistic Bradley-Terry, Elo,
        Borda, Dowdall, the mean score or the win rate.
    ties
        What a tie counts for either side.
    alpha
        Regularisation; needed where wins do not connect all models both ways.
    weighting
        Whether each pair, each model of a sample, or each sample counts the same.
    anchor
        A model whose utility is put at 0.
    bootstrap
        Draws of samples for the intervals; 0 for none.
    seed
        Of the draws.
    json_
        Print the ranking as JSON.
    """
    from gossamer.evaluate.evaluation_pool import EvaluationPool, measured_of
    from gossamer.evaluate.ranking import rank as rank_scores
    from gossamer.evaluate.result_logs import read_table

    if not pool.exists():
        raise InputError(f"{pool} does not exist")
    asked = text is not None or like is not None
    if not asked and (top_k is not None or threshold is not None):
        raise InputError("--top-k and --threshold need --text or --like")
    filters = dict(_pair(word, "filter", "COLUMN.OPERATOR=VALUE") for word in where or ())
    found = None
    if pool.is_file():
        if asked or filters:
            raise InputError("a table has no samples to choose from; make a pool with collect")
        measured = measured_of(read_table(pool))
    else:
        kept = EvaluationPool(pool)
        if asked:
            found = _near(kept, text, like, encoder, filters, top_k, threshold)
        elif filters:
            found = kept.query(filters=filters)
        if found is not None and not found.samples:
            raise InputError("no sample fits the description")
        measured = kept.measured(None if found is None else found.samples)
    result = rank_scores(
        measured.scores, measured.models, method=method, ties=ties, alpha=alpha,
        weighting=weighting, anchor=anchor, bootstrap=bootstrap, seed=seed,
    )  # fmt: skip
    nearest = []
    if found is not None and found.similarity is not None:
        nearest = [
            {"sample": name, "similarity": float(s)}
            for name, s in zip(found.samples, found.similarity, strict=True)
        ]
    if json_:
        print_json(result.to_json() | {"samples": len(measured.samples), "nearest": nearest})
        return
    from rich.table import Table

    table = Table(title=f"{method} on {len(measured.samples):,} samples")
    for column in ("rank", "model", "utility", "95 %", "samples"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for k, name in enumerate(result.models):
        low, high = int(result.best_rank[k]), int(result.worst_rank[k])
        table.add_row(
            str(low) if low == high else f"{low}-{high}", name, f"{result.utility[k]:.3f}",
            f"{result.low[k]:.3f} to {result.high[k]:.3f}" if bootstrap else "",
            f"{result.samples[k]:,}",
        )  # fmt: skip
    console = out_console()
    console.print(table)
    for entry in nearest[:5]:
        console.print(f"{entry['similarity']:.2f}  {entry['sample']}")
    for remark in result.remarks:
        console.print(f"Note: {remark}")


def _pair(word: str, what: str, form: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not equals:
        raise InputError(f"the {what} is {word!r:.60}; write {form}")
    return name, value


def _near(
    pool: EvaluationPool,
    text: str | None,
    like: str | None,
    encoder: str,
    filters: dict[str, str],
    top_k: int | None,
    threshold: float | None,
) -> Found:
    from gossamer.evaluate.text_vectors import encoder_of

    encode = encoder_of(encoder)
    pool.embed(encode, space=encoder)
    near = [] if text is None else [encode([text])[0]]
    if like is not None:
        near.append(pool.vector_of(like, encoder))
    if top_k is None and threshold is None:
        top_k = NEAREST
    return pool.query(filters=filters, near=near, space=encoder, top_k=top_k, threshold=threshold)
