"""Where the program starts, and where every error becomes a message and an exit code."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click

from medssl.cli.completion import PROGRAM, VARIABLE
from medssl.cli.group import cli
from medssl.errors import MachineError, MedsslError, Terminated
from medssl.training.launch import by_torchrun, first_to_end, launched, rank

_INTERRUPTED = 130
_GO_ON = "Give the same command again to go on."


def main() -> NoReturn:
    """Run the command line, and turn errors into messages and exit codes.

    Of several processes of torchrun the first alone shows progress and results, and the one that
    ends first says why.
    """
    signal.signal(signal.SIGTERM, _terminate)
    if launched():
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else each process warns
    try:
        with _silence(wanted=rank() > 0 and not _asked("--debug")):
            cli.main(prog_name=PROGRAM, complete_var=VARIABLE, standalone_mode=False)
    except click.ClickException as error:
        if first_to_end():
            error.show()
        _answer("UsageError", error.format_message(), error.exit_code)
        _end(error, error.exit_code)
    except (click.Abort, KeyboardInterrupt) as error:
        _fail(error, "Interrupted", f"Interrupted. {_GO_ON}", _INTERRUPTED, start="\n")
    except Terminated as stop:
        text = f"{str(stop) or 'Terminated.'} {_GO_ON}"
        # torchrun would start the processes of a training again that its time limit ended.
        code = 0 if by_torchrun() and stop.is_planned else stop.exit_code
        _fail(stop, "Terminated", text, code)
    except MedsslError as error:
        name = type(error).__name__.removeprefix("_")
        _fail(error, name, str(error), error.exit_code, start=f"{name}: ", fg="red")
    except Exception as error:  # noqa: BLE001  (whatever it is, people get a message)
        full = _is_full(error)
        code = MachineError.exit_code if full else MedsslError.exit_code
        name = "MachineError" if full else type(error).__name__
        _fail(error, name, _unforeseen(error), code, start="MachineError: " if full else "",
              fg="red")  # fmt: skip
    sys.exit(0)


def _asked(option: str) -> bool:
    """Return whether an option that holds for all commands was given."""
    words = sys.argv[1:]
    return option in (words[: words.index("--")] if "--" in words else words)


def _fail(
    error: BaseException, kind: str, message: str, code: int, *, start: str = "",
    fg: str | None = None,
) -> NoReturn:  # fmt: skip
    """Say why the command ends, on stderr and, with --json, as its document; then end."""
    if not (_asked("--debug") and isinstance(error, Exception)):
        _tell(start + message, fg)
    _answer(kind, message, code)
    _end(error, code)


def _answer(kind: str, message: str, code: int) -> None:
    """Print an error as the one JSON document of a command that was asked for one."""
    if code and _asked("--json") and first_to_end():
        import json

        document = {"error": {"kind": kind, "message": message, "exit_code": code}}
        with contextlib.suppress(OSError):  # nobody reads it, or the disk is full
            click.echo(json.dumps(document, indent=2))


def _end(error: BaseException, code: int) -> NoReturn:
    if _asked("--debug") and not isinstance(error, click.Abort | KeyboardInterrupt | Terminated):
        import traceback

        traceback.print_exception(error)
    sys.exit(code)


@contextlib.contextmanager
def _silence(*, wanted: bool) -> Iterator[None]:
    """Drop what is printed and warned of inside the block, if wanted."""
    if not wanted:
        yield
        return
    with (
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _tell(message: str, fg: str | None = None) -> None:
    """Print why the command ends, once for all processes."""
    if first_to_end():
        click.secho(message, fg=fg, err=True)


def _is_full(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _unforeseen(error: Exception) -> str:
    """Describe an error of a library; its own text may name a file or a person, so it is kept."""
    if _is_full(error):
        return (
            "no space left on the disk. "
            "Free some space and start the same command again: it resumes."
        )
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "medssl" in Path(frame.filename).parts] or frames
    where = f"{Path(own[-1].filename).name}, line {own[-1].lineno}"
    return (
        f"Unforeseen {type(error).__name__} in {where}: a fault of medssl, or a case it does not "
        "know. The same command with --debug shows the whole of it; please report it."
    )


def _terminate(_: int, __: FrameType | None) -> NoReturn:
    if by_torchrun():  # which sends the signal once more, and would disturb what is being ended
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated
