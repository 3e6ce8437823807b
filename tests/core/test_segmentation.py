"""Masks move with their images, ignored pixels count for nothing, mean IoU as counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.core.fit import Supervised, fit, sgd
from gossamer.core.segmentation import (
    IGNORED,
    Segmentation,
    joint_compose,
    joint_flip,
    joint_scale_crop,
    mean_iou,
    pixel_cross_entropy,
)
from gossamer.core.task import Preprocess

PLAIN = Preprocess(channels=1, height=8, width=12, mean=(0.0,), std=(1.0,), scale=1.0)


def paired(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images whose values are their masks."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(0, 3, (count, 8, 12), generator=generator)
    return masks.unsqueeze(1).float(), masks


def task(**options: object) -> Segmentation:
    return Segmentation(
        {"train": paired(10), "validation": paired(4, 1)},
        PLAIN,
        ["a", "b", "c"],
        name="masks",
        **options,  # type: ignore[arg-type]
    )


def counted(predicted: Tensor, truth: Tensor, classes: int) -> float:
    """Mean IoU counted pixel by pixel."""
    values = []
    pairs = [
        (p, t)
        for p, t in zip(predicted.flatten().tolist(), truth.flatten().tolist(), strict=True)
        if t != IGNORED
    ]
    for k in range(classes):
        either = sum(p == k or t == k for p, t in pairs)
        if either:
            values.append(sum(p == k and t == k for p, t in pairs) / either)
    return sum(values) / len(values)


def test_mean_iou_is_that_of_a_count_by_hand() -> None:
    generator = torch.Generator().manual_seed(3)
    predicted = torch.randint(0, 4, (2, 9, 7), generator=generator)
    truth = torch.randint(0, 4, (2, 9, 7), generator=generator)
    truth[:, :2] = IGNORED
    assert mean_iou(predicted, truth, 4) == pytest.approx(counted(predicted, truth, 4), abs=1e-12)
    # A class in neither is skipped: more classes of which nothing is seen change nothing.
    assert mean_iou(predicted, truth, 9) == pytest.approx(mean_iou(predicted, truth, 4), abs=1e-12)
    # A class that is only predicted counts, as 0.
    assert mean_iou(torch.tensor([0, 1]), torch.tensor([0, 0]), 3) == pytest.approx(0.25)


def test_scores_are_of_the_whole_split_in_percent() -> None:
    given = task(evaluation_batch_size=3)

    class Answer(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            wrong = images.clone()
            wrong[:, :, 0] = 2.0  # every first row is called the last class
            return nn.functional.one_hot(wrong[:, 0].long(), 3).permute(0, 3, 1, 2).float()

    truth = given.splits["validation"][1]
    predicted = truth.clone()
    predicted[:, 0] = 2
    assert given.score(Answer()) == pytest.approx(100 * counted(predicted, truth, 3))
    each = given.class_scores(Answer(), "validation")
    assert sum(v for v in each.values() if v is not None) / 3 == pytest.approx(
        given.score(Answer())
    )


def test_ignored_pixels_contribute_nothing() -> None:
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    masks = torch.randint(0, 3, (2, 4, 4), generator=torch.Generator().manual_seed(1))
    masks[0, 1] = IGNORED
    changed = logits.clone()
    changed[0, :, 1] += torch.randn(3, 4)
    assert torch.equal(pixel_cross_entropy(logits, masks), pixel_cross_entropy(changed, masks))
    none = torch.full_like(masks, IGNORED)
    assert float(pixel_cross_entropy(logits, none)) == 0.0
    assert float(pixel_cross_entropy(torch.zeros_like(logits), masks)) == pytest.approx(math.log(3))


@pytest.mark.parametrize("scales", [(1.0,), (2.0,), (0.5, 1.0, 2.0)])
def test_masks_move_with_their_images(scales: tuple[float, ...]) -> None:
    # Blocks of 4 x 4, so that interpolation leaves most pixels as they were.
    coarse = torch.randint(0, 3, (6, 8, 8), generator=torch.Generator().manual_seed(2))
    masks = coarse.repeat_interleave(4, 1).repeat_interleave(4, 2)
    augment = joint_compose(joint_flip(), joint_scale_crop((24, 20), scales))
    images, moved = augment(masks.unsqueeze(1).float(), masks, torch.Generator().manual_seed(5))
    assert images.shape == (6, 1, 24, 20) and moved.shape == (6, 24, 20)
    inside = moved != IGNORED
    agree = (images[:, 0] - moved).abs()[inside] < 1e-3
    assert agree.float().mean() == 1.0 if scales == (1.0,) else agree.float().mean() > 0.4
    if max(scales) >= 1.0 and min(scales) >= 1.0:
        assert bool(inside.all())
    else:
        assert not bool(inside.all())
        # What lies outside of the image is black.
        assert float(images[:, 0][~inside].abs().median()) == 0.0


def test_a_flip_mirrors_both() -> None:
    images, masks = paired(3)
    flipped, moved = joint_flip(1.0)(images, masks, torch.Generator())
    assert torch.equal(flipped[:, 0].long(), moved) and torch.equal(moved, masks.flip(2))


def test_parts_keep_their_rows_and_hide_labels() -> None:
    given = task()
    rows = np.array([7, 2])
    part, hidden = given.subset("train", rows), given.subset("train", rows, labelled=False)
    assert part.size("train") == hidden.size("train") == 2
    assert torch.equal(part.splits["train"][1], given.splits["train"][1][[7, 2]])
    assert torch.equal(hidden.splits["train"][0], part.splits["train"][0])
    assert bool((hidden.splits["train"][1] == IGNORED).all())
    assert given.size("train") == 10 and part.size("validation") == 4
    assert len({given.fingerprint(), part.fingerprint(), hidden.fingerprint()}) == 3
    with pytest.raises(InputError, match="rows 0 to 9"):
        given.subset("train", np.array([10]))


def test_order_is_a_function_of_seed_and_epoch() -> None:
    given = task(augment=joint_flip())

    def epoch(number: int, start: int = 0) -> list[Tensor]:
        return [b[1] for b in given.batches("train", batch_size=4, epoch=number, start=start)]

    assert all(torch.equal(a, b) for a, b in zip(epoch(0), epoch(0), strict=True))
    assert torch.equal(epoch(0, 1)[0], epoch(0)[1])
    assert not torch.equal(epoch(0)[0], epoch(1)[0])


def test_a_network_of_one_layer_learns_the_masks() -> None:
    given = task()
    network = nn.Sequential(nn.Conv2d(1, 8, 1), nn.ReLU(), nn.Conv2d(8, 3, 1))
    torch.manual_seed(0)
    for layer in (network[0], network[2]):
        layer.reset_parameters()  # type: ignore[operator]
    before = given.score(network)
    fit(Supervised(network, given, optimizer=sgd(network, lr=0.3)), given, epochs=40, batch_size=2)
    assert given.score(network) > max(90.0, before)


def test_bad_masks_are_refused_in_a_sentence() -> None:
    images, masks = paired(4)
    good = {"train": (images, masks), "validation": (images, masks)}
    with pytest.raises(InputError, match="label 3, but there are 3 classes"):
        Segmentation(good | {"train": (images, masks + 1)}, PLAIN, list("abc"), name="x")
    with pytest.raises(InputError, match="masks of shape"):
        Segmentation(good | {"train": (images, masks[:, :4])}, PLAIN, list("abc"), name="x")
    with pytest.raises(InputError, match="no validation split"):
        Segmentation({"train": (images, masks)}, PLAIN, list("abc"), name="x")
    with pytest.raises(InputError, match="scales above 0"):
        joint_scale_crop((4, 4), (0.0,))
