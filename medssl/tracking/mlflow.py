"""Delivery of a journal to MLflow: in batches, in order, each record once.

Once, although a process may die between MLflow's answer and the cursor being saved: runs are found
again by a key, and MLflow's database holds one row per metric, step, time and value, so a batch
that is sent again (with the journal's own times) changes nothing.

What MLflow cannot hold: it stores infinity as 1.8e308 and draws it. Values that are not finite stay
in the journal, and the run gets the tag ``nonfinite.<metric>`` with the step and the value.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock

from medssl.tracking.batch import Batch, milliseconds, parts, run_key
from medssl.tracking.client import URI_VARIABLE, prepare_environment
from medssl.tracking.cursor import Cursor, CursorFile
from medssl.tracking.datasets import dataset_inputs
from medssl.tracking.journal import HEADER, JOURNAL_NAME, Record, read_journal, settle
from medssl.tracking.privacy import TEXT_SUFFIXES, may_leave, public_text

log = logging.getLogger(__name__)

KEY_TAG = "medssl.key"
ENDED_TAG = "ended_by"  # completion, or the kind of what ended the run

# MLflow's own limits of one batch: under basic-auth a request costs as much as 500 points.
MAX_METRICS, MAX_PARAMS_TAGS = 1000, 100
CHUNK_RECORDS = 1000  # delivered before the cursor is saved
LOCK_SECONDS = 120.0  # until another process has made the tables of a new sqlite file
# Error codes that a second attempt does not mend.
_REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE"}


@dataclass(frozen=True)
class SyncReport:
    """What a delivery to MLflow achieved.

    Attributes:
        delivered: records delivered by this process.
        undelivered: records that are in the journal and not yet in MLflow.
        refused: records that MLflow will not take (they stay in the journal).
        target: where they went, without credentials; empty when MLflow is switched off.
        problem: the kind of the last failure; empty when all went well.
    """

    delivered: int = 0
    undelivered: int = 0
    refused: int = 0
    target: str = ""
    problem: str = ""


class _Abandoned(Exception):  # noqa: N818  (a signal inside this file)
    """The owner no longer waits: stop, and write nothing more."""


class Delivery:
    """Delivers one run folder's journal to one MLflow store.

    Args:
        run_folder: holds ``journal.jsonl`` and, as cursor, ``tracking.json``.
        uri: tracking URI; default: ``MLFLOW_TRACKING_URI``, else a sqlite file beside the folder.
        experiment: name of the experiment.
    """

    def __init__(self, run_folder: Path, uri: str | None, experiment: str) -> None:
        prepare_environment()
        from mlflow.tracking import MlflowClient

        self._new_client = MlflowClient
        self._folder = run_folder.resolve()
        default = f"sqlite:///{self._folder.parent / 'mlflow.db'}"
        self._uri = uri or os.environ.get(URI_VARIABLE) or default
        self._experiment = experiment
        self._client: Any = None
        self._experiment_id = ""
        self._cursor_file = CursorFile(self._folder, f"{self._uri}\n{experiment}")
        self._cursor = self._cursor_file.read()
        self._journal_id = ""
        self._one_at_a_time = threading.Lock()
        self._abandoned = False
        self._delivered = self._refused = 0
        self._problem = ""
        self.last_progress = 0.0

    @property
    def is_local(self) -> bool:
        """Whether the store is a file on this machine."""
        return urlsplit(self._uri).scheme == "sqlite"

    def deliver(self) -> bool:
        """Deliver what is new; return whether all of it arrived. Never raises for a store."""
        with self._one_at_a_time:
            try:
                self._connect()
                while self._deliver_chunk():
                    pass
                self._deliver_artifacts()
            except _Abandoned:
                return False
            # Whatever a store, its driver or the network throws must not reach training.
            except Exception as error:  # noqa: BLE001
                self._problem = _kind(error)
                log.debug("MLflow delivery failed: %s", self._problem)
                return False
            self._problem = ""
            return True

    def abandon(self) -> None:
        """Stop a delivery that hangs: nothing is written to the cursor from now on."""
        self._abandoned = True

    def report(self) -> SyncReport:
        """Return what has been achieved so far."""
        journal = read_journal(self._folder / JOURNAL_NAME, self._cursor.offset)
        waiting = sum(1 for record, _ in journal if record["kind"] != HEADER)
        parts = urlsplit(self._uri)
        host = f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname
        target = self._uri if self.is_local else f"{parts.scheme}://{host or ''}"
        return SyncReport(
            delivered=self._delivered,
            undelivered=waiting + len(self._cursor.artifacts),
            refused=self._refused,
            target=target,
            problem=self._problem,
        )

    # -------------------------------------------------------------------------- connection

    def _connect(self) -> None:
        if self._client is not None:
            return
        if not self.is_local:
            client = self._new_client(tracking_uri=self._uri)
            self._experiment_id = self._find_experiment(client, artifacts=None)
        else:
            # Processes that open a fresh sqlite together crash: one makes its tables at a time.
            database = Path(self._uri.removeprefix("sqlite:///"))
            database.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{database}.lock", timeout=LOCK_SECONDS):
                self._make_tables(database)
                client = self._new_client(tracking_uri=self._uri)
                artifacts = str(database.resolve().parent / "mlartifacts")
                self._experiment_id = self._find_experiment(client, artifacts)
        self._advance()
        self._journal_id = next(
            (r["id"] for r, _ in read_journal(self._folder / JOURNAL_NAME) if r["kind"] == HEADER),
            "",
        )
        self._forget_deleted_store(client)
        self._client = client

    def _make_tables(self, database: Path) -> None:
        """Make a new sqlite file whole, then give it its name.

        MLflow takes seconds to make its tables, and a file with half of them, left by a process
        that was killed meanwhile, can never be opened again.
        """
        if database.exists():
            return
        draft = database.with_name(f".{database.name}.part")
        for leftover in (draft, draft.with_name(f"{draft.name}-journal")):
            leftover.unlink(missing_ok=True)
        self._new_client(tracking_uri=f"sqlite:///{draft}").search_experiments(max_results=1)
        draft.replace(database)

    def _find_experiment(self, client: Any, artifacts: str | None) -> str:
        from mlflow.exceptions import MlflowException

        found = client.get_experiment_by_name(self._experiment)
        if found is None:
            try:
                return str(client.create_experiment(self._experiment, artifacts))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = client.get_experiment_by_name(self._experiment)
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _forget_deleted_store(self, client: Any) -> None:
        """Start again when the runs of the cursor are gone, for example with their database."""
        from mlflow.exceptions import MlflowException

        first = next(iter(self._cursor.runs.values()), None)
        if first is None:
            return
        try:
            gone = client.get_run(first).info.lifecycle_stage == "deleted"
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            gone = True
        if gone:
            self._cursor = Cursor()

    # -------------------------------------------------------------------------- the cursor

    def _save_cursor(self) -> None:
        self._stop_if_abandoned()
        self._cursor_file.write(self._cursor)

    def _advance(self) -> None:
        self.last_progress = time.monotonic()
        self._stop_if_abandoned()

    def _stop_if_abandoned(self) -> None:
        if self._abandoned:
            raise _Abandoned

    # -------------------------------------------------------------------------- records

    def _deliver_chunk(self) -> bool:
        """Deliver up to `CHUNK_RECORDS` records; return whether there were any."""
        batches: dict[str, Batch] = {}
        artifacts: list[list[str]] = []
        journal = read_journal(self._folder / JOURNAL_NAME, self._cursor.offset)
        chunk = list(itertools.islice(journal, CHUNK_RECORDS))
        if not chunk:
            return False
        settle(self._folder / JOURNAL_NAME)  # MLflow shall know of nothing that a power cut takes
        for record, _ in chunk:
            self._take(record, batches, artifacts)
        for run in list(batches):
            self._send(run, batches.pop(run))
        known = self._cursor.artifacts
        self._cursor.artifacts = known + [item for item in artifacts if item not in known]
        self._cursor.offset = chunk[-1][1]
        self._delivered += sum(record["kind"] != HEADER for record, _ in chunk)
        self._save_cursor()
        return True

    def _take(self, record: Record, batches: dict[str, Batch], artifacts: list[list[str]]) -> None:
        run = record["run"]
        batch = batches.setdefault(run, Batch())  # of the header, or a later version's kind: as is
        match record["kind"]:
            case "start":
                self._start(record)
            case "params":
                batch.add_params(record)
            case "tags":
                batch.add_tags(record)
            case "metrics" | "system":
                batch.add_metrics(record)
            case "inputs":
                self._log_inputs(record)
            case "artifact":
                artifacts.append([run, record["path"]])
            case "end":
                batch.tags[ENDED_TAG] = str(record.get("error", "completion"))
                self._send(run, batches.pop(run))
                seconds = float(record.get("ended") or record["time"])
                self._end(run, record["status"], seconds)
            case _:
                pass

    def _start(self, record: Record) -> None:
        name = record["run"]
        known = self._cursor.runs
        if name not in known:
            known[name] = self._find_or_create(record)
            self._save_cursor()
        elif record.get("resumed"):
            self._client.update_run(known[name], status="RUNNING")
            self._client.set_tag(known[name], ENDED_TAG, "not yet, after a restart")
        self._advance()

    def _find_or_create(self, record: Record) -> str:
        key = run_key(self._journal_id, record["run"])
        found = self._client.search_runs(
            [self._experiment_id], f"tags.`{KEY_TAG}` = '{key}'", max_results=1
        )
        if found:
            return str(found[0].info.run_id)
        tags = {KEY_TAG: key}
        parent = self._cursor.runs.get(record.get("parent") or "")
        if parent:
            tags["mlflow.parentRunId"] = parent
        run = self._client.create_run(
            self._experiment_id,
            start_time=milliseconds(record["time"]),
            tags=tags,
            run_name=public_text(record["run"]),
        )
        return str(run.info.run_id)

    def _end(self, run: str, status: str, seconds: float) -> None:
        self._client.set_terminated(
            self._cursor.runs[run], status=status, end_time=milliseconds(seconds)
        )
        self._advance()

    def _send(self, run: str, batch: Batch) -> None:
        from mlflow.entities import Metric, Param, RunTag

        run_id = self._cursor.runs.get(run)
        metrics = [Metric(k, value, at, step) for k, value, step, at in batch.metrics]
        params = [Param(k, value) for k, value in batch.params.items()]
        tags = [RunTag(k, value) for k, value in batch.tags.items()]
        for part in parts(metrics, MAX_METRICS):
            self._log_batch(run_id, metrics=part)
        for part in parts(params, MAX_PARAMS_TAGS):
            self._log_batch(run_id, params=part)
        for part in parts(tags, MAX_PARAMS_TAGS):
            self._log_batch(run_id, tags=part)

    def _log_batch(self, run_id: str | None, **items: list[Any]) -> None:
        """Send one batch; a refused one is sent item by item, to lose only the culprit."""
        from mlflow.exceptions import MlflowException

        self._stop_if_abandoned()
        try:
            self._client.log_batch(run_id, **items)
        except MlflowException as error:
            if error.error_code not in _REFUSALS:
                raise
            ((kind, entries),) = items.items()
            if len(entries) == 1:
                self._refused += 1
                log.warning("MLflow refused %r (%s).", entries[0].key, error.error_code)
            else:
                for entry in entries:
                    self._log_batch(run_id, **{kind: [entry]})
        self._advance()

    def _log_inputs(self, record: Record) -> None:
        from mlflow.exceptions import MlflowException

        self._stop_if_abandoned()
        try:
            self._client.log_inputs(self._cursor.runs[record["run"]], dataset_inputs(record))
        except MlflowException as error:
            if error.error_code not in _REFUSALS:
                raise
            self._refused += 1
            log.warning("MLflow refused the data of %r (%s).", record["run"], error.error_code)
        self._advance()

    # -------------------------------------------------------------------------- artifacts, ends

    def _deliver_artifacts(self) -> None:
        """Copy the artifacts that wait; one that fails stays, and holds up nothing else."""
        waiting: list[list[str]] = list(self._cursor.artifacts)
        failure: Exception | None = None
        for item in waiting:
            run, relative = item
            self._stop_if_abandoned()
            try:
                self._copy_artifact(self._cursor.runs.get(run), relative)
            except Exception as error:  # noqa: BLE001  (any store, any driver)
                failure = error
            else:
                self._cursor.artifacts.remove(item)
                self._save_cursor()
                self._advance()
        if failure is not None:
            raise failure

    def _copy_artifact(self, run_id: str | None, relative: str) -> None:
        path = self._folder / relative
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        names = [file.relative_to(self._folder).as_posix() for file in found]
        if not path.exists():
            self._refused += may_leave(relative)
            log.warning("Artifact %s is no longer in the run folder.", relative)
            return
        for file, name in zip(found, names, strict=True):
            if file.is_file() and may_leave(name):
                self._copy_file(run_id, file, name)

    def _copy_file(self, run_id: str | None, file: Path, name: str) -> None:
        if file.suffix in TEXT_SUFFIXES:
            text = file.read_text(encoding="utf-8")
            if (public := public_text(text)) != text:
                self._client.log_text(run_id, public, name)
                return
        place = name.rpartition("/")[0]
        self._client.log_artifact(run_id, str(file), place or None)


def _kind(error: Exception) -> str:
    """Return the kind of a failure; its message may hold an address with a password."""
    code = getattr(error, "error_code", "")
    return f"{type(error).__name__} {code}".strip()
