"""What may leave the run folder: settings, labels, files, configurations, command lines."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import Literal

import pytest
import yaml
from pydantic import Field

from medssl.config import ComponentConfig, Config
from medssl.tracking.privacy import (
    WITHHELD,
    may_leave,
    public_command,
    public_config,
    public_param,
    public_tag,
    public_text,
)


class Part(ComponentConfig):
    name: Literal["part"] = "part"
    mode: Literal["mean", "max"] = "mean"
    table: Path = Path("/data/DOE_JOHN/labels.csv")
    column: str = "Patient DOE^JOHN"


class Whole(Config):
    name: str = "liver"
    rate: float = 0.1
    salt: str | None = "secret"
    classes: tuple[str, ...] = ("liver", "DOE^JOHN")
    folders: tuple[Path, ...] = (Path("DOE_JOHN"),)
    parts: dict[str, Part] = Field({"first": Part(), "DOE^JOHN": Part()})


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("steps", 3, "3"),
        ("seed", None, "null"),
        ("pretext", "relative_position", "relative_position"),
        ("inits", "random, imagenet", "random, imagenet"),
        ("backbone.depth", 18, "18"),
        ("backbone.variant", "resnet18.a1_in1k", "resnet18.a1_in1k"),
    ],
)
def test_settings_on_the_list_are_sent(key: str, value: object, text: str) -> None:
    assert public_param(key, value) == text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("index", "data"),
        ("index.folder", "scans"),
        ("init.path", "weights.pth"),
        ("anything.new", 1),
        ("name", "/data/clinic/DOE_JOHN"),
        ("task", "DOE^JOHN"),
        ("tasks", "liver, ~/scans"),
        ("backbone.variant", "C:\\scans\\DOE"),
    ],
)
def test_other_settings_are_not_sent(key: str, value: object) -> None:
    assert public_param(key, value) is None


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("pool_patients", 12, "12"),
        ("health.rotation", "step 3: healthy (acc 0.4, trivial 0.25)", ...),
        ("changed.steps", 20, "20"),
        ("changed.index", "data", None),
        ("warnings", "the table of DOE^JOHN has no rows", None),
        ("problem", "there is no column DOE", None),
        ("mlflow.user", "jdoe", None),
        ("health", "see /data/DOE", None),
    ],
)
def test_labels_are_sent_by_a_list(key: str, value: object, text: object) -> None:
    assert public_tag(key, value) == (value if text is ... else text)


@pytest.mark.parametrize(
    ("name", "leaves"),
    [
        ("config.public.yaml", True),
        ("report.html", True),
        ("results.csv", True),
        ("checkpoints/rotation/backbone.safetensors", True),
        ("checkpoints/rotation/contract.json", True),
        ("config.yaml", False),
        ("provenance.json", False),
        ("predictions.parquet", False),
        ("figures/pretext_rotation.png", False),
        ("checkpoints/rotation/state.pt", False),
        ("checkpoints/rotation/DOE_JOHN.csv", False),
        ("elsewhere/report.html", False),
    ],
)
def test_files_are_sent_by_a_list(name: str, leaves: bool) -> None:
    assert may_leave(name) is leaves


def test_a_configuration_keeps_numbers_choices_and_names_and_nothing_else() -> None:
    shown = yaml.safe_load(public_config(Whole()))
    part = {"name": "part", "mode": "mean", "table": WITHHELD, "column": WITHHELD}
    assert shown == {
        "name": "liver",
        "rate": 0.1,
        "salt": WITHHELD,
        "classes": ["liver", WITHHELD],
        "folders": [WITHHELD],
        "parts": {"first": part, WITHHELD: part},
    }


def test_a_command_line_keeps_overrides_of_what_may_be_shown() -> None:
    command = (
        "medssl study liver.yaml rate=0.1 parts.first.column=DOE salt=x nowhere=y --out=runs/a"
    )
    assert public_command(command, Whole()) == (
        f"medssl study liver.yaml rate=0.1 'parts.first.column={WITHHELD}' 'salt={WITHHELD}' "
        f"'nowhere={WITHHELD}' --out=a"
    )


def test_a_command_names_no_folder() -> None:
    command = "medssl study ../DOE_JOHN/liver.yaml --out DOE_JOHN/runs/a --resume"
    assert public_command(command, Whole()) == "medssl study liver.yaml --out a --resume"


def test_the_name_of_the_account_and_its_home_are_not_sent(monkeypatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "jdoe")
    monkeypatch.setattr(Path, "home", lambda: Path("/homes/jdoe"))
    assert public_text("trained by JDoe on Monday") == "trained by (a name) on Monday"
    assert public_text("in /homes/jdoe/scans") == "in (a name)/scans"
    assert public_text("study_of_jdoe") == "study_of_(a name)"
    assert public_text("jdoering") == "jdoering"
