"""Estimates with intervals, and paired comparisons of inits, by patient."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd


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
        chosen on validation); rows with ``selected`` False are the probe's single layers.
    """
    raise NotImplementedError


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

    Returns:
        ``init, reference, backbone, task, task_kind, protocol, label_fraction,
        num_labelled_patients, metric, value, reference_value, effect, ci_low, ci_high, p_value,
        p_holm, verdict, num_patients, num_cases, num_seeds, seed_effect_low, seed_effect_high``;
        ``verdict`` is ``better``, ``no difference shown`` or ``worse``; ``effect`` is signed so
        that positive means better than the reference.

    Raises:
        DataError: the reference is absent, or two inits were not tested on the same cases.
    """
    raise NotImplementedError
