import numpy as np
import pytest
import torch

from gossamer.core.errors import InputError
from gossamer.datasets.arrays import ArraySource
from gossamer.datasets.digits import digits
from gossamer.evaluate.training_partition import (
    Joined,
    bucket_rows,
    content_digest,
    disjoint_partition,
    finite_partition,
    finite_shifts,
    finite_spread,
    pixel_sum,
    training_data,
)


def images(count=500, seed=0, low=0):
    random = np.random.default_rng(seed)
    pixels = torch.from_numpy(random.integers(low, 256, (count, 1, 4, 4), dtype=np.uint8))
    # Some images appear twice, also with another label.
    pixels[-20:] = pixels[:20]
    return ArraySource(pixels, torch.from_numpy(random.integers(0, 3, count)))


def contents(source, rows):
    fetched = source.fetch(rows).numpy().reshape(len(rows), -1)
    return [(*map(int, x), int(y)) for x, y in zip(fetched, source.labels[rows], strict=True)]


def test_the_published_hash_is_the_sum_of_the_pixels():
    source = images()
    for number, rows in enumerate(bucket_rows(source, 7)):
        assert all(sum(content[:-1]) % 7 == number for content in contents(source, rows))
    halves = np.array([[0.4, 1.6], [-2.4, 1.0]])
    assert pixel_sum(halves).tolist() == [2, -1]
    # Sums of bytes do not wrap.
    assert pixel_sum(np.full((1, 300), 255, np.uint8)).tolist() == [300 * 255]


@pytest.mark.parametrize("content_hash", [pixel_sum, content_digest])
def test_parts_are_functions_of_the_content(content_hash, monkeypatch):
    source = images()
    order = np.random.default_rng(1).permutation(len(source))
    shuffled = source.take(order)
    first = bucket_rows(source, 13, content_hash)
    monkeypatch.setattr("gossamer.evaluate.training_partition.BLOCK", 50)
    second = bucket_rows(shuffled, 13, content_hash)
    assert np.array_equal(np.sort(np.concatenate(first)), np.arange(500))
    for one, two in zip(first, second, strict=True):
        assert contents(source, one) == contents(shuffled, two)
        assert contents(source, one) == sorted(contents(source, one))


@pytest.mark.parametrize("d", [1, 3])
def test_one_sample_more_or_less_reaches_d_parts(d):
    source = images()
    whole = finite_partition(source, 5, d)
    assert whole.spread is not None
    reached_by = {}
    for missing in (0, 17, 250):
        rest = np.delete(np.arange(500), missing)
        fewer = source.take(rest)
        changed = [
            number
            for number, (one, two) in enumerate(
                zip(whole.parts, finite_partition(fewer, 5, d).parts, strict=True)
            )
            if contents(source, one) != contents(fewer, two)
        ]
        reached_by[missing] = changed
        bucket = int(source.images[missing].sum(dtype=torch.int64)) % (5 * d)
        assert changed == sorted(whole.spread[bucket].tolist())
    assert all(len(changed) == d for changed in reached_by.values())


def test_finite_aggregation_has_fixed_different_shifts():
    shifts = finite_shifts(50, 16, seed=3)
    assert len(set(shifts.tolist())) == 16 and shifts.max() < 800
    assert np.array_equal(shifts, finite_shifts(50, 16, seed=3))
    spread = finite_spread(6, [0, 2])
    assert spread.tolist() == [[0, 2], [1, 3], [2, 4], [3, 5], [4, 0], [5, 1]]
    partition = finite_partition(images(), 50, 16)
    counts = np.bincount(np.concatenate(partition.parts), minlength=500)
    assert (counts == 16).all() and len(partition.parts) == 800
    for number, rows in enumerate(partition.parts):
        buckets = np.flatnonzero((partition.spread == number).any(1))
        sums = images().images.flatten(1).sum(1, dtype=torch.int64).numpy()[rows] % 800
        assert set(sums.tolist()) <= set(buckets.tolist()) and len(buckets) == 16


def test_parts_that_lack_classes_are_told():
    task = digits()
    source = training_data(task)
    labels = source.labels.numpy()
    few, many = disjoint_partition(source, 5), disjoint_partition(source, 80)
    assert few.warning(labels, 10) is None
    lacking = many.lacking(labels, 10)
    expected = [10 - len(set(labels[rows].tolist())) for rows in many.parts]
    assert lacking.tolist() == expected
    share = np.mean(lacking > 0)
    assert share > 0.5 and f"{share:.0%} of the parts lack a class" in str(many.warning(labels, 10))
    more = disjoint_partition(source, 3000)
    assert "no sample at all" in str(more.warning(labels, 10))
    assert len(more.parts) == 3000 and sum(map(len, more.parts)) == len(source)


def test_held_out_images_are_training_data_too():
    """Which images are held out depends on their order, so parts of the rest would, too."""
    one, two = training_data(digits(seed=0)), training_data(digits(seed=0))
    task = digits(seed=0)
    assert len(one) == task.size("train") + task.size("validation")
    for mine, other in zip(bucket_rows(one, 9), bucket_rows(two, 9), strict=True):
        assert contents(one, mine) == contents(two, other)
    rows = np.array([len(one) - 1, 0, len(one) - 2])
    fetched = one.fetch(rows)
    assert torch.equal(fetched[1], task.splits["train"].fetch(np.arange(1))[0])
    last = task.splits["validation"].fetch(np.array([task.size("validation") - 1]))[0]
    assert torch.equal(fetched[0], last)
    assert len(Joined([images(), images()]).fetch(np.empty(0, np.int64))) == 0


def test_what_cannot_be_split_is_said():
    with pytest.raises(InputError, match="one part or more, not 0"):
        bucket_rows(images(), 0)
    with pytest.raises(InputError, match="one whole number for each image"):
        bucket_rows(images(), 3, lambda x: x.reshape(len(x), -1).mean(1))
    with pytest.raises(InputError, match="k and d are 1 or more"):
        finite_shifts(0, 1)
    with pytest.raises(InputError, match="not different modulo 6"):
        finite_spread(6, [0, 6])
