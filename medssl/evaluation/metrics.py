"""Metrics of downstream tasks, as functions of targets and scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """A number that says how good the predictions of a set of cases are.

    Attributes:
        name: as in result tables.
        higher_is_better: direction.
        compute: (targets (N,), scores (N, K)) -> value.
    """

    name: str
    higher_is_better: bool
    compute: Callable[[Array, Array], float]


METRICS: dict[str, Metric] = {}
DEFAULT_METRIC = {"classification": "auc", "segmentation": "dice"}
