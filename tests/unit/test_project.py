"""The project's own files agree with each other and with the design."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import medssl

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEAVY = ("torch", "monai", "mlflow", "pydicom", "pandas")
LOCKED_EXTRAS = ["dev", "onnx", "server", "imagenet-lite0"]

TOP_LEVEL = {
    ".ci",
    ".dockerignore",
    ".env.example",
    ".gitignore",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "DECISIONS.md",
    "Dockerfile",
    "LICENSE",
    "Makefile",
    "BENCHMARKS.md",
    "README.md",
    "SECURITY.md",
    "configs",
    "docker-compose.yml",
    "medssl",
    "pyproject.toml",
    "requirements.lock",
    "tests",
    "workflows",
}


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith((" ", "#"))]
    return {canonicalize_name(name): version for name, version in pins}


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"]
    texts = [*PROJECT["dependencies"], *(text for name in LOCKED_EXTRAS for text in extras[name])]
    return [Requirement(text) for text in texts]


def tracked_files() -> list[Path]:
    # -co: also what is about to be committed; a deleted file is not there any more.
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        pytest.skip("not a git checkout, so the project's own files cannot be told from others")
    return [Path(line) for line in result.stdout.splitlines() if (ROOT / line).exists()]


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_every_requirement_is_locked_inside_its_range(requirement: Requirement) -> None:
    assert locked()[canonicalize_name(requirement.name)] in requirement.specifier


def test_every_line_of_the_lock_is_one_exact_version() -> None:
    assert all(re.fullmatch(r"[\w.+]+", version) for version in locked().values())


def test_the_lock_is_complete() -> None:
    # The Makefile installs it without resolving, so what it lacks would be missing.
    wanted, seen = requirements(), set()
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        if (name, *requirement.extras) in seen:
            continue
        seen.add((name, *requirement.extras))
        assert name in locked()
        for text in importlib.metadata.requires(name) or []:
            found = Requirement(text)
            extras = ["", *requirement.extras]
            if found.marker is None or any(found.marker.evaluate({"extra": e}) for e in extras):
                wanted.append(found)


def test_decoders_under_the_gpl_are_no_part_of_the_lock() -> None:
    assert "pylibjpeg-libjpeg" not in locked()


@pytest.mark.parametrize(
    ("package", "floor"),
    [("monai", "1.6.1"), ("pydicom", "3.0.2"), ("torch", "2.10"), ("mlflow", "3.17.2")],
)
def test_floors_keep_out_releases_with_known_vulnerabilities(package: str, floor: str) -> None:
    requirement = next(found for found in requirements() if found.name == package)
    assert f">={floor}" in str(requirement.specifier)


def test_the_version_is_the_same_everywhere() -> None:
    assert medssl.__version__ == PROJECT["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == PROJECT["version"]
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_citation_file_fits_its_schema() -> None:
    module = [sys.executable, "-m", "check_jsonschema", "--builtin-schema"]
    command = [*module, "vendor.citation-file-format", str(ROOT / "CITATION.cff")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_make_help_lists_every_target() -> None:
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = re.findall(r"^  make ([a-z-]+)  +\S", shown.stdout, re.MULTILINE)
    assert listed == phony[1].split()
    assert {"setup", "demo", "test", "check", "bench", "clean"} <= set(listed)


def test_make_refuses_an_old_python_and_says_which_is_needed(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\ntest "$1" = --version && echo "Python 3.8.1" && exit\nexit 1\n')
    old.chmod(0o755)
    command = ["make", "setup", "--always-make", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "medssl needs Python 3.11 or later" in result.stdout
    assert "Python 3.8.1" in result.stdout
    assert not (tmp_path / "venv").exists()


def test_top_level_is_as_designed() -> None:
    assert {path.parts[0] for path in tracked_files()} == TOP_LEVEL


def test_no_file_is_a_drawer_for_anything() -> None:
    drawers = {"utils", "helpers", "common", "misc", "util", "helper"}
    assert [path for path in tracked_files() if drawers & {*path.parts[:-1], path.stem}] == []


def test_workflows_are_thin() -> None:
    for path in tracked_files():
        if path.parts[0] == "workflows" and path.suffix == ".py":
            text = (ROOT / path).read_text()
            assert len(text.splitlines()) <= (80 if path.stem == "notebook" else 40), path
            assert re.findall(r"^def (\w+)|^class ", text, re.MULTILINE) in ([], ["main"]), path


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "BENCHMARKS.md",
        "CONTRIBUTING.md",
        "DECISIONS.md",
        "SECURITY.md",
        "CHANGELOG.md",
    ],
)
def test_links_inside_the_project_lead_somewhere(name: str) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / name).read_text())
    inside = [target for target in targets if "://" not in target and "mailto:" not in target]
    assert [target for target in inside if not (ROOT / target).exists()] == []


def test_the_readme_shows_the_two_commands_that_make_knows() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "make demo" in readme
    assert "make test" in readme


def test_warnings_are_errors_and_xfail_is_strict() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    options = settings["tool"]["pytest"]["ini_options"]
    assert options["xfail_strict"] is True
    assert options["filterwarnings"][0] == "error"


def test_the_study_in_the_readme_is_a_valid_config() -> None:
    from medssl.config import validate_config
    from medssl.pipelines.study import StudyConfig

    block = re.search(r"```yaml\n(.+?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    config = validate_config(yaml.safe_load(block[1]), StudyConfig)
    assert list(config.inits) == ["random", "imagenet", "rotation", "inpainting"]


@pytest.mark.parametrize("module", ["medssl", "medssl.__main__", "medssl.cli", "medssl.reports"])
def test_light_modules_import_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_the_report_imports_no_torch() -> None:
    code = (
        "import importlib, pkgutil, sys, medssl.reports as reports\n"
        "for found in pkgutil.iter_modules(reports.__path__, 'medssl.reports.'):\n"
        "    importlib.import_module(found.name)\n"
        "print([m for m in ('torch', 'monai', 'mlflow') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_what_make_runs_is_compiled_once() -> None:
    assert "\nunexport PYTHONDONTWRITEBYTECODE\n" in (ROOT / "Makefile").read_text()
