"""Pictures of pretext puzzles: rows of small grey images with titles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from medssl.atomic import atomic_write

_INCHES = 1.6
_DPI = 120


def save_panels(path: Path, rows: Sequence[Sequence[tuple[npt.NDArray[Any], str]]]) -> None:
    """Write a PNG of rows of images.

    Args:
        path: the PNG file.
        rows: each a list of (image (X, Y) in [0, 1], title). X runs to the right, Y upwards.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(columns * _INCHES, len(rows) * (_INCHES + 0.25)), dpi=_DPI)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axes_row, row in zip(axes, rows, strict=True):
        for position, axis in enumerate(axes_row):
            axis.set_axis_off()
            if position < len(row):
                image, title = row[position]
                axis.imshow(image.T, cmap="gray", vmin=0, vmax=1, origin="lower")
                axis.set_title(title, fontsize=7)
    figure.tight_layout(pad=0.4)
    atomic_write(path, lambda temporary: figure.savefig(temporary, format="png"))
