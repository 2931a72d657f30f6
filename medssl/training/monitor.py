"""Is a pretext task learning, stuck at chance, or solved too early to be honest?

Nothing here changes training: it puts words to the numbers of each validation.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from medssl.pretext.base import PretextTask
from medssl.training.validation import Scores

EARLY_SHARE = 0.5
"""Share of the steps within which a solved task is suspicious: anatomy takes longer to learn."""

STUCK_SHARE = 0.25
STUCK_STEPS = 200
"""A task at chance is stuck after this share of the steps, and at least this number of steps."""

_DEVIATIONS = 2.58
"""Of the binomial distribution of guessing: 99 % of guessers lie within."""

MOST_SHOWN_CLASSES = 128
"""Classes up to which the confusion matrix is written beside the checkpoint and drawn."""

State = Literal["nothing counts", "at chance", "stuck", "learning", "healthy", "suspicious"]

_REMEDIES = {
    "nothing counts": (
        "every puzzle lacks foreground: lower pretext.min_foreground, or raise "
        "sampling.min_foreground"
    ),
    "stuck": (
        "no better than guessing: lower the difficulty (fewer classes, larger tiles, fewer hidden "
        "voxels), or change training.learning_rate"
    ),
    "suspicious": (
        "solved early: a shortcut is likely; look at it with medssl pretext audit and preview, or "
        "make the task harder"
    ),
}


_BEATEN = "does no worse: train longer, or make the puzzle harder (larger holes, finer order)"


@dataclass(frozen=True)
class Health:
    """How one pretext task does.

    Attributes:
        state: see `judge`.
        value: of the primary metric.
        trivial: of the answer that needs no network.
        step: steps done.
        rivals: the same metric of cleverer answers that need no network, by name.
        beaten_by: those of them that do at least as well as the network.
    """

    state: State
    metric: str
    value: float
    trivial: float
    step: int
    rivals: Mapping[str, float] = field(default_factory=dict)
    beaten_by: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return state, numbers and, where there is something to do, what."""
        others = "".join(f", {name} {value:.3g}" for name, value in self.rivals.items())
        words = f"{self.state} ({self.metric} {self.value:.3g}, trivial {self.trivial:.3g}{others})"
        remedies = [_REMEDIES[self.state]] if self.state in _REMEDIES else []
        if self.beaten_by:
            remedies.append(f"{' and '.join(self.beaten_by)} needs no network and {_BEATEN}")
        return f"{words}: {'; '.join(remedies)}" if remedies else words


def judge(
    task: PretextTask,
    scores: Scores,
    step: int,
    num_steps: int,
    solved_early: Collection[str] = (),
    baselines: Mapping[str, float] | None = None,
) -> dict[str, Health]:
    """Return the health of each part of a task, by its prefix.

    ``at chance`` is no better than the trivial answer, ``stuck`` is that for too long,
    ``learning`` is below the healthy range, ``suspicious`` is better than it early in training.

    Args:
        task: what was trained.
        scores: what the validation found.
        step: steps done.
        num_steps: steps to be done.
        solved_early: parts that an earlier validation found suspicious; they stay so while they
            are solved.
        baselines: what `medssl.training.validation.ValidationPuzzles.baselines` found.
    """
    found = {
        prefix: _judge(part, prefix, scores, step, num_steps, baselines or {})
        for prefix, part in task.parts().items()
    }
    return {
        prefix: replace(health, state="suspicious")
        if prefix in solved_early and _is_solved(task.parts()[prefix], health.value)
        else health
        for prefix, health in found.items()
    }


def _is_solved(task: PretextTask, value: float) -> bool:
    low, high = task.healthy_range
    return value > high if task.higher_is_better else value < low


def _judge(
    task: PretextTask,
    prefix: str,
    scores: Scores,
    step: int,
    num_steps: int,
    baselines: Mapping[str, float],
) -> Health:
    metric = prefix + task.primary_metric
    value = scores.metrics.get(metric, math.nan)
    if math.isnan(value):
        return Health("nothing counts", metric, value, math.nan, step)
    trivial = trivial_value(task, prefix, scores)
    state = _state(task, value, trivial, _margin(task, prefix, scores), step / max(1, num_steps))
    if state == "at chance" and step >= max(STUCK_STEPS, STUCK_SHARE * num_steps):
        state = "stuck"
    sign = 1 if task.higher_is_better else -1
    rivals = {
        name: baselines[prefix + name]
        for name in task.baseline_metrics
        if math.isfinite(baselines.get(prefix + name, math.nan))
    }
    beaten_by = tuple(name for name, rival in rivals.items() if sign * (value - rival) <= 0)
    return Health(state, metric, value, trivial, step, rivals, beaten_by)


def trivial_value(task: PretextTask, prefix: str, scores: Scores) -> float:
    """Return the primary metric of the best answer that needs no network.

    Always giving the commonest class beats guessing where puzzles of some classes count more often
    than those of others.
    """
    if task.chance_level is None:
        return scores.metrics.get(f"{prefix}{task.trivial_metric}", math.nan)
    confusion = scores.confusions.get(prefix)
    if confusion is None or not task.higher_is_better:
        return task.chance_level
    return max(task.chance_level, float(confusion.sum(1).max() / confusion.sum().clamp(min=1)))


def _state(
    task: PretextTask, value: float, trivial: float, margin: float, share_done: float
) -> State:
    sign = 1 if task.higher_is_better else -1
    if not sign * (value - trivial) > margin:  # also where either is not a number
        return "at chance"
    low, high = task.healthy_range
    worst = low if task.higher_is_better else high
    if _is_solved(task, value) and share_done <= EARLY_SHARE:
        return "suspicious"
    return "learning" if sign * (value - worst) < 0 else "healthy"


def _margin(task: PretextTask, prefix: str, scores: Scores) -> float:
    """Return how far guessing may lie from chance, where the number of guesses is known."""
    if task.chance_level is None or prefix not in scores.confusions:
        return 0.0
    count = max(1.0, float(scores.confusions[prefix].sum()))
    return _DEVIATIONS * math.sqrt(task.chance_level * (1 - task.chance_level) / count)


def summary(task: PretextTask, scores: Scores, health: dict[str, Health]) -> dict[str, Any]:
    """Return all that a report shows of the last validation, as plain values for JSON.

    What is not a number is null.
    """
    return {
        "metrics": {name: _number(value) for name, value in scores.metrics.items()},
        "parts": [
            {
                "task": part.name,
                "metric": health[prefix].metric,
                "value": _number(health[prefix].value),
                "trivial": _number(health[prefix].trivial),
                "rivals": dict(health[prefix].rivals),
                "beaten_by": list(health[prefix].beaten_by),
                "healthy_range": list(part.healthy_range),
                "state": health[prefix].state,
                "words": str(health[prefix]),
                "classes": list(part.class_names())[: MOST_SHOWN_CLASSES + 1],
                "confusion": _shown(scores.confusions.get(prefix)),
            }
            for prefix, part in task.parts().items()
        ],
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _shown(confusion: Tensor | None) -> list[list[float]] | None:
    """Return a confusion matrix that people can still look at."""
    if confusion is None or len(confusion) > MOST_SHOWN_CLASSES:
        return None
    rows: list[list[float]] = confusion.tolist()
    return rows
