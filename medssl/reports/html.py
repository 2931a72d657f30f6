"""The report: one offline HTML file from a run folder's tables."""

from __future__ import annotations

from pathlib import Path


def build_report(run_folder: Path) -> Path:
    """Write ``report.html`` and ``figures/*.png`` from the run folder's own files.

    Reads ``config.yaml, predictions.parquet, results.csv, comparisons.csv, journal.jsonl,
    provenance.json, data.json`` and ``figures/pretext_*.png``; what is missing is left out.

    Returns:
        Path of ``report.html``.

    Raises:
        DataError: the folder holds neither results nor a journal.
    """
    raise NotImplementedError
