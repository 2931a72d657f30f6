from __future__ import annotations

import os
import sys

import pytest

from medssl.errors import MachineError
from medssl.executors import EXECUTORS
from medssl.executors._window import AHEAD
from medssl.executors.local import Config, LocalExecutor, available_cores, default_workers


def double(number):
    return 2 * number


def process_of(_):
    return os.getpid()


def fail(number):
    raise ValueError(f"item {number}")


class Awkward(Exception):  # noqa: N818
    """Cannot be rebuilt from its arguments."""

    def __init__(self, first, second):
        super().__init__("one argument")


def fail_awkwardly(_):
    raise Awkward(1, 2)


def give_a_function_without_name(_):
    return lambda: None


def threads_of(_):
    return os.environ["OMP_NUM_THREADS"]


def use_no_memory(_):
    raise MemoryError


def loss_of(item, loss):
    return item, loss


@pytest.fixture
def two():
    return LocalExecutor(Config(num_workers=2))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_results_come_in_the_order_of_the_items(num_workers):
    executor = LocalExecutor(Config(num_workers=num_workers))
    assert list(executor.map(double, range(40), chunk_size=3)) == list(range(0, 80, 2))


def test_zero_workers_mean_this_process():
    assert set(LocalExecutor(Config(num_workers=0)).map(process_of, range(3))) == {os.getpid()}


def test_no_number_of_workers_means_one_a_core():
    assert LocalExecutor().num_workers == min(16, available_cores())


def test_workers_are_other_processes(two):
    assert os.getpid() not in set(two.map(process_of, range(3)))


def test_large_items_and_results_pass(two):
    items = [bytes([number]) * 3_000_000 for number in range(12)]
    assert list(two.map(bytes.upper, items, chunk_size=2)) == [item.upper() for item in items]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_exception_reaches_the_caller(num_workers):
    with pytest.raises(ValueError, match="item 0"):
        list(LocalExecutor(Config(num_workers=num_workers)).map(fail, range(3)))


def test_exception_says_where_in_the_worker_it_was_raised(two):
    with pytest.raises(ValueError, match="item 0") as caught:
        list(two.map(fail, [0]))
    assert 'raise ValueError(f"item {number}")' in "".join(caught.value.__notes__)


def test_results_before_an_exception_are_given(two):
    results = two.map(int, ["1", "2", "x", "4"])
    assert [next(results), next(results)] == [1, 2]


def test_exception_that_cannot_be_sent_is_named(two):
    with pytest.raises(RuntimeError, match="a worker process raised Awkward, which cannot be sent"):
        list(two.map(fail_awkwardly, [0]))


def test_result_that_cannot_be_sent_is_an_exception(two):
    with pytest.raises(Exception, match="pickle"):
        list(two.map(give_a_function_without_name, [0]))


def test_function_that_a_worker_cannot_load_is_an_exception(two, monkeypatch):
    monkeypatch.setattr(double, "__module__", "module_of_this_process")
    monkeypatch.setitem(sys.modules, "module_of_this_process", sys.modules[__name__])
    with pytest.raises(ModuleNotFoundError, match="module_of_this_process"):
        list(two.map(double, [0]))


def test_no_items_start_no_process(two, monkeypatch):
    monkeypatch.setattr("medssl.executors._crew.Crew._start", fail)
    assert list(two.map(fail, [])) == []


def test_stream_is_read_no_further_than_the_window(two):
    num_read = 0

    def stream():
        nonlocal num_read
        for number in range(10_000):
            num_read += 1
            yield number

    ahead = []
    for number in two.map(double, stream(), chunk_size=5):
        ahead.append(num_read - number // 2)
        if number >= 600:
            break
    assert max(ahead) <= AHEAD * 2 * 5


def test_worker_that_cannot_be_forked_is_reported(two, monkeypatch):
    def refuse(_):
        raise BlockingIOError

    monkeypatch.setattr("multiprocessing.context.ForkServerProcess.start", refuse)
    with pytest.raises(MachineError, match="worker processes cannot start"):
        list(two.map(double, [1]))


def test_libraries_of_workers_use_one_thread_each(two, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert list(two.map(threads_of, [0])) == ["1"]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_lack_of_memory_loses_the_item(num_workers):
    executor = LocalExecutor(Config(num_workers=num_workers))
    assert list(executor.map(use_no_memory, [7], lost=loss_of)) == [(7, "out_of_memory")]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_lack_of_memory_without_a_substitute_is_reported(num_workers):
    executor = LocalExecutor(Config(num_workers=num_workers))
    with pytest.raises(MachineError, match="needed more memory than it is allowed"):
        list(executor.map(use_no_memory, [7]))


def test_there_is_a_worker_a_core_and_at_most_sixteen():
    assert 1 <= default_workers() <= min(16, available_cores())


def test_registry_builds_the_local_executor():
    assert isinstance(EXECUTORS.build(Config(num_workers=1)), LocalExecutor)
