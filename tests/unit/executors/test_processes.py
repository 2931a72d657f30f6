"""Workers beside a program of their own: what they print, and how long they live."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import ctypes, os, sys, time, warnings
from pathlib import Path
from medssl.executors.base import Guard
from medssl.executors.local import Config, LocalExecutor

def hang(path):
    Path(path).write_text(str(os.getpid()))
    if path.endswith("0"):
        ctypes.PyDLL(None).sleep(60)  # holds the interpreter: no Python code can run
    time.sleep(60)

def speak(number):
    print("DOE^JOHN")
    print("DOE^JOHN", file=sys.stderr)
    warnings.warn("DOE^JOHN")
    os.write(2, b"DOE^JOHN")
    if number == 2:
        sys.stderr.write("DOE^JOHN")
        ctypes.string_at(0)
    return number

def threads(_):
    return os.getppid(), len(os.listdir(f"/proc/{os.getppid()}/task"))

def first_pid(_):
    return os.getpid()

if __name__ == "__main__":
    executor = LocalExecutor(Config(num_workers=2))
"""


def program(tmp_path, body):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM + "".join(f"    {line}\n" for line in body.splitlines()))
    return [sys.executable, "-X", "faulthandler", str(script)]


def wait_until(condition, seconds=15.0):
    limit = time.monotonic() + seconds
    while not condition() and time.monotonic() < limit:
        time.sleep(0.02)
    return condition()


def has_ended(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_workers_end_with_their_parent(tmp_path, stop):
    files = [tmp_path / "0", tmp_path / "1"]
    command = program(tmp_path, f"list(executor.map(hang, {[str(file) for file in files]}))")
    with subprocess.Popen(command, stderr=subprocess.PIPE) as parent:
        assert wait_until(lambda: all(file.exists() and file.read_text() for file in files))
        pids = [int(file.read_text()) for file in files]
        parent.send_signal(stop)
        assert wait_until(lambda: all(map(has_ended, pids)), seconds=5)
        parent.communicate(timeout=10)


def test_ctrl_c_of_a_terminal_shows_the_parents_traceback_only(tmp_path):
    files = [tmp_path / "0", tmp_path / "1"]
    command = program(tmp_path, f"list(executor.map(hang, {[str(file) for file in files]}))")
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        assert wait_until(lambda: all(file.exists() and file.read_text() for file in files))
        os.killpg(parent.pid, signal.SIGINT)  # a terminal sends it to the whole group
        _, errors = parent.communicate(timeout=10)
    assert errors.count("Traceback") == 1
    assert all(has_ended(int(file.read_text())) for file in files)


def test_workers_print_nothing(tmp_path):
    body = "print(list(executor.map(speak, range(4), lost=lambda item, loss: loss)))"
    done = subprocess.run(program(tmp_path, body), capture_output=True, text=True, check=True)
    assert done.stdout == "[0, 1, 'died', 3]\n"
    assert done.stderr == ""


def test_server_of_workers_holds_one_thread(tmp_path):
    body = "import pandas\nprint(list(executor.map(threads, [0]))[0][1])"
    done = subprocess.run(program(tmp_path, body), capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_second_pool_starts_at_once(tmp_path):
    body = (
        "list(executor.map(first_pid, [0]))\n"
        "start = time.perf_counter()\n"
        "list(executor.map(first_pid, [0]))\n"
        "print(time.perf_counter() - start)"
    )
    done = subprocess.run(program(tmp_path, body), capture_output=True, text=True, check=True)
    assert float(done.stdout) < 2.0  # 0.03 on an idle machine, of which most is this program


def test_abandoned_map_leaves_no_worker(tmp_path):
    body = (
        "results = executor.map(first_pid, range(100))\n"
        "pids = {next(results) for _ in range(20)}\n"
        "results.close()\n"
        "print([Path(f'/proc/{pid}').exists() for pid in pids])"
    )
    done = subprocess.run(program(tmp_path, body), capture_output=True, text=True, check=True)
    assert "True" not in done.stdout


UNGUARDED = """
from medssl.executors.local import Config, LocalExecutor
print("top")
def own(number):
    return abs(number)
print(list(LocalExecutor(Config(num_workers=1)).map({}, [-1])))
print(__file__, __spec__)
"""


def test_workers_do_not_run_an_unguarded_script_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED.format("abs"))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["top", "[1]", f"{script} None"], done.stderr


def test_an_unguarded_script_whose_function_they_run_is_told_what_to_do(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED.format("own"))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "put the call under `if __name__ == '__main__':`" in done.stderr
