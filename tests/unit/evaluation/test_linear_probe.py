"""The linear probe: what is chosen, on which patients, and that nothing is solved twice."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from evaluations import Labels, give_features, with_task
from medssl.evaluation.features import CaseFeatures
from medssl.evaluation.protocols import _dense_probe, linear_probe
from medssl.evaluation.protocols.base import Cell, Prediction, Setting
from medssl.evaluation.protocols.linear_probe import Config, LinearProbe
from medssl.pipelines.cells import Evaluation


def cell_of(evaluation: Evaluation, task: str, number: int | None = None, seed: int = 0) -> Cell:
    number = number or len(evaluation.splits.train)
    fraction = number / len(evaluation.splits.train)
    return Cell(task, "random", "linear_probe", number, fraction, seed)


def configured(evaluation: Evaluation) -> Config:
    return next(p for p in evaluation.section.protocols if p.name == "linear_probe")


def probe(
    evaluation: Evaluation, setting: Setting, task: str, config: Config | None = None
) -> list[Prediction]:
    config = config or configured(evaluation)
    return LinearProbe(config).run(cell_of(evaluation, task), setting, lambda *_: None)


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
    give_features(setting, configured(evaluation), separable(setting))
    assert chosen(probe(evaluation, setting, "classification")) == {"right on validation"}


def test_the_strength_is_chosen_on_validation_patients(
    evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
):
    setting = evaluation.setting("classification", "random")
    features = {
        key: CaseFeatures(key, {"only": torch.tensor([2 * target - 1])}, None)
        for key, (target,) in setting.task.targets.items()
    }
    config = configured(evaluation)
    give_features(setting, config, features)
    fit = linear_probe.fit

    def only_the_weakest_is_right(*given: Any) -> Any:
        models = fit(*given)
        signs = torch.tensor([-1.0, 1.0])  # the strongest comes first
        return replace(models, coordinates=models.coordinates * signs[:, None, None])

    monkeypatch.setattr(linear_probe, "fit", only_the_weakest_is_right)
    told: list[dict[str, float]] = []
    predictions = LinearProbe(config).run(
        cell_of(evaluation, "classification"), setting, lambda _, metrics: told.append(metrics)
    )
    for prediction in predictions:
        assert prediction.scores[int(prediction.target[0])] > 0.5
    assert told == [{"val/score": 1.0, "strength": 0.001, "strength_at_end": 1.0}]


def test_a_strength_at_the_end_of_the_grid_is_told(
    evaluation: Evaluation, caplog: pytest.LogCaptureFixture
):
    setting = evaluation.setting("classification", "random")
    config = configured(evaluation).model_copy(update={"strengths": (1e5, 1e4)})
    with caplog.at_level(logging.INFO):
        probe(evaluation, setting, "classification", config)
    assert caplog.messages[0].endswith(
        "is at the end of the grid. A wider grid (strengths) may do better."
    )
    assert caplog.messages[0].startswith("classification-random-linear_probe-n")


def test_strengths_must_be_positive():
    with pytest.raises(ValueError, match="strengths must be above 0"):
        Config(strengths=(0.0, 1.0))


def test_predictions_are_those_of_scikit_learn_with_the_strength_of_least_loss(
    evaluation: Evaluation,
):
    setting = evaluation.setting("classification", "random")
    config = Config(strengths=(1e-4, 1e-3, 1e-2), max_slices=3)
    found = probe(evaluation, setting, "classification", config)
    features = setting.features(cell_of(evaluation, "classification"), 3, 9000)
    sides = {
        side: setting.scans_of(getattr(setting.splits, side)) for side in ("train", "val", "test")
    }
    for layer in dict.fromkeys(prediction.layer for prediction in found):
        rows = {
            side: np.stack([features[key].layers[layer].numpy() for key in keys]).astype(float)
            for side, keys in sides.items()
        }
        scaler = StandardScaler().fit(rows["train"])
        rows = {side: scaler.transform(part) for side, part in rows.items()}
        classes = {side: setting.targets(keys) for side, keys in sides.items()}
        fits = [
            LogisticRegression(C=1 / (strength * rows["train"].size), tol=1e-9, max_iter=9999).fit(
                rows["train"], classes["train"]
            )
            for strength in config.strengths
        ]
        ranks = []
        for one in fits:
            shares = one.predict_proba(rows["val"])
            loss = -np.log([share[int(c)] for share, c in zip(shares, classes["val"], strict=True)])
            ranks.append((setting.score(sides["val"], shares), -loss.mean()))
        best = fits[ranks.index(max(ranks))]
        ours = [prediction.scores for prediction in found if prediction.layer == layer]
        np.testing.assert_allclose(ours, best.predict_proba(rows["test"]), atol=1e-3)


def test_seeds_that_share_all_labels_are_solved_once(
    evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
):
    setting = evaluation.setting("classification", "random")
    setting.seeded_init = False
    solved = []
    fit = linear_probe.fit
    monkeypatch.setattr(
        linear_probe, "fit", lambda space, *rest: solved.append(space) or fit(space, *rest)
    )
    protocol = LinearProbe(configured(evaluation))
    layers = len(setting.new_backbone(0).stages)
    first, second = (
        protocol.run(cell_of(evaluation, "classification", seed=seed), setting, lambda *_: None)
        for seed in (0, 1)
    )
    assert first == second
    assert len(solved) == layers
    protocol.run(cell_of(evaluation, "classification", 3, seed=1), setting, lambda *_: None)
    assert len(solved) == 2 * layers


def test_labels_are_probed_one_by_one_and_unknown_ones_have_no_say(evaluation: Evaluation):
    setting = evaluation.setting("classification", "random")
    targets = {
        key: (target, 1 - target, float("nan")) for key, (target,) in setting.task.targets.items()
    }
    unknown = setting.scans_of(setting.splits.train)[0]
    told = with_task(setting, Labels("labels", targets))
    single = with_task(setting, Labels("labels", {key: t[:1] for key, t in targets.items()}))
    config = Config(strengths=(0.01,), max_slices=3)
    three, one = (probe(evaluation, each, "classification", config) for each in (told, single))
    for several, alone in zip(three, one, strict=True):
        assert several.scores[0] == pytest.approx(alone.scores[0], abs=1e-4)
        assert several.scores[0] + several.scores[1] == pytest.approx(1, abs=1e-4)
        assert several.scores[2] == 0.5
    lies = {key: ((float("nan"), *t[1:]) if key == unknown else t) for key, t in targets.items()}
    other = probe(evaluation, with_task(setting, Labels("labels", lies)), "classification", config)
    assert [p.scores[1] for p in other] == pytest.approx([p.scores[1] for p in three], abs=1e-5)


def test_numbers_are_answered_by_a_ridge_regression(evaluation: Evaluation):
    setting = evaluation.setting("classification", "random")
    keys = setting.scans_of([*setting.splits.train, *setting.splits.val, *setting.splits.test])
    targets = {key: (float(number),) for number, key in enumerate(keys)}
    features = {
        key: CaseFeatures(key, {"only": torch.tensor([target / 3 + 7, 0.0])}, None)
        for key, (target,) in targets.items()
    }
    numbers = with_task(setting, Labels("numbers", targets))
    config = Config(strengths=(1e-6, 1e-1))
    give_features(numbers, config, features)
    for prediction in probe(evaluation, numbers, "classification", config):
        assert prediction.scores[0] == pytest.approx(prediction.target[0], abs=1e-3)


@pytest.mark.parametrize("kind", ["sqrt", "balanced"])
def test_rare_classes_of_voxels_can_count_more(evaluation: Evaluation, kind: Any):
    classes = torch.tensor([0] * 16 + [1] * 4 + [2])
    counts = torch.stack(
        [_dense_probe._weights(classes, 3, kind)[classes == c].sum() for c in range(3)]
    )
    wanted = [4.0, 2.0, 1.0] if kind == "sqrt" else [1.0, 1.0, 1.0]
    assert counts.tolist() == pytest.approx(wanted)
    weighted = configured(evaluation).model_copy(update={"class_weights": kind})
    plain = configured(evaluation).model_copy(update={"class_weights": "none"})
    setting = evaluation.setting("segmentation", "random")
    alike, unlike = (probe(evaluation, setting, "segmentation", each) for each in (plain, weighted))
    assert [p.scores for p in alike] != [p.scores for p in unlike]


def test_voxels_that_pad_a_case_do_not_count(evaluation: Evaluation):
    setting = evaluation.setting("segmentation", "random")
    masks = torch.zeros(1, 4, 6, 6, dtype=torch.long)
    masks[:, :, 1:4] = 1
    maps = {"stage": torch.ones(1, 1, 4, 6, 6)}
    case = CaseFeatures("scan", maps, masks, ((0, 0), (1, 2), (0, 0)))
    organ = torch.eye(setting.task.num_outputs)[1]
    scores = _dense_probe._case_scores(case, "stage", (organ[:, None], organ), setting)
    assert scores[0] == 1


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
    features = setting.features(cell_of(evaluation, "segmentation"), 3, 9000)
    for key in setting.scans_of(setting.splits.test):
        assert features[key].masks is not None
        features[key] = replace(features[key], masks=features[key].masks.flip(1))
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
