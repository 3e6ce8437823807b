"""The systolic array's closed forms against SCALE-Sim, layer by layer and array by array.

SCALE-Sim generates the demand of every cycle; gossamer has a formula. Both get the same layers (one
group each, as SCALE-Sim has no groups) as the same topology file, on square and oblong arrays, for
all dataflows that the tool knows. Compared are cycles (the tool prints the number of the last one,
which is one less), mapping efficiency, words between SRAM and array, words from and to DRAM, and
the seconds both take. The tool runs in an environment of its own:

    python benchmarks/systolic.py --setup          # benchmarks/.envs/scalesim
    python benchmarks/systolic.py --json benchmarks/results/systolic.json
    python benchmarks/systolic.py --table          # the committed result again
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

from gossamer.core.experiment import about
from gossamer.core.files import write_json
from gossamer.core.layers import Layer
from gossamer.hardware.systolic import Dataflow, SystolicArray, read_topology, write_topology

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE / ".envs" / "scalesim"
RESULT = HERE / "results" / "systolic.json"
# It converts arrays of one element to numbers, which newer versions of numpy refuse.
PACKAGES = ("scalesim==3.0.0", "numpy<2.3")
ARRAYS = ((16, 16), (32, 32), (64, 64), (8, 32))
DATAFLOWS: tuple[Dataflow, ...] = ("os", "ws", "is")
SRAM_KB = 64
CONFIG = """
[general]
run_name = run
[architecture_presets]
ArrayHeight = {rows}
ArrayWidth = {columns}
IfmapSramSzkB = {sram}
FilterSramSzkB = {sram}
OfmapSramSzkB = {sram}
IfmapOffset = 0
FilterOffset = 10000000
OfmapOffset = 20000000
Bandwidth = 10
Dataflow = {dataflow}
ReadRequestBuffer = 32
WriteRequestBuffer = 32
[layout]
IfmapCustomLayout = False
IfmapSRAMBankBandwidth = 10
IfmapSRAMBankNum = 10
IfmapSRAMBankPort = 2
FilterCustomLayout = False
FilterSRAMBankBandwidth = 10
FilterSRAMBankNum = 10
FilterSRAMBankPort = 2
[sparsity]
SparsitySupport = false
SparseRep = ellpack_block
OptimizedMapping = false
BlockSize = 8
RandomNumberGeneratorSeed = 40
[run_presets]
InterfaceBandwidth = CALC
UseRamulatorTrace = False
"""


def shape(
    name: str, channels: int, features: int, kernel: int, side: int, stride: int = 1
) -> Layer:
    """A dense convolution of square images whose windows end where the image does."""
    reach = (side - 1) * stride + kernel
    return Layer(
        name, name, "convolution", channels, features, 1, (kernel, kernel), (stride, stride),
        input_size=(reach, reach), output_size=(side, side),
    )  # fmt: skip


LAYERS = [
    shape("stem", 3, 32, 3, 28, 2),
    shape("one channel of a depthwise layer", 1, 1, 3, 14),
    shape("a group of 4", 4, 4, 3, 14),
    shape("a group of 8", 8, 8, 3, 14),
    shape("a group of 32", 32, 32, 3, 14),
    shape("pointwise", 512, 256, 1, 14),
    shape("late pointwise", 512, 512, 1, 7),
    shape("dense", 64, 64, 3, 14),
    shape("dense with stride", 32, 64, 3, 14, 2),
    shape("linear", 1024, 1000, 1, 1),
]


def setup() -> None:
    """Makes the tool's environment."""
    venv.create(ENVIRONMENT, with_pip=True)
    subprocess.run([ENVIRONMENT / "bin" / "pip", "install", "-q", *PACKAGES], check=True)


