"""The journal: every parameter, metric and artifact of a run folder, on disk first.

``journal.jsonl`` holds one JSON object a line. Each line is written by a single call, so a killed
process leaves at most one torn line at the end; a reader drops it and the next writer removes it.
Values that JSON cannot hold are written as the words ``nan``, ``inf`` and ``-inf``.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medssl.atomic import disk_errors
from medssl.errors import MachineError

log = logging.getLogger(__name__)

JOURNAL_NAME = "journal.jsonl"
LOCK_NAME = ".journal.lock"
HEADER = "journal"  # kind of the first record, which names the journal itself
SYSTEM = "system"  # kind of a record that says how busy the machine is, and nothing of the run

# Given back when the disk is full, so that the journal can still say how its runs ended.
RESERVE_BYTES = 64 * 1024
SILENCE = "no word"  # how a run ended whose process was killed or lost its power

Record = dict[str, Any]


@dataclass
class RunState:
    """What the journal already holds of one run."""

    open: bool = False
    finished: bool = False
    last_time: float = 0.0
    num_samples: int = 0  # of the machine
    last_step: dict[str, int] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)


class FolderLock:
    """At most one process writes or delivers a run folder's journal.

    A record lock: it ends with the process however that dies, and forked workers do not hold it.
    The file's own bytes are the reserve of `RESERVE_BYTES`.
    """

    def __init__(self, run_folder: Path) -> None:
        path = run_folder / LOCK_NAME
        with disk_errors(path):
            run_folder.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._handle)
            raise MachineError(
                f"run folder {run_folder.name}: another medssl process is using it. "
                "Wait until it ends, or choose another --out."
            ) from None
        try:
            os.posix_fallocate(self._handle, 0, RESERVE_BYTES)
        except OSError:  # full already, or a file system that cannot; writing itself will tell
            log.debug("No reserve for the journal.")

    def release(self) -> None:
        """Let the next process in; the file itself stays."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


class Journal:
    """The one writer of a run folder's ``journal.jsonl``.

    Opening reads what is there, so that a resumed run never logs a point twice.

    Raises:
        MachineError: the disk is full or not writable.
    """

    def __init__(self, run_folder: Path) -> None:
        self.path = run_folder / JOURNAL_NAME
        self.runs: dict[str, RunState] = {}
        self._writing = threading.Lock()
        with disk_errors(self.path):
            run_folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            self._seq = self._replay()
        if self._seq == 0:
            self.append(HEADER, "", id=uuid.uuid4().hex, version=1)

    def append(self, kind: str, run: str, **content: Any) -> None:
        """Write one record; it survives the death of the process from here on."""
        with self._writing:
            record = {"seq": self._seq, "time": round(time.time(), 3), "run": run, "kind": kind}
            record |= content
            line = (json.dumps(encode(record), allow_nan=False) + "\n").encode()
            with disk_errors(self.path):
                self._write_whole(line, may_use_reserve=kind == "end")
            self._seq += 1
            self._note(record)

    def end_abandoned(self) -> None:
        """Write the end of runs whose process died without a word: at the last that it wrote."""
        for name in [name for name, state in self.runs.items() if state.open]:
            last = self.runs[name].last_time
            self.append("end", name, status="KILLED", error=SILENCE, ended=last)

    def close(self) -> None:
        """Flush to the disk itself and close."""
        with self._writing:
            if self._file >= 0:
                with disk_errors(self.path):
                    os.fsync(self._file)
                os.close(self._file)
                self._file = -1

    def _write_whole(self, line: bytes, *, may_use_reserve: bool) -> None:
        end = os.fstat(self._file).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError as error:
            os.ftruncate(self._file, end)  # a part of a line would spoil the next one
            if not may_use_reserve or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            # By its path: closing a second handle would let the lock go.
            os.truncate(self.path.with_name(LOCK_NAME), 0)
            self._write_whole(line, may_use_reserve=False)

    def _replay(self) -> int:
        """Drop a torn end, learn what is logged, and return the next sequence number."""
        seq, end = 0, 0
        for record, end in read_journal(self.path):  # noqa: B007  (the last end is needed)
            seq = int(record["seq"]) + 1
            self._note(record)
        if os.fstat(self._file).st_size > end:
            os.ftruncate(self._file, end)
        return seq

    def _note(self, record: Record) -> None:
        if record["kind"] == HEADER:
            return
        state = self.runs.setdefault(record["run"], RunState())
        state.last_time = float(record["time"])
        match record["kind"]:
            case "start":
                state.open, state.finished = True, False
            case "end":
                state.open = False
                state.finished = record.get("status") == "FINISHED"
            case "metrics":
                for key in record["values"]:
                    state.last_step[key] = max(record["step"], state.last_step.get(key, -1))
            case "params":
                state.params |= record["values"]
            case "system":
                state.num_samples = int(record["step"]) + 1
            case _:
                pass


def read_journal(path: Path, offset: int = 0) -> Iterator[tuple[Record, int]]:
    """Yield each whole record from a byte offset on, with the offset of the record after it.

    A torn last line is left alone. A damaged line in the middle is passed over.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            record = _parse(line)
            if record is not None:
                yield record, offset


def settle(path: Path) -> None:
    """Bring what is written of a file to the disk itself; off the training thread, as it waits.

    Raises:
        OSError: the disk does not take it.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not {"seq", "time", "run", "kind"} <= record.keys():
        return None
    return record


def encode(value: Any) -> Any:
    """Return plain JSON content: non-finite numbers as words, everything unknown as text."""
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if isinstance(value, int):
        return int(value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return number if math.isfinite(number) else str(number)
