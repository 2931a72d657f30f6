"""Commands about pretext tasks: preview, audit."""

from __future__ import annotations

from pathlib import Path

import click

from medssl.cli.options import (
    CONFIG,
    DRY_RUN,
    JSON,
    OVERRIDES,
    TRAINING_CODES,
    WORKING_CODES,
    Command,
    Group,
    out,
)
from medssl.cli.output import print_facts, show_progress


@click.group(cls=Group)
def pretext() -> None:
    """Pretext tasks: see their puzzles, and how far shortcuts solve them."""


@pretext.command(
    "preview",
    cls=Command,
    examples=[
        "medssl pretext preview configs/pretrain/rotation_3d.yaml pretext.turns=axes",
    ],
    writes=(
        "One PNG for each task in runs/preview/<name of the config>, or where --out says. "
        "They show pixels of patients."
    ),
    codes=WORKING_CODES,
)
@CONFIG
@OVERRIDES
@out("Folder for one PNG a task. Default: runs/preview/<name of the config>.")
@DRY_RUN
@JSON
def pretext_preview(
    config: Path, overrides: tuple[str, ...], out: Path | None, dry_run: bool, as_json: bool
) -> None:
    """Draw real puzzles of the pretext tasks of a config, with their labels."""
    from medssl.pipelines import preview as pipeline

    loaded = pipeline.read_config(config, overrides)
    folder = out or pipeline.DEFAULT_FOLDER / config.stem
    if dry_run:
        print_facts(pipeline.plan(loaded, folder), as_json)
        return
    with show_progress(as_json) as progress:
        written = pipeline.run(loaded, folder, progress=progress)
    print_facts({name: str(path) for name, path in written.items()}, as_json)
    click.secho(
        "These pictures show pixels of patients: keep them where the scans are.",
        fg="yellow", bold=True, err=True,
    )  # fmt: skip


@pretext.command(
    "audit",
    cls=Command,
    examples=[
        "medssl pretext audit configs/pretrain/rotation_3d.yaml --steps 100",
    ],
    writes="Tables and figures in runs/shortcuts/<name of the config>, or where --out says.",
    codes=TRAINING_CODES,
)
@CONFIG
@OVERRIDES
@out("Folder for tables and figures. Default: runs/shortcuts/<name of the config>.")
@click.option(
    "--steps", type=click.IntRange(min=1),
    help="Steps of each probe. Default: those of the config, at most 200.",
)  # fmt: skip
@DRY_RUN
@JSON
def pretext_audit(
    config: Path, overrides: tuple[str, ...], out: Path | None, steps: int | None, dry_run: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Measure how much of a pretext task is solved by shortcuts alone.

    The task is trained on border strips, silhouettes, means, thumbnails and constant scans.
    """
    from medssl.pipelines import shortcuts as pipeline
    from medssl.pipelines.preview import read_config

    loaded, folder = read_config(config, overrides), out or pipeline.DEFAULT_FOLDER / config.stem
    if dry_run:
        print_facts(pipeline.plan(loaded, folder, steps=steps), as_json)
        return
    with show_progress(as_json) as progress:
        audits = pipeline.run(loaded, folder, steps=steps, progress=progress)
    if as_json:
        print_facts({"out": str(folder), "audits": pipeline.facts_of(audits)}, as_json)
        return
    for line in pipeline.describe(audits):
        click.echo(line)
    click.echo(f"Tables and figures: {folder}")
