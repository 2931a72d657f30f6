"""Compare inits from predictions alone, and write the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from medssl.atomic import atomic_write
from medssl.errors import DataError
from medssl.evaluation.statistics import compare, estimate
from medssl.pipelines import baselines
from medssl.pipelines.run_folder import RunFolder, keep_inits, noted_inits
from medssl.pipelines.sections import StatisticsConfig
from medssl.reports.html import build_report
from medssl.tracking.base import RunHandle


def conclude(
    out: Path,
    statistics: StatisticsConfig,
    metrics: Mapping[str, str],
    handle: RunHandle,
    folder: RunFolder,
) -> None:
    """Write the tables and the report of a run folder that has its predictions."""
    predictions = pd.read_parquet(out / "predictions.parquet")
    tabulate(out, predictions, statistics, metrics)
    baselines.tabulate(out, predictions, statistics, metrics)
    folder.finish()
    handle.artifact(out / "config.yaml")
    handle.artifact(out / "results.csv")
    handle.artifact(out / "comparisons.csv")
    handle.artifact(build_report(out))


def tabulate(
    out: Path, predictions: pd.DataFrame, statistics: StatisticsConfig, metrics: Mapping[str, str]
) -> pd.DataFrame:
    """Write ``results.csv`` and ``comparisons.csv``; returns the comparisons.

    Without the reference among the inits, ``comparisons.csv`` has no rows.
    """
    results = estimate(predictions, metrics, alpha=statistics.alpha)
    atomic_write(out / "results.csv", results.to_csv(index=False))
    comparisons = compare(
        predictions,
        metrics,
        reference=statistics.reference,
        num_resamples=statistics.num_resamples,
        alpha=statistics.alpha,
    )
    atomic_write(out / "comparisons.csv", comparisons.to_csv(index=False))
    return comparisons


def run(
    runs: Sequence[Path], out: Path, *, statistics: StatisticsConfig | None = None
) -> pd.DataFrame:
    """Compare the inits of several run folders, from their predictions alone.

    Inits of the second and later folders whose name is taken already get the folder's name added.

    Args:
        runs: run folders with ``predictions.parquet``.
        out: where to write the tables and the report.
        statistics: how to compare.

    Returns:
        The comparisons table.

    Raises:
        DataError: a folder has no predictions, or the runs were not tested on the same cases.
    """
    tables, taken, metrics = [], set[str](), dict[str, str]()
    reports: dict[str, Any] = {}
    for folder in runs:
        try:
            table = pd.read_parquet(folder / "predictions.parquet")
        except (OSError, ValueError):
            raise DataError(
                f"the run folder {folder.name!r} has no readable predictions.parquet. "
                "Finish that run first."
            ) from None
        shared = taken & set(table["init"])
        label_of = {
            init: f"{init} ({folder.name})" if init in shared else init
            for init in table["init"].unique()
        }
        table["init"] = table["init"].map(label_of)
        taken |= set(table["init"])
        loaded = noted_inits(folder)
        reports |= {label: loaded[init] for init, label in label_of.items() if init in loaded}
        tables.append(table)
        metrics |= _metrics_of(folder)
    predictions = pd.concat(tables, ignore_index=True)
    atomic_write(out / "predictions.parquet", predictions.to_parquet)
    keep_inits(out, reports)  # the report says what each one started from
    comparisons = tabulate(out, predictions, statistics or StatisticsConfig(), metrics)
    build_report(out)
    return comparisons


def _metrics_of(folder: Path) -> dict[str, str]:
    """Return the primary metric of each task, as the run's own results name it."""
    results = folder / "results.csv"
    if not results.is_file():
        return {}
    table = pd.read_csv(results)
    return dict(zip(table["task"].astype(str), table["metric"].astype(str), strict=True))
