"""Pictures of nearest neighbours: queries with what each init finds for them, and the numbers.

Same and different are told by colour (Okabe and Ito's), by a letter and by the line of the frame,
so that none of them is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from medssl.atomic import atomic_write
from medssl.reports.appearance import Theme
from medssl.reports.drawing import picture

PIXELS = "(pixels)"
"""Stands in the tables for no backbone at all; no init can be called so."""

_SAME, _DIFFERENT, _QUERY = "#0072b2", "#d55e00", "#1c2126"
_OWNER_ONLY = 0o600  # patients' pixels
_TILE_INCHES = 1.0
_TEXT_INCHES = 0.2  # the structure's name under a tile
_TITLE_INCHES = 0.42  # the init's name over a block
_GAP_INCHES = 0.35  # between blocks
_BLOCKS_A_LINE = 2
_DPI = 120
_HATCHES = ("", "///", "...", "xxx")


@dataclass(frozen=True)
class Tile:
    """One patch of the gallery.

    Attributes:
        image_XY: in [0, 1]; X runs to the right, Y upwards.
        structure: what the patch shows at its centre.
        same: whether that is what the query shows; None for the query itself.
    """

    image_XY: npt.NDArray[Any]
    structure: str
    same: bool | None = None


@dataclass(frozen=True)
class Block:
    """What one init finds: rows of a query and its neighbours, nearest first."""

    title: str
    rows: Sequence[Sequence[Tile]]


def save_gallery(path: Path, blocks: Sequence[Block], heading: str) -> None:
    """Write a PNG of one block an init; patients' pixels, so ask first whether they may be kept.

    Args:
        path: the PNG file.
        blocks: with the same number of rows and columns each.
        heading: what is shown.
    """
    num_rows, num_columns = len(blocks[0].rows), len(blocks[0].rows[0])
    across = min(_BLOCKS_A_LINE, len(blocks))
    down = -(-len(blocks) // across)
    block_width = num_columns * _TILE_INCHES + _GAP_INCHES
    block_height = num_rows * (_TILE_INCHES + _TEXT_INCHES) + _TITLE_INCHES
    width, top = across * block_width + _GAP_INCHES, 0.75
    height = down * block_height + top + 0.1
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(_GAP_INCHES / width, 1 - 0.27 / height, heading, fontsize=10, weight="bold")
    figure.text(
        _GAP_INCHES / width, 1 - 0.53 / height,
        "Q query, then its nearest patches of other patients: S (blue, solid) same structure, "
        "D (orange, dashed) different", fontsize=8,
    )  # fmt: skip
    for number, block in enumerate(blocks):
        line, column = divmod(number, across)
        left = _GAP_INCHES + column * block_width
        upper = height - top - line * block_height
        figure.text(left / width, (upper - 0.24) / height, block.title, fontsize=9, weight="bold")
        for row, tiles in enumerate(block.rows):
            bottom = upper - _TITLE_INCHES - (row + 1) * (_TILE_INCHES + _TEXT_INCHES)
            for place, tile in enumerate(tiles):
                box = (
                    (left + place * _TILE_INCHES + 0.04) / width,
                    (bottom + _TEXT_INCHES + 0.02) / height,
                    (_TILE_INCHES - 0.08) / width,
                    (_TILE_INCHES - 0.08) / height,
                )
                _draw_tile(figure.add_axes(box), tile)
    # Without metadata, the same patches give the same bytes.
    atomic_write(
        path,
        lambda temporary: figure.savefig(temporary, format="png", metadata={"Software": None}),
        _OWNER_ONLY,
    )


def save_layers(path: Path, table: pd.DataFrame, reference: str) -> None:
    """Write a PNG of the share of same-structure neighbours by layer and init.

    Args:
        path: the PNG file.
        table: rows of ``gallery.csv``.
        reference: the init that is drawn in the reference's colour.
    """
    shown = picture(
        "gallery_layers", "Neighbours of the same structure", "", "",
        lambda axes, theme: _draw_layers(axes, theme, table, reference), height=3.6,
    )  # fmt: skip
    atomic_write(path, shown.png)


def _draw_tile(axes: Axes, tile: Tile) -> None:
    axes.imshow(tile.image_XY.T, cmap="gray", vmin=0, vmax=1, origin="lower")
    axes.set_axis_off()
    colour, letter, line = {
        None: (_QUERY, "Q", "-"), True: (_SAME, "S", "-"), False: (_DIFFERENT, "D", (0, (3, 2))),
    }[tile.same]  # fmt: skip
    axes.add_patch(
        Rectangle(
            (0, 0), 1, 1, transform=axes.transAxes, fill=False, edgecolor=colour, lw=2.6,
            linestyle=line, clip_on=False,
        )
    )  # fmt: skip
    axes.text(
        0.05, 0.94, letter, transform=axes.transAxes, ha="left", va="top", fontsize=7,
        weight="bold", color="white", bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.4},
    )  # fmt: skip
    name = tile.structure if len(tile.structure) <= 16 else tile.structure[:15] + "…"
    axes.text(
        0.5, -0.05, name, transform=axes.transAxes, ha="center", va="top", fontsize=6.5,
        color=colour,
    )  # fmt: skip


def _draw_layers(axes: Axes, theme: Theme, table: pd.DataFrame, reference: str) -> None:
    backbones = table[table["init"] != PIXELS]
    layers = list(dict.fromkeys(backbones["layer"]))
    inits = list(dict.fromkeys(backbones["init"]))
    width = 0.8 / len(inits)
    handles = []
    number_coloured = 0
    for place, init in enumerate(inits):
        if init == reference:
            colour, hatch = theme.reference, ""
        elif init == "random":
            colour, hatch = theme.baseline, ""
        else:
            cycle, number = divmod(number_coloured, len(theme.inits))
            colour, hatch = theme.inits[number], _HATCHES[cycle % len(_HATCHES)]
            number_coloured += 1
        rows = backbones[backbones["init"] == init].set_index("layer").reindex(layers)
        value = rows["share"].to_numpy(dtype=float)
        x = np.arange(len(layers)) - 0.4 + (place + 0.5) * width
        style: dict[str, Any] = {
            "facecolor": colour, "hatch": hatch, "edgecolor": theme.page, "lw": 0.5,
        }  # fmt: skip
        axes.bar(x, value, width, **style)
        for line, colour_of_line in ((2.6, theme.page), (1.1, theme.ink)):  # seen on any bar
            axes.vlines(x, rows["ci_low"], rows["ci_high"], color=colour_of_line, lw=line)
        handles.append(Patch(label=init, **style))
    axes.axhline(float(table["chance"].iloc[0]), color=theme.ink, lw=1, ls="--")
    handles_of_lines = axes.plot([], [], color=theme.ink, lw=1, ls="--", label="drawn blindly")
    pixels = table[table["init"] == PIXELS]
    if len(pixels):
        axes.axhline(float(pixels["share"].iloc[0]), color=theme.faint, lw=1, ls=":")
        handles_of_lines += axes.plot(
            [], [], color=theme.faint, lw=1, ls=":", label="raw pixels, no backbone"
        )
    axes.set_xticks(np.arange(len(layers)), layers)
    axes.set_ylim(0, 1)
    axes.set_ylabel(f"share of {int(table['k'].iloc[0])} neighbours\nof the same structure")
    axes.set_xlabel("layer, from the finest to the last")
    axes.grid(axis="x", visible=False)
    axes.legend(
        handles=[*handles, *handles_of_lines], fontsize=7, ncols=3, loc="lower center",
        bbox_to_anchor=(0.5, 1.0), frameon=False,
    )  # fmt: skip
