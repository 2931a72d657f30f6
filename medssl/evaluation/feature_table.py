"""The features of one layer as a table, standardised, and their products, computed once.

Mean and deviation are those of all training patients' features, whatever number of labels a cell
may use: features need no labels, and one matrix of products then serves every subset.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medssl.evaluation.linear_models import FeatureSpace, RowSpace, Space

_PRODUCTS_BYTES = 2**29
"""Products of a layer's rows are kept below this size, and computed for every subset above it."""

_FEATURES_AT_ONCE = 1024
"""Features that are standardised at once, which bounds memory."""

_CONSTANT = 1e-7
"""A feature with a deviation below this share of its size varies by rounding alone (float32)."""


def standardisation(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation (D,) of rows (m, D), float64; the deviation of a constant is 1."""
    deviation, mean = torch.std_mean(rows.double(), dim=0, correction=0)
    size = rows.abs().amax(0).double()
    return mean, torch.where(deviation > _CONSTANT * size, deviation, 1.0)


class FeatureTable:
    """The rows of all labelled scans for one layer.

    Args:
        rows: (N, D) features as they come.
        train: positions of the training patients' rows.
        device: where to compute.
    """

    def __init__(self, rows: Tensor, train: Sequence[int], device: torch.device) -> None:
        self.rows = rows
        self._device = device
        self._train = list(train)
        self._place = {row: place for place, row in enumerate(self._train)}
        self._mean, self._deviation = standardisation(rows[self._train])
        self._products: Tensor | None = None

    def space(self, chosen: Sequence[int]) -> Space:
        """Return the space of models that are fitted to some training rows."""
        if not self._in_rows(chosen):
            return FeatureSpace(self._standardised(chosen, slice(None)))
        return RowSpace(self._products_of(chosen, chosen))

    def inputs(self, wanted: Sequence[int], chosen: Sequence[int]) -> Tensor:
        """Return what models fitted to ``chosen`` take to answer for the rows ``wanted``."""
        if not self._in_rows(chosen):
            return self._standardised(wanted, slice(None))
        return self._products_of(chosen, wanted).T

    def _in_rows(self, chosen: Sequence[int]) -> bool:
        return len(chosen) < self.rows.shape[1]

    def _standardised(self, chosen: Sequence[int], features: slice) -> Tensor:
        part = self.rows[:, features][list(chosen)].double()
        part = (part - self._mean[features]) / self._deviation[features]
        return part.to(self._device)

    def _products_of(self, chosen: Sequence[int], wanted: Sequence[int]) -> Tensor:
        """Return the products (m, N) of standardised rows."""
        kept = self._all_products()
        if kept is None:
            return self._multiply(chosen, wanted)
        places = torch.tensor([self._place[row] for row in chosen], device=self._device)
        return kept[places][:, torch.tensor(list(wanted), device=self._device)]

    def _all_products(self) -> Tensor | None:
        """Return the products of training rows with all rows, unless that is too much."""
        many = len(self._train) >= self.rows.shape[1]  # then subsets of few rows cost less alone
        if many or 8 * len(self._train) * len(self.rows) > _PRODUCTS_BYTES:
            return None
        if self._products is None:
            self._products = self._multiply(self._train, range(len(self.rows)))
        return self._products

    def _multiply(self, left: Sequence[int], right: Sequence[int]) -> Tensor:
        sums = torch.zeros(len(left), len(right), dtype=torch.float64, device=self._device)
        for begin in range(0, self.rows.shape[1], _FEATURES_AT_ONCE):
            features = slice(begin, begin + _FEATURES_AT_ONCE)
            sums.addmm_(self._standardised(left, features), self._standardised(right, features).T)
        return sums
