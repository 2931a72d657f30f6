"""The run folder: one study, resumable, self-contained, without identities."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from medssl.atomic import atomic_write
from medssl.config import Config, validate_config
from medssl.errors import ConfigError, DataError, MachineError
from medssl.provenance import git_commit, machine, package_versions
from medssl.reports.html import page_to_share
from medssl.tracking.base import RunHandle
from medssl.tracking.journal import JOURNAL_NAME, read_journal
from medssl.tracking.privacy import PUBLIC_CONFIG, public_command, public_config

log = logging.getLogger(__name__)

_CONFIG = "config.yaml"
_PROVENANCE = "provenance.json"
_NOT_READABLE = "its config.yaml is not readable"
_RESULTS = ("checkpoints", "cells", "predictions.parquet")
_FREE = (
    "max_minutes", "profile", "num_workers", "prefetch_factor", "cache_gb", "resident",
    "resident_gb", "executor",
)  # fmt: skip
"""Keys that may change while a run goes on: they say when to pause, how to read and what to watch,
not what to compute."""

_SHOWN = 60  # letters of a value that a message quotes


class RunFolder:
    """A folder that holds everything of one run.

    Args:
        path: the folder; made if it is missing.
        config: what the run is; kept as ``config.yaml``.
        command: the medssl command, for the instructions on how to reproduce.
        resume: require that the folder already holds this run.

    Raises:
        ConfigError: the folder holds a run of another configuration, or none to resume.
        MachineError: the folder cannot be written.
    """

    def __init__(self, path: Path, config: Config, command: str, *, resume: bool = False) -> None:
        self.path = path
        tracking = getattr(config, "tracking", None)
        self._pictures_may_leave = not getattr(config, "include_images", False) or (
            tracking is not None and tracking.images
        )
        check_same_config(path, config, resume=resume)
        same = _fixed(_read_config(path, type(config))) == _fixed(yaml.safe_load(config.to_yaml()))
        atomic_write(path / _CONFIG, config.to_yaml())
        atomic_write(path / PUBLIC_CONFIG, public_config(config))
        previous = _read_json(path / _PROVENANCE) if same else {}
        self._provenance: dict[str, Any] = {
            "command": public_command(command, config),
            "config_digest": config.digest(),
            "started": previous.get("started", _now()),
            "restarts": int(previous.get("restarts", -1)) + 1,
            "finished": None,
            "inits": previous.get("inits", {}),
            "data": previous.get("data", {}),
            "git_commit": git_commit(),
            "versions": package_versions(),
            "machine": machine(),
        }
        self.note()

    def send_config(self, handle: RunHandle) -> None:
        """Let MLflow have the configuration, without what may not leave."""
        handle.artifact(self.path / PUBLIC_CONFIG)

    def send_report(self, handle: RunHandle, report: Path) -> None:
        """Let MLflow have the report; one without patients' pixels where none may leave."""
        handle.artifact(report if self._pictures_may_leave else page_to_share(self.path))

    def note(self, **facts: Any) -> None:
        """Add facts to ``provenance.json``."""
        self._provenance.update(facts)
        self.write_json(_PROVENANCE, self._provenance)

    def pin_data(self, digests: Mapping[str, str]) -> None:
        """Hold the run to the data that it was started on.

        Args:
            digests: see `medssl.pipelines.facts.data_digests`.

        Raises:
            DataError: one differs from what an earlier start found.
        """
        pinned: dict[str, str] = self._provenance["data"]
        changed = [name for name, digest in digests.items() if pinned.get(name, digest) != digest]
        if changed:
            raise DataError(
                f"the data have changed since this run was started ({', '.join(changed)}), and "
                "what it holds belongs to the earlier ones. Choose another --out to start anew, "
                "or bring the earlier data back to go on."
            )
        self.note(data={**pinned, **digests}, index_digest=digests["index"])

    def note_inits(self, reports: dict[str, dict[str, Any]]) -> None:
        """Add what was loaded into each init; those of an earlier start are kept."""
        inits = {**self._provenance["inits"], **reports}
        if inits != self._provenance["inits"]:  # it is asked after every cell
            self.note(inits=inits)

    def finish(self) -> None:
        """Note when the run ended."""
        self.note(finished=_now())

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file into the folder, atomically."""
        atomic_write(self.path / name, json.dumps(content, indent=2, default=str) + "\n")


def check_same_config(path: Path, config: Config, *, resume: bool) -> None:
    """Refuse to mix two runs in one folder; see `RunFolder`.

    A run that ended before it computed anything (a label column misspelt, say) leaves a folder
    that a mended configuration may take over.
    """
    if path.exists() and not path.is_dir():
        raise MachineError(
            f"{path.name!r} is a file, and a run needs a folder. Choose another --out."
        )
    if not (path / _CONFIG).is_file():
        if resume:
            raise ConfigError(
                f"there is no run to resume in {path.name!r}. Leave out --resume to start one."
            )
        return
    found = _fixed(_read_config(path, type(config)))
    wanted = _fixed(yaml.safe_load(config.to_yaml()))
    if found != wanted and (resume or _has_results(path)):
        readable = isinstance(found, dict)
        changed = ", ".join(_differences(found, wanted)[:5]) if readable else _NOT_READABLE
        raise ConfigError(
            f"the run folder {path.name!r} holds a run of another configuration: {changed}. "
            "Choose another --out, or delete that folder."
        )


def noted_inits(path: Path) -> dict[str, Any]:
    """Return what was loaded into each init of a run, by their labels; empty where none is noted.

    See `medssl.models.inits.base.LoadReport.to_dict`.
    """
    inits = _read_json(path / _PROVENANCE).get("inits")
    return inits if isinstance(inits, dict) else {}


def keep_comparison(
    path: Path, runs: Sequence[Path], statistics: Config, inits: Mapping[str, Any]
) -> None:
    """Keep how a folder that only compares runs came about: its configuration and provenance.

    Args:
        path: the folder.
        runs: the run folders, each with its predictions.
        statistics: how they are compared.
        inits: what the runs loaded into their inits, by the labels that these have here.
    """
    facts: dict[str, dict[str, Any]] = {}
    for run in runs:
        name = run.resolve().name
        numbered = (f"{name} {number}" for number in itertools.count(2))
        label = next(text for text in itertools.chain([name], numbered) if text not in facts)
        facts[label] = _facts_of(run)
    config = {"runs": list(facts), "statistics": statistics.model_dump(mode="json")}
    provenance = {
        "command": public_command(command_line(), statistics),
        "finished": _now(),
        "inits": dict(inits),
        "runs": facts,
        "git_commit": git_commit(),
        "versions": package_versions(),
        "machine": machine(),
    }
    atomic_write(path / _CONFIG, yaml.safe_dump(config, sort_keys=False, width=100))
    atomic_write(path / _PROVENANCE, json.dumps(provenance, indent=2) + "\n")


def _facts_of(run: Path) -> dict[str, Any]:
    """Return what a comparison says of one of its runs."""
    noted = _read_json(run / _PROVENANCE)
    pinned = noted.get("data")
    with (run / "predictions.parquet").open("rb") as file:
        predictions = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        **{name: noted.get(name) for name in ("finished", "git_commit", "config_digest")},
        "splits": pinned.get("splits") if isinstance(pinned, dict) else None,
        "predictions": predictions,
        "facts": _read_json(run / "data.json"),
    }


def command_line() -> str:
    """Return the command this process was started with, without the folders of absolute paths.

    It goes into the report, and such folders name accounts, projects and sometimes patients.
    """
    return shlex.join(["medssl", *map(_without_folder, sys.argv[1:])])


def _without_folder(argument: str) -> str:
    key, equals, value = argument.rpartition("=")
    return f"{key}{equals}{Path(value).name}" if value.startswith(("/", "~")) else argument


def _has_results(path: Path) -> bool:
    """Return whether a run folder holds anything that its configuration shaped."""
    return any((path / name).exists() for name in _RESULTS) or any(
        record["kind"] == "metrics" for record, _ in read_journal(path / JOURNAL_NAME)
    )


def _read_config(path: Path, kind: type[Config]) -> Any:
    """Return a run's configuration; settings that are newer than it have their defaults."""
    try:
        content = yaml.safe_load((path / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return None
    if not isinstance(content, dict):
        return content
    try:
        return yaml.safe_load(validate_config(content, kind).to_yaml())
    except ConfigError:
        return content


def _fixed(content: Any) -> Any:
    """Return a configuration without the keys that may change while its run goes on."""
    if isinstance(content, dict):
        return {key: _fixed(value) for key, value in content.items() if key not in _FREE}
    return [_fixed(value) for value in content] if isinstance(content, list) else content


def _differences(found: Any, wanted: Any, prefix: str = "") -> list[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        lines = []
        for key in sorted({*found, *wanted}, key=str):
            if found.get(key) != wanted.get(key):
                lines += _differences(found.get(key), wanted.get(key), f"{prefix}{key}.")
        return lines
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        return _differences(dict(enumerate(found)), dict(enumerate(wanted)), prefix)
    return [f"{prefix.rstrip('.')} was {_short(found)}, is {_short(wanted)}"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
