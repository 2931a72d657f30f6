"""Estimates with intervals, and paired comparisons of inits, by patient.

Patients are resampled, never scans or slices, because those of one patient are not independent.
All inits and seeds of a comparison see the same resamples, so that what makes a patient difficult
cancels out. Per resample the metric is averaged over seeds first. Intervals are percentile
intervals widened for few patients ("expanded percentile": Hesterberg 2015, What Teachers Should
Know about the Bootstrap, section 3.3); the p value is the level at which that interval touches 0;
Holm's correction runs over all comparisons of one task.

The intervals speak about other patients, not about other training runs: the range over seeds stands
beside them in columns of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from medssl.errors import DataError
from medssl.evaluation.metrics import Array, Metric, metric_for
from medssl.randomness import numpy_generator

log = logging.getLogger(__name__)

BETTER, WORSE, NO_DIFFERENCE = "better", "worse", "no difference shown"
REQUIRED_COLUMNS = (
    "init", "pretext", "backbone", "task", "task_kind", "protocol", "layer", "selected",
    "label_fraction", "num_labelled_patients", "seed", "patient_key", "scan_key", "target",
    "scores",
)  # fmt: skip
# Resamples handled at once: bounds memory at about 8 bytes x this x cases.
_CHUNK = 500
# An interval from fewer defined resamples (AUC needs both classes) would mislead.
_MIN_DEFINED_SHARE = 0.5

# Fewer resamples than this beyond 0 do not measure a tail.
_COUNTABLE = 10

_CELL = ["task", "task_kind", "protocol", "label_fraction"]
_INIT = ["init", "pretext", "backbone"]


@dataclass(frozen=True)
class _Seed:
    """Predictions of one cell."""

    patients: np.ndarray  # position of each case's patient
    targets: Array
    scores: Array


@dataclass(frozen=True)
class _Pair:
    """The cells of an init and of its reference, tested on the same cases."""

    theirs: list[_Seed]
    ours: list[_Seed]
    num_patients: int
    num_labelled: int


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
        ci_low, ci_high, seed_low, seed_high, num_seeds, num_patients, num_cases``. ``value`` is the
        mean over seeds. A row with ``selected`` True is the cell's verdict (for a probe: the layer
        chosen on validation, whose name it carries); rows with ``selected`` False are the probe's
        single layers.

    Raises:
        DataError: columns are missing, or the table is empty.
    """
    table = _checked(predictions)
    rows = []
    for values, group in table.groupby([*_CELL, *_INIT], sort=False):
        names: dict[str, Any] = dict(zip([*_CELL, *_INIT], values, strict=True))
        metric = metric_for(names["task_kind"], (metrics or {}).get(names["task"]))
        for layer, selected, part in _layers(group):
            patients = np.unique(part["patient_key"])
            seeds = _by_seed(part, patients)
            single = np.array([metric.compute(cell.targets, cell.scores) for cell in seeds])
            generator = numpy_generator(seed, "estimate", *map(str, names.values()), layer)
            samples = _resample(
                metric, seeds, draw_resamples(generator, num_resamples, len(patients))
            )
            low, high = expanded_interval(samples, len(patients), alpha)
            rows.append(
                {
                    **names,
                    "layer": layer,
                    "selected": selected,
                    "num_labelled_patients": round(part["num_labelled_patients"].mean()),
                    "metric": metric.name,
                    "value": single.mean(),
                    "ci_low": low,
                    "ci_high": high,
                    "seed_low": single.min(),
                    "seed_high": single.max(),
                    "num_seeds": len(seeds),
                    "num_patients": len(patients),
                    "num_cases": len(seeds[0].targets),
                }
            )
    return pd.DataFrame(rows)[
        [
            *_INIT, "task", "task_kind", "protocol", "layer", "selected", "label_fraction",
            "num_labelled_patients", "metric", "value", "ci_low", "ci_high", "seed_low",
            "seed_high", "num_seeds", "num_patients", "num_cases",
        ]
    ]  # fmt: skip


