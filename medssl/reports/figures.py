"""Figures of a report: each with its title, how to read it, and its content in words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from medssl.reports.appearance import Theme
from medssl.reports.contents import Contents, LoggedRun
from medssl.reports.drawing import (
    Array,
    Palette,
    Picture,
    draw_confusion,
    draw_curves,
    draw_effects,
    draw_fits,
    draw_layers,
    draw_patients,
    draw_pretraining,
    picture,
)
from medssl.reports.labels import FITTED, fits_in_words
from medssl.reports.tables import (
    by_protocol,
    comparison_rows,
    init_name,
    is_pretrained,
    metric_name,
    protocol_name,
    signed,
)


def effect_pictures(contents: Contents) -> list[Picture]:
    """Return, for each task and protocol, the effects with their intervals."""
    palette = Palette(contents)
    pictures = []
    for (task, protocol), table in by_protocol(contents.comparisons):
        rows = table.sort_values(["label_fraction", "effect"], ascending=[True, False])
        reference = init_name(contents.reference)
        metric = metric_name(str(rows["metric"].iloc[0]))

        def draw(axes: Axes, theme: Theme, rows: pd.DataFrame = rows) -> None:
            draw_effects(axes, theme, rows, palette)

        pictures.append(
            picture(
                f"effect_{_slug(task)}_{_slug(protocol)}",
                f"{task}: difference from {reference}, {protocol_name(protocol)}",
                f"Difference in {metric} from {reference} on the same test patients, with "
                f"{contents.confidence * 100:g} % intervals; thin: at the level of the verdict, "
                "after Holm's correction. Filled: the thin line misses 0, a difference is shown.",
                _effects_in_words(rows),
                draw,
                height=0.9 + 0.27 * (len(rows) + rows["label_fraction"].nunique()),
            )
        )
    return pictures


def curve_pictures(contents: Contents) -> list[Picture]:
    """Return, for each task and protocol, performance over the number of labelled patients."""
    palette = Palette(contents)
    pictures = []
    for (task, protocol), table in by_protocol(_selected(contents.results, True)):
        if table["num_labelled_patients"].nunique() < 2:
            continue
        metric = metric_name(str(table["metric"].iloc[0]))
        laws = _of(contents.learning_curves, task, protocol)
        fitted = laws[laws["fit"] == FITTED] if len(laws) else laws

        def draw(
            axes: Axes,
            theme: Theme,
            table: pd.DataFrame = table,
            fitted: pd.DataFrame = fitted,
            metric: str = metric,
        ) -> None:
            draw_curves(axes, theme, table, metric, palette)
            draw_fits(axes, theme, fitted, palette)

        pictures.append(
            picture(
                f"labels_{_slug(task)}_{_slug(protocol)}",
                f"{task}: {metric} by number of labels, {protocol_name(protocol)}",
                f"Mean over seeds on the test patients; bands: {contents.confidence * 100:g} % "
                f"intervals over {_over(table)}. Bands of two inits may overlap although they "
                f"differ: the comparison is paired, see the differences.{_laws_in_words(fitted)}",
                _curves_in_words(table, metric) + fits_in_words(laws),
                draw,
                height=3.5,
            )
        )
    return pictures


def layer_pictures(contents: Contents) -> list[Picture]:
    """Return, for each task, the linear probe over the layers, with the most labels."""
    palette = Palette(contents)
    pictures = []
    for (task, protocol), table in by_protocol(_selected(contents.results, False)):
        most = table[table["num_labelled_patients"] == table["num_labelled_patients"].max()]
        if most["layer"].nunique() < 2:
            continue
        metric = metric_name(str(most["metric"].iloc[0]))
        chosen = _selected(contents.results, True)
        chosen = chosen[
            (chosen["task"] == task)
            & (chosen["protocol"] == protocol)
            & (chosen["label_fraction"] == most["label_fraction"].iloc[0])
        ]
        count = int(most["num_labelled_patients"].iloc[0])

        def draw(
            axes: Axes,
            theme: Theme,
            most: pd.DataFrame = most,
            chosen: pd.DataFrame = chosen,
            metric: str = metric,
        ) -> None:
            draw_layers(axes, theme, most, chosen, metric, palette)

        pictures.append(
            picture(
                f"layers_{_slug(task)}_{_slug(protocol)}",
                f"{task}: {metric} by layer, {protocol_name(protocol)}",
                f"Frozen features of each layer, shallow to deep, with {count} labelled patients. "
                "Rings: the layer chosen on validation patients.",
                _layers_in_words(most, metric),
                draw,
                height=3.3,
            )
        )
    return pictures


def pretraining_pictures(contents: Contents) -> list[Picture]:
    """Return, for each pretraining, its loss and its metrics over the steps."""
    palette = Palette(contents)
    pictures = []
    for run in contents.pretraining:
        trivial = {
            str(part["metric"]): part["trivial"]
            for part in contents.validations.get(run.name, {}).get("parts", [])
        }
        for metric in _pretraining_metrics(run, list(trivial)):
            level = trivial.get(metric)

            def draw(
                axes: Axes,
                theme: Theme,
                run: LoggedRun = run,
                metric: str = metric,
                level: float | None = level,
            ) -> None:
                colour = palette.colour(run.name, theme)
                draw_pretraining(axes, theme, run, metric, level, colour)

            pictures.append(
                picture(
                    f"pretrain_{_slug(run.name)}_{_slug(metric)}",
                    f"{init_name(run.name)}: {metric}",
                    "Thin: training, smoothed. Dots: the same validation puzzles each time."
                    + (" Dashed: what needs no network." if level is not None else ""),
                    _pretraining_in_words(run, metric, level),
                    draw,
                    height=2.5,
                )
            )
    return pictures


def confusion_pictures(contents: Contents) -> list[Picture]:
    """Return, for each pretext task that classifies, which classes are taken for which."""
    pictures = []
    for name, validation in contents.validations.items():
        for part in validation.get("parts", []):
            if not part.get("confusion"):
                continue
            counts = np.array(part["confusion"], dtype=float)
            classes = [str(label) for label in part["classes"]]
            shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)

            def draw(
                axes: Axes,
                theme: Theme,
                shares: Array = shares,
                classes: list[str] = classes,
            ) -> None:
                draw_confusion(axes, theme, shares, classes)

            pictures.append(
                picture(
                    f"confusion_{_slug(name)}_{_slug(str(part['task']))}",
                    f"{init_name(name)}: which puzzles {part['task']} mixes up",
                    f"Rows: the puzzle's class. Columns: the answer. {int(counts.sum())} puzzles "
                    "of validation patients; full colour is often. A row of one full square off "
                    "the diagonal is a symmetry of the anatomy, or a label that means nothing.",
                    _confusion_in_words(shares, classes),
                    draw,
                    height=min(5.0, 1.6 + 0.28 * len(classes)),
                )
            )
    return pictures


def patient_pictures(contents: Contents) -> list[Picture]:
    """Return, for each segmentation task, the difference of every single test patient."""
    palette = Palette(contents)
    pictures = []
    for (task, protocol), table in by_protocol(_segmentations(contents.predictions)):
        table = table[table["label_fraction"] == table["label_fraction"].min()]
        differences = _patient_differences(table, contents.reference)
        if not differences:
            continue
        count = int(table["num_labelled_patients"].iloc[0])
        reference = init_name(contents.reference)

        def draw(axes: Axes, theme: Theme, differences: dict[str, Array] = differences) -> None:
            draw_patients(axes, theme, differences, palette)

        pictures.append(
            picture(
                f"patients_{_slug(task)}_{_slug(protocol)}",
                f"{task}: patient by patient, {protocol_name(protocol)}",
                f"Each dot is one test patient: Dice minus that of {reference}, mean over seeds, "
                f"with {count} labelled patients. Bars: medians.",
                "; ".join(
                    f"{init_name(init)}: higher than {reference} for {(values > 0).sum()} of "
                    f"{len(values)} patients, median {signed(float(np.median(values)))}"
                    for init, values in differences.items()
                )
                + ".",
                draw,
                height=1.0 + 0.55 * len(differences),
            )
        )
    return pictures


# ------------------------------------------------------------------------------ words


def _effects_in_words(rows: pd.DataFrame) -> str:
    return " ".join(
        f"{row['num_labelled']} labelled: {row['init']} {row['effect']} ({row['interval']}), "
        f"{row['verdict']}."
        for row in comparison_rows(rows)
    )


def _curves_in_words(table: pd.DataFrame, metric: str) -> str:
    parts = []
    for init, rows in table.groupby("init", sort=False):
        rows = rows.sort_values("num_labelled_patients")
        points = ", ".join(
            f"{row['value']:.3f} with {int(row['num_labelled_patients'])}"
            for _, row in rows.iterrows()
        )
        parts.append(f"{init_name(str(init))}: {points}")
    return f"{metric} by labelled patients. {'; '.join(parts)}."


def _laws_in_words(fitted: pd.DataFrame) -> str:
    if not len(fitted):
        return ""
    return " Dashed: a power law fitted to each curve, dotted its interval at the measured points."


def _over(table: pd.DataFrame) -> str:
    """Return what the intervals speak about."""
    return "other patients" if table["num_seeds"].min() < 2 else "other patients and training runs"


def _of(table: pd.DataFrame, task: str, protocol: str) -> pd.DataFrame:
    if not len(table):
        return table
    return table[(table["task"] == task) & (table["protocol"] == protocol)]


def _layers_in_words(table: pd.DataFrame, metric: str) -> str:
    parts = []
    for init, rows in table.groupby("init", sort=False):
        points = ", ".join(f"{row['layer']} {row['value']:.3f}" for _, row in rows.iterrows())
        parts.append(f"{init_name(str(init))}: {points}")
    return f"{metric} by layer. {'; '.join(parts)}."


def _pretraining_in_words(run: LoggedRun, metric: str, level: float | None) -> str:
    points = run.points.get(f"val/{metric}") or run.points.get(f"train/{metric}", [])
    (first_step, first), (last_step, last) = points[0], points[-1]
    text = f"{metric} goes from {first:.3g} at step {first_step} to {last:.3g} at step {last_step}"
    return f"{text}; no network gives {level:.3g}." if level is not None else f"{text}."


def _confusion_in_words(shares: Array, classes: list[str]) -> str:
    off = shares - np.diag(np.diag(shares))
    true, answered = np.unravel_index(int(off.argmax()), off.shape)
    return (
        f"Of {len(classes)} classes, the share answered rightly runs from "
        f"{np.diag(shares).min():.2f} to {np.diag(shares).max():.2f}; the commonest mistake takes "
        f"{classes[int(true)]} for {classes[int(answered)]}, {off.max():.2f} of the time."
    )


def _selected(results: pd.DataFrame, selected: bool) -> pd.DataFrame:
    if "selected" not in results:
        return results.iloc[:0]
    return results[results["selected"].astype(bool) == selected]


def _segmentations(predictions: pd.DataFrame) -> pd.DataFrame:
    if "task_kind" not in predictions:
        return predictions.iloc[:0]
    wanted = (predictions["task_kind"] == "segmentation") & predictions["selected"].astype(bool)
    return predictions[wanted]


def _patient_differences(table: pd.DataFrame, reference: str) -> dict[str, Array]:
    """Return each pretrained init's Dice minus the reference's, one value a test patient."""
    scores = [np.asarray(value, dtype=float) for value in table["scores"]]
    known = table.assign(
        dice=[value[np.isfinite(value)].mean() if np.isfinite(value).any() else np.nan
              for value in scores]
    )  # fmt: skip
    means = known.groupby(["init", "patient_key"])["dice"].mean().unstack("init")
    if reference not in means:
        return {}
    pretrained = _unique(table[is_pretrained(table)], "init")
    found = {str(init): (means[init] - means[reference]).dropna().to_numpy() for init in pretrained}
    return {init: values for init, values in found.items() if len(values)}


def _pretraining_metrics(run: LoggedRun, primary: list[str]) -> list[str]:
    """Return the metrics to draw: the loss, then those that tasks are judged by."""
    names = {key.partition("/")[2] for key in run.points if key.startswith(("train/", "val/"))}
    validated = {key.partition("/")[2] for key in run.points if key.startswith("val/")}
    others = [name for name in primary if name in names]
    return (["loss"] if "loss" in names else []) + (others or sorted(validated - {"loss"})[:3])


def _unique(table: pd.DataFrame, column: str) -> list[Any]:
    return list(dict.fromkeys(table[column])) if column in table else []


def _slug(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in text)
