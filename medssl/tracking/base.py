"""Tracking: the journal on disk first, MLflow from it, and training never waits.

    with Tracker(run_folder, config) as tracker:
        with tracker.run("study", params={...}):
            with tracker.run("pretrain/rotation", parent="study") as run:
                run.log(step, {"train/loss": 0.7})
                run.artifact(run_folder / "config.yaml")
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from medssl.config import Config
from medssl.errors import Terminated
from medssl.tracking.journal import FolderLock, Journal

log = logging.getLogger(__name__)

# How long the end of a run may wait for a server that does not answer, in seconds.
CLOSE_SECONDS = 4.0
_METRIC_KEY = re.compile(r"[^\w\-./ :]")


class TrackingConfig(Config):
    """Where metrics go beside the run folder's own journal."""

    mlflow: bool = Field(True, description="deliver to MLflow; the journal is always written")
    uri: str | None = Field(
        None,
        description="MLflow tracking URI; default: MLFLOW_TRACKING_URI, else sqlite beside the run",
    )
    experiment: str = Field("medssl", min_length=1, description="MLflow experiment")
    flush_seconds: float = Field(2.0, gt=0, description="pause between two deliveries, s")

    @field_validator("uri")
    @classmethod
    def _without_password(cls, uri: str | None) -> str | None:
        if uri and urlsplit(uri).password:
            raise ValueError(
                "a password does not belong into a config file; give the URI in the environment "
                "variable MLFLOW_TRACKING_URI, or the password in MLFLOW_TRACKING_PASSWORD"
            )
        return uri


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


class Tracker:
    """Journal of one run folder, and its delivery to MLflow off the training thread.

    Args:
        run_folder: the study's folder; created if missing.
        config: where to deliver.

    Raises:
        MachineError: another process uses the folder, or the disk cannot be written.
    """

    def __init__(self, run_folder: Path, config: TrackingConfig | None = None) -> None:
        raise NotImplementedError

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
            params: settings, nested as they like; paths and names of people are not sent on.
            tags: short labels.
        """
        raise NotImplementedError

    def close(self) -> SyncReport:
        """Deliver what is left, waiting at most 5 s for a dead server. Never raises for a server."""
        raise NotImplementedError

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

    name: str

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics at a step; a step not beyond the last one logged of a metric is skipped."""
        raise NotImplementedError

    def artifact(self, path: Path) -> None:
        """Log a file or folder that lies inside the run folder, as it is at delivery."""
        raise NotImplementedError

    def tag(self, key: str, value: object) -> None:
        """Set a label; the last value counts."""
        raise NotImplementedError

    def last_step(self, metric: str) -> int | None:
        """Return the last step logged of a metric, by this process or an earlier one."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        raise NotImplementedError

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        raise NotImplementedError


def sync(run_folder: Path, config: TrackingConfig | None = None) -> SyncReport:
    """Deliver what MLflow has not received of a run folder's journal (`medssl sync`).

    Args:
        run_folder: a run folder, of this machine or copied from another.
        config: default: the ``tracking`` section of the folder's ``config.yaml``.

    Raises:
        DataError: there is no journal in the folder.
        MachineError: a process still uses the folder.
    """
    raise NotImplementedError
