"""Private evolution: the algorithm, and what a killed, repeated or mutated run may not do."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gossamer.core.errors import BudgetError, InputError
from gossamer.data import nearest_histogram, private
from gossamer.data.generators import NearestImage, UniformBox
from gossamer.data.privacy_budget import LEDGER, Ledger, gaussian_epsilon, open_ledger
from gossamer.data.privacy_noise import SecretDiscreteGaussian, SeededGaussian
from gossamer.data.private import Population, PrivateEvolution, class_sizes
from gossamer.experiments.data.private import gaussians, toy
from gossamer.parts.sample_distances import sliced_wasserstein


def same(samples: np.ndarray) -> np.ndarray:
    return samples


class Identity:
    """Gives the samples it was made of, and leaves them as they are."""

    def __init__(self, samples: np.ndarray) -> None:
        self.samples = samples

    def random(self, labels: np.ndarray, *, seed: int) -> np.ndarray:
        return self.samples[: len(labels)]

    def variation(self, samples, labels, degree: float, *, seed: int) -> np.ndarray:
        return samples

    def degrees(self, iterations: int) -> list[float]:
        return [1.0] * (iterations + 1)


class Killed(Exception):
    pass


class Fragile(UniformBox):
    """Dies at the call of variation with this number."""

    def __init__(self, dies_at: int) -> None:
        super().__init__()
        self.left = dies_at

    def variation(self, samples, labels, degree: float, *, seed: int) -> np.ndarray:
        self.left -= 1
        if self.left < 0:
            raise Killed
        return super().variation(samples, labels, degree, seed=seed)


def small(**options) -> PrivateEvolution:
    chosen = {
        "n_samples": 60, "iterations": 4, "lookahead": 2, "epsilon": 4.0, "seed": 3,
        "noise": SeededGaussian(5),
    }  # fmt: skip
    api = options.pop("api", None) or UniformBox()
    return PrivateEvolution(api, same, **(chosen | options))


@pytest.fixture
def points() -> np.ndarray:
    return np.random.default_rng(0).normal(2.0, 0.5, (600, 2)).astype(np.float32)


def test_largest_remainder_gives_ties_to_the_later_class() -> None:
    assert class_sizes(np.ones(3) / 3, 10).tolist() == [3, 3, 4]
    assert class_sizes(np.array([0.5, 0.25, 0.25]), 10).tolist() == [5, 2, 3]
    random = np.random.default_rng(0)
    for _ in range(50):
        shares = random.dirichlet(np.ones(5)) * 0.9 + 0.02
        total = int(random.integers(60, 300))
        sizes = class_sizes(shares, total)
        assert sizes.sum() == total and (np.abs(sizes - shares * total) < 1.0).all()
    with pytest.raises(InputError, match="class 1 gets none of 3"):
        class_sizes(np.array([0.9, 0.1]), 3)


def test_the_support_is_kept_where_the_start_is_the_private_set(points) -> None:
    population = small(
        api=Identity(points[:60]), epsilon=math.inf, threshold=None, iterations=3
    ).fit(points[:60])
    assert {tuple(p) for p in population.samples} <= {tuple(p) for p in points[:60]}
    # Every sample voted for itself, so ranking keeps exactly all of them.
    ranked = small(api=Identity(points[:60]), epsilon=math.inf, threshold=None, selection="rank")
    assert np.array_equal(ranked.fit(points[:60]).samples, points[:60])


def test_it_moves_towards_the_private_points(points) -> None:
    start: list[float] = []

    def watch(number: int, population: Population) -> None:
        start.append(sliced_wasserstein(population.samples, points))

    small(epsilon=8.0, iterations=6).fit(points, watch=watch)
    assert start[-1] < 0.4 * start[0]


def test_classes_evolve_apart_and_keep_their_shares() -> None:
    random = np.random.default_rng(1)
    labels = np.repeat([0, 1], [300, 100])
    centres = np.array([[-4.0, 0.0], [4.0, 0.0]])
    samples = (centres[labels] + random.normal(0, 0.4, (400, 2))).astype(np.float32)
    found = small(n_samples=80, epsilon=20.0, iterations=6).fit(samples, labels)
    assert np.bincount(found.labels).tolist() == [60, 20]
    assert (np.sign(found.samples[:, 0]) == np.where(found.labels == 0, -1, 1)).mean() > 0.9
    shares = small(n_samples=80, shares=[1, 1]).fit(samples, labels)
    assert np.bincount(shares.labels).tolist() == [40, 40]


def test_families_and_changing_sizes(points) -> None:
    found = small(n_samples=[30, 20, 41, 10, 25], children=2, keep_parents=True, first_children=1)
    sizes: list[int] = []
    found.fit(points, watch=lambda number, population: sizes.append(len(population.samples)))
    assert sizes == [60, 20, 41, 10, 25]


def test_the_toy_comes_near_the_published_distances() -> None:
    start = sliced_wasserstein(UniformBox().random(np.zeros(2000), seed=0), gaussians(0))
    assert start == pytest.approx(1.6, abs=0.1)
    assert toy(0, sigma=0.0, threshold=0.0) < 0.13
    assert toy(0, sigma=1.0, threshold=2.0) < 0.15


# What is spent, and never more.


def test_the_ledger_holds_exactly_the_planned_releases(points, tmp_path: Path) -> None:
    pe = small(work=tmp_path, epsilon=1.0, iterations=4)
    pe.fit(points)
    report = pe.privacy_report()
    assert report["releases_in_ledger"] == 4
    assert report["epsilon_spent"] == pytest.approx(1.0, abs=1e-6)
    assert report["epsilon_spent"] <= 1.0
    assert gaussian_epsilon(report["sigma"], 4, 1e-5) == pytest.approx(report["epsilon_spent"])


def test_a_run_killed_anywhere_goes_on_to_the_same_end(points, tmp_path: Path) -> None:
    whole = small(work=tmp_path / "whole").fit(points)
    with open_ledger(tmp_path / "whole" / "ledger", 4.0, 1e-5) as ledger:
        wanted = [entry.values for entry in ledger.releases]
    # Each iteration calls variation three times: twice to look ahead, once for children.
    for dies_at in range(12):
        work = tmp_path / str(dies_at)
        with pytest.raises(Killed):
            small(api=Fragile(dies_at), work=work).fit(points)
        with open_ledger(work / "ledger", 4.0, 1e-5) as ledger:
            before = [entry.values.copy() for entry in ledger.releases]
        assert len(before) == (dies_at + 1) // 3
        pe = small(work=work, noise=SeededGaussian(77))  # other noise, were it drawn again
        found = pe.fit(points)
        with open_ledger(work / "ledger", 4.0, 1e-5) as ledger:
            after = [entry.values for entry in ledger.releases]
            assert ledger.spent() <= 4.0
        assert len(after) == len(wanted)
        for old, new in zip(before, after, strict=False):
            assert np.array_equal(old, new)
        if len(before) == 4:
            assert np.array_equal(found.samples, whole.samples)


def test_a_lost_population_does_not_buy_new_noise(points, tmp_path: Path) -> None:
    first = small(work=tmp_path).fit(points)
    (tmp_path / private.POPULATION).unlink()
    # The same questions are answered by the same noisy counts, at no further cost.
    again = small(work=tmp_path, noise=SeededGaussian(99))
    with pytest.raises(BudgetError, match="does not allow"):
        replace(again, seed=4).fit(points)
    with open_ledger(tmp_path / "ledger", 4.0, 1e-5) as ledger:
        assert len(ledger.releases) == 4 and ledger.spent() <= 4.0
    assert len(first.samples) == 60


def test_runs_on_the_same_data_share_a_ledger(points, tmp_path: Path) -> None:
    shared = tmp_path / "account"
    sigma = small(epsilon=4.0).noise_scale
    small(work=tmp_path / "one", ledger=shared, iterations=2, sigma=sigma).fit(points)
    small(work=tmp_path / "two", ledger=shared, iterations=2, sigma=sigma, seed=8).fit(points)
    with pytest.raises(BudgetError, match=r"is spent at delta 1e-05, and 1 more releases"):
        small(ledger=shared, iterations=1, sigma=sigma, seed=9).fit(points)
    with pytest.raises(BudgetError, match="a promise is not changed afterwards"):
        small(ledger=shared, epsilon=8.0).fit(points)
    (shared / LEDGER).write_bytes(b"nothing")
    with pytest.raises(InputError, match="truncated"):
        small(ledger=shared).fit(points)


def test_a_refused_release_does_not_look_at_the_data() -> None:
    ledger = Ledger(1.0, 1e-5)

    def answer() -> np.ndarray:
        raise AssertionError("looked")

    with pytest.raises(BudgetError):
        ledger.release("key", 1.0, "gaussian", answer)


def test_an_unwritten_release_is_not_used(points, tmp_path: Path, monkeypatch) -> None:
    """The noisy counts are on disk before a selection sees them."""
    seen: list[int] = []
    select = nearest_histogram.select_rows

    def spy(*given, **named):
        from gossamer.core.files import load_state

        seen.append(len(load_state(tmp_path / "ledger" / LEDGER)["releases"]))
        return select(*given, **named)

    monkeypatch.setattr(private, "select_rows", spy)
    small(work=tmp_path).fit(points)
    assert seen == [1, 2, 3, 4]


# An audit: the noise that comes out is the noise that was promised.


def noise_of(evolve: PrivateEvolution, samples: np.ndarray) -> tuple[np.ndarray, float]:
    """What the released histogram differs by from the one that the samples have."""
    taken: list[np.ndarray] = []
    count = private.count_votes

    def spy(*given, **named):
        taken.append(count(*given, **named))
        return taken[-1].copy()

    release = Ledger.release
    given: list[np.ndarray] = []

    def watched(self, *arguments):
        given.append(release(self, *arguments))
        return given[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(private, "count_votes", spy)
        patch.setattr(Ledger, "release", watched)
        evolve.fit(samples)
    length = math.sqrt(evolve.neighbours)
    pairs = zip(given, taken, strict=True)
    return np.concatenate([noisy - clean / length for noisy, clean in pairs]), evolve.noise_scale


def audit(evolve: PrivateEvolution, samples: np.ndarray) -> None:
    """Fails if the noise is not normal with the promised scale, in every bin anew.

    The scale is tested one-sidedly at five standard errors, so a missing or halved noise, or one
    for a sensitivity other than 1, is caught and chance is not.
    """
    from scipy.stats import kstest

    noise, sigma = noise_of(evolve, samples)
    spread = noise.std() / sigma
    assert abs(spread - 1.0) < 5.0 / math.sqrt(2 * len(noise)), f"noise is {spread:.3f} of promised"
    assert len(np.unique(noise)) > 0.9 * len(noise), "bins share their noise"
    assert kstest(noise / sigma, "norm").pvalue > 1e-5


@pytest.mark.parametrize("neighbours", [1, 4])
def test_audit_of_the_noise(points, neighbours: int) -> None:
    audit(small(n_samples=400, neighbours=neighbours, lookahead=0), points)


def test_the_audit_catches_mutations(points) -> None:
    class Missing(SeededGaussian):
        def draw(self, count: int, sigma: float) -> np.ndarray:
            return np.zeros(count)

    class Halved(SeededGaussian):
        def draw(self, count: int, sigma: float) -> np.ndarray:
            return super().draw(count, sigma / math.sqrt(2.0))

    class Shared(SeededGaussian):
        def draw(self, count: int, sigma: float) -> np.ndarray:
            return np.repeat(super().draw(count, sigma)[:1], count)

    for mutant in (Missing(0), Halved(0), Shared(0)):
        with pytest.raises(AssertionError):
            audit(small(n_samples=400, lookahead=0, noise=mutant), points)


def distinguishing(with_one: np.ndarray, without: np.ndarray, delta: float) -> float:
    """A lower bound of epsilon from how well a threshold tells two sets of answers apart."""
    best = 0.0
    for cut in np.quantile(np.concatenate([with_one, without]), np.linspace(0.02, 0.98, 49)):
        hit, false = (with_one > cut).mean(), (without > cut).mean()
        slack = 3.0 / math.sqrt(len(with_one))
        if hit - slack - delta > 0.0:
            best = max(best, math.log((hit - slack - delta) / (false + slack)))
    return best


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_an_attacker_learns_no_more_than_epsilon(weight: float) -> None:
    """The best test for one person's vote stays within the promise; a double vote breaks it."""
    sigma, delta = 2.0, 0.05
    promised = gaussian_epsilon(sigma, 1, delta)
    noise = SeededGaussian(0)
    with_one = weight + noise.draw(200_000, sigma)
    without = noise.draw(200_000, sigma)
    learned = distinguishing(with_one, without, delta)
    assert (learned <= promised) == (weight == 1.0)


