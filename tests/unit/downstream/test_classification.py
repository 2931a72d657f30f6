"""Classification: labels by scan key, classes in order, probabilities of a case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from medssl.config import validate_config
from medssl.downstream.classification import Classification, Config
from medssl.errors import ConfigError, LabelError
from medssl.scans.building import IndexConfig, build_index
from medssl.scans.index import Index
from medssl.transforms.sampling import Sample
from samples import write_nifti
from training import tiny_backbone

NAMES = ("anna", "berta", "carla", "dora")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("scans")
    for number, name in enumerate(NAMES):
        write_nifti(folder / "images" / f"{name}.nii.gz", seed=number)
    return build_index(IndexConfig(folder=folder / "images", executor="local"), folder / "index")


def table(folder: Path, labels: Sequence[Any], names: tuple[str, ...] = NAMES) -> Path:
    path = folder / "labels.csv"
    rows = [f"{name}.nii.gz,{label}" for name, label in zip(names, labels, strict=False)]
    path.write_text("\n".join(["scan,label", *rows]) + "\n")
    return path


def task(index: Index, path: Path, **settings: Any) -> Classification:
    return Classification(Config(table=path, **settings), 3, index)


def classes_of(found: Classification, index: Index) -> dict[str, str]:
    """Return the class that each file got."""
    names = {key: path for key, path, _ in index.file_names() if key in found.targets}
    return {
        Path(names[key]).name.split(".")[0]: found.classes[int(number)]
        for key, (number,) in found.targets.items()
    }


def test_each_scan_gets_the_class_of_its_row(index: Index, tmp_path: Path):
    found = task(index, table(tmp_path, ["cyst", "solid", "cyst", "none"]))
    assert found.classes == ("cyst", "none", "solid")
    assert classes_of(found, index) == dict(
        zip(NAMES, ["cyst", "solid", "cyst", "none"], strict=True)
    )
    assert found.num_outputs == 3


def test_classes_may_be_given_in_another_order_and_unused_ones_too(index: Index, tmp_path: Path):
    path = table(tmp_path, ["cyst", "solid", "cyst", "cyst"])
    found = task(index, path, classes=("solid", "cyst", "rare"))
    assert found.classes == ("solid", "cyst", "rare")
    assert sorted(found.targets.values()) == [(0.0,), (1.0,), (1.0,), (1.0,)]


def test_whole_numbers_are_classes_without_a_point(index: Index, tmp_path: Path):
    found = task(index, table(tmp_path, [1, 0, "", 0]))  # a gap makes the column float
    assert found.classes == ("0", "1")
    assert len(found.targets) == 3


def test_scans_without_a_label_are_left_out(index: Index, tmp_path: Path):
    found = task(index, table(tmp_path, ["a", "b"]))
    assert len(found.targets) == 2


def test_a_column_of_one_class_is_refused(index: Index, tmp_path: Path):
    with pytest.raises(LabelError) as refused:
        task(index, table(tmp_path, ["a", "a", "a", "a"]))
    assert str(refused.value) == (
        "classification needs two classes or more; column 'label' holds 1. "
        "Check the labels, or the scans that were rejected."
    )


def test_a_value_that_is_none_of_the_classes_is_refused(index: Index, tmp_path: Path):
    with pytest.raises(LabelError) as refused:
        task(index, table(tmp_path, ["a", "b", "c", "d"]), classes=("a", "b"))
    assert str(refused.value) == (
        "2 values of column 'label' are not among the classes ['a', 'b']. "
        "Add them to classes, mend the labels, or leave such scans out (unlisted: leave_out)."
    )
    assert refused.value.exit_code == 3


def test_classes_that_are_patients_are_refused_since_reports_show_their_names(
    index: Index, tmp_path: Path
):
    with pytest.raises(LabelError) as refused:
        task(index, table(tmp_path, NAMES))
    assert str(refused.value).startswith("each of the 4 classes has scans of one patient alone")
    assert not any(name in str(refused.value) for name in NAMES)


def test_another_metric_than_the_three_is_refused(tmp_path: Path):
    with pytest.raises(
        ConfigError, match=r"metric: input should be 'auc', 'balanced_accuracy', 'acc"
    ):
        validate_config({"name": "classification", "table": "x.csv", "metric": "f1"}, Config)


def test_the_task_is_called_by_its_label(index: Index, tmp_path: Path):
    path = table(tmp_path, ["a", "b"])
    assert task(index, path).name == "classification"
    assert task(index, path, label="cyst_or_not").name == "cyst_or_not"


def test_a_batch_carries_the_classes_of_its_scans(index: Index, tmp_path: Path):
    found = task(index, table(tmp_path, ["a", "b", "a", "b"]))
    keys = [*found.targets, next(iter(found.targets))]
    images = torch.rand(5, 1, 8, 8, 8)
    made = found.batch_of(Sample(images, None, keys), torch.Generator())
    assert made.inputs is images
    assert made.target.tolist() == [list(found.targets[key]) for key in keys]


def test_the_network_gives_one_number_a_class(index: Index, tmp_path: Path):
    found = task(index, table(tmp_path, ["a", "b", "c", "b"]))
    backbone = tiny_backbone(3)
    keys = list(found.targets)
    made = found.batch_of(Sample(torch.rand(4, 1, 8, 8, 8), None, keys), torch.Generator())
    output = found.forward(backbone, found.build_head(backbone), made)
    assert output.shape == (4, 3)
    right = torch.nn.functional.one_hot(made.target[:, 0].long(), 3).float() * 50
    assert float(found.loss(right, made)) == pytest.approx(0, abs=1e-6)
    assert float(found.metrics(right, made)["accuracy"]) == 1
    assert float(found.metrics(right.roll(1, dims=1), made)["accuracy"]) == 0


def test_a_cases_scores_are_the_mean_probabilities_of_its_slices(index: Index, tmp_path: Path):
    found = task(index, table(tmp_path, ["a", "b"]))
    probabilities = torch.tensor([[0.9, 0.1], [0.3, 0.7]])
    assert found.case_scores(probabilities.log(), None) == pytest.approx([0.6, 0.4])


def test_the_class_may_be_the_folder_that_a_scan_lies_in(tmp_path: Path):
    for number, (kind, name) in enumerate((("cyst", "a"), ("solid", "a"), ("cyst", "b"))):
        write_nifti(tmp_path / "images" / kind / f"{name}.nii.gz", seed=number)
    write_nifti(tmp_path / "images" / "unsorted.nii.gz", seed=9)
    config = IndexConfig(folder=tmp_path / "images", executor="local")
    found = build_index(config, tmp_path / "index")
    task = Classification(Config(folder=tmp_path / "images"), 3, found)
    assert task.classes == ("cyst", "solid")
    assert sorted(task.targets.values()) == [(0.0,), (0.0,), (1.0,)]
    assert task.labels.counts == {"scans_without_label": 1}


def test_scans_may_be_sorted_by_files_of_their_names(index: Index, tmp_path: Path):
    for kind, name in (("cyst", "anna.txt"), ("solid", "berta.nii.gz"), ("solid", "nobody.nii")):
        (tmp_path / kind).mkdir(exist_ok=True)
        (tmp_path / kind / name.replace(".txt", ".nii.gz")).touch()
    found = Classification(Config(folder=tmp_path), 3, index)
    assert classes_of(found, index) == {"anna": "cyst", "berta": "solid"}
    assert found.labels.counts == {"files_without_scan": 1, "scans_without_label": 2}


def test_a_scan_in_two_folders_is_refused(index: Index, tmp_path: Path):
    for kind in ("cyst", "solid"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "anna.nii.gz").touch()
    with pytest.raises(LabelError, match=r"scan \w+ lies in the folders of two classes"):
        Classification(Config(folder=tmp_path), 3, index)


def test_folders_that_fit_no_scan_are_refused(index: Index, tmp_path: Path):
    with pytest.raises(LabelError, match="none of the 0 files in the folders of classes"):
        Classification(Config(folder=tmp_path), 3, index)
    with pytest.raises(ConfigError, match="no folder of classes at the path given"):
        Classification(Config(folder=tmp_path / "none"), 3, index)


@pytest.mark.parametrize("given", [{}, {"table": "x.csv", "folder": "y"}])
def test_labels_come_from_a_table_or_from_folders(given: dict[str, str]):
    with pytest.raises(ConfigError, match="give either table or folder"):
        validate_config({"name": "classification", **given}, Config)


def test_classes_that_are_not_listed_may_be_left_out(index: Index, tmp_path: Path):
    path = table(tmp_path, ["a", "b", "c", "b"])
    found = task(index, path, classes=("a", "b"), unlisted="leave_out")
    assert set(classes_of(found, index)) == {"anna", "berta", "dora"}
    assert found.labels.counts == {"left_out_classes": 1}
    assert found.labels.num_labelled == 3
    with pytest.raises(LabelError, match="column 'label' holds 0"):
        task(index, path, classes=("x", "y"), unlisted="leave_out")
