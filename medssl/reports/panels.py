"""Pictures of pretext puzzles: rows of small images, grey or in colour, with titles."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from medssl.atomic import atomic_write

_INCHES = 1.6
"""The longer side of the largest image, and the width of a column."""

_DPI = 120
_TITLE_WIDTH = 24  # letters of a title that fit above an image
_LINE_INCHES = 0.13
_GAP_INCHES = 0.12
_HEADING_INCHES = 0.4


def save_panels(
    path: Path,
    rows: Sequence[Sequence[tuple[npt.NDArray[Any], str]]],
    *,
    heading: str = "",
    mode: int = 0o644,
) -> None:
    """Write a PNG of rows of images.

    Args:
        path: the PNG file.
        rows: each a list of (image (X, Y), grey, or (X, Y, 3), red, green and blue, in [0, 1];
            title). X runs to the right, Y upwards. Rows may differ in length.
        heading: what stands above all rows.
        mode: permissions of the file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(len(row) for row in rows)
    titles = [[textwrap.wrap(title, _TITLE_WIDTH) for _, title in row] for row in rows]
    # A row is as high as its highest image, drawn as wide as a column, and its longest title.
    tops = [_LINE_INCHES * max((len(lines) for lines in row), default=0) for row in titles]
    sides = [
        min(
            _INCHES, max((_INCHES * image.shape[1] / image.shape[0] for image, _ in row), default=0)
        )
        for row in rows
    ]
    head = _HEADING_INCHES if heading else 0.0
    height = head + sum(tops) + sum(sides) + _GAP_INCHES * (len(rows) + 1)
    width = columns * (_INCHES + _GAP_INCHES) + _GAP_INCHES
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    if heading:
        figure.text(
            _GAP_INCHES / width, 1 - head / 2 / height, heading, va="center", ha="left", fontsize=9
        )
    y = height - head
    for row, row_titles, top, side in zip(rows, titles, tops, sides, strict=True):
        y -= top + _GAP_INCHES + side
        for position, ((image, _), lines) in enumerate(zip(row, row_titles, strict=True)):
            x = _GAP_INCHES + position * (_INCHES + _GAP_INCHES)
            axis = figure.add_axes((x / width, y / height, _INCHES / width, side / height))
            axis.set_axis_off()
            axis.imshow(image.swapaxes(0, 1), cmap="gray", vmin=0, vmax=1, origin="lower")
            axis.set_title("\n".join(lines), fontsize=7, pad=2, linespacing=1.1)
    atomic_write(path, lambda temporary: figure.savefig(temporary, format="png"), mode)
