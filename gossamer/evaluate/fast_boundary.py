"""FAB: the fast adaptive boundary attack, which looks for the nearest misclassified image.

At each iterate the network is linearised, and both the iterate and the clean image are projected
onto the hyperplane where the true class and another one tie, inside [0, 1]; the next iterate is a
mixture of both, a little past the hyperplane. A misclassified iterate is remembered if it is the
closest so far, and the search steps back towards the clean image. At the end the closest one is
pulled back along the line to the clean image, by bisection.

``FAB`` takes at each step the class whose hyperplane is nearest (as many gradients as there are
classes); ``TargetedFAB`` goes towards the most likely wrong classes one by one (one gradient a
step).

Source: Croce and Hein, "Minimally distorted Adversarial Examples with a Fast Adaptive Boundary
Attack", ICML 2020 (arXiv:1907.02044).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gossamer.evaluate.attack import Attack, Chunk, likely_targets
from gossamer.evaluate.attack_losses import targeted_margin
from gossamer.evaluate.gradient_ascent import check_counts
from gossamer.evaluate.victim import Victim

OVERSHOOT = 1.05
BACKWARD = 0.9
MOST_MIXED = 0.1
BISECTIONS = 10


class FAB(Attack):
    """FAB towards the nearest class.

    Args:
        steps: linearisations.
    """

    name = "fab"

    def __init__(
        self,
        model: nn.Module | Victim,
        *,
        steps: int = 100,
        eps: float = 8 / 255,
        seed: int = 0,
        batch_size: int = 128,
    ) -> None:
        super().__init__(model, eps=eps, seed=seed, batch_size=batch_size)
        check_counts(steps=steps)
        self.steps = steps

    def perturb(self, chunk: Chunk, round: int) -> Tensor:
        found, _ = nearest_mistake(self.victim, chunk, None, steps=self.steps, enough=self.eps)
        return found

    def distances(self, images: Tensor, labels: Tensor) -> Tensor:
        """The smallest L-infinity distance found to a misclassified image, ``[n]``; 0 where the
        clean image is misclassified, infinity where none was found. No budget is looked at."""
        with self.victim.ready():
            self.victim.examine(images)
            clean = self.victim.logits(images.to(self.victim.device))
            labels = labels.to(clean.device)
            right = (clean.argmax(1) == labels).nonzero().flatten()
            distance = torch.zeros(len(images), device=clean.device)
            for rows in right.split(self.batch_size):
                chunk = Chunk(images.to(clean.device)[rows], labels[rows], rows, clean[rows])
                _, distance[rows] = nearest_mistake(self.victim, chunk, None, steps=self.steps)
        return distance.cpu()


class TargetedFAB(FAB):
    """FAB towards each of the most likely wrong classes.

    Args:
        targets: how many classes, at most one less than there are.
        steps: linearisations a target.
    """

    name = "fab-t"

    def __init__(
        self,
        model: nn.Module | Victim,
        *,
        targets: int = 9,
        steps: int = 100,
        eps: float = 8 / 255,
        seed: int = 0,
        batch_size: int = 128,
    ) -> None:
        super().__init__(model, steps=steps, eps=eps, seed=seed, batch_size=batch_size)
        check_counts(targets=targets)
        self.targets = targets

    def rounds(self, classes: int) -> int:
        return min(self.targets, classes - 1)

    def perturb(self, chunk: Chunk, round: int) -> Tensor:
        found, _ = nearest_mistake(
            self.victim, chunk, likely_targets(chunk, round), steps=self.steps, enough=self.eps
        )
        return found


def nearest_mistake(
    victim: Victim, chunk: Chunk, targets: Tensor | None, *, steps: int, enough: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The nearest misclassified images that FAB finds.

    Args:
        victim: the network.
        chunk: images that are classified correctly.
        targets: the class to go towards, ``[n]``; None for the nearest at each step.
        steps: linearisations.
        enough: an image is done when its distance is not more.

    Returns:
        The images (the clean one where none was found) and their L-infinity distances ``[n]``.
    """
    found = chunk.images.clone()
    distance = found.new_full((len(found),), torch.inf)
    rows = torch.arange(len(found), device=found.device)
    images, labels, now = chunk.images, chunk.labels, chunk.images
    for _ in range(steps):
        value, slope = _linearised(victim, now, labels, None if targets is None else targets[rows])
        from_now = onto_plane(now, slope, -value)
        from_clean = onto_plane(images, slope, -value - (slope * (images - now)).flatten(1).sum(1))
        near, far = _size(from_now), _size(from_clean)
        mixed = (near / (near + far).clamp_min(1e-12)).clamp_max(MOST_MIXED).view(-1, 1, 1, 1)
        now = (1 - mixed) * (now + OVERSHOOT * from_now) + mixed * (images + OVERSHOOT * from_clean)
        now = now.clamp(0.0, 1.0)
        wrong = victim.logits(now).argmax(1) != labels
        moved = _size(now - images)
        closer = wrong & (moved < distance[rows])
        found[rows[closer]], distance[rows[closer]] = now[closer], moved[closer]
        back = images + BACKWARD * (now - images)
        now = torch.where(wrong.view(-1, 1, 1, 1), back, now)
        left = distance[rows] > enough
        rows, images, labels, now = rows[left], images[left], labels[left], now[left]
        if not len(rows):
            return found, distance
    rows = rows[distance[rows].isfinite()]
    if len(rows):
        images, labels = chunk.images[rows], chunk.labels[rows]
        found[rows] = _pulled_back(victim, images, labels, found[rows])
        distance[rows] = _size(found[rows] - images)
    return found, distance


