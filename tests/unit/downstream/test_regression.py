"""Regression: numbers of a table, learnt in units of the training scans' spread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from labelled_scans import build_task, write_folder
from medssl.downstream.base import DownstreamBatch
from medssl.downstream.regression import Config, Regression
from medssl.errors import LabelError
from medssl.scans.index import Index
from training import tiny_backbone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("scans")
    write_folder(place, 3)
    return place


def with_ages(folder: Path, tmp_path: Path, *ages: Any) -> Regression:
    names = ("anna", "berta", "carla", "dora", "emma", "frida")
    path = tmp_path / "labels.csv"
    rows = [f"{name},{age}" for name, age in zip(names, ages, strict=False)]
    path.write_text("\n".join(["scan,label", *rows]) + "\n")
    return Regression(Config(table=path), 3, Index.open(folder / "index"))


def test_each_scan_gets_its_number(folder):
    task = build_task("regression", folder, 3)
    assert sorted(task.targets.values()) == [(33,), (40,), (48.25,), (55,), (61.5,), (72,)]


@pytest.mark.parametrize("wrong", ["old", "inf", "1e999"])
def test_what_is_no_finite_number_is_refused_and_counted(folder, tmp_path, wrong):
    with pytest.raises(LabelError, match=r"1 of 3 labels in column 'label' are not finite numb"):
        with_ages(folder, tmp_path, 50, wrong, 60)


def test_empty_cells_are_no_label(folder, tmp_path):
    task = with_ages(folder, tmp_path, 50, "", 60, "nan", 61)
    assert sorted(task.targets.values()) == [(50,), (60,), (61,)]
    assert task.labels.counts["rows_without_value"] == 2


def test_numbers_that_are_all_the_same_are_refused(folder, tmp_path):
    with pytest.raises(LabelError, match="all 2 labels in column 'label' are the same number"):
        with_ages(folder, tmp_path, 50, 50.0)


def test_the_scale_is_that_of_the_training_scans_alone(folder):
    task = build_task("regression", folder, 3)
    keys = sorted(task.targets)[:3]
    trained = task.for_training(keys)
    numbers = np.array([task.targets[key][0] for key in keys])
    assert trained.mean == pytest.approx(numbers.mean())
    assert trained.deviation == pytest.approx(numbers.std())
    others = {key: (value if key in keys else (1e6,)) for key, value in task.targets.items()}
    task.targets = others
    again = task.for_training(keys)
    assert (again.mean, again.deviation) == (trained.mean, trained.deviation)


def test_the_task_itself_learns_nothing_from_being_asked(folder):
    task = build_task("regression", folder, 3)
    task.for_training(sorted(task.targets))
    assert task.mean is None
    with pytest.raises(ValueError, match="call for_training with the training scans first"):
        task.build_head(tiny_backbone(3))


def test_a_head_that_answers_zero_gives_the_mean(folder):
    task = build_task("regression", folder, 3)
    task = task.for_training(sorted(task.targets))
    backbone = tiny_backbone(3)
    head = task.build_head(backbone)
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    images = torch.rand(2, 1, 8, 8, 8)
    answer = task.forward(backbone, head, DownstreamBatch(images, images))
    assert answer.flatten().tolist() == pytest.approx([task.mean] * 2)


def test_one_training_scan_keeps_the_unit(folder):
    task = build_task("regression", folder, 3)
    assert task.for_training(sorted(task.targets)[:1]).deviation == 1


def test_the_scale_is_kept_with_the_heads_weights(folder):
    task = build_task("regression", folder, 3)
    keys = sorted(task.targets)
    backbone = tiny_backbone(3)
    first, second = (task.for_training(part).build_head(backbone) for part in (keys[:3], keys[3:]))
    second.load_state_dict(first.state_dict())
    x = torch.rand(2, backbone.stages[-1].channels)
    assert torch.equal(first(x), second(x))


def test_the_loss_does_not_depend_on_the_unit(folder, tmp_path):
    losses = []
    for factor in (1, 365.25):
        task = with_ages(folder, tmp_path, *(factor * age for age in (50, 40, 60, 80)))
        task = task.for_training(sorted(task.targets))
        target = torch.tensor([[50.0], [80.0]]) * factor
        output = torch.tensor([[55.0], [60.0]]) * factor
        losses.append(float(task.loss(output, DownstreamBatch(output, target))))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_errors_are_told_in_the_unit_of_the_table(folder):
    task = build_task("regression", folder, 3)
    output, target = torch.tensor([[55.0], [60.0]]), torch.tensor([[50.0], [80.0]])
    assert float(task.metrics(output, DownstreamBatch(output, target))["mae"]) == 12.5
    assert task.case_scores(output, None) == [57.5]


def test_quarters_of_the_numbers_are_strata(folder):
    task = build_task("regression", folder, 3)
    ordered = sorted(task.targets, key=lambda key: task.targets[key])
    strata = [task.stratum(key) for key in ordered]
    assert strata == sorted(strata)
    assert set(strata) == {0, 1, 2, 3}
