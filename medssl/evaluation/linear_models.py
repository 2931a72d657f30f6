"""Linear models on frozen features: logistic regression and ridge, many fits at once.

Fits that share their rows (strengths, labels, folds) are solved together: a step of all of them is
two products with one matrix. Where there are fewer rows than features, that matrix is the rows'
Gram matrix and a step one product: the solution of an L2-penalised problem is a combination of the
rows it is fitted to (the representer theorem), so nothing is lost, and a step costs rows x rows
instead of rows x features.

Both minimise the mean loss + ``strength / 2`` x the squared weights, the bias left alone. So
``strength`` is scikit-learn's ``1 / (C * rows)`` and, for ridge, its ``alpha / rows``.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from medssl.evaluation.minimisation import Line, Problems, minimise

_log = logging.getLogger(__name__)

_BYTES_AT_ONCE = 2**30
"""Memory for the vectors of the fits that are solved together."""

_VECTORS_OF_A_FIT = 30
"""Vectors that the solver holds for each fit, its history and scratch included."""


class Space(ABC):
    """The coordinates in which models are found.

    Args:
        matrix: float64, (m, n), for m training rows; times a model's coordinates (n,) it gives the
            model's answers for the rows, without bias.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    @abstractmethod
    def vectors(self, residuals: Tensor) -> Tensor:
        """Return the sum of the rows weighted by residuals (m, C), as vectors (V, C)."""

    @abstractmethod
    def answers(self, vectors: Tensor) -> Tensor:
        """Return the answers for the training rows (m, C) of vectors (V, C)."""

    @abstractmethod
    def products(self, left: Tensor, right: Tensor, num_outputs: int) -> Tensor:
        """Return inner products of weights, (P, a, b), of (P, a, V * K) with (P, b, V * K)."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Numbers that the solver keeps of a vector, V; the first n are its coordinates."""


class FeatureSpace(Space):
    """Weights as they are: the matrix holds the rows (m, D)."""

    def vectors(self, residuals: Tensor) -> Tensor:
        return self.matrix.T @ residuals

    def answers(self, vectors: Tensor) -> Tensor:
        return self.matrix @ vectors

    def products(self, left: Tensor, right: Tensor, num_outputs: int) -> Tensor:
        return left @ right.transpose(1, 2)

    @property
    def length(self) -> int:
        return self.matrix.shape[1]


class RowSpace(Space):
    """Weights as combinations of the rows: the matrix is their Gram matrix (m, m).

    A vector holds the combination and its answers for the rows: together they give inner products
    of weights, and every place on a line, without another product with the matrix.
    """

    def vectors(self, residuals: Tensor) -> Tensor:
        return torch.cat([residuals, self.matrix @ residuals])

    def answers(self, vectors: Tensor) -> Tensor:
        return vectors[len(self.matrix) :]

    def products(self, left: Tensor, right: Tensor, num_outputs: int) -> Tensor:
        end = len(self.matrix) * num_outputs
        return left[..., :end] @ right[..., end:].transpose(1, 2)

    @property
    def length(self) -> int:
        return 2 * len(self.matrix)


@dataclass(frozen=True)
class Models:
    """P fitted models of one space.

    Attributes:
        coordinates: (P, n, K): weights, or how they combine the training rows.
        bias: (P, K).
        converged: (P,) bool.
        steps: made by the slowest.
    """

    coordinates: Tensor
    bias: Tensor
    converged: Tensor
    steps: int = 0

    def answers(self, rows: Tensor) -> Tensor:
        """Return what every model answers, (P, N, K).

        Args:
            rows: (N, n): features; in `RowSpace` their products with the training rows.
        """
        return rows @ self.coordinates + self.bias[:, None]


def space_of(rows: Tensor) -> Space:
    """Return the space in which fits to rows (m, D), float64, cost least."""
    return RowSpace(rows @ rows.T) if len(rows) < rows.shape[1] else FeatureSpace(rows)


def weights_of(models: Models, space: Space, rows: Tensor) -> Tensor:
    """Return the weights (P, D, K) of models of a space of rows (m, D)."""
    return rows.T @ models.coordinates if isinstance(space, RowSpace) else models.coordinates


