"""For every image series the network of a pool that is least uncertain about it.

Networks that differ only in their random start are equally good on data like their own and disagree
on data from elsewhere. Each is slid over the new series in small steps; how much it contradicts
*itself* about a pixel, from window to window, is its uncertainty. The one with the least energy of
this map per segmented pixel is chosen, for each series anew and without any label. The same number
tells which results a human should look at.

Source: Yalcinkaya et al., "Improved robustness for deep learning-based segmentation of multi-center
myocardial perfusion MRI datasets using data adaptive uncertainty-guided space-time analysis",
J Cardiovasc Magn Reson 2024, arXiv:2408.04805. Loss, optimiser, pool size and normalisation are
not published; what is chosen here is said where it is an option.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.core.files import read_json, whole_folder, write_json
from gossamer.core.fit import Supervised, cosine, fit
from gossamer.core.progress import progress
from gossamer.core.saved import load_network, save_network
from gossamer.core.segmentation import IGNORED, Segmentation
from gossamer.core.task import device_of, logits_of, seed_of
from gossamer.evaluate.sliding_windows import (
    WindowGrid,
    combine_patches,
    is_closed_ring,
    parts_and_holes,
    patch_probabilities,
    sliding_probability,
    without_specks,
)
from gossamer.models.segmentation import UNet

log = logging.getLogger(__name__)

SELECTORS = (
    "least uncertain",
    "established",
    "pool mean",
    "ensemble",
    "majority vote",
    "entropy",
    "mc dropout",
    "oracle",
)
"""What :func:`compare_selectors` compares."""


@dataclass(frozen=True)
class Scan:
    """How networks look at a series. Defaults are the paper's for 128 x 128 pixels.

    Attributes:
        patch: side of the window, pixels; the one that the networks were trained with.
        stride: pixels between windows when segmenting (25 % of the patch).
        fine_stride: pixels between windows when measuring uncertainty (3.125 % of the patch).
        trim: pixels at the border of each window that do not count for uncertainty.
        threshold: probabilities above it are foreground.
        reopen: threshold that is tried where the mask has no hole (0.4 in a variant of the
            published code); None: never.
        vote: each window votes 0 or 1 in place of its probability.
        min_area: parts of the mask that are smaller than this share of the image are dropped.
        power: of U in the index; 2 is the energy, 1 the plain sum.
        per: the index is per pixel of the "mask" or of the "image".
        flush: a last window where the stride does not divide; False refuses such strides.
        batch_size: windows at a time; no effect on results.
    """

    patch: int = 64
    stride: int = 16
    fine_stride: int = 2
    trim: int = 0
    threshold: float = 0.5
    reopen: float | None = None
    vote: bool = False
    min_area: float = 0.015
    power: float = 2.0
    per: Literal["mask", "image"] = "mask"
    flush: bool = True
    batch_size: int = 256

    def segment(self, network: nn.Module, series: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Probability float64 and mask bool of one network, ``[height, width]`` each."""
        combined = sliding_probability(
            network, series, self.patch, self.stride, vote=self.vote, flush=self.flush,
            batch_size=self.batch_size,
        )  # fmt: skip
        probability = combined.mean.numpy()
        return probability, self.mask_of(probability)

    def mask_of(self, probability: np.ndarray) -> np.ndarray:
        """The mask of a probability ``[height, width]``: threshold, then small parts dropped."""
        mask = without_specks(probability > self.threshold, self.min_area)
        if self.reopen is not None and mask.any() and parts_and_holes(mask)[1] == 0:
            return without_specks(probability > self.reopen, self.min_area)
        return mask

    def uncertainty(self, network: nn.Module, series: Tensor) -> np.ndarray:
        """The map U of one network, ``[height, width]``, float64.

        Raises:
            InputError: if a single window covers the series, so that nothing can differ.
        """
        grid = self.fine_grid(series)
        answers = patch_probabilities(network, series, grid, batch_size=self.batch_size)
        return combine_patches(answers, grid, trim=self.trim).deviation.numpy()

    def fine_grid(self, series: Tensor) -> WindowGrid:
        """The windows of the uncertainty map.

        Raises:
            InputError: if there is only one.
        """
        if series.ndim != 3:
            raise InputError(
                f"a series is [frames, height, width], not of shape {list(series.shape)}"
            )
        grid = WindowGrid.over(
            *series.shape[1:], patch=self.patch, stride=self.fine_stride, flush=self.flush
        )
        if len(grid) < 2:
            raise InputError(
                f"a window of {self.patch} pixels covers the whole series of "
                f"{series.shape[1]} x {series.shape[2]}: with one window nothing can differ, and "
                "uncertainty is not defined; use networks with smaller windows"
            )
        return grid

    def index(self, u_map: np.ndarray, mask: np.ndarray) -> float:
        """U_pp: the energy of the map per segmented pixel; infinite for an empty mask."""
        pixels = int(mask.sum())
        if pixels == 0:
            return float("inf")
        energy = float(np.power(u_map, self.power).sum())
        return energy / (pixels if self.per == "mask" else mask.size)


