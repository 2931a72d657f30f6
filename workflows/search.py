"""Choose a recipe: run a study's variants on validation patients, and print what each gave.

python workflows/search.py configs/studies/search_2d.yaml
"""

import json
import sys
from pathlib import Path

import pandas as pd
import yaml

import medssl
from medssl.config import load_config
from medssl.pipelines.study import StudyConfig


def main() -> None:
    """Run each trial: the study's config with a few values changed, but never on test patients."""
    search = yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8"))
    out = Path(search.get("out", "runs/search"))
    tables = []
    for name, changes in search["trials"].items():
        values = {**search.get("always", {}), **changes, "splits.evaluate_on": "validation"}
        overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        config = load_config(Path(search["study"]), StudyConfig, overrides)
        results = pd.read_csv(medssl.study(config, out / name) / "results.csv")
        tables.append(results[results["selected"]].assign(trial=name))
        columns = ["trial", "task", "protocol", "num_labelled_patients", "init", "value", "layer"]
        table = pd.concat(tables)[[*columns, "ci_low", "ci_high"]]
        table.to_csv(out / "search.csv", index=False)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
