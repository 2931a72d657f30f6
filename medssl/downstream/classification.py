"""Classification: one class a scan, from a table of labels or from folders named by class."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import model_validator
from torch import Tensor
from torch.nn import functional

from medssl.downstream._per_scan import ScanTask
from medssl.downstream.base import DownstreamBatch, DownstreamConfig
from medssl.errors import LabelError
from medssl.scans.index import Index
from medssl.scans.labels import By, LabelTable, read_class_folders, read_label_table

_FEW_CLASSES = 3
"""So few may have one patient each by chance, in a trial."""


class Config(DownstreamConfig):
    """Configuration of a classification task; give either ``table`` or ``folder``.

    Attributes:
        table: CSV or Parquet file with one row a scan, series or patient.
        by: what the rows of the table are about.
        id_column: the column that names the scan's file, the series or the patient.
        label_column: the column that holds the class.
        folder: holds one folder a class, and the scans, or files of their names, lie in these.
        classes: the classes in order; sorted from the labels by default.
        unlisted: what becomes of a class that is none of ``classes``: the run is refused, or such
            scans are left out (and counted).
        metric: the primary metric, fixed before anything runs.
    """

    name: Literal["classification"] = "classification"
    table: Path | None = None
    by: By = "scan"
    id_column: str = "scan"
    label_column: str = "label"
    folder: Path | None = None
    classes: tuple[str, ...] | None = None
    unlisted: Literal["refuse", "leave_out"] = "refuse"
    metric: Literal["auc", "balanced_accuracy", "accuracy", "average_precision"] = "auc"

    @model_validator(mode="after")
    def _one_source(self) -> Config:
        if (self.table is None) == (self.folder is None):
            raise ValueError("give either table or folder")
        return self


class Classification(ScanTask):
    """Predict the class of a scan."""

    kind = "classification"
    answer = "class"

    def __init__(self, config: Config, spatial_dims: int, index: Index) -> None:
        super().__init__(config, spatial_dims, index)
        labels = _read(config, index)
        names = {scan_key: _class_name(label) for scan_key, label in labels.items()}
        where = f"column {config.label_column!r}" if config.table else "the folders of classes"
        self.labels = labels.report
        self.classes = config.classes or tuple(sorted(set(names.values())))
        unlisted = {key for key, name in names.items() if name not in self.classes}
        if unlisted and config.unlisted == "refuse":
            raise LabelError(
                f"{len({names[key] for key in unlisted})} values of {where} are not among the "
                f"classes {list(self.classes)}. Add them to classes, mend the labels, or leave "
                "such scans out (unlisted: leave_out)."
            )
        self.labels.note_keys("left_out_classes", unlisted)
        self.labels.num_labelled -= len(unlisted)
        names = {key: name for key, name in names.items() if key not in unlisted}
        if len(self.classes) < 2 or not names:
            raise LabelError(
                f"classification needs two classes or more; {where} holds "
                f"{len(set(names.values()))}. Check the labels, or the scans that were rejected."
            )
        _check_no_patients(index, names)
        self.metric = config.metric
        self.targets: Mapping[str, tuple[float, ...]] = {
            scan_key: (float(self.classes.index(name)),) for scan_key, name in names.items()
        }

    def loss(self, output: Tensor, batch: DownstreamBatch) -> Tensor:
        return functional.cross_entropy(output.float(), _class_of(batch))

    def metrics(self, output: Tensor, batch: DownstreamBatch) -> dict[str, Tensor]:
        return {"accuracy": (output.argmax(1) == _class_of(batch)).float().mean()}

    def case_scores(self, logits: Tensor, masks: Tensor | None) -> list[float]:
        """Return the class probabilities, the mean over the slices of the scan."""
        probabilities: list[float] = logits.float().softmax(1).mean(0).tolist()
        return probabilities


def _class_of(batch: DownstreamBatch) -> Tensor:
    """Return the class numbers (B,) int64."""
    return batch.target[:, 0].long()


def _read(config: Config, index: Index) -> LabelTable:
    if config.folder is not None:
        return read_class_folders(index, config.folder)
    if config.table is None:
        raise ValueError("neither table nor folder")
    return read_label_table(
        index,
        config.table,
        by=config.by,
        id_column=config.id_column,
        label_column=config.label_column,
    )


def _check_no_patients(index: Index, classes: Mapping[str, str]) -> None:
    """Refuse classes that are patients: their names would stand in tables and reports.

    Args:
        index: the scans.
        classes: by scan key.

    Raises:
        LabelError: every class holds the scans of one patient.
    """
    owners = dict(zip(index.accepted["scan_key"], index.accepted["patient_key"], strict=True))
    patients: dict[str, set[str]] = defaultdict(set)
    for scan_key, name in classes.items():
        patients[name].add(owners[scan_key])
    if len(patients) > _FEW_CLASSES and all(len(each) == 1 for each in patients.values()):
        raise LabelError(
            f"each of the {len(patients)} classes has scans of one patient alone, as if they were "
            "named after patients, and names of classes are shown in reports. Give folders, or a "
            "column, of classes."
        )


def _class_name(label: str | float) -> str:
    """Return a class's name; 1.0 (a column of whole numbers with a gap) is the class 1."""
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    return str(label)
