from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from medssl.errors import DataError
from medssl.evaluation.metrics import METRICS, Metric
from medssl.evaluation.statistics import compare, estimate, holm


def predictions(
    gains: dict[str, float],
    *,
    num_patients: int = 40,
    seeds: tuple[int, ...] = (0, 1, 2),
    noise: float = 0.02,
    generator: np.random.Generator | None = None,
    fractions: tuple[float, ...] = (0.1,),
    protocol: str = "fine_tune",
) -> pd.DataFrame:
    """Dice of two classes for one or two scans a patient; patients differ in difficulty."""
    generator = generator or np.random.default_rng(0)
    rows = []
    for fraction in fractions:
        difficulty = generator.normal(0.7, 0.1, num_patients)
        for init, gain in gains.items():
            for seed in seeds:
                for patient in range(num_patients):
                    for scan in range(1 + patient % 2):
                        dice = difficulty[patient] + gain + generator.normal(0, noise, 2)
                        rows.append(
                            {
                                "init": init,
                                "pretext": "" if init in ("random", "imagenet") else init,
                                "backbone": "resnet18",
                                "task": "hippocampus",
                                "task_kind": "segmentation",
                                "protocol": protocol,
                                "layer": "",
                                "selected": True,
                                "label_fraction": fraction,
                                "num_labelled_patients": round(100 * fraction),
                                "seed": seed,
                                "patient_key": f"p{patient:03}",
                                "scan_key": f"s{patient:03}{scan}",
                                "target": np.nan,
                                "scores": list(np.clip(dice, 0, 1)),
                            }
                        )
    return pd.DataFrame(rows)


def test_a_planted_difference_is_recovered_with_its_sign() -> None:
    gains = {"imagenet": 0.0, "rotation": 0.03, "random": -0.05, "same": 0.0}
    table = compare(predictions(gains), num_resamples=2000, margin=None).set_index("init")
    assert table.loc["rotation", "effect"] == pytest.approx(0.03, abs=0.006)
    assert table.loc["rotation", "ci_low"] < 0.03 < table.loc["rotation", "ci_high"]
    assert list(table.loc[["rotation", "random", "same"], "verdict"]) == [
        "better",
        "worse",
        "no difference shown",
    ]
    assert table.loc["rotation", "num_patients"] == 40
    assert table.loc["rotation", "num_cases"] == 60
    assert table.loc["rotation", "num_seeds"] == 3


def test_the_interval_covers_no_difference_in_nearly_all_null_studies() -> None:
    covered, refuted = 0, 0
    studies = 100
    for study in range(studies):
        table = compare(
            predictions(
                {"imagenet": 0.0, "rotation": 0.0},
                num_patients=20,
                seeds=(0,),
                noise=0.05,
                generator=np.random.default_rng(study),
            ),
            num_resamples=400,
            seed=study,
        )
        covered += bool(table["ci_low"][0] <= 0 <= table["ci_high"][0])
        refuted += bool(table["p_value"][0] < 0.05)
    # Four standard deviations of a binomial count around 95 %.
    assert covered / studies >= 0.86
    assert abs((studies - covered) - refuted) <= 2  # interval and p value tell the same


def test_pairing_makes_the_interval_narrower_than_the_spread_of_patients() -> None:
    table = compare(predictions({"imagenet": 0.0, "rotation": 0.02}), num_resamples=1000)
    width = table["ci_high"][0] - table["ci_low"][0]
    assert width < 0.25 * 4 * 0.1 / np.sqrt(40)


def test_the_interval_of_a_mean_agrees_with_the_t_interval() -> None:
    table = predictions({"imagenet": 0.0}, num_patients=12, seeds=(0,))
    table = table.drop_duplicates("patient_key")
    row = estimate(table, num_resamples=20_000).iloc[0]
    values = np.array([np.mean(scores) for scores in table["scores"]])
    low, high = stats.t.interval(0.95, 11, values.mean(), stats.sem(values))
    assert row["value"] == pytest.approx(values.mean())
    assert row["ci_low"] == pytest.approx(low, abs=0.012)
    assert row["ci_high"] == pytest.approx(high, abs=0.012)


