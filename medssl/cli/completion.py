"""What the shell offers on the Tab key. It runs at every press, so nothing heavy is imported."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

PROGRAM = "medssl"
VARIABLE = "_MEDSSL_COMPLETE"
"""Through it the shell asks, with the words typed so far in COMP_WORDS."""

REGISTRIES = {
    "pretext": ("medssl.pretext", "PRETEXT_TASKS"),
    "downstream": ("medssl.downstream", "DOWNSTREAM_TASKS"),
    "backbones": ("medssl.models.backbones", "BACKBONES"),
    "inits": ("medssl.models.inits", "INITS"),
    "formats": ("medssl.scans.formats", "FORMATS"),
    "protocols": ("medssl.evaluation.protocols", "PROTOCOLS"),
    "datasets": ("medssl.scans.datasets", "DATASETS"),
    "executors": ("medssl.executors", "EXECUTORS"),
    "exports": ("medssl.models.export", "EXPORTS"),
}
"""Kinds of components: where the registry of each is."""

_MOST_OFFERED = 200
"""Files or folders that are looked through at one press of the key."""

Completer = Callable[[click.Context, click.Parameter, str], "list[CompletionItem]"]


def component_names(kind: str) -> list[str]:
    """Return the names of the components of a kind, without importing them."""
    module, name = REGISTRIES[kind]
    names: list[str] = getattr(importlib.import_module(module), name).names()
    return names


def components(kind: str) -> Completer:
    """Return a completer for the names of a kind of component."""

    def complete(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return words(component_names(kind), incomplete)

    return complete


def config_files(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer YAML files of this folder and of configs/; else whatever files the shell finds."""
    here = Path()
    patterns = ("*.yaml", "*.yml", "configs/*/*.yaml")
    found = (str(path) for pattern in patterns for path in here.glob(pattern))
    fitting = [path for path in islice(found, _MOST_OFFERED) if path.startswith(incomplete)]
    return [_item(path) for path in sorted(fitting)] or _whatever(incomplete, "file")


def run_folders(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the run folders in runs/; else whatever folders the shell finds."""
    found = (str(path.parent) for path in Path("runs").glob("*/config.yaml"))
    fitting = [path for path in islice(found, _MOST_OFFERED) if path.startswith(incomplete)]
    return [_item(path) for path in sorted(fitting)] or _whatever(incomplete, "dir")


def _item(value: str, kind: str = "plain") -> CompletionItem:
    from click.shell_completion import CompletionItem  # at every start it would cost 10 ms

    return CompletionItem(value, type=kind)


def words(candidates: Iterable[str], incomplete: str) -> list[CompletionItem]:
    """Return those of the candidates that go on from what was typed."""
    return [_item(word) for word in candidates if word.startswith(incomplete)]


def _whatever(incomplete: str, kind: str) -> list[CompletionItem]:
    return [_item(incomplete, kind)]


def config_kinds(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the kinds of config files."""
    return words(("index", "prepare", "pretrain", "transfer", "study"), incomplete)


_PLACES = {
    "bash": (
        "bash 4.4 or later. Put this file where bash looks for completions, and open a new shell:",
        "  medssl completion bash > ~/.local/share/bash-completion/completions/medssl",
        'Without the package bash-completion: eval "$(medssl completion bash)" in ~/.bashrc',
    ),
    "zsh": (
        "Put this file into a folder of fpath, and open a new shell:",
        "  medssl completion zsh > ~/.zfunc/_medssl",
        "with, in ~/.zshrc: fpath+=~/.zfunc; autoload -Uz compinit; compinit",
    ),
    "fish": (
        "Put this file where fish looks for completions:",
        "  medssl completion fish > ~/.config/fish/completions/medssl.fish",
    ),
}


def script(shell: str) -> str:
    """Return the script that a shell needs, and where to put it, as its comment."""
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    if found is None:
        raise ValueError(shell)
    # The body is filled in here, and not by its `source`, which starts a bash to learn its version.
    body = found.source_template % found(click.Group(), {}, PROGRAM, VARIABLE).source_vars()
    first, _, rest = body.lstrip().partition("\n")
    comment = [f"# Completion of {PROGRAM} for {shell}.", *(f"# {line}" for line in _PLACES[shell])]
    if first.startswith("#compdef"):  # zsh reads it in the first line alone
        return "\n".join([first, *comment, rest])
    return "\n".join([*comment, first, rest])
