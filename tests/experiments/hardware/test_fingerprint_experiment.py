"""The experiment on fingerprints, in small."""

import pytest
import torch
from torch import nn

from gossamer.experiments.hardware.fingerprint import (
    EXPERIMENT,
    EventGru,
    accuracy,
    observed,
    stage_two,
    true_convolutions,
)
from gossamer.hardware.kernel_times import DeviceProfile, Line


def test_truth_is_read_off_the_modules() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 5, 1, 2, groups=4))
    found = true_convolutions(module, torch.zeros(1, 3, 8, 8))
    (both,) = found.values()
    assert [(t.channels, t.height, t.stride, t.kernel, t.groups) for t in both] == [
        (8, 4, 2, 3, 1), (8, 4, 1, 5, 4)
    ]  # fmt: skip


def test_padding_behind_the_last_event_changes_nothing() -> None:
    module = EventGru().eval()
    events = torch.zeros(2, 20, 5)
    events[:, :6] = torch.randn(1, 6, 5)
    events[:, :6, 0] = 1.0
    events[1, 6:, 1:] = 9.0
    with torch.inference_mode():
        first, second = module(events)
    assert torch.equal(first, second)


def test_stage_two_of_one_network_a_family() -> None:
    seen = observed(7, 1, (16,), first=0, repeats=1)
    lines = {
        (k, kind): Line(2e-5, 1e-10) for k in (1, 3, 5, 7)
        for kind in ("dense", "grouped", "depthwise")
    }  # fmt: skip
    profile = DeviceProfile(lines, Line(1e-5, 1e-10), Line(5e-6, 1e-10))  # type: ignore[arg-type]
    rows = list(stage_two(seen, profile, 0))
    assert len(rows) == 7
    for row in rows:
        convolutions = sum(
            isinstance(m, nn.Conv2d)
            for s in seen if s.family == row["family"] for m in s.module.modules()
        )  # fmt: skip
        assert row["layers"] == convolutions
    assert sum(row["channels_exact"] for row in rows) / 7 >= 90.0


def test_accuracy_and_claims() -> None:
    seen = observed(7, 1, (16,), first=0, repeats=1)
    assert accuracy([s.family for s in seen], seen) == 100.0
    assert accuracy(["plain"] * 7, seen) == pytest.approx(100 / 7)
    assert EXPERIMENT.reconstruction and len(EXPERIMENT.claims) == 9
