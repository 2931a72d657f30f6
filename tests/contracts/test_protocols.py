"""Every member of the protocol registry answers for every test scan, alike for every init."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from evaluations import make_evaluation
from medssl.config import ComponentConfig
from medssl.errors import ConfigError
from medssl.evaluation.protocols import PROTOCOLS
from medssl.evaluation.protocols.base import Cell, Prediction, Protocol
from medssl.pipelines.cells import Evaluation

QUICK: dict[str, dict[str, Any]] = {
    "fine_tune": {
        "training": {"steps": 2, "global_batch_size": 2, "log_every": 1}, "validation_slices": 2,
    },
    "low_shot": {"num_samples": 2},
}  # fmt: skip

every_protocol = pytest.mark.parametrize("name", PROTOCOLS.names())


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return make_evaluation(tmp_path_factory.mktemp("protocols"))


def config_of(name: str) -> ComponentConfig:
    return PROTOCOLS.config_class(name)(**QUICK.get(name, {}))


def run(evaluation: Evaluation, name: str, task: str = "classification") -> list[Prediction]:
    protocol: Protocol = PROTOCOLS.build(config_of(name))
    number = len(evaluation.splits.train)
    setting = evaluation.setting(task, "random")
    return protocol.run(Cell(task, "random", name, number, 1.0, 0), setting, lambda *_: None)


@every_protocol
def test_every_test_scan_is_answered_once_by_what_was_selected(evaluation, name):
    predictions = run(evaluation, name)
    setting = evaluation.setting("classification", "random")
    test = set(setting.scans_of(setting.splits.test))
    selected = Counter(
        (p.num_labelled_patients, p.seed, p.scan_key) for p in predictions if p.selected
    )
    assert set(selected.values()) == {1}
    groups = {key[:2] for key in selected}
    assert len(selected) == len(groups) * len(test)
    for prediction in predictions:
        assert prediction.scan_key in test
        assert len(prediction.scores) == 2
        assert prediction.target == setting.task.targets[prediction.scan_key]


@every_protocol
def test_the_same_cell_gives_the_same_answers(evaluation, name):
    assert run(evaluation, name) == run(evaluation, name)


@every_protocol
def test_test_labels_choose_nothing(evaluation, name):
    before = run(evaluation, name)
    task: Any = evaluation.tasks["classification"]
    setting = evaluation.setting("classification", "random")
    test, kept = set(setting.scans_of(setting.splits.test)), task.targets
    try:
        task.targets = {key: (1 - t[0],) if key in test else t for key, t in kept.items()}
        after = run(evaluation, name)
    finally:
        task.targets = kept
    assert [replace(p, target=()) for p in after] == [replace(p, target=()) for p in before]
    assert [p.target for p in after] != [p.target for p in before]


@every_protocol
def test_a_misspelt_setting_is_refused(name):
    with pytest.raises((ValueError, ConfigError)):
        PROTOCOLS.config_class(name)(**QUICK.get(name, {}), stepz=1)


@every_protocol
def test_the_budget_is_told_in_a_few_words(name):
    assert 0 < len(config_of(name).budget()) < 60
