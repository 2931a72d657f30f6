"""Metrics of downstream tasks, and the same metrics under many resamplings of the cases at once.

A resampling is a row of weights: how often each case was drawn. ``resampled`` gives the metric of
every row in one pass, which makes ten thousand bootstrap resamples affordable.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from medssl.errors import ConfigError
from medssl.evaluation import agreement
from medssl.evaluation.ranking import Area, weighted_auc, weighted_average_precision

Array = NDArray[np.float64]
Compute = Callable[[Array, Array], float]
Resampled = Callable[[Array, Array, Array], Array]

SUCCESS_MM = 4.0
"""A landmark found within this distance counts as found (Wang et al. 2016 give 2, 2.5, 3, 4 mm)."""


@dataclass(frozen=True)
class Metric:
    """A number that says how good the predictions of a set of cases are.

    Attributes:
        name: as in result tables.
        higher_is_better: direction.
        compute: (targets (N,) or (N, T), scores (N, K)) -> value; nan where it is undefined.
        resampled: (targets, scores, weights (R, N)) -> values (R,).

    Targets have two axes where a case has several known answers: labels (1, 0, or NaN where
    unknown) or numbers.
    """

    name: str
    higher_is_better: bool
    compute: Compute
    resampled: Resampled


def metric_for(task_kind: str, name: str | None = None) -> Metric:
    """Return a metric by name, or the usual one of a kind of task.

    Raises:
        ConfigError: there is no such metric, or the kind has no usual one.
    """
    name = name or DEFAULT_METRIC.get(task_kind, "")
    if name not in METRICS:
        raise ConfigError(
            f"there is no metric {name!r} for tasks of kind {task_kind!r}. "
            f"There are: {', '.join(sorted(METRICS))}."
        )
    return METRICS[name]


def case_dice(scores: Array) -> Array:
    """Return the mean Dice of each case over its foreground classes, shape (N,).

    A class that the case's label lacks has the Dice nan and does not count.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a case without any class: nan
        return np.asarray(np.nanmean(scores, axis=1), dtype=np.float64)


def _dice_resampled(targets: Array, scores: Array, weights: Array) -> Array:
    del targets
    return _weighted_mean(case_dice(scores), weights)


def _accuracy(targets: Array, scores: Array) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(targets, scores.argmax(axis=1)))


def _accuracy_resampled(targets: Array, scores: Array, weights: Array) -> Array:
    return _weighted_mean((scores.argmax(axis=1) == targets).astype(float), weights)


def _balanced_accuracy(targets: Array, scores: Array) -> float:
    from sklearn.metrics import recall_score

    # Over the classes that occur among the targets, as balanced accuracy is defined.
    classes = np.unique(targets)
    guesses = scores.argmax(axis=1)
    return float(recall_score(targets, guesses, labels=classes, average="macro"))


def _balanced_accuracy_resampled(targets: Array, scores: Array, weights: Array) -> Array:
    right = (scores.argmax(axis=1) == targets).astype(float)
    recalls = [
        _weighted_mean(right[targets == label], weights[:, targets == label])
        for label in np.unique(targets)
    ]
    return _mean_where_defined(recalls, len(weights))


def _auc(targets: Array, scores: Array) -> float:
    from sklearn.metrics import roc_auc_score

    areas = [
        roc_auc_score(targets == label, scores[:, column])
        for column, label in _one_vs_rest(scores)
        if 0 < (targets == label).sum() < len(targets)
    ]
    return float(np.mean(areas)) if areas else float("nan")


def _auc_resampled(targets: Array, scores: Array, weights: Array) -> Array:
    return _mean_over_classes(weighted_auc, targets, scores, weights)


def _average_precision_resampled(targets: Array, scores: Array, weights: Array) -> Array:
    return _mean_over_classes(weighted_average_precision, targets, scores, weights)


def _mean_over_classes(area: Area, targets: Array, scores: Array, weights: Array) -> Array:
    """Return the mean of an area over the classes, each against the rest."""
    return _mean_where_defined(
        [
            area(targets == label, scores[:, column], weights)
            for column, label in _one_vs_rest(scores)
            if (targets == label).any()
        ],
        len(weights),
    )


