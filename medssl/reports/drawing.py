"""How figures are drawn: colours, curves, bands, and names beside them.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; every init has a marker of
its own as well, and its name stands beside its curve.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, NullLocator
from matplotlib.transforms import offset_copy

from medssl.reports.appearance import LIGHT, Theme, as_file, on_page
from medssl.reports.contents import Contents, LoggedRun
from medssl.reports.tables import BETTER, WORSE, init_name

Array = np.ndarray[Any, np.dtype[Any]]
DPI = 200
WIDTH_INCHES = 4.8  # letters of 9 points stay legible where a phone shows it 343 pixels wide
_MARKERS = "oD^vPX*<>"
_SVG_METADATA = ("Date", "Creator", "Format", "Type")
_MOST_TICKS = 6  # on an axis of differences, whose numbers are long
_MOST_DOTS = 1500  # of a figure; more would make the page heavy, and are drawn as pixels


@dataclass(frozen=True)
class Picture:
    """A figure, drawn once.

    Attributes:
        name: file name without ending.
        title: what the figure shows, as a heading.
        caption: how to read it.
        alt: its content in words, for those who do not see it.
        png: the file for slides, in light colours.
        svg: the file for papers, in light colours, with its text as text.
    """

    name: str
    title: str
    caption: str
    alt: str
    png: bytes
    svg: str

    @property
    def drawn(self) -> Markup:
        """The figure for a page, whose colours and font it takes."""
        return on_page(self.svg, self.name, self.alt)


class Palette:
    """The colour and marker of each init, the same in all figures of a report."""

    def __init__(self, contents: Contents) -> None:
        names = [str(name) for name in dict.fromkeys(contents.results.get("init", ()))]
        names += [run.name for run in contents.pretraining if run.name not in names]
        self._reference = contents.reference
        coloured = [name for name in names if name not in (self._reference, "random")]
        self._place = {name: place for place, name in enumerate(coloured)}

    def colour(self, init: str, theme: Theme) -> str:
        """Return an init's colour."""
        if init == self._reference:
            return theme.reference
        if init == "random":
            return theme.baseline
        return theme.inits[self._place.get(init, 0) % len(theme.inits)]

    def marker(self, init: str) -> str:
        """Return an init's marker."""
        if init == self._reference:
            return "s"
        return "." if init == "random" else _MARKERS[self._place.get(init, 0) % len(_MARKERS)]


Draw = Callable[[Axes, Theme], None]


def picture(name: str, title: str, caption: str, alt: str, draw: Draw, *, height: float) -> Picture:
    """Draw one figure."""
    alt = textwrap.shorten(alt, 1500, placeholder=" …")
    vectors, pixels = io.StringIO(), io.BytesIO()
    with _style(LIGHT):
        figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure.add_subplot(), LIGHT)
        # Without metadata, the same numbers give the same bytes.
        figure.savefig(vectors, format="svg", metadata=dict.fromkeys(_SVG_METADATA))
        figure.set_layout_engine("none")  # what was laid out for one file serves the other
        figure.savefig(pixels, format="png", dpi=DPI, metadata={"Software": None})
    return Picture(name, title, caption, alt, pixels.getvalue(), as_file(vectors.getvalue()))


@contextmanager
def _style(theme: Theme) -> Iterator[None]:
    settings: Any = {
        "font.family": "DejaVu Sans",
        "text.parse_math": False,  # a name with dollar signs is a name
        "svg.fonttype": "none",  # text stays text: to be searched, and set in the page's font
        "svg.hashsalt": "medssl",  # names inside the file are the same each time
        "font.size": 9,
        "figure.facecolor": theme.page,
        "axes.facecolor": theme.page,
        "axes.edgecolor": theme.faint,
        "axes.labelcolor": theme.ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "text.color": theme.ink,
        "xtick.color": theme.faint,
        "ytick.color": theme.faint,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
    }
    with rc_context(settings):
        yield


