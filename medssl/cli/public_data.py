"""Commands about data sets: list, fetch, verify."""

from __future__ import annotations

from pathlib import Path

import click

from medssl.cli import completion
from medssl.cli.options import (
    JSON,
    PATH,
    Command,
    Group,
    out,
)
from medssl.cli.output import fail_after_answer, print_facts, show_progress
from medssl.errors import DataError


@click.group(cls=Group)
def datasets() -> None:
    """Public and synthetic data sets: list, fetch, verify."""


@datasets.command(
    "list",
    cls=Command,
    examples=[
        "medssl datasets list",
        "medssl datasets list --json",
    ],
    codes=(0,),
)
@JSON
def datasets_list(as_json: bool) -> None:
    """List the data sets with licence and citation."""
    from medssl.scans.datasets.base import cards

    print_facts(
        {
            card.name: {"title": card.title, "licence": card.licence, "synthetic": card.synthetic,
                        "citation": card.citation}
            for card in cards()
        },
        as_json,
    )  # fmt: skip


@datasets.command(
    "fetch",
    cls=Command,
    examples=[
        "medssl datasets fetch hippocampus",
        "medssl datasets fetch phantom --out data/phantom --no-network",
    ],
    writes=(
        "The folder of --out, data/<name> by default, with the licence and checksums of the "
        "data set."
    ),
    codes=(0, 2, 3, 4, 130, 143),
)
@click.argument("name", shell_complete=completion.components("datasets"))
@out("Where to. Default: data/<name>.")
@click.option("--no-network", is_flag=True, help="Take it from the mirror, or not at all.")
@JSON
def datasets_fetch(name: str, out: Path | None, no_network: bool, as_json: bool) -> None:
    """Bring a data set to this machine, from MEDSSL_DATA_MIRROR or the network."""
    from medssl.scans.datasets.base import fetch

    with show_progress(as_json) as progress:
        fetched = fetch(
            name,
            out or Path("data") / name,
            network=not no_network,
            progress=lambda done, total: progress(f"fetch {name}", done, total),
        )
    if fetched.synthetic and not as_json:
        click.secho(
            "These data are synthetic: they show that the software runs, and prove nothing.",
            fg="yellow", bold=True, err=True,
        )  # fmt: skip
    print_facts(
        {"folder": str(fetched.folder), "from": fetched.origin, "licence": fetched.card.licence},
        as_json,
    )


@datasets.command(
    "verify",
    cls=Command,
    examples=[
        "medssl datasets verify data/hippocampus",
    ],
    codes=(0, 3),
)
@click.argument("folder", type=PATH)
@JSON
def datasets_verify(folder: Path, as_json: bool) -> None:
    """Compare a fetched data set with the checksums it came with."""
    from medssl.scans.datasets.base import verify

    differences = verify(folder)
    print_facts({key: len(paths) for key, paths in differences.items()}, as_json)
    if any(differences.values()):
        problem = DataError(
            "the data set differs from what was fetched. Remove the folder and fetch it again."
        )
        fail_after_answer(problem, as_json)
