"""SVM mAP: linear support vector machines, one against the rest, judged by average precision.

As in Goyal et al., "Scaling and benchmarking self-supervised visual representation learning" (ICCV
2019): features of unit length, positive rows count twice, the cost of each class is chosen by
cross-validation on the training rows. There the best layer is reported as the test shows it; here
validation patients choose it.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch.nn import functional

from medssl.downstream.base import DownstreamTask
from medssl.evaluation.protocols._pooled import Answered, Pooled, defined, pooled, predictions_of
from medssl.evaluation.protocols.base import Cell, FrozenConfig, Prediction, Protocol, Setting
from medssl.randomness import derive_seed

_log = logging.getLogger(__name__)

Array = NDArray[np.float64]

_POSITIVE_WEIGHT = 2.0
"""What a positive row counts; a negative one counts 1."""

_MIDDLE_COST = 1.0
"""The cost where a class has too few patients for cross-validation."""


class Config(FrozenConfig):
    """Configuration of SVM mAP.

    Attributes:
        costs: scikit-learn's ``C``, tried for every class.
        num_folds: of the cross-validation; fewer where a class has fewer patients.
        max_steps: of scikit-learn's solver.
    """

    name: Literal["svm_map"] = "svm_map"
    costs: tuple[float, ...] = Field(default=(0.01, 0.1, 1.0, 10.0, 100.0), min_length=1)
    num_folds: int = Field(default=3, ge=2)
    max_steps: int = Field(default=2000, gt=0)

    def budget(self) -> str:
        return f"{len(self.costs)} costs x {self.num_folds} folds a class and layer"


class SvmMap(Protocol):
    """Separate each class from the rest by a margin."""

    config: Config

    @classmethod
    def refusal(cls, task: type[DownstreamTask]) -> str | None:
        if task.dense:
            return "it separates whole scans, and this task asks about voxels"
        if task.answer == "numbers":
            return "it separates classes, and this task asks for numbers"
        return None

    def run(
        self,
        cell: Cell,
        setting: Setting,
        log: Callable[[int, dict[str, float]], None],
    ) -> list[Prediction]:
        scans = setting.labelled_scans(cell)
        patients = [setting.store.entry(key).patient_key for key in scans]

        def solve() -> dict[str, Answered]:
            tables = pooled(setting, cell, self.config)
            rows = tables.rows(scans)
            return {
                layer: self._answer(tables, layer, rows, patients, setting)
                for layer in tables.layers
            }

        key = ("svm_map", self.config, setting.backbone_seed(cell), tuple(scans))
        answered = setting.once(key, solve)
        for position, found in enumerate(answered.values()):
            log(position, {"val/mean_average_precision": found.rank[0], **found.chosen})
        return predictions_of(setting, answered)

    def _answer(
        self,
        tables: Pooled,
        layer: str,
        rows: list[int],
        patients: Sequence[str],
        setting: Setting,
    ) -> Answered:
        unit = functional.normalize(tables.tables[layer].rows.double(), dim=1).numpy()
        num_outputs, answer = setting.task.num_outputs, setting.task.answer
        known, val = (
            one_column_a_label(tables.targets(wanted).cpu().numpy(), answer, num_outputs)
            for wanted in (rows, tables.val)
        )
        seed = derive_seed(setting.seed, "svm_map") % 2**31
        scores: dict[str, list[Array]] = {"val": [], "test": []}
        chosen: dict[str, float] = {}
        for label in range(known.shape[1]):
            machine = self._fit(unit[rows], known[:, label], patients, seed)
            chosen[f"cost_{label}"] = 0.0 if machine is None else machine.C
            for side, wanted in (("val", tables.val), ("test", tables.test)):
                scores[side].append(
                    np.full(len(wanted), _one_answer(known[:, label])) if machine is None
                    else machine.decision_function(unit[wanted])
                )  # fmt: skip
        found = {side: np.stack(columns, axis=1) for side, columns in scores.items()}
        test = torch.from_numpy(found["test"])
        if answer == "class" and num_outputs == 2:
            test = torch.cat([-test, test], dim=1)
        return Answered((defined(mean_average_precision(val, found["val"])), 0.0), chosen, test)

    def _fit(self, rows: Array, labels: Array, patients: Sequence[str], seed: int) -> Any | None:
        """Return a machine fitted to the rows whose label is known; None for one class alone."""
        from sklearn.exceptions import ConvergenceWarning

        told = np.isfinite(labels)
        rows, positive = rows[told], labels[told] > 0
        if len(set(positive.tolist())) < 2:
            return None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            owners = np.asarray(patients)[told]
            cost = self._cost(rows, positive, owners, seed)
            machine = self._machine(cost, seed).fit(rows, positive)
        missed = sum(issubclass(each.category, ConvergenceWarning) for each in caught)
        if missed:
            _log.warning(
                "%d support vector machines on %d rows had not converged after %d steps. Raise "
                "max_steps, or leave out the largest costs.",
                missed, len(rows), self.config.max_steps,
            )  # fmt: skip
        return machine

    def _cost(
        self, rows: Array, labels: NDArray[np.bool_], patients: NDArray[Any], seed: int
    ) -> float:
        """Return the cost with the best average precision in cross-validation by patient."""
        from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold

        fewest = min(len(set(patients[labels == side].tolist())) for side in (False, True))
        num_folds = min(self.config.num_folds, fewest)
        if num_folds < 2 or len(self.config.costs) == 1:
            return min(self.config.costs, key=lambda cost: abs(np.log(cost / _MIDDLE_COST)))
        search = GridSearchCV(
            self._machine(1.0, seed),
            {"C": sorted(self.config.costs)},
            scoring="average_precision",
            cv=StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed),
            refit=False,
        ).fit(rows, labels, groups=patients)
        return float(search.best_params_["C"])

    def _machine(self, cost: float, seed: int) -> Any:
        from sklearn.svm import LinearSVC

        return LinearSVC(
            C=cost,
            class_weight={False: 1.0, True: _POSITIVE_WEIGHT},
            max_iter=self.config.max_steps,
            random_state=seed,
        )


def _one_answer(labels: Array) -> float:
    """Return what a machine says that has seen one answer alone, or none: always yes or no.

    A label that no row has must not win over those of which a machine says no.
    """
    told = labels[np.isfinite(labels)]
    return float(np.sign(2 * told[0] - 1)) if len(told) else 0.0


def one_column_a_label(targets: Array, answer: str, num_outputs: int) -> Array:
    """Return what is known, (N, T): 1, 0 or NaN; one column where there are two classes."""
    if answer == "labels":
        return targets
    labels = range(num_outputs) if num_outputs > 2 else [1]
    return np.stack([targets[:, 0] == label for label in labels], axis=1).astype(np.float64)


def mean_average_precision(targets: Array, scores: Array) -> float:
    """Return the mean over the labels that occur, and do not always occur; nan if none does.

    Args:
        targets: (N, T): 1, 0 or NaN where unknown.
        scores: (N, T), larger for yes.
    """
    from sklearn.metrics import average_precision_score

    found = []
    for column, score in zip(targets.T, scores.T, strict=True):
        told = np.isfinite(column)
        if len(np.unique(column[told])) == 2:
            found.append(average_precision_score(column[told], score[told]))
    return float(np.mean(found)) if found else float("nan")
