"""Pictures of what features know: maps of scans by label, scanner or patient, likeness of inits."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from medssl.atomic import atomic_write
from medssl.reports.appearance import LIGHT

_DPI = 150
_PANEL_INCHES = 2.4
_MOST_NAMED = 6
"""More groups than colours that can be told apart: the largest are named, the rest is grey."""
_MARKERS = "osD^vP"
_METHOD = {"pca": "PCA", "tsne": "t-SNE"}


def save_maps(path: Path, maps: pd.DataFrame, what: str) -> None:
    """Write a PNG with one panel an init and method; scans of one group share colour and marker.

    Args:
        path: the PNG file.
        maps: ``init, method, x, y`` and the column ``what``, one row a scan.
        what: ``label``, ``scanner``, ``site`` or ``patient``; scans of one patient are joined by
            a line, as there are more patients than colours.
    """
    inits = list(dict.fromkeys(maps["init"]))
    methods = list(dict.fromkeys(maps["method"]))
    size = (_PANEL_INCHES * len(inits) + 0.3, _PANEL_INCHES * len(methods) + 0.8)
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(methods), len(inits), squeeze=False)
    for row, method in enumerate(methods):
        for column, init in enumerate(inits):
            axes = panels[row, column]
            part = maps[(maps["init"] == init) & (maps["method"] == method)]
            if what == "patient":
                for _, scans in part.groupby("patient"):
                    axes.plot(scans["x"], scans["y"], color=LIGHT.inits[1], lw=0.8, alpha=0.7)
                axes.scatter(part["x"], part["y"], s=6, color=LIGHT.ink)
            else:
                for place, name in enumerate(_largest(maps[what])):
                    scans = part[part[what] == name]
                    axes.scatter(
                        scans["x"], scans["y"], s=12, marker=_MARKERS[place], label=_named(name),
                        color=LIGHT.inits[place], alpha=0.8, linewidths=0,
                    )  # fmt: skip
                rest = part[~part[what].isin(_largest(maps[what]))]
                axes.scatter(rest["x"], rest["y"], s=6, color=LIGHT.grid, zorder=0)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(f"{init}, {_METHOD[method]}", fontsize=8)
    if what != "patient":
        handles, names = panels[0, 0].get_legend_handles_labels()
        figure.legend(
            handles, names, loc="outside lower center", ncols=len(names), fontsize=7, frameon=False
        )
    figure.suptitle(f"Scans by {what}, last layer (training and validation patients)", fontsize=9)
    _write(path, figure)


def save_likeness(path: Path, likeness: pd.DataFrame, names: Mapping[str, str]) -> None:
    """Write a PNG of the CKA of every layer of every init with every other.

    Args:
        path: the PNG file.
        likeness: ``init, layer, other_init, other_layer, cka``, each pair once.
        names: what inits are called whose label does not say it.
    """
    rows = list(dict.fromkeys(zip(likeness["init"], likeness["layer"], strict=True)))
    place = {pair: number for number, pair in enumerate(rows)}
    values = np.full((len(rows), len(rows)), np.nan)
    for row in likeness.itertuples():
        first, second = place[row.init, row.layer], place[row.other_init, row.other_layer]
        values[first, second] = values[second, first] = row.cka
    side = 1.6 + 0.24 * len(rows)
    figure = Figure(figsize=(side + 0.8, side), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(values, vmin=0, vmax=1, cmap="cividis")
    labels = [f"{names.get(init, init)}, {layer}" for init, layer in rows]
    axes.set_xticks(range(len(rows)), labels, rotation=90, fontsize=6)
    axes.set_yticks(range(len(rows)), labels, fontsize=6)
    axes.set_title("Likeness of layers (unbiased linear CKA)", fontsize=9)
    figure.colorbar(image, ax=axes, shrink=0.7)
    _write(path, figure)


def _largest(groups: pd.Series[str]) -> list[str]:
    known = groups[groups != ""]
    return [str(name) for name in known.value_counts().index[:_MOST_NAMED]]


def _named(name: str) -> str:
    return name if name.startswith("class ") else f"{name[:6]}…"


def _write(path: Path, figure: Figure) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    atomic_write(path, buffer.getvalue())