# Bad input.


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"epsilon": 0.0}, "epsilon must be above 0, not 0"),
        ({"epsilon": -1.0}, "epsilon must be above 0"),
        ({"epsilon": math.nan}, "epsilon must be above 0"),
        ({"delta": 0.0}, "delta must lie strictly between 0 and 1"),
        ({"delta": 1.0}, "delta must lie strictly between 0 and 1"),
        ({"iterations": 1, "delta": 0.5}, r"delta 0.5 is no promise to 600 private samples"),
        ({"sigma": 0.1}, "the privacy budget does not allow it"),
        ({"sigma": 0.0}, "the privacy budget does not allow it"),
        ({"iterations": 0}, "at least 1 iteration"),
        ({"degrees": [1.0]}, r"need 5 degrees \(one for the start\), not 1"),
        ({"epsilon": 1e-15, "delta": 1e-15}, "every vote drowns"),
    ],
)
def test_impossible_budgets_are_one_sentence(points, options, sentence: str) -> None:
    with pytest.raises((BudgetError, InputError), match=sentence) as problem:
        small(**options).fit(points)
    assert "\n" not in str(problem.value)


def test_bad_labels_are_one_sentence(points) -> None:
    labels = np.zeros(600, dtype=np.int64)
    labels[:300] = 2
    with pytest.raises(InputError, match="class 1 has no private sample"):
        small().fit(points, labels)
    labels[:300] = -1
    with pytest.raises(InputError, match="whole numbers from 0"):
        small().fit(points, labels)
    with pytest.raises(InputError, match="600 private samples have 5 labels"):
        small().fit(points, labels[:5])
    labels[:300] = 1
    with pytest.raises(InputError, match="class 0 has 1 synthetic samples for 2 votes"):
        small(n_samples=2, neighbours=2).fit(points, labels)
    broken = points.copy()
    broken[3] = np.nan
    with pytest.raises(InputError, match="not finite"):
        small().fit(broken)