@dataclass(frozen=True)
class View:
    """What one network says of one series.

    Attributes:
        probability: of the foreground, ``[height, width]``.
        mask: bool ``[height, width]``.
        u_map: uncertainty, ``[height, width]``.
        upp: the index, see :meth:`Scan.index`.
    """

    probability: np.ndarray
    mask: np.ndarray
    u_map: np.ndarray
    upp: float


def look(network: nn.Module, series: Tensor, scan: Scan) -> View:
    """Segments a series with one network and measures its uncertainty."""
    u_map = scan.uncertainty(network, series)
    probability, mask = scan.segment(network, series)
    return View(probability, mask, u_map, scan.index(u_map, mask))


@dataclass(frozen=True)
class Selection:
    """The network that was chosen for a series, and what it says.

    Attributes:
        index: its number in the pool.
        mask: bool ``[height, width]``.
        u_map: its uncertainty, ``[height, width]``.
        upp: U_pp of every member, ``[members]``; infinite where the mask is empty.
        areas: pixels of every member's mask, ``[members]``; a large mask makes U_pp small.
        flagged: whether a human should look: U_pp is above the threshold or the mask is empty.
            None where there is no threshold and the mask is not empty.
        views: of all members.
    """

    index: int
    mask: np.ndarray
    u_map: np.ndarray
    upp: np.ndarray
    areas: np.ndarray
    flagged: bool | None
    views: tuple[View, ...] = field(repr=False)


def least_uncertain(
    pool: Sequence[nn.Module],
    series: Tensor,
    scan: Scan | None = None,
    *,
    threshold: float | None = None,
) -> Selection:
    """Chooses the least uncertain network for a series; of equals the first.

    Args:
        pool: trained networks, see :func:`~gossamer.evaluate.sliding_windows.patch_probabilities`.
            A pool of one is that network.
        series: ``[frames, height, width]``, prepared as the training data were.
        scan: windows, clean-up and index. Default: the paper's.
        threshold: of U_pp above which the result is flagged, see :func:`calibrate`.

    Raises:
        InputError: if the pool is empty, or series, networks and windows do not go together.
    """
    if not pool:
        raise InputError("the pool holds no network, so there is none to select")
    views = tuple(look(network, series, scan or Scan()) for network in pool)
    return _selected(views, threshold)


def _selected(views: Sequence[View], threshold: float | None) -> Selection:
    upp = np.array([view.upp for view in views])
    index = int(upp.argmin())  # the first of equals
    chosen = views[index]
    empty = not chosen.mask.any()
    return Selection(
        index=index,
        mask=chosen.mask,
        u_map=chosen.u_map,
        upp=upp,
        areas=np.array([int(view.mask.sum()) for view in views]),
        flagged=True if empty else None if threshold is None else bool(upp[index] > threshold),
        views=tuple(views),
    )


def dice(mask: np.ndarray, truth: np.ndarray) -> float:
    """Dice overlap of two masks, 0..1; two empty masks agree."""
    mask, truth = np.asarray(mask, dtype=bool), np.asarray(truth, dtype=bool)
    if mask.shape != truth.shape:
        raise InputError(
            f"masks of {list(mask.shape)} and {list(truth.shape)} pixels cannot be compared"
        )
    both = int(mask.sum()) + int(truth.sum())
    return 2.0 * int((mask & truth).sum()) / both if both else 1.0


