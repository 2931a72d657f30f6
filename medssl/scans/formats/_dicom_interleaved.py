"""Tell apart volumes that one series interleaves: magnitude and phase, or several acquisitions.

Their slices lie at the same places, or between each other. Image type and acquisition number decide
only then: vendors also let them change within one volume.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from medssl.errors import RejectedScan
from medssl.scans.formats._stacking import Stack, stack_slices
from medssl.scans.formats.base import GroupingConfig, Header

APART_WHEN_SHARED = ("image_type_key", "acquisition")
_ATTEMPTS = (("image_type_key",), ("acquisition",), APART_WHEN_SHARED)
_MOST_GAP = 1.5  # times the thickness: volumes of wider gaps were measured as one, in turns
_STRICT = GroupingConfig()


def parts_of_stack(stack: list[Header], config: GroupingConfig) -> list[list[Header]]:
    """Return the volumes that a stack of slices interleaves; the stack itself when it is one.

    A stack whose slices share places is separated by what gives each part places of its own. One
    whose slices lie between each other is separated by what makes each part an even stack of more
    than one slice; by the acquisition, only where the slices of the whole would overlap, since odd
    and even slices are often measured in turns.

    Args:
        stack: slices alike in all that always sets slices apart.
        config: what is done with uneven stacks.
    """
    if len(stack) < 2:
        return [stack]
    whole = _stack(stack, _STRICT)
    shared = whole == "duplicate_position"
    # An even stack is torn apart only for stacks as even.
    wanted = _STRICT if isinstance(whole, Stack) else config
    for fields in _ATTEMPTS:
        parts = _split(stack, fields)
        if len(parts) < 2 or any(len(part) < 2 for part in parts):
            continue
        if shared:
            apart = not any(_stack(part, _STRICT) == "duplicate_position" for part in parts)
        else:
            apart = _interleaved(parts, wanted, overlapping="acquisition" in fields)
        if apart:
            return [smaller for part in parts for smaller in parts_of_stack(part, config)]
    return [stack]


def _interleaved(parts: list[list[Header]], config: GroupingConfig, *, overlapping: bool) -> bool:
    """Say whether these are even stacks that lie in each other, not behind each other."""
    stacks = [_stack(part, config) for part in parts]
    if any(isinstance(stack, str) for stack in stacks):
        return False
    if overlapping:
        for part, stack in zip(parts, stacks, strict=True):
            thickness = part[0].facts["thickness_mm"]
            if isinstance(stack, Stack) and 0 < thickness * _MOST_GAP < stack.gap_mm:
                return False
    row, column = np.array(parts[0][0].facts["orientation"]).reshape(2, 3)
    normal = np.cross(row, column)
    depths = [np.array([header.facts["position"] for header in part]) @ normal for part in parts]
    ends = sorted((depth.min(), depth.max()) for depth in depths)
    return all(after[0] < before[1] for before, after in pairwise(ends))


def _stack(headers: Sequence[Header], config: GroupingConfig) -> Stack | str:
    """Return the stack, or the reason for which it is none."""
    facts = headers[0].facts
    try:
        return stack_slices(
            np.array([header.facts["position"] for header in headers]),
            np.array(facts["orientation"]),
            np.array(facts["spacing_mm"]),
            facts["thickness_mm"],
            config,
            (facts["columns"], facts["rows"]),
        )
    except RejectedScan as error:
        return error.reason


def _split(headers: Sequence[Header], fields: Sequence[str]) -> list[list[Header]]:
    parts: dict[str, list[Header]] = defaultdict(list)
    for header in headers:
        parts[repr([header.facts[field] for field in fields])].append(header)
    return [parts[key] for key in sorted(parts)]
