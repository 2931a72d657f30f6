"""Configurations: strict pydantic models over YAML, with errors written for people.

A file is whole (no inheritance). Unknown keys are refused. A component's config is chosen by its
``name``. Every error gives the path inside the YAML, the value found, and the nearest valid name.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializationInfo,
    ValidationError,
)
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, core_schema

from medssl.errors import ConfigError

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """Base of every configuration: frozen, and unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=()
    )

    def digest(self) -> str:
        """Return the sha256 of the resolved configuration, independent of the order of keys."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_yaml(self) -> str:
        """Return the resolved configuration as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=100)


Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.+]+$")]
"""A name that people give to an init or a task: it becomes part of file names."""


class ComponentConfig(Config):
    """Base of the configurations that are chosen by ``name``."""

    name: str


class Members(Protocol):
    """What `component` needs of a registry."""

    kind: str

    def names(self) -> list[str]:
        """Return the names of all members."""

    def config_class(self, name: str) -> type[Any]:
        """Return the class that a member's config is validated against."""


class component:  # noqa: N801  (reads as a marker: Annotated[ComponentConfig, component(INITS)])
    """Marks a field that holds the config of one member of a registry, chosen by ``name``.

    ``rotation`` is short for ``{name: rotation}``. Use it as
    ``Annotated[ComponentConfig, component(REGISTRY)]``.

    Args:
        members: the registry.
        without: members that this field does not take.
    """

    def __init__(self, members: Members, without: Sequence[str] = ()) -> None:
        self._members = members
        self._without = frozenset(without)

    def _names(self) -> list[str]:
        return [name for name in self._members.names() if name not in self._without]

    def __get_pydantic_core_schema__(
        self, _source: Any, _handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self._validate,
            serialization=core_schema.plain_serializer_function_ser_schema(_dump, info_arg=True),
        )

    def __get_pydantic_json_schema__(
        self, _: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        names = self._names()
        configs = [
            handler(self._members.config_class(name).__pydantic_core_schema__) for name in names
        ]
        return {"anyOf": [{"type": "string", "enum": names}, *configs]}

    def _validate(self, value: Any) -> ComponentConfig:
        members = self._members
        if type(value) is ComponentConfig:  # a default, by name alone
            value = value.name
        if isinstance(value, ComponentConfig):
            return value
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            raise PydanticCustomError(
                "component",
                "give the {kind} as {name: …}; there are: {names}",
                {"kind": members.kind, "names": ", ".join(self._names())},
            )
        name = value["name"]
        if name not in self._names():
            raise PydanticCustomError(
                "component_name",
                "there is no {kind} {name}.{hint} There are: {names}",
                {
                    "kind": members.kind,
                    "name": repr(name),
                    "hint": _hint(name, self._names()),
                    "names": ", ".join(self._names()),
                },
            )
        cls = members.config_class(name)
        try:
            config: ComponentConfig = cls.model_validate(value)
        except ValidationError as error:
            nested = [(details, cls) for details in error.errors(include_url=False)]
            raise PydanticCustomError("nested", "nested", {"errors": nested}) from None
        return config


def _dump(value: ComponentConfig, info: SerializationInfo) -> dict[str, Any]:
    return value.model_dump(mode=info.mode)


def load_config(path: Path, cls: type[C], overrides: Sequence[str] = ()) -> C:
    """Read a YAML file, apply ``section.key=value`` overrides, and validate.

    Raises:
        ConfigError: the file is missing or not YAML, or the content does not fit ``cls``; one line
            a mistake, each with its path inside the file.
    """
    return validate_config(read_yaml(path), cls, overrides, source=path.name)


def validate_config(
    content: Mapping[str, Any], cls: type[C], overrides: Sequence[str] = (), source: str = "config"
) -> C:
    """Validate content that is already read. See `load_config`."""
    merged = _with_overrides(content, overrides)
    try:
        return cls.model_validate(merged)
    except ValidationError as error:
        lines = []
        found = error.errors(include_url=False)
        for details in found:
            if details["type"] == "too_short" and any(
                other["loc"][: len(details["loc"])] == details["loc"] and other is not details
                for other in found
            ):
                continue  # a list is only short because what it holds does not fit
            lines.extend(_explain(details, cls, ()))
        problems = "\n".join(f"  {line}" for line in lines)
        raise ConfigError(f"{source} does not fit:\n{problems}") from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """A YAML loader that refuses a key written twice, of which YAML would keep the last."""


def _construct_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node)
        if not isinstance(key, Hashable):
            continue  # construct_mapping refuses it below
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is given twice", key_node.start_mark
            )
        seen.add(key)
    return dict(loader.construct_mapping(node, deep=True))


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the content of a YAML file.

    Raises:
        ConfigError: the file is missing, not YAML, empty, or gives a key twice.
    """
    if not path.is_file():
        if path.is_dir():
            raise ConfigError(
                f"{path.name!r} is a folder; give a config file. `medssl init FOLDER` writes one "
                "for a folder of scans."
            )
        raise ConfigError(f"there is no config file {path.name!r} at the path given.")
    try:
        # A loader derived from SafeLoader: builds plain data only.
        content = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_UniqueKeyLoader)  # noqa: S506
    except UnicodeDecodeError:
        raise ConfigError(
            f"{path.name} is not UTF-8 text. Save it as UTF-8 in your editor; from Windows' usual "
            f"encoding: iconv -f WINDOWS-1252 -t UTF-8 {path.name} > new.yaml"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{path.name} cannot be read: {error.strerror}. Check its permissions."
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}," if mark else ""
        problem = getattr(error, "problem", None) or "cannot be read"
        raise ConfigError(f"{path.name}:{line} not valid YAML: {problem}.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path.name} holds no keys. Start from a file in configs/.")
    return content


def _with_overrides(content: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    merged: dict[str, Any] = json.loads(json.dumps(content, default=str))
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise ConfigError(f"override {override!r} is not of the form section.key=value.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"override {override!r}: the value is not valid YAML.") from None
        *sections, key = path.split(".")
        node: Any = merged
        for depth, section in enumerate(sections):
            node = _step_into(node, section, ".".join(sections[: depth + 1]), override)
        if isinstance(node, list):
            node[_list_position(node, key, path, override)] = value
        else:
            node[key] = value
    return merged


def _step_into(node: Any, section: str, path: str, override: str) -> Any:
    key: Any = _list_position(node, section, path, override) if isinstance(node, list) else section
    child = node[key] if isinstance(node, list) else node.get(key)
    if child is None:
        child = node[key] = {}
    if isinstance(child, str):  # `pretext: rotation` is short for {name: rotation}
        child = node[key] = {"name": child}
    if not isinstance(child, (dict, list)):
        raise ConfigError(f"override {override!r}: {path} is a single value, not a section.")
    return child


def _list_position(node: list[Any], key: str, path: str, override: str) -> int:
    if not node:
        raise ConfigError(f"override {override!r}: {path} lies in an empty list.")
    if not key.isdecimal() or int(key) >= len(node):
        raise ConfigError(
            f"override {override!r}: {path} must be a position from 0 to {len(node) - 1}."
        )
    return int(key)


def _explain(details: ErrorDetails, cls: type[Any], prefix: tuple[Any, ...]) -> list[str]:
    """Turn one pydantic error into lines for people."""
    location = (*prefix, *details["loc"])
    context = details.get("ctx", {})
    if details["type"] == "nested":
        lines = []
        for inner, inner_cls in context["errors"]:
            lines.extend(_explain(inner, inner_cls, location))
        return lines
    where = ".".join(str(part) for part in location)
    if details["type"] == "extra_forbidden":
        owner = _class_at(cls, details["loc"][:-1])
        fields = list(owner.model_fields) if owner else []
        hint = _hint(str(details["loc"][-1]), fields)
        known = f" Known keys: {', '.join(fields)}." if fields and not hint else ""
        return [f"{where}: unknown key (value {_short(details['input'])}).{hint}{known}"]
    if details["type"] == "missing":
        return [f"{where}: is required and missing."]
    message = details["msg"].removeprefix("Value error, ").rstrip(".")
    message = message[:1].lower() + message[1:]
    if not where:  # a rule on the whole file names the keys it is about
        return [f"{message}."]
    return [f"{where}: {message} (found {_short(details['input'])})."]


def _class_at(cls: type[Any], location: Sequence[Any]) -> type[Any] | None:
    current: Any = cls
    for part in location:
        if isinstance(part, int):
            continue
        fields = getattr(current, "model_fields", {})
        if part not in fields:
            return None
        current = _model_in(fields[part].annotation)
        if current is None:
            return None
    return current if hasattr(current, "model_fields") else None


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        found = _model_in(argument)
        if found is not None:
            return found
    return None


def _hint(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
