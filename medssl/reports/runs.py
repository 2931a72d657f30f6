"""What a page across runs says of each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from medssl.reports.contents import Contents
from medssl.reports.facts import leaks_of, moment

_DIGITS = 12  # of a digest in a table


def run_rows(contents: Contents) -> list[dict[str, str]]:
    """Return one row a run; empty for a page about one run."""
    return [
        {
            "name": name,
            "dataset": str(_data(run).get("dataset") or "own scans"),
            "train": str(_splits(run).get("train", "?")),
            "test": str(_splits(run).get("test", "?")),
            "leaked": str(_data(run).get("test_patients_in_pool", "?")),
            "finished": moment(run.get("finished")) or "not noted",
            "code": str(run.get("git_commit") or "?")[:_DIGITS],
            "config": str(run.get("config_digest") or "?")[:_DIGITS],
            "predictions": str(run.get("predictions") or "?")[:_DIGITS],
        }
        for name, run in _runs(contents).items()
    ]


def run_warnings(contents: Contents) -> list[str]:
    """Return what a reader must know of the runs before the verdict."""
    runs = _runs(contents)
    found = [
        f"{name}: {leak}"
        for name, run in runs.items()
        for leak in leaks_of(replace(contents, data=_data(run)))
    ]
    splits = {run["splits"] for run in runs.values() if run.get("splits")}
    if len(splits) > 1:
        found.append(
            "The runs drew their patients differently: the test patients are the same, but the "
            "labelled patients are not, and differences are also differences between those."
        )
    return found


def is_synthetic(contents: Contents) -> bool:
    """Return whether any data of the page were made by a generator."""
    return any(
        data.get("synthetic") for data in (contents.data, *map(_data, _runs(contents).values()))
    )


def _runs(contents: Contents) -> Mapping[str, Any]:
    runs = contents.provenance.get("runs")
    return runs if isinstance(runs, dict) else {}


def _data(run: Mapping[str, Any]) -> dict[str, Any]:
    return run.get("facts") or {}


def _splits(run: Mapping[str, Any]) -> dict[str, Any]:
    return _data(run).get("splits") or {}