def compare(
    rows: int, columns: int, dataflow: Dataflow, layers: list[Layer]
) -> list[dict[str, Any]]:
    """Runs both on one array; a row a layer."""
    array = SystolicArray(rows, columns, dataflow, sram_kb=(SRAM_KB,) * 3)
    with tempfile.TemporaryDirectory() as folder:
        topology, config = Path(folder) / "layers.csv", Path(folder) / "array.cfg"
        write_topology(layers, topology)
        config.write_text(
            CONFIG.format(rows=rows, columns=columns, dataflow=dataflow, sram=SRAM_KB)
        )
        began = time.perf_counter()
        done = subprocess.run(
            [ENVIRONMENT / "bin" / "python", HERE / "peers" / "systolic_scalesim.py",
             topology, config, folder],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        tool_seconds = time.perf_counter() - began
        began = time.perf_counter()
        runs = [array.run(layer) for layer in read_topology(topology)]
        seconds = time.perf_counter() - began
    reports = json.loads(done.stdout)
    found = []
    for run, compute, access in zip(
        runs, reports["COMPUTE_REPORT"], reports["DETAILED_ACCESS_REPORT"], strict=True
    ):
        theirs = {
            "cycles": compute["Total Cycles"] + 1,
            "mapping_efficiency": compute["Mapping Efficiency %"] / 100.0,
            "sram": [access[f"SRAM {w}"] for w in ("IFMAP Reads", "Filter Reads", "OFMAP Writes")],
            "dram": [access[f"DRAM {w}"] for w in ("IFMAP Reads", "Filter Reads", "OFMAP Writes")],
        }
        ours = {
            "cycles": run.cycles,
            "mapping_efficiency": run.mapping_efficiency,
            "sram": [run.sram.inputs, run.sram.weights, run.sram.outputs],
            "dram": [run.dram.inputs, run.dram.weights, run.dram.outputs],
        }
        found.append(
            {
                "layer": run.layer, "rows": rows, "columns": columns, "dataflow": dataflow,
                "gossamer": ours, "scalesim": theirs,
                "seconds": seconds / len(runs), "scalesim_seconds": tool_seconds / len(runs),
            }
        )  # fmt: skip
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """How often both agree, and by how much they differ where they do not."""
    lines = []

    def line(name: str, pairs: list[tuple[float, float]]) -> None:
        gaps = [abs(a - b) / b if b else float(a != b) for a, b in pairs]
        same = sum(gap < 1e-9 for gap in gaps)
        near = sum(gap <= 0.01 for gap in gaps)
        worst = max(gaps)
        lines.append(
            f"{name:28} equal {same:4} of {len(gaps)}, within 1 % {near:4}, largest gap "
            f"{100 * worst:.1f} %"
        )

    for dataflow in DATAFLOWS:
        own = [row for row in rows if row["dataflow"] == dataflow]
        if not own:
            continue
        for key in ("cycles", "mapping_efficiency"):
            line(f"{dataflow} {key}", [(r["gossamer"][key], r["scalesim"][key]) for r in own])
        for memory in ("sram", "dram"):
            for place, operand in enumerate(("inputs", "weights", "outputs")):
                line(
                    f"{dataflow} {memory} {operand}",
                    [(r["gossamer"][memory][place], r["scalesim"][memory][place]) for r in own],
                )
    ours, theirs = (sum(r[key] for r in rows) for key in ("seconds", "scalesim_seconds"))
    lines.append(f"{len(rows)} layers: {ours:.3f} s here, {theirs:.0f} s in SCALE-Sim")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setup", action="store_true", help="make the tool's environment")
    parser.add_argument("--table", action="store_true", help="print the committed result")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--layers", type=int, default=len(LAYERS), help="only the first ones")
    options = parser.parse_args()
    if options.setup:
        setup()
        return
    if options.table:
        print(table(json.loads(RESULT.read_text())["rows"]))
        return
    rows = []
    # The layer of the tool's own golden trace, which is too slow for every array.
    rows += compare(32, 32, "ws", [shape("first of AlexNet", 3, 96, 11, 55, 4)])
    for height, width in ARRAYS:
        for dataflow in DATAFLOWS:
            rows += compare(height, width, dataflow, LAYERS[: options.layers])
            print(f"{height} x {width} {dataflow} done", file=sys.stderr)
    print(table(rows))
    if options.json:
        write_json(
            options.json, {"about": about(scalesim=PACKAGES[0], sram_kb=SRAM_KB), "rows": rows}
        )


if __name__ == "__main__":
    main()
