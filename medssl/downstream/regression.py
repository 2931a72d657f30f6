"""Regression: a number a scan (an age, a volume), from a table.

The network answers in the table's own unit: its head turns standard units into that, by mean and
deviation of the training scans' numbers, which `Regression.for_training` looks at and at no others.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from medssl.downstream._per_scan import ScanTask
from medssl.downstream.base import DownstreamBatch, TableConfig
from medssl.errors import LabelError
from medssl.models.backbones.base import Backbone
from medssl.models.heads import PooledHead
from medssl.scans.index import Index
from medssl.scans.labels import read_label_columns

_STRATA = 4
"""Parts of equal size into which the numbers are divided for splits: quarters."""

_DEVIATION_FLOOR = 1e-6
"""Of the mean's size, or of one: training scans of one and the same number have no deviation."""


class Config(TableConfig):
    """Configuration of a regression task.

    Attributes:
        label_column: the column that holds the number.
        unit: of the numbers, for tables and figures.
        metric: the primary metric, fixed before anything runs.
    """

    name: Literal["regression"] = "regression"
    label_column: str = "label"
    unit: str = ""
    metric: Literal["mae", "rmse", "r2", "pearson"] = "mae"


class Regression(ScanTask):
    """Predict a number of a scan.

    Attributes:
        mean, deviation: of the training scans' numbers; None before `for_training`.
    """

    kind = "regression"
    answer = "numbers"

    def __init__(self, config: Config, spatial_dims: int, index: Index) -> None:
        super().__init__(config, spatial_dims, index)
        rows = read_label_columns(
            index, config.table, by=config.by, id_column=config.id_column,
            label_columns=(config.label_column,),
        )  # fmt: skip
        self.classes = (config.unit or config.label_column,)
        self.metric = config.metric
        self.labels = rows.report
        numbers = {key: _number(str(cells[0])) for key, cells in rows.items()}
        wrong = sum(number is None for number in numbers.values())
        if wrong:
            raise LabelError(
                f"{wrong} of {len(numbers)} labels in column {config.label_column!r} are not "
                "finite numbers. Mend the table, or empty the cells of what is unknown."
            )
        self.targets: Mapping[str, tuple[float, ...]] = {
            key: (number,) for key, number in numbers.items() if number is not None
        }
        known = np.array([number for (number,) in self.targets.values()])
        if known.min() == known.max():
            raise LabelError(
                f"all {len(known)} labels in column {config.label_column!r} are the same number. "
                "Check the column."
            )
        self._borders = np.quantile(known, np.arange(1, _STRATA) / _STRATA)
        self.mean: float | None = None
        self.deviation: float | None = None

    def stratum(self, scan_key: str) -> int | None:
        """Return the quarter of all numbers that the scan's lies in."""
        return int(np.searchsorted(self._borders, self.targets[scan_key][0], side="right"))

    def for_training(self, scan_keys: Sequence[str]) -> Regression:
        numbers = np.array([self.targets[key][0] for key in scan_keys], dtype=np.float64)
        task = copy.copy(self)
        task.mean = float(numbers.mean())
        floor = _DEVIATION_FLOOR * max(1.0, abs(task.mean))
        # One number, or equal ones, say nothing of the scale: then it stays that of the unit.
        task.deviation = float(numbers.std()) if numbers.std() > floor else 1.0
        return task

    def build_head(self, backbone: Backbone) -> nn.Module:
        mean, deviation = self._scale()
        return _NumberHead(backbone.stages[-1].channels, mean, deviation)

    def loss(self, output: Tensor, batch: DownstreamBatch) -> Tensor:
        """Return the mean squared error in units of the training numbers' deviation."""
        _, deviation = self._scale()
        return functional.mse_loss(output.float() / deviation, batch.target / deviation)

    def metrics(self, output: Tensor, batch: DownstreamBatch) -> dict[str, Tensor]:
        return {"mae": (output.float() - batch.target).abs().mean()}

    def case_scores(self, logits: Tensor, masks: Tensor | None) -> list[float]:
        """Return the number, the mean over the slices of the scan."""
        number: list[float] = logits.float().mean(0).tolist()
        return number

    def _scale(self) -> tuple[float, float]:
        if self.mean is None or self.deviation is None:
            raise ValueError("call for_training with the training scans first")
        return self.mean, self.deviation


class _NumberHead(nn.Module):
    """A linear layer in standard units, and the way back to the unit of the numbers."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, in_channels: int, mean: float, deviation: float) -> None:
        super().__init__()
        self.layers = PooledHead(in_channels, 1)
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("deviation", torch.tensor(deviation))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 1); float32, as half precision has too few digits for a mean."""
        standard: Tensor = self.layers(x).float()
        return self.mean + self.deviation * standard


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
