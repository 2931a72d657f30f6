from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import pytest

from medssl.errors import DataError
from medssl.evaluation.metrics import METRICS, Metric
from medssl.evaluation.statistics import labels_saved, learning_curves
from medssl.evaluation.statistics.label_efficiency import needed
from medssl.evaluation.statistics.learning_curves import fit_power_law, monotone

COUNTS = (5, 10, 20, 40, 80)


def studies(
    levels: Mapping[str, Mapping[int, float]],
    *,
    num_patients: int = 40,
    num_seeds: int = 3,
    noise: float = 0.02,
    runs: float = 0.0,
    seed: int = 0,
) -> pd.DataFrame:
    """Dice of inits at numbers of labelled patients; patients differ in difficulty."""
    generator = np.random.default_rng(seed)
    difficulty = generator.normal(0, 0.05, num_patients)
    rows = []
    for init, curve in levels.items():
        for count, level in curve.items():
            for number in range(num_seeds):
                dice = level + difficulty + generator.normal(0, noise, num_patients)
                dice += runs * generator.normal()
                rows += [
                    {
                        "init": init, "pretext": "" if init == "imagenet" else init,
                        "backbone": "resnet18", "task": "hippocampus",
                        "task_kind": "segmentation", "protocol": "fine_tune", "layer": "",
                        "selected": True, "label_fraction": count / 100,
                        "num_labelled_patients": count, "seed": number,
                        "patient_key": f"p{patient:03}", "scan_key": f"s{patient:03}",
                        "target": np.nan, "scores": [value],
                    }
                    for patient, value in enumerate(dice)
                ]  # fmt: skip
    return pd.DataFrame(rows)


def law(count: float) -> float:
    return 0.85 - 0.6 * count**-0.5


REFERENCE = {count: law(count) for count in COUNTS}


def saved(theirs: Mapping[int, float], noise: float = 0.0, **settings: int) -> pd.DataFrame:
    table = studies({"imagenet": REFERENCE, "ssl": theirs}, noise=noise, **settings)
    return labels_saved(table, num_resamples=200).set_index("num_labelled_patients")


def test_an_init_worth_twice_the_labels_saves_half_of_them() -> None:
    table = saved({count: law(2 * count) for count in COUNTS})
    assert table.loc[[5, 10, 20, 40], "reference_needs"].tolist() == pytest.approx([10, 20, 40, 80])
    assert table.loc[[5, 10, 20, 40], "saved_share"].tolist() == pytest.approx([0.5] * 4)
    assert (table.loc[80, "bound"], table.loc[80, "saved_share"]) == ("at least", 0)
    assert table.loc[20, "ci_over"] == "patients and runs"


def test_an_init_worth_half_the_labels_saves_a_negative_share() -> None:
    table = saved({count: law(count / 2) for count in COUNTS})
    assert table.loc[[10, 20, 40, 80], "saved_share"].tolist() == pytest.approx([-1] * 4)
    assert (table.loc[5, "bound"], table.loc[5, "reference_needs"]) == ("at most", 5)


def test_between_measured_points_the_scale_is_logarithmic() -> None:
    found, side = needed(
        np.array([10.0, 100.0]), np.array([[0.7, 0.8]] * 3), np.array([0.75, 0.9, 0.6])
    )
    assert found == pytest.approx([np.sqrt(1000), 100, 10])
    assert side.tolist() == [0, 1, -1]


def test_a_reference_that_gains_nothing_is_reached_with_its_first_number() -> None:
    found, side = needed(np.array([10.0, 100.0]), np.array([[0.7, 0.7]]), np.array([0.7]))
    assert (found[0], side[0]) == (10, 0)


