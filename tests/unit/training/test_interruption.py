"""Signals and time limits: why a training stops, by hand and under torchrun."""

from __future__ import annotations

import os
import signal

import pytest

from medssl.errors import Terminated
from medssl.training.interruption import Interruption, Stop, TimeUp


def test_signals_and_time_say_why():
    clock = iter([0.0, 30.0, 61.0, 62.0])
    with Interruption(1.0, clock=lambda: next(clock)) as interruption:
        assert interruption.wanted is Stop.NO
        assert interruption.wanted is Stop.TIME_UP
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.wanted is Stop.TERMINATED


def test_a_signal_of_any_process_outweighs_a_time_limit_of_another():
    assert max(Stop.TIME_UP, Stop.NO, Stop.TERMINATED) is Stop.TERMINATED


@pytest.mark.parametrize(
    ("why", "kind", "is_planned"),
    [
        (Stop.TIME_UP, TimeUp, True),
        (Stop.TERMINATED, Terminated, False),
        (Stop.INTERRUPTED, KeyboardInterrupt, None),
    ],
)
def test_each_reason_has_its_error(why: Stop, kind: type[BaseException], is_planned: bool | None):
    error = Interruption(5.0).error(why)
    assert type(error) is kind
    assert getattr(error, "is_planned", None) is is_planned


def test_by_hand_a_second_signal_is_not_held_back():
    before = signal.getsignal(signal.SIGINT)
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.wanted is Stop.INTERRUPTED
        assert signal.getsignal(signal.SIGINT) == before


def test_under_torchrun_a_second_signal_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            assert interruption.wanted is Stop.TERMINATED
        os.kill(os.getpid(), signal.SIGTERM)  # while the run is closed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
