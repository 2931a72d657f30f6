"""What a run folder holds for a report; every file of it may be missing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from medssl.errors import DataError
from medssl.models.origin import FROM, beginning, taken_to_3d
from medssl.tracking.journal import JOURNAL_NAME, read_journal
from medssl.tracking.privacy import PUBLIC_CONFIG

PRETRAIN_PREFIX = "pretrain/"

_TEXT_COLUMNS = (
    "init", "pretext", "reference", "backbone", "task", "task_kind", "protocol", "layer", "metric",
    "verdict", "ci_over", "bound", "ci_low_bound", "ci_high_bound", "fit", "limit_for_effect",
    "limit_for_margin",
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
    """Everything a report is made of; inits are called as `init_names` calls them.

    Attributes:
        public_config: the configuration as it may be shown to others; empty where the run is of an
            older medssl, or a comparison.
        names: what inits are called whose label alone does not say it; see `init_names`.
        validations: of each pretraining, by its name: what its last validation found.
        num_failed: cells of the matrix that failed.
        num_cells: cells that are done, in a study that goes on.
    """

    folder: Path
    config: dict[str, Any]
    public_config: str
    results: pd.DataFrame
    comparisons: pd.DataFrame
    predictions: pd.DataFrame
    data: dict[str, Any]
    provenance: dict[str, Any]
    pretraining: list[LoggedRun]
    validations: dict[str, dict[str, Any]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    labels_saved: pd.DataFrame = field(default_factory=pd.DataFrame)
    learning_curves: pd.DataFrame = field(default_factory=pd.DataFrame)
    power: pd.DataFrame = field(default_factory=pd.DataFrame)
    baselines: pd.DataFrame = field(default_factory=pd.DataFrame)
    num_failed: int = 0
    num_cells: int = 0

    @property
    def reference(self) -> str:
        """The init that others are compared with."""
        if len(self.comparisons):
            return str(self.comparisons["reference"].iloc[0])
        label = str(self._statistics().get("reference", "imagenet"))
        return self.names.get(label, label)

    @property
    def confidence(self) -> float:
        """The level of the intervals, for example 0.95."""
        return 1 - float(self._statistics().get("alpha", 0.05))

    @property
    def is_matrix(self) -> bool:
        """Whether the run is meant to evaluate inits: a study, a transfer, or a comparison."""
        return "inits" in self.config or "runs" in self.config

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
    config = config if isinstance(config, dict) else {}
    provenance = _mapping(folder / "provenance.json")
    contracts = {
        path.parent.name: _mapping(path)
        for path in sorted((folder / "checkpoints").glob("*/contract.json"))
    }
    names = init_names(config, provenance.get("inits"), contracts)
    pretraining = _pretraining(folder / JOURNAL_NAME)
    for run in pretraining:
        run.name = names.get(run.name, run.name)
    return Contents(
        folder=folder,
        config=config,
        public_config=_text(folder / PUBLIC_CONFIG),
        results=_with_names(_table(folder / "results.csv"), names),
        comparisons=_with_names(_table(folder / "comparisons.csv"), names),
        predictions=_with_names(_predictions(folder / "predictions.parquet"), names),
        data=_mapping(folder / "data.json"),
        provenance={**provenance, "inits": _renamed(provenance.get("inits") or {}, names)},
        pretraining=pretraining,
        validations={
            names.get(path.parent.name, path.parent.name): _mapping(path)
            for path in sorted((folder / "checkpoints").glob("*/validation.json"))
        },
        names=names,
        labels_saved=_with_names(_table(folder / "labels_saved.csv"), names),
        learning_curves=_with_names(_table(folder / "learning_curves.csv"), names),
        power=_with_names(_table(folder / "power.csv"), names),
        baselines=_with_names(_table(folder / "baselines.csv"), names),
        num_failed=len(_table(folder / "failures.csv")),
        num_cells=len(list((folder / "cells").glob("*.parquet"))),
    )


def init_names(
    config: Mapping[str, Any],
    reports: Mapping[str, Any] | None = None,
    contracts: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Return what to call the inits whose ImageNet weights were taken to 3D, by their labels.

    Wherever such an init is shown, the way that its 2D weights took is a part of its name: another
    way would be another baseline. Inits that the mapping lacks are called by their labels.

    Args:
        config: of a study, transfer or pretraining, as its ``config.yaml`` holds it.
        reports: what was loaded into each init, as ``provenance.json`` holds it: it knows where a
            checkpoint from elsewhere began.
        contracts: of the run's own checkpoints, by their labels.
    """
    origins = _origins(config)
    for label, contract in (contracts or {}).items():
        if whole := taken_to_3d(*beginning(contract)):
            origins[label] = f"{FROM} {whole}"
    for label, report in (reports or {}).items():
        if origin := report.get("origin"):
            origins[label] = str(origin)
    return {label: _named(label, origin) for label, origin in origins.items()}


def _origins(config: Mapping[str, Any]) -> dict[str, str]:
    """Return what the configuration alone says of where inits began."""
    inits = config.get("inits")
    if inits is None and "pretext" in config:  # of a pretraining: it has one, with no label
        inits = {"backbone": {"init": config.get("init"), "pretext": config["pretext"]}}
    found = {}
    for label, section in inits.items() if isinstance(inits, dict) else ():
        of_study = isinstance(section, dict) and "name" not in section
        init, pretext = (
            (section.get("init"), section.get("pretext")) if of_study else (section, None)
        )
        if whole := taken_to_3d(name_of(init), name_of(config.get("backbone"))):
            found[str(label)] = f"{FROM} {whole}" if pretext else whole
    return found


def _named(label: str, origin: str) -> str:
    is_itself = label == "imagenet" and not origin.startswith(FROM)
    return origin if is_itself else f"{label} ({origin})"


def name_of(component: Any) -> str:
    """Return a component's name, given whole or by its name alone."""
    return str(component.get("name", "") if isinstance(component, dict) else component or "")


def _with_names(table: pd.DataFrame, names: Mapping[str, str]) -> pd.DataFrame:
    columns = [column for column in ("init", "reference") if column in table.columns]
    return table.assign(**{column: table[column].replace(names) for column in columns})


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(label, label): value for label, value in values.items()}


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
