"""How near numbers come to the truth, under many weightings of the cases at once.

Each function takes true numbers (N,), given numbers (N,) and weights (R, N), and returns (R,).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def mean_absolute_error(true: Array, given: Array, weights: Array) -> Array:
    """Return the mean absolute difference."""
    return _mean(np.abs(given - true), weights)


def root_mean_squared_error(true: Array, given: Array, weights: Array) -> Array:
    """Return the root of the mean squared difference."""
    return np.asarray(np.sqrt(_mean((given - true) ** 2, weights)), dtype=np.float64)


def coefficient_of_determination(true: Array, given: Array, weights: Array) -> Array:
    """Return R²: 1 is perfect, 0 is the mean of the true numbers; nan where these are all equal."""
    # Around their overall mean, so that squares of large numbers do not cancel.
    centred = true - true.mean()
    spread = _mean(centred**2, weights) - _mean(centred, weights) ** 2
    return 1 - _divided(_mean((given - true) ** 2, weights), spread, centred)


def pearson_correlation(true: Array, given: Array, weights: Array) -> Array:
    """Return Pearson's correlation; nan where either side is constant."""
    x, y = true - true.mean(), given - given.mean()
    mean_x, mean_y = _mean(x, weights), _mean(y, weights)
    together = _mean(x * y, weights) - mean_x * mean_y
    spread_x = _mean(x**2, weights) - mean_x**2
    spread_y = _mean(y**2, weights) - mean_y**2
    with np.errstate(invalid="ignore"):
        part = _divided(together, np.sqrt(np.maximum(spread_x, 0)), x)
        return _divided(part, np.sqrt(np.maximum(spread_y, 0)), y)


def _mean(values: Array, weights: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(weights @ values / weights.sum(axis=1), dtype=np.float64)


def _divided(above: Array, below: Array, of: Array) -> Array:
    """Divide; nan where ``below`` is no more than rounding leaves of a constant."""
    smallest = np.finfo(np.float64).eps * 16 * max(1e-300, float(np.square(of).max(initial=0.0)))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below > smallest, above / below, np.nan)
