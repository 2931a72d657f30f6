"""The transfer matrix: cells of (init, task, protocol, labelled patients, seed), resumable.

A finished cell is one file, written by whichever process ran it, with what it logged inside. What
goes wrong in one cell costs no other its result. Whatever the executor, the order, and however
often it was interrupted, the same table comes out.
"""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from medssl.atomic import atomic_write
from medssl.errors import DataError, MedsslError
from medssl.evaluation.protocols.base import Cell, Prediction, Setting
from medssl.executors.base import Executor, Loss

PREDICTION_COLUMNS = (
    "init", "pretext", "backbone", "task", "task_kind", "protocol", "layer", "selected",
    "label_fraction", "num_labelled_patients", "seed", "patient_key", "scan_key", "target",
    "targets", "scores",
)  # fmt: skip
_PREDICTION_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in PREDICTION_COLUMNS[:7]),
        ("selected", pa.bool_()),
        ("label_fraction", pa.float64()),
        ("num_labelled_patients", pa.int64()),
        ("seed", pa.int64()),
        ("patient_key", pa.string()),
        ("scan_key", pa.string()),
        ("target", pa.float64()),
        ("targets", pa.list_(pa.float64())),
        ("scores", pa.list_(pa.float64())),
    ]
)
_NOTES = b"medssl"

_LOST: dict[Loss, str] = {
    "too_slow": "it took too long",
    "out_of_memory": "not enough memory. Use fewer workers (matrix.executor.num_workers)",
    "died": "its process was ended, most often by the system for lack of memory. Use fewer "
    "workers (matrix.executor.num_workers)",
}


@dataclass
class CellNotes:
    """What is kept of a cell beside its predictions.

    Attributes:
        metrics: (step, values) in the order in which they were logged.
        init_report: what was loaded into the backbone, see `LoadReport.to_dict`.
        init_text: the same as one line.
        seconds: that the cell took.
        warnings: what it warned of, each once.
    """

    metrics: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    init_report: dict[str, Any] = field(default_factory=dict)
    init_text: str = ""
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: finished, or why not.

    Attributes:
        cell: which.
        problem: in words that name nobody; empty where it is finished.
        kind: of the problem, in one word.
    """

    cell: Cell
    problem: str = ""
    kind: str = ""


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
    notes: CellNotes | None = None,
) -> None:
    """Write one cell's predictions and notes, atomically."""
    kept = {_NOTES: json.dumps(asdict(notes or CellNotes())).encode()}
    rows = prediction_rows(cell, predictions, setting, pretext=pretext, backbone=backbone)
    table = pa.Table.from_pylist(rows, schema=_PREDICTION_SCHEMA.with_metadata(kept))
    atomic_write(cell_path(folder, cell), lambda path: pq.write_table(table, path))


def prediction_rows(
    cell: Cell, predictions: Sequence[Prediction], setting: Setting, *, pretext: str, backbone: str
) -> list[dict[str, Any]]:
    """Return one row a prediction, with the columns of ``predictions.parquet``."""
    labelled = [
        (cell.label_fraction, cell.num_labelled_patients)
        if (own := prediction.num_labelled_patients) is None
        else (own / len(setting.splits.train), own)
        for prediction in predictions
    ]
    return [
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


def read_notes(folder: Path, cell: Cell) -> CellNotes:
    """Return what was kept of a finished cell beside its predictions."""
    metadata = pq.read_schema(cell_path(folder, cell)).metadata or {}
    content = json.loads(metadata.get(_NOTES, b"{}"))
    notes = CellNotes(**content)
    notes.metrics = [(int(step), values) for step, values in notes.metrics]
    return notes


def in_turn(cells: Sequence[Cell], shared: Callable[[Cell], tuple[Any, ...]]) -> list[Cell]:
    """Return cells in the order in which they are handed out.

    The first cell of each group that shares features comes before all others, so that processes
    compute features of different groups, and none waits for another's. Then one group follows the
    other, so that a process holds the features of one.
    """
    seen: set[tuple[Any, ...]] = set()
    first: list[Cell] = []
    rest: list[Cell] = []
    for cell in cells:
        (rest if shared(cell) in seen else first).append(cell)
        seen.add(shared(cell))
    return [*first, *sorted(rest, key=lambda cell: (shared(cell), cell))]


def attempt(run_cell: Callable[[Cell], None], cell: Cell) -> Outcome:
    """Run a cell; whatever it raises becomes the outcome's problem.

    Memory that is not enough is told by the executor, as of a worker that the system ended.
    """
    try:
        run_cell(cell)
    except MemoryError:
        raise
    except MedsslError as error:
        return Outcome(cell, str(error), type(error).__name__)
    except Exception as error:  # noqa: BLE001  (isolated, told to the user, and run again next time)
        return Outcome(cell, _without_names(error), type(error).__name__)
    return Outcome(cell)


def run_cells(
    cells: Sequence[Cell],
    folder: Path,
    run: Callable[[Cell], Outcome],
    executor: Executor,
    ended: Callable[[Outcome], None],
    progress: Callable[[int, int, str], None],
) -> list[Outcome]:
    """Run the cells that are not finished.

    Args:
        cells: all cells of the matrix, in the order in which they are handed out.
        folder: holds one file a finished cell.
        run: runs one cell, writes its file and returns what became of it; picklable.
        executor: where cells run.
        ended: is told of every cell that this call ran, in order.
        progress: receives (cells done, all cells, the cell that ended last).

    Returns:
        The outcomes of the cells that failed.
    """
    remaining = unfinished(folder, cells)
    done = len(cells) - len(remaining)
    progress(done, len(cells), "")
    failed = []
    for outcome in executor.map(
        run, remaining, lost=lambda cell, loss: Outcome(cell, f"{_LOST[loss]}.", loss)
    ):
        done += 1
        ended(outcome)
        if outcome.problem:
            failed.append(outcome)
        progress(done, len(cells), outcome.cell.key)
    return failed


def comparable(cells: Sequence[Cell], folder: Path) -> list[Cell]:
    """Return the finished cells that can be compared where some have failed.

    Inits of which nothing is finished are left out, then every combination of task, protocol,
    labels and seed that one of the other inits lacks.
    """
    left = set(unfinished(folder, cells))
    finished = [cell for cell in cells if cell not in left]
    inits = {cell.init for cell in finished}
    lacking = {_combination(cell) for cell in left if cell.init in inits}
    return [cell for cell in finished if _combination(cell) not in lacking]


def _combination(cell: Cell) -> tuple[str, str, int, int]:
    return cell.task, cell.protocol, cell.num_labelled_patients, cell.seed


def _without_names(error: Exception) -> str:
    """Return an error of a library in words: its kind and the place; its text may name a path."""
    places = [
        frame for frame in traceback.extract_tb(error.__traceback__) if "medssl" in frame.filename
    ]
    if not places:
        return type(error).__name__
    frame = places[-1]
    module = Path(frame.filename)
    return f"{type(error).__name__} in {module.parent.name}/{module.name}, line {frame.lineno}"


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
