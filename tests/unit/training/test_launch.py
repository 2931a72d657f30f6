"""What torchrun's variables say, and that of several processes one says why they end."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from torch.distributed import TCPStore

from medssl.training import launch

VARIABLES = (
    "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _started_by_hand(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    launch.first_to_end.cache_clear()
    yield
    launch.first_to_end.cache_clear()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """Start the store that torchrun keeps, and the variables that lead to it."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return server


def in_another_process() -> bool:
    launch.first_to_end.cache_clear()
    return launch.first_to_end()


def test_a_process_started_by_hand_is_alone_and_speaks():
    assert not launch.launched()
    assert not launch.by_torchrun()
    assert launch.rank() == 0
    assert launch.first_to_end()


def test_torchrun_says_who_is_who(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert launch.launched()
    assert launch.by_torchrun()
    assert launch.rank() == 3


def test_the_first_to_end_speaks_whoever_it_is_and_nobody_else(store: TCPStore):
    assert launch.first_to_end()
    assert launch.first_to_end()  # asked again by the same process
    assert not in_another_process()


def test_after_a_restart_one_speaks_again(store: TCPStore, monkeypatch: pytest.MonkeyPatch):
    assert launch.first_to_end()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert in_another_process()
    assert not in_another_process()


def test_without_the_store_of_torchrun_the_leader_speaks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert not launch.first_to_end()
    monkeypatch.setenv("RANK", "0")
    assert in_another_process()


def test_where_torchrun_is_gone_all_speak(store: TCPStore, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MASTER_PORT", "1")  # where nobody listens
    monkeypatch.setattr(launch, "_STORE_PATIENCE", launch.timedelta(seconds=1))
    assert launch.first_to_end()
    assert in_another_process()


def test_a_process_that_ends_hears_sigterm_no_more_but_by_hand(monkeypatch: pytest.MonkeyPatch):
    before = signal.getsignal(signal.SIGTERM)
    try:
        launch.ignore_termination()
        assert signal.getsignal(signal.SIGTERM) == before
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        launch.ignore_termination()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
