"""The command that chooses what to pretrain on, given the target."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from gossamer.cli.data import DEFAULT_NETWORK, data, embedder, networks_of, whole_task
from gossamer.cli.front import Json, out_console, print_json
from gossamer.core.errors import InputError


@data.command
def prune_for_transfer(
    source: str,
    target: str,
    *,
    keep: float,
    method: Literal["lm", "fm"] = "lm",
    out: Path = Path("kept.parquet"),
    model: str = DEFAULT_NETWORK,
    weights: Path | None = None,
    epochs: int = 2,
    layer: str | None = None,
    clusters: int | None = None,
    even: bool = False,
    image_size: int | None = None,
    seed: int = 0,
    json_: Json = False,
) -> None:
    """Keep the source classes that a target needs, before pretraining on them.

    Example: gossamer data prune-for-transfer photos/ leaves/ --keep 0.4 --out kept.parquet

    A small network that has seen the whole source looks at the target's training images and votes.
    The result is an index file of the source: all samples of the kept classes, most needed first.

    Parameters
    ----------
    source
        Images to pretrain on, with a subfolder for each class (label mapping needs them).
    target
        Training images of the target; their labels are not used unless --even is given.
    keep
        Fraction of the source's classes (or clusters) that stays.
    method
        "lm" counts which source class each target image is taken for; "fm" whose mean feature is
        nearest, and does without source labels.
    out
        The index file.
    model
        The surrogate: a timm name or torchvision:NAME.
    weights
        Of a surrogate that has seen the source. Default: it is trained here.
    epochs
        Of that training.
    layer
        Whose output is the feature (fm). Default: what the last linear layer reads.
    clusters
        Pseudo-classes of a source without labels (fm). Default: a hundredth of its images.
    even
        Give every target class the same weight.
    image_size
        Side in pixels to which both are read. Default: the source's own.
    seed
        Of training and clustering.
    json_
        Print the summary as JSON.
    """
    import numpy as np

    from gossamer.core.fit import Supervised, fit, sgd
    from gossamer.data.selection import Selection, keep_count, write_selection
    from gossamer.data.transfer_pruning import (
        clusters_of,
        feature_mapping,
        label_mapping,
        prototypes_of,
        ranking,
    )
    from gossamer.datasets.collection import open_collection
    from gossamer.parts.embedding import embed

    keep_count(1, keep)
    pool = open_collection(source, image_size=image_size)
    wanted = open_collection(target, image_size=pool.size, channels=pool.channels)
    if method == "lm" and not pool.classes:
        raise InputError(f"label mapping needs classes, and {source} has none; take --method fm")
    if not pool.classes and weights is None:
        raise InputError(f"{source} has no labels to train a surrogate on; give --weights")
    if even and not wanted.classes:
        raise InputError(f"--even needs labels, and {target} has none")
    if weights is not None:
        network, preprocess = embedder(model, weights, pool)
    else:
        task = whole_task(pool)
        network, preprocess = networks_of(model, pool)(seed), task.preprocess
        rule = Supervised(network, task, optimizer=sgd(network, lr=0.05))
        fit(rule, task, epochs=epochs, seed=seed, title="training the surrogate")
    seen = embed(wanted, network, preprocess, layer=layer)
    weigh = wanted.labels if even else None
    labels = pool.labels
    if method == "lm":
        votes = label_mapping(seen.logits, target_labels=weigh)
    else:
        features = embed(pool, network, preprocess, layer=layer).features
        if labels is None:
            labels = clusters_of(features, clusters or max(2, len(pool) // 100), seed=seed)
        votes = feature_mapping(seen.features, prototypes_of(features, labels), target_labels=weigh)
    assert labels is not None
    count = keep_count(len(votes), keep)
    ranked = ranking(votes)[:count]
    rows = np.concatenate([np.flatnonzero(labels == label) for label in ranked])
    names = pool.classes or [f"cluster {number}" for number in range(len(votes))]
    write_selection(
        out,
        Selection(
            pool.names,
            votes.counts[labels],
            rows,
            [names[label] for label in labels],
            {
                "method": method, "keep": keep, "data": pool.name, "target": wanted.name,
                "seed": seed, "fingerprint": pool.fingerprint(),
                "skipped": [[s.name, s.reason] for s in (*pool.skipped, *wanted.skipped)],
            },
        ),
    )  # fmt: skip
    unvoted = int((votes.counts[ranked] == 0).sum())
    summary = {
        "images": len(pool),
        "kept": len(rows),
        "classes": {names[label]: float(votes.counts[label]) for label in ranked},
        "without_votes": unvoted,
        "skipped": [skipped.name for skipped in (*pool.skipped, *wanted.skipped)],
        "out": str(out),
    }
    if json_:
        print_json(summary)
        return
    console = out_console()
    console.print(
        f"{count} of {len(votes)} classes stay, {len(rows):,} of {len(pool):,} images; {out}"
    )
    if unvoted:
        console.print(f"{unvoted} of them got no vote and stay for being nearest")
