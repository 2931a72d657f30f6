"""Trivial baselines in words and rows: what needs no network, and who is not shown to beat it."""

from __future__ import annotations

from typing import Any

import pandas as pd

from medssl.reports.contents import Contents
from medssl.reports.tables import init_name, metric_name, protocol_name, signed

_IN_WORDS = {
    "prior": "the same answer for everybody",
    "histogram": "a histogram of intensities",
    "size": "the size of the scan",
    "acquisition": "how the scan was acquired",
    "intensity": "the intensity of each voxel",
    "position": "the place in the scan",
}


def baseline_warnings(contents: Contents) -> list[str]:
    """Name every baseline that even the best init is not shown to beat with the most labels."""
    warnings = []
    for task, table in _by_task(contents):
        most = table[table["num_labelled_patients"] == table["num_labelled_patients"].max()]
        for _, row in most[most["is_close"].astype(bool)].iterrows():
            warnings.append(
                f"{task}: no init is shown to be better than {_named(row['baseline'])} "
                f"({metric_name(row['metric'])} {row['value']:.3f}; the best, "
                f"{init_name(row['init'])} by {protocol_name(row['protocol'])}, "
                f"{row['init_value']:.3f}, difference {signed(row['effect'])}). "
                "Differences between inits may say little about anatomy."
            )
    return warnings


def baseline_blocks(contents: Contents) -> list[dict[str, Any]]:
    """Return the table of each task: baselines, and the best init beside them."""
    return [
        {
            "task": task,
            "metric": metric_name(str(table["metric"].iloc[0])),
            "rows": [
                {
                    "num_labelled": int(row["num_labelled_patients"]),
                    "baseline": _named(row["baseline"]),
                    "value": f"{row['value']:.3f}",
                    "best": f"{init_name(row['init'])}, {protocol_name(row['protocol'])}",
                    "best_value": f"{row['init_value']:.3f}",
                    "ahead": signed(row["effect"]),
                    "interval": f"{signed(row['effect_low'])} to {signed(row['effect_high'])}",
                    "is_close": bool(row["is_close"]),
                }
                for _, row in table.sort_values("num_labelled_patients", kind="stable").iterrows()
            ],
        }
        for task, table in _by_task(contents)
    ]


def _by_task(contents: Contents) -> list[tuple[str, pd.DataFrame]]:
    if not len(contents.baselines):
        return []
    return [(str(task), part) for task, part in contents.baselines.groupby("task", sort=False)]


def _named(baseline: str) -> str:
    return _IN_WORDS.get(baseline, baseline)
