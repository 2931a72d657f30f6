"""Trivial baselines beside the matrix: their predictions, and how far ahead of them inits are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from medssl.atomic import atomic_write
from medssl.evaluation.metrics import metric_for
from medssl.evaluation.statistics import BETTER, compare, estimate
from medssl.pipelines.sections import StatisticsConfig

if TYPE_CHECKING:
    from medssl.pipelines.cells import Evaluation

PREDICTIONS_FILE = "baselines.parquet"
TABLE_FILE = "baselines.csv"


def run(evaluation: Evaluation, out: Path) -> None:
    """Answer every task by its trivial baselines, and write their predictions; once a run."""
    from medssl.evaluation.baselines import PROTOCOL, Baselines, acquisition_features
    from medssl.evaluation.matrix import PREDICTION_COLUMNS, prediction_rows

    path = out / PREDICTIONS_FILE
    if path.is_file():
        return
    acquisition = acquisition_features(evaluation.index.accepted)
    cells = evaluation.cells()
    some_init = next(iter(evaluation.inits))
    rows = []
    for task in evaluation.tasks:
        setting = evaluation.setting(task, some_init)
        baselines = Baselines(setting, acquisition)
        wanted = {
            (cell.num_labelled_patients, cell.seed): cell for cell in cells if cell.task == task
        }
        for cell in wanted.values():
            for name, predictions in baselines.run(cell).items():
                mine = replace(cell, init=name, protocol=PROTOCOL)
                rows += prediction_rows(mine, predictions, setting, pretext="", backbone="")
    table = pd.DataFrame(rows, columns=list(PREDICTION_COLUMNS))
    atomic_write(path, table.to_parquet)


def tabulate(
    out: Path, predictions: pd.DataFrame, statistics: StatisticsConfig, metrics: Mapping[str, str]
) -> pd.DataFrame | None:
    """Write ``baselines.csv``: each baseline, and how far ahead of it the best init is.

    The best init is the one with the highest value on the test patients, whatever its protocol, so
    that one which does not even beat a baseline is no accident of the choice.

    Returns:
        ``baseline, task, label_fraction, num_labelled_patients, metric, value, ci_low, ci_high,
        init, protocol, init_value, effect, effect_low, effect_high, p_value, is_close``; a
        positive effect is that the init is better, and ``is_close`` that this is not shown. None
        where a run has no baselines.
    """
    path = out / PREDICTIONS_FILE
    if not path.is_file():
        return None
    trivial = pd.read_parquet(path)
    values = estimate(trivial, metrics, alpha=statistics.alpha)
    results = estimate(predictions[predictions["selected"]], metrics, num_resamples=100)
    results = results[results["selected"].astype(bool)]
    rows = []
    for row in values.to_dict("records"):
        same = (results["task"] == row["task"]) & (
            results["num_labelled_patients"] == row["num_labelled_patients"]
        )
        if not same.any():
            continue
        sign = 1 if metric_for(row["task_kind"], row["metric"]).higher_is_better else -1
        best = results[same].iloc[int((sign * results[same]["value"]).argmax())]
        shown = {
            "baseline": row["init"],
            **{name: row[name] for name in _OF_BASELINE},
            "init": best["init"], "protocol": best["protocol"], "init_value": best["value"],
        }  # fmt: skip
        rows.append({**shown, **_ahead(trivial, predictions, row, best, statistics, metrics)})
    table = pd.DataFrame(rows, columns=list(_COLUMNS))
    atomic_write(out / TABLE_FILE, table.to_csv(index=False))
    return table


_OF_BASELINE = (
    "task", "label_fraction", "num_labelled_patients", "metric", "value", "ci_low", "ci_high",
)  # fmt: skip
_COLUMNS = (
    "baseline", *_OF_BASELINE, "init", "protocol", "init_value", "effect", "effect_low",
    "effect_high", "p_value", "is_close",
)  # fmt: skip


def _ahead(
    trivial: pd.DataFrame,
    predictions: pd.DataFrame,
    baseline: Mapping[Any, Any],
    best: pd.Series[Any],
    statistics: StatisticsConfig,
    metrics: Mapping[str, str],
) -> dict[str, object]:
    """Return how far an init is ahead of a baseline, on the same cases and seeds."""
    theirs = predictions[
        predictions["selected"].astype(bool)
        & (predictions["init"] == best["init"])
        & (predictions["protocol"] == best["protocol"])
        & _same(predictions, baseline)
    ]
    ours = trivial[(trivial["init"] == baseline["init"]) & _same(trivial, baseline)]
    both = pd.concat([theirs.assign(init=_THEIRS), ours.assign(init=_OURS)])
    found = compare(
        both.assign(protocol="", backbone="", pretext=""), metrics, reference=_OURS,
        num_resamples=statistics.num_resamples, alpha=statistics.alpha,
    ).iloc[0]  # fmt: skip
    return {
        "effect": found["effect"],
        "effect_low": found["ci_low"],
        "effect_high": found["ci_high"],
        "p_value": found["p_value"],
        "is_close": found["verdict"] != BETTER,
    }


_OURS, _THEIRS = "baseline", "init"


def _same(table: pd.DataFrame, row: Mapping[Any, Any]) -> pd.Series[bool]:
    """Say which rows are of a row's task and number of labelled patients."""
    number = table["num_labelled_patients"] == row["num_labelled_patients"]
    same: pd.Series[bool] = (table["task"] == row["task"]) & number
    return same
