"""The grid of a linear probe: every layer, label fraction, seed and strength, against scikit-learn.

    make bench PYTEST_ARGS="-k probe_grid -s"

Both get the same float32 features, standardised over all training rows, the same subsets,
strengths and threads. scikit-learn's loop (LogisticRegression, lbfgs, BLAS on all threads) would
take long: it is timed on some strengths of one layer and one seed at every fraction, and the rest
of that fraction is taken to cost the same. What it would cost is told twice: with all seeds, and
with the full fraction solved once, as all seeds share its rows (medssl knows that).

Its own tolerance, 1e-4, leaves the weakest strengths unfinished: their areas under the curve are
off by up to 0.01. So it is timed as it comes (in float32), and as precisely as it takes for equal
areas (1e-6, float64); the areas of the latter are compared fit by fit.

A smaller grid, by environment variables: MEDSSL_PROBE_ROWS, MEDSSL_PROBE_FEATURES,
MEDSSL_PROBE_LAYERS, MEDSSL_PROBE_SEEDS.
"""

from __future__ import annotations

import os
import time
import warnings
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from medssl.evaluation.answers import fit
from medssl.evaluation.feature_table import FeatureTable
from medssl.evaluation.protocols._dense_probe import STRENGTHS

_ROWS = int(os.environ.get("MEDSSL_PROBE_ROWS", "5000"))
_FEATURES = int(os.environ.get("MEDSSL_PROBE_FEATURES", "9000"))
_LAYERS = int(os.environ.get("MEDSSL_PROBE_LAYERS", "5"))
_SEEDS = int(os.environ.get("MEDSSL_PROBE_SEEDS", "5"))
_FRACTIONS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0)
_VALIDATION_ROWS = 500
_SAMPLED_STRENGTHS = STRENGTHS[::3]
_EQUAL_AREA = 1e-3

Areas = dict[tuple[float, float], float]


def features_of(layer: int) -> tuple[Tensor, Tensor]:
    """Return rows (N, D) float32 whose spectrum decays, and classes that some of it tells."""
    generator = torch.Generator().manual_seed(layer)
    hidden = torch.randn(_ROWS + _VALIDATION_ROWS, 300, generator=generator)
    hidden *= torch.arange(1, 301) ** -0.5
    rows = hidden @ torch.randn(300, _FEATURES, generator=generator)
    rows += 0.5 * torch.randn(rows.shape, generator=generator)
    told = hidden[:, 5:25].sum(1)
    noise = told.std() * torch.randn(len(told), generator=generator)
    return rows, (told + noise > 0).long()


def subset(fraction: float, seed: int) -> list[int]:
    """Return the labelled rows; fewer are among more."""
    order = np.random.default_rng(seed).permutation(_ROWS)
    return sorted(order[: round(fraction * _ROWS)].tolist())


def solve_layer(rows: Tensor, classes: Tensor, spent: dict[float, float]) -> tuple[Areas, float]:
    """Solve a layer's grid as the probe does; return seed 0's areas and the time of the set-up."""
    begin = time.perf_counter()
    table = FeatureTable(rows, range(_ROWS), torch.device("cpu"))
    table.space([0])  # the products of all rows
    prepared = time.perf_counter() - begin
    val = list(range(_ROWS, len(rows)))
    areas: Areas = {}
    known: set[tuple[int, ...]] = set()
    for fraction in _FRACTIONS:
        begin = time.perf_counter()
        for seed in range(_SEEDS):
            chosen = subset(fraction, seed)
            if tuple(chosen) in known:
                continue
            known.add(tuple(chosen))
            models = fit(
                table.space(chosen),
                "class",
                classes[chosen, None].double(),
                2,
                [strength * _FEATURES for strength in STRENGTHS],
            )
            for strength, scores in zip(
                STRENGTHS, models.answers(table.inputs(val, chosen)), strict=True
            ):
                area = float(roc_auc_score(classes[val], scores[:, 0]))
                areas.setdefault((fraction, strength), area)
            assert bool(models.converged.all())
        spent[fraction] += time.perf_counter() - begin
    return areas, prepared


def solve_sample_by_scikit_learn(
    rows: Tensor, classes: Tensor, kind: type[np.floating[Any]], tolerance: float
) -> tuple[Areas, dict[float, float], float]:
    """Return areas, seconds a fit by fraction, and seconds to standardise."""
    begin = time.perf_counter()
    given = rows.numpy().astype(kind)
    standardised = StandardScaler().fit(given[:_ROWS]).transform(given)
    prepared = time.perf_counter() - begin
    areas: Areas = {}
    spent: dict[float, float] = {}
    for fraction in _FRACTIONS:
        chosen = subset(fraction, 0)
        begin = time.perf_counter()
        for strength in _SAMPLED_STRENGTHS:
            inverse = 1 / (strength * _FEATURES * len(chosen))
            model = LogisticRegression(C=inverse, max_iter=5000, tol=tolerance)
            with warnings.catch_warnings():  # of line searches at the end of float32
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.fit(standardised[chosen], classes[chosen].numpy())
            scores = model.decision_function(standardised[_ROWS:])
            areas[fraction, strength] = float(roc_auc_score(classes[_ROWS:], scores))
        spent[fraction] = (time.perf_counter() - begin) / len(_SAMPLED_STRENGTHS)
    return areas, spent, prepared


@pytest.mark.timeout(7200)
def test_probe_grid(capsys: pytest.CaptureFixture[str]) -> None:
    ours: dict[float, float] = defaultdict(float)
    areas: Areas = {}
    prepared = 0.0
    for layer in reversed(range(_LAYERS)):
        rows, classes = features_of(layer)
        areas, seconds = solve_layer(rows, classes, ours)
        prepared += seconds
    total = prepared + sum(ours.values())
    fits = len(STRENGTHS) * _LAYERS
    with capsys.disabled():
        print(
            f"\n{_LAYERS} layers x {len(_FRACTIONS)} fractions x {_SEEDS} seeds x "
            f"{len(STRENGTHS)} strengths, {_ROWS:,} x {_FEATURES:,} features, "
            f"{torch.get_num_threads()} threads\n"
            f"medssl: {total:.0f} s: products {prepared:.1f} s, fractions "
            + ", ".join(f"{fraction:.0%} {ours[fraction]:.1f} s" for fraction in _FRACTIONS)
        )
    largest = {}
    for kind, tolerance in ((np.float32, 1e-4), (np.float64, 1e-6)):
        theirs, a_fit, standardising = solve_sample_by_scikit_learn(rows, classes, kind, tolerance)
        largest[tolerance] = max(abs(areas[key] - area) for key, area in theirs.items())
        every = {fraction: a_fit[fraction] * fits * _SEEDS for fraction in _FRACTIONS}
        with capsys.disabled():
            print(
                f"scikit-learn, {kind.__name__}, tolerance {tolerance:g}, {len(theirs)} fits: "
                + ", ".join(f"{fraction:.0%} {a_fit[fraction]:.2f} s" for fraction in _FRACTIONS)
                + f" a fit; area differs by {largest[tolerance]:.1e} at most"
            )
            for name, cost in (
                ("every seed", every), ("full fraction once", {**every, 1.0: a_fit[1.0] * fits}),
            ):  # fmt: skip
                whole = standardising * _LAYERS + sum(cost.values())
                print(f"  {name}: {whole:.0f} s extrapolated, {whole / total:.1f} times medssl's")
    assert largest[1e-6] < _EQUAL_AREA
