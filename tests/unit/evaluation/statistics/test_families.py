from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medssl.evaluation.statistics.families import (
    BETTER,
    NO_DIFFERENCE,
    NOT_WORSE,
    USUAL_MARGINS,
    WORSE,
    Judgement,
    holm,
    judge,
    margin_of,
)

P_VALUES = st.lists(st.floats(1e-9, 1) | st.just(float("nan")), min_size=1, max_size=8)


def judged(effects: list[float], p: list[float], p_margin: list[float]) -> list[Judgement]:
    return judge(pd.Series(effects), pd.Series(p), pd.Series(p_margin), 0.05)


def test_difference_comes_first_and_the_margin_at_the_level_then_reached() -> None:
    found = judged(
        [0.1, -0.1, 0.001, 0.002, 0.0],
        [0.001, 0.002, 0.5, 0.4, np.nan],
        [1e-6, 1.0, 0.02, 0.03, np.nan],
    )
    # Of four known comparisons two differ; two are left, so the margin is tested at .05 / 2.
    assert [one.verdict for one in found] == [
        BETTER, WORSE, NOT_WORSE, NO_DIFFERENCE, NO_DIFFERENCE,
    ]  # fmt: skip
    assert [one.level for one in found[:4]] == pytest.approx([0.0125, 0.05 / 3, 0.025, 0.025])
    assert found[2].p_not_worse == pytest.approx(0.04)
    assert np.isnan(found[4].level)


def test_without_a_margin_nothing_is_called_not_worse() -> None:
    (one,) = judged([0.0], [0.9], [np.nan])
    assert (one.verdict, margin_of("dice", None)) == (
        NO_DIFFERENCE,
        pytest.approx(np.nan, nan_ok=True),
    )


@given(P_VALUES)
def test_the_level_of_a_verdict_tells_it(values: list[float]) -> None:
    found = judged([0.1] * len(values), values, [1.0] * len(values))
    for p_value, one in zip(values, found, strict=True):
        if not np.isnan(p_value):
            assert (p_value < one.level) == (one.verdict == BETTER)


@given(P_VALUES)
def test_holm_never_lowers_a_p_value_and_keeps_their_order(values: list[float]) -> None:
    plain = pd.Series(values)
    corrected = holm(plain)
    known = plain.notna()
    assert (corrected[known] >= plain[known]).all()
    order = plain[known].sort_values(kind="stable").index
    assert corrected[order].is_monotonic_increasing


def test_margins_are_by_metric_one_for_all_or_none() -> None:
    assert margin_of("dice", USUAL_MARGINS) == 0.02
    assert margin_of("auc", 0.03) == 0.03
    assert np.isnan(margin_of("radial_error_mm", USUAL_MARGINS))
