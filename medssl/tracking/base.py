"""Tracking: the journal on disk first, MLflow from it, and training never waits.

with Tracker(run_folder, config) as tracker:
    with tracker.run("study", params={...}):
        with tracker.run("pretrain/rotation", parent="study") as run:
            run.log(step, {"train/loss": 0.7})
            run.artifact(run_folder / "config.public.yaml")
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import yaml
from pydantic import Field, field_validator, model_validator

from medssl.config import Config, validate_config
from medssl.errors import AbandonedError, ConfigError, DataError, MachineError, Terminated
from medssl.tracking.journal import (
    JOURNAL_NAME,
    SILENCE,
    SYSTEM,
    FolderLock,
    Journal,
    encode,
)
from medssl.tracking.mlflow import Delivery, SyncReport
from medssl.tracking.registry import check_name
from medssl.tracking.system import Sampler

log = logging.getLogger(__name__)

# How long the end of a run waits for a store that makes no progress, in seconds.
SERVER_PATIENCE_SECONDS = 4.0
LOCAL_PATIENCE_SECONDS = 60.0  # a new sqlite file takes seconds to fill with its tables
MAX_PAUSE_SECONDS = 60.0  # between two attempts at a server that does not answer

# What ends a run from outside: the same command goes on with it.
_KILLING = (KeyboardInterrupt, Terminated, SystemExit, GeneratorExit, AbandonedError)


class TrackingConfig(Config):
    """Where metrics go beside the run folder's own journal."""

    mlflow: bool = Field(True, description="deliver to MLflow; the journal is always written")
    uri: str | None = Field(
        None,
        description="MLflow tracking URI; default: MLFLOW_TRACKING_URI, else sqlite beside the run",
    )
    experiment: str = Field("medssl", min_length=1, description="MLflow experiment")
    images: bool = Field(
        False, description="send a report that shows pixels of patients, see include_images"
    )
    flush_seconds: float = Field(2.0, gt=0, description="pause between two deliveries, s")
    system_seconds: float | None = Field(
        10.0,
        gt=0,
        description="pause between two samples of processor, memory and GPU, s; null: no samples",
    )
    register_as: str | None = Field(
        None, description="model of MLflow's registry that pretrained backbones become versions of"
    )

    @field_validator("uri")
    @classmethod
    def _without_password(cls, uri: str | None) -> str | None:
        if uri and urlsplit(uri).scheme in ("", "file"):
            raise ValueError(
                "MLflow keeps no runs in plain folders any more; give sqlite:///…/mlflow.db "
                "or the http address of a server"
            )
        if uri and urlsplit(uri).password:
            raise ValueError(
                "a password does not belong into a config file; give the URI in the environment "
                "variable MLFLOW_TRACKING_URI, or the password in MLFLOW_TRACKING_PASSWORD"
            )
        return uri

    @model_validator(mode="after")
    def _registers_where_it_delivers(self) -> TrackingConfig:
        if self.register_as is not None:
            if not self.mlflow:
                raise ValueError("register_as needs mlflow: true")
            try:
                check_name(self.register_as, None)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return self


