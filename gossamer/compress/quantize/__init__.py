"""Fewer bits per weight and activation."""
