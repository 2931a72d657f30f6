"""What commands print: results on stdout, for people or as JSON; everything else on stderr."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import click

from medssl.errors import MedsslError


def show_progress(as_json: bool = False) -> Any:
    """Return a display of progress, quiet where the result is JSON or --quiet was given."""
    from medssl.pipelines.display import Display

    settings = click.get_current_context().find_root().obj or {}
    return Display(quiet=as_json or bool(settings.get("quiet")))


def print_json(document: Any) -> None:
    """Print the one JSON document of a command."""
    import json

    click.echo(json.dumps(_plain(document), indent=2, default=str, allow_nan=False))


def _plain(value: Any) -> Any:
    """Return content with null for numbers that JSON has not: NaN and infinities."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_facts(facts: Mapping[str, Any], as_json: bool, depth: int = 0) -> None:
    """Print facts for people, or as JSON."""
    if as_json:
        print_json(facts)
        return
    for key, value in facts.items():
        name = "  " * depth + str(key).replace("_", " ")
        if isinstance(value, Mapping):
            click.echo(f"{name}:" if value else f"{name}: none")
            print_facts(value, as_json, depth + 1)
        elif isinstance(value, (list, tuple)):
            click.echo(f"{name}: {', '.join(map(str, value)) or 'none'}")
        else:
            click.echo(f"{name}: {value}")


def print_study(folder: Path, as_json: bool) -> None:
    """Print a finished study's verdicts and where its report is."""
    import json

    from medssl.reports.tables import verdict_lines

    facts_file = folder / "data.json"
    facts = json.loads(facts_file.read_text(encoding="utf-8")) if facts_file.is_file() else {}
    lines = verdict_lines(folder)
    if as_json:
        print_json(
            {"run_folder": str(folder), "report": str(folder / "report.html"), "verdicts": lines,
             "synthetic": bool(facts.get("synthetic"))},
        )  # fmt: skip
        return
    if facts.get("synthetic"):
        click.secho("SYNTHETIC DATA PROVE NOTHING.", fg="yellow", bold=True)
    for line in lines:
        click.echo(line)
    click.echo(f"Report: {folder / 'report.html'}")


def fail_after_answer(problem: MedsslError, as_json: bool) -> NoReturn:
    """End with an error after the result was printed, which with --json is the one document."""
    if not as_json:
        raise problem
    click.secho(f"{type(problem).__name__}: {problem}", fg="red", err=True)
    raise SystemExit(problem.exit_code)
