from __future__ import annotations

import getpass
import json
import platform
import subprocess
from pathlib import Path

import pytest

from medssl import provenance

HASH = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(provenance.COMMIT_VARIABLE, raising=False)


def git(folder: Path, *arguments: str) -> str:
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", "-C", str(folder), *author, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a repository whose package folder provenance takes for its own."""
    package = tmp_path / "medssl"
    package.mkdir()
    (package / "__init__.py").touch()
    git(tmp_path, "init", "-q")
    monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
    return tmp_path


def test_the_commit_is_the_checkouts(checkout):
    git(checkout, "add", ".")
    git(checkout, "commit", "-qm", "first")
    assert provenance.git_commit() == git(checkout, "rev-parse", "HEAD")


def test_changed_files_are_told(checkout):
    git(checkout, "add", ".")
    git(checkout, "commit", "-qm", "first")
    (checkout / "medssl" / "__init__.py").write_text("x = 1\n")
    assert provenance.git_commit() == git(checkout, "rev-parse", "HEAD") + "+changes"


def test_a_repository_that_only_surrounds_the_installation_is_not_ours(checkout):
    (checkout / "README").touch()
    git(checkout, "add", "README")
    git(checkout, "commit", "-qm", "somebody's project")
    assert provenance.git_commit() is None


def test_without_git_nobody_can_tell(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance.git_commit() is None


@pytest.mark.parametrize("given", [HASH, HASH + "+changes"])
def test_an_image_names_its_commit(checkout, monkeypatch, given):
    monkeypatch.setenv(provenance.COMMIT_VARIABLE, given)
    assert provenance.git_commit() == given


def test_a_variable_that_is_no_commit_is_left_alone(checkout, monkeypatch):
    monkeypatch.setenv(provenance.COMMIT_VARIABLE, "latest")
    assert provenance.git_commit() is None


def test_versions_are_those_installed():
    import torch

    versions = provenance.package_versions()
    assert versions["python"] == platform.python_version()
    assert torch.__version__.startswith(versions["torch"])
    assert "medssl" in versions


def test_the_machine_has_no_name_and_no_user():
    text = json.dumps(provenance.machine())
    values = json.loads(text).values()
    assert platform.node() not in values
    assert getpass.getuser() not in values
    assert str(Path.home()) not in text
    assert provenance.machine()["num_cores"] >= 1
