"""Commands about config files: check, show, schema."""

from __future__ import annotations

from pathlib import Path

import click

from medssl.cli import completion
from medssl.cli.options import (
    JSON,
    OVERRIDES,
    PATH,
    Command,
    Group,
    out,
)
from medssl.cli.output import print_facts, print_json
from medssl.errors import ConfigError


@click.group(cls=Group)
def config() -> None:
    """Configuration files: check, show, schema."""


@config.command(
    "check",
    cls=Command,
    examples=[
        "medssl config check configs/studies/demo.yaml",
        "medssl config check configs/studies/demo.yaml seed=1 --json",
    ],
    codes=(0, 2),
)
@click.argument("file", type=PATH, shell_complete=completion.config_files)
@OVERRIDES
@JSON
def config_check(file: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Say whether a config file is right, and what kind it is.

    All mistakes are told at once, each with its place in the file and the nearest right name. The
    scans themselves are not looked at: the --dry-run of the command does that.
    """
    from medssl.pipelines.kinds import load_any

    kind, loaded = load_any(file, overrides)
    print_facts({"kind": kind, "digest": loaded.digest()}, as_json)


@config.command(
    "show",
    cls=Command,
    examples=[
        "medssl config show configs/studies/demo.yaml",
        "medssl config show configs/studies/demo.yaml pretrain.training.steps=5000 --json",
    ],
    codes=(0, 2),
)
@click.argument("file", type=PATH, shell_complete=completion.config_files)
@OVERRIDES
@JSON
def config_show(file: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print a config file with every default filled in."""
    from medssl.pipelines.kinds import load_any

    loaded = load_any(file, overrides)[1]
    if as_json:
        print_json(loaded.model_dump(mode="json"))
    else:
        click.echo(loaded.to_yaml(), nl=False)


@config.command(
    "schema",
    cls=Command,
    examples=[
        "medssl config schema study",
        "medssl config schema --out configs/schema",
    ],
    writes="One <kind>.json for each kind, where --out says so.",
    codes=(0, 2, 4),
)
@click.argument("kind", required=False, shell_complete=completion.config_kinds)
@out("Folder to write one <kind>.json each into.")
@JSON
def config_schema(kind: str | None, out: Path | None, as_json: bool) -> None:
    """Print the JSON Schema of one kind of config, or write all of them.

    Editors that know JSON Schema complete and check configs with it.
    """
    from medssl.pipelines.kinds import KINDS, schema, write_schemas

    if out is not None:
        write_schemas(out)
        if as_json:
            print_json({"written": [str(out / f"{kind}.json") for kind in KINDS]})
    elif kind is None:
        raise ConfigError("name a kind (index, prepare, pretrain, transfer, study), or give --out.")
    else:
        print_json(schema(kind))