def draw_effects(axes: Axes, theme: Theme, rows: pd.DataFrame, palette: Palette) -> None:
    """Draw effects as points with intervals, grouped by the number of labels."""
    place, ticks, labels = 0.0, [], []
    for _, group in rows.groupby("label_fraction", sort=False):
        count = int(group["num_labelled_patients"].iloc[0])
        axes.text(
            0, place, f"{count} labelled {'patient' if count == 1 else 'patients'}",
            transform=axes.get_yaxis_transform(), va="center", ha="left", fontsize=8,
            color=theme.faint, style="italic",
        )  # fmt: skip
        for _, row in group.iterrows():
            place += 1
            colour = palette.colour(row["init"], theme)
            shown = row["verdict"] in (BETTER, WORSE)
            axes.plot([row["ci_low"], row["ci_high"]], [place, place], color=colour, lw=2)
            if "verdict_low" in row:
                corrected = [row["verdict_low"], row["verdict_high"]]
                axes.plot(corrected, [place, place], color=colour, lw=0.7)
            axes.plot(
                row["effect"], place, palette.marker(row["init"]).replace(".", "o"), color=colour,
                mfc=colour if shown else theme.page, mew=1.6, ms=6.5,
            )  # fmt: skip
            ticks.append(place)
            labels.append(init_name(row["init"]))
        place += 1.15
    axes.axvline(0, color=theme.ink, lw=1)
    axes.set_yticks(ticks, labels)
    axes.set_ylim(place - 0.6, -0.7)
    low, high = axes.get_xlim()
    reach = max(abs(low), abs(high))
    axes.set_xlim(-reach, reach)
    axes.locator_params(axis="x", nbins=_MOST_TICKS)
    axes.set_xlabel("worse  \N{LEFTWARDS ARROW}  difference  \N{RIGHTWARDS ARROW}  better")
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def draw_curves(
    axes: Axes, theme: Theme, table: pd.DataFrame, metric: str, palette: Palette
) -> None:
    """Draw performance over the number of labelled patients, with bands."""
    axes.set_xscale("log")
    ends = []
    for init, rows in table.groupby("init", sort=False):
        rows = rows.sort_values("num_labelled_patients")
        colour = palette.colour(str(init), theme)
        x, value = rows["num_labelled_patients"].to_numpy(), rows["value"].to_numpy()
        axes.fill_between(x, rows["ci_low"], rows["ci_high"], color=colour, alpha=0.13, lw=0)
        axes.plot(x, value, marker=palette.marker(str(init)), color=colour, lw=1.8, ms=5.5)
        ends.append((float(value[-1]), str(init)))
    counts = sorted(set(table["num_labelled_patients"]))
    axes.xaxis.set_major_locator(FixedLocator(counts))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("labelled patients (logarithmic)")
    axes.set_ylabel(metric)
    _label_ends(axes, theme, float(counts[-1]), ends, palette)


def draw_fits(axes: Axes, theme: Theme, fitted: pd.DataFrame, palette: Palette) -> None:
    """Draw the power laws of learning curves, within what was measured, with their intervals."""
    for init, rows in fitted.groupby("init", sort=False) if len(fitted) else ():
        rows = rows.sort_values("num_labelled_patients")
        colour, law = palette.colour(str(init), theme), rows.iloc[0]
        counts = rows["num_labelled_patients"].to_numpy(float)
        x = np.geomspace(counts[0], counts[-1], 60)
        side = np.sign(law["asymptote"] - law["fitted"])  # errors fall to their asymptote
        axes.plot(
            x, law["asymptote"] - side * law["gain"] * x ** -law["exponent"], color=colour, lw=1,
            ls="--",
        )  # fmt: skip
        for end in ("fitted_low", "fitted_high"):
            axes.plot(counts, rows[end], color=colour, lw=0.7, ls=":")


def draw_layers(
    axes: Axes,
    theme: Theme,
    table: pd.DataFrame,
    chosen: pd.DataFrame,
    metric: str,
    palette: Palette,
) -> None:
    """Draw performance over the layers of the backbone, with bands."""
    layers = list(dict.fromkeys(table["layer"]))
    ends = []
    for init, rows in table.groupby("init", sort=False):
        rows = rows.set_index("layer").reindex(layers)
        colour = palette.colour(str(init), theme)
        places, value = np.arange(len(layers)), rows["value"].to_numpy()
        axes.fill_between(
            places, rows["ci_low"].to_numpy(), rows["ci_high"].to_numpy(), color=colour,
            alpha=0.13, lw=0,
        )  # fmt: skip
        axes.plot(places, value, marker=palette.marker(str(init)), color=colour, lw=1.8, ms=5)
        for names in chosen.loc[chosen["init"] == init, "layer"]:
            for name in str(names).split("|"):
                if name in layers:
                    place = layers.index(name)
                    axes.plot(place, value[place], "o", ms=11, mfc="none", mec=colour, mew=1.3)
        ends.append((float(value[-1]), str(init)))
    axes.set_xticks(np.arange(len(layers)), layers)
    axes.set_ylabel(metric)
    _label_ends(axes, theme, len(layers) - 1, ends, palette)


def draw_pretraining(
    axes: Axes, theme: Theme, run: LoggedRun, metric: str, level: float | None, colour: str
) -> None:
    """Draw one metric of a pretraining over its steps."""
    train, val = run.points.get(f"train/{metric}", []), run.points.get(f"val/{metric}", [])
    if train:
        steps, values = _smoothed(train)
        axes.plot(steps, values, color=colour, lw=1.2, alpha=0.75)
    if val:
        steps, values = np.array(val, dtype=float).T
        axes.plot(steps, values, "o", color=theme.ink, ms=4)
        axes.plot(steps, values, color=theme.ink, lw=0.8, alpha=0.5)
    if level is not None:
        axes.axhline(level, color=theme.faint, lw=1, ls="--")
        axes.text(
            1, level, "no network ", transform=axes.get_yaxis_transform(), ha="right", va="bottom",
            fontsize=8, color=theme.faint,
        )  # fmt: skip
    axes.set_xlabel("step")
    axes.set_ylabel(metric)


