from __future__ import annotations

import getpass

import pytest

from medssl.tracking.privacy import public


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("init.path", "weights.pth"),
        ("index", "/data/clinic/DOE_JOHN"),
        ("index", "~/scans"),
        ("index", "../shared/data"),
        ("note", r"read from C:\scans\DOE"),
        ("labels", ["/mnt/a.csv", "/mnt/b.csv"]),
        ("out_folder", "runs/x"),
    ],
)
def test_places_are_not_sent(key: str, value: object) -> None:
    assert public(key, value) == "(a path)"


@pytest.mark.parametrize("value", ["pretrain/rotation", "3 labels/patient", "mm", "a/b", "1.0"])
def test_ordinary_values_are_sent_as_they_are(value: str) -> None:
    assert public("name", value) == value


def test_numbers_and_lists_are_sent_as_json() -> None:
    assert public("steps", 3) == "3"
    assert public("spacing_mm", [1.0, 2.5]) == "[1.0, 2.5]"


def test_the_name_of_the_account_is_not_sent(monkeypatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "jdoe")
    assert public("note", "trained by JDoe on Monday") == "trained by (a name) on Monday"
    assert public("note", "jdoering") == "jdoering"
