"""Trivial baselines: they answer where the answer is trivial, and only then."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from evaluations import make_evaluation
from medssl.evaluation import baselines
from medssl.evaluation.baselines import (
    ACQUISITION,
    HISTOGRAM,
    INTENSITY,
    POSITION,
    PRIOR,
    SIZE,
    Baselines,
    acquisition_features,
)
from medssl.evaluation.metrics import METRICS
from medssl.evaluation.protocols.base import Cell, Prediction
from medssl.pipelines import baselines as pipeline
from medssl.pipelines.cells import Evaluation
from medssl.pipelines.sections import StatisticsConfig
from stores import make_store, numbered_volume


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return make_evaluation(tmp_path_factory.mktemp("baselines"))


def answers(evaluation: Evaluation, task: str) -> dict[str, list[Prediction]]:
    setting = evaluation.setting(task, "random")
    found = Baselines(setting, acquisition_features(evaluation.index.accepted))
    return found.run(whole_cell(evaluation, task))


def whole_cell(evaluation: Evaluation, task: str) -> Cell:
    """Return a cell that may use every training label."""
    return next(c for c in evaluation.cells() if c.task == task and c.label_fraction == 1)


def area(predictions: list[Prediction]) -> float:
    targets = np.array([p.target[0] for p in predictions])
    return METRICS["auc"].compute(targets, np.array([p.scores for p in predictions]))


def test_every_baseline_answers_for_every_test_scan(evaluation: Evaluation):
    setting = evaluation.setting("classification", "random")
    test = setting.scans_of(setting.splits.test)
    found = answers(evaluation, "classification")
    assert set(found) == {PRIOR, HISTOGRAM, SIZE, ACQUISITION}
    for predictions in found.values():
        assert [p.scan_key for p in predictions] == test
        assert all(sum(p.scores) == pytest.approx(1) for p in predictions)


def test_slices_and_volumes_of_one_index_have_sizes_that_compare(tmp_path):
    images = {"a1": numbered_volume((5, 6)), "b1": numbered_volume((5, 6, 7))}
    setting: Any = SimpleNamespace(store=make_store(tmp_path, images))
    flat, deep = (baselines._look(setting, key)[1] for key in images)
    assert flat[:4].tolist() == [5, 6, 0, 30]
    assert deep[:4].tolist() == [5, 6, 7, 210]


def test_the_prior_tells_nothing_apart(evaluation: Evaluation):
    assert area(answers(evaluation, "classification")[PRIOR]) == 0.5


@pytest.mark.parametrize("name", [HISTOGRAM, SIZE, ACQUISITION])
def test_a_class_that_one_trivial_feature_tells_is_found_by_it(evaluation: Evaluation, name: str):
    setting = evaluation.setting("classification", "random")
    found = Baselines(setting, acquisition_features(evaluation.index.accepted))
    targets = setting.task.targets
    for kind, features in found._features.items():
        for key, row in features.items():
            told = np.zeros_like(row)  # nothing else may tell
            told[0] = targets[key][0] if kind == name else 0
            features[key] = told
    made = found.run(whole_cell(evaluation, "classification"))
    assert area(made[name]) == 1
    others = {HISTOGRAM, SIZE, ACQUISITION} - {name}
    assert {area(made[other]) for other in others} == {0.5}


def test_segmentation_is_answered_by_intensity_and_by_place(evaluation: Evaluation):
    found = answers(evaluation, "segmentation")
    assert set(found) == {INTENSITY, POSITION}
    for predictions in found.values():
        dice = np.array([p.scores for p in predictions])
        assert np.nanmin(dice) >= 0
        assert np.nanmax(dice) <= 1


def test_a_structure_of_its_own_intensity_is_found_by_intensity(evaluation: Evaluation):
    setting = evaluation.setting("segmentation", "random")
    found = Baselines(setting, acquisition_features(evaluation.index.accepted))

    def painted(key: str) -> tuple[np.ndarray, np.ndarray]:
        _, mask = Baselines._case(found, key)
        return (0.1 + 0.3 * mask).astype(np.float32), mask

    found._case = painted  # type: ignore[method-assign]
    made = found.run(whole_cell(evaluation, "segmentation"))
    assert np.nanmin([p.scores for p in made[INTENSITY]]) == 1


def test_a_structure_that_is_always_in_one_place_is_found_by_place(evaluation: Evaluation):
    setting = evaluation.setting("segmentation", "random")
    found = Baselines(setting, acquisition_features(evaluation.index.accepted))

    def placed(key: str) -> tuple[np.ndarray, np.ndarray]:
        image, mask = Baselines._case(found, key)
        mask = np.zeros_like(mask)
        mask[: mask.shape[0] // 2] = 1
        mask[mask.shape[0] // 2 :, : mask.shape[1] // 2] = 2
        return image, mask

    found._case = placed  # type: ignore[method-assign]
    made = found.run(whole_cell(evaluation, "segmentation"))
    assert np.nanmin([p.scores for p in made[POSITION]]) > 0.95


def test_how_far_inits_are_ahead_is_tabulated_with_intervals(evaluation: Evaluation, tmp_path):
    pipeline.run(evaluation, tmp_path)
    trivial = pd.read_parquet(tmp_path / pipeline.PREDICTIONS_FILE)
    prior = trivial[trivial["init"] == PRIOR]
    perfect = prior.assign(
        init="perfect", protocol="fine_tune", backbone="monai",
        scores=[[float(t == n) for n in range(2)] for t in prior["target"]],
    )  # fmt: skip
    no_better = prior.assign(init="no better", protocol="fine_tune", backbone="monai")
    statistics = StatisticsConfig(reference="perfect", num_resamples=500)
    metrics = evaluation.metrics()
    table = pipeline.tabulate(tmp_path, pd.concat([perfect, no_better]), statistics, metrics)
    assert table is not None
    of_prior = table[table["baseline"] == PRIOR]
    assert set(of_prior["init"]) == {"perfect"}
    assert set(of_prior["effect"]) == {0.5}
    table = pipeline.tabulate(tmp_path, no_better, statistics, metrics)
    assert table is not None
    assert table[table["baseline"] == PRIOR]["is_close"].all()


def test_a_run_without_baselines_has_no_table(tmp_path):
    assert pipeline.tabulate(tmp_path, pd.DataFrame(), StatisticsConfig(), {}) is None
