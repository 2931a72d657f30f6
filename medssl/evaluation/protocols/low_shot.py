"""Low shot: a linear model on frozen features of one, two, four … labelled scans a class.

Scans are drawn several times over (Goyal et al., "Scaling and benchmarking self-supervised visual
representation learning", ICCV 2019), each from a patient of its own, so that k scans a class are k
patients a class. A draw with more scans holds the smaller ones of the same number. The strength is
fixed, as so few scans leave nothing to choose it with; the layer is chosen on validation patients.

The draws stand in the predictions as seeds, and k times the classes as labelled patients.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from medssl.downstream.base import DownstreamTask
from medssl.errors import LabelError
from medssl.evaluation.answers import fit, scores_of
from medssl.evaluation.protocols._pooled import Answered, Pooled, pooled, predictions_of
from medssl.evaluation.protocols.base import Cell, FrozenConfig, Prediction, Protocol, Setting
from medssl.randomness import numpy_generator

_log = logging.getLogger(__name__)


class Config(FrozenConfig):
    """Configuration of low shot.

    Attributes:
        scans_per_class: labelled scans of each class, one number after the other; those above the
            patients of the rarest class are left out.
        num_samples: how often scans are drawn.
        strength: the L2 penalty, as a share of the number of features like the linear probe's.
        max_steps: steps of L-BFGS.
    """

    name: Literal["low_shot"] = "low_shot"
    scans_per_class: tuple[int, ...] = Field(default=(1, 2, 4, 8, 16, 32, 64, 96), min_length=1)
    num_samples: int = Field(default=5, gt=0)
    strength: float = Field(default=1e-3, gt=0)
    max_steps: int = Field(default=1000, gt=0)

    @field_validator("scans_per_class")
    @classmethod
    def _fewest_first(cls, numbers: tuple[int, ...]) -> tuple[int, ...]:
        if min(numbers) < 1:
            raise ValueError("scans_per_class must be 1 or more")
        return tuple(sorted(set(numbers)))

    def budget(self) -> str:
        return f"once an init: {self.num_samples} draws x {len(self.scans_per_class)} sizes"


class LowShot(Protocol):
    """Learn from very few scans, drawn several times."""

    config: Config
    uses_label_fractions: ClassVar[bool] = False

    @classmethod
    def refusal(cls, task: type[DownstreamTask]) -> str | None:
        if task.dense or task.answer != "class":
            return "it counts labelled scans a class, and this task gives a scan no class"
        return None

    def run(
        self,
        cell: Cell,
        setting: Setting,
        log: Callable[[int, dict[str, float]], None],
    ) -> list[Prediction]:
        num_classes = setting.task.num_outputs
        predictions = []
        for sample in range(self.config.num_samples):
            tables = pooled(setting, replace(cell, seed=sample), self.config)
            order = draw(setting, sample)
            for number in self._numbers(order, setting, cell):
                scans = [scan for scans in order for scan in scans[:number]]
                rows = tables.rows(scans)
                answered = {
                    layer: self._answer(tables, layer, rows, setting) for layer in tables.layers
                }
                best = max(found.rank[0] for found in answered.values())
                log(number, {f"val/score_of_draw_{sample}": best})
                predictions += predictions_of(
                    setting, answered, num_labelled_patients=number * num_classes, seed=sample
                )
        return predictions

    def _numbers(self, order: list[list[str]], setting: Setting, cell: Cell) -> list[int]:
        most = min(len(scans) for scans in order)
        numbers = [number for number in self.config.scans_per_class if number <= most]
        if not numbers:
            rarest = setting.task.classes[[len(scans) for scans in order].index(most)]
            raise LabelError(
                f"low_shot: class {rarest!r} of task {cell.task!r} has {most} training patients, "
                f"and {self.config.scans_per_class[0]} are asked for. Lower scans_per_class, or "
                "leave low_shot out."
            )
        if len(numbers) < len(self.config.scans_per_class):
            _log.info(
                "%s: the rarest class has %d training patients; larger scans_per_class are left "
                "out.",
                cell.key, most,
            )  # fmt: skip
        return numbers

    def _answer(self, tables: Pooled, layer: str, rows: list[int], setting: Setting) -> Answered:
        task, table = setting.task, tables.tables[layer]
        models = fit(
            table.space(rows),
            task.answer,
            tables.targets(rows),
            task.num_outputs,
            [self.config.strength * table.rows.shape[1]],
            self.config.max_steps,
        )
        val, test = (
            scores_of(task.answer, models.answers(table.inputs(wanted, rows))[0])
            for wanted in (tables.val, tables.test)
        )
        return Answered(tables.rank(val), {}, test.cpu())


def draw(setting: Setting, sample: int) -> list[list[str]]:
    """Return training scans of each class in the order in which they are taken.

    One scan a patient; a patient stands for the class by which the splits are stratified. The
    same for every init.
    """
    strata = setting.strata()
    candidates: dict[str, list[str]] = defaultdict(list)
    for key in setting.scans_of(setting.splits.train):
        patient = setting.store.entry(key).patient_key
        if setting.task.targets[key][0] == strata[patient]:
            candidates[patient].append(key)
    order = []
    for label in range(setting.task.num_outputs):
        generator = numpy_generator(setting.seed, "low_shot", sample, label)
        patients = sorted(patient for patient in candidates if strata[patient] == label)
        order.append(
            [
                candidates[patient][generator.integers(len(candidates[patient]))]
                for patient in generator.permutation(patients)
            ]
        )
    return order
