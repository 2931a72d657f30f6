"""The cells of a predictions table, and the pairing of an init with its reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from medssl.errors import DataError
from medssl.evaluation.metrics import Array

REQUIRED_COLUMNS = (
    "init", "pretext", "backbone", "task", "task_kind", "protocol", "layer", "selected",
    "label_fraction", "num_labelled_patients", "seed", "patient_key", "scan_key", "target",
    "scores",
)  # fmt: skip
CELL = ["task", "task_kind", "protocol", "label_fraction"]
INIT = ["init", "pretext", "backbone"]


@dataclass(frozen=True)
class SeedCell:
    """Predictions of one cell: one init, task, protocol, label fraction and seed.

    Attributes:
        patients: (N,) position of each case's patient.
        targets: (N,) or (N, T) known answers.
        scores: (N, K).
    """

    patients: np.ndarray
    targets: Array
    scores: Array


@dataclass(frozen=True)
class Pair:
    """The cells of an init and of its reference, seed by seed, tested on the same cases."""

    theirs: list[SeedCell]
    ours: list[SeedCell]
    num_patients: int
    num_labelled: int


def checked(predictions: pd.DataFrame) -> pd.DataFrame:
    """Return the predictions with every column that statistics read.

    Raises:
        DataError: columns are missing, or the table is empty.
    """
    missing = [name for name in REQUIRED_COLUMNS if name not in predictions.columns]
    if missing:
        raise DataError(f"the predictions lack the columns {', '.join(missing)}.")
    if predictions.empty:
        raise DataError("there are no predictions yet. Run the transfer first.")
    table = predictions.copy()
    for name in ("pretext", "layer"):
        table[name] = table[name].astype(object).fillna("")
    table["selected"] = table["selected"].astype(bool)
    return table


def layers(group: pd.DataFrame) -> Iterator[tuple[str, bool, pd.DataFrame]]:
    """Yield the selected predictions of a cell, then those of each of its layers."""
    chosen = group[group["selected"]]
    if len(chosen):
        yield "|".join(sorted(set(chosen["layer"]))), True, chosen
    for layer, part in group.groupby("layer", sort=False):
        if layer:
            yield str(layer), False, part


def by_seed(part: pd.DataFrame, patients: np.ndarray) -> list[SeedCell]:
    """Return the cells of a table, one a seed, ascending.

    Args:
        part: rows of one init, task, protocol and label fraction.
        patients: sorted keys, among which each case's patient is found.
    """
    cells = []
    for _, rows in part.groupby("seed"):
        lengths = {len(scores) for scores in rows["scores"]}
        if len(lengths) != 1:
            raise DataError(
                f"task {rows['task'].iloc[0]}: its predictions have {sorted(lengths)} scores a "
                "case; all must have as many as there are classes."
            )
        cells.append(
            SeedCell(
                np.searchsorted(patients, rows["patient_key"].to_numpy()),
                _targets(rows),
                np.stack([np.asarray(scores, dtype=float) for scores in rows["scores"]]),
            )
        )
    return cells


def paired(theirs: pd.DataFrame, reference: pd.DataFrame, where: str) -> Pair:
    """Return the cells of two inits, checked to be of the same backbone, seeds and cases.

    Raises:
        DataError: they are not.
    """
    theirs, ours = comparable(theirs, reference, where)
    patients = np.unique(ours["patient_key"])
    num_labelled = round(ours["num_labelled_patients"].mean())
    return Pair(by_seed(theirs, patients), by_seed(ours, patients), len(patients), num_labelled)


def comparable(
    theirs: pd.DataFrame, reference: pd.DataFrame, where: str
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rows of two inits that can be compared: of one backbone, and of shared seeds.

    Raises:
        DataError: the backbones differ, no seed is shared, or the cases differ.
    """
    name, other = theirs["init"].iloc[0], reference["init"].iloc[0]
    backbone = theirs["backbone"].iloc[0]
    ours = reference[reference["backbone"] == backbone]
    if ours.empty:
        raise DataError(
            f"{where}: {name!r} has the backbone {backbone} and {other!r} has "
            f"{', '.join(sorted(set(reference['backbone'])))}, so a difference would not be due "
            "to the weights. Compare inits of one backbone."
        )
    shared = sorted(set(theirs["seed"]) & set(ours["seed"]))
    if not shared:
        raise DataError(
            f"{where}: {name!r} and {other!r} have no seed in common. Run both with the same seeds."
        )
    theirs, ours = theirs[theirs["seed"].isin(shared)], ours[ours["seed"].isin(shared)]
    for seed in shared:
        _check_same_cases(
            theirs[theirs["seed"] == seed],
            ours[ours["seed"] == seed],
            f"{where}, seed {seed}: {name!r} and {other!r}",
        )
    return theirs, ours


def _check_same_cases(theirs: pd.DataFrame, ours: pd.DataFrame, who: str) -> None:
    counts, wanted = _cases(theirs).value_counts(), _cases(ours).value_counts()
    different = counts.sub(wanted, fill_value=0).abs().sum()
    if different:
        raise DataError(
            f"{who} were not tested on the same cases ({len(theirs)} against {len(ours)}, "
            f"{int(different)} in only one of them or with another target). A difference would "
            "mix weights with patients. Start the transfer again with --resume, or in a new folder."
        )


def _cases(rows: pd.DataFrame) -> pd.Series[str]:
    """Return who was tested with what known answer, one text a row."""
    keys = ["patient_key", "scan_key", "target", *(["targets"] if "targets" in rows else [])]
    return rows[keys].map(str).agg("|".join, axis=1)


def _targets(rows: pd.DataFrame) -> Array:
    """Return the known answers, (N,) or (N, T) where a case has several."""
    if "targets" in rows:
        several = [np.asarray(known, dtype=float) for known in rows["targets"]]
        if len(several[0]) > 1:
            return np.stack(several)
    return rows["target"].to_numpy(dtype=float)
