"""Nearest neighbours: who votes, with what weight, and that validation chooses how many."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from evaluations import Labels, give_features, with_task
from medssl.evaluation.features import CaseFeatures
from medssl.evaluation.protocols.base import Cell, Setting
from medssl.evaluation.protocols.knn import KNN, Config, vote
from medssl.pipelines.cells import Evaluation


def cell_of(evaluation: Evaluation) -> Cell:
    return Cell("classification", "random", "knn", len(evaluation.splits.train), 1.0, 0)


def given(setting: Setting, config: Config, **layers: dict[str, list[float]]) -> None:
    """Let the backbone have given vectors, by layer and scan."""
    features = {
        key: CaseFeatures(
            key, {name: torch.tensor(rows[key]) for name, rows in layers.items()}, None
        )
        for key in setting.task.targets
    }
    give_features(setting, config, features)


@pytest.mark.parametrize("number", [1, 10, 100])
def test_the_vote_is_scikit_learns_with_these_weights(number: int):
    rows, classes = load_digits(return_X_y=True)
    theirs = KNeighborsClassifier(
        number, metric="cosine", algorithm="brute", weights=lambda far: np.exp((1 - far) / 0.1)
    ).fit(rows[:1000], classes[:1000])
    known = torch.nn.functional.one_hot(torch.tensor(classes[:1000])).double()
    found = vote(torch.tensor(rows[1000:]), torch.tensor(rows[:1000]), known, number, 0.1)
    np.testing.assert_allclose(found, theirs.predict_proba(rows[1000:]), atol=1e-9)


def test_a_neighbour_that_does_not_know_has_no_say():
    rows = torch.eye(3)
    nan = float("nan")
    known = torch.tensor([[nan, 1.0, nan], [0.0, 0.0, nan], [1.0, 1.0, nan]], dtype=torch.float64)
    two = vote(torch.tensor([[1.0, 0.5, 0.0]]), rows, known, 2, 0.1)[0]
    assert two[0] == 0  # the nearest does not know
    assert two[1] > 0.5
    assert two[2] == 0.5  # nobody knows
    assert vote(torch.tensor([[1.0, 0.5, 0.0]]), rows, known, 1, 0.1)[0, 0] == 0.5  # all that know


def test_number_and_layer_are_chosen_on_validation_patients(evaluation: Evaluation):
    setting = evaluation.setting("classification", "random")
    val = set(setting.scans_of(setting.splits.val))
    sign = {key: 2 * target - 1 for key, (target,) in setting.task.targets.items()}
    config = Config(num_neighbours=(1, 500), temperature=1e6)
    given(
        setting,
        config,
        right={key: [1.0, 2 * sign[key]] for key in sign},
        wrong={key: [1.0, (-2 if key in val else 2) * sign[key]] for key in sign},
    )
    told: list[dict[str, float]] = []
    predictions = KNN(config).run(cell_of(evaluation), setting, lambda _, m: told.append(m))
    assert {p.layer for p in predictions if p.selected} == {"right"}
    assert told[0] == {"val/score": 1.0, "num_neighbours": 1.0}  # all together know nothing
    for prediction in predictions:
        if prediction.layer == "right":
            assert prediction.scores[int(prediction.target[0])] == 1
    assert len(predictions) == 2 * len(setting.scans_of(setting.splits.test))


def test_more_neighbours_than_labelled_scans_are_all_of_them(evaluation: Evaluation):
    setting = evaluation.setting("classification", "random")
    told: list[dict[str, float]] = []
    KNN(Config()).run(cell_of(evaluation), setting, lambda _, m: told.append(m))
    number = len(setting.labelled_scans(cell_of(evaluation)))
    assert number < 10
    assert {metrics["num_neighbours"] for metrics in told} == {number}


def test_numbers_are_answered_by_a_weighted_mean(evaluation: Evaluation):
    setting = evaluation.setting("classification", "random")
    targets = dict.fromkeys(setting.task.targets, (3.0,))
    numbers = with_task(setting, Labels("numbers", targets))
    given(numbers, Config(), only={key: [1.0, 0.5] for key in targets})
    for prediction in KNN(Config()).run(cell_of(evaluation), numbers, lambda *_: None):
        assert prediction.scores == pytest.approx((3.0,))


def test_numbers_of_neighbours_are_positive():
    with pytest.raises(ValueError, match="num_neighbours must be 1 or more"):
        Config(num_neighbours=(0, 10))
