import math

import pytest
import torch
from torch.nn import functional as F

from gossamer.parts.distillation import (
    always,
    as_unsure,
    asked_distillation_loss,
    distillation_loss,
    entropy,
    frozen_teacher,
    on_mistakes,
    soft_target_divergence,
    when_unsure,
)

STUDENT = torch.tensor([[1.0, 2.0, 0.5]])
TEACHER = torch.tensor([[2.0, 1.0, 0.0]])
LABEL = torch.tensor([0])


def test_worked_example():
    kl = soft_target_divergence(STUDENT, TEACHER, temperature=2.0)
    ce = F.cross_entropy(STUDENT, LABEL)
    assert kl.item() == pytest.approx(0.104629, abs=1e-6)
    assert ce.item() == pytest.approx(1.464369, abs=1e-6)
    total = distillation_loss(STUDENT, TEACHER, ce, temperature=2.0, weight=0.7)
    assert total.item() == pytest.approx(0.732272, abs=1e-6)


def test_batchmean_is_classes_times_the_mean():
    generator = torch.Generator().manual_seed(0)
    s, t = torch.randn(2, 4, 7, generator=generator)
    mean = soft_target_divergence(s, t, reduction="mean")
    batchmean = soft_target_divergence(s, t, reduction="batchmean")
    torch.testing.assert_close(batchmean, 7 * mean)
    each = soft_target_divergence(s, t, reduction="none")
    torch.testing.assert_close(each.mean(), batchmean)


def test_a_sequence_counts_its_positions():
    s, t = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        soft_target_divergence(s, t), soft_target_divergence(s.view(15, 7), t.view(15, 7))
    )


def test_no_gradient_reaches_the_teacher():
    s, t = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    soft_target_divergence(s, t).backward()
    assert t.grad is None
    # dKL/ds = (softmax(s/T) - softmax(t/T)) / T
    expected = ((s / 2).softmax(-1) - (t / 2).softmax(-1)).detach() / 2
    torch.testing.assert_close(s.grad, expected)


def test_masks():
    logits = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    labels = torch.tensor([0, 0, 0])
    assert entropy(logits)[0].item() == pytest.approx(math.log(2))
    assert always(logits, labels).tolist() == [True] * 3
    assert when_unsure(0.5)(logits, labels).tolist() == [True, False, False]
    assert on_mistakes(logits, labels).tolist() == [False, False, True]
    ask = as_unsure(torch.Generator().manual_seed(0))
    half = torch.tensor([[0.0, 1.5]]).repeat(20_000, 1)
    share = ask(half, torch.zeros(20_000)).float().mean().item()
    assert share == pytest.approx(float(entropy(half[0])) / math.log(2), abs=0.015)


def test_asked_loss_adds_the_two_means():
    generator = torch.Generator().manual_seed(0)
    s, t = torch.randn(2, 6, 4, generator=generator)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    mask = torch.tensor([True, False, True, False, False, False])
    loss = asked_distillation_loss(s, t, labels, ask=lambda *_: mask)
    asked = distillation_loss(s[mask], t[mask], F.cross_entropy(s[mask], labels[mask]))
    others = F.cross_entropy(s[~mask], labels[~mask])
    torch.testing.assert_close(loss, asked + others)
    everyone = asked_distillation_loss(s, t, labels)
    torch.testing.assert_close(everyone, distillation_loss(s, t, F.cross_entropy(s, labels)))
    nobody = asked_distillation_loss(s, t, labels, ask=lambda *_: torch.zeros(6, dtype=torch.bool))
    torch.testing.assert_close(nobody, F.cross_entropy(s, labels))


def test_frozen_teacher_is_a_copy():
    network = torch.nn.Linear(2, 2)
    teacher = frozen_teacher(network)
    assert network.training and network.weight.requires_grad
    assert not teacher.training and not teacher.weight.requires_grad
    assert teacher.weight.data_ptr() != network.weight.data_ptr()
