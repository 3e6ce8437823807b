"""From what a user writes after ``--data`` to a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from gossamer.core.errors import InputError
from gossamer.core.task import Augment, Classification

LARGEST_SIDE = 4096


def open_task(
    data: str | Path,
    *,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    augment: Augment | None = None,
) -> Classification:
    """Opens labelled images.

    Args:
        data: "digits" (embedded); a folder of idx files (MNIST, Fashion-MNIST), of CIFAR-10
            (Parquet, binary or torchvision's), of Parquet files, of images with a subfolder a
            class, or written by ``datasets``' ``save_to_disk``; one Parquet file; or
            "hub:OWNER/NAME", which downloads from the Hugging Face hub.
        image_size: height and width in pixels, or one number for both. Default: the data's own.
        channels: 1 or 3. Default: the data's own.
        seed: of the splits that are carved.
        limit: at most about this many training images (and validation images), for quick
            experiments; the test split stays whole.
        mean: per channel on the scale 0..1. Default: measured on the training split; give a
            pretrained network its own.
        std: per channel on the scale 0..1. Default: measured on the training split.
        augment: of raw training batches. Default: what suits the data set.

    Raises:
        InputError: if there is no such data, or it cannot be read; the sentence names the file.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if size is not None and not all(1 <= side <= LARGEST_SIDE for side in size):
        raise InputError(f"images of {size[0]} x {size[1]} pixels are not made; 1 to 4096 are")
    if channels not in (None, 1, 3):
        raise InputError(f"images have 1 or 3 channels, not {channels}")
    return _opener(data)(
        seed=seed,
        image_size=size,
        channels=channels,
        limit=limit,
        mean=mean,
        std=std,
        augment=augment,
    )


def _opener(data: str | Path) -> Callable[..., Classification]:
    """The reader for ``data``, bound to it; readers are imported when they are needed."""
    from gossamer.datasets import cifar, digits, folder, hub, idx, tables

    if data == "digits":
        return digits.digits
    if isinstance(data, str) and data.startswith("hub:"):
        return partial(hub.hub_dataset, data.removeprefix("hub:"))
    path = Path(data).expanduser()
    try:
        if path.is_file() and path.suffix == ".parquet":
            return partial(tables.parquet_folder, path)
        if path.is_dir():
            if idx.find_idx(path):
                return partial(idx.idx_folder, path)
            if cifar.find_cifar(path):
                return partial(cifar.cifar10, path)
            if hub.is_saved_dataset(path):
                return partial(hub.saved_dataset, path)
            if tables.find_tables(path):
                return partial(tables.parquet_folder, path)
            if folder.holds_images(path):
                return partial(folder.image_folder, path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the data {data}: {error}") from error
    state = "holds none of the data that is looked for" if path.is_dir() else "is no data set"
    raise InputError(
        f'{data} {state}: "digits", hub:OWNER/NAME, a .parquet file, or a folder with '
        "subfolders of images (one a class), train-images-idx3-ubyte(.gz), CIFAR-10 "
        "(train_jpeg.parquet, data_batch_1.bin or data_batch_1), train*.parquet, or "
        "dataset_dict.json"
    )
