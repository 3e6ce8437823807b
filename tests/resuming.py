"""Runs of training that are killed and resumed, for the tests of rules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from gossamer.core.fit import Rule, fit
from gossamer.core.task import Task

R = TypeVar("R", bound=Rule)


class Killed(BaseException):
    """What no handler catches."""


def whole_and_resumed(
    rule: Callable[[], R], task: Task, *, dies_at: int, file: Path, **options: Any
) -> tuple[R, R]:
    """A rule after an unbroken run, and one after a run that died and was resumed.

    Args:
        rule: makes the same rule each time.
        task: it trains on.
        dies_at: steps done before it dies.
        file: holds the state; written after every step.
        **options: of ``fit``.
    """
    whole = rule()
    fit(whole, task, **options)
    broken = rule()
    step, calls = broken.step, []

    def dying(batch: Any) -> Any:
        if len(calls) == dies_at:
            raise Killed
        calls.append(1)
        return step(batch)

    broken.step = dying  # type: ignore[method-assign]
    with pytest.raises(Killed):
        fit(broken, task, checkpoint=file, checkpoint_every=1, **options)
    resumed = rule()
    fit(resumed, task, checkpoint=file, checkpoint_every=1, **options)
    return whole, resumed
