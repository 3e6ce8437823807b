"""Blocks of a robustness measurement, shared out among the machines of a Ray cluster.

Every worker opens the network and the data by itself and writes its blocks into the work folder,
which must be one that all machines see. A block of a worker that dies is given to another one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gossamer.core.errors import InputError, MissingExtra
from gossamer.evaluate.robustness import Measurement, Spread

RETRIES = 2


def over_ray(open_: Callable[[], Measurement], *, address: str, workers: int) -> Spread:
    """Shares blocks out over a cluster.

    Args:
        open_: opens the measurement on a worker.
        address: of the cluster; "local" starts one on this machine.
        workers: processes, each with a network of its own.

    Raises:
        MissingExtra: if Ray is not installed.
        InputError: if the cluster cannot be reached, or a block fails on every try.
    """
    ray = _ray()

    def spread(measurement: Measurement, numbers: Sequence[int]) -> Iterator[int]:
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=False)
        except (ConnectionError, ValueError) as error:
            raise InputError(f"no Ray cluster is found at {address}: {error}") from error
        try:
            remote = ray.remote(max_restarts=RETRIES, max_task_retries=RETRIES)(_Worker)
            hands = [remote.remote(open_) for _ in range(min(workers, max(len(numbers), 1)))]
            waiting = list(reversed(numbers))
            busy: dict[Any, Any] = {}
            for hand in hands:
                if waiting:
                    busy[hand.measure.remote(waiting.pop())] = hand
            while busy:
                ready, _ = ray.wait(list(busy))
                hand = busy.pop(ready[0])
                try:
                    yield ray.get(ready[0])
                except ray.exceptions.RayError as error:
                    raise InputError(f"a worker failed: {error}") from error
                if waiting:
                    busy[hand.measure.remote(waiting.pop())] = hand
        finally:
            ray.shutdown()

    return spread


class _Worker:
    def __init__(self, open_: Callable[[], Measurement]) -> None:
        self.measurement = open_()

    def measure(self, number: int) -> int:
        if not self.measurement.done(number):
            self.measurement.measure(number)
        return number


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise MissingExtra("Ray", "cluster") from error
