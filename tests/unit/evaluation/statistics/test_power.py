from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from medssl.evaluation.statistics import power
from medssl.evaluation.statistics.intervals import Spread
from medssl.evaluation.statistics.power import detectable_effect, patients_needed, power_of

PATIENTS_ONLY = Spread(0.1, 0.0, float("nan"))


def comparisons(**changes: object) -> pd.DataFrame:
    row = {
        "init": "ssl", "pretext": "ssl", "reference": "imagenet", "backbone": "resnet18",
        "task": "hippocampus", "task_kind": "segmentation", "protocol": "fine_tune",
        "label_fraction": 0.1, "num_labelled_patients": 10, "metric": "dice", "num_patients": 30,
        "num_seeds": 5, "ci_over": "patients and runs", "effect": 0.03, "margin": 0.02,
        "family_size": 4, "patient_sd": 0.05, "interaction_sd": 0.05, "run_sd": 0.001,
    }  # fmt: skip
    return pd.DataFrame([row | changes])


def test_patients_alone_need_what_the_paired_t_test_needs() -> None:
    # Effect of half a standard deviation, power 0.8, level 0.05: 34 pairs, in every textbook.
    assert patients_needed(0.05, PATIENTS_ONLY, 1, 0.05) == 34
    shift = 0.5 * np.sqrt(34)
    by_hand = stats.nct.sf(stats.t.ppf(0.975, 33), 33, shift)
    assert power_of(0.05, PATIENTS_ONLY, 34, 1, 0.05) == pytest.approx(by_hand)


def test_power_grows_with_effect_patients_and_seeds() -> None:
    spread = Spread(0.1, 0.1, 0.02)
    rates = [power_of(effect, spread, 30, 5, 0.05) for effect in (0.01, 0.03, 0.06)]
    assert rates == sorted(rates)
    assert power_of(0.03, spread, 30, 5, 0.05) < power_of(0.03, spread, 60, 5, 0.05)
    assert power_of(0.03, spread, 30, 2, 0.05) < power_of(0.03, spread, 30, 3, 0.05)
    assert power_of(0.03, spread, 30, 3, 0.05) < power_of(0.03, spread, 30, 10, 0.05)


def test_the_detectable_effect_is_shown_with_the_power_asked_for() -> None:
    spread = Spread(0.1, 0.1, 0.02)
    for num_seeds in (2, 3, 5):
        effect = detectable_effect(spread, 30, num_seeds, 0.01)
        assert power_of(effect, spread, 30, num_seeds, 0.01) == pytest.approx(0.8, abs=1e-3)


def test_the_table_asks_at_the_level_corrected_in_advance() -> None:
    (row,) = power(comparisons()).to_dict("records")
    assert row["level"] == pytest.approx(0.05 / 4)
    spread = Spread(0.05, 0.05, 0.001)
    assert row["patients_for_effect"] == patients_needed(0.03, spread, 5, 0.05 / 4)
    assert row["patients_for_margin"] == patients_needed(0.02, spread, 5, 0.05 / 4)
    assert row["patients_for_effect"] < row["patients_for_margin"]


def test_where_runs_differ_too_much_no_number_of_patients_is_enough() -> None:
    (row,) = power(comparisons(run_sd=0.1)).to_dict("records")
    assert np.isnan(row["patients_for_effect"])
    assert row["limit_for_effect"] == "more runs needed"


def test_without_an_effect_or_a_margin_the_table_says_so() -> None:
    (row,) = power(comparisons(effect=0.0, margin=np.nan)).to_dict("records")
    assert row["limit_for_effect"] == "no difference seen"
    assert np.isnan(row["patients_for_margin"])
    assert row["limit_for_margin"] == "not known"
    (row,) = power(comparisons(patient_sd=np.nan)).to_dict("records")
    assert row["limit_for_effect"] == "not known"
