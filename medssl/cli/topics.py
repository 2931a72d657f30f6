"""Help that belongs to no single command: variables, exit codes, JSON, searches in MLflow."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from medssl.cli.completion import words as fitting
from medssl.cli.options import EXIT_CODES
from medssl.errors import ConfigError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

ENVIRONMENT = {
    "MEDSSL_DATA_MIRROR": "folder with the public data sets; datasets fetch takes them from there",
    "MEDSSL_CACHE": "folder for checkpoints that come from MLflow's registry; ~/.cache/medssl",
    "MEDSSL_GIT_COMMIT": "commit that provenance.json names, where no git is at hand (containers)",
    "MLFLOW_TRACKING_URI": "MLflow server; by default a database beside the run folder",
    "MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD": "its login; never in a config file",
    "TORCH_HOME": "weights of torchvision are kept in hub/checkpoints inside; ~/.cache/torch",
    "HF_HOME, HF_HUB_CACHE": "weights of timm are kept there; ~/.cache/huggingface",
    "HF_ENDPOINT": "mirror of the Hugging Face hub to download from",
    "CUDA_VISIBLE_DEVICES": "GPUs that may be used",
    "OMP_NUM_THREADS": "threads of PyTorch on a CPU; by default one a core",
    "TMPDIR": "folder for temporary files",
    "NO_COLOR": "any value: no colours",
    "COLUMNS": "width of progress bars and help",
    "WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT": "set by torchrun, not by hand",
}

_JSON = """With --json a command prints one JSON document on stdout, and nothing else there.
Progress is off; warnings stay on stderr.

An error is such a document, too, with the exit code of the command, and its text also goes to
stderr:

  {"error": {"kind": "ConfigError", "message": "there is no config file …", "exit_code": 2}}

A command that found something wrong (doctor, sync, datasets verify, weights verify) prints its
findings as the document; its exit code says that not all is well. A number that is not finite is
null."""


def _table(title: str, rows: dict[str, str]) -> str:
    formatter = click.HelpFormatter(max_width=100)
    with formatter.section(title):
        formatter.write_dl(list(rows.items()))
    return formatter.getvalue().rstrip("\n")


def _searches() -> str:
    from medssl.tracking.recipes import RECIPES

    runs, versions = (
        {
            recipe.question: recipe.filter
            + (f", ordered by {recipe.order_by}" if recipe.order_by else "")
            for recipe in RECIPES.values()
            if recipe.where == where
        }
        for where in ("runs", "versions")
    )
    return "\n\n".join(
        [
            "Filters for MLflow's search box and its client. Put your own in place of capitals.",
            _list("Runs (MlflowClient.search_runs)", runs),
            _list("Versions of models (MlflowClient.search_model_versions)", versions),
        ]
    )


def _list(title: str, rows: dict[str, str]) -> str:
    return "\n".join([f"{title}:", *(f"  {name}\n    {text}" for name, text in rows.items())])


TOPICS: dict[str, Callable[[], str]] = {
    "environment": lambda: _table("Environment variables", ENVIRONMENT),
    "exit-codes": lambda: _table("Exit codes", {str(c): text for c, text in EXIT_CODES.items()}),
    "json": lambda: _JSON,
    "searches": _searches,
}
"""The texts by the words that ask for them."""


def text_of(root: click.Context, words: tuple[str, ...]) -> str:
    """Return the help of a command, or a topic.

    Raises:
        ConfigError: there is neither.
    """
    found = TOPICS.get(" ".join(words))
    if found is not None:
        return found()
    command, context = root.command, root
    for word in words:
        inner = command.get_command(context, word) if isinstance(command, click.Group) else None
        if inner is None:
            raise ConfigError(
                f"there is no command or topic {' '.join(words)!r}. `medssl --help` lists the "
                f"commands; topics are {', '.join(TOPICS)}."
            )
        command, context = inner, click.Context(inner, parent=context, info_name=word)
        context.help_option_names = root.help_option_names
    return command.get_help(context)


def complete(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer commands and topics."""
    root = context.find_root().command
    commands = list(root.commands) if isinstance(root, click.Group) else []
    return fitting([*commands, *TOPICS], incomplete)
