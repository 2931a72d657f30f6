"""What one run's records become in MLflow's own terms: names, lengths and times it accepts."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from medssl.tracking.journal import Record
from medssl.tracking.privacy import public_param, public_tag, public_text

# MLflow's own limits, in characters.
MAX_KEY_LENGTH, MAX_PARAM_LENGTH, MAX_TAG_LENGTH = 250, 6000, 8000
_NOT_IN_A_KEY = re.compile(r"[^\w\-./ :]")


@dataclass
class Batch:
    """What waits to be sent to one run.

    Attributes:
        metrics: (key, value, step, time in ms).
        params: settings; MLflow holds each for ever.
        tags: labels; the last value counts.
    """

    metrics: list[tuple[str, float, int, int]] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def add_params(self, record: Record) -> None:
        """Take a record of settings; those that may not leave are left out."""
        for key, value in record["values"].items():
            text = public_param(key, value)
            if text is not None:
                self.params[metric_key(key)] = text[:MAX_PARAM_LENGTH]

    def add_tags(self, record: Record) -> None:
        """Take a record of labels; those that may not leave are left out."""
        for key, value in record["values"].items():
            text = public_tag(key, value)
            if text is not None:
                self.tags[tag_key(key)] = text[:MAX_TAG_LENGTH]

    def add_metrics(self, record: Record) -> None:
        """Take a record of metrics; a value that is not finite becomes a tag."""
        at = milliseconds(record["time"])
        for key, value in record["values"].items():
            if isinstance(value, str):  # nan, inf, -inf
                text = f"{value} at step {record['step']}"
                self.tags.setdefault(tag_key(f"nonfinite.{key}"), text)
            else:
                self.metrics.append((metric_key(key), float(value), int(record["step"]), at))


def metric_key(key: str) -> str:
    """Return a key with no character that MLflow refuses."""
    return _NOT_IN_A_KEY.sub("_", public_text(key))[:MAX_KEY_LENGTH]


def tag_key(key: str) -> str:
    """Return a key that is none of MLflow's own, some of which hold people and places."""
    return metric_key(key.replace("mlflow.", "")) or "_"


def run_key(journal_id: str, run: str) -> str:
    """Return the tag by which a run of a journal is found in MLflow."""
    return hashlib.sha256(f"{journal_id}\n{run}".encode()).hexdigest()[:32]


def milliseconds(seconds: float) -> int:
    """Return MLflow's unit of time."""
    return round(seconds * 1000)


def parts(items: list[Any], size: int) -> Iterator[list[Any]]:
    """Yield a list in parts of at most a size."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
