"""Metrics of downstream tasks, and the same metrics under many resamplings of the cases at once.

A resampling is a row of weights: how often each case was drawn. ``resampled`` gives the metric of
every row in one pass, which makes ten thousand bootstrap resamples affordable.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medssl.errors import ConfigError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """A number that says how good the predictions of a set of cases are.

    Attributes:
        name: as in result tables.
        higher_is_better: direction.
        compute: (targets (N,), scores (N, K)) -> value; nan where it is undefined.
        resampled: (targets (N,), scores (N, K), weights (R, N)) -> values (R,).
    """

    name: str
    higher_is_better: bool
    compute: Callable[[Array, Array], float]
    resampled: Callable[[Array, Array, Array], Array]


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


def _dice(targets: Array, scores: Array) -> float:
    return _over_all_cases(_dice_resampled, targets, scores)


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.asarray(np.nanmean(np.stack(recalls), axis=0), dtype=np.float64)


def _auc(targets: Array, scores: Array) -> float:
    from sklearn.metrics import roc_auc_score

    areas = [
        roc_auc_score(targets == label, scores[:, column])
        for column, label in _one_vs_rest(scores)
        if 0 < (targets == label).sum() < len(targets)
    ]
    return float(np.mean(areas)) if areas else float("nan")


def _auc_resampled(targets: Array, scores: Array, weights: Array) -> Array:
    areas = [
        _weighted_auc(targets == label, scores[:, column], weights)
        for column, label in _one_vs_rest(scores)
        if (targets == label).any()
    ]
    if not areas:
        return np.full(len(weights), np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.asarray(np.nanmean(np.stack(areas), axis=0), dtype=np.float64)


def _one_vs_rest(scores: Array) -> list[tuple[int, int]]:
    """Return the (column of scores, class) pairs of which the area is the mean."""
    num_columns = scores.shape[1]
    if num_columns <= 2:
        return [(num_columns - 1, 1)]
    return [(label, label) for label in range(num_columns)]


def _weighted_auc(positive: NDArray[np.bool_], scores: Array, weights: Array) -> Array:
    """Return the area under the ROC curve for each row of weights.

    The probability that a positive case scores above a negative one, ties counted half.
    """
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) > 0])
    sorted_weights, sorted_positive = weights[:, order], positive[order]
    positives = np.add.reduceat(sorted_weights * sorted_positive, starts, axis=1)
    negatives = np.add.reduceat(sorted_weights * ~sorted_positive, starts, axis=1)
    below = np.cumsum(negatives, axis=1) - negatives / 2
    pairs = positives.sum(axis=1) * negatives.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((positives * below).sum(axis=1) / pairs, dtype=np.float64)


def _weighted_mean(values: Array, weights: Array) -> Array:
    known = np.isfinite(values)
    total = weights[:, known].sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(weights[:, known] @ values[known] / total, dtype=np.float64)


def _over_all_cases(
    resampled: Callable[[Array, Array, Array], Array], targets: Array, scores: Array
) -> float:
    return float(resampled(targets, scores, np.ones((1, len(scores))))[0])


METRICS: dict[str, Metric] = {
    "dice": Metric("dice", True, _dice, _dice_resampled),
    "auc": Metric("auc", True, _auc, _auc_resampled),
    "accuracy": Metric("accuracy", True, _accuracy, _accuracy_resampled),
    "balanced_accuracy": Metric(
        "balanced_accuracy", True, _balanced_accuracy, _balanced_accuracy_resampled
    ),
}
DEFAULT_METRIC = {"classification": "auc", "segmentation": "dice"}
