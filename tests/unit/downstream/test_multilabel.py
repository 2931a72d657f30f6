"""Multilabel: what the cells of a table mean, and that unknown labels count nowhere."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from labelled_scans import build_task, write_folder
from medssl.config import validate_config
from medssl.downstream.base import DownstreamBatch
from medssl.downstream.multilabel import Config, Multilabel
from medssl.errors import ConfigError, LabelError
from medssl.scans.index import Index
from medssl.transforms.sampling import Sample

NAN = math.nan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("scans")
    write_folder(place, 3)
    return place


def with_table(folder: Path, tmp_path: Path, text: str, **settings: Any) -> Multilabel:
    path = tmp_path / "labels.csv"
    path.write_text(text)
    config = Config(**{"label_columns": ("cyst", "bleeding"), "table": path, **settings})
    return Multilabel(config, 3, Index.open(folder / "index"))


def by_name(task: Multilabel, folder: Path) -> dict[str, list[str]]:
    """Return the labels of each file: 1, 0 or ? where unknown."""
    words = {1.0: "1", 0.0: "0"}
    index = Index.open(folder / "index")
    return {
        Path(path).name.split(".")[0]: "".join(words.get(v, "?") for v in task.targets[key])
        for key, path, _ in index.file_names()
        if key in task.targets
    }


@pytest.mark.parametrize(
    ("settings", "dora", "carla"),
    [
        ({}, "?0", "1?"),
        ({"uncertain": "yes"}, "10", "1?"),
        ({"uncertain": "no"}, "00", "1?"),
        ({"empty": "no"}, "?0", "10"),
    ],
)
def test_uncertain_and_empty_cells_mean_what_the_config_says(folder, settings, dora, carla):
    found = by_name(build_task("multilabel", folder, 3, **settings), folder)
    assert found["dora"] == dora
    assert found["carla"] == carla
    assert found["anna"] == "10"


def test_words_and_numbers_with_a_point_are_understood(folder, tmp_path):
    text = "scan,cyst,bleeding\nanna,yes,0.0\nberta,No,1.0\ncarla,TRUE,-1.0\ndora,false,1\n"
    found = by_name(with_table(folder, tmp_path, text), folder)
    assert found == {"anna": "10", "berta": "01", "carla": "1?", "dora": "01"}


def test_other_values_are_refused_and_counted_by_column(folder, tmp_path):
    text = "scan,cyst,bleeding\nanna,1,0\nberta,0,2\ncarla,maybe,1\ndora,0,3\n"
    with pytest.raises(LabelError, match=r"other values: 1 of 'cyst', 2 of 'bleeding'\. Mend"):
        with_table(folder, tmp_path, text)


def test_a_label_that_is_nowhere_no_is_refused(folder, tmp_path):
    text = "scan,cyst,bleeding\nanna,1,1\nberta,0,\ncarla,1,1\n"
    with pytest.raises(LabelError, match=r"cannot be evaluated: \['bleeding'\].*set empty: no"):
        with_table(folder, tmp_path, text)
    assert with_table(folder, tmp_path, text, empty="no").num_outputs == 2


def test_a_scan_of_which_nothing_is_known_has_no_label(folder, tmp_path):
    text = "scan,cyst,bleeding\nanna,1,0\nberta,0,1\ncarla,-1,-1\ndora,,\n"
    task = with_table(folder, tmp_path, text)
    assert set(by_name(task, folder)) == {"anna", "berta"}
    assert task.labels.num_labelled == 2
    # carla; and dora, emma, frida, which the table says nothing of
    assert task.labels.counts == {"rows_without_value": 1, "scans_without_label": 4}


def test_a_column_given_twice_is_refused():
    config = {"name": "multilabel", "table": "x.csv", "label_columns": ["a", "a"]}
    with pytest.raises(ConfigError, match="a label column is given twice"):
        validate_config(config, Config)


def batch(target: list[list[float]]) -> DownstreamBatch:
    return DownstreamBatch(torch.empty(0), torch.tensor(target))


def test_the_loss_is_the_cross_entropy_of_what_is_known(folder):
    task = build_task("multilabel", folder, 3)
    output = torch.tensor([[0.3, -2.0], [1.5, 0.2]], requires_grad=True)
    loss = task.loss(output, batch([[1.0, NAN], [NAN, 0.0]]))
    known = binary_cross_entropy_with_logits(torch.tensor([0.3, 0.2]), torch.tensor([1.0, 0.0]))
    assert float(loss.detach()) == pytest.approx(float(known))
    loss.backward()
    assert output.grad is not None
    assert output.grad[0, 1] == output.grad[1, 0] == 0


def test_a_batch_of_unknown_labels_has_no_loss_and_no_gradient(folder):
    output = torch.zeros(1, 2, requires_grad=True)
    loss = build_task("multilabel", folder, 3).loss(output, batch([[NAN, NAN]]))
    loss.backward()
    assert loss == 0
    assert output.grad is not None
    assert (output.grad == 0).all()


def test_accuracy_counts_what_is_known(folder):
    output = torch.tensor([[3.0, -1.0], [2.0, 5.0]])
    found = build_task("multilabel", folder, 3).metrics(output, batch([[1, NAN], [0, 1]]))
    assert float(found["accuracy"]) == pytest.approx(2 / 3)


def test_scores_are_the_mean_probabilities_of_the_slices(folder):
    task = build_task("multilabel", folder, 3)
    probabilities = torch.tensor([[0.9, 0.1], [0.3, 0.6]])
    assert task.case_scores(probabilities.logit(), None) == pytest.approx([0.6, 0.35])


def test_a_batch_carries_the_labels_of_its_scans(folder):
    task = build_task("multilabel", folder, 3)
    keys = sorted(task.targets)[:3]
    made = task.batch_of(Sample(torch.rand(3, 1, 4, 4, 4), None, keys), torch.Generator())
    wanted = torch.tensor([task.targets[key] for key in keys])
    torch.testing.assert_close(made.target, wanted, equal_nan=True)
    assert made.target.dtype == torch.float32


def test_splits_share_out_the_rarest_label_first(folder, tmp_path):
    text = "scan,cyst,bleeding\nanna,1,1\nberta,1,0\ncarla,1,0\ndora,0,0\n"
    task = with_table(folder, tmp_path, text)
    index = Index.open(folder / "index")
    names = {key: Path(path).name.split(".")[0] for key, path, _ in index.file_names()}
    found = {names[key]: task.stratum(key) for key in task.targets}
    assert found == {"anna": 1, "berta": 0, "carla": 0, "dora": -1}
