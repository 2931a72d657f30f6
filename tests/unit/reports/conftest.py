from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from medssl.reports.html import build_report
from tests.unit.reports.run_folder import write_run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with all its files; not to be changed."""
    return write_run(tmp_path_factory.mktemp("runs") / "hippocampus")


@pytest.fixture(scope="session")
def reported_run(finished_run: Path) -> Path:
    """The finished run with its report; not to be changed."""
    build_report(finished_run)
    return finished_run


@pytest.fixture
def light_run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run without what takes long to draw."""
    folder = tmp_path / "hippocampus"
    ignored = shutil.ignore_patterns("predictions.parquet", "comparisons.csv", "journal.jsonl")
    shutil.copytree(finished_run, folder, ignore=ignored)
    results = (folder / "results.csv").read_text().splitlines()
    kept = [line for line in results if "linear_probe" not in line]
    (folder / "results.csv").write_text("\n".join(kept) + "\n")
    return folder