def _one_vs_rest(scores: Array) -> list[tuple[int, int]]:
    """Return the (column of scores, class) pairs of which the area is the mean."""
    num_columns = scores.shape[1]
    if num_columns <= 2:
        return [(num_columns - 1, 1)]
    return [(label, label) for label in range(num_columns)]


def _mean_where_defined(values: Sequence[Array], num_rows: int) -> Array:
    """Return the mean over several values of each row, those that are not nan; (R,)."""
    if not values:
        return np.full(num_rows, np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a row without any: nan
        return np.asarray(np.nanmean(np.stack(values), axis=0), dtype=np.float64)


def _weighted_mean(values: Array, weights: Array) -> Array:
    known = np.isfinite(values)
    total = weights[:, known].sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(weights[:, known] @ values[known] / total, dtype=np.float64)


def _over_all_cases(resampled: Resampled, targets: Array, scores: Array) -> float:
    return float(resampled(targets, scores, np.ones((1, len(scores))))[0])


def _labels_resampled(area: Area, targets: Array, scores: Array, weights: Array) -> Array:
    """Return the mean of an area over labels, each over the cases where it is known."""
    labels = targets.reshape(len(scores), -1)
    found = []
    for label, column in zip(labels.T, scores.T, strict=True):
        known = np.isfinite(label)
        if known.any():
            found.append(area(label[known] == 1, column[known], weights[:, known]))
    return _mean_where_defined(found, len(weights))


def _numbers_resampled(agree: Resampled, targets: Array, scores: Array, weights: Array) -> Array:
    return agree(targets.reshape(-1), scores[:, 0], weights)


def _metric(name: str, higher_is_better: bool, resampled: Resampled) -> Metric:
    """Return a metric of which one pass over all cases is a resampling with equal weights."""
    return Metric(name, higher_is_better, partial(_over_all_cases, resampled), resampled)


def _radial_error_resampled(targets: Array, scores: Array, weights: Array) -> Array:
    """Return the mean over cases of the mean distance over the landmarks known in each."""
    del targets
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a case without any landmark: nan
        return _weighted_mean(np.nanmean(scores, axis=1), weights)


def _success_rate_resampled(targets: Array, scores: Array, weights: Array) -> Array:
    """Return the share of all known landmarks that were found within `SUCCESS_MM`."""
    del targets
    with np.errstate(divide="ignore", invalid="ignore"):
        found = weights @ (scores <= SUCCESS_MM).sum(axis=1)
        return np.asarray(found / (weights @ np.isfinite(scores).sum(axis=1)), dtype=np.float64)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        _metric("dice", True, _dice_resampled),
        Metric("auc", True, _auc, _auc_resampled),
        _metric("average_precision", True, _average_precision_resampled),
        Metric("accuracy", True, _accuracy, _accuracy_resampled),
        Metric("balanced_accuracy", True, _balanced_accuracy, _balanced_accuracy_resampled),
        _metric("mean_auc", True, partial(_labels_resampled, weighted_auc)),
        _metric(
            "mean_average_precision", True, partial(_labels_resampled, weighted_average_precision)
        ),
        _metric("mae", False, partial(_numbers_resampled, agreement.mean_absolute_error)),
        _metric("rmse", False, partial(_numbers_resampled, agreement.root_mean_squared_error)),
        _metric("r2", True, partial(_numbers_resampled, agreement.coefficient_of_determination)),
        _metric("pearson", True, partial(_numbers_resampled, agreement.pearson_correlation)),
        _metric("radial_error_mm", False, _radial_error_resampled),
        _metric("success_rate_4mm", True, _success_rate_resampled),
    )
}
DEFAULT_METRIC = {
    "classification": "auc",
    "landmarks": "radial_error_mm",
    "multilabel": "mean_auc",
    "regression": "mae",
    "segmentation": "dice",
}
