"""The report: one offline HTML file from a run folder's tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medssl.atomic import atomic_write
from medssl.reports.appearance import style
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
from medssl.reports.page import data_uri, environment
from medssl.reports.reproduce import config_to_show, digests, seeds, steps
from medssl.reports.runs import is_synthetic, run_rows, run_warnings
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
PAGE_TO_SHARE = "report_without_images.html"
FIGURES = "figures"
PUZZLES = "pretext_*.png"

_OWNER_ONLY = 0o600  # a page with patients' pixels


def build_report(run_folder: Path, out: Path | None = None) -> Path:
    """Write ``report.html`` and its figures, as PNG and SVG, from the run folder's own files.

    Reads ``config.yaml, predictions.parquet, results.csv, comparisons.csv, labels_saved.csv,
    learning_curves.csv, power.csv, baselines.csv, failures.csv, journal.jsonl, provenance.json,
    data.json, checkpoints/*/validation.json`` and ``figures/pretext_*.png``; what is missing is
    left out. Pictures with patients' pixels are on the page only where the run's configuration
    says ``include_images: true``; then the same page without them lies beside it, see
    `page_to_share`.

    Args:
        run_folder: is only read where ``out`` is given.
        out: folder to write into; the run folder by default.

    Returns:
        Path of ``report.html``.

    Raises:
        DataError: the folder holds neither results nor a journal.
        MachineError: the folder cannot be written.
    """
    contents = read_contents(run_folder)
    out = out or run_folder
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
            atomic_write(out / FIGURES / f"{picture.name}.png", picture.png)
            atomic_write(out / FIGURES / f"{picture.name}.svg", picture.svg)
    examples = _examples(contents)
    template = environment().get_template("report.html.j2")
    words = {**_words(contents), **pictures}

    def page(examples: Sequence[dict[str, str]]) -> str:
        shown = {**words, "examples": examples}
        return template.render(**shown, contents=_headings(shown))

    atomic_write(out / REPORT_NAME, page(examples), _OWNER_ONLY if examples else 0o644)
    if examples:
        atomic_write(out / PAGE_TO_SHARE, page([]))
    else:
        (out / PAGE_TO_SHARE).unlink(missing_ok=True)
    return out / REPORT_NAME


def page_to_share(run_folder: Path) -> Path:
    """Return the page of a run that shows no patient: what a server or a colleague may get."""
    without_images = run_folder / PAGE_TO_SHARE
    return without_images if without_images.is_file() else run_folder / REPORT_NAME


def _headings(words: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the sections that a page has: their ids and headings."""
    sections = [
        ("verdict", "Verdict", ("verdicts",)),
        ("evidence", "Evidence", ("effects", "curves", "layers")),
        ("planning", "Labels and patients", ("saved", "fits", "powers")),
        ("pretraining", "Pretraining", ("pretraining", "examples")),
        ("method", "Method", ()),
        ("data", "Data and limits", ()),
        ("reproduce", "How to reproduce", ()),
    ]
    return [
        (section, heading)
        for section, heading, needed in sections
        if not needed or any(words[name] for name in needed)
    ]


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
        "synthetic": is_synthetic(contents),
        "warnings": [
            *warnings_of(contents),
            *run_warnings(contents),
            *baseline_warnings(contents),
        ],
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
        "runs": run_rows(contents),
        "limits": limits(contents),
        "steps": steps(contents),
        "seeds": seeds(contents),
        "digests": digests(contents),
        "provenance": provenance_rows(contents),
        "versions": version_rows(contents),
        "command": contents.provenance.get("command", ""),
        "config_text": config_to_show(contents),
    }


def _families(contents: Contents) -> str:
    """Say how many comparisons each correction runs over."""
    table = contents.comparisons
    if "family_size" not in table:
        return ""
    sizes = table.groupby("task", sort=False)["family_size"].first()
    return ", ".join(f"{task} {size:.0f}" for task, size in sizes.items())


def _examples(contents: Contents) -> list[dict[str, str]]:
    """Return the pictures of pretext puzzles, where the configuration lets them be shown."""
    if contents.config.get("include_images") is not True:
        return []
    return [
        {
            "title": init_name(
                contents.names.get(label := path.stem.removeprefix("pretext_"), label)
            ),
            "image": data_uri(path.read_bytes()),
        }
        for path in sorted((contents.folder / FIGURES).glob(PUZZLES))
    ]
