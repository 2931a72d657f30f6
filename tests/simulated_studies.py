"""Studies whose truth is known by construction: patients, training runs and inits are drawn.

Patients differ in difficulty, in how much an init helps them, and in how a single run treats them;
runs of an init differ among themselves. Seeds are shared by inits, as their labelled subsets are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
from scipy import stats

from medssl.evaluation.metrics import Array, Metric, metric_for
from medssl.evaluation.statistics.cells import SeedCell
from medssl.evaluation.statistics.intervals import Uncertain, uncertain
from medssl.evaluation.statistics.resampling import draw_resamples, measured, resampled


@dataclass(frozen=True)
class Truth:
    """How a study is drawn.

    Attributes:
        kind: segmentation (Dice) or classification (AUC).
        gains: of each init: Dice, or distance between the classes in standard deviations.
        runs: standard deviation of a run's gain.
        shared_runs: of what all inits have of a seed, which pairing takes out.
    """

    kind: str
    gains: Mapping[str, float]
    runs: float = 0.0
    shared_runs: float = 0.0

    def value(self, gain: float) -> float:
        """Return the expected metric of an init, over patients and runs."""
        if self.kind == "segmentation":
            return 0.8 + gain
        spread = np.hypot(self.runs, self.shared_runs)
        return float(stats.norm.cdf(gain / np.hypot(np.sqrt(2) * _SCORE_SD, spread)))

    def run_value(self, gains: Array) -> Array:
        """Return the expected metric of runs with these gains, over patients."""
        if self.kind == "segmentation":
            return 0.8 + gains
        return np.asarray(stats.norm.cdf(gains / (np.sqrt(2) * _SCORE_SD)))


# Of scores of one class: what a patient has in all runs, in all runs of one init, in one run.
_COMMON, _OF_INIT, _OF_RUN = 0.8, 0.4, 0.45
_SCORE_SD = float(np.sqrt(_COMMON**2 + _OF_INIT**2 + _OF_RUN**2))


@dataclass(frozen=True)
class Study:
    """One drawn study: the cells of each init, and what its very runs are worth."""

    cells: Mapping[str, list[SeedCell]]
    run_values: Mapping[str, Array]
    metric: Metric
    num_patients: int

    def effect(self, init: str, draws: Array, reference: str = "imagenet") -> Uncertain:
        """Return the difference of two inits."""
        theirs, ours = self.cells[init], self.cells[reference]
        samples = resampled(self.metric, theirs, draws) - resampled(self.metric, ours, draws)
        values = measured(self.metric, theirs) - measured(self.metric, ours)
        return uncertain(values, samples, self.num_patients)

    def estimate(self, init: str, draws: Array) -> Uncertain:
        """Return the value of one init."""
        cells = self.cells[init]
        return uncertain(
            measured(self.metric, cells), resampled(self.metric, cells, draws), self.num_patients
        )


def _area(targets: Array, scores: Array) -> float:
    return float(_areas(targets, scores, np.ones((1, len(targets))))[0])


def _areas(targets: Array, scores: Array, weights: Array) -> Array:
    positive = targets == 1
    ahead = scores[positive] - scores[~positive][:, 0]
    above = (ahead > 0) + 0.5 * (ahead == 0)
    ups, downs = weights[:, positive], weights[:, ~positive]
    with np.errstate(invalid="ignore"):
        pairs = ups.sum(axis=1) * downs.sum(axis=1)
        return np.asarray(((ups @ above) * downs).sum(axis=1) / pairs)


# The AUC of two classes by all pairs, which for few patients takes a tenth of the time; a test says
# that it is the product's own.
QUICK_AUC = Metric("auc", True, _area, _areas)


def draw_study(
    truth: Truth, num_patients: int, num_seeds: int, generator: np.random.Generator
) -> Study:
    """Return a study drawn from the truth."""
    shared = generator.normal(0, 1, num_seeds) * truth.shared_runs
    metric = metric_for(truth.kind) if truth.kind == "segmentation" else QUICK_AUC
    make = partial(_dice if truth.kind == "segmentation" else _scores, num_patients, generator)
    # Half of the patients have the finding; every bootstrap resample may have other numbers.
    targets = np.arange(num_patients) % 2.0
    common = generator.normal(0, 1, num_patients)
    cells, run_values = {}, {}
    for init, gain in truth.gains.items():
        gains = gain + shared + generator.normal(0, 1, num_seeds) * truth.runs
        run_values[init] = truth.run_value(gains)
        of_init = generator.normal(0, 1, num_patients)
        cells[init] = [
            SeedCell(np.arange(num_patients), targets, make(common, of_init, one, targets))
            for one in gains
        ]
    return Study(cells, run_values, metric, num_patients)


def _dice(
    num_patients: int,
    generator: np.random.Generator,
    common: Array,
    of_init: Array,
    gain: float,
    targets: Array,
) -> Array:
    # Errors of patients are lognormal: most are small, some patients fail, as Dice has it.
    error = 0.2 * np.exp(0.5 * common - 0.125)
    helped = 0.15 * error * of_init
    noise = 0.1 * error * generator.normal(0, 1, num_patients)
    return np.asarray((1 - error + gain + helped + noise)[:, None])


def _scores(
    num_patients: int,
    generator: np.random.Generator,
    common: Array,
    of_init: Array,
    gain: float,
    targets: Array,
) -> Array:
    score = gain * targets + _COMMON * common + _OF_INIT * of_init
    return np.asarray((score + _OF_RUN * generator.normal(0, 1, num_patients))[:, None])


@dataclass
class Rates:
    """How often something held.

    Attributes:
        effects: intervals of differences that hold the true one.
        estimates: intervals of single inits that hold the true value.
        better: studies in which an init was wrongly called better, before any correction.
    """

    effects: float
    estimates: float
    better: float


def coverage(
    truth: Truth,
    num_patients: int,
    num_seeds: int,
    *,
    num_studies: int,
    num_resamples: int = 1_000,
    alpha: float = 0.05,
    seed: int = 0,
) -> Rates:
    """Return how often intervals hold the truth.

    With one seed, the truth is what that one run is worth on all patients: nothing else is claimed.
    """
    generator = np.random.default_rng([seed, num_patients, num_seeds])
    counts = np.zeros(3)
    init, reference = next(name for name in truth.gains if name != "imagenet"), "imagenet"
    for _ in range(num_studies):
        study = draw_study(truth, num_patients, num_seeds, generator)
        draws = draw_resamples(generator, num_resamples, num_patients)
        if num_seeds == 1:
            values = {name: float(found[0]) for name, found in study.run_values.items()}
        else:
            values = {name: truth.value(gain) for name, gain in truth.gains.items()}
        effect = study.effect(init, draws)
        low, high = effect.interval(alpha)
        wanted = values[init] - values[reference]
        below, above = study.estimate(init, draws).interval_of_share(alpha)
        counts += [low <= wanted <= high, below <= values[init] <= above, low > wanted]
    return Rates(*(counts / num_studies))


def as_predictions(study: Study, task: str = "task", num_labelled: int = 10) -> pd.DataFrame:
    """Return a study as the table that a transfer writes."""
    rows = []
    for init, cells in study.cells.items():
        for seed, cell in enumerate(cells):
            for patient in range(study.num_patients):
                rows.append(
                    {
                        "init": init,
                        "pretext": "" if init in ("random", "imagenet") else init,
                        "backbone": "resnet18",
                        "task": task,
                        "task_kind": "segmentation"
                        if study.metric.name == "dice"
                        else "classification",
                        "protocol": "fine_tune",
                        "layer": "",
                        "selected": True,
                        "label_fraction": num_labelled / 100,
                        "num_labelled_patients": num_labelled,
                        "seed": seed,
                        "patient_key": f"p{patient:04}",
                        "scan_key": f"s{patient:04}",
                        "target": cell.targets[patient],
                        "scores": cell.scores[patient],
                    }
                )
    return pd.DataFrame(rows)
