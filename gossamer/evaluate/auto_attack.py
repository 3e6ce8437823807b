"""Ensembles of attacks, and all attacks by name.

``standard`` is AutoAttack (Croce and Hein, ICML 2020): APGD on cross-entropy, targeted APGD,
targeted FAB and Square, each on what the ones before left standing. ``plus`` adds untargeted APGD
on the difference of logits ratio and FAB, with five restarts; ``random`` is for networks that draw
at random: APGD on both losses with gradients averaged over 20 passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from gossamer.core.errors import InputError
from gossamer.evaluate.attack import Attack, Chain
from gossamer.evaluate.auto_pgd import APGD, TargetedAPGD
from gossamer.evaluate.fast_boundary import FAB, TargetedFAB
from gossamer.evaluate.gradient_ascent import PGD, MultiTargeted
from gossamer.evaluate.margin_attack import MD, PMA
from gossamer.evaluate.square_attack import Square
from gossamer.evaluate.victim import Victim

Make = Callable[..., Attack]
RANDOM_PASSES = 20


def auto_attack(model: nn.Module | Victim, *, steps: int = 100, **budget: Any) -> Chain:
    """AutoAttack, standard version.

    Args:
        model: maps images in [0, 1] to logits.
        steps: of APGD and FAB.
        budget: ``eps``, ``seed`` and ``batch_size`` of every member.
    """
    victim = _victim(model)
    return Chain(
        "auto-attack",
        [
            APGD(victim, steps=steps, **budget),
            TargetedAPGD(victim, steps=steps, **budget),
            TargetedFAB(victim, steps=steps, **budget),
            Square(victim, **budget),
        ],
    )


def auto_attack_plus(model: nn.Module | Victim, *, steps: int = 100, **budget: Any) -> Chain:
    """AutoAttack with two more attacks and five restarts of APGD."""
    victim = _victim(model)
    return Chain(
        "auto-attack-plus",
        [
            APGD(victim, steps=steps, restarts=5, **budget),
            APGD(victim, loss="dlr", steps=steps, restarts=5, **budget),
            FAB(victim, steps=steps, **budget),
            Square(victim, **budget),
            TargetedAPGD(victim, steps=steps, **budget),
            TargetedFAB(victim, steps=steps, **budget),
        ],
    )


def auto_attack_random(model: nn.Module | Victim, *, steps: int = 100, **budget: Any) -> Chain:
    """AutoAttack for networks that draw at random."""
    victim = model if isinstance(model, Victim) else Victim(model, repeats=RANDOM_PASSES)
    return Chain(
        "auto-attack-random",
        [APGD(victim, loss=loss, steps=steps, **budget) for loss in ("ce", "dlr")],
    )


def pma_plus(model: nn.Module | Victim, *, steps: int = 100, **budget: Any) -> Chain:
    """The probability margin attack, then targeted APGD on what is still standing."""
    victim = _victim(model)
    return Chain(
        "pma+", [PMA(victim, steps=steps, **budget), TargetedAPGD(victim, steps=steps, **budget)]
    )


def pma_then_auto_attack(model: nn.Module | Victim, *, steps: int = 100, **budget: Any) -> Chain:
    """The probability margin attack, then AutoAttack on what is still standing."""
    victim = _victim(model)
    members = auto_attack(victim, steps=steps, **budget).attacks
    return Chain("pma+auto-attack", [PMA(victim, steps=steps, **budget), *members])


def _victim(model: nn.Module | Victim) -> Victim:
    return model if isinstance(model, Victim) else Victim(model)


def _pgd(loss: str) -> Make:
    return lambda model, **options: PGD(model, loss=loss, **options)


ATTACKS: dict[str, Make] = {
    "pma": PMA,
    "pma+": pma_plus,
    "pma+auto-attack": pma_then_auto_attack,
    "auto-attack": auto_attack,
    "auto-attack-plus": auto_attack_plus,
    "auto-attack-random": auto_attack_random,
    **{
        f"pgd-{name}": _pgd(name)
        for name in ("ce", "targeted ce", "margin", "dlr", "pm", "mifpe", "alternating")
    },
    "md": MD,
    "multi-targeted": MultiTargeted,
    "apgd-ce": APGD,
    "apgd-dlr": lambda model, **options: APGD(model, loss="dlr", **options),
    "apgd-t": TargetedAPGD,
    "fab": FAB,
    "fab-t": TargetedFAB,
    "square": lambda model, steps=None, **options: Square(model, **options),
}
"""How to make an attack, by name: ``(model, eps=, seed=, batch_size=, steps=)``."""


def attack_of(name: str) -> Make:
    """The attack of this name.

    Raises:
        InputError: if there is none.
    """
    if name not in ATTACKS:
        raise InputError(f"there is no attack {name!r}; there are {', '.join(ATTACKS)}")
    return ATTACKS[name]
