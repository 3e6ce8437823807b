"""The command that makes a private collection of images into a synthetic one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gossamer.cli.data import data
from gossamer.cli.front import Json, out_console, print_json
from gossamer.core.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from gossamer.data.generators import Embedding, Generator
    from gossamer.data.private import Population, PrivateEvolution
    from gossamer.datasets.collection import Collection


@data.command
def synthesize(
    private: str,
    *,
    out: Path,
    pool: str | None = None,
    url: str | None = None,
    epsilon: float = 1.0,
    delta: float = 1e-5,
    count: int = 1000,
    iterations: int = 10,
    lookahead: int = 8,
    threshold: str = "auto",
    neighbours: int = 1,
    generator: Literal["nearest", "moved"] = "nearest",
    embed: str = "components",
    weights: Path | None = None,
    layer: str | None = None,
    labels: Path | None = None,
    image_size: int | None = None,
    channels: int | None = None,
    noise: Literal["gaussian", "discrete", "seeded"] = "gaussian",
    shares: Literal["private", "pool", "equal"] = "private",
    ledger: Path | None = None,
    work: Path | None = None,
    seed: int = 0,
    json_: Json = False,
) -> None:
    """Make synthetic images that are like private ones, with differential privacy.

    Example: gossamer data synthesize patients/ --pool public/ --epsilon 1 --out synthetic/

    A public pool or a generator behind an address is steered by noisy votes of the private images.
    The folder has a subfolder for each class and report.json. An interrupted run goes on, and no
    noise is drawn twice; keep the ledger as long as the private images.

    Parameters
    ----------
    private
        Images with a subfolder for each class or without, Parquet, MNIST, CIFAR-10, or "digits".
    out
        The new folder of synthetic images.
    pool
        Public images, likewise. With classes, they need the names of the private ones.
    url
        A generator that answers POST URL/random and POST URL/variation, in place of a pool; give
        --image-size and --channels.
    epsilon
        Limit of the budget. Neighbours differ by adding or removing one image.
    delta
        Of the budget; less than one over the number of private images.
    count
        Synthetic images. Few private images a synthetic one drown in noise.
    iterations
        Noisy votes; each costs.
    lookahead
        Variants whose mean embedding stands for an image.
    threshold
        Votes below which an image has no children: "auto", "none", or a number.
    neighbours
        Votes of each private image, together of length 1.
    generator
        How a pool varies an image: its "nearest" members, or "moved" (turned, shifted, noisy).
    embed
        "components" (of the public images), "pixels", a timm name, or a folder written by
        gossamer. A network that was trained on the private images breaks the promise.
    weights
        Of the network: a safetensors file or a state dict.
    layer
        Whose output is the feature. Default: what the last linear layer reads.
    labels
        A CSV file with the columns name and label, for a private folder without classes.
    image_size
        Side in pixels. Default: the pool's.
    channels
        1 or 3. Default: the pool's.
    noise
        From the operating system's cryptographic source: "gaussian", or "discrete" (whole numbers,
        which leave no trace in floating point). "seeded" is for research only.
    shares
        Of the classes: as in the private images (their counts become public), as in the pool, or
        equal.
    ledger
        Folder with the account of these private images; give the same to every run on them.
        Default: in --work.
    work
        Folder in which a run goes on. Default: beside --out.
    seed
        Of generator and selection.
    json_
        Print the report as JSON.
    """
    from gossamer.core.files import write_json
    from gossamer.data.privacy_budget import check_budget
    from gossamer.datasets.collection import open_collection

    check_budget(epsilon, delta)
    if (pool is None) == (url is None):
        raise InputError("give either --pool with public images or --url of a generator")
    if url is not None and (image_size is None or channels is None):
        raise InputError("--url needs --image-size and --channels, which its images have")
    if out.exists():
        raise InputError(f"{out} exists; name a new folder")
    public = (
        None if pool is None else open_collection(pool, image_size=image_size, channels=channels)
    )
    # Sizes come from the public side, so that they tell nothing of the private one.
    size = public.size if public is not None else image_size
    depth = public.channels if public is not None else channels
    images = open_collection(private, labels=labels, image_size=size, channels=depth)
    if public is not None:
        public = _aligned(public, images)
    work = work or out.with_name(f".{out.name}-work")
    example, api = _source(public, url, (images.channels, *images.size), images.classes, seed)
    embedding = _embedding(embed, weights, layer, example, images)
    if public is not None:
        api = _from_pool(generator, public, embedding)
    pe = _evolution(api, embedding, images, public, shares, {
        "n_samples": count, "iterations": iterations, "epsilon": epsilon, "delta": delta,
        "lookahead": lookahead, "threshold": _threshold(threshold), "neighbours": neighbours,
        "noise": _noise(noise, seed), "seed": seed, "work": work, "ledger": ledger,
    })  # fmt: skip
    features = _features(images, embedding)
    population = pe.evolve(features, images.labels)
    report = {
        **pe.privacy_report(), "images": len(population.samples), "out": str(out),
        "ledger": str(ledger or work / "ledger"), "embed": embed,
        "skipped": len(images.skipped), "epsilon_dp_accounting": _second_opinion(pe),
    }  # fmt: skip
    _write(out, population, images.classes, report, write_json)
    if json_:
        print_json(report)
        return
    console = out_console()
    console.print(f"{len(population.samples):,} synthetic images in {out}")
    if report["private"]:
        console.print(
            f"epsilon {report['epsilon_spent']:.4g} of {epsilon:g} is spent at delta {delta:g} "
            f"({report['neighbouring']}); the account is in {report['ledger']}"
        )
    else:
        console.print("epsilon is infinite: these images protect nobody")
    if images.skipped:
        console.print(f"{len(images.skipped)} private images cannot be read and were left out")


def _aligned(public: Collection, images: Collection) -> Collection:
    """The public pool with the private classes' numbers."""
    from dataclasses import replace

    import numpy as np
    import torch

    if not images.classes or not public.classes:
        return replace(public, classes=())
    missing = [name for name in images.classes if name not in public.classes]
    if missing:
        raise InputError(
            f"the public pool has no class {missing[0]}; it needs all of the private ones, or none"
        )
    number = np.full(len(public.classes), -1)
    for label, name in enumerate(images.classes):
        number[public.classes.index(name)] = label
    mapped = number[public.source.labels.numpy()]
    kept = public.take(np.flatnonzero(mapped >= 0))
    kept.source.labels = torch.from_numpy(mapped[mapped >= 0])
    return replace(kept, classes=images.classes)


