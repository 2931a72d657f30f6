"""Linear models: scikit-learn's solutions, in the space of rows as in that of features."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional

from medssl.evaluation.linear_models import (
    FeatureSpace,
    Models,
    RowSpace,
    Space,
    fit_logistic,
    fit_ridge,
    space_of,
    weights_of,
)

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
DATA: dict[str, Any] = {
    "tumours, 2 classes": load_breast_cancer,
    "wines, 3 classes": load_wine,
    "digits, 10 classes": load_digits,
}
SPACES = ["features", "rows"]


def halves(load: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return standardised training rows and answers, then those held out."""
    rows, answers = load(return_X_y=True)
    scaler = StandardScaler().fit(rows[::2])
    return scaler.transform(rows[::2]), answers[::2], scaler.transform(rows[1::2]), answers[1::2]


def space_called(name: str, rows: np.ndarray) -> Space:
    x_ND = torch.tensor(rows)
    return FeatureSpace(x_ND) if name == "features" else RowSpace(x_ND @ x_ND.T)


def coefficients(models: Models, space: Space, rows: np.ndarray) -> np.ndarray:
    """Return weights (P, K, D)."""
    return weights_of(models, space, torch.tensor(rows)).transpose(1, 2).numpy()


def answers_for(models: Models, space: Space, train: np.ndarray, new: np.ndarray) -> Tensor:
    rows = torch.tensor(new)
    return models.answers(rows @ torch.tensor(train).T if isinstance(space, RowSpace) else rows)


def one_column_a_class(classes: np.ndarray) -> Tensor:
    """Return one column where there are two classes, else one a class."""
    columns = functional.one_hot(torch.tensor(classes))
    return columns[:, 1:] if columns.shape[1] == 2 else columns


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("load", DATA.values(), ids=DATA.keys())
def test_weights_area_and_chosen_strength_are_scikit_learns(load: Any, space: str):
    train, classes, held_out, answers = halves(load)
    coordinates = space_called(space, train)
    models = fit_logistic(coordinates, one_column_a_class(classes), STRENGTHS, tolerance=1e-8)
    found = answers_for(models, coordinates, train, held_out)
    binary = found.shape[2] == 1
    losses, their_losses = [], []
    for fit, strength in enumerate(STRENGTHS):
        theirs = LogisticRegression(C=1 / (strength * len(train)), tol=1e-9, max_iter=20_000)
        theirs.fit(train, classes)
        weights = coefficients(models, coordinates, train)[fit]
        np.testing.assert_allclose(weights, theirs.coef_, atol=1e-3)
        intercepts = models.bias[fit].numpy()
        if not binary:  # a constant added to all of them changes nothing
            intercepts = intercepts - intercepts.mean() + theirs.intercept_.mean()
        np.testing.assert_allclose(intercepts, theirs.intercept_, atol=1e-3)
        shares = functional.softmax(found[fit], 1).numpy()
        if binary:
            yes = found[fit].sigmoid().numpy()
            shares = np.hstack([1 - yes, yes])
        wanted = theirs.predict_proba(held_out)
        areas = [
            roc_auc_score(answers, part[:, 1] if binary else part, multi_class="ovr")
            for part in (shares, wanted)
        ]
        assert areas[0] == pytest.approx(areas[1], abs=1e-3)
        losses.append(log_loss(answers, shares))
        their_losses.append(log_loss(answers, wanted))
    assert np.argmin(losses) == np.argmin(their_losses)


@pytest.mark.parametrize("space", SPACES)
def test_ridge_is_scikit_learns(space: str):
    train, numbers, held_out, answers = halves(load_diabetes)
    coordinates = space_called(space, train)
    two = torch.tensor(np.stack([numbers, numbers[::-1].copy()], axis=1))
    models = fit_ridge(coordinates, two, STRENGTHS)
    found = answers_for(models, coordinates, train, held_out).numpy()
    errors, their_errors = [], []
    for fit, strength in enumerate(STRENGTHS):
        theirs = Ridge(alpha=strength * len(train)).fit(train, two.numpy())
        weights = coefficients(models, coordinates, train)[fit]
        np.testing.assert_allclose(weights, theirs.coef_, atol=1e-6)
        np.testing.assert_allclose(models.bias[fit].numpy(), theirs.intercept_, atol=1e-6)
        np.testing.assert_allclose(found[fit], theirs.predict(held_out), atol=1e-6)
        errors.append(np.abs(found[fit, :, 0] - answers).mean())
        their_errors.append(np.abs(theirs.predict(held_out)[:, 0] - answers).mean())
    assert np.argmin(errors) == np.argmin(their_errors)


