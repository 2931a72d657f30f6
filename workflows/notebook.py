# %% [markdown]
# # From a folder of scans to a verdict, a cell at a time
#
# Open it in an editor that knows cells (VS Code, Spyder, PyCharm; Jupyter with jupytext), in the
# folder that holds `configs/`, or run it whole: `python workflows/notebook.py`. The scans are drawn
# here, so the figures prove nothing; put your own folder and labels into the config of cell 3.

# %% 1. Scans: every file ends in the table, accepted or with a reason why not
import os
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch

import medssl
from medssl.config import load_config
from medssl.pipelines.study import StudyConfig
from medssl.scans.datasets.base import fetch

STEPS = int(os.environ.get("STEPS", "60"))  # of pretraining; 20,000 for your own, on a GPU
PLACE = Path(os.environ.get("PLACE", "runs/notebook"))
DATA = fetch("phantom", PLACE / "data").folder
index = medssl.index_scans(DATA / "images", PLACE / "index")
print(index.table.groupby(["status", "modality", "dims"], dropna=False).size())

# %% 2. A scan is MONAI's tensor with its affine, in RAS, in HU where the scanner gave HU
scan = medssl.load_scan(index, index.accepted["scan_key"].iloc[0])
print(tuple(scan.shape), scan.affine)
plt.imshow(scan[0, :, :, scan.shape[-1] // 2].T, cmap="gray", origin="lower")
plt.savefig(PLACE / "scan.png")

# %% 3. The study: which starting weights, which tasks, how many labelled patients
TASK = {"name": "classification", "table": str(DATA / "labels.csv"), "by": "patient"}
TASK |= {"id_column": "patient", "label_column": "label"}
config = load_config(
    Path("configs/studies/phantom.yaml"),
    StudyConfig,
    [
        f"index.folder={DATA / 'images'}",
        f"tasks=[{TASK}]",
        f"workspace={PLACE / 'workspace'}",
        f"pretrain.training.steps={STEPS}",
        f"pretrain.training.warmup_steps={STEPS // 10}",
        f"pretrain.training.checkpoint_every={STEPS}",
        f"pretrain.training.validate_every={STEPS}",
        "protocols=[{name: linear_probe, max_slices: 4}, {name: knn}]",
        "matrix={labelled_patients: [4], seeds: [0]}",
    ],
)
run = medssl.study(config, PLACE / "study")  # given again, it goes on where it was

# %% 4. The verdicts, each with its interval over patients
verdicts = pd.read_csv(run / "comparisons.csv")
columns = ["task", "protocol", "num_labelled_patients", "init", "effect", "verdict"]
print(verdicts[columns].to_string(index=False))

# %% 5. Every statistic comes from this table, a row for each cell and test case
predictions = pd.read_parquet(run / "predictions.parquet")
print(predictions.groupby(["task", "protocol", "init"])["patient_key"].nunique())

# %% 6. The weights, in code of your own: features of every stage, finest first
backbone, contract = medssl.load_backbone(run / "checkpoints" / "rotation")
images = torch.rand(2, contract.in_channels, 64, 64)
for stage, maps in zip(backbone.stages, backbone(images), strict=True):
    print(stage.name, tuple(maps.shape))
print("report:", run / "report.html")
