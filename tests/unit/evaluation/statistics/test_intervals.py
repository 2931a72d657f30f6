from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from medssl.evaluation.metrics import Array
from medssl.evaluation.statistics.intervals import Spread, Uncertain, uncertain
from medssl.evaluation.statistics.resampling import draw_resamples, expanded_interval

COUNT = 30


def crossed(
    num_seeds: int, *, patients: float = 0.1, runs: float = 0.0, alone: float = 0.0, seed: int = 0
) -> Array:
    """Values (P, S) of patients and runs."""
    generator = np.random.default_rng(seed)
    return np.asarray(
        generator.normal(0.5, patients, (COUNT, 1))
        + generator.normal(0, runs, num_seeds)
        + generator.normal(0, alone, (COUNT, num_seeds))
    )


def known(values: Array, num_resamples: int = 4000) -> Uncertain:
    draws = draw_resamples(np.random.default_rng(1), num_resamples, len(values))
    return uncertain(values.mean(axis=0), draws @ values / len(values), len(values))


def test_the_parts_of_the_spread_are_found_as_analysis_of_variance_finds_them() -> None:
    values = crossed(5, patients=0.1, runs=0.05, alone=0.08)
    rows, columns, whole = values.mean(axis=1), values.mean(axis=0), values.mean()
    rest = values - rows[:, None] - columns + whole
    alone = (rest**2).sum() / ((COUNT - 1) * 4)
    spread = known(values, 20_000).spread
    assert spread.interaction_sd**2 == pytest.approx(alone, rel=0.03)
    assert spread.patient_sd**2 == pytest.approx(rows.var(ddof=1) - alone / 5, rel=0.05)
    assert spread.run_sd**2 == pytest.approx(columns.var(ddof=1) - alone / COUNT, rel=0.03)


def test_with_one_seed_the_interval_is_that_of_patients_and_says_so() -> None:
    values = crossed(1)
    found = known(values)
    draws = draw_resamples(np.random.default_rng(1), 4000, COUNT)
    low, high = expanded_interval((draws @ values / COUNT)[:, 0], COUNT, 0.05)
    assert found.over == "patients"
    assert found.interval(0.05) == pytest.approx((low, high), abs=2e-4)
    assert np.isnan(found.spread.run_sd)


def test_runs_that_differ_widen_the_interval_and_many_seeds_narrow_it_again() -> None:
    widths = {}
    for num_seeds, runs in ((5, 0.0), (5, 0.2), (3, 0.2), (40, 0.2)):
        found = known(crossed(num_seeds, patients=0.02, runs=runs))
        low, high = found.interval(0.05)
        widths[num_seeds, runs] = high - low
        assert found.over == "patients and runs"
    assert widths[5, 0.0] < 0.2 * widths[40, 0.2]
    assert widths[40, 0.2] < widths[5, 0.2] < widths[3, 0.2]


def test_where_runs_alone_differ_the_interval_is_students_over_seeds() -> None:
    values = crossed(5, patients=0.0, runs=0.1)
    low, high = stats.t.interval(0.95, 4, values.mean(), stats.sem(values.mean(axis=0)))
    assert known(values).interval(0.05) == pytest.approx((low, high), rel=0.01)


def test_two_seeds_keep_one_degree_of_freedom_each_for_its_own_part() -> None:
    spread = Spread(patient_sd=0.3, interaction_sd=0.0, run_sd=0.1)
    wanted = np.hypot(stats.t.ppf(0.975, 29) * 0.3 / np.sqrt(30), 12.706 * 0.1 / np.sqrt(2))
    assert spread.reach(30, 2, 0.05) == pytest.approx(wanted, rel=1e-4)
    # Of a study that was done, the runs vary by what was seen of them.
    values = crossed(2, runs=0.05, alone=0.1)
    spread = known(values).spread
    seen = 12.706 * values.mean(axis=0).std(ddof=1) / np.sqrt(2)
    patients = stats.t.ppf(0.975, 29) * spread.patient_sd / np.sqrt(30)
    assert spread.reach(30, 2, 0.05) == pytest.approx(np.hypot(patients, seen), rel=1e-4)


@pytest.mark.parametrize("num_seeds", [1, 2, 3, 5])
@pytest.mark.parametrize("null", [0.0, 0.42, 0.5, 0.6])
def test_the_p_value_is_the_level_at_which_the_interval_touches(num_seeds: int, null: float):
    found = known(crossed(num_seeds, runs=0.03, alone=0.05, seed=num_seeds))
    p_value = found.p_value(null)
    low, high = found.interval(p_value)
    touched = low if found.value > null else high
    assert touched == pytest.approx(null, abs=1e-4) or p_value < 1e-11


def test_seeds_that_are_copies_of_one_run_add_nothing() -> None:
    one = crossed(1)
    assert known(np.repeat(one, 5, axis=1)).interval(0.05) == pytest.approx(
        known(one).interval(0.05), abs=1e-9
    )


def test_undefined_resamples_and_single_patients_give_no_interval() -> None:
    few = uncertain(np.array([0.5]), np.full((100, 1), 0.5), 1)
    assert np.isnan([*few.interval(0.05), few.p_value(), *few.interval_of_share(0.05)]).all()
    samples = np.full((100, 2), np.nan)
    samples[:40] = 0.5
    assert np.isnan(uncertain(np.array([0.5, 0.5]), samples, 10).interval(0.05)).all()


def test_intervals_of_shares_stay_between_0_and_1() -> None:
    values = np.clip(crossed(3, patients=0.3) + 0.45, 0, 1)
    low, high = known(values).interval_of_share(0.05)
    assert 0 < low < values.mean() < high < 1
    perfect = known(np.ones((20, 1)))
    assert perfect.interval_of_share(0.05) == pytest.approx((0.025 ** (1 / 20), 1))
    assert known(np.zeros((20, 1))).interval_of_share(0.05)[0] == 0


def test_a_difference_alike_in_every_patient_has_a_p_value_of_its_resamples() -> None:
    found = known(np.full((12, 1), 0.1))
    assert 0 < found.p_value() < 0.01
    assert found.p_value(0.1) == 1
