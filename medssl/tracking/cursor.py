"""How far a journal has been delivered, to each MLflow store it was ever delivered to."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from medssl.atomic import atomic_write

CURSOR_NAME = "tracking.json"


@dataclass
class Cursor:
    """Progress towards one store.

    Attributes:
        offset: byte of the journal up to which records are delivered.
        runs: MLflow's id of each run.
        artifacts: (run, path relative to the run folder) that still wait.
    """

    offset: int = 0
    runs: dict[str, str] = field(default_factory=dict)
    artifacts: list[list[str]] = field(default_factory=list)


class CursorFile:
    """The cursor of one store in a run folder's ``tracking.json``.

    Args:
        run_folder: where the file lies.
        store: names the store; written as a hash only, because an address may hold a password.
    """

    def __init__(self, run_folder: Path, store: str) -> None:
        self._path = run_folder / CURSOR_NAME
        self._key = hashlib.sha256(store.encode()).hexdigest()[:16]

    def read(self) -> Cursor:
        """Return the stored cursor; one at the start when none can be read."""
        stored = self._content().get(self._key)
        return Cursor(**stored) if isinstance(stored, dict) else Cursor()

    def write(self, cursor: Cursor) -> None:
        """Store the cursor, atomically, beside those of other stores."""
        content = self._content() | {self._key: asdict(cursor)}
        atomic_write(self._path, json.dumps(content, indent=1))

    def _content(self) -> dict[str, Any]:
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}