def compare(
    predictions: pd.DataFrame,
    metrics: Mapping[str, str] | None = None,
    *,
    reference: str = "imagenet",
    num_resamples: int = 10_000,
    seed: int = 0,
    alpha: float = 0.05,
) -> pd.DataFrame:
    """Return the comparisons table (written as ``comparisons.csv``): every init against one.

    Args:
        predictions: one row per cell and test case; only rows with ``selected`` are compared.
        metrics: metric of each task; default: by the kind of the task.
        reference: the init that the others are compared with.
        num_resamples: bootstrap resamples of patients.
        seed: of the resampling.
        alpha: 1 minus the confidence level; also the level of the verdict, after Holm.

    Returns:
        ``init, pretext, reference, backbone, task, task_kind, protocol, label_fraction,
        num_labelled_patients, metric, value, reference_value, effect, ci_low, ci_high, p_value,
        p_holm, verdict, num_patients, num_cases, num_seeds, seed_effect_low, seed_effect_high``;
        ``verdict`` is ``better``, ``no difference shown`` or ``worse``; a positive ``effect`` is
        better than the reference. Seeds that only one of the two has run are left out.

        Without the reference among the inits the table has no rows, and the log says so.

    Raises:
        DataError: two inits were not tested on the same cases, or do not share the backbone.
    """
    table = _checked(predictions)
    table = table[table["selected"]]
    if reference not in set(table["init"]):
        log.warning(
            "The reference init %r is not among the results (%s), so nothing is compared. "
            "Run it too, or choose another reference.",
            reference,
            ", ".join(sorted(set(table["init"]))),
        )
    rows = []
    for values, group in table.groupby(_CELL, sort=False):
        names: dict[str, Any] = dict(zip(_CELL, values, strict=True))
        metric = metric_for(names["task_kind"], (metrics or {}).get(names["task"]))
        ours = group[group["init"] == reference]
        for init_values, theirs in group[group["init"] != reference].groupby(_INIT, sort=False):
            if len(ours):
                who: dict[str, Any] = dict(zip(_INIT, init_values, strict=True))
                pair = _paired(theirs, ours, f"{names['task']}, {names['protocol']}")
                generator = numpy_generator(seed, "compare", *map(str, names.values()))
                row = _compare_pair(metric, pair, generator, num_resamples, alpha)
                rows.append({**who, **names, "reference": reference, **row})
    if not rows:
        return pd.DataFrame(columns=_COMPARISON_COLUMNS)
    result = pd.DataFrame(rows)
    result["p_holm"] = result.groupby("task")["p_value"].transform(holm)
    result["verdict"] = [
        _verdict(effect, p_value, alpha)
        for effect, p_value in zip(result["effect"], result["p_holm"], strict=True)
    ]
    return result[_COMPARISON_COLUMNS]


_COMPARISON_COLUMNS = [
    "init", "pretext", "reference", "backbone", "task", "task_kind", "protocol", "label_fraction",
    "num_labelled_patients", "metric", "value", "reference_value", "effect", "ci_low", "ci_high",
    "p_value", "p_holm", "verdict", "num_patients", "num_cases", "num_seeds", "seed_effect_low",
    "seed_effect_high",
]  # fmt: skip


