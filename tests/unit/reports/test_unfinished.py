"""Reports of runs that have not come to their end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medssl.errors import DataError
from medssl.reports.contents import read_contents
from medssl.reports.facts import warnings_of
from medssl.reports.html import build_report
from medssl.reports.tables import headline, title
from tests.unit.reports.run_folder import CONFIG, write_journal


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A study that was stopped in its matrix."""
    folder = tmp_path / "stopped"
    write_journal(folder)
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "cells").mkdir()
    for number in range(3):
        (folder / "cells" / f"cell-{number}.parquet").touch()
    return folder


def test_a_study_without_results_says_how_far_it_is_and_what_to_do(stopped: Path):
    contents = read_contents(stopped)
    assert headline(contents) == (
        "No verdict yet: this run has not come to its comparison (3 cells of its matrix done so "
        "far). Give its command again, and it goes on."
    )
    assert title(contents).endswith("This run is not finished.")


def test_its_page_shows_what_there_is(stopped: Path):
    page = build_report(stopped).read_text(encoding="utf-8")
    assert "No verdict yet" in page
    assert 'id="pretraining"' in page
    assert 'id="verdict"' not in page
    assert "medssl study config.yaml" in page


def test_tables_of_a_run_that_goes_on_are_announced(light_run: Path):
    assert not any("has not come to its end" in line for line in said(light_run))
    file = light_run / "provenance.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "finished": None}))
    assert any("has not come to its end" in line for line in said(light_run))


def test_results_of_validation_patients_are_announced_as_such(light_run: Path):
    assert not any("to choose a recipe by" in line for line in said(light_run))
    file = light_run / "data.json"
    data = json.loads(file.read_text()) if file.is_file() else {}
    data["splits"] = {"train": 5, "val": 2, "test": 2, "unused": 40}
    file.write_text(json.dumps(data))
    (line,) = [line for line in said(light_run) if "to choose a recipe by" in line]
    assert "40 test patients took no part" in line


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (1, "1 cell of the matrix failed and is missing"),
        (2, "2 cells of the matrix failed and are"),
    ],
)
def test_failed_cells_are_announced(light_run: Path, count: int, words: str):
    (light_run / "failures.csv").write_text(
        "task,problem\n" + "hippocampus,out of memory\n" * count
    )
    assert any(words in line for line in said(light_run))


def test_an_empty_folder_is_refused_and_left_empty(tmp_path: Path):
    with pytest.raises(DataError, match="neither results.csv nor journal.jsonl is in it"):
        build_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def said(folder: Path) -> list[str]:
    return warnings_of(read_contents(folder))