class Tracker:
    """Journal of one run folder, and its delivery to MLflow off the training thread.

    Args:
        run_folder: the study's folder; created if missing.
        config: where to deliver.

    Raises:
        MachineError: another process uses the folder, or the disk cannot be written.
    """

    def __init__(self, run_folder: Path, config: TrackingConfig | None = None) -> None:
        self.run_folder = run_folder
        config = config or TrackingConfig()
        self._lock = FolderLock(run_folder)
        try:
            self._journal = Journal(run_folder)
            self._journal.end_abandoned()  # an earlier process's; what goes on starts again
        except BaseException:
            self._lock.release()
            raise
        self._open: list[RunHandle] = []
        self._report: SyncReport | None = None
        self._courier: _Courier | None = None
        if config.mlflow:
            # Built here, so that mlflow is imported before any worker process is forked.
            delivery = Delivery(run_folder, config.uri, config.experiment)
            self._courier = _Courier(delivery, config.flush_seconds)
            self._courier.start()
        self._sampler: Sampler | None = None
        if config.system_seconds is not None:
            self._sampler = Sampler(run_folder, config.system_seconds, self._write_sample)
            self._sampler.start()

    def run(
        self,
        name: str,
        *,
        parent: str | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> RunHandle:
        """Return a run to be used in a `with` statement.

        A run of that name already in the journal is resumed: points it already holds are skipped.

        Args:
            name: unique within the run folder, for example ``pretrain/rotation``.
            parent: name of the run it belongs to; started before.
            params: settings, nested as they like.
            tags: short labels.

        The journal keeps all of them; MLflow receives those that `medssl.tracking.privacy` lists.

        Raises:
            ValueError: the parent has not been started.
        """
        if parent is not None and parent not in self._journal.runs:
            raise ValueError(f"run {name!r}: its parent {parent!r} has not been started.")
        return RunHandle(self, name, parent, dict(params or {}), dict(tags or {}))

    def finished(self, name: str) -> bool:
        """Return whether the journal holds a run of that name that reached its end."""
        state = self._journal.runs.get(name)
        return state is not None and state.finished

    def close(self) -> SyncReport:
        """Deliver what is left, waiting at most 5 s for a dead server. Never raises for a server.

        Returns:
            What was delivered; ``undelivered`` records wait for ``medssl sync``.
        """
        if self._report is not None:
            return self._report
        if self._sampler is not None:
            self._sampler.finish()
        try:
            for handle in reversed(self._open):  # left without `with`: it did not reach its end
                self._journal.append("end", handle.name, status="KILLED", error=SILENCE)
            self._journal.close()
        finally:  # a full disk: what is in the journal is delivered all the same
            self._report = self._courier.finish() if self._courier else SyncReport()
            self._lock.release()
        if self._report.undelivered:
            log.warning(
                "%d records are not in MLflow yet (%s). They are safe in %s; deliver them with: "
                "medssl sync %s",
                self._report.undelivered,
                self._report.problem or "no answer",
                JOURNAL_NAME,
                self.run_folder,
            )
        return self._report

    def _write_sample(self, values: dict[str, float]) -> None:
        """Write a sample of the machine for every run that is under way."""
        for handle in list(self._open):
            step = self._journal.runs[handle.name].num_samples
            self._journal.append(SYSTEM, handle.name, step=step, values=values)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class RunHandle:
    """One run: use it in a `with` statement, which ends it as FINISHED, FAILED or KILLED."""

    def __init__(
        self,
        tracker: Tracker,
        name: str,
        parent: str | None,
        params: dict[str, Any],
        tags: dict[str, Any],
    ) -> None:
        self.name = name
        self._tracker = tracker
        self._journal = tracker._journal
        self._parent = parent
        self._params = params
        self._tags = tags

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics at a step; a step not beyond the last one logged of a metric is skipped."""
        state = self._journal.runs[self.name]
        new = {
            key: float(value)
            for key, value in metrics.items()
            if step > state.last_step.get(key, -1)
        }
        if new:
            self._journal.append("metrics", self.name, step=int(step), values=new)

    def artifact(self, path: Path) -> None:
        """Log a file or folder that lies inside the run folder, as it is at delivery.

        Of a folder, MLflow receives the files that `medssl.tracking.privacy.may_leave` names.

        Raises:
            ValueError: the path lies outside the run folder or does not exist.
        """
        folder = self._tracker.run_folder.resolve()
        if not path.exists() or not path.resolve().is_relative_to(folder):
            raise ValueError(f"artifact {path.name}: not a file or folder inside the run folder.")
        relative = path.resolve().relative_to(folder).as_posix()
        self._journal.append("artifact", self.name, path=relative)

    def inputs(self, digests: Mapping[str, str], context: str) -> None:
        """Log the data that the run works on, by digest; see `medssl.tracking.datasets`.

        Args:
            digests: by what they are of: ``index``, ``store``, ``splits``, ``labels of <task>``.
            context: what for: ``pretraining`` or ``evaluation``.
        """
        self._journal.append("inputs", self.name, digests=dict(digests), context=context)

    def tag(self, key: str, value: object) -> None:
        """Set a label; the last value counts."""
        self._journal.append("tags", self.name, values={key: value})

    def last_step(self, metric: str) -> int | None:
        """Return the last step logged of a metric, by this process or an earlier one."""
        state = self._journal.runs.get(self.name)
        return state.last_step.get(metric) if state else None

    def __enter__(self) -> Self:
        resumed = self.name in self._journal.runs
        self._journal.append("start", self.name, parent=self._parent, resumed=resumed)
        known = dict(self._journal.runs[self.name].params)
        params = flatten(self._params)
        # MLflow holds a parameter for ever: one that a resumed run changes becomes a tag.
        changed = {f"changed.{k}": v for k, v in params.items() if k in known and known[k] != v}
        new = {k: v for k, v in params.items() if k not in known}
        if new:
            self._journal.append("params", self.name, values=new)
        if self._tags or changed:
            self._journal.append("tags", self.name, values=self._tags | changed)
        self._tracker._open.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._tracker._open.remove(self)
        if kind is None:
            self._journal.append("end", self.name, status="FINISHED")
            return
        status = "KILLED" if issubclass(kind, _KILLING) else "FAILED"
        try:
            # The kind only: a message of a foreign library may carry a name or a path.
            self._journal.append("end", self.name, status=status, error=kind.__name__)
        except MachineError as unwritten:  # the error that ends the run matters more
            log.warning("How run %s ended is not in the journal: %s", self.name, unwritten)


def sync(run_folder: Path, config: TrackingConfig | None = None) -> SyncReport:
    """Deliver what MLflow has not received of a run folder's journal (`medssl sync`).

    Args:
        run_folder: a run folder, of this machine or copied from another.
        config: default: the ``tracking`` section of the folder's ``config.yaml``.

    Raises:
        DataError: there is no journal in the folder.
        MachineError: a process still uses the folder.
    """
    if not (run_folder / JOURNAL_NAME).is_file():
        raise DataError(
            f"run folder {run_folder.name}: there is no {JOURNAL_NAME} in it. "
            "Give the folder that a study, pretrain or transfer command wrote."
        )
    config = config or _config_of(run_folder)
    lock = FolderLock(run_folder)
    try:
        journal = Journal(run_folder)
        journal.end_abandoned()
        journal.close()
        delivery = Delivery(run_folder, config.uri, config.experiment)
        delivery.deliver()
        return delivery.report()
    finally:
        lock.release()


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = encode(value)
    return flat


def _config_of(run_folder: Path) -> TrackingConfig:
    path = run_folder / "config.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    section = content.get("tracking") if isinstance(content, dict) else None
    return validate_config(section or {}, TrackingConfig, source=f"{path.name}: tracking")


class _Courier(threading.Thread):
    """Carries the journal to MLflow; a failure lengthens the pause and touches nothing else."""

    def __init__(self, delivery: Delivery, flush_seconds: float) -> None:
        super().__init__(name="medssl-tracking", daemon=True)
        self._delivery = delivery
        self._flush_seconds = flush_seconds
        self._stop_now = threading.Event()

    def run(self) -> None:
        """Deliver at intervals until told to stop, then once more."""
        pause = self._flush_seconds
        while not self._stop_now.wait(pause):
            arrived = self._delivery.deliver()
            pause = self._flush_seconds if arrived else min(2 * pause, MAX_PAUSE_SECONDS)
        self._delivery.deliver()

    def finish(self) -> SyncReport:
        """Wait for the last delivery as long as it makes progress."""
        local = self._delivery.is_local
        patience = LOCAL_PATIENCE_SECONDS if local else SERVER_PATIENCE_SECONDS
        asked = time.monotonic()
        self._stop_now.set()
        while self.is_alive():
            idle = time.monotonic() - max(asked, self._delivery.last_progress)
            if idle > patience:
                self._delivery.abandon()
                break
            self.join(timeout=0.05)
        return self._delivery.report()
