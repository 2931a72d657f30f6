"""Trivial baselines: what can be told without any network.

A difference between inits means little where a histogram of intensities, the size of the scan or
the way it was acquired answers as well. Each baseline learns from the same labelled patients as
the inits, and answers for the same test scans.

- ``prior``: the frequency of each class, the mean of a number.
- ``histogram``: how often each intensity occurs within the body.
- ``size``: the extent of the scan and the volume of what is body in it.
- ``acquisition``: modality, spacing, matrix, channels and flags of the index.
- ``intensity`` (of each voxel): the class that is most frequent at its intensity.
- ``position`` (of each voxel): the class that is most frequent at its place in the scan's box. Of
  landmarks: where they lie in the training scans, as a part of the box.

Regressions are scikit-learn's, of standardised features, with the strength that is best on
validation patients.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from scipy import ndimage
from torch.nn import functional

from medssl.downstream.base import DownstreamTask
from medssl.evaluation.protocols.base import Cell, Prediction, Setting
from medssl.scans.points import voxel_of

Array = npt.NDArray[Any]
Fitted = Callable[[Array], Array]

PROTOCOL = "baseline"
PRIOR, HISTOGRAM, SIZE, ACQUISITION = "prior", "histogram", "size", "acquisition"
INTENSITY, POSITION = "intensity", "position"

_NUM_BINS = 32
_GRID = 24
"""Cells along each axis of a scan's box that the frequencies of classes by place are kept for."""
_STRENGTHS = (1e-2, 1e-1, 1.0, 10.0, 100.0)


class Baselines:
    """The baselines of one task.

    Args:
        setting: of the task, with any init: none is used.
        acquisition: of each scan by key, see `acquisition_features`.
    """

    def __init__(self, setting: Setting, acquisition: pd.DataFrame) -> None:
        self._setting, self._task = setting, setting.task
        patients = [*setting.splits.train, *setting.splits.val, *setting.splits.test]
        self._scans = setting.scans_of(patients)
        self._features: dict[str, dict[str, Array]] = {}
        if not self._task.dense:
            looks = {key: _look(setting, key) for key in self._scans}
            self._features[HISTOGRAM] = {key: look[0] for key, look in looks.items()}
            self._features[SIZE] = {key: look[1] for key, look in looks.items()}
            known = {key: row.to_numpy(float) for key, row in acquisition.iterrows()}
            self._features[ACQUISITION] = {key: known[key] for key in self._scans}

    def run(self, cell: Cell) -> dict[str, list[Prediction]]:
        """Return every baseline's predictions for the test scans, from a cell's labelled scans."""
        setting = self._setting
        train, test = setting.labelled_scans(cell), setting.scans_of(setting.splits.test)
        if self._task.dense and self._task.answer == "numbers":
            return self._points(train, test)
        if self._task.dense:
            return self._dense(train, test)
        val = setting.scans_of(setting.splits.val)
        found = {PRIOR: _prior(self._task, setting.targets(train), len(test))}
        for name, features in self._features.items():
            rows = [np.stack([features[key] for key in keys]) for keys in (train, val, test)]
            found[name] = self._regression(rows, setting.targets(train), val)
        return {
            name: [
                Prediction("", True, key, self._task.targets[key], tuple(map(float, answer)))
                for key, answer in zip(test, scores, strict=True)
            ]
            for name, scores in found.items()
        }

    def _regression(self, rows: list[Array], targets: Array, val: Sequence[str]) -> Array:
        train, of_val, of_test = rows
        if len(train) < 2:
            return _prior(self._task, targets, len(of_test))
        fits = [_fit(self._task, train, targets, strength) for strength in _STRENGTHS]
        best = max(fits, key=lambda fit: self._setting.score(val, list(fit(of_val))))
        return best(of_test)

    def _points(self, train: Sequence[str], test: Sequence[str]) -> dict[str, list[Prediction]]:
        """Guess each landmark where it lies in the training scans, as a part of their extent."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # no training scan has it: nan
            guess = np.nanmean([self._places(key)[0] for key in train], axis=0)
        predictions = []
        for key in test:
            places, extent_mm = self._places(key)
            # Without any idea, the middle; what a test scan lacks stays nan.
            apart = (np.nan_to_num(guess, nan=0.5) - places) * extent_mm
            errors = tuple(np.linalg.norm(apart, axis=1).tolist())
            predictions.append(Prediction("", True, key, self._task.targets[key], errors))
        return {POSITION: predictions}

    def _places(self, key: str) -> tuple[Array, Array]:
        """Return a scan's landmarks (K, dims) as parts of its extent, and its extent in mm."""
        entry = self._setting.store.entry(key)
        dims = len(entry.shape)
        points = np.reshape(self._task.targets[key], (-1, 3))
        voxels = np.array([voxel_of((x, y, z), entry.affine)[:dims] for x, y, z in points])
        extent = np.array(entry.shape, dtype=np.float64)
        return voxels / extent, extent * np.array(entry.spacing_mm)

    def _dense(self, train: Sequence[str], test: Sequence[str]) -> dict[str, list[Prediction]]:
        num_classes = self._task.num_outputs
        by_intensity = np.ones((num_classes, _NUM_BINS))  # one of each: unseen values stay even
        by_place: Array = np.zeros(0)
        for key in train:
            image, mask = self._case(key)
            bins = _bins(image)
            for number in range(num_classes):
                here = mask == number
                by_intensity[number] += np.bincount(bins[here], minlength=_NUM_BINS)
                place = _to_grid(here)
                if not by_place.size:
                    by_place = np.zeros((num_classes, *place.shape))
                by_place[number] += place
        predictions: dict[str, list[Prediction]] = {INTENSITY: [], POSITION: []}
        for key in test:
            image, mask = self._case(key)
            answers = {
                INTENSITY: by_intensity.argmax(0)[_bins(image)],
                POSITION: _from_grid(by_place, mask.shape).argmax(0),
            }
            for name, answer in answers.items():
                logits = functional.one_hot(torch.from_numpy(answer), num_classes).movedim(-1, 0)
                scores = self._task.case_scores(
                    logits[None].float(), torch.from_numpy(mask.astype(np.int64))[None]
                )
                target = self._task.targets[key]
                predictions[name].append(Prediction("", True, key, target, tuple(scores)))
        return predictions

    def _case(self, key: str) -> tuple[Array, Array]:
        """Return a scan's first channel and its mask, both (X, Y[, Z])."""
        store = self._setting.store
        name = self._task.request(self._setting.request).mask
        return store.read(key)[0], store.read_mask(key, str(name))


