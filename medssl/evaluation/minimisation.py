"""L-BFGS for many smooth convex problems at once, each with its own history and line search.

The direction comes from the compact form of the inverse Hessian (Byrd, Nocedal, Schnabel,
"Representations of quasi-Newton matrices and their use in limited memory methods", Mathematical
Programming 1994, equation 2.6), which is a few batched products. Problems say what an inner
product is, so that they may keep more in a vector than its coordinates.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_HISTORY = 10
_LINE_STEPS = 20
_LINE_SHARE = 0.5
"""A line search is done when the slope has fallen to this share (the strong Wolfe condition)."""

_ROUNDING = 2.0**-52
"""A step that promises to lower the loss by less is lost in the rounding of the loss."""

_LARGEST_GROWTH = 10.0
"""A line search may go this many times further than before."""

Line = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Along a line, from the place (P,) of every problem: the loss's first and second derivative."""


class Problems(ABC):
    """P convex problems over vectors (P, L), whose losses are functions of linear answers."""

    @abstractmethod
    def start(self) -> Tensor:
        """Return where to begin, (P, L)."""

    @abstractmethod
    def answers(self, vectors: Tensor) -> Tensor:
        """Return what the losses are functions of, (P, …), linear in the vectors (P, L)."""

    @abstractmethod
    def gradient(self, vectors: Tensor, answers: Tensor) -> Tensor:
        """Return the gradient, (P, L), at vectors with those answers."""

    @abstractmethod
    def products(self, left: Tensor, right: Tensor) -> Tensor:
        """Return inner products, (P, a, b), of vectors (P, a, L) with vectors (P, b, L)."""

    @abstractmethod
    def line(self, place: tuple[Tensor, Tensor], direction: tuple[Tensor, Tensor]) -> Line:
        """Return the derivatives along a direction; both are vectors and their answers."""

    @abstractmethod
    def only(self, kept: Tensor) -> Problems:
        """Return some of the problems: those where (P,) bool is true."""


@dataclass(frozen=True)
class Minimum:
    """Where the problems ended.

    Attributes:
        vectors: (P, L).
        converged: (P,) bool.
        steps: made by the slowest problem.
    """

    vectors: Tensor
    converged: Tensor
    steps: int


def minimise(problems: Problems, *, max_steps: int, tolerance: float) -> Minimum:
    """Minimise all problems; losses are near 1, or less.

    Args:
        problems: what to minimise.
        max_steps: after which problems are left where they are.
        tolerance: share of its first norm to which a problem's gradient must fall, unless no step
            can be told from rounding before.
    """
    vectors = problems.start()
    answers = problems.answers(vectors)
    gradient = problems.gradient(vectors, answers)
    limit = tolerance * _norm(problems, gradient)
    history = _History(problems, vectors)
    found = vectors.clone()
    open_ones = torch.arange(len(vectors), device=vectors.device)
    for step in range(max_steps + 1):
        direction = history.direction(gradient)
        slope = _product(problems, gradient, direction)
        pending = (_norm(problems, gradient) > limit) & (-slope > _ROUNDING)
        if not bool(pending.all()):
            found[open_ones] = vectors
            open_ones, limit = open_ones[pending], limit[pending]
            vectors, answers = vectors[pending], answers[pending]
            gradient, direction, slope = (part[pending] for part in (gradient, direction, slope))
            problems = problems.only(pending)
            history.keep(problems, pending)
        if step == max_steps or not len(open_ones):
            break
        answers_along = problems.answers(direction)
        line = problems.line((vectors, answers), (direction, answers_along))
        share = _search(line, slope, is_scaled=step > 0)
        change = share[:, None] * direction
        vectors = vectors + change
        answers = answers + share.reshape(-1, *[1] * (answers.ndim - 1)) * answers_along
        before, gradient = gradient, problems.gradient(vectors, answers)
        history.add(change, gradient - before)
    found[open_ones] = vectors
    converged = torch.ones(len(found), dtype=torch.bool, device=found.device)
    converged[open_ones] = False
    return Minimum(found, converged, step)


def _norm(problems: Problems, vectors: Tensor) -> Tensor:
    return _product(problems, vectors, vectors).clamp(min=0).sqrt()


