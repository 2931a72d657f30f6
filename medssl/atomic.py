"""Atomic files: a reader sees the old content or the new, never a part."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from medssl.errors import MachineError, MedsslError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_FULL_BYTES = 1 << 20
"""With less than this free, a library's failure to write is put down to the full disk."""


def atomic_write(
    path: Path, content: bytes | str | Callable[[Path], object], mode: int = 0o644
) -> None:
    """Write a file by way of a temporary one in the same folder, fsync, and rename.

    Args:
        path: the file to write or replace.
        content: the bytes or UTF-8 text, or a function that writes the temporary path it is given.
        mode: permissions of the new file.

    Raises:
        MachineError: the disk is full, read-only or not writable; nothing has changed.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        temporary = Path(name)
        try:
            os.close(handle)
            if callable(content):
                _write_with(content, temporary)
            else:
                temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            temporary.chmod(mode)
            _sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(path.parent)


def move_into_place(draft: Path, path: Path) -> None:
    """Rename a written file within its folder, so that the new name survives a power cut.

    Raises:
        MachineError: the folder cannot be written; nothing has changed.
    """
    with disk_errors(path):
        draft.replace(path)
        _sync(path.parent)


def _write_with(content: Callable[[Path], object], temporary: Path) -> None:
    """Let a library write; some (torch.save) report a full disk as an error of their own."""
    try:
        content(temporary)
    except (OSError, MedsslError):
        raise
    except Exception as error:
        if shutil.disk_usage(temporary.parent).free < _FULL_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the disk's own failures into a message that says what to do.

    Raises:
        MachineError: no space is left, or the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise MachineError(
                f"no space left on the disk while writing {path.name}. "
                "Free some space and start the same command again: it resumes."
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise MachineError(
                f"{path.name} cannot be written: the folder is read-only for this user. "
                "Choose another --out or change its permissions."
            ) from None
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise MachineError(
                f"{path.name} cannot be written: a file stands where a folder is needed. "
                "Choose another --out, or move that file."
            ) from None
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
