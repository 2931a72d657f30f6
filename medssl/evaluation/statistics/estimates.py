"""The results table: the metric of every init, with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from medssl.evaluation.metrics import metric_for
from medssl.evaluation.statistics.cells import CELL, INIT, by_seed, checked, layers
from medssl.evaluation.statistics.intervals import uncertain
from medssl.evaluation.statistics.resampling import draw_resamples, measured, resampled
from medssl.randomness import numpy_generator

# Metrics that lie between 0 and 1, and whose intervals should.
_SHARES = frozenset(
    {"accuracy", "auc", "average_precision", "balanced_accuracy", "dice", "mean_auc",
     "mean_average_precision", "success_rate_4mm"}
)  # fmt: skip
_RESULT_COLUMNS = [
    *INIT, "task", "task_kind", "protocol", "layer", "selected", "label_fraction",
    "num_labelled_patients", "metric", "value", "ci_low", "ci_high", "ci_over", "seed_low",
    "seed_high", "num_seeds", "num_patients", "num_cases",
]  # fmt: skip


def estimate(
    predictions: pd.DataFrame,
    metrics: Mapping[str, str] | None = None,
    *,
    num_resamples: int = 2_000,
    seed: int = 0,
    alpha: float = 0.05,
) -> pd.DataFrame:
    """Return the results table (written as ``results.csv``).

    Args:
        predictions: one row per cell and test case, as in ``predictions.parquet``.
        metrics: metric of each task; default: by the kind of the task.
        num_resamples: bootstrap resamples of patients.
        seed: of the resampling.
        alpha: 1 minus the confidence level.

    Returns:
        One row per init, task, protocol, layer and label fraction: ``init, pretext, backbone, task,
        task_kind, protocol, layer, selected, label_fraction, num_labelled_patients, metric, value,
        ci_low, ci_high, ci_over, seed_low, seed_high, num_seeds, num_patients, num_cases``.
        ``value`` is the mean over seeds; ``ci_over`` says what the interval speaks about: other
        patients, and with two or more seeds other training runs. A row with ``selected`` True is
        the cell's verdict (for a probe: the layer chosen on validation, whose name it carries);
        rows with ``selected`` False are the probe's single layers.

    Raises:
        DataError: columns are missing, or the table is empty.
    """
    table = checked(predictions)
    rows = []
    for values, group in table.groupby([*CELL, *INIT], sort=False):
        names: dict[str, Any] = dict(zip([*CELL, *INIT], values, strict=True))
        metric = metric_for(names["task_kind"], (metrics or {}).get(names["task"]))
        for layer, selected, part in layers(group):
            patients = np.unique(part["patient_key"])
            cells = by_seed(part, patients)
            generator = numpy_generator(seed, "estimate", *map(str, names.values()), layer)
            draws = draw_resamples(generator, num_resamples, len(patients))
            single = measured(metric, cells)
            found = uncertain(single, resampled(metric, cells, draws), len(patients))
            is_share = metric.name in _SHARES
            low, high = found.interval_of_share(alpha) if is_share else found.interval(alpha)
            rows.append(
                {
                    **names,
                    "layer": layer,
                    "selected": selected,
                    "num_labelled_patients": round(part["num_labelled_patients"].mean()),
                    "metric": metric.name,
                    "value": found.value,
                    "ci_low": low,
                    "ci_high": high,
                    "ci_over": found.over,
                    "seed_low": single.min(),
                    "seed_high": single.max(),
                    "num_seeds": len(cells),
                    "num_patients": len(patients),
                    "num_cases": len(cells[0].targets),
                }
            )
    return pd.DataFrame(rows)[_RESULT_COLUMNS]