_LEAST_SHARE = 0.005  # is drawn in a confusion matrix
MOST_NAMED_CLASSES = 30
"""Classes of a confusion matrix up to which their names fit beside it."""


def draw_confusion(axes: Axes, theme: Theme, shares: Array, classes: Sequence[str]) -> None:
    """Draw how often each class (row) was answered with each (column), as shares of the row."""
    colour, count = theme.inits[1], len(classes)
    # Squares of one colour, more or less opaque: they follow the page from light to dark.
    for row, column in zip(*np.nonzero(shares >= _LEAST_SHARE), strict=True):
        square = (float(column) - 0.5, float(row) - 0.5)
        shade = to_rgba(colour, float(shares[row, column]))
        axes.add_patch(Rectangle(square, 1, 1, facecolor=shade, lw=0))
    axes.set_xlim(-0.5, count - 0.5)
    axes.set_ylim(count - 0.5, -0.5)
    axes.set_aspect("equal")
    axes.grid(visible=False)
    if count <= MOST_NAMED_CLASSES:
        places = np.arange(count)
        size = 8 if count <= 12 else 6
        axes.set_xticks(places, classes, rotation=90, fontsize=size)
        axes.set_yticks(places, classes, fontsize=size)
    axes.set_xlabel("answer")
    axes.set_ylabel("puzzle")
    shades = [
        Patch(facecolor=to_rgba(colour, share), edgecolor=theme.faint, lw=0.5, label=f"{share:g}")
        for share in (1.0, 0.75, 0.5, 0.25, 0.0)
    ]
    axes.legend(
        handles=shades, title="share of\nthe row", loc="center left", bbox_to_anchor=(1.02, 0.5),
        frameon=False, fontsize=8, title_fontsize=8,
    )  # fmt: skip


def draw_patients(
    axes: Axes, theme: Theme, differences: dict[str, Array], palette: Palette
) -> None:
    """Draw the difference of every single test patient."""
    many = sum(map(len, differences.values())) > _MOST_DOTS
    for place, (init, values) in enumerate(differences.items()):
        # Dots of equal value lie beside each other: a fixed zigzag, not noise.
        order = np.argsort(np.argsort(values, kind="stable"), kind="stable")
        offset = ((order * 7) % 11 - 5) / 11 * 0.5
        colour = palette.colour(init, theme)
        axes.plot(
            values, place + offset, "o", color=colour, ms=3.6, alpha=0.65, mew=0, rasterized=many
        )
        middle = float(np.median(values))
        axes.plot([middle, middle], [place - 0.34, place + 0.34], color=theme.ink, lw=2)
    axes.axvline(0, color=theme.ink, lw=1)
    axes.set_yticks(range(len(differences)), [init_name(init) for init in differences])
    axes.set_ylim(len(differences) - 0.45, -0.55)
    axes.locator_params(axis="x", nbins=_MOST_TICKS)
    axes.set_xlabel("worse  \N{LEFTWARDS ARROW}  difference  \N{RIGHTWARDS ARROW}  better")
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def _label_ends(
    axes: Axes, theme: Theme, x: float, ends: Sequence[tuple[float, str]], palette: Palette
) -> None:
    """Write markers and names beside the right ends of curves, pushed apart where they overlap.

    Names are in ink: most colours of curves are too pale for small letters.
    """
    low, high = axes.get_ylim()
    gap = (high - low) * 0.066
    ordered = sorted(ends)
    places = [value for value, _ in ordered]
    for number in range(1, len(places)):
        places[number] = max(places[number], places[number - 1] + gap)
    shift = (sum(places) - sum(value for value, _ in ordered)) / max(len(places), 1)
    shift = min(shift, places[0] - low - gap / 2) if places else 0.0  # not below the axis
    beside = offset_copy(axes.transData, axes.get_figure(root=True), x=12, units="points")
    for (_, init), place in zip(ordered, places, strict=True):
        axes.plot(
            x, place - shift, palette.marker(init), color=palette.colour(init, theme), ms=5,
            transform=beside, clip_on=False, scalex=False, scaley=False,
        )  # fmt: skip
        axes.annotate(
            init_name(init), (x, place - shift), xytext=(18, 0), textcoords="offset points",
            va="center", color=theme.ink, fontsize=9, annotation_clip=False,
        )  # fmt: skip


def _smoothed(points: list[tuple[int, float]]) -> tuple[np.ndarray, Array]:
    steps, values = np.array(points, dtype=float).T
    width = max(1, len(values) // 40)
    kernel = np.ones(width) / width
    padded = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge")
    return steps, np.convolve(padded, kernel, mode="valid")
