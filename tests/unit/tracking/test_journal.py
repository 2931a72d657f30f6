from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl.errors import MachineError
from medssl.tracking.journal import (
    JOURNAL_NAME,
    RESERVE_BYTES,
    FolderLock,
    Journal,
    read_journal,
)


def kinds(folder: Path) -> list[str]:
    return [record["kind"] for record, _ in read_journal(folder / JOURNAL_NAME)]


def test_what_is_appended_can_be_read_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append("start", "study", parent=None, resumed=False)
    journal.append("metrics", "study", step=3, values={"loss": 0.5})
    journal.close()
    records = [record for record, _ in read_journal(tmp_path / JOURNAL_NAME)]
    assert [record["kind"] for record in records] == ["journal", "start", "metrics"]
    assert [record["seq"] for record in records] == [0, 1, 2]
    assert records[2]["values"] == {"loss": 0.5}


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(1, 200))
def test_a_torn_last_line_is_dropped_and_writing_goes_on(tmp_path_factory, cut: int) -> None:
    folder = tmp_path_factory.mktemp("run")
    journal = Journal(folder)
    for step in range(3):
        journal.append("metrics", "study", step=step, values={"loss": 0.5})
    journal.close()
    path = folder / JOURNAL_NAME
    whole = path.read_bytes()
    os.truncate(path, len(whole) - cut)
    lines = path.read_bytes().count(b"\n")
    journal = Journal(folder)
    journal.append("end", "study", status="FINISHED")
    journal.close()
    for line in path.read_bytes().splitlines():
        json.loads(line)
    assert len(kinds(folder)) == lines + 1
    assert kinds(folder)[-1] == "end"


def test_a_damaged_line_in_the_middle_hides_nothing_after_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.close()
    with (tmp_path / JOURNAL_NAME).open("ab") as file:
        file.write(b"\x00\x00 not json\n[1, 2]\n")
    journal = Journal(tmp_path)
    journal.append("start", "study")
    journal.close()
    assert kinds(tmp_path) == ["journal", "start"]


def test_values_that_are_not_finite_are_written_as_words(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    values = {"a": float("nan"), "b": float("-inf")}
    journal.append("metrics", "study", step=0, values=values)
    journal.close()
    *_, (record, _) = read_journal(tmp_path / JOURNAL_NAME)
    assert record["values"] == {"a": "nan", "b": "-inf"}


def test_a_second_process_on_the_same_folder_is_told_so(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    child = os.fork()
    if child == 0:
        try:
            FolderLock(tmp_path)
        except MachineError as error:
            os._exit(0 if "another medssl process is using it" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    lock.release()
    FolderLock(tmp_path).release()


def test_a_full_disk_leaves_whole_lines_only(tmp_path: Path, monkeypatch) -> None:
    journal = Journal(tmp_path)
    real_write, calls = os.write, []

    def half_then_full(handle: int, data: bytes) -> int:
        calls.append(data)
        if len(calls) == 1:
            return real_write(handle, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", half_then_full)
    with pytest.raises(
        MachineError, match=r"no space left on the disk while writing journal.jsonl"
    ):
        journal.append("start", "study")
    monkeypatch.undo()
    journal.append("start", "study")
    journal.close()
    assert kinds(tmp_path) == ["journal", "start"]


def test_a_full_disk_still_takes_the_end_of_a_run(tmp_path: Path, monkeypatch) -> None:
    lock = FolderLock(tmp_path)
    reserve = tmp_path / ".journal.lock"
    assert reserve.stat().st_blocks * 512 >= RESERVE_BYTES
    journal = Journal(tmp_path)
    journal.append("start", "study")
    real_write = os.write

    def full_until_the_reserve_is_given_back(handle: int, data: bytes) -> int:
        if reserve.stat().st_size:
            raise OSError(28, "No space left on device")
        return real_write(handle, data)

    monkeypatch.setattr(os, "write", full_until_the_reserve_is_given_back)
    with pytest.raises(MachineError, match="no space left on the disk"):
        journal.append("metrics", "study", step=0, values={"loss": 1.0})
    journal.append("end", "study", status="FAILED")
    journal.close()
    lock.release()
    assert kinds(tmp_path) == ["journal", "start", "end"]
    FolderLock(tmp_path).release()
    assert reserve.stat().st_size == RESERVE_BYTES


def test_runs_that_were_left_open_end_as_killed_when_they_were_last_heard_of(
    tmp_path: Path,
) -> None:
    journal = Journal(tmp_path)
    for run in ("study", "cell/a", "cell/b"):
        journal.append("start", run)
    journal.append("end", "cell/a", status="FINISHED")
    journal.close()
    heard = {record["run"]: record["time"] for record, _ in read_journal(journal.path)}
    again = Journal(tmp_path)
    again.end_abandoned()
    again.end_abandoned()  # once is enough
    again.close()
    ends = [record for record, _ in read_journal(journal.path) if record["kind"] == "end"]
    assert [(end["run"], end["status"], end.get("error"), end.get("ended")) for end in ends] == [
        ("cell/a", "FINISHED", None, None),
        ("study", "KILLED", "no word", heard["study"]),
        ("cell/b", "KILLED", "no word", heard["cell/b"]),
    ]
