"""The Ray executor on a real local cluster of two workers."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import threading
import time

import numpy as np
import psutil
import pytest

from medssl.errors import MachineError
from medssl.executors._window import AHEAD
from medssl.executors.base import Guard
from medssl.executors.local import Config as LocalConfig
from medssl.executors.local import LocalExecutor
from medssl.executors.ray import Config, RayExecutor

ray = pytest.importorskip("ray")


def double(number):
    return 2 * number


def fail(number):
    raise ValueError(f"item {number}")


def misbehave(number):
    if number == 3:
        ctypes.string_at(0)
    if number == 5:
        ctypes.PyDLL(None).sleep(60)
    if number == 7:
        return len(np.ones(4_000_000_000, dtype=np.uint8))
    return number


def note(job):
    folder, number = job
    (folder / f"{number}-{os.getpid()}").write_text(str(psutil.Process(os.getppid()).ppid()))
    time.sleep(0.3)
    return number


def speak(number):
    print("DOE^JOHN")
    os.write(2, b"DOE^JOHN")
    return number


def loss_of(item, loss):
    return loss


@pytest.fixture(scope="module")
def cluster():
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    before = signal.getsignal(signal.SIGTERM)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    signal.signal(signal.SIGTERM, before)
    yield
    ray.shutdown()


@pytest.fixture
def executor(cluster):
    return RayExecutor(Config(num_workers=2))


def test_results_and_order_are_those_of_local_processes(executor):
    local = LocalExecutor(LocalConfig(num_workers=2))
    found = list(executor.map(double, range(100), chunk_size=3))
    assert found == list(local.map(double, range(100), chunk_size=3))


@pytest.mark.slow
def test_losses_are_those_of_local_processes(executor):
    local = LocalExecutor(LocalConfig(num_workers=2))
    guard = Guard(seconds=1, megabytes=300)
    found = list(executor.map(misbehave, range(9), lost=loss_of, guard=guard, chunk_size=2))
    assert found == [0, 1, 2, "died", 4, "too_slow", 6, "out_of_memory", 8]
    assert found == list(local.map(misbehave, range(9), lost=loss_of, guard=guard, chunk_size=2))


def test_exception_reaches_the_caller(executor):
    with pytest.raises(ValueError, match="item 0"):
        list(executor.map(fail, range(3)))


def test_stream_is_read_no_further_than_the_window(executor):
    num_read = 0

    def stream():
        nonlocal num_read
        for number in range(10_000):
            num_read += 1
            yield number

    ahead = []
    for number in executor.map(double, stream(), chunk_size=5):
        ahead.append(num_read - number // 2)
        if number >= 600:
            break
    assert max(ahead) <= AHEAD * 2 * 5


def test_ray_worker_killed_in_the_middle_loses_nothing(executor, tmp_path):
    killed = []

    def kill_one():
        while not (notes := list(tmp_path.iterdir())) or not notes[0].read_text():
            time.sleep(0.02)
        killed.append(int(notes[0].read_text()))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    found = list(executor.map(note, [(tmp_path, number) for number in range(12)], chunk_size=2))
    killer.join()
    assert found == list(range(12))
    assert len(killed) == 1


def test_guarded_process_ends_with_its_ray_worker(executor, tmp_path):
    list(executor.map(note, [(tmp_path, 0)]))
    (pid,) = (int(path.name.partition("-")[2]) for path in tmp_path.iterdir())
    limit = time.monotonic() + 10
    while psutil.pid_exists(pid) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not psutil.pid_exists(pid)


def test_cluster_with_another_version_is_refused(executor, monkeypatch):
    monkeypatch.setattr("medssl.executors._fleet.__version__", "0.0.0")
    with pytest.raises(MachineError, match="Install the same version on every machine"):
        list(executor.map(double, [1]))


def test_cluster_without_free_cpus_is_reported(cluster, monkeypatch):
    monkeypatch.setattr("medssl.executors._fleet._START_SECONDS", 1.0)
    with pytest.raises(MachineError, match="none of its CPUs became free"):
        list(RayExecutor(Config(num_workers=1, num_cpus=64)).map(double, [1]))


def test_connection_of_the_program_is_left_open(executor):
    list(executor.map(double, [1]))
    assert ray.is_initialized()


@pytest.mark.slow
def test_cluster_of_its_own_is_silent_and_ended(tmp_path, capfd):
    if ray.is_initialized():
        ray.shutdown()
    before = signal.getsignal(signal.SIGTERM)
    found = list(RayExecutor(Config(num_workers=2)).map(speak, range(4)))
    assert found == [0, 1, 2, 3]
    assert not ray.is_initialized()
    assert signal.getsignal(signal.SIGTERM) is before
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err == ""


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:{port}", "ray://127.0.0.1:{port}"])
def test_address_without_a_cluster_is_reported_at_once(address):
    if ray.is_initialized():
        ray.shutdown()
    with socket.socket() as probe:  # bound, and nobody listens
        probe.bind(("127.0.0.1", 0))
        address = address.format(port=probe.getsockname()[1])
        with pytest.raises(MachineError, match="no Ray cluster of this version answers at"):
            list(RayExecutor(Config(address=address)).map(double, [1]))
