"""Run a whole study and print its verdicts.

python workflows/study.py configs/studies/demo.yaml
"""

import sys
from pathlib import Path

import pandas as pd

import medssl
from medssl.config import load_config
from medssl.pipelines.study import StudyConfig


def main() -> None:
    """Run the study that the config describes; given again, it goes on where it was."""
    run = medssl.study(load_config(Path(sys.argv[1]), StudyConfig, sys.argv[2:]))
    columns = ["task", "protocol", "num_labelled_patients", "init", "effect", "ci_low", "ci_high"]
    print(pd.read_csv(run / "comparisons.csv")[[*columns, "verdict"]].to_string(index=False))
    print("report:", run / "report.html")


if __name__ == "__main__":
    main()