Labelled = Sequence[tuple[Tensor, np.ndarray]]
"""Series ``[frames, height, width]`` with true masks ``[height, width]``."""


@dataclass(frozen=True)
class Calibration:
    """What the labelled validation series say of a pool.

    Attributes:
        established: the member with the best mean Dice there.
        threshold: the percentile of the chosen members' U_pp there.
        dice: mean Dice of each member, ``[members]``.
    """

    established: int
    threshold: float
    dice: tuple[float, ...]


def calibrate(
    pool: Sequence[nn.Module],
    validation: Labelled,
    scan: Scan | None = None,
    *,
    percentile: float = 95.0,
) -> Calibration:
    """Finds the established network and the threshold of the quality flag.

    Args:
        pool: trained networks.
        validation: labelled series of the training domain, none of them trained or tested on.
        scan: windows, clean-up and index. Default: the paper's.
        percentile: of U_pp of the chosen members, above which a result is flagged.

    Raises:
        InputError: if there is no series or no network, or the percentile is not in 0..100.
    """
    if not pool or not validation or not 0.0 <= percentile <= 100.0:
        raise InputError(
            "calibration needs networks, labelled series and a percentile in 0..100, not "
            f"{len(pool)}, {len(validation)} and {percentile:g}"
        )
    chosen, overlaps = [], []
    for series, truth in validation:
        selection = least_uncertain(pool, series, scan)
        chosen.append(selection.upp[selection.index])
        overlaps.append([dice(view.mask, truth) for view in selection.views])
    each = np.mean(overlaps, 0)
    # A value that occurred, not one between two: an empty mask's infinity would make NaN.
    threshold = float(np.percentile(chosen, percentile, method="higher"))
    return Calibration(int(each.argmax()), threshold, tuple(map(float, each)))


@dataclass(frozen=True)
class Comparison:
    """All selectors on the same series.

    Attributes:
        dice: of each selector, ``[series]``.
        rings: whether each selector's mask is one part with one hole, bool ``[series]`` (for "pool
            mean" the share of members).
        chosen: member that each selector chose, ``[series]``, for those that choose one.
        upp: ``[series, members]``.
        member_dice: ``[series, members]``.
        views: of every member, by series.
    """

    dice: Mapping[str, np.ndarray]
    rings: Mapping[str, np.ndarray]
    chosen: Mapping[str, np.ndarray]
    upp: np.ndarray
    member_dice: np.ndarray
    views: tuple[tuple[View, ...], ...] = field(repr=False)

    def failed(self, selector: str, below: float = 0.6) -> float:
        """Share of the series with a Dice below ``below`` (for "pool mean", of all members')."""
        found = self.member_dice if selector == "pool mean" else self.dice[selector]
        return float((found < below).mean())

    def p_value(self, one: str, other: str) -> float:
        """Wilcoxon's signed-rank test on paired Dice, two-sided; 1 where all pairs are equal."""
        from scipy.stats import wilcoxon

        apart = self.dice[one] - self.dice[other]
        found: Any = wilcoxon(apart) if np.any(apart) else None
        return 1.0 if found is None else float(found.pvalue)

    def rank_correlation(self) -> float:
        """Spearman's correlation of U_pp and Dice over all series and members.

        NaN where one of them is constant, as with no empty and no differing mask.
        """
        return spearman(self.upp.ravel(), self.member_dice.ravel())

    def rank_correlation_within(self) -> float:
        """Mean over the series of the correlation among members: what selecting lives on."""
        each = [spearman(*pair) for pair in zip(self.upp, self.member_dice, strict=True)]
        return float(np.nanmean(each)) if not np.all(np.isnan(each)) else float("nan")

    def rows(self) -> list[dict[str, float | str]]:
        """One record a selector: mean Dice, share of failures, share that are no closed ring."""
        return [
            {
                "selector": name,
                "dice": float(values.mean()),
                "failed": self.failed(name),
                "not_ring": float(1.0 - self.rings[name].mean()),
            }
            for name, values in self.dice.items()
        ]


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's rank correlation; NaN where one side is constant. Infinities have ranks, too."""
    from scipy.stats import rankdata

    ranks = [rankdata(side) for side in (one, other)]
    if any(len(side) < 2 or np.ptp(side) == 0.0 for side in ranks):
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


