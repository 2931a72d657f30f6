"""The transfer matrix: cells of (init, task, protocol, labelled patients, seed), resumable.

A finished cell is one file. Cells of one init and task run together, so that features are computed
once; whatever the order and however often it was interrupted, the same table comes out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from medssl.atomic import atomic_write
from medssl.errors import DataError
from medssl.evaluation.protocols.base import Cell, Prediction, Setting

PREDICTION_COLUMNS = (
    "init", "pretext", "backbone", "task", "task_kind", "protocol", "layer", "selected",
    "label_fraction", "num_labelled_patients", "seed", "patient_key", "scan_key", "target",
    "targets", "scores",
)  # fmt: skip


def build_cells(
    *,
    tasks: Sequence[str],
    inits: Sequence[str],
    protocols: Sequence[str],
    labelled_patients: Sequence[int],
    num_train_patients: int,
    seeds: Sequence[int],
    once: Collection[str] = (),
) -> list[Cell]:
    """Return every combination, in the order in which they run.

    Args:
        tasks, inits, protocols: by name.
        labelled_patients: numbers of them.
        num_train_patients: of which those are parts.
        seeds: of each combination.
        once: protocols that choose the labelled patients themselves: they get one cell an init and
            task, with all patients and the first seed.
    """
    every = [(number, seed) for number in labelled_patients for seed in seeds]
    single = [(num_train_patients, min(seeds))]
    return sorted(
        Cell(task, init, protocol, number, number / num_train_patients, seed)
        for task in tasks
        for init in inits
        for protocol in protocols
        for number, seed in (single if protocol in once else every)
    )


def cell_path(folder: Path, cell: Cell) -> Path:
    """Return where a finished cell's predictions are."""
    return folder / f"{cell.key}.parquet"


def unfinished(folder: Path, cells: Iterable[Cell]) -> list[Cell]:
    """Return the cells that have no predictions yet."""
    return [cell for cell in cells if not cell_path(folder, cell).is_file()]


def write_cell(
    folder: Path,
    cell: Cell,
    predictions: Sequence[Prediction],
    setting: Setting,
    *,
    pretext: str,
    backbone: str,
) -> None:
    """Write one cell's predictions, atomically."""
    labelled = [
        (cell.label_fraction, cell.num_labelled_patients)
        if (own := prediction.num_labelled_patients) is None
        else (own / len(setting.splits.train), own)
        for prediction in predictions
    ]
    rows: list[dict[str, Any]] = [
        {
            "init": cell.init,
            "pretext": pretext,
            "backbone": backbone,
            "task": cell.task,
            "task_kind": setting.task.kind,
            "protocol": cell.protocol,
            "layer": prediction.layer,
            "selected": prediction.selected,
            "label_fraction": fraction,
            "num_labelled_patients": number,
            "seed": cell.seed if prediction.seed is None else prediction.seed,
            "patient_key": setting.store.entry(prediction.scan_key).patient_key,
            "scan_key": prediction.scan_key,
            "target": prediction.target[0] if len(prediction.target) == 1 else math.nan,
            "targets": list(prediction.target),
            "scores": list(prediction.scores),
        }
        for prediction, (fraction, number) in zip(predictions, labelled, strict=True)
    ]
    table = pd.DataFrame(rows, columns=list(PREDICTION_COLUMNS))
    atomic_write(cell_path(folder, cell), table.to_parquet)


def run_cells(
    cells: Sequence[Cell],
    folder: Path,
    setting_of: Callable[[str, str], Setting],
    run_cell: Callable[[Cell, Setting], None],
    progress: Callable[[int, int, str], None],
) -> None:
    """Run the cells that are not finished.

    Args:
        cells: all cells of the matrix.
        folder: holds one file a finished cell.
        setting_of: (task, init) -> what the cells of that pair share; asked for once a pair.
        run_cell: runs one cell and writes its file.
        progress: receives (cells done, all cells, the cell that is run next).
    """
    remaining = unfinished(folder, cells)
    done = len(cells) - len(remaining)
    progress(done, len(cells), "")
    current: tuple[str, str] | None = None
    setting: Setting | None = None
    for cell in remaining:
        progress(done, len(cells), cell.key)
        if setting is None or (cell.task, cell.init) != current:
            current = (cell.task, cell.init)
            setting = setting_of(cell.task, cell.init)  # the last one's features are let go
        run_cell(cell, setting)
        done += 1
    progress(done, len(cells), "")


def collect(folder: Path, cells: Sequence[Cell]) -> pd.DataFrame:
    """Return the predictions of all cells, sorted.

    Raises:
        DataError: a cell is missing or its file damaged; the message names it.
    """
    tables = []
    for cell in cells:
        try:
            tables.append(pd.read_parquet(cell_path(folder, cell)))
        except (OSError, ValueError):
            raise DataError(
                f"the predictions of cell {cell.key} are missing or damaged. Delete the cell's "
                "file if it is there and start the same command again: it resumes."
            ) from None
    return pd.concat(tables, ignore_index=True)
