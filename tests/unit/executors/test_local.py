from __future__ import annotations

import os
import subprocess
import sys

import pytest

from medssl.errors import MachineError
from medssl.executors import EXECUTORS
from medssl.executors.local import Config, LocalExecutor, auto_workers


def double(number):
    return 2 * number


def process_of(_):
    return os.getpid()


def fail(number):
    raise ValueError(f"item {number}")


def die_on_three(number):
    if number == 3:
        os._exit(1)
    return number


def lost(number):
    return -number


@pytest.mark.parametrize("num_workers", [0, 2])
def test_results_come_in_the_order_of_the_items(num_workers):
    executor = LocalExecutor(Config(num_workers=num_workers))
    assert list(executor.map(double, range(40), chunk_size=3)) == list(range(0, 80, 2))


def test_no_workers_means_this_process():
    assert set(LocalExecutor().map(process_of, range(3))) == {os.getpid()}


def test_workers_are_other_processes():
    found = set(LocalExecutor(Config(num_workers=1)).map(process_of, range(3)))
    assert os.getpid() not in found


@pytest.mark.parametrize("num_workers", [0, 1])
def test_exception_reaches_the_caller(num_workers):
    with pytest.raises(ValueError, match="item 0"):
        list(LocalExecutor(Config(num_workers=num_workers)).map(fail, range(3)))


def test_dying_worker_costs_one_item_only():
    executor = LocalExecutor(Config(num_workers=1))
    found = list(executor.map(die_on_three, range(6), lost=lost, chunk_size=2))
    assert found == [0, 1, 2, -3, 4, 5]


def test_dying_worker_without_a_remedy_is_reported():
    executor = LocalExecutor(Config(num_workers=1))
    with pytest.raises(MachineError, match="a worker process died, most often for lack of memory"):
        list(executor.map(die_on_three, [3], chunk_size=1))


def test_no_items_start_no_process():
    assert list(LocalExecutor(Config(num_workers=2)).map(fail, [])) == []


def test_few_items_are_not_worth_workers():
    assert auto_workers(10, worthwhile=400) == 0


def test_unguarded_script_is_told_what_to_do(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from medssl.executors.local import Config, LocalExecutor\n"
        "print(list(LocalExecutor(Config(num_workers=1)).map(abs, [-1])))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "put the call under `if __name__ == '__main__':`" in done.stderr


def test_registry_builds_the_local_executor():
    assert isinstance(EXECUTORS.build(Config(num_workers=1)), LocalExecutor)
