"""Components are found by the name of their file."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from medssl.errors import ConfigError
from medssl.registry import Registry

BASE = """
class Fruit:
    def __init__(self, config, *, ripe=False):
        self.config = config
        self.ripe = ripe
"""
APPLE = """
from fruits.base import Fruit
from fruits._peel import Peel

class Config:
    name = "apple"

class Apple(Fruit):
    pass

class _HalfApple(Fruit):
    pass
"""
PEEL = """
from fruits.base import Fruit

class Peel(Fruit):
    pass
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of fruits, one file each, importable while the test runs."""
    folder = tmp_path / "fruits"
    folder.mkdir()
    add(folder, "__init__", "")
    add(folder, "base", BASE)
    add(folder, "_peel", PEEL)
    add(folder, "apple", APPLE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] in ("fruits", "melons")]:
        del sys.modules[name]


@pytest.fixture
def fruits(package: Path) -> Registry[Any]:
    return Registry("fruit", "fruits", "Fruit")


def add(folder: Path, name: str, content: str) -> None:
    (folder / f"{name}.py").write_text(textwrap.dedent(content))


def install_melon(folder: Path) -> None:
    """Install a distribution beside the package that registers a melon by entry point."""
    add(folder.parent, "melons", "from fruits.base import Fruit\nclass Melon(Fruit): pass\n")
    info = folder.parent / "melons-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: melons\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fruits]\nmelon = melons\n")
    importlib.invalidate_caches()


def test_a_member_is_named_like_its_file(fruits: Registry[Any]) -> None:
    assert fruits.names() == ["apple"]
    assert list(fruits) == ["apple"]
    assert fruits.load("apple").__name__ == "Apple"


def test_listing_names_imports_no_member(fruits: Registry[Any]) -> None:
    fruits.names()
    assert "fruits.apple" not in sys.modules


def test_a_new_file_is_a_new_member_without_any_other_edit(
    fruits: Registry[Any], package: Path
) -> None:
    add(package, "pear", "from fruits.base import Fruit\nclass Pear(Fruit): pass\n")
    importlib.invalidate_caches()
    assert fruits.names() == ["apple", "pear"]
    assert fruits.load("pear").__name__ == "Pear"


def test_build_passes_the_config_and_the_rest(fruits: Registry[Any]) -> None:
    config = fruits.config_class("apple")()
    built = fruits.build(config, ripe=True)
    assert built.config is config
    assert built.ripe is True


def test_a_misspelt_name_gets_the_nearest_and_all(fruits: Registry[Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        fruits.load("aple")
    assert str(caught.value) == "there is no fruit 'aple'. Did you mean 'apple'? There are: apple."


def test_a_name_like_no_other_gets_the_list_alone(fruits: Registry[Any]) -> None:
    assert fruits.nearest("xyz") is None
    with pytest.raises(ConfigError) as caught:
        fruits.config_class("xyz")
    assert str(caught.value) == "there is no fruit 'xyz'. There are: apple."


@pytest.mark.parametrize("name", ["base", "_peel", "__init__", "apple.Apple", "../apple"])
def test_what_is_no_member_cannot_be_loaded(fruits: Registry[Any], name: str) -> None:
    with pytest.raises(ConfigError, match="there is no fruit"):
        fruits.load(name)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("from fruits.base import Fruit\n", 0),
        ("from fruits.base import Fruit\nclass A(Fruit): pass\nclass B(Fruit): pass\n", 2),
    ],
)
def test_a_file_defines_exactly_one_member(
    fruits: Registry[Any], package: Path, content: str, found: int
) -> None:
    add(package, "plum", content)
    importlib.invalidate_caches()
    with pytest.raises(ConfigError) as caught:
        fruits.load("plum")
    assert str(caught.value) == (
        f"fruit 'plum': its file must define exactly one public subclass of Fruit, found {found}."
    )


def test_a_file_without_a_config_says_so(fruits: Registry[Any], package: Path) -> None:
    add(package, "pear", "from fruits.base import Fruit\nclass Pear(Fruit): pass\n")
    importlib.invalidate_caches()
    with pytest.raises(ConfigError, match="fruit 'pear': its file defines no Config class"):
        fruits.config_class("pear")


def test_third_parties_register_by_entry_point(fruits: Registry[Any], package: Path) -> None:
    install_melon(package)
    assert fruits.names() == ["apple", "melon"]
    assert fruits.load("melon").__name__ == "Melon"


def test_an_error_inside_a_member_is_not_hidden(fruits: Registry[Any], package: Path) -> None:
    add(package, "fig", "import no_such_library\n")
    importlib.invalidate_caches()
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        fruits.load("fig")
