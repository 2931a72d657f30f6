"""Learning curves: performance over the number of labelled patients, and a power law through them.

The law is ``asymptote - gain * num_labelled ** -exponent``. For every exponent the other two follow
by linear least squares, so that one bounded search over the exponent remains, which cannot end
elsewhere than at the best fit. More labels are taken to do no harm (``gain >= 0``), and no curve to
rise above what its metric can reach (1, or 0 for errors, whose sign is turned).

Source: Hestness et al. 2017, Deep Learning Scaling Is Predictable, Empirically.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize

from medssl.evaluation.metrics import Array, Metric, metric_for
from medssl.evaluation.statistics.cells import INIT, SeedCell, by_seed, checked
from medssl.evaluation.statistics.intervals import spread_of
from medssl.evaluation.statistics.resampling import (
    defined,
    draw_resamples,
    expanded_interval,
    measured,
    resampled,
)
from medssl.randomness import numpy_generator

FITTED = "fitted"
TOO_FEW, FLAT = "no fit: fewer than 4 points", "no fit: more labels did not help"
# Three numbers are fitted: fewer points than this would leave nothing to fit them to.
_MIN_POINTS = 4
_EXPONENTS = (0.05, 4.0)
# Each is one search; their interval is of a figure, not of a verdict.
_NUM_REFITS = 200

CURVE_COLUMNS = [
    *INIT, "task", "task_kind", "protocol", "metric", "num_labelled_patients", "value", "fitted",
    "fitted_low", "fitted_high", "asymptote", "asymptote_low", "asymptote_high", "gain", "exponent",
    "exponent_low", "exponent_high", "fit", "num_patients", "num_seeds",
]  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """Performance of one init over numbers of labelled patients, N of them, ascending.

    Attributes:
        counts: (N,) labelled patients.
        values: (N,) mean over seeds; higher is better, errors have their sign turned.
        samples: (R, N) the same for resamples of patients and of seeds.
        num_seeds: training runs behind each value.
    """

    counts: Array
    values: Array
    samples: Array
    num_seeds: int


@dataclass(frozen=True)
class PowerLaw:
    """``asymptote - gain * num_labelled ** -exponent``."""

    asymptote: float
    gain: float
    exponent: float

    def at(self, counts: Array) -> Array:
        """Return the law's values."""
        return np.asarray(self.asymptote - self.gain * counts**-self.exponent)


def curve_of(rows: pd.DataFrame, metric: Metric, num_resamples: int, seed: int) -> Curve:
    """Return the learning curve of one init, task and protocol.

    Patients are drawn in the same way for every init, and so are seeds, which draw the labelled
    subsets: what two curves share cancels out. The deviations of seeds are widened for their small
    number and narrowed by what the resampled patients vary already.

    Args:
        rows: its selected predictions, of seeds that every number of labelled patients has.
        metric: of the task.
        num_resamples: of patients and seeds.
        seed: of the resampling.
    """
    patients, task = np.unique(rows["patient_key"]), str(rows["task"].iloc[0])
    draws = draw_resamples(numpy_generator(seed, "curve", task), num_resamples, len(patients))
    num_seeds = rows["seed"].nunique()
    seeds = numpy_generator(seed, "curve seeds", task).multinomial(
        num_seeds, np.full(num_seeds, 1 / num_seeds), size=num_resamples
    )
    counts, values, samples = [], [], []
    for count, part in rows.groupby("num_labelled_patients"):
        value, sample = _point(metric, by_seed(part, patients), draws, seeds / num_seeds)
        counts.append(float(str(count)))
        values.append(value)
        samples.append(sample)
    return Curve(np.array(counts), np.array(values), np.stack(samples, axis=1), num_seeds)


def _point(
    metric: Metric, cells: list[SeedCell], draws: Array, shares: Array
) -> tuple[float, Array]:
    sign = 1.0 if metric.higher_is_better else -1.0
    values, samples = sign * measured(metric, cells), sign * resampled(metric, cells, draws)
    means = samples.mean(axis=1)
    if len(cells) > 1:
        own = spread_of(values, samples, draws.shape[1]).run_sd
        seen = values.std(ddof=1)
        if np.isfinite(own) and seen > 0:
            widening = own / seen * np.sqrt(len(cells) / (len(cells) - 1))
            means = means + widening * shares @ (values - values.mean())
    return float(values.mean()), means