def _product(problems: Problems, left: Tensor, right: Tensor) -> Tensor:
    return problems.products(left[:, None], right[:, None])[:, 0, 0]


class _History:
    """The last changes of vectors and gradients; a change of nothing is a row of zeros."""

    def __init__(self, problems: Problems, like: Tensor) -> None:
        num_problems, length = like.shape
        self._problems = problems
        self._changes = like.new_zeros(num_problems, _HISTORY, length)
        self._gradients = like.new_zeros(num_problems, _HISTORY, length)
        self._scale = like.new_ones(num_problems)
        self._count = 0

    def keep(self, problems: Problems, kept: Tensor) -> None:
        """Forget the problems that are done."""
        self._problems, self._scale = problems, self._scale[kept]
        self._changes, self._gradients = self._changes[kept], self._gradients[kept]

    def add(self, change: Tensor, gradient: Tensor) -> None:
        """Keep a change of the vectors and of the gradient, (P, L), in the oldest one's place."""
        curvature = _product(self._problems, change, gradient)
        length = _product(self._problems, gradient, gradient)
        useful = (curvature > 0) & (length > 0)  # not where a problem has stopped
        place = self._count % _HISTORY
        self._changes[:, place] = torch.where(useful[:, None], change, 0.0)
        self._gradients[:, place] = torch.where(useful[:, None], gradient, 0.0)
        self._scale = torch.where(useful, curvature / length.where(useful, 1.0), self._scale)
        self._count += 1

    def direction(self, gradient: Tensor) -> Tensor:
        """Return the quasi-Newton direction, (P, L); it always leads downhill."""
        oldest_first = [(self._count + place) % _HISTORY for place in range(_HISTORY)]
        changes, gradients = self._changes, self._gradients
        scale = self._scale[:, None, None]
        both = self._problems.products(changes, torch.cat([gradients, gradient[:, None]], dim=1))
        along = both[:, oldest_first, -1:]
        across = self._problems.products(gradients, gradient[:, None])[:, oldest_first]
        mixed = both[..., :-1][:, oldest_first][:, :, oldest_first]
        upper = mixed.triu()
        curvature = upper.diagonal(dim1=1, dim2=2)
        unused = torch.diag_embed(torch.where(curvature == 0, 1.0, 0.0))
        squares = self._problems.products(gradients, gradients)
        squares = squares[:, oldest_first][:, :, oldest_first]
        solved = torch.linalg.solve_triangular(upper + unused, along, upper=True)
        inner = torch.diag_embed(curvature) @ solved + scale * (squares @ solved - across)
        of_changes = torch.linalg.solve_triangular(
            (upper + unused).transpose(1, 2), inner, upper=False
        )
        back = torch.argsort(torch.tensor(oldest_first)).tolist()
        step = scale[..., 0] * gradient
        step = step + torch.einsum("ph,phl->pl", of_changes[:, back, 0], changes)
        return -step + torch.einsum("ph,phl->pl", (scale * solved)[:, back, 0], gradients)


def _search(line: Line, slope: Tensor, *, is_scaled: bool) -> Tensor:
    """Return how far to go along a line, (P,), by Newton's method between safe bounds.

    Args:
        line: derivatives.
        slope: at the beginning, (P,), below 0.
        is_scaled: whether the direction knows its length, so that 1 is the place to begin with.
    """
    wanted = _LINE_SHARE * slope.abs()
    tiny = torch.finfo(slope.dtype).tiny
    place = torch.ones_like(slope)
    if not is_scaled:
        place = -slope / line(torch.zeros_like(slope))[1].clamp(min=tiny)
    low, high = torch.zeros_like(place), torch.full_like(place, math.inf)
    for _ in range(_LINE_STEPS):
        slope, curvature = line(place)
        done = slope.abs() <= wanted
        if bool(done.all()):
            return place
        low, high = torch.where(slope < 0, place, low), torch.where(slope > 0, place, high)
        newton = place - slope / curvature.clamp(min=tiny)
        bound = torch.minimum(high, _LARGEST_GROWTH * place)
        safe = torch.where(high.isinf(), bound, (low + high) / 2)
        place = torch.where(
            done, place, torch.where((newton > low) & (newton < bound), newton, safe)
        )
    return torch.where(low > 0, low, place)
