"""Arguments and options that several commands share, and the class of all commands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from medssl.cli import completion

EXIT_CODES = {
    0: "done",
    1: "an error nobody foresaw",
    2: "a wrong command line or config",
    3: "data: scans, labels, weights or tables are missing, unreadable or contradict each other",
    4: "the machine: no space, no network, no such device, a folder that cannot be written",
    5: "training diverged",
    130: "interrupted by Ctrl-C; give the same command again to go on",
    143: "ended by SIGTERM or a time limit; give the same command again to go on",
}
"""What the number means that a command ends with."""

COMMON_CODES = (0, 2, 3)
TRAINING_CODES = (0, 2, 3, 4, 5, 130, 143)
WORKING_CODES = (0, 2, 3, 4, 130, 143)


class Command(click.Command):
    """A command whose help goes on with examples, what it writes, and its exit codes.

    Args:
        examples: command lines that run as they stand, once their files are there.
        writes: files and folders, in a sentence or two; "" where it writes nothing.
        codes: the exit codes it may end with, of `EXIT_CODES`.
    """

    def __init__(
        self, *args: Any, examples: Sequence[str] = (), writes: str = "",
        codes: Sequence[int] = COMMON_CODES, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)
        self.writes = writes
        self.codes = tuple(codes)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections that follow the options."""
        write_examples(formatter, self.examples)
        with formatter.section("Writes"):
            formatter.write_text(self.writes or "Nothing.")
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), EXIT_CODES[code]) for code in self.codes])
        super().format_epilog(ctx, formatter)


class Group(click.Group):
    """A group of commands with examples."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections that follow the list of commands."""
        write_examples(formatter, self.examples)
        super().format_epilog(ctx, formatter)


def write_examples(formatter: click.HelpFormatter, examples: Sequence[str]) -> None:
    """Write command lines as they are: one that was wrapped could not be copied."""
    if examples:
        with formatter.section("Examples"):
            for example in examples:
                for line in example.splitlines():
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")


PATH = click.Path(path_type=Path)
CONFIG = click.argument("config", type=PATH, shell_complete=completion.config_files)
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[key=value]...")
RUN = click.argument(
    "run", metavar="RUN_FOLDER", type=PATH, shell_complete=completion.run_folders
)  # fmt: skip
JSON = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as one JSON document, and only that."
)
RESUME = click.option(
    "--resume", is_flag=True, help="Insist that the run folder already holds this run."
)
DRY_RUN = click.option("--dry-run", is_flag=True, help="Print the plan and touch nothing.")


def out(help_text: str) -> Callable[[Any], Any]:
    """Return the option that says where results go."""
    return click.option("--out", type=PATH, help=help_text)
