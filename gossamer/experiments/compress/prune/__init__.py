"""Experiments of the systems in :mod:`gossamer.compress.prune`."""
