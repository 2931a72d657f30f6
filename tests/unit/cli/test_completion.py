"""Shell completion: scripts that shells accept, and words that are offered without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from medssl.cli import cli
from medssl.cli.completion import PROGRAM, VARIABLE, component_names, script


def offered(*words: str, incomplete: str = "") -> list[str]:
    found = ShellComplete(cli, {}, PROGRAM, VARIABLE).get_completions(list(words), incomplete)
    return [item.value for item in found]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_tells_where_to_put_it_and_its_shell_accepts_it(shell: str, tmp_path: Path):
    text = CliRunner().invoke(cli, ["completion", shell]).output
    assert text == script(shell)
    assert f"medssl completion {shell} >" in text
    assert VARIABLE in text
    if shutil.which(shell):
        path = tmp_path / "script"
        path.write_text(text)
        subprocess.run([shell, "-n", path], check=True)


def test_zsh_reads_its_mark_in_the_first_line():
    assert script("zsh").splitlines()[0] == "#compdef medssl"


def test_a_script_comes_as_json_too():
    answer = json.loads(CliRunner().invoke(cli, ["completion", "bash", "--json"]).output)
    assert answer == {"shell": "bash", "script": script("bash")}


def test_commands_options_and_kinds_are_offered():
    assert offered(incomplete="stu") == ["study"]
    assert "--dry-run" in offered("study", incomplete="--")
    assert "backbones" in offered("list")
    assert offered("config", "schema", incomplete="pre") == ["prepare", "pretrain"]
    assert {"study", "exit-codes"} <= set(offered("help"))


def test_names_of_components_are_offered():
    assert offered("datasets", "fetch") == component_names("datasets")
    assert offered("export", "x", "--format", incomplete="on") == ["onnx"]


def test_config_files_and_run_folders_are_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("ours.yaml", "configs/studies/demo.yaml", "runs/first/config.yaml", "runs/no/x"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert offered("study") == ["configs/studies/demo.yaml", "ours.yaml"]
    assert offered("report", incomplete="runs/") == ["runs/first"]
    assert offered("report", incomplete="/elsewhere") == ["/elsewhere"]  # the shell looks itself


def test_completion_imports_nothing_heavy():
    code = (
        "import os, sys; os.environ |= {'_MEDSSL_COMPLETE': 'bash_complete', "
        "'COMP_WORDS': 'medssl datasets fetch ', 'COMP_CWORD': '3'}; sys.argv = ['medssl']\n"
        "from medssl.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'monai', 'mlflow', 'numpy', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["plain,hippocampus", "plain,phantom", "[]"]
