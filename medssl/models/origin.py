"""Where weights began, in words that never hide that ImageNet's 2D weights were taken to 3D.

No torch: reports use it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WAYS_TO_3D = {"inflated": "inflated", "slicewise": "slice-by-slice"}
"""How 2D weights got to volumes, by the name of the backbone that takes them there."""

FROM = "from"
"""Stands before weights that were pretrained on since."""


def taken_to_3d(init: str, backbone: str) -> str:
    """Return ``inflated ImageNet`` or ``slice-by-slice ImageNet``; empty for all other weights.

    Args:
        init: name of the init that the weights began at.
        backbone: name of the backbone's family.
    """
    way = WAYS_TO_3D.get(backbone)
    return f"{way} ImageNet" if way and init == "imagenet" else ""


def beginning(contract: Mapping[str, Any]) -> tuple[str, str]:
    """Return the init that a checkpoint's weights began at, and its backbone's family, by name.

    Args:
        contract: content of a ``contract.json``; of version 1 too, which knows no history.
    """
    stages = [*(contract.get("history") or []), contract]
    init, backbone = stages[0].get("init") or {}, contract.get("backbone") or {}
    return str(init.get("name", "?")), str(backbone.get("name", ""))
