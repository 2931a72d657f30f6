"""A file is the old one or the new one, whatever happens in between."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from medssl.atomic import atomic_write, disk_errors
from medssl.errors import MachineError


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("this machine has no mount command, so no small disk can be made")
    if mounted.returncode != 0:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_bytes_and_text_are_written_as_given(tmp_path: Path) -> None:
    atomic_write(tmp_path / "bytes", b"\x00\xff")
    atomic_write(tmp_path / "text", "größer")
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff"
    assert (tmp_path / "text").read_text(encoding="utf-8") == "größer"


def test_folders_above_are_made(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a" / "b" / "file", "x")
    assert (tmp_path / "a" / "b" / "file").read_text() == "x"


def test_a_function_may_write_the_file(tmp_path: Path) -> None:
    atomic_write(tmp_path / "table.csv", lambda path: path.write_text("a,b\n"))
    assert (tmp_path / "table.csv").read_text() == "a,b\n"


def test_a_librarys_own_error_on_a_full_disk_is_a_full_disk(small_disk: Path) -> None:
    def fail(path: Path) -> None:
        path.write_bytes(b"x" * 50_000)
        raise RuntimeError("unexpected pos 64 vs 0")  # what torch.save says

    with pytest.raises(MachineError, match="no space left on the disk while writing state.pt"):
        atomic_write(small_disk / "state.pt", fail)
    assert list(small_disk.iterdir()) == []


def test_a_file_in_the_place_of_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("mine")
    with pytest.raises(MachineError, match="a file stands where a folder is needed"):
        atomic_write(tmp_path / "runs" / "config.yaml", "x")


def test_a_function_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "results.csv"
    target.write_text("old")

    def fail(path: Path) -> None:
        path.write_text("half of the new")
        raise ValueError("the table is not ready")

    with pytest.raises(ValueError, match="the table is not ready"):
        atomic_write(target, fail)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_reader_of_the_old_file_goes_on_reading_it(tmp_path: Path) -> None:
    target = tmp_path / "file"
    atomic_write(target, "old")
    with target.open() as reader:
        atomic_write(target, "new")
        assert reader.read() == "old"
    assert target.read_text() == "new"


def test_permissions_are_those_asked_for(tmp_path: Path) -> None:
    atomic_write(tmp_path / "salt", "secret", mode=0o600)
    atomic_write(tmp_path / "table", "open")
    assert stat.S_IMODE((tmp_path / "salt").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "table").stat().st_mode) == 0o644


def test_a_full_disk_keeps_the_old_file_and_says_what_to_do(small_disk: Path) -> None:
    target = small_disk / "store.b2nd"
    atomic_write(target, b"old")
    with pytest.raises(MachineError) as caught:
        atomic_write(target, bytes(200_000))
    assert str(caught.value) == (
        "no space left on the disk while writing store.b2nd. "
        "Free some space and start the same command again: it resumes."
    )
    assert target.read_bytes() == b"old"
    assert list(small_disk.iterdir()) == [target]


def test_a_full_disk_is_noticed_when_a_function_writes(small_disk: Path) -> None:
    with pytest.raises(MachineError, match="no space left on the disk while writing table"):
        atomic_write(small_disk / "table", lambda path: path.write_bytes(bytes(200_000)))
    assert list(small_disk.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into any folder")
def test_a_folder_that_may_not_be_written_is_named_as_the_cause(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(MachineError, match="results.csv cannot be written"):
        atomic_write(tmp_path / "results.csv", "x")


@pytest.mark.parametrize("code", ["EACCES", "EPERM", "EROFS"])
def test_missing_rights_are_told_apart_from_a_full_disk(code: str) -> None:
    import errno

    with (
        pytest.raises(MachineError) as caught,
        disk_errors(Path("/secret/patient/results.csv")),
    ):
        raise OSError(getattr(errno, code), "refused", "/secret/patient/results.csv")
    assert str(caught.value) == (
        "results.csv cannot be written: the folder is read-only for this user. "
        "Choose another --out or change its permissions."
    )
    assert "patient" not in str(caught.value)


def test_other_failures_pass_through_unchanged() -> None:
    with pytest.raises(IsADirectoryError), disk_errors(Path("x")):
        raise IsADirectoryError("x")
