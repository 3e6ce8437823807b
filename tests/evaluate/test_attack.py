"""Every attack under one protocol: exact on linear classifiers, within its budget, repeatable."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.evaluate.attack import Attack, Chain
from gossamer.evaluate.attack_losses import (
    BEST_PROBABILITY,
    LESS_TRUE_PROBABILITY,
    PM,
    TRUE_PROBABILITY,
    Loss,
)
from gossamer.evaluate.auto_attack import ATTACKS, attack_of, auto_attack, pma_plus
from gossamer.evaluate.auto_pgd import APGD, apgd_start, checkpoints, climb
from gossamer.evaluate.fast_boundary import FAB, onto_plane
from gossamer.evaluate.gradient_ascent import PGD
from gossamer.evaluate.margin_attack import MD, PMA
from gossamer.evaluate.square_attack import Square, square_side
from gossamer.evaluate.victim import Victim

EPS = 0.02
EXACT = [
    "pma", "pma+", "auto-attack", "pgd-margin", "pgd-dlr", "pgd-pm", "pgd-mifpe", "md",
    "multi-targeted", "apgd-dlr", "apgd-t", "fab", "fab-t",
]  # fmt: skip


def quick(name: str, model: nn.Module | Victim, **options: object) -> Attack:
    """An attack with few steps and queries."""
    made = attack_of(name)(model, **({"eps": EPS, "steps": 40} | options))
    for member in made.attacks if isinstance(made, Chain) else (made,):
        if isinstance(member, Square):
            member.queries = 150
    return made


@pytest.fixture(scope="module")
def linear() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A linear classifier, images away from the edges of the box, labels, and their exact
    distances to the boundary: min over j of (z_y - z_j) / |w_y - w_j|_1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 6))
        images = 0.2 + 0.6 * torch.rand(200, 3, 4, 4)
    with torch.no_grad():
        logits, weight = model(images), model[1].weight
        labels = logits.argmax(1)
        gaps = logits.gather(1, labels[:, None]) - logits
        spread = (weight[labels][:, None] - weight[None]).abs().sum(2)
        distance = (gaps / spread).scatter(1, labels[:, None], torch.inf).amin(1)
    return model, images, labels, distance


@pytest.fixture(scope="module")
def curved() -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 32), nn.ReLU(),
            nn.Linear(32, 5),
        )  # fmt: skip
        for layer in model:
            if isinstance(layer, nn.Linear):
                layer.weight.data.mul_(3)
        images = torch.rand(60, 1, 8, 8)
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[::10] = (labels[::10] + 1) % 5  # some are wrong from the start
    return model, images, labels


@pytest.mark.parametrize("name", EXACT)
def test_linear_classifiers_are_attacked_exactly(
    name: str, linear: tuple[nn.Module, Tensor, Tensor, Tensor]
) -> None:
    model, images, labels, distance = linear
    outcome = quick(name, model).run(images, labels)
    sure = (distance - EPS).abs() > 1e-4 * EPS
    assert 5 < (distance < EPS).sum() < 195  # a test that could fail either way
    assert torch.equal(outcome.robust[sure], (distance > EPS)[sure])


def test_losses_without_the_margin_are_not_exact(
    linear: tuple[nn.Module, Tensor, Tensor, Tensor],
) -> None:
    """Cross-entropy mixes the classes, so its sign is not that of the nearest one's plane."""
    model, images, labels, distance = linear
    robust = quick("pgd-ce", model).run(images, labels).robust
    assert (robust >= (distance > EPS)).all()