def fit_logistic(
    space: Space,
    targets: Tensor,
    strengths: Sequence[float],
    *,
    weights: Tensor | None = None,
    max_steps: int = 1000,
    tolerance: float = 1e-6,
) -> Models:
    """Fit P logistic regressions: binary ones where K is 1, else multinomial ones.

    Args:
        space: the training rows.
        targets: (m, K), or (P, m, K) where every fit has its own: 1 for a row's class, else 0.
        strengths: the L2 penalty of each fit.
        weights: (P, m), not negative: what a row counts in each fit; all alike by default.
        max_steps: of L-BFGS; the log tells of fits that need more.
        tolerance: a fit is done when its gradient's norm has fallen to this share of the first.
    """
    like = space.matrix
    num_fits, num_rows, num_outputs = len(strengths), like.shape[0], targets.shape[-1]
    targets = targets.to(like).expand(num_fits, num_rows, num_outputs)
    if weights is None:
        weights = torch.ones(num_fits, num_rows)
    weights = weights.to(like)
    shares = (weights / weights.sum(1, keepdim=True))[..., None]
    penalties = torch.tensor(strengths, dtype=like.dtype, device=like.device)
    vector = (space.length + num_rows) * num_outputs * like.element_size()
    size = max(1, _BYTES_AT_ONCE // (vector * _VECTORS_OF_A_FIT))
    groups = zip(targets.split(size), shares.split(size), penalties.split(size), strict=True)
    found = [
        minimise(_Logistic(space, *group), max_steps=max_steps, tolerance=tolerance)
        for group in groups
    ]
    vectors = torch.cat([part.vectors for part in found])
    models = Models(
        vectors[:, : like.shape[1] * num_outputs].unflatten(1, (-1, num_outputs)),
        vectors[:, -num_outputs:],
        torch.cat([part.converged for part in found]),
        max(part.steps for part in found),
    )
    _warn(models, strengths, num_rows)
    return models


def _warn(models: Models, strengths: Sequence[float], num_rows: int) -> None:
    missed = [strengths[fit] for fit in (~models.converged).nonzero().flatten().tolist()]
    if missed:
        _log.warning(
            "%d of %d logistic regressions on %d rows had not converged after %d steps "
            "(strengths: %s). Raise max_steps, or leave out the weakest strengths.",
            len(missed), len(strengths), num_rows, models.steps,
            ", ".join(f"{strength:g}" for strength in sorted(set(missed))),
        )  # fmt: skip


def fit_ridge(space: Space, targets: Tensor, strengths: Sequence[float]) -> Models:
    """Fit one ridge regression a strength, in closed form.

    Args:
        space: the training rows.
        targets: (m, K) numbers; every column has its own weights.
        strengths: the L2 penalties, P.
    """
    matrix = space.matrix
    targets = targets.to(matrix)
    centred = matrix - matrix.mean(0)
    if isinstance(space, RowSpace):
        centred = centred - centred.mean(1, keepdim=True)
        system, wanted = centred, targets - targets.mean(0)
    else:
        system, wanted = centred.T @ centred, centred.T @ (targets - targets.mean(0))
    coordinates = []
    for strength in strengths:
        shifted = system.clone()
        shifted.diagonal().add_(strength * len(matrix))
        coordinates.append(torch.cholesky_solve(wanted, torch.linalg.cholesky(shifted)))
    found = torch.stack(coordinates)
    bias = targets.mean(0) - matrix.mean(0) @ found
    return Models(found, bias, torch.ones(len(strengths), dtype=torch.bool, device=found.device))


class _Logistic(Problems):
    """Logistic regressions as the minimiser sees them.

    A vector holds what the space keeps of the weights (V * K), then the bias (K).

    Args:
        space: the training rows.
        targets: (P, m, K).
        shares: (P, m, 1), what each row counts; they add up to 1.
        penalties: (P,).
    """

    def __init__(self, space: Space, targets: Tensor, shares: Tensor, penalties: Tensor) -> None:
        self._space, self._targets, self._shares = space, targets, shares
        self._penalties = penalties
        self._outputs = targets.shape[2]

    def only(self, kept: Tensor) -> _Logistic:
        rest = (part[kept] for part in (self._targets, self._shares, self._penalties))
        return _Logistic(self._space, *rest)

    def start(self) -> Tensor:
        return self._shares.new_zeros(len(self._targets), (self._space.length + 1) * self._outputs)

    def answers(self, vectors: Tensor) -> Tensor:
        weights, bias = self._split(vectors)
        columns = weights.unflatten(1, (-1, self._outputs)).transpose(0, 1).flatten(1)
        answers: Tensor = self._space.answers(columns).unflatten(1, (-1, self._outputs))
        return answers.transpose(0, 1) + bias[:, None]

    def gradient(self, vectors: Tensor, answers: Tensor) -> Tensor:
        residuals = self._shares * (_probabilities(answers) - self._targets)
        columns = residuals.transpose(0, 1).flatten(1)  # (m, P * K): all problems at once
        pulled = self._space.vectors(columns).unflatten(1, (-1, self._outputs))
        penalty = self._penalties[:, None] * self._split(vectors)[0]
        return torch.cat([pulled.transpose(0, 1).flatten(1) + penalty, residuals.sum(1)], dim=1)

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        (weights, bias), (others, their_bias) = self._split(left), self._split(right)
        products = self._space.products(weights, others, self._outputs)
        return products + bias @ their_bias.transpose(1, 2)

    def line(self, place: tuple[Tensor, Tensor], direction: tuple[Tensor, Tensor]) -> Line:
        begin, change = place[1], direction[1]
        along, squared = (self._penalty(vectors, direction[0]) for vectors, _ in (place, direction))
        wanted = (self._targets * change).sum(2)
        shares = self._shares[..., 0]

        def derivatives(share: Tensor) -> tuple[Tensor, Tensor]:
            found = _probabilities(torch.addcmul(begin, share.to(begin)[..., None, None], change))
            weighted = found * change
            mean = weighted.sum(2)
            slope = (shares * (mean - wanted)).sum(1)
            curvature = (shares * ((weighted * change).sum(2) - mean**2)).sum(1)
            return slope + along + share * squared, curvature + squared

        return derivatives

    def _penalty(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the penalties' bilinear form of vectors (P, L), (P,)."""
        weights, others = (self._split(vectors[:, None])[0] for vectors in (left, right))
        return self._penalties * self._space.products(weights, others, self._outputs)[:, 0, 0]

    def _split(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return the part of the weights and the bias of vectors (…, L)."""
        return vectors[..., : -self._outputs], vectors[..., -self._outputs :]


def _probabilities(answers: Tensor) -> Tensor:
    """Return probabilities (…, K) of answers: of yes where K is 1, else of each class."""
    return answers.sigmoid() if answers.shape[-1] == 1 else functional.softmax(answers, dim=-1)