def test_discrete_noise_is_whole_and_costs_a_little_more(points) -> None:
    plain, discrete = small(epsilon=1.0), small(epsilon=1.0, noise=SecretDiscreteGaussian())
    assert 1.0 < discrete.noise_scale / plain.noise_scale < 1.25
    noise, sigma = noise_of(small(n_samples=400, noise=SecretDiscreteGaussian()), points)
    assert np.array_equal(noise, noise.round())
    assert noise.std() == pytest.approx(sigma, rel=0.1)
    with pytest.raises(InputError, match="whole votes"):
        discrete.fit(points, clients=np.arange(600) // 10)


def test_an_empty_histogram_draws_all_alike_and_is_counted(points) -> None:
    pe = small(threshold=1e9)
    pe.fit(points)
    assert pe.privacy_report()["classes_drawn_uniformly"] == 4


def test_a_pool_of_images_as_generator(points) -> None:
    pool = np.random.default_rng(2).uniform(-8, 8, (2000, 2)).astype(np.float32)
    api = NearestImage(pool, same)
    found = small(api=api, epsilon=math.inf, n_samples=50, iterations=5).fit(points)
    assert {tuple(p) for p in found.samples} <= {tuple(p) for p in pool}
    assert sliced_wasserstein(found.samples, points) < 0.5
