"""What commands print."""

from __future__ import annotations

import json
import math

import pytest

from medssl.cli.output import print_json


def test_the_document_is_json_whatever_its_numbers_are(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    print_json({"a": [1.5, math.nan, {"b": (math.inf, -math.inf)}], 2: True})
    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found == {"a": [1.5, None, {"b": [None, None]}], "2": True}
