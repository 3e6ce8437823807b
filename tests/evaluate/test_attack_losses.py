"""Losses of attacks: worked values, and directions that survive saturated logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer.core.errors import InputError
from gossamer.evaluate.attack_losses import (
    CE,
    DLR,
    LOSSES,
    PM,
    TARGETED_CE,
    Loss,
    loss_of,
    pm,
    targeted_dlr,
)

Z = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
Y = torch.tensor([0])


def gradient(loss: Loss, logits: Tensor, labels: Tensor) -> Tensor:
    free = logits.clone().requires_grad_()
    return torch.autograd.grad(loss.value(free, labels).sum(), free)[0]


def test_worked_values() -> None:
    assert pm(Z, Y).item() == pytest.approx(-0.407031, abs=1e-6)
    assert DLR.value(Z, Y).item() == pytest.approx(-0.5)
    assert targeted_dlr(torch.tensor([1])).value(Z, Y).item() == pytest.approx(-0.4)


def test_worked_gradient_of_the_probability_margin() -> None:
    found = gradient(PM, Z, Y)
    expected = torch.tensor([[-0.381821, 0.333302, 0.035470, 0.013049]])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    # The identity: p_y grad CE + p_m grad targeted CE.
    p = Z.softmax(1)
    mixed = p[0, 0] * gradient(CE, Z, Y) + p[0, 1] * gradient(TARGETED_CE, Z, Y)
    torch.testing.assert_close(found, mixed, atol=1e-6, rtol=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(4, 8), st.sampled_from(sorted(LOSSES)))
def test_directions_are_gradients_up_to_a_positive_factor(
    seed: int, classes: int, name: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(16, classes, generator=generator, dtype=torch.float64)
    labels = logits.argmax(1)  # attacks only see images that are right so far
    loss = LOSSES[name]
    found, expected = loss.cotangent(logits, labels), gradient(loss, logits, labels)
    torch.testing.assert_close(
        found / found.norm(dim=1, keepdim=True),
        expected / expected.norm(dim=1, keepdim=True),
        atol=1e-8,
        rtol=1e-6,
    )


@pytest.mark.parametrize("loss", [CE, TARGETED_CE, PM], ids=lambda loss: loss.name)
def test_directions_survive_saturation(loss: Loss) -> None:
    """At a hundred times the scale plain gradients underflow in float32; directions agree with
    double precision."""
    logits = 100 * torch.tensor([[4.0, 1.0, -1.0, 2.5], [-2.0, 3.0, 1.0, 0.5]])
    labels = torch.tensor([0, 1])
    assert gradient(PM, logits, labels).abs().amax() < 1e-37  # what a plain attack would follow
    found = loss.cotangent(logits, labels)
    exact = loss.cotangent(logits.double(), labels)
    assert found.abs().amax(1).min() > 0.1
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=1e-4)


def test_dlr_ignores_scale_and_offset_and_the_probability_margin_does_not() -> None:
    torch.testing.assert_close(DLR.value(3 * Z + 7, Y), DLR.value(Z, Y))
    assert abs(PM.value(3 * Z, Y) - PM.value(Z, Y)).item() > 0.1


def test_probability_margin_is_positive_only_where_another_class_wins() -> None:
    logits = torch.randn(500, 5, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(500) % 5
    value = pm(logits, labels)
    assert value.abs().max() < 1
    assert torch.equal(value > 0, logits.argmax(1) != labels)


def test_unknown_loss() -> None:
    with pytest.raises(InputError, match="there is no loss 'p_margin'"):
        loss_of("p_margin")
