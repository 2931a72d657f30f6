"""Compare starting weights on labelled scans, and see what a reviewer would ask for.

python workflows/transfer.py configs/transfer/hippocampus_3d.yaml runs/transfer
"""

import sys
from pathlib import Path

import pandas as pd

import medssl
from medssl.config import load_config
from medssl.pipelines.transfer import TransferConfig


def main() -> None:
    """Run the matrix of the config given first, into the run folder given second."""
    config_file, out = map(Path, sys.argv[1:3])
    run = medssl.transfer(load_config(config_file, TransferConfig, sys.argv[3:]), out)
    results = pd.read_csv(run / "results.csv")
    by = ["task", "protocol", "num_labelled_patients", "init"]
    print(results[results["selected"]].set_index(by)["value"].unstack().to_string())
    print("verdicts, curves and baselines:", run / "report.html")


if __name__ == "__main__":
    main()
