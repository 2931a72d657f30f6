"""The report: one offline HTML file from a run folder's tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medssl.atomic import atomic_write
from medssl.reports.baselines import baseline_blocks, baseline_warnings
from medssl.reports.contents import Contents, read_contents
from medssl.reports.facts import (
    data_rows,
    init_rows,
    limits,
    pretext_rows,
    pretraining_method,
    provenance_rows,
    rejection_rows,
    version_rows,
    warnings_of,
)
from medssl.reports.figures import (
    confusion_pictures,
    curve_pictures,
    effect_pictures,
    layer_pictures,
    patient_pictures,
    pretraining_pictures,
)
from medssl.reports.labels import fit_blocks, labels_saved, power_blocks, saved_blocks
from medssl.reports.page import data_uri, environment, style
from medssl.reports.tables import (
    by_protocol,
    comparison_rows,
    headline,
    init_name,
    metric_name,
    protocol_name,
    title,
    verdicts,
)

REPORT_NAME = "report.html"
FIGURES = "figures"


def build_report(run_folder: Path) -> Path:
    """Write ``report.html`` and ``figures/*.png`` from the run folder's own files.

    Reads ``config.yaml, predictions.parquet, results.csv, comparisons.csv, labels_saved.csv,
    learning_curves.csv, power.csv, baselines.csv, journal.jsonl, provenance.json, data.json,
    checkpoints/*/validation.json`` and ``figures/pretext_*.png``; what is missing is left out.

    Returns:
        Path of ``report.html``.

    Raises:
        DataError: the folder holds neither results nor a journal.
        MachineError: the folder cannot be written.
    """
    contents = read_contents(run_folder)
    pictures = {
        "effects": effect_pictures(contents),
        "curves": curve_pictures(contents),
        "layers": layer_pictures(contents),
        "patients": patient_pictures(contents),
        "pretraining": pretraining_pictures(contents),
        "confusions": confusion_pictures(contents),
    }
    for group in pictures.values():
        for picture in group:
            atomic_write(run_folder / FIGURES / f"{picture.name}.png", picture.light)
    page = (
        environment()
        .get_template("report.html.j2")
        .render(**_words(contents), **pictures, examples=_examples(contents))
    )
    path = run_folder / REPORT_NAME
    atomic_write(path, page)
    return path


def _words(contents: Contents) -> dict[str, Any]:
    """Return everything of the page that is not a figure."""
    found = verdicts(contents)
    return {
        "style": style("report.css"),
        "name": contents.name,
        "title": title(contents),
        "headline": headline(contents),
        "pretraining_method": pretraining_method(contents),
        "is_evaluated": len(contents.results) > 0,
        "reference": init_name(contents.reference),
        "confidence": f"{contents.confidence * 100:g} %",
        "synthetic": bool(contents.data.get("synthetic")),
        "warnings": [*warnings_of(contents), *baseline_warnings(contents)],
        "baselines": baseline_blocks(contents),
        "verdicts": [
            {
                "task": task,
                "protocol": protocol_name(protocol),
                "answers": [v for v in found if (v.task, v.protocol) == (task, protocol)],
            }
            for task, protocol in dict.fromkeys((v.task, v.protocol) for v in found)
        ],
        "comparisons": [
            {
                "task": task,
                "protocol": protocol_name(protocol),
                "metric": metric_name(str(table["metric"].iloc[0])),
                "num_patients": int(table["num_patients"].iloc[0]),
                "rows": comparison_rows(table),
            }
            for (task, protocol), table in by_protocol(contents.comparisons)
        ],
        "labels_saved": labels_saved(contents),
        "saved": saved_blocks(contents),
        "fits": fit_blocks(contents),
        "powers": power_blocks(contents),
        "families": _families(contents),
        "protocols": list(contents.results["protocol"].unique()) if len(contents.results) else [],
        "num_resamples": (contents.config.get("statistics") or {}).get("num_resamples", 10_000),
        "num_seeds": int(contents.results["num_seeds"].max()) if len(contents.results) else 0,
        "inits": init_rows(contents),
        "pretexts": pretext_rows(contents),
        "data": data_rows(contents),
        "citation": contents.data.get("citation", ""),
        "rejections": rejection_rows(contents),
        "limits": limits(contents),
        "provenance": provenance_rows(contents),
        "versions": version_rows(contents),
        "command": contents.provenance.get("command", ""),
        "config_text": contents.config_text,
    }


def _families(contents: Contents) -> str:
    """Say how many comparisons each correction runs over."""
    table = contents.comparisons
    if "family_size" not in table:
        return ""
    sizes = table.groupby("task", sort=False)["family_size"].first()
    return ", ".join(f"{task} {size:.0f}" for task, size in sizes.items())


def _examples(contents: Contents) -> list[dict[str, str]]:
    """Return the pictures of pretext puzzles that the study left."""
    return [
        {
            "title": init_name(
                contents.names.get(label := path.stem.removeprefix("pretext_"), label)
            ),
            "image": data_uri(path.read_bytes()),
        }
        for path in sorted((contents.folder / FIGURES).glob("pretext_*.png"))
    ]
