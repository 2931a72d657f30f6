"""What a run folder holds for a report; every file of it may be missing."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from medssl.errors import DataError
from medssl.tracking.journal import JOURNAL_NAME, read_journal

PRETRAIN_PREFIX = "pretrain/"
_TEXT_COLUMNS = (
    "init", "pretext", "reference", "backbone", "task", "task_kind", "protocol", "layer", "metric",
    "verdict",
)  # fmt: skip


@dataclass
class LoggedRun:
    """One run of the journal.

    Attributes:
        name: as it was logged.
        params: settings, flattened.
        points: metric -> [(step, value)]; values that are not finite are left out.
        status: FINISHED, FAILED, KILLED, or empty while it is open.
    """

    name: str
    params: dict[str, Any] = field(default_factory=dict)
    points: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    status: str = ""


@dataclass(frozen=True)
class Contents:
    """Everything a report is made of.

    Attributes:
        validations: of each pretraining, by its name: what its last validation found.
    """

    folder: Path
    config: dict[str, Any]
    config_text: str
    results: pd.DataFrame
    comparisons: pd.DataFrame
    predictions: pd.DataFrame
    data: dict[str, Any]
    provenance: dict[str, Any]
    pretraining: list[LoggedRun]
    validations: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        """The init that others are compared with."""
        if len(self.comparisons):
            return str(self.comparisons["reference"].iloc[0])
        return str(self._statistics().get("reference", "imagenet"))

    @property
    def confidence(self) -> float:
        """The level of the intervals, for example 0.95."""
        return 1 - float(self._statistics().get("alpha", 0.05))

    @property
    def name(self) -> str:
        """The name of the study."""
        return str(self.config.get("name") or self.folder.resolve().name)

    def _statistics(self) -> dict[str, Any]:
        section = self.config.get("statistics")
        return section if isinstance(section, dict) else {}


def read_contents(folder: Path) -> Contents:
    """Read a run folder.

    Raises:
        DataError: the folder holds neither results nor a journal.
    """
    if not (folder / "results.csv").is_file() and not (folder / JOURNAL_NAME).is_file():
        raise DataError(
            f"run folder {folder.name!r}: neither results.csv nor {JOURNAL_NAME} is in it. "
            "Give the folder that a study, pretrain or transfer command wrote."
        )
    text = _text(folder / "config.yaml")
    config = yaml.safe_load(text) if text else {}
    return Contents(
        folder=folder,
        config=config if isinstance(config, dict) else {},
        config_text=text,
        results=_table(folder / "results.csv"),
        comparisons=_table(folder / "comparisons.csv"),
        predictions=_predictions(folder / "predictions.parquet"),
        data=_mapping(folder / "data.json"),
        provenance=_mapping(folder / "provenance.json"),
        pretraining=_pretraining(folder / JOURNAL_NAME),
        validations={
            path.parent.name: _mapping(path)
            for path in sorted((folder / "checkpoints").glob("*/validation.json"))
        },
    )


def _pretraining(journal: Path) -> list[LoggedRun]:
    runs: dict[str, LoggedRun] = {}
    for record, _ in read_journal(journal):
        name = record["run"]
        if not name.startswith(PRETRAIN_PREFIX):
            continue
        run = runs.setdefault(name, LoggedRun(name.removeprefix(PRETRAIN_PREFIX)))
        match record["kind"]:
            case "params":
                run.params |= record["values"]
            case "metrics":
                for key, value in record["values"].items():
                    if not isinstance(value, str):
                        run.points.setdefault(key, []).append((record["step"], value))
            case "start":
                run.status = ""
            case "end":
                run.status = record["status"]
            case _:
                pass
    return list(runs.values())


def _predictions(path: Path) -> pd.DataFrame:
    if not path.is_file():
        return pd.DataFrame()
    return pd.read_parquet(path)


def _table(path: Path) -> pd.DataFrame:
    if not path.is_file():
        return pd.DataFrame()
    texts = dict.fromkeys(_TEXT_COLUMNS, str)
    table = pd.read_csv(path, dtype=texts)
    for name in set(_TEXT_COLUMNS) & set(table.columns):  # CSV: an empty text reads as missing
        table[name] = table[name].fillna("")
    return table


def _mapping(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_text(path) or "{}")
    except ValueError:
        raise DataError(f"{path.name} in the run folder is not valid JSON.") from None
    return content if isinstance(content, dict) else {}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
