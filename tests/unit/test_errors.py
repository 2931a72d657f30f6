"""Errors carry the exit code that the command line promises."""

from __future__ import annotations

import pytest

from medssl import errors


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.MedsslError, 1),
        (errors.ConfigError, 2),
        (errors.DataError, 3),
        (errors.GeometryError, 3),
        (errors.LabelError, 3),
        (errors.LeakageError, 3),
        (errors.WeightsError, 3),
        (errors.RejectedScan, 3),
        (errors.MachineError, 4),
        (errors.AbandonedError, 4),
        (errors.DivergedError, 5),
        (errors.Terminated, 143),
    ],
)
def test_each_error_means_one_exit_code(error: type[BaseException], code: int) -> None:
    assert error.exit_code == code  # type: ignore[attr-defined]


def test_one_except_catches_everything_a_user_can_mend() -> None:
    members = [member for member in vars(errors).values() if isinstance(member, type)]
    apart = [member for member in members if not issubclass(member, errors.MedsslError)]
    assert apart == [errors.Terminated]


def test_a_signal_is_not_swallowed_by_except_exception() -> None:
    assert not issubclass(errors.Terminated, Exception)


def test_a_rejected_scan_keeps_its_reason() -> None:
    error = errors.RejectedScan("missing_slice", "slice gaps run from 2.50 to 5.00 mm")
    assert error.reason == "missing_slice"
    assert str(error) == "slice gaps run from 2.50 to 5.00 mm"


def test_a_rejected_scan_without_words_says_its_reason() -> None:
    assert str(errors.RejectedScan("localizer")) == "localizer"
