"""Resamples of patients, and a metric under each of them, seed by seed.

Patients are resampled, never scans or slices, because those of one patient are not independent.
All inits and seeds of a comparison see the same resamples, so that what makes a patient difficult
cancels out.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from medssl.evaluation.metrics import Array, Metric
from medssl.evaluation.statistics.cells import SeedCell

# Resamples handled at once: bounds memory at about 8 bytes x this x cases.
_CHUNK = 500
# An interval from fewer defined resamples (AUC needs both classes) would mislead.
MIN_DEFINED_SHARE = 0.5


def draw_resamples(generator: np.random.Generator, num_resamples: int, num_patients: int) -> Array:
    """Return how often each patient is drawn in each resample, shape (R, P)."""
    chances = np.full(num_patients, 1 / num_patients)
    return generator.multinomial(num_patients, chances, size=num_resamples).astype(float)


def measured(metric: Metric, seeds: list[SeedCell]) -> Array:
    """Return the metric of each seed, shape (S,)."""
    return np.array([metric.compute(cell.targets, cell.scores) for cell in seeds])


def resampled(metric: Metric, seeds: list[SeedCell], draws: Array) -> Array:
    """Return the metric of each resample of patients and each seed, shape (R, S)."""
    samples = np.empty((len(draws), len(seeds)))
    for place, cell in enumerate(seeds):
        for start in range(0, len(draws), _CHUNK):
            part = slice(start, start + _CHUNK)
            weights = draws[part][:, cell.patients]
            samples[part, place] = metric.resampled(cell.targets, cell.scores, weights)
    return samples


def defined(samples: Array) -> Array:
    """Return the resamples (R, ...) whose values are all finite."""
    known = np.isfinite(samples.reshape(len(samples), -1)).all(axis=1)
    return np.asarray(samples[known])


def expansion(num_patients: int) -> float:
    """Return by how much resampling so few patients makes them look too much alike."""
    return float(np.sqrt(num_patients / (num_patients - 1)))


def expanded_interval(samples: Array, num_patients: int, alpha: float) -> tuple[float, float]:
    """Return the expanded percentile interval of resamples (R,); nan where nothing can be said.

    A percentile interval widened for few patients.

    Source: Hesterberg 2015, What Teachers Should Know about the Bootstrap, section 3.3.
    """
    known = samples[np.isfinite(samples)]
    if num_patients < 2 or len(known) < MIN_DEFINED_SHARE * len(samples):
        return float("nan"), float("nan")
    tail = stats.norm.cdf(expansion(num_patients) * stats.t.ppf(alpha / 2, num_patients - 1))
    low, high = np.quantile(known, [tail, 1 - tail])
    return float(low), float(high)
