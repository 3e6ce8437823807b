"""Readers of real data: each turns files into a :class:`gossamer.core.task.Classification`."""

from gossamer.datasets.resolve import open_task

__all__ = ["open_task"]
