"""The linear probe: scikit-learn's regression, and choices made on validation patients alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_iris, make_classification
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from medssl.evaluation.features import CaseFeatures
from medssl.evaluation.protocols.base import Prediction, Setting
from medssl.evaluation.protocols.linear_probe import Config, LinearProbe, _Probe, fit_logistic
from medssl.pipelines.cells import Evaluation


def many_classes() -> tuple[np.ndarray, np.ndarray]:
    rows, classes = make_classification(
        n_samples=300, n_features=20, n_informative=8, n_classes=4, random_state=0
    )
    return rows, classes


DATA = {
    "iris, 3 classes": lambda: load_iris(return_X_y=True),
    "tumours, 2 classes": lambda: load_breast_cancer(return_X_y=True),
    "made up, 4 classes": many_classes,
}


@pytest.mark.parametrize("strength", [1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("data", DATA.values(), ids=DATA.keys())
def test_the_regression_is_scikit_learns(data: Any, strength: float):
    rows, classes = data()
    rows = StandardScaler().fit_transform(rows)
    num_classes = int(classes.max()) + 1
    # With two classes scikit-learn keeps one vector of weights for their difference.
    share = 2 if num_classes == 2 else 1
    theirs = LogisticRegression(C=share / (strength * len(rows)), tol=1e-8, max_iter=5000)
    theirs.fit(rows, classes)

    weight, bias = fit_logistic(
        torch.tensor(rows), torch.tensor(classes), num_classes, strength, max_steps=500
    )
    coefficients, intercepts = weight.T.numpy(), bias.numpy()
    if num_classes == 2:
        coefficients = coefficients[1:] - coefficients[:1]
        intercepts = intercepts[1:] - intercepts[:1]
    else:  # a constant added to all intercepts changes nothing
        intercepts = intercepts - intercepts.mean() + theirs.intercept_.mean()
    np.testing.assert_allclose(coefficients, theirs.coef_, atol=1e-3)
    np.testing.assert_allclose(intercepts, theirs.intercept_, atol=1e-3)
    ours = (torch.tensor(rows) @ weight + bias).softmax(1).numpy()
    np.testing.assert_allclose(ours, theirs.predict_proba(rows), atol=1e-3)


@pytest.mark.parametrize("data", DATA.values(), ids=DATA.keys())
def test_the_steps_of_the_default_config_are_enough(data: Any):
    config = Config()
    rows, classes = (torch.tensor(part) for part in data())
    rows = (rows - rows.mean(0)) / rows.std(0)
    for strength in config.strengths:
        found, best = (
            torch.softmax(rows @ w + b, 1)
            for w, b in (
                fit_logistic(rows, classes, 4, strength, steps)
                for steps in (config.max_steps, 3000)
            )
        )
        assert (found - best).abs().max() < 0.02


def test_weights_apply_to_features_as_they_come():
    rows, classes = (torch.tensor(part) for part in load_iris(return_X_y=True))
    weight, bias = _Probe(rows, classes, 3).fit(0.01, 200)
    standardised = StandardScaler().fit_transform(rows.numpy())
    inner, offset = fit_logistic(torch.tensor(standardised), classes, 3, 0.01, 200)
    wanted = torch.tensor(standardised) @ inner + offset
    assert torch.allclose(rows @ weight.T + bias, wanted, atol=1e-6)


def test_a_feature_that_never_changes_does_no_harm():
    rows = torch.tensor([[0.0, 5.0], [1.0, 5.0], [2.0, 5.0], [3.0, 5.0]], dtype=torch.float64)
    weight, bias = _Probe(rows, torch.tensor([0, 0, 1, 1]), 2).fit(0.01, 100)
    assert weight.isfinite().all()
    assert (rows @ weight.T + bias).argmax(1).tolist() == [0, 0, 1, 1]


# --------------------------------------------------------------------- choices, on a real setting


KEPT = (0, 3, 9000)
"""Under what a setting keeps features: the backbone's seed, and the probe's two limits."""


def setting_with(evaluation: Evaluation, task: str, features: dict[str, CaseFeatures]) -> Setting:
    """Return the setting of one task whose backbone gave the features given."""
    setting = evaluation.setting(task, "random")
    setting._features = {(seed, *KEPT[1:]): features for seed in range(3)}
    return setting


def probe(evaluation: Evaluation, setting: Setting, task: str) -> list[Prediction]:
    cell = next(
        cell for cell in evaluation.cells()
        if (cell.task, cell.init, cell.protocol) == (task, "random", "linear_probe")
        and cell.label_fraction == 1
    )  # fmt: skip
    config = next(p for p in evaluation.section.protocols if p.name == "linear_probe")
    return LinearProbe(config).run(cell, setting, lambda step, metrics: None)


def chosen(predictions: list[Prediction]) -> set[str]:
    return {prediction.layer for prediction in predictions if prediction.selected}


def test_every_layer_answers_for_every_test_scan_and_one_is_chosen(evaluation: Evaluation):
    setting = evaluation.setting("classification", "random")
    predictions = probe(evaluation, setting, "classification")
    test = set(setting.scans_of(setting.splits.test))
    layers = {stage.name for stage in setting.new_backbone(0).stages}
    assert {(p.layer, p.scan_key) for p in predictions} == {(a, b) for a in layers for b in test}
    assert len(chosen(predictions)) == 1
    for prediction in predictions:
        assert sum(prediction.scores) == pytest.approx(1, abs=1e-5)
        assert prediction.target == setting.task.targets[prediction.scan_key]


def separable(setting: Setting) -> dict[str, CaseFeatures]:
    """Make two layers: one right on training and validation, the other on training and test."""
    sides = {side: setting.scans_of(getattr(setting.splits, side)) for side in ("val", "test")}
    features = {}
    for key, (target,) in setting.task.targets.items():
        sign = 2 * target - 1
        layers = {
            "right on test": torch.tensor([-sign if key in sides["val"] else sign]),
            "right on validation": torch.tensor([-sign if key in sides["test"] else sign]),
        }
        features[key] = CaseFeatures(key, layers, None)
    return features


def test_the_layer_is_chosen_on_validation_patients(evaluation: Evaluation):
    setting = evaluation.setting("classification", "random")
    setting._features[KEPT] = separable(setting)
    assert chosen(probe(evaluation, setting, "classification")) == {"right on validation"}


def test_the_strength_is_chosen_on_validation_patients(
    evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
):
    setting = evaluation.setting("classification", "random")
    setting._features[KEPT] = {
        key: CaseFeatures(key, {"only": torch.tensor([2 * target - 1])}, None)
        for key, (target,) in setting.task.targets.items()
    }

    def fit(self: Any, strength: float, max_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        sign = 1.0 if strength == 0.1 else -1.0  # every other strength answers wrongly
        return torch.tensor([[-sign], [sign]]), torch.zeros(2)

    monkeypatch.setattr(_Probe, "fit", fit)
    for prediction in probe(evaluation, setting, "classification"):
        assert prediction.scores[int(prediction.target[0])] > 0.5


def test_other_labels_of_test_scans_change_no_choice_and_no_answer(evaluation: Evaluation):
    setting = evaluation.setting("classification", "random")
    before = probe(evaluation, setting, "classification")
    test = set(setting.scans_of(setting.splits.test))
    task: Any = setting.task
    kept = task.targets
    try:
        task.targets = {key: (1 - t[0],) if key in test else t for key, t in kept.items()}
        again = evaluation.setting("classification", "random")
        after = probe(evaluation, again, "classification")
    finally:
        task.targets = kept
    assert [p.target for p in after] == [(1 - p.target[0],) for p in before]
    assert [replace(p, target=()) for p in after] == [replace(p, target=()) for p in before]


def test_other_masks_of_test_scans_change_no_choice(evaluation: Evaluation):
    setting = evaluation.setting("segmentation", "random")
    before = probe(evaluation, setting, "segmentation")
    for key in setting.scans_of(setting.splits.test):
        case = setting._features[KEPT][key]
        assert case.masks is not None
        setting._features[KEPT][key] = replace(case, masks=case.masks.flip(1))
    after = probe(evaluation, setting, "segmentation")
    assert chosen(after) == chosen(before)
    assert [p.scores for p in after] != [p.scores for p in before]


def test_training_uses_the_labelled_patients_alone(evaluation: Evaluation):
    setting = evaluation.setting("classification", "random")
    few = next(
        cell for cell in evaluation.cells()
        if cell.num_labelled_patients == 2 and cell.task == "classification"
    )  # fmt: skip
    scans = setting.labelled_scans(few)
    owners = {setting.store.entry(key).patient_key for key in scans}
    assert len(owners) == 2
    assert owners <= set(setting.splits.train)
    assert {setting.task.targets[key] for key in scans} == {(0.0,), (1.0,)}  # stratified


def test_features_are_computed_once_a_backbone(evaluation: Evaluation):
    setting = evaluation.setting("classification", "random")
    built = []
    new_backbone = setting.new_backbone
    setting.new_backbone = lambda seed: built.append(seed) or new_backbone(seed)
    for _ in range(2):
        probe(evaluation, setting, "classification")
    assert built == [0]
