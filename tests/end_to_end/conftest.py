"""One undisturbed tiny study, shared by the end-to-end tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from studies import medssl, settings, write_archive, write_config


@dataclass(frozen=True)
class Study:
    """A finished study and where it came from."""

    place: Path
    archive: Path
    config: Path
    run: Path
    printed: str


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Run the tiny study once, undisturbed."""
    place = tmp_path_factory.mktemp("study")
    archive = write_archive(place / "archive")
    config = write_config(place / "tiny.yaml", settings(archive))
    done = medssl("study", config, cwd=place)
    assert done.returncode == 0, done.stderr
    return Study(place, archive, config, place / "runs" / "tiny", done.stdout + done.stderr)
