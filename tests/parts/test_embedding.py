"""Embeddings of many images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.parts.embedding import embed, pixels


class Counted:
    """Images that count how many were fetched."""

    def __init__(self, images: Tensor, fail_from: int | None = None) -> None:
        self.images = images
        self.fetched = 0
        self.fail_from = fail_from

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, rows: np.ndarray) -> Tensor:
        if self.fail_from is not None and rows.max() >= self.fail_from:
            raise KeyboardInterrupt
        self.fetched += len(rows)
        return self.images[torch.from_numpy(rows)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


def images(count: int = 20) -> Tensor:
    return torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def identity(raw: Tensor) -> Tensor:
    return raw


def test_features_are_what_the_head_reads() -> None:
    model = network()
    found = embed(Counted(images()), model, identity, batch_size=7)
    with torch.no_grad():
        expected = model[:4](images())
        logits = model(images())
    np.testing.assert_allclose(found.features, expected, atol=1e-6)
    np.testing.assert_allclose(found.logits, logits, atol=1e-6)
    assert model.training


def test_a_named_layer_is_averaged_over_positions() -> None:
    model = network()
    found = embed(Counted(images()), model, identity, layer="0")
    with torch.no_grad():
        expected = model[0](images()).mean((2, 3))
    np.testing.assert_allclose(found.features, expected, atol=1e-6)
    with pytest.raises(InputError, match="no layer 'x'"):
        embed(Counted(images()), model, identity, layer="x")


def test_a_killed_run_goes_on_and_a_second_one_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gossamer.parts.embedding as module

    monkeypatch.setattr(module, "BLOCK", 5)
    model = network()
    with pytest.raises(KeyboardInterrupt):
        embed(Counted(images(), fail_from=12), model, identity, batch_size=5, cache=tmp_path)
    again = Counted(images())
    found = embed(again, model, identity, batch_size=5, cache=tmp_path)
    assert again.fetched == 2 + 10  # two to learn the sizes
    np.testing.assert_array_equal(
        found.features, embed(Counted(images()), model, identity).features
    )
    third = Counted(images())
    embed(third, model, identity, batch_size=5, cache=tmp_path)
    assert third.fetched == 2
    with torch.no_grad():
        model[4].weight.add_(1.0)
    other = Counted(images())
    embed(other, model, identity, batch_size=5, cache=tmp_path)
    assert other.fetched == 22


def test_features_that_are_not_finite_are_named() -> None:
    broken = images()
    broken[3] = torch.nan
    with pytest.raises(InputError, match="images 0 to 4 are not finite"):
        embed(Counted(broken), network(), identity, batch_size=5)


def test_no_head() -> None:
    with pytest.raises(InputError, match="name a layer"):
        embed(Counted(images()), network()[:4], identity)


def test_pixels() -> None:
    raw = torch.arange(2 * 4).reshape(2, 1, 2, 2)
    assert pixels(Counted(raw), scale=7.0)[1, 3] == 1.0
