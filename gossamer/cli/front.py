"""The command line itself: one application, and how problems end.

Everything heavy is imported inside a command, so that ``gossamer --help`` answers at once. A
problem the user can mend is one sentence on stderr and exit code 2.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

import gossamer
from gossamer.core.errors import GossamerError

if TYPE_CHECKING:
    from rich.console import Console

app = App(
    name="gossamer",
    help="Deep learning on a budget: make networks smaller, and see what it costs.",
    version=gossamer.__version__,
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,  # main says how to go on
    # A list takes all the words after its option: --seeds 0 1 2.
    default_parameter=Parameter(consume_multiple=True, negative_iterable=()),
)

Json = Annotated[bool, Parameter(name="--json", negative="")]


def main() -> None:
    """Runs the command line; GossamerError becomes one sentence and exit code 2."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("gossamer").setLevel(logging.INFO)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of the libraries, to their developers
    try:
        app()
    except GossamerError as error:
        print(f"gossamer: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("gossamer: interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    except OSError as error:  # a full disk, a folder that may not be written
        where = f" ({error.filename})" if error.filename else ""
        print(f"gossamer: {(error.strerror or str(error)).lower()}{where}", file=sys.stderr)
        sys.exit(2)


def out_console() -> Console:
    from rich.console import Console

    return Console()


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, allow_nan=False))
