"""The program: its commands, in the order of the road, and what holds for all of them."""

from __future__ import annotations

import click

from medssl import __version__
from medssl.cli import (
    config_files,
    machine,
    new_study,
    public_data,
    puzzles,
    results,
    runs,
    scans,
    weight_files,
)
from medssl.cli.options import Group
from medssl.errors import ConfigError
from medssl.training.launch import by_torchrun, launched

_ANYWHERE = ("--debug", "--quiet")

_SECTIONS: dict[str, tuple[click.Command, ...]] = {
    "Start": (machine.doctor, new_study.init, public_data.datasets),
    "Run": (runs.study, runs.pretrain, runs.transfer, runs.slurm),
    "Scans": (scans.index, scans.audit, scans.inspect, scans.prepare),
    "Results": (
        results.report, results.compare, results.gallery, results.features, results.sync,
        results.export,
    ),
    "Parts": (config_files.config, machine.list_, puzzles.pretext, weight_files.weights),
    "Help": (machine.help_, machine.completion_),
}  # fmt: skip


class Program(Group):
    """Takes the options that hold for every command before the command's name, or behind it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Move them to the front."""
        end = args.index("--") if "--" in args else len(args)
        moved = [word for word in args[:end] if word in _ANYWHERE]
        rest = [word for word in args[:end] if word not in _ANYWHERE]
        return super().parse_args(ctx, [*moved, *rest, *args[end:]])

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands by what they are for."""
        width = max(map(len, self.commands))
        for title, commands in _SECTIONS.items():
            with formatter.section(title):
                rows = [
                    (f"{command.name:{width}}", command.get_short_help_str(limit=200))
                    for command in commands
                ]
                formatter.write_dl(rows)


@click.group(
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    examples=[
        "medssl init /archive/export --out ours.yaml",
        "medssl study ours.yaml --dry-run",
        "medssl study configs/studies/demo.yaml",
    ],
    epilog="--debug and --quiet may also stand behind the command. medssl help environment, "
    "exit-codes, json and searches (in MLflow) tell the rest.",
)
@click.version_option(__version__, prog_name="medssl")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@click.pass_context
def cli(context: click.Context, debug: bool, quiet: bool) -> None:
    """Does pretraining on our own unlabelled scans beat ImageNet weights for our task?

    By how much, and how many labels does it save? Point medssl at a folder of DICOM or NIfTI.
    A command that was interrupted goes on when it is given again.
    """
    context.obj = {"debug": debug, "quiet": quiet}
    if launched() and by_torchrun() and context.invoked_subcommand != "pretrain":
        raise ConfigError(
            f"torchrun started several processes of medssl {context.invoked_subcommand}, and only "
            "medssl pretrain shares its work among them. Start it without torchrun."
        )


def _add_all() -> None:
    for commands in _SECTIONS.values():
        for command in commands:
            cli.add_command(command)


_add_all()
