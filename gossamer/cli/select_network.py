"""The command that segments each series with the least uncertain network of a pool."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from gossamer.cli.evaluate import evaluate
from gossamer.cli.front import Json, out_console, print_json
from gossamer.core.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from gossamer.datasets.perfusion import Series
    from gossamer.evaluate.uncertainty_selection import Pool, Selection

PHANTOMS = 20
"""Series that are drawn where no files are given: to select on; four times as many to train."""


@evaluate.command
def select(
    *,
    data: str,
    pool: Path,
    train: Annotated[bool, Parameter(negative="")] = False,
    out: Path = Path("selected"),
    networks: int = 7,
    patch: int = 64,
    epochs: int = 100,
    batch_size: int = 12,
    learning_rate: float = 1e-3,
    loss: Literal["cross-entropy", "dice"] = "cross-entropy",
    width: int = 16,
    depth: int = 4,
    percentile: float = 95.0,
    stride: int | None = None,
    fine_stride: int | None = None,
    trim: int | None = None,
    min_area: float | None = None,
    time_axis: int | None = None,
    seed: int = 0,
    device: str | None = None,
    json_: Json = False,
) -> None:
    """Segment image series, each with the network of a pool that contradicts itself least on it.

    Example: gossamer evaluate select --pool pool/ --data series/

    A series is dynamic: frames of one slice, motion corrected, cropped around the heart. For each
    it writes mask and uncertainty map (.npy, or .nii.gz for NIfTI) under --out, and selection.json.
    With --train it trains the pool on labelled series instead, and chooses the threshold of the
    flag for human review on a fifth of them, split by file.

    Parameters
    ----------
    data
        A file or folder: .npy [frames, height, width], .mat, NIfTI (4D), DICOM folders; the mask
        of NAME is NAME_mask.npy (.mat, .nii, .nii.gz). Or "phantoms", drawn; "phantoms:late",
        ":early" and ":noisy" are shifted.
    pool
        Folder of the networks, a subfolder each; --train writes it.
    train
        Train the pool.
    out
        Folder for masks and maps.
    networks
        To train; alike but for their seed.
    patch
        Side in pixels of the windows that networks are trained on.
    epochs
        Of training; one patch of each series an epoch.
    batch_size
        Patches in a step of training.
    learning_rate
        Of Adam.
    loss
        cross-entropy or (soft) dice.
    width
        Channels of the U-Nets at full resolution.
    depth
        Resolutions of the U-Nets.
    percentile
        Of the index on validation series, above which a result is flagged.
    stride
        Pixels between windows when segmenting. Default: a quarter of the window.
    fine_stride
        Pixels between windows when measuring uncertainty. Default: 1/32 of the window.
    trim
        Pixels at the border of windows that do not count for uncertainty.
    min_area
        Parts of a mask below this share of the image are dropped. Default: .015.
    time_axis
        Which axis of .npy and .mat files is time.
    seed
        Of everything that is drawn.
    device
        cpu or cuda. Default: cuda where there is one.
    json_
        Print the report as JSON.
    """
    import torch

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    given = _series(data, time_axis, train, seed)
    chosen = {
        name: value
        for name, value in (
            ("stride", stride), ("fine_stride", fine_stride), ("trim", trim), ("min_area", min_area)
        )
        if value is not None
    }  # fmt: skip
    if train:
        report = _train(
            given, pool, chosen, networks=networks, patch=patch, epochs=epochs, width=width,
            depth=depth, batch_size=batch_size, learning_rate=learning_rate, loss=loss,
            percentile=percentile, seed=seed, device=where,
        )  # fmt: skip
    else:
        report = _select(given, pool, chosen, out, where)
    if json_:
        print_json(report)
    else:
        _show(report)


def _series(data: str, time_axis: int | None, train: bool, seed: int) -> list[Series]:
    from gossamer.core.task import seed_of
    from gossamer.datasets.perfusion import ACQUISITIONS, Series, drawn_phantoms, open_series

    kind, _, name = data.partition(":")
    if kind != "phantoms" or Path(data).exists():
        return open_series(data, time_axis=time_axis)
    acquisition = ACQUISITIONS.get(name or "in-domain")
    if acquisition is None:
        raise InputError(
            f"there are no phantoms {name!r:.40}; there are: {', '.join(ACQUISITIONS)}"
        )
    frames, masks = drawn_phantoms(
        PHANTOMS * (4 if train else 1),
        acquisition=acquisition,
        # Nobody selects on the phantoms that the pool learned from.
        seed=seed_of("train" if train else "select", seed),
    )
    return [
        Series(f"phantom-{number:03}", f"phantom-{number:03}", one, mask.numpy() > 0)
        for number, (one, mask) in enumerate(zip(frames, masks, strict=True))
    ]


def _train(
    given: list[Series],
    folder: Path,
    chosen: dict[str, Any],
    *,
    networks: int,
    patch: int,
    width: int,
    depth: int,
    percentile: float,
    seed: int,
    device: str,
    **options: Any,
) -> dict[str, Any]:
    import numpy as np

    from gossamer.core.task import seed_of
    from gossamer.datasets.perfusion import series_task, stacked
    from gossamer.evaluate.uncertainty_selection import (
        Pool,
        Scan,
        calibrate,
        pool_network,
        save_pool,
        train_pool,
    )

    if networks < 2:
        raise InputError(f"a pool of {networks} leaves nothing to select; train 2 networks or more")
    if (folder / "network.json").exists() or (folder.is_dir() and not _is_pool(folder)):
        raise InputError(f"{folder} holds something else than a pool; choose another --pool")
    # Slices of one file stay on one side.
    subjects = sorted({one.subject for one in given})
    if len(subjects) < 2:
        raise InputError(
            f"there is only one file of series, {subjects[0]}; some must train and others validate"
        )
    order = np.random.default_rng(seed_of("validation", seed)).permutation(len(subjects))
    held = {subjects[at] for at in order[: max(1, round(0.2 * len(subjects)))]}
    parts = [
        stacked(one for one in given if (one.subject in held) is validates)
        for validates in (False, True)
    ]
    frames, height, breadth = parts[0][0].shape[1:]
    scan = replace(
        Scan(patch=patch, stride=max(1, patch // 4), fine_stride=max(1, patch // 32)), **chosen
    )
    # What cannot be scanned should be known before hours of training.
    scan.fine_grid(parts[0][0][0])
    if patch > min(height, breadth) or parts[1][0].shape[1:] != parts[0][0].shape[1:]:
        raise InputError("training and validation series need one shape")
    task = series_task(parts[0], parts[1], patch=patch)
    trained = train_pool(
        lambda: pool_network(frames, width=width, depth=depth),
        task, n=networks, seeds=range(seed, seed + networks), **options,
    )  # fmt: skip
    trained = [network.to(device) for network in trained]
    validation = [
        (series, mask.numpy() > 0) for series, mask in zip(parts[1][0], parts[1][1], strict=True)
    ]
    found = calibrate(trained, validation, scan, percentile=percentile)
    save_pool(folder, Pool(tuple(trained), frames, scan, found))
    return {
        "pool": str(folder),
        "networks": networks,
        "train_series": len(parts[0][0]),
        "validation_series": len(validation),
        "validation_dice": list(found.dice),
        "established": found.established,
        "threshold": _finite(found.threshold),
    }


def _is_pool(folder: Path) -> bool:
    return (folder / "pool.json").is_file() or not any(folder.iterdir())


def _select(
    given: list[Series], folder: Path, chosen: dict[str, Any], out: Path, device: str
) -> dict[str, Any]:
    from gossamer.core.files import write_json
    from gossamer.core.progress import progress
    from gossamer.datasets.perfusion import prepared
    from gossamer.evaluate.uncertainty_selection import Pool, load_pool

    read = load_pool(folder)
    try:
        networks = tuple(network.to(device) for network in read.networks)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"there is no device {device!r} here") from error
    # Another scan has another index, which the old threshold says nothing about.
    scan = replace(read.scan, **chosen)
    same = scan == read.scan
    pool = Pool(networks, read.frames, scan, read.calibration if same else None)
    repeated = {one.name for one in given if [other.name for other in given].count(one.name) > 1}
    if repeated:
        raise InputError(
            f"two series are called {min(repeated)}; their masks would overwrite each other"
        )
    series: list[dict[str, Any]] = []
    with progress() as bar:
        shown = bar.add_task("segmenting", total=len(given))
        for one in given:
            frames = prepared(one)
            try:
                selection = pool.select(frames)
            except InputError as error:
                raise InputError(f"{one.name} cannot be segmented: {error}") from error
            series.append(_record(one, selection, pool, read, out))
            bar.advance(shown)
    remarks = []
    if len(pool.networks) == 1:
        remarks.append(
            "The pool holds one network, so nothing was selected; its masks, uncertainty and flags "
            "stand."
        )
    if pool.calibration is None:
        remarks.append(
            "No threshold is known for these windows, so only empty masks are flagged; train a "
            "pool with them to have one."
        )
    report = {
        "pool": str(folder),
        "networks": len(pool.networks),
        "threshold": None if pool.calibration is None else _finite(pool.calibration.threshold),
        "established": None if read.calibration is None else read.calibration.established,
        "series": series,
        "remarks": remarks,
    }
    write_json(out / "selection.json", report)
    return report


def _record(one: Series, selection: Selection, pool: Pool, read: Pool, out: Path) -> dict[str, Any]:
    """Writes mask and map of a series; what the report says of it."""
    import numpy as np

    from gossamer.evaluate.sliding_windows import is_closed_ring
    from gossamer.evaluate.uncertainty_selection import dice

    folder = out / one.name
    ending = ".npy" if one.affine is None else ".nii.gz"
    _write(folder / f"mask{ending}", selection.mask.astype(np.uint8), one.affine)
    _write(folder / f"uncertainty{ending}", selection.u_map.astype(np.float32), one.affine)
    record: dict[str, Any] = {
        "name": one.name,
        "network": selection.index,
        "upp": [_finite(value) for value in selection.upp],
        "areas": selection.areas.tolist(),
        "closed_ring": is_closed_ring(selection.mask),
        "flagged": selection.flagged,
        "mask": str(folder / f"mask{ending}"),
        "uncertainty": str(folder / f"uncertainty{ending}"),
    }
    if one.mask is not None:
        mean = np.mean([view.probability for view in selection.views], 0)
        record["dice"] = {
            "selected": dice(selection.mask, one.mask),
            "ensemble": dice(pool.scan.mask_of(mean), one.mask),
            "oracle": max(dice(view.mask, one.mask) for view in selection.views),
        }
        if read.calibration is not None:
            mask = selection.views[read.calibration.established].mask
            record["dice"]["established"] = dice(mask, one.mask)
    return record


def _write(path: Path, image: np.ndarray, affine: np.ndarray | None) -> None:
    """An image ``[height, width]`` as ``.npy``, or as NIfTI [x, y, 1]."""
    import gzip

    import numpy as np

    from gossamer.core.files import whole_file

    with whole_file(path) as partial, open(partial, "wb") as file:
        if affine is None:
            np.save(file, image, allow_pickle=False)
        else:
            import nibabel

            volume = nibabel.Nifti1Image(image.T[:, :, None], affine)  # type: ignore[attr-defined]
            file.write(gzip.compress(volume.to_bytes()))


def _finite(value: float) -> float | None:
    """JSON knows no infinity."""
    return float(value) if value < float("inf") else None


def _show(report: dict[str, Any]) -> None:
    from rich.table import Table

    console = out_console()
    if "series" not in report:
        for number, value in enumerate(report["validation_dice"]):
            best = "  (established)" if number == report["established"] else ""
            console.print(f"network {number}: Dice {value:.3f} on validation series{best}")
        threshold = report["threshold"]
        flag = "empty masks only" if threshold is None else f"an index above {threshold:.3g}"
        console.print(f"{report['pool']}: {report['networks']} networks; flags {flag}")
        return
    truths = any("dice" in one for one in report["series"])
    table = Table("series", "network", "index", "pixels", "flag", *(["Dice"] if truths else []))
    for one in report["series"]:
        upp = one["upp"][one["network"]]
        cells = [
            one["name"], str(one["network"]), "empty" if upp is None else f"{upp:.3g}",
            str(one["areas"][one["network"]]), "review" if one["flagged"] else "",
        ]  # fmt: skip
        if truths:
            cells.append(f"{one['dice']['selected']:.3f}" if "dice" in one else "")
        table.add_row(*cells)
    console.print(table)
    known = [one["dice"] for one in report["series"] if "dice" in one]
    for name in ("selected", "established", "ensemble", "oracle"):
        values = [found[name] for found in known if name in found]
        if values:
            console.print(f"mean Dice, {name}: {sum(values) / len(values):.3f}")
    for remark in report["remarks"]:
        console.print(f"Note: {remark}")
