"""Multi-granularity distillation on road scenes (CamVid) and on electron micrographs.

The contenders of ``gossamer reproduce mgd`` on real images, with U-Nets of 72 x 96 and 64 x 64
pixels. Weights of losses are those chosen for the drawn scenes.

    GOSSAMER_DATA=... python benchmarks/segmentation_distillation.py camvid --seeds 0
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from gossamer.core.experiment import about
from gossamer.core.files import write_json
from gossamer.datasets.segmentation import segmentation_arrays, segmentation_tables
from gossamer.experiments.compress.segmentation_distillation import EXPERIMENT, SCENES, measured
from gossamer.experiments.real_data import folder_of

ROADS = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian",
    "bicyclist",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", choices=("camvid", "em_membrane"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--share", type=float, default=1 / 8)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = folder_of(given.data)
    if given.data == "camvid":
        task = segmentation_tables(folder, ROADS, size=(72, 96), ignored=(11,))
    else:
        task = segmentation_arrays(
            folder / "isbi2012_train.npz", ("membrane", "cell"), test=6, validation=4,
            size=(256, 256), tiles=4,
        )  # fmt: skip
    setting = replace(
        SCENES, task=lambda seed: task, share=given.share, epochs=given.epochs,
        teacher_epochs=given.epochs,
    )  # fmt: skip
    rows = []
    for row in measured(setting, given.seeds):
        rows.append(row)
        print(row, flush=True)
    claims = [claim.judge(rows) for claim in EXPERIMENT.claims]
    for claim in claims:
        print("holds" if claim.holds else "does not hold", claim.text, claim.difference, flush=True)
    out = given.out or Path(f"benchmarks/results/segmentation_distillation_{given.data}.json")
    write_json(out, {"rows": [dict(row) for row in rows], **about(seeds=given.seeds)})


if __name__ == "__main__":
    main()
