"""Commands about medssl and the machine: doctor, list, completion, help."""

from __future__ import annotations

from pathlib import Path

import click

from medssl.cli import completion, topics
from medssl.cli.options import (
    JSON,
    OVERRIDES,
    PATH,
    Command,
)
from medssl.cli.output import print_json
from medssl.errors import MachineError


@click.command(
    "list",
    cls=Command,
    examples=[
        "medssl list pretext",
        "medssl list backbones --json",
    ],
    codes=(0, 2),
)
@click.argument("kind", type=click.Choice(list(completion.REGISTRIES)))
@JSON
def list_(kind: str, as_json: bool) -> None:
    """List the components of a kind: the names that configs take.

    What the options of each are, medssl config schema tells.
    """
    names = completion.component_names(kind)
    if as_json:
        print_json(names)
    else:
        click.echo("\n".join(names))


@click.command(
    cls=Command,
    examples=[
        "medssl doctor",
        "medssl doctor --disk /tmp",
        "medssl doctor configs/studies/demo.yaml",
    ],
    writes="For a moment, a file of 64 MB on the disk that is measured.",
    codes=(0, 2, 4),
)
@click.argument("config", type=PATH, required=False, shell_complete=completion.config_files)
@OVERRIDES
@click.option(
    "--disk", type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Measure this folder's disk, with a file of 64 MB. Default: where temporary files go.",
)  # fmt: skip
@JSON
def doctor(
    config: Path | None, overrides: tuple[str, ...], disk: Path | None, as_json: bool
) -> None:
    """Say what this machine can do, and what to mend.

    Each line is fine (ok), worth knowing (note), or a problem that comes with what to do (MEND).
    With a config file, it also says whether the ImageNet weights that it starts from are here.
    """
    from medssl.pipelines.doctor import examine

    findings = examine(config, overrides, folder=disk)
    if as_json:
        print_json([vars(finding) for finding in findings])
    else:
        for finding in findings:
            mark = {"ok": "ok  ", "note": "note", "problem": "MEND"}[finding.level]
            click.echo(f"{mark}  {finding.subject}: {finding.text}")
    if any(finding.level == "problem" for finding in findings):
        raise SystemExit(MachineError.exit_code)


@click.command(
    "completion",
    cls=Command,
    examples=[
        "medssl completion bash > ~/.local/share/bash-completion/completions/medssl",
        "medssl completion zsh > ~/.zfunc/_medssl",
        "medssl completion fish > ~/.config/fish/completions/medssl.fish",
    ],
    codes=(0, 2),
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@JSON
def completion_(shell: str, as_json: bool) -> None:
    """Print the script that completes commands, options, names and files on the Tab key.

    Its first lines say where to put it. It offers commands and options, names of components, config
    files of this folder and of configs/, and run folders in runs/.
    """
    script = completion.script(shell)
    if as_json:
        print_json({"shell": shell, "script": script})
    else:
        click.echo(script, nl=False)


@click.command(
    "help",
    cls=Command,
    examples=["medssl help", "medssl help study", "medssl help environment"],
    codes=(0, 2),
)
@click.argument("topic", nargs=-1, metavar="[COMMAND|TOPIC]", shell_complete=topics.complete)
@JSON
@click.pass_context
def help_(context: click.Context, topic: tuple[str, ...], as_json: bool) -> None:
    """Show the help of a command, or a topic: environment, exit-codes, json."""
    text = topics.text_of(context.find_root(), topic)
    if as_json:
        print_json({"topic": " ".join(topic), "text": text})
    else:
        click.echo(text)
