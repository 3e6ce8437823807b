"""Fewer, cleaner, private and visible data."""
