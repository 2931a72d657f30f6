"""The errors medssl raises, and the exit code each one means on the command line.

A message says what happened, where, what was found against what was wanted, and what to do.
It names scans and patients by key only: never a file name, a UID or a person.
"""

from __future__ import annotations


class MedsslError(Exception):
    """Base of every error that a user can cause or mend."""

    exit_code = 1


class ConfigError(MedsslError):
    """A configuration or a command line that cannot be carried out as written."""

    exit_code = 2


class DataError(MedsslError):
    """Scans, labels or tables that are missing, unreadable or contradict each other."""

    exit_code = 3


class GeometryError(DataError):
    """Positions, directions or spacings of a scan that contradict each other."""


class LabelError(DataError):
    """Labels that do not fit the scans they belong to."""


class LeakageError(DataError):
    """The same patient on two sides of a split that must be disjoint."""


class WeightsError(DataError):
    """A checkpoint or weight file that does not fit the backbone or its contract."""


class RejectedScan(DataError):  # noqa: N818  (a verdict about one scan, caught by the index)
    """One file or series that cannot become a scan.

    Attributes:
        reason: the reason code written to the index, for example ``missing_slice``.
    """

    def __init__(self, reason: str, message: str = "") -> None:
        super().__init__(message or reason)
        self.reason = reason


class MachineError(MedsslError):
    """The machine cannot do it: no space, no such file or device, no network, a locked folder."""

    exit_code = 4


class AbandonedError(MachineError):
    """Another process of the same training ended, and this one cannot go on alone."""


class DivergedError(MedsslError):
    """Training produced a value that is not finite."""

    exit_code = 5


class Terminated(BaseException):
    """SIGTERM arrived; raised in the main thread so that every `finally` runs.

    Attributes:
        is_planned: a time limit of the config ended the work, and no signal.
    """

    exit_code = 143
    is_planned = False
