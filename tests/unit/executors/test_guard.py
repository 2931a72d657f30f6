"""What one item can do to its worker, and what that costs."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from medssl.errors import MachineError
from medssl.executors.base import Guard
from medssl.executors.local import Config, LocalExecutor

QUICK = Guard(seconds=0.3)
SMALL = Guard(seconds=20, megabytes=300)


def exit_at_three(number):
    if number == 3:
        os._exit(1)
    return number


def be_killed_at_three(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def crash_at_three(number):
    if number == 3:
        ctypes.string_at(0)
    return number


def be_killed_once(marker):
    if marker is not None and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return marker is not None


def count_for_ever_at_three(number):
    while number == 3:
        pass
    return number


def catch_everything_at_three(number):
    while number == 3:
        try:
            time.sleep(60)
        except Exception:  # noqa: BLE001
            number = -1
    return number


def wait_in_c_at_three(number):
    if number == 3:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        ctypes.CDLL(None).pause()
    return number


def hold_the_interpreter_at_three(number):
    if number == 3:
        ctypes.PyDLL(None).sleep(60)
        ctypes.PyDLL(None).sleep(60)
    return number


def hog_at_three(number):
    if number == 3:
        return len(np.ones(4_000_000_000, dtype=np.uint8))
    return number


def hog_bit_by_bit_at_three(number):
    held = []
    while number == 3:
        held.append(bytes(10_000_000))
    return number


def use_200_megabytes(_):
    return int(np.ones(200_000_000, dtype=np.uint8)[-1])


def map_a_large_file(path):
    return int(np.memmap(path, dtype=np.uint8, mode="r")[-1])


def process_after(number):
    if number == 0:
        time.sleep(60)
    return os.getpid()


def loss_of(item, loss):
    return loss


def run(function, guard=None, num_workers=1, items=range(6), chunk_size=3):
    executor = LocalExecutor(Config(num_workers=num_workers))
    return list(executor.map(function, items, lost=loss_of, guard=guard, chunk_size=chunk_size))


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("function", [exit_at_three, be_killed_at_three, crash_at_three])
def test_dying_worker_costs_one_item_only(function, num_workers):
    assert run(function, num_workers=num_workers) == [0, 1, 2, "died", 4, 5]


def test_worker_killed_by_chance_costs_nothing(tmp_path):
    assert run(be_killed_once, items=[None, tmp_path / "killed", None]) == [False, True, False]


def test_results_computed_before_a_death_are_not_computed_again(tmp_path):
    assert run(note_and_die_at_three, items=[(tmp_path, number) for number in range(6)]) == [
        0, 1, 2, "died", 4, 5
    ]  # fmt: skip
    assert [len((tmp_path / str(n)).read_text()) for n in range(6)] == [1, 1, 1, 2, 1, 1]


def note_and_die_at_three(job):
    folder, number = job
    with (folder / str(number)).open("a") as notes:
        notes.write("x")
    return exit_at_three(number)


@pytest.mark.parametrize("function", [count_for_ever_at_three, catch_everything_at_three])
def test_endless_python_costs_one_item_only(function):
    assert run(function, QUICK) == [0, 1, 2, "too_slow", 4, 5]


def test_interrupted_worker_goes_on():
    first, *others = run(process_after, QUICK, items=range(4))
    assert first == "too_slow"
    assert len(set(others)) == 1


@pytest.mark.parametrize("function", [wait_in_c_at_three, hold_the_interpreter_at_three])
def test_endless_c_costs_one_item_only(function):
    assert run(function, QUICK) == [0, 1, 2, "too_slow", 4, 5]


def test_slow_caller_costs_no_item():
    executor = LocalExecutor(Config(num_workers=1))
    found = []
    for number in executor.map(abs, range(4), lost=loss_of, guard=Guard(seconds=0.1)):
        time.sleep(0.8)
        found.append(number)
    assert found == [0, 1, 2, 3]


@pytest.mark.parametrize("function", [hog_at_three, hog_bit_by_bit_at_three])
def test_memory_hog_costs_one_item_only(function):
    assert run(function, SMALL) == [0, 1, 2, "out_of_memory", 4, 5]


def test_memory_within_the_guard_is_given_every_time():
    assert run(use_200_megabytes, SMALL) == [1] * 6


def test_map_of_a_large_file_is_not_memory(tmp_path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(2_000_000_000)
    assert run(map_a_large_file, SMALL, items=[path]) == [0]


@pytest.mark.parametrize(
    ("function", "guard", "message"),
    [
        (exit_at_three, None, "a worker process died, most often for lack of memory"),
        (count_for_ever_at_three, QUICK, "one item took longer than the time it is allowed"),
        (hog_at_three, SMALL, "one item needed more memory than it is allowed"),
    ],
)
def test_loss_without_a_substitute_is_reported(function, guard, message):
    executor = LocalExecutor(Config(num_workers=1))
    with pytest.raises(MachineError, match=message):
        list(executor.map(function, [3], guard=guard))
