"""Commands that say how far a network, or a ranking of networks, can be trusted.

The other commands of the room have files of their own beside this one.
"""

from __future__ import annotations

from cyclopts import App

from gossamer.cli.front import app

evaluate = App(name="evaluate", help="Robustness, certificates, rankings, interpretability.")
app.command(evaluate)
