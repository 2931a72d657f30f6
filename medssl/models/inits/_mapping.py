"""Rename the tensors of a foreign file by stated rules: all of them, or an error that helps."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from medssl.errors import ConfigError, WeightsError
from medssl.models.backbones.base import Backbone
from medssl.models.inits._tensor_files import COUNTER, fill_counters
from medssl.models.inits.base import name_some

_PROPOSALS = 3
"""Prefix maps that a message proposes, at most."""


@dataclass(frozen=True)
class MappedState:
    """A foreign file's tensors under the backbone's names.

    Attributes:
        state: every tensor of the backbone, and no other.
        ignored: names, in the file, of the tensors that were left out as stated.
        adapted: (tensor, how) for what is not the file's own.
    """

    state: dict[str, Tensor]
    ignored: tuple[str, ...]
    adapted: tuple[tuple[str, str], ...]


def map_state(
    backbone: Backbone,
    file_state: Mapping[str, Tensor],
    *,
    rules: Sequence[tuple[str, str]],
    ignore: Sequence[str],
    source: str,
) -> MappedState:
    """Rename a file's tensors so that each belongs to exactly one of the backbone's.

    Args:
        backbone: what is to be filled.
        file_state: tensors by the file's names.
        rules: (regular expression, replacement), applied in order to every name (`re.sub`).
        ignore: regular expressions; the file's tensors in which one is found are left out.
        source: the file's name, for messages.

    Raises:
        ConfigError: a rule or a pattern matches nothing.
        WeightsError: a tensor of the backbone would not be set, or be set twice, or a tensor of
            the file is neither mapped nor ignored.
    """
    ignored = tuple(name for name in file_state if any(re.search(p, name) for p in ignore))
    for pattern in ignore:
        if not any(re.search(pattern, name) for name in file_state):
            raise ConfigError(
                f"init.ignore: {pattern!r} matches no tensor of {source}. Its names begin with "
                f"{_beginnings(file_state)}. Correct the pattern or take it out."
            )
    left_out = set(ignored)
    names = {name: name for name in file_state if name not in left_out}
    for pattern, replacement in rules:
        renamed = {own: re.sub(pattern, replacement, name) for own, name in names.items()}
        if not any(re.search(pattern, name) for name in names.values()):
            raise ConfigError(
                f"init.key_map: {pattern!r} matches no tensor of {source}. At this rule the names "
                f"begin with {_beginnings(names.values())}. Correct the rule or take it out."
            )
        names = renamed
    state: dict[str, Tensor] = {}
    owners: dict[str, str] = {}
    for own, name in names.items():
        if name in owners:
            raise WeightsError(
                f"{source}: its tensors {owners[name]} and {own} both become {name}. "
                "Make init.key_map tell them apart, or put one of them into init.ignore."
            )
        owners[name] = own
        state[name] = file_state[own]
    wanted = backbone.state_dict()
    adapted = fill_counters(state, wanted)
    _check_complete(backbone, wanted, state, owners, source)
    return MappedState(state, ignored, tuple(adapted))


def _check_complete(
    backbone: Backbone,
    wanted: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    owners: Mapping[str, str],
    source: str,
) -> None:
    missing = [name for name in wanted if name not in state]
    extra = [name for name in state if name not in wanted]
    if not missing and not extra:
        return
    problems = []
    if missing:
        problems.append(
            f"{len(missing)} of the {len(wanted)} tensors of backbone {backbone.describe()} are "
            f"not in the file: {name_some(missing)}"
        )
    if extra:
        shown = [owners[n] if owners[n] == n else f"{owners[n]} (as {n})" for n in extra]
        problems.append(f"{len(extra)} of its tensors belong to none: {name_some(shown)}")
    raise WeightsError(f"{source}: {'; '.join(problems)}. {_proposal(wanted, state)}")


def _proposal(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """Propose prefix maps: pairs of names that end alike, of tensors of one shape."""
    spare = [name for name in state if name not in wanted]
    votes: Counter[tuple[str, str]] = Counter()
    for name in wanted:
        if name in state or name.endswith(COUNTER):
            continue
        alike = [
            (_common_end(name, other), other)
            for other in spare
            if state[other].shape == wanted[name].shape
        ]
        best = max((length for length, _ in alike), default=0)
        nearest = [other for length, other in alike if length == best]
        if best > 1 and len(nearest) == 1:  # a last word in common (weight) says nothing
            other = nearest[0]
            end = ".".join(name.split(".")[-best:])
            votes[other.removesuffix(end), name.removesuffix(end)] += 1
    if not votes:
        return (
            "No tensor of the file ends like one that is missing and has its shape: this file "
            "was made with another architecture; choose the backbone it belongs to."
        )
    rules = ", ".join(
        f"['^{re.escape(found)}', '{ours}'] ({count} tensors)"
        for (found, ours), count in votes.most_common(_PROPOSALS)
    )
    return (
        f"Rules for init.key_map that would fit: {rules}. Name what belongs to a head or decoder "
        "in init.ignore."
    )


def _common_end(first: str, second: str) -> int:
    """Return how many of the last words of two dotted names agree."""
    count = 0
    for a, b in zip(reversed(first.split(".")), reversed(second.split(".")), strict=False):
        if a != b:
            break
        count += 1
    return count


def _beginnings(names: Iterable[str]) -> str:
    return name_some(sorted({name.partition(".")[0] for name in names}))
