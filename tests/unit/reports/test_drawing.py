"""Figures that stay legible with many inits, many patients and many classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medssl.reports.appearance import LIGHT, Theme
from medssl.reports.contents import Contents, read_contents
from medssl.reports.drawing import Palette, draw_confusion, draw_layers, draw_patients, picture


@pytest.fixture
def contents(light_run: Path) -> Contents:
    return read_contents(light_run)


def test_names_beside_many_curves_stay_apart_and_above_the_axis(contents: Contents):
    inits, layers = [f"init{number}" for number in range(9)], ["stem", "stage1"]
    rows = [
        {"init": init, "layer": layer, "value": value, "ci_low": value - 0.1, "ci_high": value}
        for init in inits
        for layer, value in zip(layers, (0.9, 0.2), strict=True)
    ]
    axes = Figure().add_subplot()
    chosen = pd.DataFrame({"init": [], "layer": []})
    draw_layers(axes, LIGHT, pd.DataFrame(rows), chosen, "Dice", Palette(contents))
    low, high = axes.get_ylim()
    heights = sorted(text.xy[1] for text in axes.texts)
    assert len(heights) == len(inits)
    assert heights[0] > low
    assert np.diff(heights).min() > 0.05 * (high - low)


def drawn_patients(contents: Contents, count: int) -> str:
    differences = {"rotation": np.linspace(-0.1, 0.1, count)}

    def draw(axes: Axes, theme: Theme) -> None:
        draw_patients(axes, theme, differences, Palette(contents))

    return picture("patients", "", "", "", draw, height=1.5).svg


def test_dots_of_very_many_patients_do_not_make_the_page_heavy(contents: Contents):
    few, many = drawn_patients(contents, 100), drawn_patients(contents, 20_000)
    assert "<image" not in few
    assert "<image" in many
    assert len(many) < 200_000


def test_a_confusion_matrix_draws_the_squares_that_hold_something():
    axes = Figure().add_subplot()
    shares = np.array([[1.0, 0.0], [0.25, 0.75]])
    draw_confusion(axes, LIGHT, shares, ["0°", "90°"])
    assert sorted(square.get_alpha() or square.get_facecolor()[3] for square in axes.patches) == [
        0.25, 0.75, 1.0,
    ]  # fmt: skip
    assert axes.get_ylim() == (1.5, -0.5)  # the first class on top


def test_a_name_with_signs_of_formulas_and_of_html_is_drawn_as_it_is():
    name = 'ours ($\\frac) <b> & "co" $'
    shown = picture(
        "named", "t", "c", name, lambda axes, theme: axes.set_title(name, color=theme.ink), height=2
    )
    assert "ours ($\\frac) &lt;b&gt; &amp; " in shown.svg
    assert "<b>" not in shown.drawn
