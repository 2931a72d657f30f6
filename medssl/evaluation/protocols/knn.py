"""Nearest neighbours: a scan is answered by the labelled scans most alike it, layer by layer.

Neighbours count by ``exp(cosine / temperature)`` (Wu et al., "Unsupervised feature learning via
non-parametric instance discrimination", CVPR 2018). Nothing is fitted; the number of neighbours and
the layer are chosen on validation patients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional

from medssl.downstream.base import DownstreamTask
from medssl.evaluation.protocols._pooled import Answered, Pooled, pooled, predictions_of
from medssl.evaluation.protocols.base import Cell, FrozenConfig, Prediction, Protocol, Setting


class Config(FrozenConfig):
    """Configuration of nearest neighbours.

    Attributes:
        num_neighbours: numbers tried; one above the number of labelled scans means all of them.
        temperature: of the weights.
    """

    name: Literal["knn"] = "knn"
    num_neighbours: tuple[int, ...] = Field(default=(10, 20, 100, 200), min_length=1)
    temperature: float = Field(default=0.1, gt=0)

    @field_validator("num_neighbours")
    @classmethod
    def _fewest_first(cls, numbers: tuple[int, ...]) -> tuple[int, ...]:
        if min(numbers) < 1:
            raise ValueError("num_neighbours must be 1 or more")
        return tuple(sorted(set(numbers)))


class KNN(Protocol):
    """Let the nearest labelled scans vote."""

    config: Config

    @classmethod
    def refusal(cls, task: type[DownstreamTask]) -> str | None:
        return "it compares whole scans, and this task asks about voxels" if task.dense else None

    def run(
        self,
        cell: Cell,
        setting: Setting,
        log: Callable[[int, dict[str, float]], None],
    ) -> list[Prediction]:
        tables = pooled(setting, cell, self.config)
        rows = tables.rows(setting.labelled_scans(cell))
        answered = {}
        for position, layer in enumerate(tables.layers):
            answered[layer] = found = self._answer(tables, layer, rows, setting)
            log(position, {"val/score": found.rank[0], **found.chosen})
        return predictions_of(setting, answered)

    def _answer(self, tables: Pooled, layer: str, rows: list[int], setting: Setting) -> Answered:
        features = tables.tables[layer].rows
        known = tables.targets(rows)
        if setting.task.answer == "class":
            known = functional.one_hot(known[:, 0].long(), setting.task.num_outputs).double()

        def scores(wanted: list[int], number: int) -> Tensor:
            device = setting.device
            one, other = features[wanted].to(device), features[rows].to(device)
            return vote(one, other, known, number, self.config.temperature)

        numbers = sorted({min(number, len(rows)) for number in self.config.num_neighbours})
        ranks = [tables.rank(scores(tables.val, number)) for number in numbers]
        best = ranks.index(max(ranks))  # among equals the fewest
        chosen = {"num_neighbours": float(numbers[best])}
        return Answered(ranks[best], chosen, scores(tables.test, numbers[best]).cpu())


def vote(wanted: Tensor, rows: Tensor, known: Tensor, number: int, temperature: float) -> Tensor:
    """Return the mean of what the nearest rows know, weighted by likeness.

    Args:
        wanted: (N, D) features to answer for.
        rows: (m, D) features whose answers are known.
        known: (m, K) float64, of each row; NaN where it is unknown, and then it has no say.
        number: neighbours that are asked.
        temperature: a small one lets the nearest alone decide.

    Returns:
        (N, K) float64; where no neighbour knows, the mean over all rows, or one half if none does.
    """
    likeness = (
        functional.normalize(wanted.double(), dim=1) @ functional.normalize(rows.double(), dim=1).T
    )
    near, places = likeness.topk(number, dim=1)
    weights = ((near - near[:, :1]) / temperature).exp()[..., None]  # the nearest counts 1
    told = known[places]
    weights = torch.where(told.isnan(), 0.0, weights)
    sums = weights.sum(1)
    mean = (weights * told.nan_to_num()).sum(1) / sums.where(sums > 0, 1.0)
    return torch.where(sums > 0, mean, known.nanmean(0).nan_to_num(nan=0.5))