def _pulled_back(victim: Victim, images: Tensor, labels: Tensor, found: Tensor) -> Tensor:
    """The misclassified images nearest the clean ones on the lines between, by bisection."""
    low, high = torch.zeros_like(found[:, :1, :1, :1]), torch.ones_like(found[:, :1, :1, :1])
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        wrong = victim.logits(images + middle * (found - images)).argmax(1) != labels
        wrong = wrong.view(-1, 1, 1, 1)
        low, high = torch.where(wrong, low, middle), torch.where(wrong, middle, high)
    return images + high * (found - images)


def onto_plane(points: Tensor, slope: Tensor, rise: Tensor) -> Tensor:
    """The smallest moves (L-infinity) inside [0, 1] with ``slope . move = rise``.

    Every pixel moves by the same amount in its helpful direction, or up to the edge of the box.
    Where even that is not enough, every pixel goes to its edge.

    Args:
        points: ``[n, channels, height, width]`` in [0, 1].
        slope: of the same shape.
        rise: ``[n]``.
    """
    helpful = slope.sign() * rise.sign().view(-1, 1, 1, 1)
    room = torch.where(helpful > 0, 1 - points, points).flatten(1)
    weight = slope.abs().flatten(1)
    order = room.argsort(1)
    room_sorted, weight_sorted = room.gather(1, order), weight.gather(1, order)
    full = (room_sorted * weight_sorted).cumsum(1)  # of the pixels at their edge
    free = weight_sorted.sum(1, keepdim=True) - weight_sorted.cumsum(1)  # of the others
    reached = full + room_sorted * free  # the rise when the move is as large as this room
    place = torch.searchsorted(reached, rise.abs().unsqueeze(1))
    first = place == 0
    before = (place - 1).clamp(0, room.shape[1] - 1)
    at_edge = torch.where(first, 0.0, full.gather(1, before))
    moving = torch.where(first, weight_sorted.sum(1, keepdim=True), free.gather(1, before))
    size = (rise.abs().unsqueeze(1) - at_edge) / moving.clamp_min(1e-30)
    size = torch.where(place >= room.shape[1], 1.0, size)  # no move of a pixel is larger than 1
    return helpful * torch.minimum(size, room).view_as(points)


def _size(moves: Tensor) -> Tensor:
    return moves.flatten(1).abs().amax(1)


def _linearised(
    victim: Victim, images: Tensor, labels: Tensor, targets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """How far another class is ahead of the true one (negative), ``[n]``, and its gradient."""
    true = labels.unsqueeze(1)
    if targets is not None:
        loss = targeted_margin(targets)
        logits, slope = victim.gradient(images, lambda z: loss.cotangent(z, labels))
        return loss.value(logits, labels), slope
    classes = victim.classes
    every = torch.eye(classes, device=images.device).unsqueeze(1).expand(-1, len(images), -1)
    logits, slopes = victim.jacobian(images, every)
    at_true = true.view(1, -1, 1, 1, 1).expand(1, *slopes.shape[1:])
    slopes = slopes - slopes.gather(0, at_true)
    ahead = logits - logits.gather(1, true)
    distance = ahead.abs() / slopes.flatten(2).abs().sum(2).T.clamp_min(1e-12)
    nearest = distance.scatter(1, true, torch.inf).argmin(1)
    rows = torch.arange(len(images), device=images.device)
    return ahead[rows, nearest], slopes[nearest, rows]
