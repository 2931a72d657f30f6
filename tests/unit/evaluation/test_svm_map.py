"""SVM mAP: scikit-learn's pipeline written out; the layer is chosen on validation patients."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer
from sklearn.svm import LinearSVC

from evaluations import give_features
from medssl.evaluation.features import CaseFeatures
from medssl.evaluation.protocols.base import Cell
from medssl.evaluation.protocols.svm_map import (
    Config,
    SvmMap,
    _one_answer,
    mean_average_precision,
    one_column_a_label,
)
from medssl.pipelines.cells import Evaluation


def cell_of(evaluation: Evaluation) -> Cell:
    return Cell("classification", "random", "svm_map", len(evaluation.splits.train), 1.0, 0)


@pytest.mark.parametrize("load", [load_breast_cancer, load_wine])
def test_cost_and_answers_are_those_of_scikit_learns_pipeline(load: Any):
    rows, classes = load(return_X_y=True)
    rows = (rows - rows.mean(0)) / rows.std(0)
    patients = np.array([f"p{number // 2}" for number in range(len(rows))])
    unit = Normalizer().fit_transform(rows)
    config = Config(costs=(0.01, 1.0, 100.0))
    for label in (0, 1):
        labels = (classes == label).astype(float)
        found = SvmMap(config)._fit(unit, labels, patients.tolist(), 5)
        assert found is not None

        def pipeline(cost: float) -> Any:
            weights = {False: 1, True: 2}
            return make_pipeline(
                Normalizer(), LinearSVC(C=cost, class_weight=weights, max_iter=2000, random_state=5)
            )

        folds = StratifiedGroupKFold(3, shuffle=True, random_state=5)
        scores = [
            cross_val_score(
                pipeline(cost), rows, labels > 0, groups=patients, cv=folds,
                scoring="average_precision",
            ).mean()
            for cost in config.costs
        ]  # fmt: skip
        best = config.costs[int(np.argmax(scores))]
        assert best == found.C
        wanted = pipeline(best).fit(rows, labels > 0)
        np.testing.assert_allclose(
            found.decision_function(unit), wanted.decision_function(rows), atol=1e-9
        )


def test_the_layer_is_chosen_on_validation_patients_and_told(evaluation: Evaluation):
    setting = evaluation.setting("classification", "random")
    val = set(setting.scans_of(setting.splits.val))
    features = {}
    for key, (target,) in setting.task.targets.items():
        sign = 2 * target - 1
        layers = {
            "wrong": torch.tensor([1.0, -sign if key in val else sign]),
            "right": torch.tensor([1.0, sign]),
        }
        features[key] = CaseFeatures(key, layers, None)
    give_features(setting, Config(), features)
    told: list[dict[str, float]] = []
    predictions = SvmMap(Config()).run(cell_of(evaluation), setting, lambda _, m: told.append(m))
    assert {p.layer for p in predictions if p.selected} == {"right"}
    assert told[1]["val/mean_average_precision"] == 1
    assert told[1]["cost_0"] in Config().costs
    answers = {
        target: [p.scores[1] for p in predictions if (p.layer, *p.target) == ("right", target)]
        for target in (0, 1)
    }
    assert max(answers[0]) < min(answers[1])


def test_mean_average_precision_is_scikit_learns_over_labels_that_are_known():
    generator = np.random.default_rng(0)
    targets = (generator.random((50, 4)) < 0.4).astype(float)
    scores = generator.random((50, 4))
    targets[:, 2] = 1  # always yes: leaves nothing to rank
    targets[:10, 3] = np.nan
    wanted = [
        average_precision_score(targets[:, 0], scores[:, 0]),
        average_precision_score(targets[:, 1], scores[:, 1]),
        average_precision_score(targets[10:, 3], scores[10:, 3]),
    ]
    assert mean_average_precision(targets, scores) == pytest.approx(np.mean(wanted), abs=1e-12)
    assert np.isnan(mean_average_precision(np.ones((3, 1)), np.ones((3, 1))))


def test_two_classes_are_one_separation_and_more_are_one_each():
    classes = np.array([[0.0], [1.0], [2.0]])
    assert one_column_a_label(classes[:2], "class", 2).tolist() == [[0], [1]]
    assert one_column_a_label(classes, "class", 3).tolist() == np.eye(3).tolist()
    assert one_column_a_label(classes, "labels", 1) is classes


def test_a_class_with_one_patient_gets_the_middle_cost():
    rows = np.eye(4)
    labels = np.array([1.0, 0.0, 0.0, np.nan])
    found = SvmMap(Config(costs=(0.01, 2.0, 100.0)))._fit(rows, labels, list("abcd"), 0)
    assert found is not None
    assert found.C == 2.0


def test_a_class_that_no_labelled_scan_shows_is_answered_by_no(evaluation: Evaluation):
    assert SvmMap(Config())._fit(np.eye(2), np.zeros(2), ["a", "b"], 0) is None
    unknown = np.array([np.nan, np.nan])
    answers = [_one_answer(np.array(labels)) for labels in ([0.0, np.nan], [1.0, 1.0], unknown)]
    assert answers == [-1, 1, 0]
    setting = evaluation.setting("classification", "random")
    task: Any = copy.copy(setting.task)
    task.classes = ("a", "b", "nobody's")
    other = replace(setting, task=task, _kept={})
    for prediction in SvmMap(Config(max_slices=3)).run(cell_of(evaluation), other, lambda *_: None):
        assert prediction.scores[2] == -1


def test_a_machine_that_does_not_converge_is_warned_of(caplog: pytest.LogCaptureFixture):
    rows, classes = load_breast_cancer(return_X_y=True)
    config = Config(costs=(100.0,), max_steps=1)
    SvmMap(config)._fit(rows, (classes == 1).astype(float), [str(i) for i in range(len(rows))], 0)
    assert caplog.text.endswith(
        "1 support vector machines on 569 rows had not converged after 1 steps. "
        "Raise max_steps, or leave out the largest costs.\n"
    )


def test_folds_keep_a_patients_scans_together(
    evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
):
    asked = []
    split = StratifiedGroupKFold.split

    def remember(self: Any, x: Any, y: Any = None, groups: Any = None) -> Any:
        asked.append(list(groups))
        return split(self, x, y, groups)

    monkeypatch.setattr(StratifiedGroupKFold, "split", remember)
    setting = evaluation.setting("classification", "random")
    SvmMap(Config()).run(cell_of(evaluation), setting, lambda *_: None)
    scans = setting.labelled_scans(cell_of(evaluation))
    assert asked[0] == [setting.store.entry(key).patient_key for key in scans]
