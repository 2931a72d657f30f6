"""What shortcuts reach in a pretext task: verdicts, tables and a figure of the probes' scores."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from scipy import stats

from medssl.atomic import atomic_write
from medssl.reports.appearance import Theme
from medssl.reports.drawing import picture

REFERENCE, NO_SHORTCUT, WEAK = "reference", "no shortcut", "weak"
SHORTCUT, UNDECIDED, NOT_JUDGED = "shortcut", "undecided", "not judged"

WEAK_SHARE = 0.1
"""A tenth of what the whole puzzle gains over guessing: below it, two seeds differ by as much."""

SHORTCUT_SHARE = 0.5
"""From half of the gain on, more is answered without anatomy than needs it."""

CONSTANT_CHECK = "constant"
"""The probe on scans of one value: it has no share, as there is nothing to be seen."""

_LEVEL = 0.95
_CONSTANT_LEVEL = 0.99
"""Of the binomial interval around guessing: of a hundred honest checks one is a false alarm."""

_NOTE = (
    "Intervals: 95 %, Wilson, over puzzles as if each were independent; puzzles of one image or "
    "patient are not, so the true ones are wider. What more steps would find is not known."
)
_NOTE_RESTORED = "Intervals: 95 %, Student's t, over batches of validation puzzles."

_REMEDIES: dict[str, tuple[tuple[str | None, str], ...]] = {
    "border": (
        ("gap", "raise pretext.gap and pretext.jitter"),
        (None, "take crops that lie inside the scans; where they do, it is anatomy at the border"),
    ),
    "body_mask": (
        (None, "raise sampling.min_foreground"),
        (None, "take smaller crops, so that less of the silhouette is in them"),
    ),
    "mean_deviation": (
        ("standardise", "set pretext.standardise=true"),
        ("intensity_jitter", "raise pretext.intensity_jitter, with standardise false"),
        (None, "raise augmentation.brightness and contrast"),
    ),
    "thumbnail": (
        (None, "the coarse layout is enough; if detail should be learnt, take smaller crops"),
        ("gap", "smaller tiles"),
        (None, "more classes"),
    ),
    CONSTANT_CHECK: (
        (None, "the label reaches the network without any image: do not trust this accuracy"),
    ),
}  # fmt: skip
"""What helps against a shortcut, each with the setting of the task that it takes, if any."""


@dataclass(frozen=True)
class Score:
    """What a trained probe answered.

    Attributes:
        shortcut, shown, metric: see `Row`.
        higher_is_better: of the metric.
        trivial: the metric of the trivial answer.
        puzzles: how many counted.
        right: of a task that classifies: puzzles answered rightly.
        values: of a task that restores: the metric of each batch; empty where a task classifies.
    """

    shortcut: str
    shown: str
    metric: str
    higher_is_better: bool
    trivial: float
    puzzles: int
    right: int = 0
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Row:
    """What one probe reached.

    Attributes:
        shortcut: what it saw, by name.
        shown: the same in words.
        metric: the task's primary metric.
        value: of the metric, on validation puzzles.
        low, high: its 95 % interval; NaN from a single batch of a task that restores.
        trivial: the metric of guessing, or of the answer that needs no network.
        share: of what the whole puzzle gains over ``trivial``; NaN where that gains nothing, and
            on constant scans.
        puzzles: how many counted.
        verdict: see `SHORTCUT_SHARE` and `WEAK_SHARE`.
    """

    shortcut: str
    shown: str
    metric: str
    value: float
    low: float
    high: float
    trivial: float
    share: float
    puzzles: int
    verdict: str


@dataclass(frozen=True)
class Audit:
    """The probes of one pretext task.

    Attributes:
        name: of the init or pretext.
        pretext: the task.
        steps: of each probe.
        rows: one a probe.
        notes: what a reader must know, and what to do.
    """

    name: str
    pretext: str
    steps: int
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def verdicts(self) -> dict[str, str]:
        """Return the verdict of each probe, by its shortcut."""
        return {row.shortcut: row.verdict for row in self.rows}


def judge(
    name: str,
    pretext: str,
    steps: int,
    whole: Score,
    shortcuts: Sequence[Score],
    constant: Score,
    settings: Collection[str] = (),
) -> Audit:
    """Return the audit of a task from the scores of its probes.

    Args:
        name, pretext, steps: see `Audit`.
        whole: of the probe that saw the whole puzzle; shares are of what it gains.
        shortcuts: of the probes that each saw one shortcut alone.
        constant: of the probe on scans of one value.
        settings: of the task, by name: remedies name no others.
    """
    first = _judged_whole(whole)
    rows = (
        first,
        *(_judged(score, first) for score in shortcuts),
        _judged_constant(constant),
    )
    notes = [_NOTE_RESTORED if whole.values else _NOTE]
    if not _beats_guessing(first, whole):
        notes.append(
            "The whole puzzle itself was not learnt in these steps, so shares cannot be told. "
            "Give more --steps."
        )
    notes.extend(
        f"{row.shortcut} ({row.shown}): {_remedy(row.shortcut, settings)}."
        for row in rows
        if row.verdict == SHORTCUT
    )
    return Audit(name, pretext, steps, rows, tuple(notes))


def describe(audits: Sequence[Audit]) -> list[str]:
    """Return the tables as lines for people."""
    lines = []
    for audit in audits:
        title = audit.name if audit.name == audit.pretext else f"{audit.name} ({audit.pretext})"
        metric = audit.rows[0].metric
        lines.append(f"{title}: {audit.steps} steps a probe, {audit.rows[0].puzzles} puzzles")
        lines.append(
            f"  {'sees':15}{metric:>10}  {'95 % interval':16}{'trivial':>8}{'share':>8}"
            "  verdict      in words"
        )
        for row in audit.rows:
            interval = "" if math.isnan(row.low) else f"{row.low:.3f} to {row.high:.3f}"
            share = "" if math.isnan(row.share) else f"{row.share:.0%}"
            lines.append(
                f"  {row.shortcut:15}{row.value:10.3f}  {interval:16}{row.trivial:8.3f}{share:>8}"
                f"  {row.verdict:13}{row.shown}"
            )
        lines.extend(f"  {note}" for note in audit.notes)
    return lines


def facts_of(audits: Sequence[Audit]) -> list[dict[str, Any]]:
    """Return the tables as plain values for JSON; what is undefined is ``None``."""
    facts: list[dict[str, Any]] = json.loads(
        json.dumps([asdict(audit) for audit in audits]), parse_constant=lambda _: None
    )
    return facts


def save_audits(audits: Sequence[Audit], out: Path) -> None:
    """Write ``shortcuts.csv``, ``shortcuts.json`` and a PNG for each audit into a folder."""
    text = io.StringIO()
    columns = ["name", "pretext", "steps", *Row.__dataclass_fields__]
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    for audit in audits:
        head = {"name": audit.name, "pretext": audit.pretext, "steps": audit.steps}
        for row in audit.rows:
            values = {
                key: "" if isinstance(value, float) and math.isnan(value) else value
                for key, value in asdict(row).items()
            }
            table.writerow({**head, **values})
    for audit in audits:
        shown = picture(
            audit.name, f"What shortcuts reach: {audit.name}", "", "",
            partial(_draw_rows, rows=audit.rows),
            height=0.4 * len(audit.rows) + 0.7,
        )  # fmt: skip
        atomic_write(out / f"shortcuts_{audit.name}.png", shown.png)
    atomic_write(out / "shortcuts.csv", text.getvalue())
    atomic_write(out / "shortcuts.json", json.dumps(facts_of(audits), indent=2) + "\n")


def _remedy(shortcut: str, settings: Collection[str]) -> str:
    return ", or ".join(
        words for setting, words in _REMEDIES[shortcut] if setting is None or setting in settings
    )


def _judged_whole(score: Score) -> Row:
    row = _row(score)
    learnt = _beats_guessing(row, score)
    return replace(row, verdict=REFERENCE, share=1.0 if learnt else math.nan)


def _judged(score: Score, whole: Row) -> Row:
    row = _row(score)
    beats = _beats_guessing(row, score)
    if not _beats_guessing(whole, score):
        return replace(row, verdict=SHORTCUT if beats else UNDECIDED)
    row = replace(row, share=(row.value - row.trivial) / (whole.value - whole.trivial))
    if not beats or row.share < WEAK_SHARE:
        return replace(row, verdict=NO_SHORTCUT)
    return replace(row, verdict=SHORTCUT if row.share >= SHORTCUT_SHARE else WEAK)


def _judged_constant(score: Score) -> Row:
    """Return the row of the constant scans, on which guessing is all that an honest task allows."""
    row = _row(score)
    if score.values:  # there is nothing to restore, and the trivial answer is right already
        return replace(row, verdict=NOT_JUDGED)
    _, most = stats.binom.interval(_CONSTANT_LEVEL, score.puzzles, score.trivial)
    return replace(row, verdict=SHORTCUT if score.right > most else NO_SHORTCUT)


def _row(score: Score) -> Row:
    """Return a row with value and interval, neither shared nor judged yet."""
    if score.values:
        value = float(np.mean(score.values))
        low, high = math.nan, math.nan
        if len(score.values) > 1:
            error = float(stats.sem(score.values))
            reach = float(stats.t.ppf((1 + _LEVEL) / 2, len(score.values) - 1)) * error
            low, high = value - reach, value + reach
    else:
        value = score.right / score.puzzles
        interval = stats.binomtest(score.right, score.puzzles).proportion_ci(
            confidence_level=_LEVEL, method="wilson"
        )
        low, high = float(interval.low), float(interval.high)
    return Row(
        score.shortcut, score.shown, score.metric, value, low, high, score.trivial, math.nan,
        score.puzzles, "",
    )  # fmt: skip


def _beats_guessing(row: Row, score: Score) -> bool:
    return row.low > row.trivial if score.higher_is_better else row.high < row.trivial


def _draw_rows(axes: Axes, theme: Theme, rows: Sequence[Row]) -> None:
    """Draw a bar for each probe, with its interval, its verdict and the trivial answer."""
    colours = {SHORTCUT: theme.inits[0], WEAK: theme.inits[4], REFERENCE: theme.ink}
    for place, row in enumerate(rows):
        axes.barh(place, row.value, height=0.62, color=colours.get(row.verdict, theme.baseline))
        axes.plot([row.low, row.high], [place, place], color=theme.faint, lw=1.5)
        axes.annotate(
            row.verdict, (np.nanmax([row.value, row.high]), place), xytext=(5, 0),
            textcoords="offset points", va="center", fontsize=8, color=theme.faint,
            annotation_clip=False,
        )  # fmt: skip
        axes.plot([row.trivial] * 2, [place - 0.42, place + 0.42], color=theme.inits[1], lw=1.5)
    axes.set_yticks(range(len(rows)), [row.shortcut.replace("_", " ") for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.margins(x=0.2)
    axes.set_xlabel(f"{rows[0].metric} on validation puzzles (blue: without looking)")
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