def shared_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the seeds that every init and number of labelled patients has."""
    sets = [set(part["seed"]) for _, part in table.groupby(["init", "num_labelled_patients"])]
    return table[table["seed"].isin(set.intersection(*sets))]


def monotone(values: Array) -> Array:
    """Return the nearest curves (..., N) that never fall: isotonic least squares.

    Source: Barlow et al. 1972, Statistical Inference under Order Restrictions, the max-min formula.
    """
    num = values.shape[-1]
    sums = np.concatenate([np.zeros((*values.shape[:-1], 1)), values.cumsum(axis=-1)], axis=-1)
    found = np.empty_like(values)
    for place in range(num):
        means = [
            np.min(
                [(sums[..., last + 1] - sums[..., first]) / (last + 1 - first)
                 for last in range(place, num)],
                axis=0,
            )
            for first in range(place + 1)
        ]  # fmt: skip
        found[..., place] = np.max(means, axis=0)
    return found


def fit_power_law(counts: Array, values: Array, ceiling: float) -> PowerLaw:
    """Return the power law of least squares.

    Args:
        counts: (N,) labelled patients, N at least 4.
        values: (N,), higher is better.
        ceiling: above which the asymptote cannot lie.
    """

    def solved(exponent: float) -> tuple[float, PowerLaw]:
        falling = counts**-exponent
        slope, offset = np.polyfit(falling, values, 1)
        gain, asymptote = max(-slope, 0.0), offset
        if gain == 0:
            asymptote = values.mean()
        if asymptote > ceiling:
            asymptote = ceiling
            gain = max(float(falling @ (ceiling - values) / (falling @ falling)), 0.0)
        law = PowerLaw(float(asymptote), float(gain), exponent)
        return float(((law.at(counts) - values) ** 2).sum()), law

    found = optimize.minimize_scalar(
        lambda logarithm: solved(float(np.exp(logarithm)))[0],
        bounds=tuple(np.log(_EXPONENTS)),
        method="bounded",
    )
    return solved(float(np.exp(found.x)))[1]


def learning_curves(
    predictions: pd.DataFrame,
    metrics: Mapping[str, str] | None = None,
    *,
    num_resamples: int = 2_000,
    seed: int = 0,
    alpha: float = 0.05,
) -> pd.DataFrame:
    """Return the learning curves (written as ``learning_curves.csv``), one row a point.

    Args:
        predictions: one row per cell and test case; only rows with ``selected`` count.
        metrics: metric of each task; default: by the kind of the task.
        num_resamples: of patients and seeds, of which the first 200 are fitted as well.
        seed: of the resampling.
        alpha: 1 minus the confidence level.

    Returns:
        The columns `CURVE_COLUMNS`, in the metric's own direction: ``fitted`` with its interval at
        every measured number of labelled patients; ``asymptote``, ``gain`` and ``exponent`` of the
        law, the first with the sign of the metric (for errors, the law falls to it); ``fit`` says
        why there is none. Inits with a single number of labelled patients have no curve.
    """
    table = checked(predictions)
    table = table[table["selected"]]
    rows = []
    for values, group in table.groupby(["task", "task_kind", "protocol", *INIT], sort=False):
        names: dict[str, Any] = dict(
            zip(["task", "task_kind", "protocol", *INIT], values, strict=True)
        )
        metric = metric_for(names["task_kind"], (metrics or {}).get(names["task"]))
        kept = shared_seeds(group)
        if kept["num_labelled_patients"].nunique() < 2:
            continue
        curve = curve_of(kept, metric, num_resamples, seed)
        num_patients = kept["patient_key"].nunique()
        shared = {**names, "metric": metric.name, "num_patients": num_patients}
        rows += [shared | row for row in _rows(curve, metric, num_patients, alpha)]
    return pd.DataFrame(rows, columns=CURVE_COLUMNS)


def _rows(curve: Curve, metric: Metric, num_patients: int, alpha: float) -> list[dict[str, Any]]:
    sign = 1.0 if metric.higher_is_better else -1.0
    shown = [
        {
            "num_labelled_patients": round(count),
            "value": sign * value,
            "num_seeds": curve.num_seeds,
            "fit": TOO_FEW,
        }
        for count, value in zip(curve.counts, curve.values, strict=True)
    ]
    if len(curve.counts) < _MIN_POINTS:
        return shown
    ceiling = 1.0 if metric.higher_is_better else 0.0
    law = fit_power_law(curve.counts, curve.values, ceiling)
    if law.gain <= 0:
        return [row | {"fit": FLAT} for row in shown]
    refits = [
        fit_power_law(curve.counts, sample, ceiling)
        for sample in defined(curve.samples)[:_NUM_REFITS]
    ]

    def interval(values: Array) -> tuple[float, float]:
        low, high = expanded_interval(values, num_patients, alpha)
        return (low, high) if sign > 0 else (-high, -low)

    at_points = np.array([refit.at(curve.counts) for refit in refits])
    asymptote = interval(np.array([refit.asymptote for refit in refits]))
    exponent = expanded_interval(
        np.array([refit.exponent for refit in refits]), num_patients, alpha
    )
    of_law = {
        "asymptote": sign * law.asymptote,
        "asymptote_low": asymptote[0],
        "asymptote_high": asymptote[1],
        "gain": law.gain,
        "exponent": law.exponent,
        "exponent_low": exponent[0],
        "exponent_high": exponent[1],
        "fit": FITTED,
    }
    for place, fitted in enumerate(law.at(curve.counts)):
        low, high = interval(at_points[:, place])
        shown[place] |= {"fitted": sign * fitted, "fitted_low": low, "fitted_high": high, **of_law}
    return shown