def acquisition_features(accepted: pd.DataFrame) -> pd.DataFrame:
    """Return what the index says of how each scan was acquired, as numbers, by scan key.

    Args:
        accepted: the index's rows of usable scans.
    """
    words = pd.get_dummies(accepted[["format", "modality", "dims", "orientation", "intensity"]])
    flags = accepted["flags"].map(list).explode().str.get_dummies().groupby(level=0).max()
    sizes = [
        pd.DataFrame([_padded(values) for values in accepted[name]], index=accepted.index)
        for name in ("shape", "spacing_mm")
    ]
    counts = accepted[["num_files", "num_channels"]].astype(float)
    table = pd.concat([words, flags, *sizes, counts], axis=1).astype(float).fillna(0.0)
    table.index = pd.Index(accepted["scan_key"].astype(str))
    table.columns = [str(number) for number in range(table.shape[1])]
    return table


def _padded(values: Sequence[float] | None) -> list[float]:
    known = [] if values is None else [float(value) for value in values]
    return [*known, 0.0, 0.0, 0.0, 0.0][:4]


def _look(setting: Setting, key: str) -> tuple[Array, Array]:
    """Return a scan's histogram within the body, and its sizes in mm and ml."""
    entry = setting.store.listed(key)
    image = setting.store.read(key)[0]
    body = image[image > np.float16(entry.foreground_threshold)]
    histogram = np.bincount(_bins(body), minlength=_NUM_BINS) / max(1, body.size)
    extent = np.array(entry.shape) * np.array(entry.spacing_mm)
    voxel = float(np.prod(entry.spacing_mm))
    across = [0.0] * (3 - len(extent))  # an index may hold slices beside volumes
    return histogram, np.array([*extent, *across, extent.prod(), body.size * voxel])


def _bins(image: Array) -> Array:
    scaled = image.astype(np.float32) * _NUM_BINS
    return np.clip(scaled, 0, _NUM_BINS - 1).astype(np.int64)


def _prior(task: DownstreamTask, targets: Array, number: int) -> Array:
    """Return the same answer for so many scans: the frequency of each class or the mean."""
    if task.answer == "class":
        answer = np.bincount(targets.astype(int), minlength=task.num_outputs) / len(targets)
    else:
        with np.errstate(invalid="ignore"):
            table = targets.reshape(len(targets), -1)
            known = np.isfinite(table)
            answer = np.where(known, table, 0).sum(0) / known.sum(0)
        answer = np.nan_to_num(answer, nan=0.5)
    return np.tile(answer, (number, 1))


def _fit(task: DownstreamTask, rows: Array, targets: Array, strength: float) -> Fitted:
    """Fit a linear model of one strength; returns what answers for other rows."""
    if task.answer == "class":
        return _classifier(rows, targets.astype(int), task.num_outputs, strength)
    columns = targets.reshape(len(rows), -1)
    one = _number if task.answer == "numbers" else _yes_or_no
    fitted = []
    for values in columns.T:
        known = np.isfinite(values)
        fitted.append(one(rows[known], values[known], strength))
    return lambda others: np.column_stack([answer(others) for answer in fitted])


def _classifier(rows: Array, classes: Array, num_classes: int, strength: float) -> Fitted:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    present = np.unique(classes)
    if len(present) == 1:
        return lambda others: np.tile(np.eye(num_classes)[present[0]], (len(others), 1))
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1 / strength, max_iter=1000))
    model.fit(rows, classes)

    def answer(others: Array) -> Array:
        scores = np.zeros((len(others), num_classes))
        scores[:, present] = model.predict_proba(others)
        return scores

    return answer


def _yes_or_no(rows: Array, values: Array, strength: float) -> Fitted:
    if len(values) == 0:
        return lambda others: np.full(len(others), 0.5)
    answer = _classifier(rows, values.astype(int), 2, strength)
    return lambda others: answer(others)[:, 1]


def _number(rows: Array, values: Array, strength: float) -> Fitted:
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), Ridge(alpha=strength)).fit(rows, values)
    return lambda others: np.asarray(model.predict(others))


def _to_grid(here: Array) -> Array:
    """Return the share of each cell of a scan's box that a class fills."""
    image = torch.from_numpy(here.astype(np.float32))[None, None]
    pool = functional.adaptive_avg_pool2d if here.ndim == 2 else functional.adaptive_avg_pool3d
    grid: Array = pool(image, _GRID)[0, 0].numpy()
    return grid


def _from_grid(grid: Array, shape: Sequence[int]) -> Array:
    """Return the grids of all classes (K, ...) at every voxel of a scan, linearly between cells."""
    places = [(np.arange(n) + 0.5) * _GRID / n - 0.5 for n in shape]
    coordinates = np.meshgrid(*places, indexing="ij")
    return np.stack(
        [ndimage.map_coordinates(g, coordinates, order=1, mode="nearest") for g in grid]
    )