def test_a_share_of_landmarks_that_are_all_found_is_not_certain_to_be_one() -> None:
    table = predictions({"imagenet": 0.0}, num_patients=12, seeds=(0,))
    table = table.drop_duplicates("patient_key").assign(scores=[[1.0, 2.0]] * 12)
    row = estimate(table, {"hippocampus": "success_rate_4mm"}, num_resamples=100).iloc[0]
    assert (row["value"], row["ci_high"]) == (1, 1)
    assert row["ci_low"] == pytest.approx(0.025 ** (1 / 12))  # Clopper and Pearson


def test_holm_equals_an_example_by_hand() -> None:
    # Sorted .005 .01 .03 .04: times 4 3 2 1 = .02 .03 .06 .04, made to rise: .02 .03 .06 .06.
    p_values = pd.Series([0.01, 0.04, 0.03, 0.005, np.nan], index=list("abcde"))
    corrected = holm(p_values)
    np.testing.assert_allclose(corrected[list("abcd")], [0.03, 0.06, 0.06, 0.02])
    assert np.isnan(corrected["e"])


def test_holm_runs_over_all_comparisons_of_a_task() -> None:
    gains = {"imagenet": 0.0, "rotation": 0.004, "inpainting": 0.001, "random": -0.003}
    table = compare(predictions(gains, fractions=(0.1, 0.5)), num_resamples=1000)
    assert len(table) == 6
    assert (table["p_holm"] >= table["p_value"]).all()
    smallest = table["p_value"].min()
    assert table["p_holm"].min() == pytest.approx(min(6 * smallest, 1))


def test_the_same_seed_gives_the_same_table() -> None:
    table = predictions({"imagenet": 0.0, "rotation": 0.01})
    shuffled = table.sample(frac=1, random_state=1)
    first = compare(table, num_resamples=500, seed=3)
    pd.testing.assert_frame_equal(first, compare(table, num_resamples=500, seed=3))
    again = compare(shuffled, num_resamples=500, seed=3)
    pd.testing.assert_series_equal(first["ci_low"], again["ci_low"])


def test_inits_tested_on_other_cases_are_refused() -> None:
    table = predictions({"imagenet": 0.0, "rotation": 0.0})
    missing = table.drop(index=table.index[(table["init"] == "rotation")][:1])
    with pytest.raises(DataError, match=r"'rotation' and 'imagenet' were not tested on the same c"):
        compare(missing, num_resamples=10)


def test_inits_tested_with_other_targets_are_refused() -> None:
    table = predictions({"imagenet": 0.0, "rotation": 0.0})
    table["target"] = 0.0
    table.loc[table.index[table["init"] == "rotation"][0], "target"] = 1.0
    with pytest.raises(DataError, match="with another target"):
        compare(table, num_resamples=10)


def test_inits_on_different_backbones_are_refused() -> None:
    table = predictions({"imagenet": 0.0, "rotation": 0.0})
    table.loc[table["init"] == "rotation", "backbone"] = "resnet50"
    with pytest.raises(DataError, match="Compare inits of one backbone"):
        compare(table, num_resamples=10)


def test_without_the_reference_nothing_is_compared_and_the_log_says_so(caplog) -> None:
    full = compare(predictions({"imagenet": 0.0, "rotation": 0.0}), num_resamples=10)
    empty = compare(predictions({"random": 0.0, "rotation": 0.0}))
    assert len(empty) == 0
    assert list(empty.columns) == list(full.columns)
    assert "'imagenet' is not among the results (random, rotation)" in caplog.text
    assert "choose another reference" in caplog.text


def test_few_resamples_do_not_keep_a_clear_difference_from_passing_holm() -> None:
    gains = {"imagenet": 0.0, **{f"better{number}": 0.1 for number in range(60)}}
    table = compare(predictions(gains, num_patients=15, seeds=(0,)), num_resamples=300)
    assert (table["p_holm"] < 0.05).all()


