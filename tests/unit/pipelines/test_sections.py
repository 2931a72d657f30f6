"""Sections of configs: what they refuse, and the numbers they come to."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medssl.config import Config, validate_config
from medssl.errors import ConfigError
from medssl.pipelines.sections import MatrixConfig, SamplingConfig, SplitConfig, StatisticsConfig

REFUSED: list[tuple[type[Config], dict[str, Any], str]] = [
    (MatrixConfig, {}, "give either labelled_patients or label_fractions"),
    (
        MatrixConfig,
        {"labelled_patients": [2], "label_fractions": [0.5]},
        "give either labelled_patients or label_fractions",
    ),
    (
        MatrixConfig,
        {"labelled_patients": ["most"]},
        "labelled_patients holds numbers or the word all, not most",
    ),
    (MatrixConfig, {"labelled_patients": [0]}, "labelled_patients must be 1 or more"),
    (MatrixConfig, {"labelled_patients": []}, "give at least one number of labelled patients"),
    (MatrixConfig, {"label_fractions": []}, "give at least one number of labelled patients"),
    (MatrixConfig, {"label_fractions": [0]}, "label_fractions lie above 0 and at most at 1"),
    (MatrixConfig, {"label_fractions": [1.1]}, "label_fractions lie above 0 and at most at 1"),
    (
        MatrixConfig,
        {"labelled_patients": [1], "seeds": [1, 1]},
        "seeds must be different numbers, at least one",
    ),
    (
        MatrixConfig,
        {"labelled_patients": [1], "seeds": []},
        "seeds must be different numbers, at least one",
    ),
    (SamplingConfig, {"crop_size": [16]}, "crop_size: tuple should have at least 2 items"),
    (SamplingConfig, {"crop_size": [8] * 4}, "crop_size: tuple should have at most 3 items"),
    (
        SamplingConfig,
        {"crop_size": [8, 8], "plane": "oblique"},
        "plane: input should be 'sagittal', 'coronal' or 'axial' (found 'oblique')",
    ),
    (SplitConfig, {"val_fraction": 0}, "val_fraction: input should be greater than 0"),
    (SplitConfig, {"val_fraction": 0.5, "test_fraction": 0.5}, "add up to less than 1"),
    (StatisticsConfig, {"num_resamples": 10}, "greater than or equal to 100"),
    (StatisticsConfig, {"alpha": 0.5}, "alpha: input should be less than 0.5"),
    (StatisticsConfig, {"margin": {"dize": 0.1}}, "margin: there is no metric 'dize'"),
    (StatisticsConfig, {"margin": -0.1}, "margin must be 0 or more, not -0.1"),
    (StatisticsConfig, {"margin": {"dice": float("inf")}}, "margin must be 0 or more, not inf"),
]


@pytest.mark.parametrize(("section", "content", "text"), REFUSED)
def test_what_cannot_be_is_refused(section: type[Config], content: dict[str, Any], text: str):
    with pytest.raises(ConfigError) as refused:
        validate_config(content, section)
    assert text in str(refused.value)


def test_all_stands_for_every_training_patient():
    assert MatrixConfig(labelled_patients=("all", 5, 10)).numbers(40) == (5, 10, 40)


def test_more_patients_than_there_are_means_all_of_them_once():
    assert MatrixConfig(labelled_patients=(5, 50, "all")).numbers(20) == (5, 20)


def test_fractions_are_of_the_training_patients_and_at_least_one():
    assert MatrixConfig(label_fractions=(0.01, 0.1, 1.0)).numbers(40) == (1, 4, 40)


@given(fractions=st.lists(st.floats(0.001, 1), min_size=1, max_size=6), count=st.integers(1, 500))
def test_numbers_ascend_and_lie_within_reach(fractions: list[float], count: int):
    numbers = MatrixConfig(label_fractions=tuple(fractions)).numbers(count)
    assert list(numbers) == sorted(set(numbers))
    assert 1 <= numbers[0] <= numbers[-1] <= count


def test_a_crop_says_how_many_dimensions_there_are():
    slices = SamplingConfig(crop_size=(32, 24), plane="coronal", min_foreground=0.4)
    assert slices.spatial_dims == 2
    request = slices.request()
    assert (request.crop_size, request.plane, request.min_foreground) == ((32, 24), "coronal", 0.4)
    assert SamplingConfig(crop_size=(8, 8, 8)).request().spatial_dims == 3