def compare_selectors(
    pool: Sequence[nn.Module],
    series: Labelled,
    scan: Scan | None = None,
    *,
    established: int,
    samples: int = 10,
    seed: int = 0,
    title: str = "comparing selectors",
) -> Comparison:
    """Segments labelled series as every selector would.

    "least uncertain" is the method; "established" one network for all series; "pool mean" the
    expectation of a member drawn at random; "ensemble" the mean probability of all members;
    "majority vote" that of their masks; "entropy" and "mc dropout" choose the member of least mean
    entropy of its probabilities, and of least variance under dropout per segmented pixel; "oracle"
    the member of best true Dice, a bound for all that choose one.

    Args:
        pool: trained networks.
        series: with true masks.
        scan: windows, clean-up and index. Default: the paper's.
        established: the member that was best on validation data, see :func:`calibrate`.
        samples: passes with dropout. 0, or a pool without dropout layers: "mc dropout" is left out.
        seed: of dropout.
        title: of the progress bar.

    Raises:
        InputError: if there is no series or no network, or there is no such established member.
    """
    if not pool or not series:
        raise InputError(
            f"a comparison needs networks and labelled series, not {len(pool)} and {len(series)}"
        )
    if not 0 <= established < len(pool):
        raise InputError(f"there is no member {established} in a pool of {len(pool)}")
    scan = scan or Scan()
    drops = samples > 1 and all(any(map(_is_dropout, n.modules())) for n in pool)
    names = [name for name in SELECTORS if drops or name != "mc dropout"]
    found: dict[str, list[float]] = {name: [] for name in names}
    rings: dict[str, list[float]] = {name: [] for name in names}
    chosen: dict[str, list[int]] = {}
    upp, overlaps, all_views = [], [], []
    with progress() as bar:
        shown = bar.add_task(title, total=len(series))
        for number, (frames, truth) in enumerate(series):
            views = tuple(look(network, frames, scan) for network in pool)
            own = np.array([dice(view.mask, truth) for view in views])
            choices = {
                "least uncertain": _selected(views, None).index,
                "established": established,
                "entropy": int(np.argmin([mean_entropy(view.probability) for view in views])),
                "oracle": int(own.argmax()),
            }
            if drops:
                variances = [
                    _dropout_index(n, frames, v.mask, scan, samples, seed_of(seed, number))
                    for n, v in zip(pool, views, strict=True)
                ]
                choices["mc dropout"] = int(np.argmin(variances))
            masks = {name: views[index].mask for name, index in choices.items()}
            masks["ensemble"] = scan.mask_of(np.mean([view.probability for view in views], 0))
            votes = np.mean([view.mask for view in views], 0)
            masks["majority vote"] = without_specks(votes > 0.5, scan.min_area)
            for name, mask in masks.items():
                found[name].append(dice(mask, truth))
                rings[name].append(float(is_closed_ring(mask)))
            found["pool mean"].append(float(own.mean()))
            rings["pool mean"].append(float(np.mean([is_closed_ring(v.mask) for v in views])))
            for name, index in choices.items():
                chosen.setdefault(name, []).append(index)
            upp.append([view.upp for view in views])
            overlaps.append(own)
            all_views.append(views)
            bar.advance(shown)
    return Comparison(
        dice={name: np.array(values) for name, values in found.items()},
        rings={name: np.array(values) for name, values in rings.items()},
        chosen={name: np.array(values) for name, values in chosen.items()},
        upp=np.array(upp),
        member_dice=np.array(overlaps),
        views=tuple(all_views),
    )


def mean_entropy(probability: np.ndarray) -> float:
    """Mean binary entropy of probabilities, nats."""
    p = np.clip(probability, 1e-12, 1.0 - 1e-12)
    return float(-(p * np.log(p) + (1.0 - p) * np.log1p(-p)).mean())


