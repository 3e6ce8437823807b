"""Commands that make data fewer, cleaner, private and visible."""

from __future__ import annotations

from cyclopts import App

from gossamer.cli.front import app

data = App(name="data", help="Fewer, cleaner, private and visible data.")
app.command(data)
