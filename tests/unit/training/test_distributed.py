"""How processes agree and wait for each other; one stands for two, with a group of its own.

Two real ones are in tests/integration/test_distributed.py.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch import distributed

from medssl.errors import AbandonedError, DataError, MachineError
from medssl.training import launch
from medssl.training.distributed import Ranks, Vote, common_name, peers_needed


@pytest.fixture(autouse=True)
def _group() -> Iterator[None]:
    """Form a group of this process alone."""
    launch.first_to_end.cache_clear()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()
    launch.first_to_end.cache_clear()


LEADER, OTHER = Ranks(0, 2), Ranks(1, 2)


def test_a_vote_is_known_a_step_later_and_stays():
    vote = Vote(LEADER)
    assert [vote.highest(value) for value in (0, 2, 0, 0)] == [0, 0, 2, 2]


def test_a_process_that_is_alone_hears_its_vote_at_once():
    assert [Vote(Ranks()).highest(value) for value in (0, 2)] == [0, 2]


def test_the_others_do_what_the_leader_did_first():
    done: list[str] = []
    assert LEADER.leader_first("prepare", lambda: done.append("leader") or "store") == "store"
    assert OTHER.leader_first("prepare", lambda: done.append("other") or "store") == "store"
    assert done == ["leader", "other"]


def test_the_others_stop_where_the_leader_failed():
    def fail() -> None:
        raise DataError("3 scans cannot be read")

    with pytest.raises(DataError, match="3 scans cannot be read"):
        LEADER.leader_first("prepare", fail)
    with pytest.raises(AbandonedError, match="process 1 stops: process 0 failed at 'prepare'"):
        OTHER.leader_first("prepare", lambda: pytest.fail("it must not start"))


@pytest.mark.parametrize(
    "text",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer",
        "NCCL error in: NCCLUtils.cpp:37, remote process exited or there was a network error",
    ],
)
def test_a_lost_process_is_said_in_one_line(text: str):
    told = "another process of this training ended"
    with pytest.raises(AbandonedError, match=told) as lost, peers_needed():
        raise RuntimeError(text)
    assert isinstance(lost.value, MachineError)
    assert "\n" not in str(lost.value)
    assert "goes on from the last checkpoint" in str(lost.value)


def test_other_errors_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), peers_needed():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(DataError, match="a scan"), peers_needed():
        raise DataError("a scan")


def test_a_process_that_fails_by_itself_is_left_to_say_so(monkeypatch: pytest.MonkeyPatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    try:
        with pytest.raises(DataError), peers_needed():
            raise DataError("a scan")
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN  # torchrun would cut it short
    finally:
        signal.signal(signal.SIGTERM, before)
    assert launch.first_to_end.cache_info().currsize == 1  # claimed


def test_processes_that_start_together_agree_on_a_new_name_each_time():
    store = distributed.HashStore()
    names = []
    for size in (3, 3, 2):  # words of earlier starts stay in the store
        with ThreadPoolExecutor(size) as together:
            found = list(
                together.map(lambda rank, n=size: common_name(store, rank, n), range(size))
            )
        assert len(set(found)) == 1
        names += found[:1]
    assert len(set(names)) == 3
