"""Peak memory of one ONNX file, measured in a process of its own.

Run as a script (``python peak_memory.py MODEL THREADS INPUTS.npz``) it prints one JSON object. It
imports nothing of gossamer: what is resident before the model is loaded should be little.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def resident() -> int:
    """Bytes of this process in memory now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def highest() -> int:
    """Most bytes of this process in memory since :func:`forget`, or ever."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("the kernel does not tell VmHWM")


def forget() -> bool:
    """Lets :func:`highest` start anew; False where the kernel does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def main(model: str, threads: int, inputs: str) -> None:
    """Loads, runs three times, prints the growth in bytes."""
    import numpy as np
    import onnxruntime

    with np.load(inputs, allow_pickle=False) as file:
        feed = {name: file[name] for name in file.files}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    before = resident()
    precise = forget()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    for _ in range(3):
        session.run(None, feed)
    # Without a fresh start the mark may be that of the imports; then it says nothing.
    peak = highest() if precise else resident()
    sys.stdout.write(json.dumps({"growth": max(0, peak - before), "precise": precise}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