def _is_dropout(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d)


@contextmanager
def _dropping(network: nn.Module) -> Iterator[nn.Module]:
    """A copy of a network whose dropout layers drop, in evaluation mode, too."""
    own = copy.deepcopy(network)
    handles = [
        module.register_forward_pre_hook(lambda layer, _: layer.train() and None)
        for module in own.modules()
        if _is_dropout(module)
    ]
    try:
        yield own
    finally:
        for handle in handles:
            handle.remove()


def _dropout_index(
    network: nn.Module,
    series: Tensor,
    mask: np.ndarray,
    scan: Scan,
    samples: int,
    seed: int,
) -> float:
    """Variance of the combined probability under dropout per pixel of the mask."""
    pixels = int(mask.sum())
    if pixels == 0:
        return float("inf")
    device = device_of(network)
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        _dropping(network) as noisy,
    ):
        torch.manual_seed(seed)
        found = [scan.segment(noisy, series)[0] for _ in range(samples)]
    return float(np.var(found, axis=0, ddof=1).sum() / pixels)


# Training the pool ---------------------------------------------------------------------------


def pool_network(
    frames: int, *, width: int = 16, depth: int = 4, dropout: float = 0.1
) -> nn.Module:
    """A U-Net whose channels are the frames of a series; two logits a pixel.

    Args:
        frames: of a series.
        width: channels at full resolution; they double with each level.
        depth: resolutions.
        dropout: chance of a feature map to be dropped before the last layer (selection by dropout
            needs it); 0 is none.
    """
    unet = UNet(frames, 2, width=width, depth=depth)
    if not 0.0 <= dropout < 1.0:
        raise InputError(f"the chance of dropout is 0 or more and below 1, not {dropout:g}")
    return nn.Sequential(unet.decoder, nn.Dropout2d(dropout), unet.classifier)


def soft_dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """1 - soft Dice of the foreground, over all pixels of the batch.

    Args:
        logits: ``[batch, 2, height, width]``.
        masks: 0, 1 or ``IGNORED``, ``[batch, height, width]``.
    """
    counted = masks != IGNORED
    found = logits.float().softmax(1)[:, 1] * counted
    truth = (masks == 1).float()
    return 1.0 - (2.0 * (found * truth).sum() + 1.0) / (found.sum() + truth.sum() + 1.0)


def train_pool(
    make_model: Callable[[], nn.Module],
    task: Segmentation,
    *,
    n: int = 7,
    seeds: Iterable[int] | None = None,
    epochs: int = 100,
    batch_size: int = 12,
    learning_rate: float = 1e-3,
    loss: Literal["cross-entropy", "dice"] = "cross-entropy",
    precision: str = "no",
) -> list[nn.Module]:
    """Trains networks that differ in nothing but their seed.

    The paper does not publish its training; Adam, half a cosine and the two usual losses are ours.

    Args:
        make_model: makes a network; its initial weights are drawn under the member's seed.
        task: series with masks whose training batches are patches, see
            :func:`gossamer.datasets.perfusion.series_task`.
        n: members.
        seeds: of the members. Default: 0 to n - 1.
        epochs: passes over the training series; each gives one patch a pass.
        batch_size: patches in a step.
        learning_rate: of Adam, at the start of half a cosine.
        loss: cross-entropy or soft Dice.
        precision: "no" (float32) or "bf16".

    Raises:
        InputError: if there is no member, or seeds repeat.
    """
    own = list(range(n) if seeds is None else seeds)
    if not own or len(own) != n or len(set(own)) != n:
        raise InputError(f"a pool of {n} networks needs {n} different seeds, at least one")
    pool = []
    for number, seed in enumerate(own):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of("initial weights", seed))
            network = make_model()
        rule = Supervised(
            network,
            task,
            optimizer=torch.optim.Adam(network.parameters(), lr=learning_rate),
            schedule=cosine,
            criterion=_dice_of if loss == "dice" else None,
        )
        fit(
            rule, task, epochs=epochs, batch_size=batch_size, seed=seed, precision=precision,
            title=f"network {number + 1} of {n}",
        )  # fmt: skip
        pool.append(network.eval())
    return pool


