"""Phantoms, patches, and series out of files of every kind."""

from __future__ import annotations

import sys
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from scipy.io import savemat

from gossamer.core.errors import InputError, MissingExtra
from gossamer.datasets.perfusion import (
    ACQUISITIONS,
    Acquisition,
    drawn_phantoms,
    joint_turn,
    open_series,
    prepared,
    read_dicom,
    read_series,
    series_task,
    stacked,
    standardised,
)
from gossamer.evaluate.sliding_windows import parts_and_holes

FRAMES = np.random.default_rng(0).normal(100.0, 20.0, (5, 12, 12)).astype(np.float32)
MASK = np.zeros((12, 12), dtype=np.uint8)
MASK[3:7, 4:9] = 1


def test_phantoms_are_rings_in_time() -> None:
    clean = Acquisition(noise=0.0, delay=(0.0, 0.0))
    series, masks = drawn_phantoms(40, acquisition=clean, seed=0)
    assert torch.allclose(series.mean((1, 2, 3)), torch.zeros(40), atol=1e-5)
    assert torch.allclose(series.std((1, 2, 3), correction=0), torch.ones(40), atol=1e-4)
    assert all(parts_and_holes(mask.numpy() > 0) == (1, 1) for mask in masks)
    ring = [(one * mask).sum((1, 2)) for one, mask in zip(series, masks, strict=True)]
    assert all(int(course.argmax()) == 7 for course in ring)
    # Before the myocardium comes the cavity, of about twice the amplitude.
    cavity = series[0][:, 32, 32]
    assert abs(int(cavity.argmax()) - 5) <= 1


def test_phantoms_are_a_function_of_the_seed() -> None:
    one, other, third = (drawn_phantoms(3, seed=seed)[0] for seed in (1, 1, 2))
    assert one.equal(other) and not one.equal(third)


def test_acquisitions_shift_time_contrast_and_noise() -> None:
    def course(name: str) -> float:
        how = ACQUISITIONS[name]
        series, masks = drawn_phantoms(40, frames=20, acquisition=how, seed=3)
        curve = (series * masks[:, None]).sum((0, 2, 3))
        return int(curve.argmax()) / 2

    assert course("early") < course("in-domain") < course("late")

    def roughness(acquisition: Acquisition) -> float:
        series, _ = drawn_phantoms(20, acquisition=acquisition, seed=3)
        return float((series[:, 0, :4, 1:] - series[:, 0, :4, :-1]).abs().mean())

    # Of standardised series: noise also raises what they are divided by.
    home, noisy = roughness(ACQUISITIONS["in-domain"]), roughness(ACQUISITIONS["noisy"])
    assert noisy > 1.1 * home > 1.1 * 1.5 * roughness(Acquisition(noise=0.1))
    blurred, _ = drawn_phantoms(5, acquisition=Acquisition(noise=0.0, blurred=True), seed=4)
    sharp, _ = drawn_phantoms(5, acquisition=Acquisition(noise=0.0), seed=4)
    assert blurred.diff(dim=3).abs().max() < sharp.diff(dim=3).abs().max()


@pytest.mark.parametrize(
    "options",
    [
        {"count": 0}, {"count": 1, "frames": 1}, {"count": 1, "size": 8},
        {"count": 1, "acquisition": Acquisition(noise=-1.0)},
        {"count": 1, "acquisition": Acquisition(delay=(1.0, 0.0))},
    ],
)  # fmt: skip
def test_phantoms_that_cannot_be(options: dict) -> None:
    with pytest.raises(InputError):
        drawn_phantoms(**options)


def test_standardising_refuses_what_shows_nothing() -> None:
    found = standardised(torch.tensor([[[1.0, 3.0]], [[1.0, 3.0]]]))
    assert found.flatten().tolist() == [-1.0, 1.0, -1.0, 1.0]
    for value, says in ((7.0, "same value everywhere"), (torch.nan, "NaN")):
        with pytest.raises(InputError, match=says):
            standardised(torch.full((2, 4, 4), value))


def test_patches_keep_series_and_mask_together() -> None:
    masks = (torch.rand(8, 20, 20, generator=torch.Generator().manual_seed(0)) > 0.5).long()
    series = torch.stack([masks.float(), -masks.float(), 2.0 * masks], 1)
    task = series_task((series, masks), (series, masks), patch=12)
    seen = set()
    for epoch in range(3):
        for patches, labels in task.batches("train", batch_size=4, seed=0, epoch=epoch):
            assert patches.shape[2:] == labels.shape[1:] == (12, 12)
            for frame, factor in enumerate((1.0, -1.0, 2.0)):
                torch.testing.assert_close(
                    patches[:, frame], factor * labels.float(), atol=1e-5, rtol=0.0
                )
            seen |= {tuple(patch.flatten().tolist()) for patch in labels}
    assert len(seen) == 24  # cut at another place each time
    whole, labels = next(task.batches("validation", batch_size=8))
    assert whole.equal(series) and labels.equal(masks)
    with pytest.raises(InputError, match="sides of at least the patch"):
        series_task((series, masks), (series, masks), patch=24)
    with pytest.raises(InputError, match="have 3 frames and the validation series 2"):
        series_task((series, masks), (series[:, :2], masks), patch=12)


