import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gossamer.compress.distil import DistillationCriterion, distil
from gossamer.core.errors import InputError
from gossamer.core.network import Network
from gossamer.datasets.digits import digits
from gossamer.parts.distillation import on_mistakes


@pytest.fixture(scope="module")
def task():
    return digits(seed=0)


def linear(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def test_criterion_by_hand(task):
    teacher, student = linear(0), linear(1)
    batch = next(iter(task.batches("train", batch_size=16)))
    loss = DistillationCriterion(task, teacher, temperature=3.0, weight=0.6)(
        student(batch[0]), batch
    )
    p = (teacher(batch[0]) / 3).softmax(1)
    q = (student(batch[0]) / 3).softmax(1)
    kl = (p * (p.log() - q.log())).sum(1).mean()
    expected = 0.4 * F.cross_entropy(student(batch[0]), batch[1]) + 0.6 * 9 * kl
    torch.testing.assert_close(loss, expected)
    assert teacher[1].weight.requires_grad  # the teacher itself is not frozen, its copy is


def test_without_weight_it_is_the_tasks_loss(task):
    batch = next(iter(task.batches("train", batch_size=16)))
    outputs = linear(1)(batch[0])
    loss = DistillationCriterion(task, linear(0), weight=0.0)(outputs, batch)
    torch.testing.assert_close(loss, task.criterion(outputs, batch))


def test_asking_only_on_mistakes(task):
    batch = next(iter(task.batches("train", batch_size=64)))
    student = linear(1)(batch[0])
    teacher = linear(0)(batch[0])
    wrong = student.argmax(1) != batch[1]
    loss = DistillationCriterion(task, linear(0), ask=on_mistakes)(student, batch)
    from gossamer.parts.distillation import distillation_loss

    asked = distillation_loss(
        student[wrong], teacher[wrong], F.cross_entropy(student[wrong], batch[1][wrong])
    )
    right = F.cross_entropy(student[~wrong], batch[1][~wrong])
    torch.testing.assert_close(loss, asked + right)


def test_step_moves_the_student_towards_the_teacher(task):
    teacher, student = linear(0), linear(1)  # an untrained teacher: only it can be copied
    network = Network(student, task.example_inputs)
    before = student[1].weight.detach().clone()
    result = distil(network, task, teacher=teacher, epochs=15, lr=0.3, weight=1.0)
    assert torch.equal(student[1].weight, before)
    assert result.steps[-1]["step"] == "distil"
    x = next(iter(task.batches("validation")))[0]

    def agreement(module):
        return (module(x).argmax(1) == teacher(x).argmax(1)).float().mean().item()

    assert agreement(result.module) > max(0.8, agreement(student) + 0.3)


def test_bad_input(task):
    network = Network(linear(0), task.example_inputs)
    with pytest.raises(InputError, match="needs a teacher"):
        distil(network, task)
    with pytest.raises(InputError, match="temperature above 0"):
        DistillationCriterion(task, linear(0), temperature=0.0)
    batch = next(iter(task.batches("train", batch_size=4)))
    criterion = DistillationCriterion(task, nn.Sequential(nn.Flatten(), nn.Linear(64, 7)))
    with pytest.raises(InputError, match="different shapes"):
        criterion(linear(0)(batch[0]), batch)