def _dice_of(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return soft_dice_loss(logits_of(outputs), batch[1])


# The pool on disk ----------------------------------------------------------------------------

POOL_FILE = "pool.json"


@dataclass(frozen=True)
class Pool:
    """Trained networks and how they look at series.

    Attributes:
        networks: in evaluation mode.
        frames: that a series must have.
        scan: with the window that the networks were trained with.
        calibration: what validation series said; None if the pool was not calibrated.
    """

    networks: tuple[nn.Module, ...]
    frames: int
    scan: Scan
    calibration: Calibration | None = None

    def select(self, series: Tensor) -> Selection:
        """The least uncertain network for a series, see :func:`least_uncertain`.

        Raises:
            InputError: if the series has another number of frames, or windows do not fit.
        """
        if series.ndim != 3 or len(series) != self.frames:
            raise InputError(
                f"a series of shape {list(series.shape)} does not go with networks for "
                f"{self.frames} frames; [{self.frames}, height, width] is needed"
            )
        threshold = None if self.calibration is None else self.calibration.threshold
        return least_uncertain(self.networks, series, self.scan, threshold=threshold)


def save_pool(folder: Path, pool: Pool) -> None:
    """Writes the networks and ``pool.json``; the folder appears as a whole.

    Raises:
        InputError: if it cannot be written.
        UnsupportedError: if a network cannot be traced.
    """
    patch = pool.scan.patch
    found = pool.calibration
    with whole_folder(Path(folder)) as partial:
        for number, network in enumerate(pool.networks):
            inputs = (torch.zeros(2, pool.frames, patch, patch, device=device_of(network)),)
            save_network(partial / f"member-{number:03}", network, inputs)
        write_json(
            partial / POOL_FILE,
            {
                "scan": asdict(pool.scan),
                "calibration": None
                if found is None
                # JSON knows no infinity.
                else asdict(found)
                | {"threshold": found.threshold if np.isfinite(found.threshold) else None},
            },
        )


def load_pool(folder: Path) -> Pool:
    """Reads a pool: every subfolder that holds a network, in order of their names.

    Without ``pool.json`` the window is the size of the networks' inputs, its strides are the
    paper's shares of it, and nothing is calibrated.

    Raises:
        InputError: if there is no network, one cannot be read, or they differ in their inputs.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder of networks")
    places = sorted(place for place in folder.iterdir() if (place / "network.json").is_file())
    if not places:
        raise InputError(
            f"{folder} holds no networks; each has a folder of its own there, written by gossamer"
        )
    networks, shapes = [], []
    for place in places:
        network, inputs, _ = load_network(place)
        networks.append(network)
        shapes.append(list(inputs[0].shape[1:]) if inputs else [])
        if shapes[-1] != shapes[0] or len(inputs) != 1 or len(shapes[-1]) != 3:
            raise InputError(
                f"the network in {place} takes inputs of {shapes[-1]} and that in {places[0]} of "
                f"{shapes[0]}; a pool takes one [frames, patch, patch]"
            )
    frames, height, width = shapes[0]
    if height != width:
        raise InputError(f"the networks in {folder} take {height} x {width} pixels; not square")
    scan = Scan(patch=height, stride=max(1, height // 4), fine_stride=max(1, height // 32))
    calibration = None
    file = folder / POOL_FILE
    if file.is_file():
        content = read_json(file)
        try:
            scan = Scan(**content["scan"])
            kept = content["calibration"]
            if kept is not None:
                threshold = float("inf") if kept["threshold"] is None else kept["threshold"]
                calibration = Calibration(
                    int(kept["established"]), float(threshold), tuple(map(float, kept["dice"]))
                )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{file} does not describe a pool: {error!r}") from error
        if calibration is not None and not 0 <= calibration.established < len(networks):
            raise InputError(
                f"{file} names member {calibration.established} as established, but there are "
                f"{len(networks)} networks"
            )
        if scan.patch != height:
            raise InputError(
                f"{file} has windows of {scan.patch} pixels, but the networks take {height}"
            )
    return Pool(tuple(networks), frames, scan, calibration)
