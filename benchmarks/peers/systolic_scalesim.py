"""Runs SCALE-Sim on one topology and prints its reports as JSON (in the peer's environment).

python systolic_scalesim.py TOPOLOGY CONFIG FOLDER
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
from pathlib import Path

from scalesim.scale_sim import scalesim


def main(topology: str, config: str, folder: str) -> None:
    """One run; its many lines of progress are not shown."""
    layout = Path(folder) / "layout.csv"
    layout.write_text("no layouts,\n")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        tool = scalesim(
            save_disk_space=True, verbose=False, config=config, topology=topology,
            layout=str(layout), input_type_gemm=False,
        )  # fmt: skip
        tool.run_scale(top_path=folder)
    reports = {}
    for path in sorted(Path(folder).glob("*/*REPORT.csv")):
        header, *rows = list(csv.reader(path.open()))
        names = [name.strip() for name in header if name.strip()]
        reports[path.stem] = [
            dict(zip(names, map(float, row[: len(names)]), strict=True)) for row in rows
        ]
    json.dump(reports, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:4])
