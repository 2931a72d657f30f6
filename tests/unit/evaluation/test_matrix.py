"""The matrix: order of the cells, resumption, and the table at the end."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from medssl.errors import DataError
from medssl.evaluation.matrix import (
    PREDICTION_COLUMNS,
    CellNotes,
    Outcome,
    attempt,
    build_cells,
    cell_path,
    collect,
    comparable,
    in_turn,
    read_notes,
    run_cells,
    unfinished,
    write_cell,
)
from medssl.evaluation.protocols.base import Cell, Prediction
from medssl.executors.local import Config as LocalConfig
from medssl.executors.local import LocalExecutor
from medssl.pipelines.cells import Evaluation


def cells(**changes: Any) -> list[Cell]:
    wanted: dict[str, Any] = {
        "tasks": ["lesion", "class"],
        "inits": ["random", "imagenet"],
        "protocols": ["linear_probe", "fine_tune"],
        "labelled_patients": (10, 2),
        "num_train_patients": 10,
        "seeds": (1, 0),
        **changes,
    }
    return build_cells(**wanted)


def finish(cell: Cell, folder: Path) -> None:
    """Write a file as if the cell had run."""
    folder.mkdir(exist_ok=True)
    row = {name: [0] for name in PREDICTION_COLUMNS} | {"init": [cell.init], "seed": [cell.seed]}
    pd.DataFrame(row).to_parquet(cell_path(folder, cell))


HERE = LocalExecutor(LocalConfig(num_workers=0))


def run(
    every: list[Cell], folder: Path, stop_after: int | None = None, failing: Collection[Cell] = ()
) -> tuple[list[Cell], list[Outcome], list[tuple[int, int, str]]]:
    """Run cells in this process; return (cells that ended, those that failed, progress)."""
    ran: list[Cell] = []
    told: list[tuple[int, int, str]] = []

    def run_cell(cell: Cell) -> None:
        if len(ran) == stop_after:
            raise KeyboardInterrupt
        if cell in failing:
            raise ZeroDivisionError("/home/somebody")
        finish(cell, folder)

    failed = run_cells(
        every, folder, partial(attempt, run_cell), HERE,
        lambda outcome: ran.append(outcome.cell), lambda *now: told.append(now),
    )  # fmt: skip
    return ran, failed, told


def test_there_is_a_cell_for_every_combination_with_its_share_of_labels():
    found = cells()
    assert len(found) == len(set(found)) == 2**5
    assert {(c.num_labelled_patients, c.label_fraction) for c in found} == {(2, 0.2), (10, 1.0)}


def test_a_protocol_that_chooses_its_labels_itself_runs_once_an_init_and_task():
    found = cells(protocols=["low_shot", "fine_tune"], once=["low_shot"])
    assert len(found) == 4 + 2**4
    assert {(c.num_labelled_patients, c.label_fraction, c.seed) for c in found
            if c.protocol == "low_shot"} == {(10, 1.0, 0)}  # fmt: skip


def test_the_order_does_not_depend_on_the_order_in_the_config():
    assert cells() == cells(tasks=["class", "lesion"], seeds=(0, 1), labelled_patients=(2, 10))
    assert cells() == sorted(cells())


def test_cells_of_one_task_and_init_run_together():
    pairs = [pair for pair, _ in groupby(cells(), key=lambda cell: (cell.task, cell.init))]
    assert len(pairs) == len(set(pairs)) == 4


def test_a_cells_key_is_its_files_name(tmp_path: Path):
    cell = Cell("class", "random", "fine_tune", 2, 0.2, 1)
    assert cell_path(tmp_path, cell) == tmp_path / "class-random-fine_tune-n2-s1.parquet"


def test_progress_is_told_after_every_cell(tmp_path: Path):
    ran, failed, told = run(cells(), tmp_path)
    assert (ran, failed) == (cells(), [])
    assert told[:2] == [(0, 32, ""), (1, 32, cells()[0].key)]
    assert told[-1] == (32, 32, cells()[-1].key)


def test_the_first_cells_that_compute_features_come_before_those_that_reuse_them():
    turns = in_turn(cells(), lambda cell: (cell.task, cell.init))
    assert sorted(turns) == cells()
    assert len({(cell.task, cell.init) for cell in turns[:4]}) == 4
    assert turns[4:] == [cell for cell in cells() if cell not in turns[:4]]


def test_cells_with_the_same_features_follow_each_other():
    turns = in_turn(cells(), lambda cell: (cell.task, cell.init, cell.seed))
    groups = [key for key, _ in groupby(turns[8:], key=lambda c: (c.task, c.init, c.seed))]
    assert len(groups) == len(set(groups)) == 8


def test_a_cell_that_fails_costs_no_other_its_result(tmp_path: Path):
    bad = cells()[5]
    ran, failed, told = run(cells(), tmp_path, failing=[bad])
    assert [outcome.cell for outcome in failed] == [bad]
    assert ran == cells()
    assert told[-1][:2] == (32, 32)
    assert unfinished(tmp_path, cells()) == [bad]
    assert run(cells(), tmp_path)[:2] == ([bad], [])  # the next start runs it alone


def test_a_failed_cell_is_told_by_kind_and_place_without_what_the_library_said(tmp_path: Path):
    (outcome,) = run(cells(), tmp_path, failing=cells()[:1])[1]
    assert outcome.problem.startswith("ZeroDivisionError")
    assert "somebody" not in outcome.problem


def test_memory_that_is_not_enough_is_told_with_what_to_do(tmp_path: Path):
    def run_cell(cell: Cell) -> None:
        raise MemoryError

    (outcome,) = run_cells(
        cells()[:1], tmp_path, partial(attempt, run_cell),
        LocalExecutor(LocalConfig(num_workers=0)), lambda _: None, lambda *_: None,
    )  # fmt: skip
    assert outcome.problem == (
        "not enough memory. Use fewer workers (matrix.executor.num_workers)."
    )


def test_an_error_of_ours_is_told_in_its_own_words():
    def fail(cell: Cell) -> None:
        raise DataError(f"cell {cell.seed} is empty.")

    assert attempt(fail, cells()[0]).problem == "cell 0 is empty."


def test_what_can_be_compared_leaves_out_whole_combinations(tmp_path: Path):
    bad = cells()[5]
    run(cells(), tmp_path, failing=[bad])
    kept = comparable(cells(), tmp_path)
    twin = next(c for c in cells() if c.init != bad.init and c == replace(bad, init=c.init))
    assert set(cells()) - set(kept) == {bad, twin}


def test_an_init_that_failed_everywhere_costs_the_others_nothing(tmp_path: Path):
    lost = [cell for cell in cells() if cell.init == "random"]
    run(cells(), tmp_path, failing=lost)
    assert comparable(cells(), tmp_path) == [c for c in cells() if c.init == "imagenet"]


def test_finished_cells_are_not_run_again(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        run(cells(), tmp_path, stop_after=11)
    assert len(unfinished(tmp_path, cells())) == 32 - 11
    ran, _, told = run(cells(), tmp_path)
    assert ran == cells()[11:]
    assert told[0] == (11, 32, "")
    assert run(cells(), tmp_path)[:2] == ([], [])


def test_the_table_is_the_same_however_often_it_was_interrupted(tmp_path: Path):
    run(cells(), tmp_path / "whole")
    for stop in (3, 9):
        with pytest.raises(KeyboardInterrupt):
            run(cells(), tmp_path / "broken", stop_after=stop)
    run(cells(), tmp_path / "broken")
    whole, broken = (collect(tmp_path / name, cells()) for name in ("whole", "broken"))
    pd.testing.assert_frame_equal(whole, broken)
    assert list(whole.index) == list(range(32))


@pytest.mark.parametrize("damage", ["missing", "torn", "empty"])
def test_collecting_names_a_cell_that_is_missing_or_damaged(tmp_path: Path, damage: str):
    run(cells(), tmp_path)
    path = cell_path(tmp_path, cells()[5])
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100] if damage == "torn" else b"")
    with pytest.raises(DataError) as refused:
        collect(tmp_path, cells())
    assert str(refused.value) == (
        f"the predictions of cell {cells()[5].key} are missing or damaged. Delete the cell's "
        "file if it is there and start the same command again: it resumes."
    )


def test_a_cells_file_holds_a_row_a_prediction(evaluation: Evaluation, tmp_path: Path):
    setting = evaluation.setting("classification", "random")
    cell = Cell("classification", "random", "fine_tune", 2, 0.4, 0)
    keys = setting.scans_of(setting.splits.test)
    predictions = [Prediction("", True, key, (1.0,), (0.25, 0.75)) for key in keys]
    notes = CellNotes([(0, {"val/score": 0.5})], {"source": "random"}, "random", 1.5)
    write_cell(
        tmp_path, cell, predictions, setting, pretext="rotation", backbone="monai", notes=notes
    )
    assert read_notes(tmp_path, cell) == notes
    table = collect(tmp_path, [cell])
    assert tuple(table.columns) == PREDICTION_COLUMNS
    assert list(table["scan_key"]) == keys
    assert set(table["patient_key"]) == set(setting.splits.test)
    assert list(table["scores"][0]) == [0.25, 0.75]
    first = table.iloc[0]
    assert (first["pretext"], first["backbone"]) == ("rotation", "monai")
    assert (first["target"], list(first["targets"])) == (1.0, [1.0])
    assert (first["task_kind"], first["num_labelled_patients"]) == ("classification", 2)


def test_a_prediction_may_know_its_labels_and_seed_better_than_its_cell(
    evaluation: Evaluation, tmp_path: Path
):
    setting = evaluation.setting("classification", "random")
    cell = Cell("classification", "random", "low_shot", 5, 1.0, 0)
    key = setting.scans_of(setting.splits.test)[0]
    own = Prediction("", True, key, (1.0,), (0.25, 0.75), num_labelled_patients=2, seed=4)
    write_cell(tmp_path, cell, [own], setting, pretext="", backbone="monai")
    first = collect(tmp_path, [cell]).iloc[0]
    assert (first["num_labelled_patients"], first["seed"]) == (2, 4)
    assert first["label_fraction"] == 2 / len(setting.splits.train)
