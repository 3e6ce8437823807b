"""Records of training dynamics."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gossamer.data.dynamics import Dynamics, el2n, forgetting_events, margins, record
from gossamer.data.selection import subset
from gossamer.datasets import open_task


def test_el2n() -> None:
    labels = torch.tensor([0])
    assert el2n(torch.zeros(1, 10), labels).item() == pytest.approx(math.sqrt(1 - 1 / 10))
    certain = torch.full((1, 10), -100.0)
    certain[0, 0] = 100.0
    assert el2n(certain, labels).item() == 0.0
    assert el2n(certain, torch.tensor([3])).item() == pytest.approx(math.sqrt(2))


def test_margins() -> None:
    logits = torch.tensor([[1.0, 4, 2], [1, 4, 2]])
    assert margins(logits, torch.tensor([1, 2])).tolist() == [2.0, -2.0]


def test_forgetting() -> None:
    sequence = np.array([0, 1, 1, 0, 1, 0, 0, 1], dtype=bool)
    never, always = np.zeros(8, dtype=bool), np.ones(8, dtype=bool)
    found = forgetting_events(np.stack([sequence, never, always], axis=1))
    assert found.tolist() == [2.0, math.inf, 0.0]


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def test_the_record_is_of_the_right_samples() -> None:
    """With a learning rate of 0 every visit says what the first network says of the sample."""
    task = subset(open_task("digits"), np.arange(50))
    task.augment = None

    def still(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), lr=0.0)

    found = record(task, network, epochs=2, seeds=(0, 1), batch_size=16, optimizer=still)
    for run in (0, 1):
        logits, labels = task.logits(network(run), "train")
        for epoch in (0, 1):
            np.testing.assert_allclose(found.el2n[run, epoch], el2n(logits, labels), atol=1e-5)
            np.testing.assert_array_equal(found.correct[run, epoch], logits.argmax(1) == labels)


def test_a_run_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gossamer.data.dynamics as module

    task = subset(open_task("digits"), np.arange(200))
    whole = record(task, network, epochs=3, batch_size=64)
    assert whole.el2n[0, 2].mean() < whole.el2n[0, 0].mean()
    assert (whole.loss > 0).all()  # every sample was visited in every epoch
    calls = 0
    watch = module.Watched._watch

    def killed(self, outputs, batch):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return watch(self, outputs, batch)

    monkeypatch.setattr(module.Watched, "_watch", killed)
    with pytest.raises(KeyboardInterrupt):
        record(task, network, epochs=3, batch_size=64, checkpoint=tmp_path / "run.safetensors")
    monkeypatch.setattr(module.Watched, "_watch", watch)
    again = record(task, network, epochs=3, batch_size=64, checkpoint=tmp_path / "run.safetensors")
    for name in ("el2n", "margin", "loss", "correct"):
        np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))


def test_scores_point_to_the_hard() -> None:
    correct = np.array([[[True, False], [True, True], [True, False]]])
    found = Dynamics(
        el2n=np.where(correct, 0.1, 1.2),
        margin=np.where(correct, 3.0, -1.0),
        loss=np.where(correct, 0.1, 2.0),
        correct=correct,
    )
    for scores in (found.difficulty(), found.forgetting(), found.area_under_margin()):
        assert scores[1] > scores[0]
