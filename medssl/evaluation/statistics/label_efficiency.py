"""Labels saved at equal performance: how many the reference needs for what an init reaches.

The reference's learning curve is made monotone and read between its measured points, on a
logarithmic scale of labelled patients. It is never read beyond them: an init that does better than
the reference with all its labels saves "at least", one that does worse than the reference with its
fewest "at most".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from medssl.evaluation.metrics import Array, metric_for
from medssl.evaluation.statistics.cells import INIT, checked, comparable
from medssl.evaluation.statistics.intervals import PATIENTS, PATIENTS_AND_RUNS
from medssl.evaluation.statistics.learning_curves import Curve, curve_of, monotone, shared_seeds
from medssl.evaluation.statistics.resampling import expanded_interval

AT_LEAST, AT_MOST = "at least", "at most"
# Curves of the same weights under two names differ by the rounding of sums.
_ROUNDING = 1e-9

SAVED_COLUMNS = [
    "init", "pretext", "reference", "backbone", "task", "task_kind", "protocol", "metric",
    "num_labelled_patients", "value", "reference_needs", "saved_share", "bound", "ci_low",
    "ci_low_bound", "ci_high", "ci_high_bound", "ci_over", "num_patients", "num_seeds",
]  # fmt: skip


def labels_saved(
    predictions: pd.DataFrame,
    metrics: Mapping[str, str] | None = None,
    *,
    reference: str = "imagenet",
    num_resamples: int = 2_000,
    seed: int = 0,
    alpha: float = 0.05,
) -> pd.DataFrame:
    """Return the labels saved (written as ``labels_saved.csv``).

    Args:
        predictions: one row per cell and test case; only rows with ``selected`` count.
        metrics: metric of each task; default: by the kind of the task.
        reference: the init whose learning curve is read.
        num_resamples: of patients, and inside them of seeds.
        seed: of the resampling.
        alpha: 1 minus the confidence level.

    Returns:
        One row per init, protocol and number of labelled patients: ``reference_needs`` is how many
        the reference needs for the same ``value``; ``saved_share`` is the share of them that the
        init does without, negative where it needs more; ``bound`` is ``at least`` or ``at most``
        where the reference was measured no further, and so are those of the interval's ends.
        No row where the reference has a single number of labelled patients.

    Raises:
        DataError: two inits were not tested on the same cases, or do not share the backbone.
    """
    table = checked(predictions)
    table = table[table["selected"]]
    rows = []
    for values, group in table.groupby(["task", "task_kind", "protocol"], sort=False):
        names: dict[str, Any] = dict(zip(["task", "task_kind", "protocol"], values, strict=True))
        metric = metric_for(names["task_kind"], (metrics or {}).get(names["task"]))
        ours = group[group["init"] == reference]
        if ours["num_labelled_patients"].nunique() < 2:
            continue
        for init_values, theirs in group[group["init"] != reference].groupby(INIT, sort=False):
            both = shared_seeds(_comparable(theirs, ours, f"{names['task']}, {names['protocol']}"))
            if both["init"].nunique() < 2:
                continue  # no number of labelled patients, or no seed, that both have
            curve, base = (
                curve_of(both[(both["init"] == reference) == is_reference], metric,
                         num_resamples, seed)
                for is_reference in (False, True)
            )  # fmt: skip
            shared = {
                **dict(zip(INIT, init_values, strict=True)),
                **names,
                "reference": reference,
                "metric": metric.name,
                "num_patients": both["patient_key"].nunique(),
                "num_seeds": curve.num_seeds,
                "ci_over": PATIENTS if curve.num_seeds < 2 else PATIENTS_AND_RUNS,
            }
            sign = 1.0 if metric.higher_is_better else -1.0
            for row in _rows(curve, base, shared["num_patients"], alpha):
                rows.append({**shared, **row, "value": sign * row["value"]})
    return pd.DataFrame(rows, columns=SAVED_COLUMNS)


def _comparable(theirs: pd.DataFrame, ours: pd.DataFrame, where: str) -> pd.DataFrame:
    """Return the rows of both, checked number by number; the reference may have more numbers."""
    parts: list[pd.DataFrame] = []
    for count, part in ours.groupby("num_labelled_patients"):
        other = theirs[theirs["num_labelled_patients"] == count]
        if len(other):
            parts += comparable(other, part, where)
        else:
            parts.append(part[part["backbone"] == theirs["backbone"].iloc[0]])
    return pd.concat(parts)


def needed(counts: Array, curves: Array, goals: Array) -> tuple[Array, np.ndarray]:
    """Return how many labelled patients curves need to reach goals, and on which side they end.

    Args:
        counts: (N,) measured numbers, ascending.
        curves: (R, N) values there, never falling.
        goals: (R,).

    Returns:
        (R,) numbers between the first and last measured one; (R,) 1 where the goal lies above the
        last value, -1 where it lies below the first, else 0.
    """
    place = (curves < goals[:, None] - _ROUNDING).sum(axis=1)
    last = len(counts) - 1
    upper, lower = np.clip(place, 1, last), np.clip(place, 1, last) - 1
    rows = np.arange(len(goals))
    rise = curves[rows, upper] - curves[rows, lower]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(rise > 0, (goals - curves[rows, lower]) / rise, 0.0)
    scale = np.log(counts)
    found = np.exp(scale[lower] + np.clip(share, 0, 1) * (scale[upper] - scale[lower]))
    side = np.where(place > last, 1, np.where(goals < curves[:, 0] - _ROUNDING, -1, 0))
    return np.where(place > last, counts[-1], np.where(place == 0, counts[0], found)), side


def _rows(curve: Curve, base: Curve, num_patients: int, alpha: float) -> list[dict[str, Any]]:
    known = np.isfinite(curve.samples).all(axis=1) & np.isfinite(base.samples).all(axis=1)
    reference, references = monotone(base.values[None]), monotone(base.samples)
    rows = []
    for place, count in enumerate(curve.counts):
        value = curve.values[place]
        (needs,), (side,) = needed(base.counts, reference, np.array([value]))
        sampled, sides = needed(base.counts, references, curve.samples[:, place])
        shares = np.where(known, 1 - count / sampled, np.nan)
        low, high = expanded_interval(shares, num_patients, alpha)
        # What the measured range allows: beyond its ends a share is a bound.
        least = 1 - count / base.counts[0] if (sides < 0).any() else np.nan
        most = 1 - count / base.counts[-1] if (sides > 0).any() else np.nan
        rows.append(
            {
                "num_labelled_patients": round(count),
                "value": value,
                "reference_needs": needs,
                "saved_share": 1 - count / needs,
                "bound": {1: AT_LEAST, -1: AT_MOST}.get(int(side), ""),
                "ci_low": low,
                "ci_low_bound": _bound(low, least, most),
                "ci_high": high,
                "ci_high_bound": _bound(high, least, most),
            }
        )
    return rows


def _bound(share: float, least: float, most: float) -> str:
    if np.isclose(share, most):
        return AT_LEAST
    return AT_MOST if np.isclose(share, least) else ""
