from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    mean_absolute_error,
    r2_score,
    roc_auc_score,
    root_mean_squared_error,
)

from medssl.errors import ConfigError
from medssl.evaluation.metrics import METRICS, case_dice, metric_for


def cases(num_cases: int, num_classes: int, seed: int, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    targets = generator.integers(0, num_classes, num_cases).astype(float)
    targets[:num_classes] = np.arange(num_classes)
    scores = generator.random((num_cases, num_classes)) + np.eye(num_classes)[targets.astype(int)]
    if ties:
        scores = np.round(scores, 1)
    return targets, scores / scores.sum(axis=1, keepdims=True)


def label_cases(num_cases: int, num_labels: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return labels of which a quarter is unknown, and scores with ties."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, (num_cases, num_labels)).astype(float)
    labels[0], labels[1] = 1, 0
    labels[2:][generator.random((num_cases - 2, num_labels)) < 0.25] = np.nan
    return labels, np.round(generator.random((num_cases, num_labels)), 1)


def number_cases(num_cases: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    numbers = generator.normal(1000, 30, num_cases)
    return numbers, (numbers + generator.normal(5, 20, num_cases))[:, None]


def cases_for(
    name: str, num_cases: int, num_classes: int, seed: int, ties: bool
) -> tuple[np.ndarray, np.ndarray]:
    if name.startswith("mean_"):
        return label_cases(num_cases, num_classes, seed)
    if name in ("mae", "rmse", "r2", "pearson"):
        return number_cases(num_cases, seed)
    if name in ("radial_error_mm", "success_rate_4mm"):
        errors = np.random.default_rng(seed).gamma(2, 2, (num_cases, num_classes))
        errors[2:, 0] = np.nan
        return np.full(num_cases, np.nan), errors
    return cases(num_cases, num_classes, seed, ties)


@pytest.mark.parametrize("name", sorted(METRICS))
@settings(max_examples=30, deadline=None)
@given(
    num_cases=st.integers(6, 40),
    num_classes=st.integers(2, 4),
    seed=st.integers(0, 1000),
    ties=st.booleans(),
)
def test_resampling_weights_equal_cases_repeated(name, num_cases, num_classes, seed, ties) -> None:
    metric = METRICS[name]
    targets, scores = cases_for(name, num_cases, num_classes, seed, ties)
    weights = np.random.default_rng(seed).integers(0, 4, (3, num_cases))
    weights[:, :num_classes] += 1  # every class drawn at least once
    repeated = [
        metric.compute(np.repeat(targets, row, axis=0), np.repeat(scores, row, axis=0))
        for row in weights
    ]
    np.testing.assert_allclose(metric.resampled(targets, scores, weights * 1.0), repeated)


def test_auc_of_two_classes_equals_sklearn() -> None:
    targets, scores = cases(50, 2, seed=1, ties=True)
    assert METRICS["auc"].compute(targets, scores) == pytest.approx(
        roc_auc_score(targets, scores[:, 1])
    )


def test_auc_of_four_classes_is_the_mean_of_one_against_the_rest() -> None:
    targets, scores = cases(50, 4, seed=1, ties=False)
    wanted = roc_auc_score(targets, scores, multi_class="ovr", average="macro")
    assert METRICS["auc"].compute(targets, scores) == pytest.approx(wanted)


def test_balanced_accuracy_equals_sklearn() -> None:
    targets, scores = cases(50, 3, seed=2, ties=False)
    wanted = balanced_accuracy_score(targets, scores.argmax(axis=1))
    assert METRICS["balanced_accuracy"].compute(targets, scores) == pytest.approx(wanted)


def test_auc_of_one_class_only_is_undefined() -> None:
    scores = np.array([[0.2, 0.8], [0.6, 0.4]])
    assert np.isnan(METRICS["auc"].compute(np.ones(2), scores))
    assert np.isnan(METRICS["auc"].resampled(np.ones(2), scores, np.ones((1, 2)))[0])


def test_dice_leaves_out_a_class_that_is_neither_there_nor_predicted() -> None:
    scores = np.array([[0.8, np.nan], [0.6, 0.4], [np.nan, np.nan]])
    np.testing.assert_allclose(case_dice(scores), [0.8, 0.5, np.nan])
    assert METRICS["dice"].compute(np.full(3, np.nan), scores) == pytest.approx(0.65)


def test_an_unknown_metric_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"no metric 'dise'.*There are: accuracy, auc"):
        metric_for("segmentation", "dise")


WEIGHTS = np.random.default_rng(5).random((3, 60)) + 0.1


@pytest.mark.parametrize(
    ("name", "theirs"), [("auc", roc_auc_score), ("average_precision", average_precision_score)]
)
def test_weighted_areas_of_two_classes_equal_sklearn(name, theirs) -> None:
    targets, scores = cases(60, 2, seed=3, ties=True)
    wanted = [theirs(targets, scores[:, 1], sample_weight=row) for row in WEIGHTS]
    found = METRICS[name].resampled(targets, scores, WEIGHTS)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-9)
    assert METRICS[name].compute(targets, scores) == pytest.approx(
        theirs(targets, scores[:, 1]), abs=1e-9
    )


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("mean_auc", roc_auc_score), ("mean_average_precision", average_precision_score)],
)
def test_means_over_labels_equal_sklearns_over_what_is_known_of_each(name, theirs) -> None:
    labels, scores = label_cases(60, 4, seed=3)
    wanted = []
    for row in WEIGHTS:
        known = [np.isfinite(label) for label in labels.T]
        wanted.append(
            np.mean(
                [
                    theirs(labels[k, i], scores[k, i], sample_weight=row[k])
                    for i, k in enumerate(known)
                ]
            )
        )
    found = METRICS[name].resampled(labels, scores, WEIGHTS)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("of_labels", "of_a_class"),
    [("mean_auc", "auc"), ("mean_average_precision", "average_precision")],
)
def test_one_label_alone_has_the_binary_metric(of_labels, of_a_class) -> None:
    targets, scores = cases(60, 2, seed=4, ties=True)
    ours, binary = METRICS[of_labels], METRICS[of_a_class]
    for labels in (targets, targets[:, None]):
        assert ours.compute(labels, scores[:, 1:]) == pytest.approx(binary.compute(targets, scores))
        np.testing.assert_allclose(
            ours.resampled(labels, scores[:, 1:], WEIGHTS),
            binary.resampled(targets, scores, WEIGHTS),
        )


