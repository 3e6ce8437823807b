"""Budgets: what people write, and when a limit is broken."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.compress.budget import Budget, Limit
from gossamer.core.errors import GossamerError, InputError


@pytest.mark.parametrize(
    ("name", "text", "value", "relative"),
    [
        ("macs", "0.5", 0.5, True),
        ("macs", ".25", 0.25, True),
        ("macs", 0.5, 0.5, True),
        ("macs", "50%", 0.5, True),
        ("macs", "1", 1.0, True),
        ("macs", "10M", 10e6, False),
        ("macs", "1.5 G", 1.5e9, False),
        ("macs", 2_000_000, 2e6, False),
        ("params", "1.2m", 1.2e6, False),
        ("params", "300k", 3e5, False),
        ("size", "500KB", 5e5, False),
        ("size", "1MiB", 2.0**20, False),
        ("size", "0.5KB", 500.0, False),
        ("size", "1e5", 1e5, False),
        ("latency", "3ms", 3.0, False),
        ("latency", "0.5ms", 0.5, False),
        ("latency", "250us", 0.25, False),
        ("latency", "0.01s", 10.0, False),
    ],
)
def test_limits_are_read(name: str, text: str | float, value: float, relative: bool) -> None:
    limit = Limit.of(name, text)
    assert limit.value == pytest.approx(value, rel=1e-12)
    assert limit.relative is relative


@pytest.mark.parametrize(
    "text", ["", "half", "0", "0%", "-1", "nan", "inf", "1e999", "3 ms", "10MB", "0x10", "1,5", "%"]
)
def test_what_is_no_limit_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--macs"):
        Limit.of("macs", text)


def test_refusals_say_which_units_there_are() -> None:
    with pytest.raises(InputError, match=r"--latency cannot be '10MB'.*ms, us, s"):
        Limit.of("latency", "10MB")


def test_a_limit_is_kept_as_it_is() -> None:
    limit = Limit("macs", 0.3, True)
    assert Limit.of("macs", limit) is limit


def test_broken_names_every_limit_and_what_was_reached() -> None:
    budget = Budget.of(macs=0.5, params="100", size="1KB", latency=0.9, max_drop=1.0)
    before = {"macs": 1000.0, "params": 200.0, "size": 4000.0, "latency": 10.0}
    met = {"macs": 500.0, "params": 100.0, "size": 1000.0, "latency": 9.0}
    assert budget.broken(before, met, 1.0) == []
    assert budget.broken(before, met, None) == []
    missed = {"macs": 600.0, "params": 101.0, "size": 1000.0, "latency": 9.5}
    assert budget.broken(before, missed, 1.5) == [
        "--macs 0.5 of the original (nearest: 0.6)",
        "--params 100 (nearest: 101)",
        "--latency 0.9 of the original (nearest: 0.95)",
        "--max-drop 1 points (nearest: 1.50)",
    ]


def test_share_is_of_the_original_and_at_most_one() -> None:
    budget = Budget.of(macs="250", params=0.4, size="9KB")
    assert budget.share("macs", 1000.0) == 0.25
    assert budget.share("params", 77.0) == pytest.approx(0.4)
    assert budget.share("size", 1000.0) == 1.0
    assert budget.share("latency", 1.0) is None


@pytest.mark.parametrize("drop", [-0.1, float("nan"), float("inf")])
def test_a_drop_is_points(drop: float) -> None:
    with pytest.raises(InputError, match="--max-drop"):
        Budget.of(max_drop=drop)


def test_as_json() -> None:
    assert Budget.of(macs=0.5, latency="2ms", max_drop=1).to_json() == {
        "macs": {"value": 0.5, "relative": True},
        "latency": {"value": 2.0, "relative": False},
        "max_drop": 1,
    }


PIECES = st.lists(
    st.sampled_from([*"0123456789.%eE+- ", "kb", "MB", "ms", "G", "nan", "inf", "½", "٣", "\0"]),
    max_size=8,
).map("".join)


@given(st.sampled_from(["macs", "params", "size", "latency"]), PIECES | st.text(max_size=12))
def test_any_text_is_a_limit_or_refused(name: str, text: str) -> None:
    try:
        limit = Limit.of(name, text)
    except GossamerError:
        return
    assert 0.0 < limit.value < float("inf")
    assert limit.target(100.0) > 0.0
