"""The command line: fast help, exit codes, messages without tracebacks, JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from medssl import __version__
from medssl.cli import cli, main
from medssl.training.interruption import TimeUp
from medssl.training.launch import first_to_end
from studies import medssl, settings, write_config

HEAVY = ("torch", "monai", "mlflow", "pydicom", "highdicom", "pandas", "numpy", "sklearn", "ray")


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Return every command, as the words that call it."""
    for name, command in group.commands.items():
        yield (*path, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


def command_at(path: tuple[str, ...]) -> click.Command:
    found: click.Command = cli
    for name in path:
        assert isinstance(found, click.Group)
        found = found.commands[name]
    return found


def invoke(*arguments: str | Path) -> Result:
    """Call a command in this process; errors are raised."""
    return CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)


def call_main(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path
) -> tuple[int, str]:
    """Call the program in this process; return its exit code and what it said on stderr."""
    monkeypatch.setattr("signal.signal", lambda *_: None)  # this process keeps its own
    monkeypatch.setattr(sys, "argv", ["medssl", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["study", "--help"], ["--version"], ["list"]])
def test_help_imports_nothing_heavy(arguments: list[str]):
    code = (
        "import sys; from medssl.cli import cli\n"
        f"try: cli({arguments!r})\n"
        "except SystemExit: pass\n"
        f"print('found', sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "found []", done.stdout


@pytest.mark.parametrize("path", list(commands()), ids=" ".join)
def test_every_command_and_every_option_has_help(path: tuple[str, ...]):
    command = command_at(path)
    shown = invoke(*path, "--help")
    assert shown.exit_code == 0
    assert command.help
    assert "\\b" not in shown.output
    first_sentence = str(command.help).strip("\b\n ").splitlines()[0]
    assert first_sentence in " ".join(shown.output.split())
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


@pytest.mark.parametrize("path", [p for p in commands() if p != ("config",)], ids=" ".join)
def test_every_command_that_answers_can_do_so_in_json(path: tuple[str, ...]):
    command = command_at(path)
    if isinstance(command, click.Group):
        return  # it answers nothing
    assert "--json" in {name for parameter in command.params for name in parameter.opts}


def test_the_version_is_the_packages():
    assert invoke("--version").output.strip() == f"medssl, version {__version__}"


KINDS = ["pretext", "downstream", "backbones", "inits", "formats", "protocols", "datasets"]


@pytest.mark.parametrize("kind", [*KINDS, "executors"])
def test_lists_are_names_a_line_or_json(kind: str):
    names = json.loads(invoke("list", kind, "--json").output)
    assert names
    assert invoke("list", kind).output.split() == names


def test_lists_name_what_configs_take():
    assert {"rotation", "inpainting"} <= set(json.loads(invoke("list", "pretext", "--json").output))


def test_data_sets_are_listed_with_licence_and_citation():
    listed = json.loads(invoke("datasets", "list", "--json").output)
    assert listed["phantom"]["synthetic"] is True
    assert all(card["licence"] and "citation" in card for card in listed.values())
    assert "licence:" in invoke("datasets", "list").output


def test_the_doctor_answers_in_lines_and_in_json():
    findings = json.loads(invoke("doctor", "--json").output)
    assert {"level", "subject", "text"} == set(findings[0])
    lines = invoke("doctor").output.splitlines()
    assert len(lines) == len(findings)


def test_a_config_is_checked_and_shown(tmp_path: Path):
    path = write_config(tmp_path / "study.yaml", settings(tmp_path))
    checked = json.loads(invoke("config", "check", path, "--json").output)
    assert checked["kind"] == "study"
    again = write_config(tmp_path / "again.yaml", {})
    again.write_text(invoke("config", "show", path).output)
    assert json.loads(invoke("config", "check", again, "--json").output) == checked
    assert "seed: 8" in invoke("config", "show", path, "seed=8").output


def test_schemas_are_printed_or_written(tmp_path: Path):
    assert json.loads(invoke("config", "schema", "index").output)["title"] == "IndexConfig"
    invoke("config", "schema", "--out", tmp_path)
    assert (tmp_path / "study.json").is_file()


# ------------------------------------------------------------------------------ codes and messages

USAGE = [
    (["nonsense"], "No such command 'nonsense'"),
    (["study"], "Missing argument 'CONFIG'"),
    (["list", "fruit"], "'fruit' is not one of 'pretext'"),
    (["study", "x.yaml", "--no-such-option"], "No such option"),
    (["config", "schema"], "ConfigError: name a kind (index, prepare, pretrain, transfer, study)"),
    (["config", "schema", "fruit"], "ConfigError: there is no kind of config 'fruit'"),
    (["study", "absent.yaml"], "ConfigError: there is no config file 'absent.yaml'"),
    (["config", "check", "absent.yaml"], "ConfigError: there is no config file 'absent.yaml'"),
]


@pytest.mark.parametrize(("arguments", "text"), USAGE, ids=[" ".join(a) for a, _ in USAGE])
def test_usage_and_config_mistakes_end_with_code_2(
    arguments: list[str], text: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], tmp_path: Path,
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    code, said = call_main(monkeypatch, capsys, *arguments)
    assert code == 2
    assert text in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_mistakes_in_a_config_come_one_a_line_with_their_places(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    content = settings(tmp_path, seeed=1)
    content["pretrain"]["training"]["steps"] = 0
    path = write_config(tmp_path / "study.yaml", content)
    code, said = call_main(monkeypatch, capsys, "study", path)
    assert code == 2
    assert "study.yaml does not fit:" in said
    assert "pretrain.training.steps: input should be greater than 0 (found 0)" in said
    assert "seeed: unknown key (value 1). Did you mean 'seed'?" in said


def test_missing_data_end_with_code_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    code, said = call_main(monkeypatch, capsys, "compare", tmp_path, "--out", tmp_path / "out")
    assert code == 3
    assert "DataError: the run folder" in said
    assert "has no readable predictions.parquet. Finish that run first." in said


def test_an_error_has_a_traceback_under_debug_alone(tmp_path: Path):
    plain = medssl("config", "check", "absent.yaml", cwd=tmp_path)
    debug = medssl("--debug", "config", "check", "absent.yaml", cwd=tmp_path)
    assert plain.returncode == 2
    assert "Traceback" not in plain.stderr
    assert plain.stderr.startswith("ConfigError: there is no config file 'absent.yaml'")
    assert debug.returncode != 0
    assert "Traceback (most recent call last)" in debug.stderr
    assert "ConfigError: there is no config file 'absent.yaml'" in debug.stderr


@pytest.mark.parametrize("stop", [KeyboardInterrupt, click.Abort])
def test_an_interrupted_command_says_how_to_go_on(
    stop: type[BaseException], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupted(**_: object) -> None:
        raise stop

    monkeypatch.setattr(cli, "main", interrupted)
    code, said = call_main(monkeypatch, capsys, "doctor")
    assert code == 130
    assert said == "\nInterrupted. Give the same command again to go on.\n"


# -------------------------------------------------------------------------------------- torchrun


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Make this process look like the second of torchrun's two."""
    variables = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")  # main sets it, and it is put back
    first_to_end.cache_clear()
    yield monkeypatch
    first_to_end.cache_clear()


def test_torchrun_is_for_pretrain(
    second_of_two: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    second_of_two.setenv("RANK", "0")
    code, told = call_main(second_of_two, capsys, "study", "any.yaml")
    assert code == 2
    assert told == (
        "ConfigError: torchrun started several processes of medssl study, and only medssl pretrain "
        "shares its work among them. Start it without torchrun.\n"
    )


@pytest.mark.parametrize("arguments", [["study", "any.yaml"], ["pretrain", "--nonsense"]])
def test_a_process_that_does_not_lead_is_silent(
    second_of_two: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
):
    assert call_main(second_of_two, capsys, *arguments) == (2, "")


def test_what_it_prints_goes_nowhere(
    second_of_two: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def chat(**_: object) -> None:
        click.echo("result")
        print("progress, warnings", file=sys.stderr)

    second_of_two.setattr(cli, "main", chat)
    assert call_main(second_of_two, capsys, "pretrain") == (0, "")
    assert capsys.readouterr().out == ""


def test_a_time_limit_ends_with_143_by_hand_and_with_0_under_torchrun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def late(**_: object) -> None:
        raise TimeUp("training.max_minutes: the 5 minutes are over.")

    monkeypatch.setattr(cli, "main", late)
    told = "training.max_minutes: the 5 minutes are over. Give the same command again to go on.\n"
    assert call_main(monkeypatch, capsys, "pretrain") == (143, told)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # which would start it again
    assert call_main(monkeypatch, capsys, "pretrain") == (0, told)
