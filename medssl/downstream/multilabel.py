"""Multilabel: several labels a scan, each yes or no, some of them unknown, from a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional

from medssl.downstream._per_scan import ScanTask
from medssl.downstream.base import DownstreamBatch, TableConfig
from medssl.errors import LabelError
from medssl.scans.index import Index
from medssl.scans.label_report import LabelReport
from medssl.scans.labels import read_label_columns

_MEANING = {
    "1": 1.0, "yes": 1.0, "true": 1.0, "y": 1.0,
    "0": 0.0, "no": 0.0, "false": 0.0, "n": 0.0,
}  # fmt: skip
_UNCERTAIN = "-1"
_ANSWERS = {"ignore": math.nan, "yes": 1.0, "no": 0.0}


class Config(TableConfig):
    """Configuration of a multilabel task.

    Attributes:
        label_columns: one column a label: 1 or 0 (or yes or no, true or false), -1 where it is
            uncertain, nothing where it is unknown.
        uncertain: what -1 counts as; by CheXpert's names U-Ignore, U-Ones, U-Zeros.
        empty: what an empty cell counts as; in CheXpert's table it means that the report does not
            mention the finding, which most take for no.
        metric: the primary metric, fixed before anything runs; the mean over the labels.
    """

    name: Literal["multilabel"] = "multilabel"
    label_columns: tuple[str, ...] = Field(min_length=1)
    uncertain: Literal["ignore", "yes", "no"] = "ignore"
    empty: Literal["ignore", "no"] = "ignore"
    metric: Literal["mean_auc", "mean_average_precision"] = "mean_auc"

    @field_validator("label_columns")
    @classmethod
    def _each_once(cls, columns: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(columns)) != len(columns):
            raise ValueError("a label column is given twice")
        return columns


class Multilabel(ScanTask):
    """Predict which labels a scan has."""

    kind = "multilabel"
    answer = "labels"

    def __init__(self, config: Config, spatial_dims: int, index: Index) -> None:
        super().__init__(config, spatial_dims, index)
        rows = read_label_columns(
            index, config.table, by=config.by, id_column=config.id_column,
            label_columns=config.label_columns,
        )  # fmt: skip
        self.classes = config.label_columns
        self.metric = config.metric
        self.labels = rows.report
        found = {key: tuple(map(self._read, cells)) for key, cells in rows.items()}
        _check_values(config.label_columns, found)
        self.targets: Mapping[str, tuple[float, ...]] = _without_unknown(found, self.labels)
        self._rarest_first = _check_both_answers(config.label_columns, self.targets)

    def _read(self, cell: str | None) -> float | None:
        """Return 1, 0, NaN where it is unknown, or None for what is no answer."""
        if cell is None:
            return _ANSWERS[self.config.empty]
        word = cell.lower().removesuffix(".0")
        return _ANSWERS[self.config.uncertain] if word == _UNCERTAIN else _MEANING.get(word)

    def stratum(self, scan_key: str) -> int | None:
        """Return the rarest label that the scan has, so that splits share out rare labels."""
        target = self.targets[scan_key]
        return next((label for label in self._rarest_first if target[label] == 1), -1)

    def loss(self, output: Tensor, batch: DownstreamBatch) -> Tensor:
        """Return the mean binary cross-entropy over all labels that are known."""
        losses = functional.binary_cross_entropy_with_logits(
            output.float(), batch.target.nan_to_num(), reduction="none"
        )
        return _mean_of_known(losses, batch.target)

    def metrics(self, output: Tensor, batch: DownstreamBatch) -> dict[str, Tensor]:
        right = ((output > 0) == (batch.target > 0.5)).float()
        return {"accuracy": _mean_of_known(right, batch.target)}

    def case_scores(self, logits: Tensor, masks: Tensor | None) -> list[float]:
        """Return the probability of each label, the mean over the slices of the scan."""
        probabilities: list[float] = logits.float().sigmoid().mean(0).tolist()
        return probabilities


def _mean_of_known(values: Tensor, target: Tensor) -> Tensor:
    """Return the mean where the target is known; 0 where nothing is."""
    known = ~target.isnan()
    return torch.where(known, values, 0).sum() / known.sum().clamp(min=1)


def _check_values(columns: tuple[str, ...], found: Mapping[str, tuple[float | None, ...]]) -> None:
    wrong = {
        column: sum(values[number] is None for values in found.values())
        for number, column in enumerate(columns)
    }
    if any(wrong.values()):
        counts = ", ".join(f"{count} of {column!r}" for column, count in wrong.items() if count)
        raise LabelError(
            f"labels of a multilabel task are 1, 0, -1 (uncertain) or nothing (unknown); other "
            f"values: {counts}. Mend the table."
        )


def _without_unknown(
    found: Mapping[str, tuple[float | None, ...]], report: LabelReport
) -> dict[str, tuple[float, ...]]:
    """Return the labels of the scans of which one at least is known."""
    targets = {
        key: tuple(math.nan if value is None else value for value in values)
        for key, values in found.items()
    }
    unknown = {key for key, target in targets.items() if all(map(math.isnan, target))}
    report.note_keys("scans_without_label", unknown)
    report.num_labelled -= len(unknown)
    return {key: target for key, target in targets.items() if key not in unknown}


def _check_both_answers(
    columns: tuple[str, ...], targets: Mapping[str, tuple[float, ...]]
) -> list[int]:
    """Return the numbers of the labels, those with the fewest yes first.

    Raises:
        LabelError: a label is nowhere yes, or nowhere no.
    """
    yes = [sum(target[i] == 1 for target in targets.values()) for i in range(len(columns))]
    no = [sum(target[i] == 0 for target in targets.values()) for i in range(len(columns))]
    one_sided = [
        column for column, ones, zeros in zip(columns, yes, no, strict=True) if not (ones and zeros)
    ]
    if one_sided:
        raise LabelError(
            f"labels that are nowhere yes or nowhere no cannot be evaluated: {one_sided}. "
            "Leave them out of label_columns; if empty cells mean no, set empty: no."
        )
    return sorted(range(len(columns)), key=lambda label: (yes[label], label))
