"""The comparisons table: every init against the reference, paired, with a verdict."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from medssl.evaluation.metrics import Metric, metric_for
from medssl.evaluation.statistics.cells import CELL, INIT, Pair, checked, paired
from medssl.evaluation.statistics.families import USUAL_MARGINS, Margin, judge, margin_of
from medssl.evaluation.statistics.intervals import Uncertain, uncertain
from medssl.evaluation.statistics.resampling import draw_resamples, measured, resampled
from medssl.randomness import numpy_generator

log = logging.getLogger(__name__)

COMPARISON_COLUMNS = [
    "init", "pretext", "reference", "backbone", "task", "task_kind", "protocol", "label_fraction",
    "num_labelled_patients", "metric", "value", "reference_value", "effect", "ci_low", "ci_high",
    "ci_over", "p_value", "p_holm", "margin", "p_not_worse", "verdict", "verdict_level",
    "verdict_low", "verdict_high", "family_size", "num_patients", "num_cases", "num_seeds",
    "seed_effect_low", "seed_effect_high", "patient_sd", "interaction_sd", "run_sd",
]  # fmt: skip


def compare(
    predictions: pd.DataFrame,
    metrics: Mapping[str, str] | None = None,
    *,
    reference: str = "imagenet",
    margin: Margin = USUAL_MARGINS,
    num_resamples: int = 10_000,
    seed: int = 0,
    alpha: float = 0.05,
) -> pd.DataFrame:
    """Return the comparisons table (written as ``comparisons.csv``): every init against one.

    Args:
        predictions: one row per cell and test case; only rows with ``selected`` are compared.
        metrics: metric of each task; default: by the kind of the task.
        reference: the init that the others are compared with.
        margin: how much worse still counts as not worse, in units of the metric: by the metric's
            name, or one number for all, or None, and nothing is called not worse.
        num_resamples: bootstrap resamples of patients.
        seed: of the resampling.
        alpha: 1 minus the confidence level; also the family-wise error of the verdicts of a task.

    Returns:
        One row per comparison, the columns `COMPARISON_COLUMNS`. A positive ``effect`` is better
        than the reference, whatever the direction of the metric. ``ci_low, ci_high`` is the
        interval of the level ``1 - alpha`` of this comparison alone; ``verdict_low, verdict_high``
        is that of the level ``1 - verdict_level``, at which the ``verdict`` was reached (`judge`).
        ``ci_over`` says whether they speak about other patients alone (one seed) or also about
        other training runs; ``patient_sd, interaction_sd, run_sd`` what they are made of
        (`Spread`). Seeds that only one of the two has run are left out.

        Without the reference among the inits the table has no rows, and the log says so.

    Raises:
        DataError: two inits were not tested on the same cases, or do not share the backbone.
    """
    table = checked(predictions)
    table = table[table["selected"]]
    if reference not in set(table["init"]):
        log.warning(
            "The reference init %r is not among the results (%s), so nothing is compared. "
            "Run it too, or choose another reference.",
            reference,
            ", ".join(sorted(set(table["init"]))),
        )
    rows, effects = [], []
    for values, group in table.groupby(CELL, sort=False):
        names: dict[str, Any] = dict(zip(CELL, values, strict=True))
        metric = metric_for(names["task_kind"], (metrics or {}).get(names["task"]))
        ours = group[group["init"] == reference]
        for init_values, theirs in group[group["init"] != reference].groupby(INIT, sort=False):
            if len(ours):
                who: dict[str, Any] = dict(zip(INIT, init_values, strict=True))
                pair = paired(theirs, ours, f"{names['task']}, {names['protocol']}")
                generator = numpy_generator(seed, "compare", *map(str, names.values()))
                effect, row = _compare_pair(metric, pair, generator, num_resamples, alpha)
                row |= {"margin": margin_of(metric.name, margin), "reference": reference}
                rows.append({**who, **names, **row})
                effects.append(effect)
    if not rows:
        return pd.DataFrame(columns=COMPARISON_COLUMNS)
    return _with_verdicts(pd.DataFrame(rows), effects, alpha)[COMPARISON_COLUMNS]


def _compare_pair(
    metric: Metric,
    pair: Pair,
    generator: np.random.Generator,
    num_resamples: int,
    alpha: float,
) -> tuple[Uncertain, dict[str, object]]:
    sign = 1.0 if metric.higher_is_better else -1.0
    value, base = measured(metric, pair.theirs), measured(metric, pair.ours)
    draws = draw_resamples(generator, num_resamples, pair.num_patients)
    samples = resampled(metric, pair.theirs, draws) - resampled(metric, pair.ours, draws)
    effects = sign * (value - base)
    effect = uncertain(effects, sign * samples, pair.num_patients)
    low, high = effect.interval(alpha)
    return effect, {
        "num_labelled_patients": pair.num_labelled,
        "metric": metric.name,
        "value": value.mean(),
        "reference_value": base.mean(),
        "effect": effect.value,
        "ci_low": low,
        "ci_high": high,
        "ci_over": effect.over,
        "p_value": effect.p_value(),
        "num_patients": pair.num_patients,
        "num_cases": len(pair.ours[0].targets),
        "num_seeds": len(pair.ours),
        "seed_effect_low": effects.min(),
        "seed_effect_high": effects.max(),
        "patient_sd": effect.spread.patient_sd,
        "interaction_sd": effect.spread.interaction_sd,
        "run_sd": effect.spread.run_sd,
    }


def _with_verdicts(table: pd.DataFrame, effects: list[Uncertain], alpha: float) -> pd.DataFrame:
    """Return the table with what is said of each family: the comparisons of one task."""
    p_margins = pd.Series(
        [
            1.0 if effect.value <= -margin else effect.p_value(-margin) if margin >= 0 else np.nan
            for effect, margin in zip(effects, table["margin"], strict=True)
        ]
    )
    for _, family in table.groupby("task"):
        judged = judge(family["effect"], family["p_value"], p_margins[family.index], alpha)
        for place, judgement in zip(family.index, judged, strict=True):
            table.loc[place, "p_holm"] = judgement.p_holm
            table.loc[place, "p_not_worse"] = judgement.p_not_worse
            table.loc[place, "verdict"] = judgement.verdict
            table.loc[place, "verdict_level"] = judgement.level
            low, high = effects[place].interval(judgement.level)
            table.loc[place, ["verdict_low", "verdict_high"]] = low, high
            table.loc[place, "family_size"] = family["p_value"].notna().sum()
    return table.astype({"family_size": int})