def test_the_interval_holds_the_true_share_and_widens_with_noise() -> None:
    theirs = {count: law(2 * count) for count in COUNTS}
    quiet, loud = saved(theirs, 0.01), saved(theirs, 0.08)
    for table in (quiet, loud):
        assert table.loc[20, "ci_low"] < 0.5 < table.loc[20, "ci_high"]
    width = [table.loc[20, "ci_high"] - table.loc[20, "ci_low"] for table in (quiet, loud)]
    assert width[0] < 0.5 * width[1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_intervals_of_the_saved_share_hold_it_in_about_95_of_100_studies() -> None:
    theirs = {count: law(2 * count) for count in COUNTS}
    held = []
    for study in range(80):
        table = studies({"imagenet": REFERENCE, "ssl": theirs}, runs=0.005, seed=study, num_seeds=5)
        row = labels_saved(table, num_resamples=300).set_index("num_labelled_patients").loc[20]
        held.append(row["ci_low"] <= 0.5 <= row["ci_high"])
    print(f"labels saved, 40 patients, 5 seeds: {np.mean(held):.3f}")
    assert np.mean(held) >= 0.88  # 92.5 % of 200 studies, less two standard deviations of 80


def test_an_end_of_the_interval_beyond_what_was_measured_is_a_bound() -> None:
    table = saved(dict.fromkeys(COUNTS, 0.9), 0.01)
    assert set(table["bound"]) == {"at least"}
    assert table.loc[5, "ci_high_bound"] == "at least"
    assert table.loc[5, "ci_high"] == pytest.approx(1 - 5 / 80)


def test_an_end_that_the_reference_reached_itself_is_no_bound() -> None:
    table = saved(REFERENCE)
    assert set(table["bound"]) | set(table["ci_low_bound"]) | set(table["ci_high_bound"]) == {""}
    assert table["saved_share"].tolist() == pytest.approx([0] * len(COUNTS))


def test_one_seed_speaks_about_patients_alone() -> None:
    table = saved(REFERENCE, num_seeds=1)
    assert set(table["ci_over"]) == {"patients"}


def test_a_reference_with_one_number_of_labels_has_no_curve() -> None:
    table = studies({"imagenet": {10: 0.7}, "ssl": {10: 0.8}})
    assert len(labels_saved(table)) == 0
    assert len(learning_curves(table)) == 0


def test_an_init_run_with_other_numbers_of_labels_or_other_seeds_is_left_out() -> None:
    other = studies({"imagenet": REFERENCE, "ssl": {7: 0.7, 13: 0.8}})
    assert len(labels_saved(other, num_resamples=10)) == 0
    table = studies({"imagenet": REFERENCE, "ssl": REFERENCE}, num_seeds=2)
    mixed = table[(table["seed"] == 0) == (table["num_labelled_patients"] == 5)]
    assert len(labels_saved(mixed, num_resamples=10)) == 0


def test_inits_tested_on_other_cases_are_refused() -> None:
    table = studies({"imagenet": REFERENCE, "ssl": REFERENCE})
    with pytest.raises(DataError, match="were not tested on the same cases"):
        labels_saved(table.iloc[:-1], num_resamples=10)


def test_curves_are_made_to_rise_by_as_little_as_possible() -> None:
    curves = np.array([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0], [1.0, 3.0, 2.0]])
    wanted = [[1, 2, 3], [2, 2, 2], [1, 2.5, 2.5]]
    np.testing.assert_allclose(monotone(curves), wanted)


def test_the_power_law_is_found_again() -> None:
    counts = np.array(COUNTS, dtype=float)
    found = fit_power_law(counts, law(counts), 1.0)
    assert (found.asymptote, found.gain, found.exponent) == pytest.approx(
        (0.85, 0.6, 0.5), abs=1e-3
    )


def test_an_asymptote_beyond_what_the_metric_can_reach_is_held_back() -> None:
    counts = np.array(COUNTS, dtype=float)
    assert fit_power_law(counts, 0.5 + 0.1 * np.log(counts), 1.0).asymptote <= 1


def test_fits_carry_intervals_and_few_or_flat_points_none() -> None:
    table = learning_curves(
        studies(
            {
                "imagenet": REFERENCE,
                "few": {5: 0.6, 10: 0.7, 20: 0.75},
                "flat": dict.fromkeys(COUNTS, 0.7) | {5: 0.75},
            },
            noise=0.005,
        ),
        num_resamples=200,
    )
    first = table.groupby("init").first()
    assert first.loc["imagenet", "fit"] == "fitted"
    assert first.loc["few", "fit"] == "no fit: fewer than 4 points"
    assert first.loc["flat", "fit"] == "no fit: more labels did not help"
    fitted = table[table["init"] == "imagenet"]
    assert (fitted["fitted_low"] < fitted["fitted"]).all()
    assert (fitted["fitted"] < fitted["fitted_high"]).all()
    row = fitted.iloc[0]
    assert row["asymptote_low"] < 0.85 < row["asymptote_high"]
    assert row["exponent_low"] < 0.5 < row["exponent_high"]


def test_errors_fall_to_their_asymptote_and_save_labels_too(monkeypatch) -> None:
    dice = METRICS["dice"]
    error = Metric("mae", False, dice.compute, dice.resampled)
    monkeypatch.setitem(METRICS, "mae", error)
    curves = {
        init: {count: 2 - law(scale * count) for count in COUNTS}
        for init, scale in (("imagenet", 1), ("ssl", 2))
    }
    table = studies(curves, noise=0.002)
    names = {"hippocampus": "mae"}
    row = labels_saved(table, names, num_resamples=100).set_index("num_labelled_patients").loc[20]
    assert row["saved_share"] == pytest.approx(0.5, abs=0.05)
    assert row["value"] == pytest.approx(2 - law(40), abs=0.03)
    fit = learning_curves(table, names, num_resamples=100).iloc[0]
    assert fit["asymptote"] == pytest.approx(1.15, abs=0.05)
    assert fit["asymptote_low"] < fit["asymptote"] < fit["asymptote_high"]
    assert fit["value"] > fit["asymptote"]
