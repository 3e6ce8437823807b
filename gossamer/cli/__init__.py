"""The front door: commands made from typed functions.

``front`` holds the application and how problems end, ``given`` turns what a command was given into
a network and a task; the other files hold the commands of one room each.
"""

from gossamer.cli import (  # noqa: F401 (they register commands)
    catalog,
    certify,
    compose,
    compress,
    data,
    evaluate,
    explore,
    hardware,
    lake,
    prototypes,
    rank,
    select_network,
    synthesize,
    tokens,
    transfer,
)
from gossamer.cli.front import app, main

__all__ = ["app", "main"]
