"""What may leave the run folder for MLflow: a list, and nothing beside it.

Settings and labels go by their name, artifacts by theirs, and a configuration goes as a copy that
keeps numbers, choices that medssl itself names, and the names that people give to a study, an init,
a task, a class or a backbone's variant. Those names are in every table and figure, so they are
chosen to be read. All other text (folders, files, columns, addresses, patterns, salts) stays.
What does leave is searched for the account's name and home as well.
"""

from __future__ import annotations

import functools
import getpass
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args, get_origin

import yaml

from medssl.config import Config

PUBLIC_CONFIG = "config.public.yaml"
WITHHELD = "(withheld)"
_NOTE = f"# What reads {WITHHELD} is in config.yaml of the run folder, which stays there.\n"

# Settings whose text may leave, beside numbers. A setting of a backbone may, whichever it is.
_PARAMS = {
    "name", "pretext", "init", "inits", "backbone", "task", "tasks", "protocol", "protocols",
    "config_digest", "steps", "global_batch_size", "seed", "seeds", "chance_level",
    "num_labelled_patients",
}  # fmt: skip
_BACKBONE = "backbone."

# Labels that may leave; of the last three, with whatever follows.
_TAGS = {
    "pretext", "pool_patients", "ended_by", "problem_kind", "num_warnings", "init_percent",
    "init_origin", "init_sha256",
}  # fmt: skip
_TAG_FAMILIES = ("health", "nonfinite", "changed")

# Fields of configurations that hold a name someone chose to be read, see above.
_NAMED = {
    "name", "label", "variant", "reference", "experiment", "classes", "label_columns", "unit",
    "modalities", "without_flags", "labelled_patients", "device",
}  # fmt: skip
_NAME = re.compile(r"[\w.+\-:% ]{1,64}")
_NAMES = re.compile(rf"{_NAME.pattern}(?:, {_NAME.pattern})*")
_SHA256 = re.compile(r"[0-9a-f]{64}")

# Artifacts: tables, report and configuration at the top of a run folder, and checkpoints.
_TOP = {
    PUBLIC_CONFIG, "report.html", "report_without_images.html", "results.csv", "comparisons.csv",
    "labels_saved.csv", "learning_curves.csv", "power.csv", "baselines.csv",
}  # fmt: skip
_CHECKPOINTS = "checkpoints"
_CHECKPOINT_FILES = {"backbone.safetensors", "contract.json", "validation.json"}
TEXT_SUFFIXES = {".yaml", ".html", ".csv", ".json"}

_PLACE = re.compile(r"""(?:^|[\s='"(\[,:])(?:~?/|\.{1,2}/|\\\\|[A-Za-z]:[\\/])\S""")
_SERVICE_ACCOUNTS = {"root", "medssl", "user", "app"}  # accounts that name nobody


def public_param(key: str, value: Any) -> str | None:
    """Return a setting as text, or None where it stays in the journal.

    Args:
        key: name of the setting.
        value: plain JSON content.
    """
    if key not in _PARAMS and not key.startswith(_BACKBONE):
        return None
    if isinstance(value, str) and not _NAMES.fullmatch(value):
        return None
    return public_text(value)


def public_tag(key: str, value: Any) -> str | None:
    """Return a label as text, or None where it stays in the journal."""
    family, _, rest = key.partition(".")
    if family == "changed":
        return public_param(rest, value)
    if key not in _TAGS and family not in _TAG_FAMILIES:
        return None
    text = public_text(value)
    return None if _PLACE.search(text) else text


def public_name(name: str) -> str:
    """Return a name that someone chose to be read; anything else, a path for example, withheld."""
    return public_text(name) if _NAMES.fullmatch(name) else WITHHELD


def public_text(value: Any) -> str:
    """Return text, or JSON, without the name of this account and its home."""
    text = value if isinstance(value, str) else json.dumps(value)
    for private in _private_words():
        text = private.sub("(a name)", text)
    return text


def may_leave(relative: str) -> bool:
    """Return whether a file of the run folder, named relative to it, may be sent."""
    path = PurePosixPath(relative)
    if path.parent == PurePosixPath("."):
        return path.name in _TOP
    return len(path.parts) == 3 and path.parts[0] == _CHECKPOINTS and path.name in _CHECKPOINT_FILES


def public_config(config: Config) -> str:
    """Return a configuration as YAML, with all that is not on the list withheld."""
    content = yaml.safe_dump(_shown(config), sort_keys=False, width=100)
    return _NOTE + public_text(content)


def public_command(command: str, config: Config) -> str:
    """Return a command line without overrides of withheld settings, and without folders.

    Args:
        command: as a shell takes it.
        config: what came of it.
    """
    return shlex.join(_public_argument(argument, config) for argument in shlex.split(command))


def _public_argument(argument: str, config: Config) -> str:
    key, equals, value = argument.partition("=")
    if not equals:
        return Path(argument).name or argument
    if argument.startswith("-"):
        return f"{key}={Path(value).name or value}"
    node: Any = _shown(config)
    for part in key.split("."):
        if isinstance(node, Mapping):
            node = node.get(part, WITHHELD)
        elif isinstance(node, list) and part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
        else:
            node = WITHHELD
    return f"{key}={WITHHELD}" if WITHHELD in json.dumps(node) else argument


def _shown(config: Config) -> dict[str, Any]:
    """Return a configuration as plain content, with only what may be shown."""
    return {
        name: _shown_value(getattr(config, name), name, _choices(field.annotation))
        for name, field in type(config).model_fields.items()
    }


def _shown_value(value: Any, field: str, choices: frozenset[str]) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Config):
        return _shown(value)
    if isinstance(value, Mapping):
        return {
            (key if _NAME.fullmatch(str(key)) else WITHHELD): _shown_value(item, field, choices)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [_shown_value(item, field, choices) for item in value]
    if isinstance(value, str) and (
        value in choices or _SHA256.fullmatch(value) or (field in _NAMED and _NAME.fullmatch(value))
    ):
        return value
    return WITHHELD


def _choices(annotation: Any) -> frozenset[str]:
    """Return the words that a field's type itself names."""
    if get_origin(annotation) is Literal:
        return frozenset(word for word in get_args(annotation) if isinstance(word, str))
    return frozenset().union(*map(_choices, get_args(annotation)))


def _private_words() -> tuple[re.Pattern[str], ...]:
    home = Path.home()
    return _patterns(home, frozenset({home.name} | _account()))


@functools.lru_cache(maxsize=4)  # asked for every name of a metric, beside training
def _patterns(home: Path, names: frozenset[str]) -> tuple[re.Pattern[str], ...]:
    found = []
    if len(home.parts) > 1 and home.name not in _SERVICE_ACCOUNTS:
        found.append(re.compile(re.escape(str(home))))
    for name in sorted(names):
        if len(name) > 1 and name.lower() not in _SERVICE_ACCOUNTS:
            found.append(re.compile(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])", re.IGNORECASE))
    return tuple(found)


def _account() -> set[str]:
    try:
        return {getpass.getuser()}
    except (KeyError, OSError):  # this account has no name
        return set()
