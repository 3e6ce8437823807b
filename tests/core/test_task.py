"""Order is a function of (seed, epoch); scores are those worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.core.task import (
    Classification,
    Preprocess,
    device_of,
    evaluating,
    logits_of,
    seed_of,
    to_device,
)


class Numbered:
    """Images of one pixel, whose value is their row."""

    def __init__(self, labels: list[int]) -> None:
        self.labels = torch.tensor(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: np.ndarray) -> Tensor:
        return torch.from_numpy(indices).float().view(-1, 1, 1, 1)


PLAIN = Preprocess(channels=1, height=1, width=1, mean=(0.0,), std=(1.0,), scale=1.0)


def task(**options: object) -> Classification:
    return Classification(
        {"train": Numbered([k % 3 for k in range(50)]), "validation": Numbered([0, 1, 2, 0])},
        PLAIN,
        ["a", "b", "c"],
        name="numbers",
        **options,  # type: ignore[arg-type]
    )


def order(given: Classification, **options: object) -> list[list[float]]:
    batches = given.batches("train", batch_size=8, **options)  # type: ignore[arg-type]
    return [images.flatten().tolist() for images, _ in batches]


def test_seeds_of_parts_are_stable_and_apart() -> None:
    # Known answers: a change would silently re-shuffle every recorded run.
    assert seed_of("order", 0, 0) == 7453028512061360496
    assert seed_of("a", 11) != seed_of("a", 1, 1)
    seeds = {seed_of("order", seed, epoch) for seed in range(20) for epoch in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_order_is_a_function_of_seed_and_epoch() -> None:
    first = order(task(), seed=3, epoch=5)
    assert order(task(), seed=3, epoch=5) == first
    assert order(task(), seed=3, epoch=6) != first
    assert order(task(), seed=4, epoch=5) != first
    assert sorted(row for batch in first for row in batch) == list(range(50))
    assert [len(batch) for batch in first] == [8] * 6 + [2]


def test_a_late_start_is_the_same_epoch() -> None:
    whole = order(task(), seed=1, epoch=2)
    for start in range(8):
        assert order(task(), seed=1, epoch=2, start=start) == whole[start:]


def test_augmentation_is_a_function_of_the_step() -> None:
    def noise(images: Tensor, generator: torch.Generator) -> Tensor:
        return images + torch.rand(images.shape, generator=generator)

    whole = order(task(augment=noise), seed=1)
    torch.manual_seed(123)  # the global generator has no say
    assert order(task(augment=noise), seed=1, start=3) == whole[3:]
    assert order(task(augment=noise), shuffle=False) == order(task(), shuffle=False)
    assert order(task(), shuffle=False)[0] == list(range(8))


def test_the_global_generators_are_left_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    order(task(), seed=5)
    assert torch.equal(torch.rand(3), expected)


class Fixed(nn.Module):
    """Answers the class that a table has for the image."""

    def __init__(self, answers: list[int]) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.9)
        self.answers = torch.tensor(answers)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(nn.functional.one_hot(self.answers[x.long().flatten()], 3) + 1.0)


def test_scores_by_hand() -> None:
    # Labels of validation are 0, 1, 2, 0: three right of four; class a has one of two.
    network = Fixed([0, 1, 2, 1])
    network.train()
    given = task(evaluation_batch_size=3)
    assert given.score(network, "validation") == 75.0
    assert given.class_scores(network, "validation") == {"a": 50.0, "b": 100.0, "c": 100.0}
    assert network.training and network.drop.training


def test_a_class_without_samples_has_no_score() -> None:
    given = Classification(
        {"train": Numbered([0, 1, 2]), "validation": Numbered([0, 0])}, PLAIN, "abc", name="n"
    )
    assert given.class_scores(Fixed([0, 1]), "validation") == {"a": 50.0, "b": None, "c": None}


def test_the_loss_is_the_mean_cross_entropy() -> None:
    batch = (torch.zeros(2, 1, 1, 1), torch.tensor([0, 2]))
    logits = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    by_hand = (math.log(math.e + 2) - 1 + math.log(3)) / 2
    assert task().criterion(logits, batch).item() == pytest.approx(by_hand, rel=1e-6)
    assert task().loss(lambda x: logits, batch).item() == pytest.approx(by_hand, rel=1e-6)


def test_evaluating_restores_every_mode() -> None:
    network = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm2d(1)))
    network.train()
    network[1].eval()
    modes = [module.training for module in network.modules()]
    with pytest.raises(ZeroDivisionError), evaluating(network):
        assert not any(module.training for module in network.modules())
        assert torch.is_inference_mode_enabled()
        raise ZeroDivisionError
    assert [module.training for module in network.modules()] == modes
    with evaluating(print):  # anything callable
        pass


def test_preprocessing_by_hand_and_its_record() -> None:
    given = Preprocess(channels=2, height=1, width=1, mean=(0.5, 0.0), std=(0.25, 2.0), scale=10.0)
    raw = torch.tensor([10, 20], dtype=torch.uint8).view(1, 2, 1, 1)
    assert given(raw).flatten().tolist() == [2.0, 1.0]
    assert Preprocess.from_json(given.to_json()) == given
    for change in ({"mean": [0.5]}, {"std": "a"}, {"height": None}, {"scale": []}):
        with pytest.raises(InputError, match="preprocessing record"):
            Preprocess.from_json(given.to_json() | change)


@pytest.mark.parametrize(
    ("splits", "classes", "sentence"),
    [
        ({"train": [0, 0], "validation": [0]}, "a", "has only one class"),
        ({"train": [0, 1]}, "ab", "has no validation split"),
        ({"train": [0, 1], "validation": []}, "ab", "the validation split of n is empty"),
        ({"train": [0, 2], "validation": [0]}, "ab", "has label 2, but there are 2 classes"),
        ({"train": [0, -1], "validation": [0]}, "ab", "has label -1"),
    ],
)
def test_what_is_no_classification(
    splits: dict[str, list[int]], classes: str, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        Classification(
            {split: Numbered(labels) for split, labels in splits.items()}, PLAIN, classes, name="n"
        )


def test_unknown_splits_are_refused() -> None:
    with pytest.raises(InputError, match="numbers has no test split"):
        next(task().batches("test"))
    assert task().size("test") == 0


def test_fingerprints_follow_the_data() -> None:
    other = task()
    other.splits["train"] = Numbered([0] * 49 + [1])
    assert task().fingerprint() == task().fingerprint() != other.fingerprint()


def test_batches_move_whole() -> None:
    batch = {"a": (torch.zeros(1), [torch.ones(2), "text"]), "b": 3}
    moved = to_device(batch, torch.device("meta"))
    assert moved["a"][0].device.type == moved["a"][1][0].device.type == "meta"
    assert moved["a"][1][1] == "text" and moved["b"] == 3
    assert isinstance(moved["a"], tuple) and isinstance(moved["a"][1], list)


def test_logits_are_found_in_any_answer() -> None:
    logits = torch.zeros(1, 2)

    class Answer:
        pass

    answer = Answer()
    answer.logits = logits  # type: ignore[attr-defined]
    assert logits_of(logits) is logits_of((logits, None)) is logits_of(answer) is logits
    with pytest.raises(InputError, match="answers a dict"):
        logits_of({"out": logits})


def test_the_device_of_anything() -> None:
    assert device_of(nn.Linear(1, 1, device="meta")).type == "meta"
    assert device_of(nn.BatchNorm2d(1, affine=False, device="meta")).type == "meta"
    assert device_of(print).type == device_of(nn.ReLU()).type == "cpu"
