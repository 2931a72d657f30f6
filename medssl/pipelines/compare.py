"""Compare inits from predictions alone, and write the report."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from medssl.atomic import atomic_write
from medssl.errors import ConfigError, DataError
from medssl.evaluation.statistics import compare, estimate, labels_saved, learning_curves, power
from medssl.pipelines import baselines
from medssl.pipelines.run_folder import RunFolder, keep_comparison, noted_inits
from medssl.pipelines.sections import StatisticsConfig
from medssl.reports.html import build_report
from medssl.tracking.base import RunHandle

TABLES = ("results", "comparisons", "labels_saved", "learning_curves", "power")


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
    beside = baselines.tabulate(out, predictions, statistics, metrics)
    folder.finish()
    for name in TABLES if beside is None else (*TABLES, "baselines"):
        handle.artifact(out / f"{name}.csv")
    folder.send_report(handle, build_report(out))


def tabulate(
    out: Path, predictions: pd.DataFrame, statistics: StatisticsConfig, metrics: Mapping[str, str]
) -> pd.DataFrame:
    """Write the tables of `TABLES`, each as a CSV file; returns the comparisons.

    Without the reference among the inits, the tables that compare with it have no rows.
    """
    alpha = statistics.alpha
    comparisons = compare(
        predictions,
        metrics,
        reference=statistics.reference,
        margin=statistics.margin,
        num_resamples=statistics.num_resamples,
        alpha=alpha,
    )
    tables = {
        "results": estimate(predictions, metrics, alpha=alpha),
        "comparisons": comparisons,
        "labels_saved": labels_saved(
            predictions, metrics, reference=statistics.reference, alpha=alpha
        ),
        "learning_curves": learning_curves(predictions, metrics, alpha=alpha),
        "power": power(comparisons, alpha=alpha),
    }
    for name in TABLES:
        atomic_write(out / f"{name}.csv", tables[name].to_csv(index=False))
    return comparisons


def run(
    runs: Sequence[Path], out: Path, *, statistics: StatisticsConfig | None = None
) -> pd.DataFrame:
    """Compare the inits of several run folders, from their predictions alone.

    Inits of the second and later folders whose name is taken already get the folder's name added.

    Args:
        runs: run folders with ``predictions.parquet``.
        out: where to write the tables and the report.
        statistics: how to compare; by default with ``imagenet``, or where no run has it, with the
            reference of the first run.

    Returns:
        The comparisons table.

    Raises:
        ConfigError: the reference is not among the inits.
        DataError: a folder has no predictions, the runs were not tested on the same cases, or
            not judged by the same metric.
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
        label_of = {init: _free(init, folder.name, taken) for init in table["init"].unique()}
        table["init"] = table["init"].map(label_of)
        taken |= set(table["init"])
        loaded = noted_inits(folder)
        reports |= {label: loaded[init] for init, label in label_of.items() if init in loaded}
        tables.append(table)
        for task, metric in _metrics_of(folder).items():
            if metrics.setdefault(task, metric) != metric:
                raise DataError(
                    f"the runs judge task {task!r} by different primary metrics ({metrics[task]}, "
                    f"and {metric} in {folder.name!r}). The metric is fixed before a run: compare "
                    "runs that chose the same."
                )
    statistics = statistics or StatisticsConfig(reference=_reference_of(runs[0], taken))
    if statistics.reference not in taken:
        raise ConfigError(
            f"reference {statistics.reference!r} is not one of the inits. "
            f"There are: {', '.join(sorted(taken))}"
        )
    predictions = pd.concat(tables, ignore_index=True)
    atomic_write(out / "predictions.parquet", predictions.to_parquet)
    keep_comparison(out, runs, statistics, reports)  # what the report says beside the numbers
    comparisons = tabulate(out, predictions, statistics, metrics)
    build_report(out)
    return comparisons


def _reference_of(first: Path, inits: Collection[str]) -> str:
    """Return ``imagenet`` where there is such an init, else what the first run compared with."""
    usual = StatisticsConfig().reference
    path = first / "comparisons.csv"
    if usual in inits or not path.is_file():
        return usual
    named = pd.read_csv(path, usecols=["reference"])["reference"]
    return usual if named.empty else str(named.iloc[0])


def _free(init: str, folder: str, taken: Collection[str]) -> str:
    """Return an init's label with the folder's name, and a number, where the label is taken."""
    named = itertools.chain([init, f"{init} ({folder})"], _numbered(init, folder))
    return next(label for label in named if label not in taken)


def _numbered(init: str, folder: str) -> Iterator[str]:
    return (f"{init} ({folder} {number})" for number in itertools.count(2))


def _metrics_of(folder: Path) -> dict[str, str]:
    """Return the primary metric of each task, as the run's own results name it."""
    results = folder / "results.csv"
    if not results.is_file():
        return {}
    table = pd.read_csv(results)
    return dict(zip(table["task"].astype(str), table["metric"].astype(str), strict=True))