@pytest.mark.parametrize("name", ["mean_auc", "mean_average_precision"])
def test_a_label_that_a_sample_holds_one_answer_of_is_left_out(name) -> None:
    labels = np.array([[1.0, 1.0], [0.0, 1.0], [0.0, np.nan]])
    scores = np.array([[0.9, 0.1], [0.5, 0.2], [0.1, 0.3]])
    assert METRICS[name].compute(labels, scores) == 1
    rows = np.array([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
    np.testing.assert_array_equal(METRICS[name].resampled(labels, scores, rows), [1, np.nan])


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("mae", mean_absolute_error), ("rmse", root_mean_squared_error), ("r2", r2_score)],
)
def test_metrics_of_numbers_equal_sklearns(name, theirs) -> None:
    numbers, scores = number_cases(60, seed=6)
    wanted = [theirs(numbers, scores[:, 0], sample_weight=row) for row in WEIGHTS]
    for targets in (numbers, numbers[:, None]):
        found = METRICS[name].resampled(targets, scores, WEIGHTS)
        np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_the_correlation_is_numpys() -> None:
    numbers, scores = number_cases(60, seed=7)
    wanted = np.corrcoef(numbers, scores[:, 0])[0, 1]
    assert METRICS["pearson"].compute(numbers, scores) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("name", ["r2", "pearson"])
def test_equal_numbers_have_no_spread_to_explain(name) -> None:
    scores = np.array([[1.0], [2.0], [3.0]])
    assert np.isnan(METRICS[name].compute(np.full(3, 0.1), scores))


def test_smaller_errors_are_better_and_larger_shares_too() -> None:
    lower = {name for name, metric in METRICS.items() if not metric.higher_is_better}
    assert lower == {"mae", "rmse", "radial_error_mm"}


def test_landmarks_that_are_unknown_do_not_count() -> None:
    errors = np.array([[1.0, 3.0], [np.nan, 6.0], [np.nan, np.nan]])
    nothing = np.full(3, np.nan)
    assert METRICS["radial_error_mm"].compute(nothing, errors) == pytest.approx((2 + 6) / 2)
    assert METRICS["success_rate_4mm"].compute(nothing, errors) == pytest.approx(2 / 3)
