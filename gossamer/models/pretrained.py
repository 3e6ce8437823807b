"""What our networks say when timm's users ask for pretrained weights."""

from __future__ import annotations

from gossamer.core.errors import InputError


def no_weights(name: str, pretrained: bool) -> None:
    """Refuses to download weights.

    Raises:
        InputError: if they are asked for; there are none.
    """
    if pretrained:
        raise InputError(f"there are no weights to download for {name}; give a file of weights")
