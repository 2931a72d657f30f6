"""What protocols on pooled features share: tables of features, answers of cells, and choices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medssl.evaluation.answers import mean_loss
from medssl.evaluation.feature_table import FeatureTable
from medssl.evaluation.protocols.base import Cell, FrozenConfig, Prediction, Setting

Rank = tuple[float, float]
"""How good an answer is on validation patients, larger is better: metric, then minus the loss."""


@dataclass(frozen=True)
class Answered:
    """What one layer answers, with all that validation patients chose.

    Attributes:
        rank: on validation patients.
        chosen: what was chosen, by name, for the journal.
        scores: of the test scans, (N, K), on the CPU.
    """

    rank: Rank
    chosen: dict[str, float]
    scores: Tensor


class Pooled:
    """Pooled features of all labelled scans, one table a layer.

    Attributes:
        layers: names of the tables.
        tables: by layer.
        val, test: rows of the validation and test patients' scans.
    """

    def __init__(self, setting: Setting, cell: Cell, config: FrozenConfig) -> None:
        features = setting.features(cell, config.max_slices, config.max_features)
        self._setting = setting
        self._keys = sorted(features)
        self._rows = {key: row for row, key in enumerate(self._keys)}
        train, self.val, self.test = (
            self.rows(setting.scans_of(patients))
            for patients in (setting.splits.train, setting.splits.val, setting.splits.test)
        )
        self.tables = {
            layer: FeatureTable(
                torch.stack([features[key].layers[layer] for key in self._keys]),
                train,
                setting.device,
            )
            for layer in features[self._keys[0]].layers
        }
        self.layers = list(self.tables)

    def rows(self, scan_keys: Iterable[str]) -> list[int]:
        """Return the rows of some scans."""
        return [self._rows[key] for key in scan_keys]

    def targets(self, rows: Sequence[int]) -> Tensor:
        """Return what is known of some rows, (N, T) float64, where the setting computes."""
        targets = [self._setting.task.targets[self._keys[row]] for row in rows]
        return torch.tensor(targets, dtype=torch.float64, device=self._setting.device)

    def rank(self, scores: Tensor) -> Rank:
        """Rank the scores (N, K) of the validation patients' scans."""
        answer = self._setting.task.answer
        keys = [self._keys[row] for row in self.val]
        value = self._setting.score(keys, scores.tolist())
        return defined(value), -float(mean_loss(answer, self.targets(self.val), scores))


def pooled(setting: Setting, cell: Cell, config: FrozenConfig) -> Pooled:
    """Return the tables of a cell's backbone, made once."""
    key = ("pooled", setting.backbone_seed(cell), config.max_slices, config.max_features)
    return setting.once(key, lambda: Pooled(setting, cell, config))


def defined(score: float) -> float:
    """Return a score by which to choose: one that is undefined is worse than all others."""
    return -math.inf if math.isnan(score) else score


def predictions_of(
    setting: Setting,
    answered: dict[str, Answered],
    *,
    num_labelled_patients: int | None = None,
    seed: int | None = None,
) -> list[Prediction]:
    """Return the predictions of all layers; the one that validation patients prefer is selected."""
    best = max(answered, key=lambda layer: answered[layer].rank)
    keys = setting.scans_of(setting.splits.test)
    return [
        Prediction(
            layer=layer,
            selected=layer == best,
            scan_key=key,
            target=setting.task.targets[key],
            scores=tuple(scores),
            num_labelled_patients=num_labelled_patients,
            seed=seed,
        )
        for layer, found in answered.items()
        for key, scores in zip(keys, found.scores.tolist(), strict=True)
    ]
