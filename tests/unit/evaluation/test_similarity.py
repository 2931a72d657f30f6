"""Likeness of features, and what they tell apart: where the truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ortho_group

from medssl.evaluation.similarity import linear_cka, project, told_apart


def features(seed: int, num_scans: int = 60, width: int = 200) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num_scans, width))


def test_features_turned_scaled_and_moved_are_the_same():
    first = features(0, width=20)
    turned = 3 * first @ ortho_group.rvs(20, random_state=0) + 5
    assert linear_cka(first, turned) == pytest.approx(1)


def test_unrelated_features_are_unlike_though_they_are_more_than_the_scans():
    found = [linear_cka(features(2 * n), features(2 * n + 1)) for n in range(20)]
    assert abs(np.mean(found)) < 0.02
    assert max(map(abs, found)) < 0.1


def test_likeness_falls_with_the_noise_between():
    first, noise = features(0), features(1)
    found = [linear_cka(first, first + share * noise) for share in (0, 0.5, 1, 2)]
    assert found == sorted(found, reverse=True)
    assert found[0] == pytest.approx(1)


def test_constant_features_have_no_likeness():
    assert np.isnan(linear_cka(np.ones((10, 3)), features(0, 10, 3)))
    assert np.isnan(linear_cka(features(0, 3, 3), features(1, 3, 3)))


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_a_map_keeps_two_groups_apart(method: str):
    rows = features(0, 40, 10)
    rows[20:] += 8
    placed = project(rows, method, seed=0)
    assert placed.shape == (40, 2)
    centres = placed[:20].mean(0), placed[20:].mean(0)
    nearer = [np.linalg.norm(placed - centre, axis=1) for centre in centres]
    assert ((nearer[0] < nearer[1]) == (np.arange(40) < 20)).all()
    np.testing.assert_array_equal(placed, project(rows, method, seed=0))


def test_scanners_that_leave_a_trace_are_told_apart():
    rows = features(0, 60, 5)
    rows[::2] += 4
    found = told_apart(rows, ["a", "b"] * 30, [str(n // 2) for n in range(60)])
    assert found is not None
    assert found[0] > 0.95
    assert found[1] == 0.5


def test_scanners_that_leave_none_are_told_as_by_guessing():
    names = ["a"] * 30 + ["b"] * 30
    found = [told_apart(features(n, 60, 5), names, [str(k) for k in range(60)]) for n in range(10)]
    assert np.mean([part[0] for part in found if part]) == pytest.approx(0.5, abs=0.06)


def test_a_patient_is_not_learned_and_tested():
    """Twelve patients with features of their own, each on one scanner, drawn without a rule."""
    own = features(0, 12, 50)
    rows = np.repeat(own, 10, axis=0) + 0.01 * features(1, 120, 50)
    patients = np.repeat([str(n) for n in range(12)], 10)
    names = np.repeat(["a", "b"] * 6, 10)
    found = told_apart(rows, list(names), list(patients))
    assert found is not None
    assert found[0] < 0.85  # patients shared between folds would give 1


def test_groups_of_few_patients_are_left_out():
    names = ["a"] * 20 + ["b"] * 20
    assert told_apart(features(0, 40, 5), names, ["p"] * 20 + [str(n) for n in range(20)]) is None
