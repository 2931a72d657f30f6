"""Find components by name: the name in YAML is the file's name.

A registry looks into one package folder (every module but ``base`` and private ones is a member)
and at one entry-point group (third parties). Listing names imports nothing; a member's module is
imported when the member is asked for.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, Generic, TypeVar

from medssl.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """The members of one kind of component.

    Args:
        kind: what a member is called in messages, for example ``"pretext task"``.
        package: the package whose modules are the members; also the entry-point group.
        base: name of the class in ``<package>.base`` that every member derives from.

    A member module defines exactly one public class derived from the base and, where the kind is
    configurable, a class named ``Config``.
    """

    def __init__(self, kind: str, package: str, base: str) -> None:
        self.kind = kind
        self._package = package
        self._base = base

    def names(self) -> list[str]:
        """Return the names of all members, sorted, without importing them."""
        return sorted({*self._own_modules(), *(point.name for point in self._points())})

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def load(self, name: str) -> type[T]:
        """Return the member class called ``name``.

        Raises:
            ConfigError: there is no such member; the message names the nearest one.
        """
        module = self._module(name)
        base = getattr(importlib.import_module(f"{self._package}.base"), self._base)
        found: list[type[Any]] = [
            candidate
            for candidate_name, candidate in inspect.getmembers(module, inspect.isclass)
            if issubclass(candidate, base)
            and candidate is not base
            and candidate.__module__ == module.__name__
            and not candidate_name.startswith("_")
        ]
        if len(found) != 1:
            raise ConfigError(
                f"{self.kind} {name!r}: its file must define exactly one public subclass of "
                f"{self._base}, found {len(found)}."
            )
        member: type[T] = found[0]
        return member

    def config_class(self, name: str) -> type[Any]:
        """Return the ``Config`` class that the member's file defines."""
        module = self._module(name)
        try:
            config: type[Any] = module.Config
        except AttributeError:
            raise ConfigError(f"{self.kind} {name!r}: its file defines no Config class.") from None
        return config

    def build(self, config: Any, *args: Any, **kwargs: Any) -> T:
        """Return an instance of the member that ``config.name`` names."""
        member: Callable[..., T] = self.load(config.name)
        return member(config, *args, **kwargs)

    def nearest(self, name: str) -> str | None:
        """Return the member whose name is nearest to a misspelt one, if any is near."""
        return next(iter(difflib.get_close_matches(name, self.names(), n=1)), None)

    def _own_modules(self) -> list[str]:
        package = importlib.import_module(self._package)
        return [
            module.name
            for module in pkgutil.iter_modules(package.__path__)
            if module.name != "base" and not module.name.startswith("_")
        ]

    def _points(self) -> list[Any]:
        return list(entry_points(group=self._package))

    def _module(self, name: str) -> ModuleType:
        if name in self._own_modules():
            return importlib.import_module(f"{self._package}.{name}")
        for point in self._points():
            if point.name == name:
                module: ModuleType = point.load()
                return module
        near = self.nearest(name)
        hint = f" Did you mean {near!r}?" if near else ""
        raise ConfigError(
            f"there is no {self.kind} {name!r}.{hint} There are: {', '.join(self.names())}."
        )
