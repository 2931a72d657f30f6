"""How well scores rank cases: areas under curves, under many weightings of the cases at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Area = Callable[[NDArray[np.bool_], Array, Array], Array]
"""(positive (N,), scores (N,), weights (R, N)) -> areas (R,)."""


def weighted_auc(positive: NDArray[np.bool_], scores: Array, weights: Array) -> Array:
    """Return the area under the ROC curve for each row of weights; nan without both answers.

    The probability that a positive case scores above a negative one, ties counted half.
    """
    positives, negatives = _by_score(positive, scores, weights)
    below = np.cumsum(negatives, axis=1) - negatives / 2
    pairs = positives.sum(axis=1) * negatives.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((positives * below).sum(axis=1) / pairs, dtype=np.float64)


def weighted_average_precision(positive: NDArray[np.bool_], scores: Array, weights: Array) -> Array:
    """Return the average precision for each row of weights; nan without both answers.

    The sum over all thresholds of the precision there times the recall gained, without
    interpolation. With positive cases alone it would be 1 whatever the scores, so it is nan.
    """
    positives, negatives = _by_score(positive, scores, weights)
    right = np.cumsum(positives[:, ::-1], axis=1)
    called = np.cumsum((positives + negatives)[:, ::-1], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(called > 0, right / called, 0.0)  # none drawn from so high a score
        area = (precision * positives[:, ::-1]).sum(axis=1) / positives.sum(axis=1)
    return np.where(negatives.sum(axis=1) > 0, area, np.nan)


def _by_score(positive: NDArray[np.bool_], scores: Array, weights: Array) -> tuple[Array, Array]:
    """Return the weight of positive and of negative cases at each score, ascending, (R, scores)."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) > 0])
    sorted_weights, sorted_positive = weights[:, order], positive[order]
    positives = np.add.reduceat(sorted_weights * sorted_positive, starts, axis=1)
    negatives = np.add.reduceat(sorted_weights * ~sorted_positive, starts, axis=1)
    return positives, negatives
