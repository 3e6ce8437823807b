"""Dynamic image series with one mask each: drawn phantoms, and readers of the usual files.

A series is ``[frames, height, width]``: one slice of the heart while contrast agent passes through
it, motion corrected and cropped around the heart. The phantoms imitate the first pass (right
ventricle, left ventricle, myocardium, one after the other) and what makes other scanners and
sequences different; they stand in for clinical data where there are none and prove nothing about
patients. Readers take ``.npy``, MATLAB's ``.mat``, NIfTI (4D, a series for each slice) and DICOM.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from gossamer.core.errors import InputError, MissingExtra, first_line
from gossamer.core.segmentation import (
    JointAugment,
    Segmentation,
    joint_compose,
    joint_flip,
    joint_scale_crop,
)
from gossamer.core.task import Preprocess, seed_of

CLASSES = ("background", "myocardium")
"""Of every mask, in label order."""

FORMATS = (".npy", ".mat", ".nii", ".nii.gz", ".dcm")
"""Endings of files of series; a folder of ``.dcm`` files (or files without ending) is one, too."""


# Phantoms ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Acquisition:
    """How a phantom was taken; the defaults are those of the training data.

    Attributes:
        delay: lower and upper bound of the delay of the whole passage, in tenths of the series.
        contrast: of everything the agent reaches, times a number in .7..1.1 for each series.
        noise: standard deviation of a pixel, times a number in .7..1.3 for each series.
        blurred: a 3 x 3 mean before the noise.
    """

    delay: tuple[float, float] = (-0.5, 0.5)
    contrast: float = 1.0
    noise: float = 0.3
    blurred: bool = False


ACQUISITIONS: Mapping[str, Acquisition] = {
    "in-domain": Acquisition(),
    "late": Acquisition(delay=(0.0, 1.0), contrast=0.8, noise=0.4),
    "early": Acquisition(delay=(-1.0, 0.0), contrast=0.6, blurred=True),
    "noisy": Acquisition(noise=0.6),
}
"""The training domain and three that are shifted."""


def drawn_phantoms(
    count: int,
    *,
    frames: int = 10,
    size: int = 64,
    acquisition: Acquisition | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Draws phantoms of the first pass of contrast agent through a heart in short axis.

    An elliptical ring (myocardium, peak at 7.2 tenths of the series, amplitude .55) around a cavity
    (peak at 5, amplitude 1), a second ventricle beside it (2.5, .9), a background of still blocks,
    and in half of the series a sector of the ring that stays dark.

    Args:
        count: series.
        frames: of each.
        size: side in pixels.
        acquisition: how they are taken. Default: as the training data.
        seed: of everything that is drawn.

    Returns:
        Series ``[count, frames, size, size]``, float32, each of zero mean and unit variance, and
        masks ``[count, size, size]`` (1 is myocardium), int64.

    Raises:
        InputError: if there is nothing to draw, or contrast or noise are negative.
    """
    how = acquisition or Acquisition()
    if count < 1 or frames < 2 or size < 16:
        raise InputError(
            "phantoms need a count of 1 or more, 2 frames or more and sides of 16 pixels or more, "
            f"not {count}, {frames} and {size}"
        )
    if how.contrast < 0.0 or how.noise < 0.0 or how.delay[0] > how.delay[1]:
        raise InputError(
            "contrast and noise of phantoms are 0 or more and delays ascend, not "
            f"{how.contrast:g}, {how.noise:g} and {how.delay}"
        )
    generator = torch.Generator().manual_seed(seed_of("phantoms", seed))

    def drawn(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, generator=generator)

    # Lengths are in 64ths of the side, angles in radians.
    axis = (torch.arange(size) + 0.5) * 64.0 / size
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    across, down = x - drawn(27.0, 37.0), y - drawn(27.0, 37.0)
    turn, outer, ratio = drawn(0.0, np.pi), drawn(13.0, 18.0), drawn(0.8, 1.0)
    u = turn.cos() * across + turn.sin() * down
    v = (turn.cos() * down - turn.sin() * across) / ratio
    distance = (u.square() + v.square()).sqrt() / outer
    inner = drawn(0.55, 0.7)
    ring = (distance <= 1.0) & (distance > inner)
    cavity = distance <= inner

    towards, radius = drawn(-0.5, 0.5), drawn(8.0, 12.0)
    away = outer + 0.5 * radius
    right = (across + away * towards.cos()).square() + (down - away * towards.sin()).square()
    second = (right <= radius.square()) & (distance > 1.0)

    middle, half, left = drawn(-np.pi, np.pi), drawn(0.3, 0.7), drawn(0.2, 0.5)
    angle = torch.atan2(v, u) - middle
    inside = torch.atan2(angle.sin(), angle.cos()).abs() < half
    dark = inside & (drawn(0.0, 1.0) < 0.5)
    supply = torch.where(dark, left, torch.ones_like(left))

    time = torch.arange(frames) * 10.0 / frames
    delay = drawn(*how.delay)[:, :, 0]

    def bump(peak: float, width: float) -> Tensor:
        return torch.exp(-0.5 * ((time - peak - delay) / width).square())[:, :, None, None]

    signal = (
        0.9 * bump(2.5, 1.2) * second[:, None]
        + 1.0 * bump(5.0, 1.5) * cavity[:, None]
        + 0.55 * bump(7.2, 1.8) * (ring * supply)[:, None]
    )
    blocks = 0.4 * torch.rand(count, 8, 8, generator=generator)
    still = blocks[:, :, (axis / 8.0).long()][:, (axis / 8.0).long()]
    images = still[:, None] + how.contrast * drawn(0.7, 1.1)[..., None] * signal
    if how.blurred:
        images = avg_pool2d(pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    noise = torch.randn(images.shape, generator=generator)
    images = images + how.noise * drawn(0.7, 1.3)[..., None] * noise
    return standardised(images), ring.long()


def standardised(series: Tensor) -> Tensor:
    """Each series ``[..., frames, height, width]`` with zero mean and unit variance, float32.

    Raises:
        InputError: if a series holds NaN or infinity, or is the same everywhere.
    """
    wide = series.double()
    if not bool(wide.isfinite().all()):
        raise InputError("a series holds NaN or infinity")
    mean = wide.mean((-3, -2, -1), keepdim=True)
    deviation = wide.var((-3, -2, -1), correction=0, keepdim=True).sqrt()
    if bool((deviation <= 1e-12 * mean.abs().clamp(min=1e-12)).any()):
        raise InputError("a series has the same value everywhere: there is nothing to see in it")
    return ((wide - mean) / deviation).float()


def joint_turn() -> JointAugment:
    """Turns image and mask by 0, 90, 180 or 270 degrees, each with the same chance.

    Raises:
        InputError: when applied to images that are not square.
    """

    def apply(images: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if images.shape[2] != images.shape[3]:
            raise InputError("only square images can be turned by quarters")
        quarters = torch.randint(0, 4, (len(images),), generator=generator)
        each = torch.arange(len(images))
        return (
            torch.stack([images.rot90(k, (2, 3)) for k in range(4)])[quarters, each],
            torch.stack([masks.rot90(k, (1, 2)) for k in range(4)])[quarters, each],
        )

    return apply


def series_task(
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    *,
    patch: int,
    name: str = "series",
    turns: bool = True,
) -> Segmentation:
    """The task of segmenting patches of series, cut at random places; frames are channels.

    Args:
        train: standardised series ``[n, frames, height, width]`` and masks ``[n, height, width]``.
        validation: the same.
        patch: side of the patches, pixels.
        name: for reports.
        turns: flip and turn patches at random.

    Raises:
        InputError: if shapes do not go together or a patch does not fit.
    """
    for series, _ in (train, validation):
        if series.ndim != 4 or min(series.shape[2:]) < patch:
            raise InputError(
                f"series are [n, frames, height, width] with sides of at least the patch of "
                f"{patch} pixels, not {list(series.shape)}"
            )
    frames = train[0].shape[1]
    if validation[0].shape[1] != frames:
        raise InputError(
            f"the training series have {frames} frames and the validation series "
            f"{validation[0].shape[1]}; all need the same number"
        )
    crop = joint_scale_crop((patch, patch), scales=(1.0,))
    return Segmentation(
        {"train": train, "validation": validation},
        # Each series was standardised as a whole; a patch must not be.
        Preprocess(frames, patch, patch, (0.0,) * frames, (1.0,) * frames, scale=1.0),
        CLASSES,
        name=name,
        augment=joint_compose(crop, joint_flip(), joint_turn()) if turns else crop,
    )


# Files ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """One series out of a file.

    Attributes:
        name: of the file, and of the slice in it.
        subject: of the file; slices of one file are never split between training and validation.
        frames: as stored, ``[frames, height, width]``, float32.
        mask: of the file beside it, bool ``[height, width]``; None without one.
        affine: of a NIfTI file, ``[4, 4]``: what is written for it gets the same.
    """

    name: str
    subject: str
    frames: Tensor
    mask: np.ndarray | None = None
    affine: np.ndarray | None = field(default=None, repr=False)


def open_series(path: str | Path, *, time_axis: int | None = None) -> list[Series]:
    """Reads a file, a DICOM folder, or a folder of such files and DICOM folders.

    The mask of ``NAME.npy``, ``NAME.mat``, ``NAME.nii.gz`` or the folder ``NAME`` is a file
    ``NAME_mask`` with the ending ``.npy``, ``.mat``, ``.nii`` or ``.nii.gz`` beside it; whatever is
    not 0 in it is myocardium.

    Args:
        path: the file or folder.
        time_axis: which axis of ``.npy`` and ``.mat`` arrays is time. Default: the first of
            ``.npy``; in ``.mat`` files, where both customs exist, the one that is not among the
            two equal sides.

    Raises:
        InputError: if nothing is found, a file cannot be read, holds no series, or its mask does
            not fit.
        MissingExtra: if nibabel or pydicom is needed and not installed.
    """
    root = Path(path)
    if not root.exists():
        raise InputError(f"{root} does not exist")
    if root.is_file():
        return _with_masks(root, read_series(root, time_axis=time_axis), root.parent)
    if _dicom_files(root):
        return _with_masks(root, read_dicom(root), root.parent)
    found: list[Series] = []
    for entry in sorted(root.iterdir()):
        stem, ending = _parts(entry)
        if entry.name.startswith(".") or stem.endswith("_mask"):
            continue
        if entry.is_dir():
            if _dicom_files(entry):
                found += _with_masks(entry, read_dicom(entry), root)
        elif ending in FORMATS:
            found += _with_masks(entry, read_series(entry, time_axis=time_axis), root)
    if not found:
        raise InputError(f"{root} holds no series; they are files {', '.join(FORMATS)}")
    return found


def read_series(path: Path, *, time_axis: int | None = None) -> list[Series]:
    """Reads one file; a 4D NIfTI file gives a series for each slice, others give one.

    Raises:
        InputError: if the file cannot be read or holds no series.
        MissingExtra: if nibabel or pydicom is needed and not installed.
    """
    stem, ending = _parts(path)
    match ending:
        case ".npy" | ".mat":
            array = _npy(path) if ending == ".npy" else _mat(path, 3)
            if array.ndim != 3:
                raise InputError(
                    f"{path} has shape {list(array.shape)}; a series is [frames, height, width]"
                )
            axis = time_axis
            if axis is None:
                axis = 0 if ending == ".npy" else _time_of(array.shape, path)
            if not -3 <= axis < 3:
                raise InputError(f"time is axis 0, 1 or 2 of {path}, not {axis}")
            return [Series(stem, stem, _frames(np.moveaxis(array, axis, 0), path))]
        case ".nii" | ".nii.gz":
            volume, affine = _nifti(path)
            if volume.ndim != 4:
                raise InputError(
                    f"{path} has shape {list(volume.shape)}; a series of slices over time is 4D "
                    "[x, y, slice, time]"
                )
            return [
                Series(
                    stem if volume.shape[2] == 1 else f"{stem}-slice{z}",
                    stem,
                    _frames(volume[:, :, z].transpose(2, 1, 0), path),
                    affine=affine,
                )
                for z in range(volume.shape[2])
            ]
        case ".dcm":
            return read_dicom(path)
    raise InputError(f"{path} is no file of a series; they are {', '.join(FORMATS)}")


def read_dicom(path: Path) -> list[Series]:
    """Reads the images of a folder, or the frames of one file: a series for each slice.

    Images belong together if they are of one series (its UID) and one place; they are put in the
    order of time (temporal position, acquisition time, instance number: the first that tells them
    apart). Slope and intercept are applied.

    Raises:
        InputError: if a file cannot be read, is no grey image, or sizes differ.
        MissingExtra: if pydicom is not installed.
    """
    try:
        import pydicom
        from pydicom.errors import InvalidDicomError
    except ModuleNotFoundError as error:
        raise MissingExtra("pydicom", "medical") from error
    path = Path(path)
    files = [path] if path.is_file() else _dicom_files(path)
    groups: dict[tuple[str, tuple[float, ...]], list[tuple[Any, np.ndarray]]] = {}
    for file in files:
        try:
            image = pydicom.dcmread(file)
            pixels = np.asarray(image.pixel_array)
        except InvalidDicomError as error:
            raise InputError(f"{file} is not a DICOM file") from error
        # Decoders and headers meet arbitrary bytes and raise nearly anything.
        except Exception as error:
            raise InputError(f"{file} cannot be read: {first_line(error)}") from error
        if int(image.get("SamplesPerPixel", 1)) != 1:
            raise InputError(f"{file} has colours; a grey image is needed")
        slope, intercept = image.get("RescaleSlope", 1), image.get("RescaleIntercept", 0)
        pixels = pixels * float(slope or 1) + float(intercept or 0)
        place = tuple(float(v) for v in image.get("ImagePositionPatient", None) or ())
        groups.setdefault((str(image.get("SeriesInstanceUID", "")), place), []).append(
            (image, pixels)
        )
    stem = _parts(path)[0]
    found = []
    for number, ((_, place), images) in enumerate(sorted(groups.items(), key=lambda g: g[0])):
        if len({pixels.shape for _, pixels in images}) > 1:
            raise InputError(f"the images of {path} at {place} have different sizes")
        if len(images) == 1:
            stack = images[0][1]
            if stack.ndim != 3:
                raise InputError(f"{path} has a single image at {place}; a series needs frames")
        else:
            stack = np.stack([pixels for _, pixels in _in_time(images, path)])
        name = stem if len(groups) == 1 else f"{stem}-slice{number}"
        found.append(Series(name, stem, _frames(stack, path)))
    return found


def _in_time(
    images: Sequence[tuple[Any, np.ndarray]], path: Path
) -> Sequence[tuple[Any, np.ndarray]]:
    for tag in ("TemporalPositionIdentifier", "AcquisitionTime", "InstanceNumber"):
        values = [image.get(tag) for image, _ in images]
        if all(value not in (None, "") for value in values):
            times = [float(value) for value in values]
            if len(set(times)) == len(times):
                return [images[at] for at in np.argsort(times)]
    raise InputError(
        f"the images of {path} cannot be ordered: temporal position, acquisition time and instance "
        "number are missing or repeat"
    )


def stacked(series: Iterable[Series]) -> tuple[Tensor, Tensor]:
    """Labelled series of one shape as standardised tensors, see :func:`series_task`.

    Raises:
        InputError: if one has no mask, an empty one, or another shape.
    """
    frames, masks = [], []
    for one in series:
        if one.mask is None or not one.mask.any():
            lack = "has no mask" if one.mask is None else "has an empty mask"
            raise InputError(f"{one.name} {lack}; networks learn from labelled series only")
        if frames and one.frames.shape != frames[0].shape:
            raise InputError(
                f"{one.name} is {list(one.frames.shape)} and others are {list(frames[0].shape)}; "
                "networks learn from series of one number of frames and one size"
            )
        frames.append(prepared(one))
        masks.append(torch.from_numpy(one.mask.astype(np.int64)))
    if not frames:
        raise InputError("there is no labelled series to learn from")
    return torch.stack(frames), torch.stack(masks)


def prepared(series: Series) -> Tensor:
    """The standardised frames of a series, ``[frames, height, width]``.

    Raises:
        InputError: if it holds NaN or infinity, or is the same everywhere.
    """
    try:
        return standardised(series.frames)
    except InputError as error:
        raise InputError(f"{series.name} cannot be used: {error}") from error


def _parts(path: Path) -> tuple[str, str]:
    """Name without ending, and the ending in lower case (".nii.gz" is one)."""
    name = path.name
    if path.is_dir():
        return name, ""
    ending = ".nii.gz" if name.lower().endswith(".nii.gz") else path.suffix.lower()
    return name[: len(name) - len(ending)], ending


def _dicom_files(folder: Path) -> list[Path]:
    return [
        file
        for file in sorted(folder.iterdir())
        if file.is_file() and not file.name.startswith(".") and file.suffix.lower() in (".dcm", "")
    ]


def _with_masks(path: Path, found: list[Series], beside: Path) -> list[Series]:
    stem = _parts(path)[0]
    files = [beside / f"{stem}_mask{end}" for end in (".npy", ".mat", ".nii", ".nii.gz")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return found
    ending = _parts(file)[1]
    if ending == ".npy":
        masks = _npy(file)
    elif ending == ".mat":
        masks = _mat(file, 2)
    else:
        masks = np.moveaxis(np.atleast_3d(np.squeeze(_nifti(file)[0])), 2, 0).transpose(0, 2, 1)
    if masks.ndim == 2:
        masks = masks[None]
    if len(masks) != len(found) or any(
        mask.shape != one.frames.shape[1:] for mask, one in zip(masks, found, strict=True)
    ):
        raise InputError(
            f"{file} holds {len(masks)} masks of {list(masks.shape[1:])}, which do not go with "
            f"{len(found)} series of {list(found[0].frames.shape[1:])}"
        )
    if masks.dtype.kind == "f" and not np.isfinite(masks).all():
        raise InputError(f"{file} holds NaN or infinity")
    return [replace(one, mask=mask != 0) for one, mask in zip(found, masks, strict=True)]


def _frames(array: np.ndarray, path: Path) -> Tensor:
    if array.dtype.kind not in "uif" or array.dtype.itemsize > 8:
        raise InputError(f"{path} holds {array.dtype}; real numbers are needed")
    if len(array) < 2 or min(array.shape) < 1:
        raise InputError(
            f"{path} has {len(array)} frames of {array.shape[1:]}; a series has 2 or more"
        )
    frames = torch.from_numpy(np.array(array, dtype=np.float32, order="C"))
    if not bool(frames.isfinite().all()):
        raise InputError(f"{path} holds NaN or infinity")
    return frames


def _npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise InputError(f"{path} is not an .npy file that can be read: {first_line(error)}") from (
            error
        )


def _mat(path: Path, axes: int) -> np.ndarray:
    from scipy.io import loadmat

    try:
        content = loadmat(path)
    except NotImplementedError as error:
        raise InputError(
            f"{path} is a .mat file of version 7.3; save it with save(..., '-v7')"
        ) from error
    # A doctored file makes the reader raise nearly anything.
    except Exception as error:
        raise InputError(f"{path} is not a .mat file that can be read: {first_line(error)}") from (
            error
        )
    arrays = {
        name: value
        for name, value in content.items()
        if isinstance(value, np.ndarray) and value.ndim == axes and value.dtype.kind in "uifb"
        if value.size > 1 and not name.startswith("__")
    }
    if len(arrays) != 1:
        raise InputError(
            f"{path} holds {len(arrays)} arrays with {axes} axes "
            f"({', '.join(arrays) or 'none'}); exactly one is needed"
        )
    return next(iter(arrays.values()))


def _time_of(shape: tuple[int, ...], path: Path) -> int:
    odd = [axis for axis in (0, 2) if len({*shape[:axis], *shape[axis + 1 :]}) == 1]
    if len(odd) != 1:
        raise InputError(
            f"which axis of {path} {list(shape)} is time cannot be told from its sides; say it "
            "with a time axis of 0 or 2"
        )
    return odd[0]


def _nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        import nibabel
    except ModuleNotFoundError as error:
        raise MissingExtra("nibabel", "medical") from error
    try:
        image: Any = nibabel.load(path)  # type: ignore[attr-defined]
        return np.asarray(image.get_fdata(dtype=np.float32)), np.asarray(image.affine)
    # Headers and compressed data meet arbitrary bytes and raise nearly anything.
    except Exception as error:
        raise InputError(f"{path} is not a NIfTI file that can be read: {first_line(error)}") from (
            error
        )
