"""Machinery that several rooms share."""
