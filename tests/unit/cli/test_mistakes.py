"""What people do wrong: each ends in a message and an exit code, and never in a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from medssl import cli
from studies import settings

Run = tuple[int, str, str]


def run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: str | Path
) -> Run:
    """Call the program in this process; return its exit code, stdout and stderr."""
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["medssl", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capfd.readouterr()
    assert "Traceback" not in printed.out + printed.err
    return int(str(ended.value.code or 0)), printed.out, printed.err


def study(folder: Path) -> str:
    return yaml.safe_dump(settings(folder), allow_unicode=True)


FILES = {
    "broken.yaml": b"name: [a\n b: c",
    "empty.yaml": b"",
    "latin.yaml": "name: Müller".encode("latin-1"),
    "utf16.yaml": "name: x".encode("utf-16"),
    "list.yaml": b"- 1\n- 2\n",
    "twice.yaml": b"seed: 1\nseed: 2\n",
}

MISTAKES = [
    (["config", "check", "nowhere.yaml"], 2, "there is no config file 'nowhere.yaml'"),
    (["config", "check", "folder"], 2, "'folder' is a folder; give a config file. `medssl init"),
    (["config", "check", "broken.yaml"], 2, "broken.yaml: line 2, not valid YAML"),
    (["config", "check", "empty.yaml"], 2, "empty.yaml holds no keys"),
    (["config", "check", "list.yaml"], 2, "list.yaml holds no keys"),
    (["config", "check", "twice.yaml"], 2, "the key 'seed' is given twice"),
    (["config", "check", "latin.yaml"], 2, "Save it as UTF-8 in your editor"),
    (["config", "check", "utf16.yaml"], 2, "utf16.yaml is not UTF-8 text"),
    (["config", "check", "fine.yaml", "seeed=1"], 2, "Did you mean 'seed'?"),
    (["config", "check", "fine.yaml", "seed"], 2, "not of the form section.key=value"),
    (["config", "check", "fine.yaml", "seed=[1"], 2, "the value is not valid YAML"),
    (["config", "schema", "--out", "fine.yaml"], 4, ""),
    (["stdy"], 2, "Did you mean 'study'?"),
    (["study", "fine.yaml", "--dryrun"], 2, "Did you mean '--dry-run'?"),
    (["list", "fruit"], 2, "'fruit' is not one of"),
    (["index", "folder"], 3, "the folder to index is empty"),
    (["index", "nowhere"], 3, "there is no folder"),
    (["inspect", "nowhere"], 3, "there is no file or folder at the path given"),
    (["init", "nowhere"], 3, "there is no folder 'nowhere'"),
    (["init", "folder"], 3, "the folder to index is empty"),
    (["init", "folder", "--out", "fine.yaml"], 2, "or replace it with --force"),
    (["init", "folder", "--out", "folder"], 2, "'folder' is a folder"),
    (["report", "nowhere"], 3, ""),
    (["report", "folder"], 3, ""),
    (["sync", "folder"], 3, ""),
    (["compare", "folder"], 3, "Finish that run first"),
    (["export", "folder", "--format", "onnx"], 3, ""),
    (["datasets", "fetch", "nothing"], 2, "there is no dataset 'nothing'"),
    (["datasets", "verify", "folder"], 3, ""),
    (["help", "fruit"], 2, "no command or topic 'fruit'"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "text"), MISTAKES, ids=[" ".join(a) for a, *_ in MISTAKES]
)
def test_a_mistake_ends_in_a_message_and_one_json_document(
    arguments: list[str], code: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "fine.yaml").write_text(study(tmp_path), encoding="utf-8")
    ended, out, err = run(monkeypatch, capfd, *arguments, "--json")
    assert (ended, text in err) == (code, True), err
    assert "Unforeseen" not in err
    error = json.loads(out)["error"]
    assert error["exit_code"] == code
    assert error["message"].strip()
    assert error["kind"].endswith("Error")


@pytest.mark.parametrize("name", ["with blank.yaml", "söme ünï 名.yaml"])
@pytest.mark.parametrize("kind", ["bom", "crlf", "plain"])
def test_what_editors_make_of_a_file_is_read(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):  # fmt: skip
    text = study(tmp_path / "Patienten ü")
    content = text.encode("utf-8-sig" if kind == "bom" else "utf-8")
    path = tmp_path / name
    path.write_bytes(content.replace(b"\n", b"\r\n") if kind == "crlf" else content)
    code, out, _ = run(monkeypatch, capfd, "config", "check", path, "--json")
    assert code == 0
    assert json.loads(out)["kind"] == "study"


@pytest.mark.parametrize("words", [["--debug"], ["--quiet"]], ids=str)
def test_options_for_all_commands_may_stand_behind_the_command(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    assert run(monkeypatch, capfd, "list", "formats", *words)[:2] == (0, "dicom\nnifti\n")


def test_a_traceback_does_not_change_the_exit_code():
    command = [sys.executable, "-m", "medssl", "config", "check", "nowhere", "--debug", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback (most recent call last)" in done.stderr
    assert json.loads(done.stdout)["error"]["exit_code"] == 2


@pytest.mark.parametrize(
    ("shell", "code", "text"),
    [
        ("medssl help study | head -1", 0, ""),
        ("medssl list formats > /dev/full", 4, "no space left on the disk"),
        ("medssl list fruit --json > /dev/full", 2, "'fruit' is not one of"),
        ("medssl list formats >&-", 0, ""),
        ("medssl list formats <&-", 0, ""),
        ("env -u HOME medssl list formats", 0, ""),
        ("LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 medssl help json", 0, ""),
        ("mkdir gone && cd gone && rmdir ../gone && medssl list formats", 0, ""),
    ],
)
def test_odd_surroundings_leave_no_traceback(shell: str, code: int, text: str, tmp_path: Path):
    root = Path(__file__).resolve().parents[3]
    script = f'medssl() {{ PYTHONPATH="{root}" "{sys.executable}" -m medssl "$@"; }}; {shell}'
    script = script.replace("env -u HOME medssl", "unset HOME; medssl")
    script = script.replace("LC_ALL=C PYTHONUTF8=0", "export LC_ALL=C PYTHONUTF8=0")
    script = script.replace("COERCECLOCALE=0 medssl", "COERCECLOCALE=0; medssl")
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert text in done.stderr
