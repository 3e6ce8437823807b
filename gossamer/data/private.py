"""Private Evolution: synthetic data with a guarantee, from two calls to a generator.

Lin, Gopi, Kulkarni, Nori & Yekhanin, "Differentially Private Synthetic Data via Foundation Model
APIs 1: Images", ICLR 2024, arXiv:2305.15560, Algorithm 1. Every private sample votes for the
synthetic one nearest to it; the votes get Gaussian noise; winners are drawn and varied. Only the
noisy histogram is made of private data, so the generator never sees any, and the account is that of
one Gaussian mechanism. Neighbouring data sets differ by *adding or removing* one sample (replacing
one has twice the squared sensitivity); which classes there are and how many samples each has count
as public.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from gossamer.core.errors import BudgetError, InputError
from gossamer.core.files import exclusive, load_state, save_state
from gossamer.core.progress import progress
from gossamer.data.generators import Embedding, Generator
from gossamer.data.nearest_histogram import (
    Selection,
    count_client_votes,
    count_votes,
    select_rows,
    thresholded,
)
from gossamer.data.privacy_budget import (
    ROUNDING,
    Ledger,
    check_budget,
    gaussian_sigma,
    open_ledger,
    zcdp_sigma,
)
from gossamer.data.privacy_noise import Noise, SecretGaussian
from gossamer.parts.neighbours import Metric

log = logging.getLogger(__name__)

POPULATION = "population.safetensors"
AUTO_THRESHOLD = math.sqrt(2.0)
"""Threshold in multiples of the noise: the paper's on CIFAR-10 (10 at ``5 sqrt(2)``)."""


@dataclass(frozen=True)
class Population:
    """Synthetic samples.

    Attributes:
        samples: ``[n, ...]``.
        labels: ``[n]`` int64; all 0 without classes.
    """

    samples: np.ndarray
    labels: np.ndarray


