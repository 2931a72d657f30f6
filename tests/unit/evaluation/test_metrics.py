from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

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
    targets, scores = cases(num_cases, num_classes, seed, ties)
    weights = np.random.default_rng(seed).integers(0, 4, (3, num_cases))
    weights[:, :num_classes] += 1  # every class drawn at least once
    repeated = [
        metric.compute(np.repeat(targets, row), np.repeat(scores, row, axis=0)) for row in weights
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