def test_turns_come_in_four() -> None:
    image = torch.arange(9.0).view(1, 1, 3, 3).expand(64, -1, -1, -1)
    turned, masks = joint_turn()(image, image[:, 0].long(), torch.Generator().manual_seed(0))
    assert turned[:, 0].long().equal(masks)
    assert {tuple(m.flatten().tolist()) for m in masks} == {
        tuple(image[0, 0].rot90(k).long().flatten().tolist()) for k in range(4)
    }
    with pytest.raises(InputError, match="square"):
        joint_turn()(torch.zeros(1, 1, 2, 3), torch.zeros(1, 2, 3).long(), torch.Generator())


def test_numpy_and_matlab_files(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", FRAMES)
    np.save(tmp_path / "a_mask.npy", MASK)
    savemat(tmp_path / "b.mat", {"perfusion": FRAMES.transpose(1, 2, 0)})
    savemat(tmp_path / "b_mask.mat", {"mask": MASK})
    savemat(tmp_path / "c.mat", {"perfusion": FRAMES, "rate": 1.0})
    (tmp_path / "notes.txt").write_text("not a series")
    found = open_series(tmp_path)
    assert [one.name for one in found] == ["a", "b", "c"]
    for one in found:
        np.testing.assert_array_equal(one.frames, FRAMES)
    assert all(one.mask is not None and np.array_equal(one.mask, MASK == 1) for one in found[:2])
    assert found[2].mask is None
    (alone,) = open_series(tmp_path / "a.npy")
    assert alone.mask is not None
    (last,) = read_series(tmp_path / "a.npy", time_axis=2)
    np.testing.assert_array_equal(last.frames, FRAMES.transpose(2, 0, 1))
    frames, masks = stacked(found[:2])
    np.testing.assert_allclose(frames[1], standardised(torch.from_numpy(FRAMES)), atol=1e-6)
    assert masks.sum() == 2 * MASK.sum()
    with pytest.raises(InputError, match="c has no mask"):
        stacked(found)


def test_nifti_files_give_a_series_for_each_slice(tmp_path: Path) -> None:
    volume = np.stack([FRAMES, 2.0 * FRAMES], 0).transpose(3, 2, 0, 1)  # x, y, slice, time
    affine = np.diag([1.5, 1.5, 8.0, 1.0])
    nibabel.Nifti1Image(volume, affine).to_filename(tmp_path / "p.nii.gz")
    both = np.stack([MASK.T, MASK.T[::-1]], 2)
    nibabel.Nifti1Image(both, affine).to_filename(tmp_path / "p_mask.nii.gz")
    one, two = open_series(tmp_path)
    assert (one.name, two.name, one.subject) == ("p-slice0", "p-slice1", "p")
    np.testing.assert_array_equal(one.frames, FRAMES)
    np.testing.assert_array_equal(two.frames, 2.0 * FRAMES)
    assert one.mask is not None and np.array_equal(one.mask, MASK == 1)
    assert two.mask is not None and np.array_equal(two.mask, (MASK == 1)[:, ::-1])
    assert one.affine is not None and np.array_equal(one.affine, affine)


def write_dicom(path: Path, pixels: np.ndarray, **tags: object) -> None:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    image = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated = image.BitsStored = 16
    image.HighBit, image.PixelRepresentation = 15, 0
    image.Rows, image.Columns = pixels.shape[-2:]
    if pixels.ndim == 3:
        image.NumberOfFrames = len(pixels)
    image.PixelData = pixels.astype("<u2").tobytes()
    for name, value in tags.items():
        setattr(image, name, value)
    image.save_as(path, enforce_file_format=True)


def test_dicom_folders_are_ordered_by_time_and_place(tmp_path: Path) -> None:
    whole = FRAMES.round().astype(np.uint16)
    folder = tmp_path / "scan"
    folder.mkdir()
    for number in (3, 0, 4, 1, 2):
        for place in (0.0, 8.0):
            write_dicom(
                folder / f"i{9 - number}-{place:g}.dcm", whole[number] + int(place),
                SeriesInstanceUID="1.2.3", ImagePositionPatient=[0, 0, place],
                AcquisitionTime=f"1015{number:02d}.5", InstanceNumber=1, RescaleSlope=2,
                RescaleIntercept=-10,
            )  # fmt: skip
    np.save(tmp_path / "scan_mask.npy", np.stack([MASK, MASK]))
    for found in (open_series(tmp_path), open_series(folder)):
        assert [one.name for one in found] == ["scan-slice0", "scan-slice1"]
        np.testing.assert_array_equal(found[0].frames, 2.0 * whole - 10.0)
        np.testing.assert_array_equal(found[1].frames, 2.0 * whole + 6.0)
        assert all(one.mask is not None and one.mask.sum() == 20 for one in found)
    write_dicom(tmp_path / "frames.dcm", whole)
    (many,) = read_series(tmp_path / "frames.dcm")
    np.testing.assert_array_equal(many.frames, whole)


def test_dicom_that_cannot_be_a_series(tmp_path: Path) -> None:
    whole = FRAMES.round().astype(np.uint16)
    single, mixed, timeless, colours = (tmp_path / name for name in "abcd")
    for folder in (single, mixed, timeless, colours):
        folder.mkdir()
    write_dicom(single / "1.dcm", whole[0])
    write_dicom(mixed / "1.dcm", whole[0], InstanceNumber=1)
    write_dicom(mixed / "2.dcm", whole[1, :6], InstanceNumber=2)
    for number in range(2):
        write_dicom(timeless / f"{number}.dcm", whole[number], InstanceNumber=1)
    write_dicom(colours / "1.dcm", whole[0])
    data = pydicom.dcmread(colours / "1.dcm")
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PlanarConfiguration = 3, "RGB", 0
    data.Columns = 4
    data.save_as(colours / "1.dcm")
    for folder, says in (
        (single, "single image"),
        (mixed, "different sizes"),
        (timeless, "cannot be ordered"),
        (colours, "colours"),
    ):
        with pytest.raises(InputError, match=says):
            read_dicom(folder)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    def refused(says: str, path: Path = tmp_path) -> None:
        with pytest.raises(InputError, match=says) as error:
            open_series(path)
        assert "\n" not in str(error.value)

    refused("does not exist", tmp_path / "missing")
    refused("holds no series")
    for name in ("x.npy", "x.mat", "x.nii", "x.nii.gz", "x.dcm"):
        (tmp_path / name).write_bytes(b"\x93NUMPY nonsense" * 20)
        refused("read|not a DICOM", tmp_path / name)
        (tmp_path / name).write_bytes(b"")
        refused("read|not a DICOM", tmp_path / name)
        (tmp_path / name).unlink()
    (tmp_path / "x.txt").write_text("x")
    refused("no file of a series", tmp_path / "x.txt")
    np.save(tmp_path / "x.npy", np.zeros((4, 4)))
    refused("has shape")
    np.save(tmp_path / "x.npy", np.array([{}] * 2), allow_pickle=True)
    refused("can be read")
    np.save(tmp_path / "x.npy", FRAMES[:1])
    refused("2 or more")
    np.save(tmp_path / "x.npy", FRAMES.astype(complex))
    refused("real numbers")
    np.save(tmp_path / "x.npy", np.where(FRAMES > 140.0, np.nan, FRAMES))
    refused("NaN")
    np.save(tmp_path / "x.npy", FRAMES)
    np.save(tmp_path / "x_mask.npy", MASK[:5])
    refused("do not go with")
    (tmp_path / "x.npy").unlink()
    (tmp_path / "x_mask.npy").unlink()
    savemat(tmp_path / "x.mat", {"one": FRAMES, "two": FRAMES})
    refused("exactly one is needed")
    savemat(tmp_path / "x.mat", {"one": np.zeros((4, 5, 6))})
    refused("cannot be told from its sides")
    (tmp_path / "x.mat").unlink()
    nibabel.Nifti1Image(np.zeros((4, 4, 3), np.float32), np.eye(4)).to_filename(tmp_path / "x.nii")
    refused("4D")
    constant = tmp_path / "constant.npy"
    np.save(constant, np.ones((3, 4, 4)))
    with pytest.raises(InputError, match="constant cannot be used"):
        prepared(read_series(constant)[0])
    np.save(tmp_path / "constant_mask.npy", np.zeros((4, 4)))
    with pytest.raises(InputError, match="empty mask"):
        stacked(open_series(constant))


@pytest.mark.parametrize(("package", "name"), [("nibabel", "x.nii"), ("pydicom", "x.dcm")])
def test_a_missing_library_says_which_extra(
    package: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(MissingExtra, match=r"gossamer\[medical\]"):
        open_series(tmp_path / name)
