"""Random numbers by place: uniform, independent of batches, different for every purpose."""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats

from gossamer.evaluate.sample_noise import signs, uniform


def test_numbers_belong_to_images_not_to_batches() -> None:
    ids = torch.arange(50)
    whole = uniform(ids, 7, "start", shape=(3, 4))
    parts = torch.cat([uniform(part, 7, "start", shape=(3, 4)) for part in ids.split(7)])
    assert torch.equal(whole, parts)
    assert torch.equal(uniform(ids.flip(0), 7, "start", shape=(3, 4)), whole.flip(0))


def test_numbers_are_uniform_and_uncorrelated() -> None:
    drawn = uniform(torch.arange(400), 0, "test", shape=(500,)).numpy()
    assert drawn.min() >= 0 and drawn.max() < 1
    assert stats.kstest(drawn.ravel()[::7], "uniform").pvalue > 1e-3
    # Neighbouring images and neighbouring places are as unrelated as any.
    for first, second in ((drawn[:-1], drawn[1:]), (drawn[:, :-1], drawn[:, 1:])):
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.01
    counts = np.bincount((drawn.ravel() * 64).astype(int), minlength=64)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_another_purpose_is_another_stream() -> None:
    ids = torch.arange(200)
    first, second = uniform(ids, 0, "a", shape=(200,)), uniform(ids, 0, "b", shape=(200,))
    assert not (first == second).float().mean() > 1e-3
    assert abs(np.corrcoef(first.flatten(), second.flatten())[0, 1]) < 0.02


def test_signs_are_fair() -> None:
    drawn = signs(torch.arange(1000), 3, shape=(100,))
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    assert abs(drawn.mean().item()) < 0.015
