"""Cells of the tasks that are no classification: fine-tuned, and scored by the task's metric."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from evaluations import make_evaluation
from medssl.evaluation.baselines import Baselines
from medssl.evaluation.metrics import METRICS
from medssl.evaluation.protocols import PROTOCOLS
from medssl.pipelines.cells import Evaluation
from medssl.pipelines.gallery import _task_with_masks
from medssl.scans.points import voxel_of
from samples import PATIENT_ID

PATIENTS = [f"{PATIENT_ID}-{number}" for number in range(10)]


def write_labels(folder: Path) -> Path:
    rows = ["patient,age,cyst,bleeding"]
    for number, patient in enumerate(PATIENTS):
        rows.append(
            f"{patient},{40 + 3 * number},{number % 2},{'' if number == 4 else number // 5}"
        )
    path = folder / "table.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """Return slices of volumes with numbers and labels by patient."""
    place = tmp_path_factory.mktemp("flat")
    named = {"table": str(write_labels(place)), "by": "patient", "id_column": "patient"}
    return make_evaluation(
        place,
        tasks=[
            {"name": "regression", "label_column": "age", **named},
            {"name": "multilabel", "label_columns": ["cyst", "bleeding"], **named},
        ],
    )


@pytest.fixture(scope="module")
def solid(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """Return volumes, larger than the crop, with masks and their centroids."""
    place = tmp_path_factory.mktemp("solid")
    masks = {"masks": str(place / "archive" / "masks"), "classes": ["liver", "lesion"]}
    return make_evaluation(
        place,
        tasks=[{"name": "landmarks", "sigma_mm": 20, **masks}, {"name": "segmentation", **masks}],
        preprocessing={"spacing_mm": [9.0, 9.0, 20.0]},
        sampling={"crop_size": [16, 16, 8]},
        backbone={"name": "monai", "depth": 10, "spatial_dims": 3, "base_channels": 8},
    )


@pytest.mark.parametrize(
    ("where", "task", "num_scores"),
    [("flat", "regression", 1), ("flat", "multilabel", 2),
     ("solid", "landmarks", 2), ("solid", "segmentation", 2)],
)  # fmt: skip
def test_a_cell_predicts_every_test_scan(where, task, num_scores, request):
    evaluation = request.getfixturevalue(where)
    (cell,) = [
        cell
        for cell in evaluation.cells()
        if (cell.task, cell.init, cell.protocol) == (task, "random", "fine_tune")
        and cell.label_fraction == 1
    ]
    (config,) = [item for item in evaluation.section.protocols if item.name == "fine_tune"]
    setting = evaluation.setting(task, "random")
    predictions = PROTOCOLS.build(config).run(cell, setting, lambda step, metrics: None)
    assert [p.scan_key for p in predictions] == setting.scans_of(setting.splits.test)
    assert {len(p.scores) for p in predictions} == {num_scores}
    metric = METRICS[setting.task.metric]
    targets = setting.targets([p.scan_key for p in predictions])
    value = metric.compute(targets, np.array([p.scores for p in predictions]))
    assert math.isfinite(value)
    if task == "regression":
        assert value < 40  # in years; an answer in units of the deviation would be far off


def test_landmarks_have_a_baseline_that_looks_at_no_image(solid):
    setting = solid.setting("landmarks", "random")
    cell = next(c for c in solid.cells() if c.task == "landmarks" and c.label_fraction == 1)
    (predictions,) = Baselines(setting, pd.DataFrame()).run(cell).values()
    assert [p.scan_key for p in predictions] == setting.scans_of(setting.splits.test)
    train = setting.labelled_scans(cell)
    for prediction in predictions:
        entry = setting.store.entry(prediction.scan_key)
        shares = [
            voxel_of(tuple(point), setting.store.entry(key).affine) / setting.store.entry(key).shape
            for key in train
            for point in np.reshape(setting.task.targets[key], (-1, 3))[:1]
        ]
        guess = np.array(entry.affine) @ [*(np.mean(shares, axis=0) * entry.shape), 1]
        wanted = np.linalg.norm(guess[:3] - prediction.target[:3])
        assert prediction.scores[0] == pytest.approx(wanted)


def test_a_gallery_is_of_regions_and_passes_over_points(solid):
    task, _ = _task_with_masks(solid, None)
    assert list(solid.tasks) == ["landmarks", "segmentation"]
    assert task.name == "segmentation"


def test_numbers_are_learnt_on_the_scale_of_the_cells_own_patients(flat, monkeypatch):
    """Two labelled patients: their mean, and nobody else's, is where the network starts from."""
    asked: list[list[str]] = []
    task = flat.tasks["regression"]
    original = type(task).for_training

    def noting(self, scan_keys):
        asked.append(list(scan_keys))
        return original(self, scan_keys)

    monkeypatch.setattr(type(task), "for_training", noting)
    cell = next(
        cell
        for cell in flat.cells()
        if (cell.task, cell.protocol, cell.num_labelled_patients) == ("regression", "fine_tune", 2)
    )
    (config,) = [item for item in flat.section.protocols if item.name == "fine_tune"]
    short = config.training.model_copy(update={"steps": 1})
    config = config.model_copy(update={"training": short})
    setting = dataclasses.replace(flat.setting("regression", cell.init))
    PROTOCOLS.build(config).run(cell, setting, lambda step, metrics: None)
    assert asked == [setting.labelled_scans(cell)]
    assert len(asked[0]) == 2
