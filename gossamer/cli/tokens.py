"""Commands that store images as codes, look at such a store and train from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gossamer.cli.data import data
from gossamer.cli.front import Json, out_console, print_json
from gossamer.core.errors import InputError


@data.command
def tokenize(
    source: str,
    *,
    out: Path,
    tokenizer: Path | None = None,
    image_size: int | None = None,
    patch: int | None = None,
    codes: int = 391,
    epochs: int = 10,
    adapt_epochs: int = 0,
    limit: int | None = None,
    compress: bool = True,
    seed: int = 0,
    json_: Json = False,
) -> None:
    """Store a folder of images as codes, at about a hundredth of the bytes.

    Example: gossamer data tokenize photos/ --out photos.tokens --image-size 128

    The pixels are not touched; delete them yourself when the store is what you want.

    Parameters
    ----------
    source
        "digits", or a folder: images with a subfolder for each class, MNIST, CIFAR-10, Parquet.
    out
        Folder of the store.
    tokenizer
        A tokenizer.safetensors made before (another store holds one). Default: one is trained on
        these images.
    image_size
        Side in pixels. Default: the images' own, rounded to whole patches.
    patch
        Pixels along each side of what one code stands for. Default: 8 from 64 pixels on, 4 from
        16 on, 2 below.
    codes
        Of a tokenizer that is trained.
    epochs
        Of a tokenizer that is trained.
    adapt_epochs
        Also train TokenAdapt on the images for this many epochs, for geometric augmentation
        later; it is kept beside the store as OUT.adapt.safetensors.
    limit
        At most about this many training images.
    compress
        With gzip; without, images are read at random by their offsets.
    seed
        Of splits and training.
    json_
        Print JSON.
    """
    from gossamer.data.tokenizer import Tokenizer, train_tokenizer
    from gossamer.data.tokens import save_token_adapt, train_token_adapt
    from gossamer.data.tokens import tokenize as write
    from gossamer.datasets import open_task

    if min(epochs, adapt_epochs) < 0 or codes < 2:
        raise InputError("--epochs and --adapt-epochs are 0 or more, and --codes at least 2")
    if out.exists() and not (out / "store.json").is_file():
        raise InputError(f"{out} exists and is no store of tokens; choose another place")
    if tokenizer is not None:
        made = Tokenizer.load(tokenizer)
        p = made.preprocess
        task = open_task(
            source, image_size=(p.height, p.width), channels=p.channels, seed=seed, limit=limit,
            mean=p.mean, std=p.std,
        )  # fmt: skip
    else:
        made = None
        task = open_task(source, image_size=image_size, seed=seed, limit=limit)
        height, width = task.preprocess.height, task.preprocess.width
        side = max(height, width)
        patch = patch or (8 if side >= 64 else 4 if side >= 16 else 2)
        whole = max(2 * patch, patch * round(side / patch))
        if image_size is None and (height, width) != (whole, whole):
            task = open_task(source, image_size=whole, seed=seed, limit=limit)
        made = train_tokenizer(task, patch=patch, codes=codes, epochs=epochs, seed=seed)
    beside = out.with_name(f"{out.name}.adapt.safetensors")
    if adapt_epochs:
        width, heads = (384, 6) if made.grid[0] >= 16 else (96, 4)
        adapt = train_token_adapt(
            task, made, epochs=adapt_epochs, width=width, heads=heads, seed=seed
        )
        save_token_adapt(beside, adapt)
    store = write(task, out, made, compress=compress)
    report = _described(store) | {"out": str(out), "adapt": str(beside) if adapt_epochs else None}
    _show(report, json_)


@data.command
def tokens(
    store: Path, *, pictures: Path | None = None, count: int = 64, json_: Json = False
) -> None:
    """Show what a store of tokens holds, check all of it, and draw some images from their codes.

    Example: gossamer data tokens photos.tokens --pictures sheet.png

    Parameters
    ----------
    store
        Folder that gossamer data tokenize wrote.
    pictures
        A PNG to write: the first images of the first split as their codes give them back.
    count
        Images on it.
    json_
        Print JSON.
    """
    from gossamer.data.token_store import TokenStore

    opened = TokenStore(store)
    report = _described(opened)
    if pictures is not None:
        _draw(opened, pictures, count)
    _show(report, json_)


@data.command
def train_tokens(
    store: Path,
    *,
    out: Path,
    adapt: Path | None = None,
    pretrain_epochs: int = 0,
    epochs: int = 100,
    batch_size: int = 128,
    lr: float = 1e-3,
    width: int = 192,
    depth: int = 6,
    heads: int = 6,
    seed: int = 0,
    json_: Json = False,
) -> None:
    """Train a vision transformer from a store of tokens, without the images.

    Example: gossamer data train-tokens photos.tokens --out net.safetensors --pretrain-epochs 100

    Parameters
    ----------
    store
        Folder that gossamer data tokenize wrote.
    out
        The network, a safetensors file. An interrupted run goes on from OUT.run.safetensors.
    adapt
        TokenAdapt, as gossamer data tokenize --adapt-epochs wrote it.
    pretrain_epochs
        Of masked token modelling before the labels are used.
    epochs
        Of training with labels.
    batch_size
        Images a batch.
    lr
        At its highest.
    width
        Of the transformer.
    depth
        Blocks.
    heads
        Of attention.
    seed
        Of weights and order.
    json_
        Print JSON.
    """
    from dataclasses import replace

    import torch

    from gossamer.core.fit import fit
    from gossamer.data import tokens as made

    if out.is_dir():
        raise InputError(f"{out} is a folder; --out names the file of the network")
    task = made.TokenTask(made.TokenStore(store))
    grid = task.store.grid[0]
    side = made.cropped(grid) if grid >= 16 else grid - grid % 2
    turned = made.load_token_adapt(adapt) if adapt is not None else None
    if turned is not None:
        network = turned.network
        if network.grid != grid or len(network.codebook) != len(task.store.codebook):
            raise InputError(
                f"{adapt} was made for a grid of {network.grid} and {len(network.codebook)} codes; "
                f"{store} has {grid} and {len(task.store.codebook)}"
            )
        side = network.crop
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = made.TokenViT(
            task.store.codebook, len(task.classes), side=side, width=width, depth=depth,
            heads=heads, stem="patch" if pretrain_epochs else "conv",
        )  # fmt: skip
    runs = [out.with_name(f"{out.name}.{name}.safetensors") for name in ("masks", "run")]
    out.parent.mkdir(parents=True, exist_ok=True)
    recipe = replace(made.SEIT_PLUS_PLUS, lr=lr, ema=None)
    if pretrain_epochs:
        model = made.pretrain(
            task, network, adapt=turned, width=width, depth=2, heads=heads, lr=lr,
            epochs=pretrain_epochs, batch_size=batch_size, seed=seed, checkpoint=runs[0],
        )  # fmt: skip
        network = model.classifier(len(task.classes), seed=seed).cpu()
        recipe = replace(made.FINETUNE, lr=lr)
    rule = made.TokenTraining(network, task, recipe, adapt=turned)
    fit(rule, task, epochs=epochs, batch_size=batch_size, seed=seed, checkpoint=runs[1])
    report: dict[str, Any] = {"out": str(out)}
    for split in ("validation", "test"):
        report[split] = task.score(rule.network, split) if task.size(split) else None
    made.save_token_vit(out, rule.trained.cpu(), task.classes)
    for run in runs:
        run.unlink(missing_ok=True)
    if json_:
        print_json(report)
        return
    for split in ("validation", "test"):
        if report[split] is not None:
            out_console().print(f"{split}: {report[split]:.1f} % top-1 accuracy")
    out_console().print(f"written to {out}", soft_wrap=True)


def _described(store: Any) -> dict[str, Any]:
    from gossamer.data.token_store import entropy_bytes
    from gossamer.data.tokenizer import perplexity

    used = store.verify()
    tokens = store.grid[0] * store.grid[1]
    size = store.stored_bytes()
    return {
        "name": store.name,
        "grid": list(store.grid),
        "classes": list(store.classes),
        "images": {split: len(part) for split, part in store.splits.items()},
        "stored_bytes": size,
        "bytes_per_image": {split: size[split] / len(part) for split, part in store.splits.items()},
        "uniform_bytes_per_image": entropy_bytes(tokens, len(used)),
        "codes": len(used),
        "codes_used": int((used > 0).sum()),
        "perplexity": perplexity(used),
        "tokenizer": store.about.get("tokenizer"),
    }


def _show(report: dict[str, Any], json_: bool) -> None:
    if json_:
        print_json(report)
        return
    from rich.table import Table

    table = Table(title=f"{report['name']}, {' x '.join(map(str, report['grid']))} codes an image")
    for column in ("split", "images", "bytes", "bytes an image"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split, images in report["images"].items():
        size = report["stored_bytes"][split]
        table.add_row(split, f"{images:,}", f"{size:,}", f"{size / images:.1f}")
    for part in ("codebook", "tokenizer"):
        table.add_row(part, "", f"{report['stored_bytes'][part]:,}", "")
    console = out_console()
    console.print(table)
    console.print(
        f"{report['codes_used']} of {report['codes']} codes are used, as evenly as "
        f"{report['perplexity']:.0f} equally likely ones"
    )
    if report.get("out"):
        console.print(f"written to {report['out']}", soft_wrap=True)


def _draw(store: Any, path: Path, count: int) -> None:
    import numpy as np
    from PIL import Image

    from gossamer.core.files import whole_file
    from gossamer.data.tokenizer import Tokenizer

    if store.tokenizer is None:
        raise InputError(f"{store.path} holds no tokenizer, so its codes cannot be drawn")
    if count < 1:
        raise InputError(f"--count is at least 1, not {count}")
    if path.suffix.lower() != ".png":
        raise InputError(f"--pictures writes a PNG; {path} does not end in .png")
    tokenizer = Tokenizer.load(store.tokenizer)
    if len(tokenizer.codebook) != len(store.codebook):
        raise InputError(f"{store.tokenizer} is not the tokenizer of {store.path}")
    part = store.splits[next(iter(store.splits))]
    images = tokenizer.decode(part.fetch(np.arange(min(count, len(part))))).numpy()
    columns = int(np.ceil(np.sqrt(len(images))))
    rows = -(-len(images) // columns)
    _, channels, height, width = images.shape
    sheet = np.ones((rows * columns, channels, height, width))
    sheet[: len(images)] = images
    sheet = sheet.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    pixels = np.rint(255 * sheet.reshape(rows * height, columns * width, channels))
    picture = Image.fromarray(pixels.astype(np.uint8).squeeze())
    with whole_file(path) as partial:
        picture.save(partial, format="PNG")