def test_the_cheaper_space_is_chosen():
    assert isinstance(space_of(torch.zeros(3, 4)), RowSpace)
    assert isinstance(space_of(torch.zeros(4, 3)), FeatureSpace)


def test_more_features_than_rows_are_solved_exactly_among_the_rows():
    generator = np.random.default_rng(0)
    train, classes = generator.normal(size=(40, 500)), np.arange(40) % 3
    space = space_called("rows", train)
    models = fit_logistic(space, one_column_a_class(classes), [0.1, 10.0], tolerance=1e-9)
    for fit, strength in enumerate([0.1, 10.0]):
        theirs = LogisticRegression(C=1 / (strength * 40), tol=1e-10, max_iter=20_000)
        theirs.fit(train, classes)
        np.testing.assert_allclose(coefficients(models, space, train)[fit], theirs.coef_, atol=1e-6)


def test_fits_that_weigh_rows_differently_are_solved_together():
    train, classes, _, _ = halves(load_breast_cancer)
    weights = torch.ones(3, len(train))
    weights[1, ::3] = 0  # a fold held out
    weights[2, torch.tensor(classes) == 0] = 5  # a class that counts more
    space = space_called("features", train)
    models = fit_logistic(
        space, one_column_a_class(classes), [0.01] * 3, weights=weights, tolerance=1e-8
    )
    for fit in range(3):
        counts = weights[fit].numpy()
        theirs = LogisticRegression(C=1 / (0.01 * counts.sum()), tol=1e-9, max_iter=20_000)
        theirs.fit(train, classes, sample_weight=counts)
        np.testing.assert_allclose(models.coordinates[fit].T, theirs.coef_, atol=1e-3)


def test_fits_may_have_targets_of_their_own():
    train, classes, _, _ = halves(load_wine)
    targets = torch.stack([torch.tensor(classes == label)[:, None] for label in range(3)])
    together = fit_logistic(space_called("rows", train), targets, [0.01] * 3)
    for label in range(3):
        alone = fit_logistic(space_called("rows", train), targets[label], [0.01])
        torch.testing.assert_close(
            together.coordinates[label], alone.coordinates[0], atol=1e-5, rtol=0
        )


def test_solving_in_several_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    train, classes, _, _ = halves(load_wine)
    space = space_called("rows", train)
    whole = fit_logistic(space, one_column_a_class(classes), STRENGTHS)
    monkeypatch.setattr("medssl.evaluation.linear_models._BYTES_AT_ONCE", 1)
    parts = fit_logistic(space, one_column_a_class(classes), STRENGTHS)
    torch.testing.assert_close(parts.coordinates, whole.coordinates, atol=1e-6, rtol=1e-4)


def test_a_fit_that_does_not_converge_is_warned_of(caplog: pytest.LogCaptureFixture):
    train, classes, _, _ = halves(load_breast_cancer)
    models = fit_logistic(
        space_called("features", train), one_column_a_class(classes), [1e-4, 1e3], max_steps=9
    )
    assert models.converged.tolist() == [False, True]
    assert caplog.text.endswith(
        "1 of 2 logistic regressions on 285 rows had not converged after 9 steps "
        "(strengths: 0.0001). Raise max_steps, or leave out the weakest strengths.\n"
    )


def test_rows_of_one_class_alone_give_finite_weights():
    train, _, _, _ = halves(load_wine)
    models = fit_logistic(space_called("rows", train), torch.ones(len(train), 1), [0.01])
    assert models.coordinates.isfinite().all()
    assert models.bias.item() > 5


@pytest.mark.gpu
@pytest.mark.parametrize("space", SPACES)
def test_the_solutions_on_a_gpu_are_those_on_the_cpu(space: str):
    train, classes, _, _ = halves(load_digits)
    here = space_called(space, train)
    there = type(here)(here.matrix.cuda())
    columns = one_column_a_class(classes)
    one, two = (fit_logistic(place, columns, STRENGTHS, tolerance=1e-8) for place in (here, there))
    np.testing.assert_allclose(two.coordinates.cpu(), one.coordinates, atol=1e-5)
    numbers = torch.tensor(classes)[:, None]
    one, two = (fit_ridge(place, numbers, STRENGTHS) for place in (here, there))
    np.testing.assert_allclose(two.coordinates.cpu(), one.coordinates, atol=1e-8)
