from __future__ import annotations

import sys

import pytest

from medssl.errors import MachineError
from medssl.executors import EXECUTORS
from medssl.executors.ray import Config, RayExecutor


def test_missing_ray_is_reported_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MachineError, match=r"pip install 'medssl\[ray\]'"):
        list(RayExecutor().map(abs, [1]))


def test_no_items_start_no_cluster(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert list(RayExecutor().map(abs, [])) == []


def test_registry_builds_the_ray_executor():
    assert isinstance(EXECUTORS.build(Config()), RayExecutor)
