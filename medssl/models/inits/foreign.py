"""The init that takes weights of any other project, renamed by stated rules.

The rules are written out, and nothing is guessed: every tensor of the backbone is set exactly
once, every tensor of the file is mapped or ignored by name, and shapes and types agree. Where they
do not, the message proposes rules. What the network saw while it was trained (spacing,
intensities) stands in no such file; whoever uses it answers for that.

No family of medssl's backbones can hold nnssl's residual encoders (instance norm, leaky ReLU) or
the encoder of Models Genesis (a 3D U-Net), so there are no ready rules for those: their files load
once a backbone family with those layers exists, which is one file in `medssl.models.backbones`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import field_validator

from medssl.config import ComponentConfig
from medssl.models.backbones.base import Backbone
from medssl.models.inits._mapping import map_state
from medssl.models.inits._tensor_files import Sha256, check_stated_hash, read_state
from medssl.models.inits.base import Init, LoadReport, load_strict


class Config(ComponentConfig):
    r"""Which file, and how its names become the backbone's.

    Attributes:
        path: a safetensors file, or one of ``torch.save``, read without running its code.
        sha256: of its content; refused if it differs. Recorded in any case.
        section: the key under which the tensors lie, for example ``state_dict``; parts of nested
            ones are divided by dots. None: the file is the dictionary of tensors.
        key_map: pairs (regular expression, replacement), applied in order to every name, for
            example ``[["^module\\.encoder\\.", "net."]]``. Each must match some name.
        ignore: regular expressions of the names, in the file, that belong to its head or decoder.
            Each must match some name.
    """

    name: Literal["foreign"] = "foreign"
    path: Path
    sha256: Sha256 | None = None
    section: str | None = None
    key_map: tuple[tuple[str, str], ...] = ()
    ignore: tuple[str, ...] = ()

    @field_validator("key_map")
    @classmethod
    def _rules_are_valid(cls, rules: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        for pattern, replacement in rules:
            _compiled(pattern)
            try:  # the empty alternative matches, so that the replacement is parsed
                re.sub(f"{pattern}|", replacement, "")
            except (re.error, IndexError) as error:
                raise ValueError(
                    f"the replacement {replacement!r} does not fit {pattern!r}: {error}"
                ) from None
        return rules

    @field_validator("ignore")
    @classmethod
    def _patterns_are_valid(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            _compiled(pattern)
        return patterns


class ForeignInit(Init):
    """Every tensor of the backbone from a file of another project."""

    config: Config

    def apply(self, backbone: Backbone) -> LoadReport:
        """Load the file; see `Init.apply`."""
        config = self.config
        digest = check_stated_hash(config.path, config.sha256)
        source = config.path.name
        mapped = map_state(
            backbone,
            read_state(config.path, config.section),
            rules=config.key_map,
            ignore=config.ignore,
            source=source,
        )
        loaded = load_strict(backbone, mapped.state, source)
        return LoadReport(
            source=source,
            loaded=loaded,
            unexpected=mapped.ignored,
            adapted=mapped.adapted,
            percent=100.0 * loaded / len(backbone.state_dict()),
            sha256=digest,
        )


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
