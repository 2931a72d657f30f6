"""Labels saved, learning curves and patients needed: in sentences and as rows of tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from medssl.reports.contents import Contents
from medssl.reports.tables import (
    MINUS,
    by_protocol,
    init_name,
    is_pretrained,
    metric_name,
    protocol_name,
    signed,
)

FITTED = "fitted"
UNKNOWN = "?"


def labels_saved(contents: Contents) -> list[str]:
    """Say of every pretrained init how many labels it saves, one sentence each.

    Of the numbers of labelled patients, that whose saving is surest is spoken of.
    """
    lines = []
    table = contents.labels_saved
    for (task, protocol), group in by_protocol(table):
        spoken = group[is_pretrained(group)]
        for init, rows in (spoken if len(spoken) else group).groupby("init", sort=False):
            lines.append(
                f"{task}, {protocol_name(protocol)}: "
                + _saving(init_name(str(init)), rows, contents.confidence)
            )
    return lines


def _saving(name: str, rows: pd.DataFrame, confidence: float) -> str:
    reference = init_name(rows["reference"].iloc[0])
    known = rows.dropna(subset=["ci_low"])
    sure = known[known["ci_low"] > 0].sort_values("ci_low")
    if not len(sure):
        return f"no labels are shown to be saved by {name} against {reference}."
    row = sure.iloc[-1]
    return (
        f"with {int(row['num_labelled_patients'])} labelled patients {name} does what {reference} "
        f"needs {_worded(row['bound'])}{row['reference_needs']:.0f} for: "
        f"{_share(row['saved_share'], row['bound'])} of the labels saved "
        f"({confidence * 100:g} % CI {_range(row)})."
    )


def saved_blocks(contents: Contents) -> list[dict[str, Any]]:
    """Return the table of labels saved of each task and protocol."""
    return [
        {
            "task": task,
            "protocol": protocol_name(protocol),
            "metric": metric_name(str(table["metric"].iloc[0])),
            "rows": [
                {
                    "num_labelled": int(row["num_labelled_patients"]),
                    "init": init_name(row["init"]),
                    "value": f"{row['value']:.3f}",
                    "needs": f"{_worded(row['bound'])}{row['reference_needs']:.0f}",
                    "saved": _share(row["saved_share"], row["bound"]),
                    "interval": _range(row),
                }
                for _, row in table.sort_values("num_labelled_patients", kind="stable").iterrows()
            ],
        }
        for (task, protocol), table in by_protocol(contents.labels_saved)
    ]


def fit_blocks(contents: Contents) -> list[dict[str, Any]]:
    """Return the fitted learning curves of each task and protocol, one row an init."""
    return [
        {
            "task": task,
            "protocol": protocol_name(protocol),
            "metric": metric_name(str(table["metric"].iloc[0])),
            "rows": [_fit_row(row) for _, row in table.drop_duplicates("init").iterrows()],
        }
        for (task, protocol), table in by_protocol(contents.learning_curves)
    ]


def _fit_row(row: pd.Series) -> dict[str, str]:
    name = init_name(row["init"])
    if row["fit"] != FITTED:
        return {"init": name, "asymptote": "", "exponent": "", "fit": str(row["fit"])}
    return {
        "init": name,
        "asymptote": _with_interval(row, "asymptote", 3),
        "exponent": _with_interval(row, "exponent", 2),
        "fit": FITTED,
    }


def fits_in_words(table: pd.DataFrame) -> str:
    """Say in one sentence what the learning curves of a task and protocol tend to."""
    if not len(table):
        return ""
    parts = []
    for _, row in table.drop_duplicates("init").iterrows():
        name = init_name(row["init"])
        if row["fit"] == FITTED:
            parts.append(f"{name} towards {row['asymptote']:.3f}")
        else:
            parts.append(f"{name} {row['fit']}")
    return f" Fitted: {'; '.join(parts)}."


def power_blocks(contents: Contents) -> list[dict[str, Any]]:
    """Return how many test patients would be needed, of each task and protocol."""
    blocks = []
    for (task, protocol), table in by_protocol(contents.power):
        first = table.iloc[0]
        blocks.append(
            {
                "task": task,
                "protocol": protocol_name(protocol),
                "metric": metric_name(str(first["metric"])),
                "power": f"{first['power'] * 100:g} %",
                "num_patients": int(first["num_patients"]),
                "num_seeds": int(first["num_seeds"]),
                "margin": f"{first['margin']:g}" if np.isfinite(first["margin"]) else "",
                "rows": [
                    {
                        "num_labelled": int(row["num_labelled_patients"]),
                        "init": init_name(row["init"]),
                        "detectable": _number(row["detectable_effect"]),
                        "effect": signed(row["effect"]),
                        "for_effect": _patients(row, "effect"),
                        "for_margin": _patients(row, "margin"),
                    }
                    for _, row in table.sort_values(
                        ["label_fraction", "effect"], ascending=[True, False]
                    ).iterrows()
                ],
            }
        )
    return blocks


def _patients(row: pd.Series, name: str) -> str:
    count = row[f"patients_for_{name}"]
    return f"{count:.0f}" if np.isfinite(count) else str(row[f"limit_for_{name}"] or UNKNOWN)


def _worded(bound: str) -> str:
    return f"{bound} " if bound else ""


def _share(share: float, bound: str) -> str:
    if not np.isfinite(share):
        return UNKNOWN
    percent = round(100 * share)
    return f"{_worded(bound)}{MINUS if percent < 0 else ''}{abs(percent)} %"


def _range(row: pd.Series) -> str:
    if not (np.isfinite(row["ci_low"]) and np.isfinite(row["ci_high"])):
        return "too few patients"
    low = _share(row["ci_low"], row["ci_low_bound"])
    return f"{low} to {_share(row['ci_high'], row['ci_high_bound'])}"


def _with_interval(row: pd.Series, name: str, digits: int) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    interval = f" ({low:.{digits}f} to {high:.{digits}f})" if np.isfinite([low, high]).all() else ""
    return f"{row[name]:.{digits}f}{interval}"


def _number(value: float) -> str:
    return f"{value:.3f}" if np.isfinite(value) else UNKNOWN
