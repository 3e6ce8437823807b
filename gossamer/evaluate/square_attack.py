"""Square: random search that asks for logits only.

It begins with vertical stripes of plus and minus eps. Each query sets a random square of each
channel to the other or the same edge of the budget, and keeps that if the margin shrinks. Squares
begin with .8 of the pixels and are halved at fixed shares of the queries. It needs no gradients,
so an image that falls to it after white-box attacks failed shows that gradients are masked.

Source: Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via
random search", ECCV 2020 (arXiv:1912.00049).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gossamer.evaluate.attack import Attack, Chunk, into_budget
from gossamer.evaluate.attack_losses import margin
from gossamer.evaluate.gradient_ascent import check_counts
from gossamer.evaluate.sample_noise import signs, uniform
from gossamer.evaluate.victim import Victim

HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Of ten thousand queries."""


class Square(Attack):
    """The Square attack.

    Args:
        queries: for each image.
        share: of the pixels that the first squares have.
    """

    name = "square"

    def __init__(
        self,
        model: nn.Module | Victim,
        *,
        queries: int = 5000,
        share: float = 0.8,
        eps: float = 8 / 255,
        seed: int = 0,
        batch_size: int = 128,
    ) -> None:
        super().__init__(model, eps=eps, seed=seed, batch_size=batch_size)
        check_counts(queries=queries)
        self.queries = queries
        self.share = share

    def perturb(self, chunk: Chunk, round: int) -> Tensor:
        seed = self.seed_of(round)
        ids, images, labels = chunk.ids, chunk.images, chunk.labels
        channels, height, width = images.shape[1:]
        stripes = signs(ids, seed, "stripes", shape=(channels, 1, width))
        now = into_budget(images + self.eps * stripes, images, self.eps)
        found = now.clone()
        rows = torch.arange(len(now), device=now.device)
        behind = margin(self.victim.logits(now), labels)
        for query in range(1, self.queries):
            left = behind <= 0
            if not left.all():
                found[rows[~left]] = now[~left]
                rows, ids, images, labels = rows[left], ids[left], images[left], labels[left]
                now, behind = now[left], behind[left]
                if not len(rows):
                    return found
            side = square_side(self.share, query, self.queries, height, width)
            drawn = uniform(ids, seed, "square", query, shape=(2 + channels,))
            inside = _squares(drawn[:, 0], height, side).unsqueeze(2) & _squares(
                drawn[:, 1], width, side
            ).unsqueeze(1)
            edge = drawn[:, 2:].ge(0.5).float().mul(2).sub(1).view(-1, channels, 1, 1)
            tried = torch.where(inside.unsqueeze(1), images + self.eps * edge, now)
            tried = into_budget(tried, images, self.eps)
            ahead = margin(self.victim.logits(tried), labels)
            better = ahead > behind
            now = torch.where(better.view(-1, 1, 1, 1), tried, now)
            behind = torch.where(better, ahead, behind)
        found[rows] = now
        return found


def square_side(share: float, query: int, queries: int, height: int, width: int) -> int:
    """The side in pixels of the squares of a query (the first is query 0)."""
    done = query / queries * 10_000
    halvings = sum(done > after for after in HALVED_AFTER)
    side = round(math.sqrt(share / 2**halvings * height * width))
    return min(max(side, 1), height, width)


def _squares(drawn: Tensor, length: int, side: int) -> Tensor:
    """Where along one axis the squares are, ``[n, length]``."""
    first = (drawn * (length - side + 1)).long().unsqueeze(1)
    places = torch.arange(length, device=drawn.device)
    return (places >= first) & (places < first + side)
