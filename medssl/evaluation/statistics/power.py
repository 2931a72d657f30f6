"""How many test patients a difference needs to be shown, from the spread that a study measured.

For planning the next study. The chance that this one had of showing what it did show is no more
than its p value in other words (Hoenig and Heisey 2001, The abuse of power), and is not given.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from medssl.evaluation.statistics.intervals import Spread

POWER = 0.8
# More patients than this is for a reader the same as no number of them.
MAX_PATIENTS = 1_000_000
MORE_RUNS = "more runs needed"

_KEYS = [
    "init", "pretext", "reference", "backbone", "task", "task_kind", "protocol", "label_fraction",
    "num_labelled_patients", "metric", "num_patients", "num_seeds", "ci_over", "effect", "margin",
]  # fmt: skip
POWER_COLUMNS = [
    *_KEYS, "level", "power", "detectable_effect", "patients_for_effect", "patients_for_margin",
    "limit_for_effect", "limit_for_margin",
]  # fmt: skip


def power_of(
    effect: float, spread: Spread, num_patients: int, num_seeds: int, level: float
) -> float:
    """Return the chance that a two-sided test at a level shows a true effect.

    Source: noncentral t, with the degrees of freedom of the interval (`Spread.freedom`).
    """
    variance = spread.variance(num_patients, num_seeds)
    if variance <= 0:
        return 1.0 if effect else level
    freedom = spread.freedom(num_patients, num_seeds)
    shift = abs(effect) / np.sqrt(variance)
    limit = spread.reach(num_patients, num_seeds, level) / np.sqrt(variance)
    chance = stats.nct.sf(limit, freedom, shift)
    # Far in the tail the noncentral t of scipy is not defined; there it is as good as certain.
    return float(chance) if np.isfinite(chance) else float(shift > limit)


def patients_needed(
    effect: float, spread: Spread, num_seeds: int, level: float, chance: float = POWER
) -> float:
    """Return the fewest test patients with which an effect is shown with a chance.

    Returns:
        At least 3; ``inf`` where no number of patients is enough, as so few runs differ too much.
    """
    if not (np.isfinite(effect) and effect and np.isfinite(spread.patient_sd)):
        return float("nan") if not np.isfinite(effect) else float("inf")
    low, high = 2, 3
    while power_of(effect, spread, high, num_seeds, level) < chance:
        if high >= MAX_PATIENTS:
            return float("inf")
        low, high = high, min(2 * high, MAX_PATIENTS)
    while high - low > 1:
        middle = (low + high) // 2
        if power_of(effect, spread, middle, num_seeds, level) < chance:
            low = middle
        else:
            high = middle
    return float(high)


def detectable_effect(
    spread: Spread, num_patients: int, num_seeds: int, level: float, chance: float = POWER
) -> float:
    """Return the smallest effect that so many patients and seeds show with a chance."""
    deviation = np.sqrt(spread.variance(num_patients, num_seeds))
    if not deviation > 0:
        return 0.0 if deviation == 0 else float("nan")
    low, high = 0.0, spread.reach(num_patients, num_seeds, level)
    while power_of(high, spread, num_patients, num_seeds, level) < chance:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        if power_of(middle, spread, num_patients, num_seeds, level) < chance:
            low = middle
        else:
            high = middle
    return float(high)


def power(comparisons: pd.DataFrame, *, alpha: float = 0.05, chance: float = POWER) -> pd.DataFrame:
    """Return how many test patients are needed (written as ``power.csv``).

    Args:
        comparisons: the table of `compare`.
        alpha: family-wise error, of which each comparison gets its share in advance (Bonferroni).
        chance: with which a true difference is to be shown.

    Returns:
        The columns `POWER_COLUMNS`: ``detectable_effect`` is what this study would show with the
        chance ``power`` at the corrected ``level``; ``patients_for_effect`` is for a true
        difference as large as the observed one, ``patients_for_margin`` for one of the margin, or
        as well for showing an init of equal worth to be not worse. They take as many seeds as the
        study had; where no number of patients would do, they are empty and ``limit_...`` says
        "more runs needed".
    """
    rows = []
    for _, comparison in comparisons.iterrows():
        row: dict[str, Any] = {name: comparison[name] for name in _KEYS}
        spread = Spread(*(comparison[f"{part}_sd"] for part in ("patient", "interaction", "run")))
        num_seeds, level = int(row["num_seeds"]), alpha / max(int(comparison["family_size"]), 1)
        row |= {"level": level, "power": chance}
        row["detectable_effect"] = detectable_effect(
            spread, int(row["num_patients"]), num_seeds, level, chance
        )
        for name, effect in (("effect", row["effect"]), ("margin", row["margin"])):
            count = patients_needed(float(effect), spread, num_seeds, level, chance)
            row[f"patients_for_{name}"] = count if np.isfinite(count) else np.nan
            row[f"limit_for_{name}"] = _limit(count, float(effect), spread)
        rows.append(row)
    return pd.DataFrame(rows, columns=POWER_COLUMNS)


def _limit(count: float, effect: float, spread: Spread) -> str:
    """Say why there is no number of patients."""
    if np.isfinite(count):
        return ""
    if not np.isfinite(effect) or not np.isfinite(spread.patient_sd):
        return "not known"
    return MORE_RUNS if spread.run_sd > 0 and effect else "no difference seen"
