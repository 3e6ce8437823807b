"""Certificates against worked numbers, against the published loops, and against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core.errors import InputError
from gossamer.evaluate.training_partition import finite_spread
from gossamer.evaluate.vote_certificates import (
    Certified,
    certified_accuracy,
    certify,
    check_labels,
    units_against_one,
    units_against_two,
)


def of_rankings(*rankings):
    """Logits ``[1, models, classes]`` of models that rank the classes like this, best first."""
    logits = np.zeros((1, len(rankings), len(rankings[0])), np.float32)
    for model, ranking in enumerate(rankings):
        logits[0, model, list(ranking)] = -np.arange(len(ranking))
    return logits


# The literal loops: no closed forms, no pruning, one sample at a time.


def beats(counts, a, b):
    return counts[a] > counts[b] or (counts[a] == counts[b] and a < b)


def prefers(row, a, b):
    return row[a] > row[b] or (row[a] == row[b] and a < b)


def answer(logits, rule):
    """The elected class of ``[models, classes]``, and the loser of the run-off election."""
    classes = logits.shape[1]
    counts = [0] * classes
    for row in logits:
        counts[next(a for a in range(classes) if all(prefers(row, a, b) for b in range(classes)
                                                     if b != a))] += 1  # fmt: skip
    ranked = sorted(range(classes), key=lambda c: (-counts[c], c))
    if rule == "vote":
        return ranked[0], ranked[1], counts
    one, two = sorted(ranked[:2])
    for_one = sum(prefers(row, one, two) for row in logits)
    # An exact tie goes to the smaller index.
    return (one, two, counts) if 2 * for_one >= len(logits) else (two, one, counts)


def table(size):
    """The published dynamic program."""
    dp = np.zeros((size, size), int)
    for i, j in itertools.product(range(size), repeat=2):
        if i == j == 0:
            continue
        if (i <= 1 and j <= 2) or (i <= 2 and j <= 1):
            dp[i, j] = 1
        elif j <= 1:
            dp[i, j] = -(-i // 2)
        elif i <= 1:
            dp[i, j] = -(-j // 2)
        else:
            dp[i, j] = 1 + min(dp[i - 2, j - 1], dp[i - 1, j - 2])
    return dp


def greedy(powers, gap):
    used = 0
    for power in sorted(powers, reverse=True):
        if gap <= 0:
            return used
        gap -= power
        used += 1
    return used if gap <= 0 else float("inf")


def published(logits, rule, spread=None):
    """The certificate of one sample by the steps as they are written."""
    label, loser, counts = answer(logits, rule)
    models, classes = logits.shape
    rivals = [c for c in range(classes) if c != label]
    votes = [answer(row[None], "vote")[0] for row in logits]
    dp = table(64)

    def gap(a, b):
        return counts[a] - counts[b] + (b > a)

    def one(a, b):
        if spread is None:
            return -(-max(gap(a, b), 0) // 2)
        powers = [sum(1 + (votes[i] == a) - (votes[i] == b) for i in own) for own in spread]
        return greedy(powers, gap(a, b))

    def two(a, b, c):
        if spread is None:
            return dp[max(gap(a, b), 0), max(gap(a, c), 0)]
        powers = [
            sum(1 + 2 * (votes[i] == a) - (votes[i] == b) - (votes[i] == c) for i in own)
            for own in spread
        ]
        return max(one(a, b), one(a, c), greedy(powers, gap(a, b) + gap(a, c)))

    if rule == "vote":
        return label, min(one(label, c) for c in rivals) - 1
    pushed = min((two(label, b, c) for b, c in itertools.combinations(rivals, 2)), default=999)
    beaten = []
    for c in rivals:
        wants = [prefers(row, label, c) for row in logits]
        win = 2 * sum(wants) - models + (c > label)
        if spread is None:
            units = -(-max(win, 0) // 2)
        else:
            units = greedy([2 * sum(wants[i] for i in own) for own in spread], win)
        beaten.append(max(0 if c == loser else one(loser, c), units))
    return label, min(pushed, *beaten) - 1


def test_the_closed_form_is_the_dynamic_program():
    known = {(3, 3): 2, (5, 2): 3, (6, 10): 6, (9, 1): 5, (10, 10): 7, (0, 10): 5}
    for (i, j), units in known.items():
        assert units_against_two(i, j) == units
    dp = table(200)
    assert all(
        units_against_two(i, j) == dp[i, j] for i, j in itertools.product(range(200), repeat=2)
    )
    assert units_against_two(-4, 3) == 2


def test_worked_elections():
    zero, one = [(0, 1, 2)] * 20, [(1, 0, 2)] * 18
    first = of_rankings(*zero, *one, *[(2, 0, 1)] * 7)
    assert certify(first, "vote") == ([0], [1])
    assert certify(first, "roe") == ([0], [4])
    second = of_rankings(*zero, *one, *[(2, 1, 0)] * 7)
    assert certify(second, "vote") == ([0], [1])
    assert certify(second, "roe") == ([1], [2])
    third = of_rankings(*[(0, 1, 2)] * 3, *[(1, 2, 0)] * 2, *[(2, 1, 0)] * 2)
    assert certify(third, "vote").labels == [0]
    assert certify(third, "roe") == ([1], [0])


def test_worked_finite_aggregation():
    spread = finite_spread(6, (0, 2))
    votes = np.array([0, 0, 0, 0, 1, 1])
    assert units_against_one(votes, 0, 1, spread) == 1
    powers = np.sort([(1 + (votes == 0) - (votes == 1))[own].sum() for own in spread])[::-1]
    assert powers.tolist() == [4, 4, 2, 2, 2, 2]
    logits = np.stack([votes == 0, votes == 1], axis=1)[None].astype(np.float32)
    assert certify(logits, "vote", spread) == ([0], [0])


def rows_of(draw, models, classes, levels):
    values = draw(
        st.lists(st.integers(0, levels), min_size=models * classes, max_size=models * classes)
    )
    return np.array(values, np.float32).reshape(models, classes)


@st.composite
def elections(draw):
    """Few levels make ties everywhere."""
    models, classes = draw(st.integers(1, 12)), draw(st.integers(2, 5))
    return rows_of(draw, models, classes, draw(st.sampled_from([0, 1, 2, 9])))


@settings(max_examples=300)
@given(elections(), st.sampled_from(["vote", "roe"]))
def test_disjoint_parts_are_certified_as_published(logits, rule):
    assert certify(logits[None], rule) == published(logits, rule)


@settings(max_examples=300)
@given(elections(), st.sampled_from(["vote", "roe"]), st.data())
def test_overlapping_parts_are_certified_as_published(logits, rule, data):
    models = len(logits)
    shifts = data.draw(
        st.lists(st.integers(0, models - 1), min_size=1, max_size=models, unique=True)
    )
    spread = finite_spread(models, shifts)
    assert certify(logits[None], rule, spread) == published(logits, rule, spread)


def true_radius(logits, rule, spread, cap):
    """Most buckets, up to ``cap``, of which no change of any models flips the answer."""
    classes = logits.shape[1]
    rankings = of_rankings(*itertools.permutations(range(classes)))[0]
    before = answer(logits, rule)[0]
    for changed in range(1, cap + 1):
        for buckets in itertools.combinations(range(len(spread)), changed):
            reached = sorted({int(i) for j in buckets for i in spread[j]})
            # Models are interchangeable to the count, so of their rankings a multiset is enough.
            for choice in itertools.combinations_with_replacement(range(len(rankings)),
                                                                  len(reached)):  # fmt: skip
                poisoned = logits.copy()
                poisoned[reached] = rankings[list(choice)]
                if answer(poisoned, rule)[0] != before:
                    return changed - 1
    return cap


def test_no_poisoning_within_the_radius_flips_the_answer_and_one_more_does():
    """Disjoint parts, every poisoning of up to three parts: the certificate is the true radius."""
    random = np.random.default_rng(0)
    for _ in range(60):
        models = int(random.integers(1, 8))
        logits = random.permuted(np.tile(np.arange(3.0), (models, 1)), axis=1)
        cap = min(3, models)
        spread = np.arange(models)[:, None]
        for rule in ("vote", "roe"):
            label, radius = certify(logits[None], rule)
            assert label[0] == answer(logits, rule)[0]
            true = true_radius(logits, rule, spread, cap)
            assert min(radius[0], cap) == true, (logits, rule)


def test_finite_aggregation_is_sound_by_brute_force():
    """Overlapping parts: no poisoning of as many buckets as the radius flips the answer."""
    random = np.random.default_rng(1)
    tight = 0
    for number in range(60):
        models = int(random.integers(3, 8))
        shifts = random.permutation(models)[: 2 + number % 2]
        spread = finite_spread(models, shifts)
        logits = random.permuted(np.tile(np.arange(3.0), (models, 1)), axis=1)
        for rule in ("vote", "roe"):
            radius = int(certify(logits[None], rule, spread).radii[0])
            cap = min(radius + 1, 2)
            true = true_radius(logits, rule, spread, cap)
            assert true >= min(radius, cap), (logits, rule, shifts)
            tight += true == radius
    assert tight > 60


def test_a_class_that_is_ahead_gives_its_votes_to_another():
    """A gap that is negative already must not count as 0 beside another.

    Class 1 has most first choices, class 0 fewer but wins the second round by the voters of ten
    small classes. One bucket whose models turn from class 1 to class 2 pushes class 0 out.
    """
    small = [(c, 0, 1, *(o for o in range(2, 12) if o != c)) for c in range(2, 12)]
    rankings = [tuple(range(12))] * 8 + [(1, 0, *range(2, 12))] * 24 + small * 2
    logits = of_rankings(*rankings)
    # Each bucket feeds one voter of class 0 and nine of class 1.
    spread = np.array([[i, *(8 + (3 * i + np.arange(9)) % 24)] for i in range(8)])
    assert certify(logits, "roe", spread) == (0, 0)
    assert published(logits[0], "roe", spread) == (0, 0)
    poisoned = logits[0].copy()
    poisoned[spread[0]] = of_rankings((2, 1, 0, *range(3, 12)))[0]
    assert answer(poisoned, "roe")[0] != 0


@settings(max_examples=60)
@given(st.data())
def test_two_classes_make_both_rules_the_same(data):
    logits = rows_of(data.draw, data.draw(st.integers(1, 20)), 2, 2)[None]
    assert certify(logits, "vote") == certify(logits, "roe")
    spread = finite_spread(logits.shape[1], [0])
    for rule in ("vote", "roe"):
        assert certify(logits, rule, spread) == certify(logits, rule)


@settings(max_examples=100)
@given(elections())
def test_one_model_a_bucket_is_disjoint_parts(logits):
    if len(logits) == 1 and logits.shape[1] > 2:
        return  # one model never puts two classes in front, which the closed form does not know
    spread = finite_spread(len(logits), [0])
    for rule in ("vote", "roe"):
        assert certify(logits[None], rule, spread) == certify(logits[None], rule)


def test_equal_logits_give_a_radius_of_0_or_more():
    """Absent classes filled with a constant, and nothing but ties."""
    for classes in (2, 3, 10):
        for models in (1, 2, 7):
            logits = np.zeros((1, models, classes), np.float32)
            for rule in ("vote", "roe"):
                for spread in (None, finite_spread(models, [0])):
                    label, radius = certify(logits, rule, spread)
                    assert label[0] == 0 and radius[0] == models // 2


def test_a_class_that_nobody_predicts_is_never_certified_against_the_rest():
    logits = np.random.default_rng(0).normal(size=(50, 20, 4)).astype(np.float32)
    logits[..., 2] = -100.0
    for rule in ("vote", "roe"):
        label, radius = certify(logits, rule)
        assert not (label == 2).any() and (radius >= 0).all()
        without = certify(np.delete(logits, 2, axis=2), rule)
        # It can be voted for by poisoned models, so it can only lower a radius.
        assert (radius <= without.radii).all()


@pytest.mark.parametrize("kind", [np.float16, np.float64, np.int32, np.uint8])
def test_other_numbers_give_the_same(kind):
    logits = np.random.default_rng(0).integers(0, 9, (30, 15, 5))
    expected = certify(logits.astype(np.float32))
    found = certify(logits.astype(kind))
    assert (found.labels == expected.labels).all() and (found.radii == expected.radii).all()


def test_blocks_and_mapped_files_give_the_same(tmp_path, monkeypatch):
    logits = np.random.default_rng(0).normal(size=(40, 1200, 10)).astype(np.float32)
    np.save(tmp_path / "logits.npy", logits)
    mapped = np.load(tmp_path / "logits.npy", mmap_mode="r")
    spread = finite_spread(1200, [0, 17, 400])
    for own in (None, spread):
        whole = certify(logits, "roe", own)
        parts = [certify(logits[low : low + 7], "roe", own) for low in range(0, 40, 7)]
        assert (whole.radii == np.concatenate([part.radii for part in parts])).all()
        assert (whole.radii == certify(mapped, "roe", own).radii).all()


def test_certified_accuracy():
    certified = Certified(np.array([1, 1, 0, 2]), np.array([3, 0, 5, 9]))
    truth = np.array([1, 1, 1, 2])
    assert certified_accuracy(certified, truth, [0, 1, 3, 4, 9, 10]).tolist() == [
        75.0, 50.0, 50.0, 25.0, 25.0, 0.0,
    ]  # fmt: skip
    clean = certified_accuracy(certified, truth, 0)  # type: ignore[arg-type]
    assert clean[0] == 100.0 * (certified.labels == truth).mean()
    with pytest.raises(InputError, match="0 samples or more, not -1"):
        certified_accuracy(certified, truth, [-1])
    with pytest.raises(InputError, match="not compared"):
        certified_accuracy(certified, truth[:2], [0])


@pytest.mark.parametrize(
    ("logits", "options", "sentence"),
    [
        (np.zeros((3, 4)), {}, r"\[samples, models, classes\]; these are \[3, 4\]"),
        (np.array([[["a", "b"]]]), {}, "are numbers"),
        (np.zeros((3, 4, 1)), {}, "4 models with 1 classes"),
        (np.zeros((3, 0, 2)), {}, "0 models with 2 classes"),
        (np.zeros((1, 2, 2)), {"rule": "loudest"}, "vote or roe"),
        (np.array([[[0.0, 1.0]], [[np.nan, 0.0]]]), {}, "sample 1 hold NaN"),
        (np.zeros((1, 2, 2)), {"spread": np.array([[0], [2]])}, "names model 2, but there are 2"),
        (np.zeros((1, 2, 2)), {"spread": np.array([[0, 0]])}, "twice for one bucket"),
        (np.zeros((1, 2, 2)), {"spread": np.zeros(2)}, "whole numbers"),
    ],
)
def test_what_cannot_be_certified_is_said(logits, options, sentence):
    with pytest.raises(InputError, match=sentence):
        certify(logits, **options)


def test_labels_out_of_range_are_said():
    assert check_labels(np.array([0, 1], np.uint8), 2).tolist() == [0, 1]
    with pytest.raises(InputError, match="class 2 at 1, but there are 2"):
        check_labels(np.array([0, 2]), 2)
    with pytest.raises(InputError, match="class -1 at 0"):
        check_labels(np.array([-1, 1]), 2)
    with pytest.raises(InputError, match="whole numbers"):
        check_labels(np.array([0.5, 1.0]), 2)