def test_inits_without_a_common_seed_are_refused() -> None:
    table = predictions({"imagenet": 0.0, "rotation": 0.0}, seeds=(0,))
    table.loc[table["init"] == "rotation", "seed"] = 7
    with pytest.raises(DataError, match="no seed in common"):
        compare(table)


def test_missing_columns_and_empty_tables_are_refused() -> None:
    table = predictions({"imagenet": 0.0})
    with pytest.raises(DataError, match="lack the columns scores"):
        estimate(table.drop(columns="scores"))
    with pytest.raises(DataError, match="no predictions yet"):
        estimate(table.iloc[:0])


def test_only_the_layers_chosen_on_validation_are_compared() -> None:
    good = predictions({"imagenet": 0.0, "rotation": 0.0}, protocol="linear_probe")
    good["layer"] = "stage3"
    bad = good.copy()
    bad["layer"], bad["selected"] = "stage1", False
    bad["scores"] = [[0.0, 0.0]] * len(bad)
    both = pd.concat([good, bad])
    assert compare(both, num_resamples=100)["value"][0] > 0.6
    rows = estimate(both, num_resamples=100)
    assert sorted(zip(rows["init"], rows["layer"], rows["selected"], strict=True)) == [
        ("imagenet", "stage1", False),
        ("imagenet", "stage3", False),
        ("imagenet", "stage3", True),
        ("rotation", "stage1", False),
        ("rotation", "stage3", False),
        ("rotation", "stage3", True),
    ]


def test_one_test_patient_gives_no_interval_and_no_verdict() -> None:
    table = predictions({"imagenet": 0.0, "rotation": 0.2}, num_patients=1)
    row = compare(table, num_resamples=50).iloc[0]
    assert np.isnan(row["ci_low"])
    assert row["verdict"] == "no difference shown"


def test_classification_is_compared_by_auc() -> None:
    generator = np.random.default_rng(0)
    table = predictions({"imagenet": 0.0, "rotation": 0.0}, seeds=(0,), num_patients=60)
    table["task_kind"] = "classification"
    table["target"] = (table["patient_key"].str[-1].astype(int) % 2).astype(float)
    strength = np.where(table["init"] == "rotation", 2.0, 0.3)
    logit = strength * (2 * table["target"] - 1) + generator.normal(0, 1, len(table))
    chance = 1 / (1 + np.exp(-logit))
    table["scores"] = [[1 - value, value] for value in chance]
    row = compare(table, num_resamples=1000).iloc[0]
    assert (row["metric"], row["verdict"]) == ("auc", "better")


def test_two_inits_with_equal_predictions_show_no_difference() -> None:
    table = predictions({"imagenet": 0.0})
    twin = table.assign(init="twin")
    row = compare(pd.concat([table, twin]), num_resamples=200).iloc[0]
    assert (row["effect"], row["ci_low"], row["ci_high"], row["p_value"]) == (0, 0, 0, 1)


def test_inits_without_any_pretext_may_leave_the_column_empty() -> None:
    table = predictions({"imagenet": 0.0, "random": 0.0}, seeds=(0,)).assign(
        pretext=np.nan, layer=None
    )
    assert list(compare(table, num_resamples=50)["init"]) == ["random"]
    assert list(estimate(table, num_resamples=50)["layer"]) == ["", ""]


def test_of_errors_the_smaller_is_better_and_the_effect_positive(monkeypatch) -> None:
    dice = METRICS["dice"]
    monkeypatch.setitem(METRICS, "mae", Metric("mae", False, dice.compute, dice.resampled))
    table = predictions({"imagenet": 0.0, "rotation": -0.05, "random": 0.05})
    rows = compare(table, {"hippocampus": "mae"}, num_resamples=500).set_index("init")
    assert rows.loc["rotation", "value"] < rows.loc["rotation", "reference_value"]
    assert rows.loc["rotation", "ci_low"] > 0
    assert list(rows.loc[["rotation", "random"], "verdict"]) == ["better", "worse"]
    assert rows["margin"].isna().all()
