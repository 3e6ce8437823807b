"""Descriptions of devices: read, written, and refused where a figure is impossible."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core.errors import GossamerError, InputError
from gossamer.hardware.device import Device, Figure, Memory, known_devices, read_device


def figure(value: float) -> Figure:
    return Figure(value, "measured")


def small(**changes: object) -> Device:
    fields: dict = {
        "name": "a board",
        "kind": "cpu",
        "macs_per_second": {"float32": figure(4e9), "int8": figure(1.6e10)},
        "memories": (
            Memory("L1", figure(32768), figure(1e11)),
            Memory("main memory", figure(1e9), figure(2e9)),
        ),
        "threads": 1,
        "operator_seconds": {"torch": figure(5e-6)},
    }
    return Device(**{**fields, **changes})


def test_a_description_survives_a_file(tmp_path: Path) -> None:
    device = small()
    device.write(tmp_path / "board.yaml")
    assert read_device(tmp_path / "board.yaml") == device
    assert device.ridge() == 2.0 and device.ridge("int8", "L1") == pytest.approx(0.16)


@pytest.mark.parametrize("name", known_devices())
def test_the_devices_that_come_with_it_can_be_read(name: str) -> None:
    device = read_device(name)
    assert device.peak() > 1e12 and device.memory() is device.memories[-1]
    figures = [*device.macs_per_second.values()]
    figures += [f for m in device.memories for f in (m.bytes, m.bytes_per_second) if f]
    assert all(f.source for f in figures)


def test_the_a100s_ridge_is_that_of_its_data_sheet() -> None:
    # 312 TFLOPS and 2,039 GB/s: 153 operations a byte, two operations a MAC.
    assert 2 * read_device("a100-sxm-80gb").ridge("float16") == pytest.approx(153.0, abs=0.05)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"macs_per_second": {"float32": figure(0)}}, "macs_per_second of float32 is 0"),
        ({"macs_per_second": {"float32": figure(float("nan"))}}, "float32 is nan"),
        ({"macs_per_second": {"float31": figure(1e9)}}, "float31 is no number format"),
        ({"macs_per_second": {}}, "peak rate"),
        ({"operator_seconds": {"torch": figure(-1e-6)}}, "operator_seconds of torch"),
        ({"memories": (Memory("ram"),)}, "bandwidth of at least one"),
        (
            {"memories": (Memory("a", figure(1e6), figure(1e9)), Memory("b", figure(1e3)))},
            "a is larger than b",
        ),
        (
            {"memories": (Memory("a", None, figure(1e9)), Memory("b", None, figure(1e10)))},
            "a is slower than b",
        ),
        ({"memories": (Memory("a", None, figure(1e9)), Memory("a"))}, "two memories"),
    ],
)
def test_impossible_figures_are_named(change: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        small(**change)


def test_unknown_figures_are_asked_for_by_name() -> None:
    with pytest.raises(InputError, match="no peak rate for float16; it has float32, int8"):
        small().peak("float16")
    with pytest.raises(InputError, match="no bandwidth for L2; it has L1, main memory"):
        small().bandwidth("L2")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "must be a mapping"),
        ("name: x", "needs kind"),
        ("name: x\nkind: toaster\nmacs_per_second: {}\nmemories: []", "must be cpu, gpu"),
        ("name: x\nkind: cpu\nmacs_per_second: {float32: {value: fast}}\nmemories: [1]", "number"),
        ("name: x\nspeed: 3", "'speed'"),
        ("a: [", "is not YAML"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=said) as raised:
        read_device(path)
    assert str(path) in str(raised.value)


def test_a_file_that_is_not_there_offers_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a100-sxm-80gb"):
        read_device(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(pickle.dumps({"name": "x" * 300}))
    with pytest.raises(GossamerError):
        read_device(tmp_path / "bytes.yaml")


_VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "kind", "value", "source", "memories", "bytes", "float32"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "name": _VALUES,
            "kind": st.just("cpu") | _VALUES,
            "threads": _VALUES,
            "macs_per_second": _VALUES,
            "memories": _VALUES,
            "operator_seconds": _VALUES,
        },
    )
)
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, value: dict) -> None:
    path = tmp_path_factory.mktemp("device") / "any.yaml"
    path.write_text(yaml.safe_dump(value))
    try:
        assert isinstance(read_device(path), Device)
    except InputError as error:
        assert "\n" not in str(error)