def _source(
    public: Collection | None,
    url: str | None,
    shape: tuple[int, int, int],
    classes: tuple[str, ...],
    seed: int,
) -> tuple[np.ndarray, Generator | None]:
    """Public images that tell means and components, and the generator behind an address."""
    import numpy as np

    from gossamer.data.http_generator import HttpGenerator

    if public is not None:
        rows = np.random.default_rng(seed).permutation(len(public))[:5000]
        return _bytes(public.take(np.sort(rows))), None
    assert url is not None
    api = HttpGenerator(url, shape)
    count = max(1, len(classes))
    labels = np.repeat(np.arange(count), -(-256 // count))
    return api.random(labels, seed=seed), api


def _from_pool(name: str, public: Collection, embedding: Embedding) -> Generator:
    from gossamer.data.generators import MovedImages, NearestImage

    if name == "moved":
        return MovedImages(_bytes(public), public.labels)
    return NearestImage(_bytes(public), embedding, public.labels)


def _bytes(images: Collection) -> np.ndarray:
    """All images on the scale 0..255."""
    import numpy as np

    raw = images.fetch(np.arange(len(images))).numpy()
    return raw if images.scale == 255.0 else _scaled(raw, images.scale)


def _scaled(raw: np.ndarray, scale: float) -> np.ndarray:
    import numpy as np

    return (raw * (255.0 / scale)).round().clip(0, 255).astype(np.uint8)


def _embedding(
    name: str, weights: Path | None, layer: str | None, public: np.ndarray, images: Collection
) -> Embedding:
    """Vectors of images on the scale 0..255, made with public images only."""
    import numpy as np
    import torch

    from gossamer.datasets.arrays import ArraySource
    from gossamer.datasets.collection import Collection

    def flat(samples: np.ndarray) -> np.ndarray:
        return samples.reshape(len(samples), -1).astype(np.float32) / 255.0

    if name == "pixels":
        return flat
    if name == "components":
        from sklearn.decomposition import PCA

        vectors = flat(public)
        found = PCA(min(50, *vectors.shape), svd_solver="full").fit(vectors)
        axes = np.asarray(found.components_, dtype=np.float32).T
        mean = np.asarray(found.mean_, dtype=np.float32)
        return lambda samples: (flat(samples) - mean) @ axes

    from gossamer.cli.data import embedder
    from gossamer.parts.embedding import embed

    def source(samples: np.ndarray) -> ArraySource:
        return ArraySource(torch.from_numpy(samples), torch.zeros(len(samples), dtype=torch.int64))

    # The statistics of the inputs are those of public images: the private ones' would leak.
    stand_in = Collection(
        "public", tuple(map(str, range(len(public)))), source(public), images.classes
    )
    network, preprocess = embedder(name, weights, stand_in)
    return lambda samples: embed(source(samples), network, preprocess, layer=layer).features


def _features(images: Collection, embedding: Embedding) -> np.ndarray:
    """Embeddings of the private images, a block in memory at a time, never kept on disk."""
    import numpy as np

    from gossamer.core.progress import progress

    parts = []
    with progress() as bar:
        for start in bar.track(range(0, len(images), 1024), description="embedding"):
            rows = np.arange(start, min(start + 1024, len(images)))
            raw = images.fetch(rows).numpy()
            parts.append(embedding(raw if images.scale == 255.0 else _scaled(raw, images.scale)))
    return np.concatenate(parts)


def _evolution(
    api: Generator | None,
    embedding: Embedding,
    images: Collection,
    public: Collection | None,
    shares: str,
    options: dict[str, Any],
) -> PrivateEvolution:
    import numpy as np

    from gossamer.data.private import PrivateEvolution

    classes = max(1, len(images.classes))
    match shares:
        case "equal":
            given = [1.0] * classes
        case "pool":
            if public is None or not images.classes or public.labels is None:
                raise InputError("--shares pool needs a --pool and private images with classes")
            given = np.bincount(public.labels, minlength=classes).tolist()
        case _:
            given = None
    assert api is not None
    return PrivateEvolution(api, embedding, shares=given, **options)


def _threshold(text: str) -> Any:
    if text in ("auto", "none"):
        return None if text == "none" else "auto"
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f'--threshold is "auto", "none" or a number, not {text!r}') from error


def _noise(name: str, seed: int) -> Any:
    from gossamer.data import privacy_noise

    match name:
        case "discrete":
            return privacy_noise.SecretDiscreteGaussian()
        case "seeded":
            return privacy_noise.SeededGaussian(seed)
    return privacy_noise.SecretGaussian()


def _second_opinion(pe: PrivateEvolution) -> float | None:
    """Epsilon of one such run by dp-accounting, where it is installed."""
    from gossamer.core.errors import MissingExtra
    from gossamer.data.privacy_budget import accountant_epsilon

    if pe.noise_scale == 0.0 or pe.noise.accounting != "gaussian":
        return None
    try:
        return accountant_epsilon(pe.noise_scale, pe.iterations, pe.delta)
    except MissingExtra:
        return None


def _write(
    out: Path,
    population: Population,
    classes: tuple[str, ...],
    report: dict[str, Any],
    write_json: Any,
) -> None:
    from PIL import Image

    from gossamer.core.files import whole_folder

    # A class is named by a file, which may name any place.
    folders = [
        name if name not in (".", "..") and Path(name).name == name else f"class-{label}"
        for label, name in enumerate(classes)
    ]
    with whole_folder(out) as partial:
        for row, (sample, label) in enumerate(
            zip(population.samples, population.labels, strict=True)
        ):
            folder = partial / folders[label] if classes else partial
            folder.mkdir(parents=True, exist_ok=True)
            pixels = sample[0] if sample.shape[0] == 1 else sample.transpose(1, 2, 0)
            Image.fromarray(pixels).save(folder / f"{row:06}.png")
        write_json(partial / "report.json", report)
