"""Linear probe: a logistic or ridge regression on the frozen features of every stage.

Features of the earlier stages often transfer better than the last one's (Goyal et al., "Scaling
and benchmarking self-supervised visual representation learning", ICCV 2019), so every stage is
probed; the strength of each and the stage to report are chosen on validation patients. Where the
task is dense, one regression answers for every position of the stage's map.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

from medssl.downstream.base import DownstreamTask
from medssl.evaluation.answers import fit, scores_of
from medssl.evaluation.protocols._dense_probe import ProbeConfig, answer_voxels, strength_chosen
from medssl.evaluation.protocols._pooled import Answered, Pooled, pooled, predictions_of
from medssl.evaluation.protocols.base import Cell, Prediction, Protocol, Setting

_log = logging.getLogger(__name__)


class Config(ProbeConfig):
    """Configuration of the linear probe."""

    name: Literal["linear_probe"] = "linear_probe"


class LinearProbe(Protocol):
    """Probe every stage with a linear model."""

    config: Config

    @classmethod
    def refusal(cls, task: type[DownstreamTask]) -> str | None:
        if task.dense and task.answer != "class":
            return "it answers voxel by voxel, and this task asks for no class of a voxel"
        return None

    def run(
        self,
        cell: Cell,
        setting: Setting,
        log: Callable[[int, dict[str, float]], None],
    ) -> list[Prediction]:
        scans = setting.labelled_scans(cell)
        if setting.task.dense:
            answered = answer_voxels(self.config, cell, setting, scans)
        else:
            answered = self._answer_scans(cell, setting, scans)
        for position, found in enumerate(answered.values()):
            log(position, {"val/score": found.rank[0], **found.chosen})
        best = max(answered, key=lambda layer: answered[layer].rank)
        if answered[best].chosen["strength_at_end"]:
            _log.info(
                "%s, %s: the strength chosen on validation patients, %g, is at the end of the "
                "grid. A wider grid (strengths) may do better.",
                cell.key, best, answered[best].chosen["strength"],
            )  # fmt: skip
        return predictions_of(setting, answered)

    def _answer_scans(self, cell: Cell, setting: Setting, scans: list[str]) -> dict[str, Answered]:
        # With all labels every seed has the same rows: a subset is never solved twice.
        def solve() -> dict[str, Answered]:
            tables = pooled(setting, cell, self.config)
            rows = tables.rows(scans)
            return {layer: self._answer(tables, layer, rows, setting) for layer in tables.layers}

        key = ("linear_probe", self.config, setting.backbone_seed(cell), tuple(scans))
        return setting.once(key, solve)

    def _answer(self, tables: Pooled, layer: str, rows: list[int], setting: Setting) -> Answered:
        config, task, table = self.config, setting.task, tables.tables[layer]
        models = fit(
            table.space(rows),
            task.answer,
            tables.targets(rows),
            task.num_outputs,
            [strength * table.rows.shape[1] for strength in config.strengths],
            config.max_steps,
        )
        val = scores_of(task.answer, models.answers(table.inputs(tables.val, rows)))
        ranks = [tables.rank(scores) for scores in val]
        best = ranks.index(max(ranks))
        test = models.answers(table.inputs(tables.test, rows))[best]
        chosen = strength_chosen(config.strengths, best)
        return Answered(ranks[best], chosen, scores_of(task.answer, test).cpu())