def holm(p_values: pd.Series) -> pd.Series:
    """Return p values corrected by Holm's step-down method; nan stays nan and does not count.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    known = p_values.dropna().sort_values()
    factors = len(known) - np.arange(len(known))
    corrected = np.minimum(np.maximum.accumulate(known.to_numpy() * factors), 1.0)
    return pd.Series(corrected, index=known.index, dtype=float).reindex(p_values.index)


def _compare_pair(
    metric: Metric,
    pair: _Pair,
    generator: np.random.Generator,
    num_resamples: int,
    alpha: float,
) -> dict[str, object]:
    sign = 1.0 if metric.higher_is_better else -1.0
    value = np.array([metric.compute(cell.targets, cell.scores) for cell in pair.theirs])
    base = np.array([metric.compute(cell.targets, cell.scores) for cell in pair.ours])
    draws = draw_resamples(generator, num_resamples, pair.num_patients)
    samples = sign * (_resample(metric, pair.theirs, draws) - _resample(metric, pair.ours, draws))
    low, high = expanded_interval(samples, pair.num_patients, alpha)
    effects = sign * (value - base)
    return {
        "num_labelled_patients": pair.num_labelled,
        "metric": metric.name,
        "value": value.mean(),
        "reference_value": base.mean(),
        "effect": effects.mean(),
        "ci_low": low,
        "ci_high": high,
        "p_value": _p_value(samples, pair.num_patients),
        "num_patients": pair.num_patients,
        "num_cases": len(pair.ours[0].targets),
        "num_seeds": len(pair.ours),
        "seed_effect_low": effects.min(),
        "seed_effect_high": effects.max(),
    }


def _paired(theirs: pd.DataFrame, reference: pd.DataFrame, where: str) -> _Pair:
    """Return the cells of two inits, checked to be of the same backbone, seeds and cases."""
    name, other = theirs["init"].iloc[0], reference["init"].iloc[0]
    backbone = theirs["backbone"].iloc[0]
    ours = reference[reference["backbone"] == backbone]
    if ours.empty:
        raise DataError(
            f"{where}: {name!r} has the backbone {backbone} and {other!r} has "
            f"{', '.join(sorted(set(reference['backbone'])))}, so a difference would not be due "
            "to the weights. Compare inits of one backbone."
        )
    shared = sorted(set(theirs["seed"]) & set(ours["seed"]))
    if not shared:
        raise DataError(
            f"{where}: {name!r} and {other!r} have no seed in common. Run both with the same seeds."
        )
    theirs, ours = theirs[theirs["seed"].isin(shared)], ours[ours["seed"].isin(shared)]
    for seed in shared:
        _check_same_cases(
            theirs[theirs["seed"] == seed],
            ours[ours["seed"] == seed],
            f"{where}, seed {seed}: {name!r} and {other!r}",
        )
    patients = np.unique(ours["patient_key"])
    num_labelled = round(ours["num_labelled_patients"].mean())
    return _Pair(_by_seed(theirs, patients), _by_seed(ours, patients), len(patients), num_labelled)


def _check_same_cases(theirs: pd.DataFrame, ours: pd.DataFrame, who: str) -> None:
    counts, wanted = _cases(theirs).value_counts(), _cases(ours).value_counts()
    different = counts.sub(wanted, fill_value=0).abs().sum()
    if different:
        raise DataError(
            f"{who} were not tested on the same cases ({len(theirs)} against {len(ours)}, "
            f"{int(different)} in only one of them or with another target). A difference would "
            "mix weights with patients. Start the transfer again with --resume, or in a new folder."
        )


def _cases(rows: pd.DataFrame) -> pd.Series[str]:
    """Return who was tested with what known answer, one text a row."""
    keys = ["patient_key", "scan_key", "target", *(["targets"] if "targets" in rows else [])]
    return rows[keys].map(str).agg("|".join, axis=1)


def _targets(rows: pd.DataFrame) -> Array:
    """Return the known answers, (N,) or (N, T) where a case has several."""
    if "targets" in rows:
        several = [np.asarray(known, dtype=float) for known in rows["targets"]]
        if len(several[0]) > 1:
            return np.stack(several)
    return rows["target"].to_numpy(dtype=float)


def _checked(predictions: pd.DataFrame) -> pd.DataFrame:
    missing = [name for name in REQUIRED_COLUMNS if name not in predictions.columns]
    if missing:
        raise DataError(f"the predictions lack the columns {', '.join(missing)}.")
    if predictions.empty:
        raise DataError("there are no predictions yet. Run the transfer first.")
    table = predictions.copy()
    for name in ("pretext", "layer"):
        table[name] = table[name].astype(object).fillna("")
    table["selected"] = table["selected"].astype(bool)
    return table


def _layers(group: pd.DataFrame) -> Iterator[tuple[str, bool, pd.DataFrame]]:
    """Yield the selected predictions of a cell, then those of each of its layers."""
    chosen = group[group["selected"]]
    if len(chosen):
        yield "|".join(sorted(set(chosen["layer"]))), True, chosen
    for layer, part in group.groupby("layer", sort=False):
        if layer:
            yield str(layer), False, part


def _by_seed(part: pd.DataFrame, patients: np.ndarray) -> list[_Seed]:
    cells = []
    for _, rows in part.groupby("seed"):
        lengths = {len(scores) for scores in rows["scores"]}
        if len(lengths) != 1:
            raise DataError(
                f"task {rows['task'].iloc[0]}: its predictions have {sorted(lengths)} scores a "
                "case; all must have as many as there are classes."
            )
        cells.append(
            _Seed(
                np.searchsorted(patients, rows["patient_key"].to_numpy()),
                _targets(rows),
                np.stack([np.asarray(scores, dtype=float) for scores in rows["scores"]]),
            )
        )
    return cells


def draw_resamples(generator: np.random.Generator, num_resamples: int, num_patients: int) -> Array:
    """Return how often each patient is drawn in each resample, shape (R, P)."""
    chances = np.full(num_patients, 1 / num_patients)
    return generator.multinomial(num_patients, chances, size=num_resamples).astype(float)


def _resample(metric: Metric, seeds: list[_Seed], draws: Array) -> Array:
    """Return the metric, averaged over seeds, of each resample of patients, shape (R,)."""
    total = np.zeros(len(draws))
    for cell in seeds:
        for start in range(0, len(draws), _CHUNK):
            part = slice(start, start + _CHUNK)
            weights = draws[part][:, cell.patients]
            total[part] += metric.resampled(cell.targets, cell.scores, weights)
    return total / len(seeds)


def expanded_interval(samples: Array, num_patients: int, alpha: float) -> tuple[float, float]:
    """Return the expanded percentile interval; nan where nothing can be said."""
    defined = samples[np.isfinite(samples)]
    if num_patients < 2 or len(defined) < _MIN_DEFINED_SHARE * len(samples):
        return float("nan"), float("nan")
    widening = np.sqrt(num_patients / (num_patients - 1))
    tail = stats.norm.cdf(widening * stats.t.ppf(alpha / 2, num_patients - 1))
    low, high = np.quantile(defined, [tail, 1 - tail])
    return float(low), float(high)


def _p_value(samples: Array, num_patients: int) -> float:
    """Return the two-sided level at which the interval of `expanded_interval` just touches 0."""
    defined = samples[np.isfinite(samples)]
    if num_patients < 2 or len(defined) < _MIN_DEFINED_SHARE * len(samples):
        return float("nan")
    beyond = min((defined <= 0).sum(), (defined >= 0).sum())
    tail = min((1 + beyond) / (1 + len(defined)), 0.5)
    spread = defined.std()
    if beyond < _COUNTABLE and spread > 0:
        # Beyond what counting resolves, the tail of the normal distribution: else the number of
        # resamples, not the data, would bound p from below and Holm could never be passed.
        tail = min(tail, float(stats.norm.sf(abs(defined.mean()) / spread)))
    narrowing = np.sqrt((num_patients - 1) / num_patients)
    return float(2 * stats.t.cdf(stats.norm.ppf(tail) * narrowing, num_patients - 1))


def _verdict(effect: float, p_value: float, alpha: float) -> str:
    if not p_value < alpha:  # nan included
        return NO_DIFFERENCE
    return BETTER if effect > 0 else WORSE
