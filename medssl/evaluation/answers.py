"""What linear models answer, for every kind of task: what is fitted, and the scores it gives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from medssl.downstream.base import Answer
from medssl.evaluation.linear_models import Models, Space, fit_logistic, fit_ridge

_LEAST_SHARE = 1e-12
"""Probabilities count as no less than this in a loss."""


def fit(
    space: Space,
    answer: Answer,
    targets: Tensor,
    num_outputs: int,
    strengths: Sequence[float],
    max_steps: int = 1000,
) -> Models:
    """Fit one model a strength to what is known of the rows.

    Args:
        space: the training rows.
        answer: of the task.
        targets: (m, T) float64: a class, labels (1, 0, NaN where unknown) or numbers.
        num_outputs: classes, labels or numbers.
        strengths: L2 penalties, S.
        max_steps: of the logistic regressions.

    Returns:
        S models; a single output where there are two classes.
    """
    if answer == "numbers":
        return fit_ridge(space, targets, strengths)
    if answer == "class":
        columns = functional.one_hot(targets[:, 0].long(), num_outputs)
        columns = columns[:, 1:] if num_outputs == 2 else columns
        return fit_logistic(space, columns, strengths, max_steps=max_steps)
    columns, weights = _known(targets.T)
    num_strengths = len(strengths)
    models = fit_logistic(
        space,
        columns.repeat(num_strengths, 1)[..., None],
        [strength for strength in strengths for _ in range(num_outputs)],
        weights=weights.repeat(num_strengths, 1),
        max_steps=max_steps,
    )
    return Models(
        models.coordinates[..., 0].unflatten(0, (num_strengths, -1)).transpose(1, 2),
        models.bias.view(num_strengths, num_outputs),
        models.converged.view(num_strengths, num_outputs).all(1),
        models.steps,
    )


def _known(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return labels and what each counts, both (T, m): a row counts where its label is known.

    A label that no row knows is answered by one half.
    """
    known = ~labels.isnan()
    nowhere = ~known.any(1, keepdim=True)
    return torch.where(nowhere, 0.5, labels.nan_to_num()), (known | nowhere).double()


def scores_of(answer: Answer, answers: Tensor) -> Tensor:
    """Return scores (…, K) of models' answers: probabilities, or the numbers themselves."""
    if answer == "numbers":
        return answers
    if answer == "labels":
        return answers.sigmoid()
    if answers.shape[-1] == 1:
        return torch.cat([-answers, answers], dim=-1).sigmoid()
    return functional.softmax(answers, dim=-1)


def mean_loss(answer: Answer, targets: Tensor, scores: Tensor) -> Tensor:
    """Return the mean loss (…) of scores (…, N, K) for targets (N, T).

    Cross-entropy or the squared error. It decides between settings that the metric finds alike,
    which is common where validation patients are few.
    """
    if answer == "numbers":
        return (scores - targets).square().nanmean((-2, -1))
    scores = scores.clamp(_LEAST_SHARE, 1 - _LEAST_SHARE)
    if answer == "labels":
        return -(targets * scores.log() + (1 - targets) * (1 - scores).log()).nanmean((-2, -1))
    classes = targets[:, 0].long()
    return -scores[..., torch.arange(len(classes)), classes].log().mean(-1)