@dataclass
class PrivateEvolution:
    """Evolves a synthetic set towards a private one.

    Every option is to be chosen without a look at the private data, such as a distance to it:
    trying several and keeping the best is not private. So is an embedding that was trained on it.

    Attributes:
        api: the generator.
        embedding: vectors of samples ``[n, d]``, made without private data.
        n_samples: synthetic samples, or one number for the start and each iteration. Few private
            samples a synthetic one drown in noise.
        iterations: T.
        epsilon: limit of the budget; infinity evolves without noise and protects nothing.
        delta: of the budget; must be below one over the number of private samples.
        sigma: the noise. Default: the least that keeps within the budget.
        lookahead: variants whose mean embedding stands for a sample; 0 takes its own.
        threshold: H: bins below have no children; "auto" is sqrt(2) times the noise; None is none.
        degrees: of variation, for the start and each iteration. Default: the generator's.
        neighbours: votes of each private sample, together of length 1.
        metric: of the nearest.
        selection: "sample" by weight with replacement, or "rank".
        children: variants of each drawn parent.
        keep_parents: parents stay beside their children.
        first_children: variants added to each sample of the start.
        shares: of the classes, if their private counts are not public. Default: as counted.
        noise: where it comes from; the default is fit for release.
        seed: of the generator and the selection, never of secret noise.
        work: a folder in which a killed run goes on. Default: nothing is kept.
        ledger: a folder with the account of the private data, shared by all runs on it. Default:
            in ``work``.
    """

    api: Generator
    embedding: Embedding
    n_samples: int | Sequence[int] = 2000
    iterations: int = 10
    epsilon: float = 1.0
    delta: float = 1e-5
    sigma: float | None = None
    lookahead: int = 8
    threshold: float | Literal["auto"] | None = "auto"
    degrees: Sequence[float] | None = None
    neighbours: int = 1
    metric: Metric = "euclidean"
    selection: Selection = "sample"
    children: int = 1
    keep_parents: bool = False
    first_children: int = 0
    shares: Sequence[float] | None = None
    noise: Noise = field(default_factory=SecretGaussian)
    seed: int = 0
    work: Path | None = None
    ledger: Path | None = None

    def __post_init__(self) -> None:
        check_budget(self.epsilon, self.delta)
        if self.iterations < 1:
            raise InputError(f"there is at least 1 iteration, not {self.iterations}")
        if self.sigma is not None and not 0.0 <= self.sigma < math.inf:
            raise InputError(f"noise is a number from 0 on, not {self.sigma:g}")
        if min(self.lookahead, self.first_children) < 0 or self.children < 1:
            raise InputError("lookahead and first_children are at least 0, children at least 1")
        self._report: dict[str, Any] = {}
        if self.sigma is None:
            solve = gaussian_sigma if self.noise.accounting == "gaussian" else zcdp_sigma
            # Rounded up, so that T releases never add up to a hair more than the limit.
            self.sigma = solve(self.epsilon, self.iterations, self.delta) * ROUNDING

    @property
    def noise_scale(self) -> float:
        """The standard deviation of the noise, for votes of length 1."""
        assert self.sigma is not None
        return self.sigma

    def fit(
        self,
        samples: np.ndarray,
        labels: np.ndarray | None = None,
        *,
        clients: np.ndarray | None = None,
        watch: Callable[[int, Population], None] | None = None,
    ) -> Population:
        """Evolves towards private samples; see :meth:`evolve`.

        Args:
            samples: private, ``[m, ...]``.
            labels: ``[m]``, from 0; None if there are no classes.
            clients: whose sample each is, ``[m]``: protects all samples of a client together.
            watch: called with each iteration's number and population, from 0.
        """
        return self.evolve(self.embedding(samples), labels, clients=clients, watch=watch)

    def evolve(
        self,
        features: np.ndarray,
        labels: np.ndarray | None = None,
        *,
        clients: np.ndarray | None = None,
        watch: Callable[[int, Population], None] | None = None,
    ) -> Population:
        """Evolves towards private samples that are known by their embeddings only.

        Args:
            features: private, ``[m, d]``.
            labels: ``[m]``, from 0; None if there are no classes.
            clients: whose sample each is, ``[m]``: protects all samples of a client together.
            watch: called with each iteration's number and population, from 0.

        Returns:
            The last population. Whatever is made of it, such as further variants, is as private.

        Raises:
            BudgetError: if the ledger does not allow all iterations, or delta is no promise.
            InputError: if a class has no samples, or sizes do not fit.
        """
        features = np.asarray(features, dtype=np.float32)
        self._check(features, labels, clients)
        plan = self._plan(len(features), labels)
        own = None if self.work is None else self.work / "ledger"
        with (
            _held(self.work),
            open_ledger(self.ledger or own, self.epsilon, self.delta) as ledger,
        ):
            step, population, uniform = self._start(plan)
            paid = self._key(step + 1, population, plan, clients) in {
                entry.key for entry in ledger.releases
            }
            if step < self.iterations:
                remaining = self.iterations - step - paid
                ledger.require(self.noise_scale, self.noise.accounting, remaining)
            if watch is not None:
                watch(step, population)
            with progress() as bar:
                shown = bar.add_task("evolving", total=self.iterations, completed=step)
                for number in range(step + 1, self.iterations + 1):
                    noisy = self._noisy(ledger, number, population, features, labels, clients, plan)
                    population, fallbacks = self._next(number, population, noisy, plan)
                    uniform += fallbacks
                    self._keep(number, population, uniform, plan)
                    bar.update(shown, completed=number)
                    if watch is not None:
                        watch(number, population)
            self._report = self._account(ledger, uniform, clients is not None)
        return population

    def privacy_report(self) -> dict[str, Any]:
        """What was promised and spent; holds nothing that is private.

        Raises:
            InputError: before a run.
        """
        if not self._report:
            raise InputError("there is no report before fit")
        return dict(self._report)

    def _check(
        self, features: np.ndarray, labels: np.ndarray | None, clients: np.ndarray | None
    ) -> None:
        if features.ndim != 2 or len(features) == 0:
            raise InputError(f"private embeddings are [samples, d], not {list(features.shape)}")
        if not np.isfinite(features).all():
            raise InputError("private embeddings are not finite; look at the embedding")
        for name, given in (("labels", labels), ("clients", clients)):
            if given is not None and len(given) != len(features):
                raise InputError(f"{len(features)} private samples have {len(given)} {name}")
        units = len(features) if clients is None else len(np.unique(clients))
        if math.isfinite(self.epsilon) and self.delta * units >= 1.0:
            raise BudgetError(
                f"delta {self.delta:g} is no promise to {units:,} private "
                f"{'samples' if clients is None else 'clients'}: publishing one whole would "
                f"keep it; take less than {1.0 / units:.2g}"
            )
        if clients is not None and self.noise.accounting == "zcdp":
            raise InputError("discrete noise needs whole votes; clients have scaled ones")

    def _plan(self, private: int, labels: np.ndarray | None) -> _Plan:
        counts = np.array([private]) if labels is None else _class_counts(labels)
        if self.shares is None:
            shares = counts / counts.sum()
            if labels is not None and math.isfinite(self.epsilon):
                log.warning("the number of private samples in each class counts as public")
        else:
            shares = np.asarray(self.shares, dtype=np.float64)
            if shares.shape != counts.shape or not (shares > 0.0).all():
                raise InputError(f"{len(counts)} classes need as many shares above 0")
            shares = shares / shares.sum()
        sizes = (
            [self.n_samples] * (self.iterations + 1)
            if isinstance(self.n_samples, int)
            else [int(size) for size in self.n_samples]
        )
        degrees = self.api.degrees(self.iterations) if self.degrees is None else self.degrees
        for name, given in (("numbers of samples", sizes), ("degrees", degrees)):
            if len(given) != self.iterations + 1:
                raise InputError(
                    f"{self.iterations} iterations need {self.iterations + 1} {name} (one for the "
                    f"start), not {len(given)}"
                )
        parts = [class_sizes(shares, size) for size in sizes]
        votes = float((counts / parts[0]).min())
        if votes < 2.0 * self.noise_scale:
            log.warning(
                "%.3g private samples a synthetic one against noise of %.3g: most votes drown; ask "
                "for fewer samples or iterations", votes, self.noise_scale,
            )  # fmt: skip
        return _Plan(parts, [float(degree) for degree in degrees], labels is not None)

    def _start(self, plan: _Plan) -> tuple[int, Population, int]:
        """The kept population if there is one, otherwise a fresh one."""
        kept = self._kept(plan)
        if kept is not None:
            return kept
        labels = np.repeat(np.arange(len(plan.sizes[0])), plan.sizes[0])
        samples = self.api.random(labels, seed=self._seed(0, 0))
        self._expect(samples, len(labels))
        parts = [samples]
        for fold in range(self.first_children):
            parts.append(self._vary(samples, labels, plan.degrees[0], self._seed(0, 1 + fold)))
        population = Population(np.concatenate(parts), np.tile(labels, len(parts)))
        self._keep(0, population, 0, plan)
        return 0, population, 0

    def _noisy(
        self,
        ledger: Ledger,
        number: int,
        population: Population,
        features: np.ndarray,
        labels: np.ndarray | None,
        clients: np.ndarray | None,
        plan: _Plan,
    ) -> np.ndarray:
        """The noisy histogram: the only thing that is ever made of private data."""

        def answer() -> np.ndarray:
            sides: dict[str, Any] = {"neighbours": self.neighbours, "metric": self.metric}
            if labels is not None:
                sides |= {"private_labels": labels, "synthetic_labels": population.labels}
            bins = self._look_ahead(number, population, plan)
            if bins.shape[1:] != features.shape[1:]:
                raise InputError(
                    f"synthetic embeddings have {bins.shape[1:]} numbers, private ones "
                    f"{features.shape[1:]}"
                )
            if clients is not None:
                votes = count_client_votes(features, bins, clients, **sides)
                return votes + self.noise.draw(len(votes), self.noise_scale)
            # Noise is added to whole counts, whose length is sqrt(q), before they are scaled.
            length = math.sqrt(self.neighbours)
            votes = count_votes(features, bins, **sides)
            return (votes + self.noise.draw(len(votes), self.noise_scale * length)) / length

        key = self._key(number, population, plan, clients)
        return ledger.release(key, self.noise_scale, self.noise.accounting, answer)

    def _look_ahead(self, number: int, population: Population, plan: _Plan) -> np.ndarray:
        """Where each sample's children would land, ``[n, d]``."""
        if self.lookahead == 0:
            return np.asarray(self.embedding(population.samples), dtype=np.float32)
        total: Any = 0.0
        for look in range(self.lookahead):
            variants = self._vary(
                population.samples, population.labels, plan.degrees[number],
                self._seed(number, 10 + look),
            )  # fmt: skip
            total = total + np.asarray(self.embedding(variants), dtype=np.float64)
        return (total / self.lookahead).astype(np.float32)

    def _next(
        self, number: int, population: Population, noisy: np.ndarray, plan: _Plan
    ) -> tuple[Population, int]:
        """Parents by the noisy histogram, and their children."""
        height = AUTO_THRESHOLD * self.noise_scale if self.threshold == "auto" else self.threshold
        weights = thresholded(noisy, height)
        random = np.random.default_rng(self._seed(number, 1))
        family = self.children + self.keep_parents
        parents, fallbacks = [], 0
        for label, size in enumerate(plan.sizes[number]):
            rows = np.flatnonzero(population.labels == label)
            drawn, alike = select_rows(
                weights[rows], math.ceil(size / family), how=self.selection, random=random
            )
            parents.append(rows[drawn])
            fallbacks += alike
        if fallbacks:
            log.warning(
                "iteration %d: no bin of %d classes is over the threshold", number, fallbacks
            )
        chosen = np.concatenate(parents)
        samples, labels = population.samples[chosen], population.labels[chosen]
        parts = [samples] if self.keep_parents else []
        for child in range(self.children):
            seed = self._seed(number, 1000 + child)
            parts.append(self._vary(samples, labels, plan.degrees[number], seed))
        # Families lie side by side, so that cutting to the size drops no class.
        every = np.stack(parts, axis=1).reshape(-1, *samples.shape[1:])
        owners = np.repeat(labels, family)
        rows = np.concatenate(
            [
                np.flatnonzero(owners == label)[:size]
                for label, size in enumerate(plan.sizes[number])
            ]
        )
        return Population(every[rows], owners[rows]), fallbacks

    def _vary(
        self, samples: np.ndarray, labels: np.ndarray, degree: float, seed: int
    ) -> np.ndarray:
        varied = self.api.variation(samples, labels, degree, seed=seed)
        self._expect(varied, len(samples))
        return varied

    def _expect(self, samples: np.ndarray, count: int) -> None:
        if len(samples) != count:
            raise InputError(f"the generator gave {len(samples)} samples for {count}")

    def _seed(self, number: int, purpose: int) -> int:
        return int(np.random.SeedSequence([self.seed, number, purpose]).generate_state(1)[0])

    def _settings(self, plan: _Plan) -> str:
        chosen = (
            self.lookahead, self.threshold, self.neighbours, self.metric, self.selection,
            self.children, self.keep_parents, self.first_children, self.seed, self.iterations,
            self.noise_scale, plan.degrees, [part.tolist() for part in plan.sizes], plan.classes,
        )  # fmt: skip
        return hashlib.blake2b(repr(chosen).encode(), digest_size=16).hexdigest()

    def _key(
        self, number: int, population: Population, plan: _Plan, clients: np.ndarray | None
    ) -> str:
        """Names a question to the private data by all that is public about it."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"{number} {self._settings(plan)} {clients is not None}".encode())
        digest.update(np.ascontiguousarray(population.samples).tobytes())
        digest.update(population.labels.tobytes())
        return digest.hexdigest()

    def _keep(self, number: int, population: Population, uniform: int, plan: _Plan) -> None:
        if self.work is not None:
            state = {
                "settings": self._settings(plan),
                "step": number,
                "uniform": uniform,
                "samples": torch.from_numpy(np.ascontiguousarray(population.samples)),
                "labels": torch.from_numpy(population.labels),
            }
            save_state(self.work / POPULATION, state)

    def _kept(self, plan: _Plan) -> tuple[int, Population, int] | None:
        if self.work is None or not (self.work / POPULATION).exists():
            return None
        state = load_state(self.work / POPULATION)
        if state.get("settings") != self._settings(plan):
            log.info("%s holds a run with other options; beginning anew", self.work)
            return None
        try:
            population = Population(state["samples"].numpy(), state["labels"].numpy())
            return int(state["step"]), population, int(state["uniform"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self.work / POPULATION} is no population of a run") from error

    def _account(self, ledger: Ledger, uniform: int, clients: bool) -> dict[str, Any]:
        private = math.isfinite(self.epsilon)
        spent = ledger.spent()
        return {
            "private": private,
            "epsilon_limit": self.epsilon if private else None,
            "epsilon_spent": spent if math.isfinite(spent) else None,
            "delta": self.delta,
            "sigma": self.noise_scale,
            "iterations": self.iterations,
            "releases_in_ledger": len(ledger.releases),
            "neighbouring": f"adding or removing {'all of a client' if clients else 'one sample'}",
            "public": "classes and their shares"
            + (" as counted in the private data" if self.shares is None else " as given"),
            "accounting": self.noise.accounting,
            "noise": type(self.noise).__name__,
            "classes_drawn_uniformly": uniform,
        }


@dataclass(frozen=True)
class _Plan:
    """What is fixed and public before the first vote."""

    sizes: list[np.ndarray]
    degrees: list[float]
    classes: bool


def class_sizes(shares: np.ndarray, total: int) -> np.ndarray:
    """Splits ``total`` by shares, rounding by the largest remainder; ties go to the later class.

    Args:
        shares: of the classes, ``[classes]``, summing to 1.
        total: samples.

    Raises:
        InputError: if a class gets none.
    """
    exact = np.asarray(shares, dtype=np.float64) * total
    # 3.3333333 and 3.3333334 are one remainder.
    sizes = np.floor(exact + 1e-9).astype(np.int64)
    remainder = np.round(exact - sizes, 9)
    later_first = np.lexsort((-np.arange(len(sizes)), -remainder))
    sizes[later_first[: total - int(sizes.sum())]] += 1
    if (sizes < 1).any():
        raise InputError(
            f"class {int(np.argmin(sizes))} gets none of {total} samples; ask for more samples"
        )
    return sizes


def _class_counts(labels: np.ndarray) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu" or labels.min() < 0:
        raise InputError("labels are whole numbers from 0 on")
    counts = np.bincount(labels)
    if (counts == 0).any():
        raise InputError(
            f"class {int(np.argmin(counts))} has no private sample, so nothing can vote for it; "
            "leave the class out"
        )
    return counts


def _held(folder: Path | None) -> Any:
    from contextlib import nullcontext

    return nullcontext() if folder is None else exclusive(folder)