def test_fab_finds_the_distance(linear: tuple[nn.Module, Tensor, Tensor, Tensor]) -> None:
    model, images, labels, distance = linear
    found = FAB(model, steps=20).distances(images, labels)
    torch.testing.assert_close(found, distance, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_budget_box_and_counts(name: str, curved: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = curved
    outcome = quick(name, model, steps=10, eps=0.05).run(images, labels)
    assert (outcome.images - images).abs().max() <= 0.05 + 1e-6
    assert outcome.images.min() >= 0 and outcome.images.max() <= 1
    with torch.no_grad():
        right = model(outcome.images).argmax(1) == labels
    assert torch.equal(right, outcome.robust)
    assert not (outcome.robust & ~outcome.clean).any()
    assert outcome.clean.sum() == 54
    # Every image that an attack broke is counted once, and by whom.
    broken = [int((outcome.by == k).sum()) for k in range(len(outcome.costs))]
    assert broken == [cost.broken for cost in outcome.costs]
    assert sum(broken) == 54 - int(outcome.robust.sum())


@pytest.mark.parametrize("name", ["pma", "md", "pgd-ce", "apgd-ce", "apgd-t", "fab-t", "square"])
def test_batches_and_order_change_nothing(
    name: str, curved: tuple[nn.Module, Tensor, Tensor]
) -> None:
    model, images, labels = curved
    model, images = model.double(), images.double()
    try:
        whole = quick(name, model, steps=10, eps=0.05, batch_size=64).run(images, labels)
        parts = quick(name, model, steps=10, eps=0.05, batch_size=7).run(images, labels)
        back = torch.arange(59, -1, -1)
        turned = quick(name, model, steps=10, eps=0.05).run(images[back], labels[back], ids=back)
        assert torch.equal(whole.robust, parts.robust)
        torch.testing.assert_close(whole.images, parts.images, atol=1e-6, rtol=0)
        torch.testing.assert_close(whole.images, turned.images[back], atol=1e-6, rtol=0)
    finally:
        model.float()


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_no_budget_is_clean_accuracy(name: str, curved: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = curved
    outcome = quick(name, model, eps=0.0).run(images, labels)
    assert torch.equal(outcome.robust, outcome.clean)
    assert torch.equal(outcome.images, images)


def test_more_is_never_weaker(curved: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = curved
    robust = [quick("pma", model, eps=e).run(images, labels).accuracy for e in (0.01, 0.03, 0.06)]
    assert robust[0] > robust[1] > robust[2]
    once = PGD(model, steps=3, eps=0.03).run(images, labels)
    thrice = PGD(model, steps=3, eps=0.03, restarts=3).run(images, labels)
    assert (once.robust >= thrice.robust).all()


def test_a_chain_is_the_worst_of_its_members(curved: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = curved
    victim = Victim(model)
    members = [PMA(victim, steps=10, eps=0.03), APGD(victim, steps=10, eps=0.03)]
    chain = Chain("both", members).run(images, labels)
    alone = [member.run(images, labels).robust for member in members]
    assert torch.equal(chain.robust, alone[0] & alone[1])
    assert chain.costs[1].attacked == int(alone[0].sum())


def test_a_constant_classifier_changes_nothing() -> None:
    class Constant(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1).sum(1, keepdim=True) * 0 + torch.tensor([1.0, 2.0, 0.0, 0.5])

    images, labels = torch.rand(8, 1, 4, 4), torch.tensor([1, 1, 1, 1, 0, 0, 2, 3])
    victim = Victim(Constant())
    outcome = pma_plus(victim, eps=0.1, steps=5).run(images, labels)
    assert outcome.robust.tolist() == [True] * 4 + [False] * 4
    assert victim.flat == victim.backwards > 0


def test_scaled_logits_are_still_broken(curved: tuple[nn.Module, Tensor, Tensor]) -> None:
    """A network whose logits saturate hides from a plain gradient, not from this one."""
    model, images, labels = curved

    class Scaled(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return 1000 * model(images)

    class Plain(PMA):
        """The same attack with the gradients that automatic differentiation gives."""

        back = Loss("p_y", TRUE_PROBABILITY.value)
        parts = (Loss("-p_y", LESS_TRUE_PROBABILITY.value), Loss("p_m", BEST_PROBABILITY.value))
        whole = Loss("pm", PM.value)

    same = [attack(model, eps=0.03, steps=20).run(images, labels) for attack in (PMA, Plain)]
    assert same[0].accuracy == same[1].accuracy
    scaled, plain = (a(Scaled(), eps=0.03, steps=20).run(images, labels) for a in (PMA, Plain))
    assert scaled.accuracy <= plain.accuracy - 20


def test_step_sizes_of_the_two_stages() -> None:
    attack = PMA(nn.Flatten(), eps=1.0, steps=100)
    known = {0: 1.998, 1: 2.0, 25: 1.0628, 49: 0.0079, 50: 0.002, 51: 2.0, 75: 1.0628, 99: 0.0079}
    for step, size in known.items():
        assert attack.step_size(step) == pytest.approx(size, abs=1e-4)
    assert [attack._loss(step, attack.parts[1]).name for step in (0, 1, 49, 50, 99)] == [
        "p_y", "p_m", "p_m", "pm", "pm",
    ]  # fmt: skip
    other = MD(nn.Flatten(), eps=1.0, steps=50, first=20)
    assert [other._loss(step, other.parts[0]).name for step in (0, 1, 20)] == [
        "z_y", "-z_y", "margin",
    ]  # fmt: skip


def test_checkpoints_of_auto_pgd() -> None:
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]


def test_the_best_loss_of_auto_pgd_never_falls(curved: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, _ = curved
    victim = Victim(model)
    with torch.no_grad():
        clean = model(images)
    from gossamer.evaluate.attack import Chunk

    chunk = Chunk(images, clean.argmax(1), torch.arange(60), clean)
    loss = APGD(model).loss
    found, history = climb(
        victim, chunk, apgd_start(chunk, 0.01, 0), eps=0.01, steps=50, loss=lambda _: loss
    )
    assert (history.diff(dim=0) >= 0).all()
    left = model(found).argmax(1) == chunk.labels
    assert left.any()
    torch.testing.assert_close(loss.value(model(found), chunk.labels)[left], history[-1][left])


def test_projection_onto_a_plane_inside_the_box() -> None:
    """Against linear programming: the smallest largest move."""
    from scipy.optimize import linprog

    generator = torch.Generator().manual_seed(0)
    points = torch.rand(20, 1, 2, 3, generator=generator, dtype=torch.float64)
    slope = torch.randn(20, 1, 2, 3, generator=generator, dtype=torch.float64)
    rise = torch.randn(20, generator=generator, dtype=torch.float64)
    moves = onto_plane(points, slope, rise).flatten(1)
    reachable = 0
    for point, w, c, move in zip(points.flatten(1), slope.flatten(1), rise, moves, strict=True):
        n = len(point)
        identity = torch.eye(n).tolist()
        bounds = [(-float(p), 1 - float(p)) for p in point] + [(0, None)]
        solved = linprog(
            [0.0] * n + [1.0],
            A_ub=[[*r, -1] for r in identity] + [[-v for v in r] + [-1] for r in identity],
            b_ub=[0.0] * (2 * n),
            A_eq=[[*w.tolist(), 0.0]],
            b_eq=[float(c)],
            bounds=bounds,
        )
        inside = (point + move >= -1e-12) & (point + move <= 1 + 1e-12)
        assert inside.all()
        if solved.status == 0:
            reachable += 1
            assert (w @ move).item() == pytest.approx(float(c), abs=1e-9)
            assert move.abs().max().item() == pytest.approx(solved.fun, abs=1e-9)
        else:  # every pixel at its edge, as far as the box goes
            far = torch.where(w * c > 0, 1 - point, -point)
            torch.testing.assert_close(move, far)
    assert 5 < reachable < 20


def test_squares_shrink_as_published() -> None:
    sides = [square_side(0.8, q, 10_000, 32, 32) for q in (0, 10, 11, 51, 201, 8001)]
    assert sides == [29, 29, 20, 14, 10, 1]
    assert square_side(0.8, 0, 100, 8, 30) == 8  # no larger than the shorter side
    assert square_side(0.8, 6, 5000, 32, 32) == 20  # query 6 of 5000 is query 12 of 10000


def test_square_on_an_oblong_image_and_none_left() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 9, 3))
    images = torch.rand(5, 3, 4, 9)
    with torch.no_grad():
        right = model(images).argmax(1)
    outcome = Square(model, eps=0.3, queries=50).run(images, right)
    assert outcome.robust.sum() < 5
    wrong = Square(model, eps=0.3, queries=50).run(images, (right + 1) % 3)
    assert wrong.accuracy == 0.0 and wrong.costs[0].attacked == 0


def test_few_classes() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    images = torch.rand(20, 1, 4, 4)
    with torch.no_grad():
        labels = model(images).argmax(1)
    with pytest.raises(InputError, match="at least 3 classes; there are 2"):
        APGD(model, loss="dlr", eps=0.1).run(images, labels)
    outcome = auto_attack(model, eps=0.1, steps=5).run(images, labels)  # targets: one, by margins
    assert [cost.attack for cost in outcome.costs] == ["apgd-ce", "apgd-t", "fab-t", "square"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(eps=-0.1), "eps is -0.1"),
        (dict(eps=float("nan")), "eps is nan"),
        (dict(steps=0), "steps is 0"),
        (dict(restarts=0), "restarts is 0"),
        (dict(first=100), "the first stage has 100 of 100 steps"),
        (dict(batch_size=0), "the batch size is 0"),
    ],
)
def test_options_out_of_range(change: dict[str, float], says: str) -> None:
    with pytest.raises(InputError, match=says):
        PMA(nn.Flatten(), **change)  # type: ignore[arg-type]


def test_images_and_labels_that_cannot_be_attacked(
    curved: tuple[nn.Module, Tensor, Tensor],
) -> None:
    model, images, labels = curved
    attack = PMA(model)
    for pixels, answers, says in [
        (images * 255, labels, "pixels go from"),
        (images - 0.5, labels, "inside the network"),
        (images[:0], labels[:0], "no images"),
        (images, labels[:5], "do not belong together"),
        (images, labels + 5, "labels go from"),
        (images, labels - 9, "labels go from"),
    ]:
        with pytest.raises(InputError, match=says):
            attack.run(pixels, answers)
    late = images.clone()
    late[-1, 0, 0, 0] = 3.0  # not among the first
    with pytest.raises(InputError, match="pixels go from"):
        attack.run(late, labels)


def test_networks_that_do_not_answer_logits(curved: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = curved

    class Softmax(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return model(images).softmax(1)

    victim = Victim(Softmax())
    told = PMA(victim, eps=0.03, steps=10).run(images, labels)
    assert "answers probabilities" in victim.remarks[0]
    assert torch.equal(told.robust, PMA(model, eps=0.03, steps=10).run(images, labels).robust)
    for network, says in [
        (nn.Identity(), r"the network answers \[8, 1, 8, 8\]"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), r"the network answers \[8, 1\]"),
    ]:
        with pytest.raises(InputError, match=says):
            PMA(network).run(images, labels)

    class Broken(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return model(images) * math.nan

    with pytest.raises(InputError, match="NaN"):
        PMA(Broken()).run(images, labels)


def test_networks_that_draw_at_random_are_found_and_averaged() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 3)

        def forward(self, images: Tensor) -> Tensor:
            return self.layer((images + 0.3 * torch.randn_like(images)).flatten(1))

    images, labels = torch.rand(8, 1, 4, 4), torch.zeros(8, dtype=torch.long)
    victim = Victim(Noisy(), repeats=3)
    APGD(victim, eps=0.05, steps=2).run(images, labels)
    assert "differently when asked twice" in victim.remarks[0]
    assert victim.forwards % 3 == 0


def test_training_mode_is_off_while_attacking_and_restored() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3)).train()
    victim = Victim(model)
    PMA(victim, eps=0.05, steps=4).run(torch.rand(8, 1, 4, 4), torch.zeros(8, dtype=torch.long))
    assert model[1].training and not victim.remarks
