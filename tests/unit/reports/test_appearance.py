"""Colours that everybody can read, and figures that take them from the page."""

from __future__ import annotations

import re

import pytest

from medssl.reports.appearance import DARK, LIGHT, PRINTED, Theme, as_file, on_page, style

THEMES = {"light": LIGHT, "dark": DARK, "printed": PRINTED}
DRAWN = (
    '<?xml version="1.0"?><svg width="9pt" viewBox="0 0 9 9" version="1.1"><defs>'
    '<style type="text/css">*{stroke-linejoin: round}</style></defs><g id="axes_1">'
    '<path id="m1" style="stroke: #1c2126"/><use xlink:href="#m1" clip-path="url(#p1)"/>'
    "<text style=\"font-size: 9px; font-family: 'DejaVu Sans'; fill: #5b656e\">a &lt; b</text></g>"
    '<clipPath id="p1"/></svg>'
)


def luminance(colour: str) -> float:
    """WCAG 2.2's relative luminance."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's contrast ratio."""
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_black_on_white_has_the_greatest_contrast():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


@pytest.mark.parametrize("theme", THEMES.values(), ids=THEMES)
def test_text_can_be_read_on_every_ground(theme: Theme):
    for ground in (theme.page, theme.wash):
        for text in (theme.ink, theme.faint, theme.better, theme.worse):
            assert contrast(text, ground) >= 4.5, text
    assert contrast(theme.loud_ink, theme.loud) >= 4.5


@pytest.mark.parametrize("theme", THEMES.values(), ids=THEMES)
def test_curves_can_be_seen_and_told_apart(theme: Theme):
    curves = [theme.reference, theme.baseline, *theme.inits]
    assert len(set(curves)) == len(curves)
    for colour in curves:
        assert contrast(colour, theme.page) >= 3, colour


def test_all_appearances_set_the_same_names():
    assert LIGHT.variables().keys() == DARK.variables().keys() == PRINTED.variables().keys()


def test_style_sheets_use_no_colour_that_no_appearance_sets():
    sheets = str(style("report.css", "audit.css"))
    set_somewhere = set(re.findall(r"(--[a-z0-9-]+):", sheets))
    assert set(re.findall(r"var\((--[a-z0-9-]+)\)", sheets)) <= set_somewhere


def test_a_drawing_takes_the_colours_and_the_font_of_its_page():
    figure = on_page(DRAWN, "curve", 'rises "fast"')
    assert figure.startswith('<svg class="drawn" role="img" viewBox="0 0 9 9"')
    assert 'aria-label="rises &#34;fast&#34;"' in figure
    assert "stroke: var(--ink)" in figure
    assert "fill: var(--faint)" in figure
    assert "a &lt; b" in figure
    assert "font-family" not in figure
    assert "<style" not in figure


def test_names_inside_a_drawing_are_its_own():
    figure = on_page(DRAWN, "curve", "")
    assert 'id="curve-m1"' in figure
    assert 'href="#curve-m1"' in figure
    assert "url(#curve-p1)" in figure
    assert 'id="curve-p1"' in figure
    assert "axes_1" not in figure


def test_a_colour_that_would_not_follow_the_page_is_refused():
    with pytest.raises(ValueError, match="figure curve: #123456 is no colour of the theme"):
        on_page(DRAWN.replace("#1c2126", "#123456"), "curve", "")


def test_a_file_for_other_programs_keeps_its_colours_and_names_fonts_they_have():
    svg = as_file(DRAWN)
    assert "stroke: #1c2126" in svg
    assert "font-family: 'DejaVu Sans', Verdana, Arial, Helvetica, sans-serif;" in svg
