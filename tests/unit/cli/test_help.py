"""Help: every command has examples that hold, says what it writes, and how it may end."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from medssl.cli import cli
from medssl.cli.options import EXIT_CODES, Command, Group
from medssl.cli.topics import ENVIRONMENT
from medssl.errors import ConfigError
from medssl.tracking.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[3]


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        yield (*path, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


def at(path: tuple[str, ...]) -> click.Command:
    found: click.Command = cli
    for name in path:
        assert isinstance(found, click.Group)
        found = found.commands[name]
    return found


def shown(*arguments: str) -> str:
    return CliRunner().invoke(cli, list(arguments), catch_exceptions=False).output


def examples() -> list[str]:
    every = [at(path) for path in commands()]
    return [text for command in [cli, *every] for text in getattr(command, "examples", ())]


@pytest.mark.parametrize("path", list(commands()), ids=" ".join)
def test_every_command_has_examples_and_the_help_shows_them(path: tuple[str, ...]):
    command = at(path)
    text = shown(*path, "--help")
    if isinstance(command, Group) and not command.examples:
        return  # its commands have them
    assert isinstance(command, Command | Group)
    assert command.examples
    for example in command.examples:
        for line in example.splitlines():
            assert f"  {line}\n" in text


@pytest.mark.parametrize("path", list(commands()), ids=" ".join)
def test_every_command_says_what_it_writes_and_how_it_ends(path: tuple[str, ...]):
    command = at(path)
    if isinstance(command, click.Group):
        return
    assert isinstance(command, Command)
    text = shown(*path, "--help")
    assert "\nWrites:\n" in text
    assert "\nExit codes:\n" in text
    assert set(command.codes) <= set(EXIT_CODES)


@pytest.mark.parametrize("example", examples())
def test_examples_name_commands_options_and_configs_that_exist(
    example: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(ROOT)
    words = shlex.split(example.replace("\\\n", " "))
    while "=" in words[0]:  # a variable for this one command
        words = words[1:]
    if "medssl" not in words:
        assert words[0] == "sbatch"
        return
    words = words[words.index("medssl") + 1 :]
    if ">" in words:
        words = words[: words.index(">")]
    context = click.Context(cli, info_name="medssl", **cli.context_settings)
    command: click.Command = cli
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    command.make_context(command.name, words, parent=context)  # refuses what it does not know
    for word in words:
        if word.startswith("configs/") and word.endswith(".yaml"):
            assert Path(word).is_file()


def test_examples_with_overrides_fit_their_configs(monkeypatch: pytest.MonkeyPatch):
    from medssl.pipelines.kinds import load_any

    monkeypatch.chdir(ROOT)
    for example in examples():
        words = shlex.split(example.replace("\\\n", " "))
        files = [word for word in words if word.startswith("configs/") and word.endswith(".yaml")]
        changes = [word for word in words if "=" in word and not word.startswith("MLFLOW")]
        if files:
            load_any(Path(files[0]), changes)


def test_the_programs_help_lists_every_command():
    text = shown("--help")
    for name in cli.commands:
        assert f"  {name} " in text


@pytest.mark.parametrize("words", [("study",), ("config", "check"), ()], ids=" ".join)
def test_help_of_a_command_is_what_its_option_shows(words: tuple[str, ...]):
    told, asked = shown("help", *words), shown(*words, "--help")
    assert told.split("\n", 1)[1] == asked.split("\n", 1)[1]


def test_help_tells_environment_exit_codes_and_json():
    for name in ENVIRONMENT:
        assert name in shown("help", "environment").replace("\n", " ")
    assert "130  interrupted by Ctrl-C" in shown("help", "exit-codes")
    assert '"exit_code": 2' in shown("help", "json")
    assert json.loads(shown("help", "json", "--json"))["topic"] == "json"


def test_every_variable_that_the_code_reads_is_told():
    told = " ".join(ENVIRONMENT)
    for file in (ROOT / "medssl").rglob("*.py"):
        for name in re.findall(r'"(MEDSSL_[A-Z_]+)"', file.read_text()):
            assert name in told, (file, name)


def test_an_unknown_topic_is_answered_with_those_there_are():
    with pytest.raises(ConfigError, match="no command or topic 'fruit'.*environment, exit-codes"):
        shown("help", "fruit")


def test_the_searches_are_those_that_are_tried_against_mlflow():
    text = shown("help", "searches")
    assert len(RECIPES) > 4
    for recipe in RECIPES.values():
        assert f"  {recipe.question}\n    {recipe.filter}" in text
