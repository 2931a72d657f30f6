"""Verdicts over a family of comparisons: better, not worse, no difference shown, worse.

The family is all comparisons with the reference of one task: every init, protocol and number of
labelled patients. Difference comes first, by Holm's step-down method. What is then left without a
difference is tested against the margin, at the level that Holm had come to: alpha divided by the
number of comparisons left.

That order keeps the family-wise error. To be better than the reference implies to be no more than a
margin worse, so the two errors of one comparison are one (Morikawa and Yoshida 1995), and a
comparison that was shown to differ makes no further claim. Before the first wrong claim, therefore,
as many comparisons are left as can still go wrong, and each is tested at alpha over their number, a
half on either side (Shaffer 1986, Modified sequentially rejective multiple test procedures).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

BETTER, WORSE = "better", "worse"
NOT_WORSE, NO_DIFFERENCE = "not worse", "no difference shown"

# How much worse counts as no worse, in units of the metric; none for metrics whose unit depends on
# the task. 0.05 of area is what reader studies of devices commonly use (Chen, Petrick and Sahiner
# 2012); the others are conventions, which a study should replace by what its readers care about.
USUAL_MARGINS: dict[str, float] = {
    "accuracy": 0.05,
    "auc": 0.05,
    "average_precision": 0.05,
    "balanced_accuracy": 0.05,
    "dice": 0.02,
    "mean_auc": 0.05,
    "mean_average_precision": 0.05,
}

Margin = Mapping[str, float] | float | None


@dataclass(frozen=True)
class Judgement:
    """What is said of one comparison.

    Attributes:
        p_holm: of a difference, corrected by Holm.
        p_not_worse: of being no more than the margin worse, corrected; nan without a margin.
        verdict: better, not worse, no difference shown, worse.
        level: at which it was decided: alpha over the comparisons then left. The interval of that
            level tells the verdict: it excludes 0 where a difference is shown, and lies above the
            margin where the verdict is not worse.
    """

    p_holm: float
    p_not_worse: float
    verdict: str
    level: float


def margin_of(metric: str, margin: Margin) -> float:
    """Return the margin of a metric; nan where none is tested."""
    if isinstance(margin, Mapping):
        return float(margin.get(metric, np.nan))
    return float("nan") if margin is None else float(margin)


def judge(
    effects: pd.Series, p_values: pd.Series, p_margins: pd.Series, alpha: float
) -> list[Judgement]:
    """Return the judgements of one family.

    Args:
        effects: differences from the reference, positive where better.
        p_values: two-sided, of no difference; nan where nothing can be said.
        p_margins: two-sided level at which an interval touches the margin from above, 1 where the
            effect lies below it, nan without a margin.
        alpha: family-wise error.
    """
    corrected = holm(p_values).to_numpy()
    ranks = p_values.rank(method="first").to_numpy()
    num_known = int(p_values.notna().sum())
    shown = corrected < alpha
    num_left = num_known - int(shown.sum())
    found = []
    for effect, p_holm, rank, is_shown, p_margin in zip(
        effects, corrected, ranks, shown, p_margins, strict=True
    ):
        if not np.isfinite(p_holm):
            found.append(Judgement(np.nan, np.nan, NO_DIFFERENCE, np.nan))
            continue
        left = num_known - rank + 1 if is_shown else num_left
        p_not_worse = min(left * p_margin, 1.0) if np.isfinite(p_margin) else np.nan
        if is_shown:
            verdict = BETTER if effect > 0 else WORSE
        else:
            verdict = NOT_WORSE if p_not_worse < alpha else NO_DIFFERENCE
        found.append(Judgement(p_holm, p_not_worse, verdict, float(alpha / left)))
    return found


def holm(p_values: pd.Series) -> pd.Series:
    """Return p values corrected by Holm's step-down method; nan stays nan and does not count.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    known = p_values.dropna().sort_values(kind="stable")
    factors = len(known) - np.arange(len(known))
    corrected = np.minimum(np.maximum.accumulate(known.to_numpy() * factors), 1.0)
    return pd.Series(corrected, index=known.index, dtype=float).reindex(p_values.index)
