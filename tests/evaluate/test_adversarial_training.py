"""Adversarial training: what it trains on, and that it makes a network harder to fool."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from gossamer.core.errors import InputError
from gossamer.core.fit import Supervised, fit
from gossamer.core.task import Classification
from gossamer.datasets import open_task
from gossamer.evaluate.adversarial_training import AdversarialTraining
from gossamer.evaluate.margin_attack import PMA
from gossamer.evaluate.robustness import TaskImages
from gossamer.evaluate.victim import Normalised

EPS = 0.1


@pytest.fixture(scope="module")
def task() -> Classification:
    return open_task("digits")


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))


def test_it_makes_a_network_harder_to_fool(task: Classification) -> None:
    accuracy = {}
    for name in ("plain", "adversarial"):
        model = network()
        options = {"optimizer": torch.optim.Adam(model.parameters(), 3e-3)}
        rule = (
            Supervised(model, task, **options)  # type: ignore[arg-type]
            if name == "plain"
            else AdversarialTraining(model, task, eps=EPS, **options)
        )
        fit(rule, task, epochs=15, batch_size=32)
        images = TaskImages(task, "test", 150)
        attack = PMA(Normalised(model, task.preprocess), eps=EPS, steps=20)
        accuracy[name] = attack.run(*images.fetch(np.arange(len(images)))).accuracy
    assert accuracy["adversarial"] > accuracy["plain"] + 10


def test_what_is_trained_on_is_in_the_budget_and_worse(task: Classification) -> None:
    model = network()
    rule = AdversarialTraining(model, task, eps=EPS)
    rule.run = SimpleNamespace(seed=0, step=0)  # type: ignore[assignment]
    inputs, labels = next(task.batches("train", batch_size=64, shuffle=False))
    unit = rule.victim.model
    assert isinstance(unit, Normalised)
    pixels = inputs * unit.std + unit.mean
    moved = rule._moved(pixels.clamp(0, 1), labels)
    assert (moved - pixels).abs().max() <= EPS + 1e-5
    assert moved.min() >= 0 and moved.max() <= 1
    losses = [
        nn.functional.cross_entropy(unit(x), labels, reduction="none") for x in (pixels, moved)
    ]
    assert (losses[1] > losses[0]).float().mean() > 0.95
    again = rule._moved(pixels.clamp(0, 1), labels)
    assert torch.equal(moved, again)  # a function of seed and step, so that a run can resume
    rule.run.step = 1
    assert not torch.equal(moved, rule._moved(pixels.clamp(0, 1), labels))


def test_steps_below_one(task: Classification) -> None:
    with pytest.raises(InputError, match="steps is 0"):
        AdversarialTraining(network(), task, eps=EPS, steps=0)
