import os

import numpy as np
import pytest
import torch

from gossamer.core.errors import InputError
from gossamer.hardware import calibrate
from gossamer.hardware.calibrate import (
    Cache,
    cached_place,
    machine_device,
    measure_bandwidth,
    measure_peak,
    reported_caches,
)
from gossamer.hardware.device import Device, Figure, Memory, read_device


@pytest.fixture(scope="module")
def measured():
    return calibrate.calibrate(seconds=4)


def test_no_product_exceeds_the_peak(measured):
    """A ceiling: another large product, timed alone, stays below it (5 % for a shorter search)."""
    a, b = torch.randn(2, 384, 384).unbind()
    spent = calibrate._fastest(lambda: torch.mm(a, b), 0.3)
    assert 384**3 / spent <= 1.05 * measured.peak("float32")


def test_narrow_formats_are_no_slower(measured):
    assert measured.peak("int8") > 0.5 * measured.peak("float32")
    assert "measured 20" in measured.macs_per_second["float32"].source


def test_memories_go_from_fast_and_small_to_slow_and_large(measured):
    rates = [m.bytes_per_second.value for m in measured.memories]
    sizes = [m.bytes.value for m in measured.memories]
    assert rates == sorted(rates, reverse=True)
    assert sizes == sorted(sizes)
    assert measured.memories[-1].name == "memory"


def test_a_description_survives_its_file(measured, tmp_path):
    measured.write(tmp_path / "device.yaml")
    assert read_device(tmp_path / "device.yaml") == measured


def test_onnx_runtime_starts_an_operator_faster_than_torch(measured):
    starts = measured.operator_seconds
    assert 1e-8 < starts["onnxruntime"].value < starts["torch"].value < 1e-3


def test_sweeps_compute_what_their_bytes_say():
    a, b, c = (np.arange(64, dtype=np.float32) for _ in range(3))
    calibrate._triad(a, b, c, 3)
    np.testing.assert_array_equal(a, 3 * np.arange(64))
    calibrate._copy(a, b, 2)
    np.testing.assert_array_equal(a, np.arange(64) + 1)
    assert calibrate._read(b, 3) == 3 * np.arange(64).sum() + (0 + 1 + 2)


def test_a_larger_working_set_is_no_faster_than_the_nearest():
    near = measure_bandwidth(8 << 10, 16 << 10, seconds=0.3)
    far = measure_bandwidth(128 << 20, 128 << 20, seconds=0.6)
    assert near.value > far.value
    assert "1 thread" in near.source


def test_reads_caches_as_linux_reports_them(tmp_path):
    for index, (level, kind, size, cores) in enumerate(
        [(1, "Data", "48K", "0"), (1, "Instruction", "32K", "0"), (2, "Unified", "2048K", "0,32"),
         (3, "Unified", "36M", "0-15,32-47"), (4, "Unified", "nonsense", "0")]
    ):  # fmt: skip
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, value in zip(
            ("level", "type", "size", "shared_cpu_list"), (level, kind, size, cores), strict=True
        ):
            (folder / name).write_text(f"{value}\n")
    assert reported_caches(tmp_path) == [
        Cache("L1", 48 << 10, 1),
        Cache("L2", 2 << 20, 2),
        Cache("L3", 36 << 20, 32),
    ]
    assert reported_caches(tmp_path / "absent") == []


def test_a_machine_is_calibrated_once(tmp_path, monkeypatch):
    calls = []

    def fake(**options):
        calls.append(options)
        rates = {"float32": Figure(5e10, "counted")}
        memory = Memory("memory", None, Figure(2e10, "counted"))
        return Device("fake", "cpu", rates, (memory,), threads=1)

    monkeypatch.setattr(calibrate, "calibrate", fake)
    first = machine_device(tmp_path)
    assert machine_device(tmp_path) == first
    assert len(calls) == 1
    machine_device(tmp_path, threads=2)
    assert len(calls) == 2
    cached_place(tmp_path).write_text("name: [")  # damaged
    assert machine_device(tmp_path) == first
    assert len(calls) == 3
    assert read_device(cached_place(tmp_path)) == first


def test_what_is_at_hand_is_kept_or_brief(tmp_path, measured):
    brief = calibrate.device_at_hand(tmp_path)
    assert "briefly" in brief.macs_per_second["float32"].source
    assert list(brief.macs_per_second) == ["float32"]
    assert calibrate.device_at_hand(tmp_path) is brief  # once a process
    assert not list(tmp_path.iterdir())
    measured.write(cached_place(tmp_path))
    assert calibrate.device_at_hand(tmp_path) == measured


def test_a_home_that_cannot_be_written_is_no_failure(tmp_path, monkeypatch):
    device = Device(
        "fake", "cpu", {"float32": Figure(5e10, "counted")},
        (Memory("memory", None, Figure(2e10, "counted")),),
    )  # fmt: skip
    monkeypatch.setattr(calibrate, "calibrate", lambda **_: device)
    (tmp_path / "file").write_text("")
    assert machine_device(tmp_path / "file" / "below") == device


def test_the_cache_folder_is_where_the_user_wants_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cached_place().parent == tmp_path / "gossamer" / "devices"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cached_place().is_absolute()
    assert cached_place(threads=2) != cached_place(threads=1)


def test_bad_input():
    with pytest.raises(InputError, match="threads cannot be measured here"):
        calibrate.calibrate(threads=10_000)
    with pytest.raises(InputError, match="nothing here multiplies matrices of float7"):
        measure_peak("float7", seconds=0.01)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no GPU"):
            calibrate.calibrate(device="cuda")


@pytest.mark.gpu
def test_a_gpu_is_measured():
    device = calibrate.calibrate(device="cuda", seconds=8)
    assert device.kind == "gpu"
    assert device.peak("float16") > device.peak("float32")
    assert device.memories[-1].name == "memory"


def test_threads_are_left_as_they_were():
    before = torch.get_num_threads()
    threads = min(2, len(os.sched_getaffinity(0)))
    measure_peak("float32", threads=threads, seconds=0.05)
    assert torch.get_num_threads() == before
