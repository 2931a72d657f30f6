"""The part of a checkpoint's contract that says how images reach the backbone."""

from __future__ import annotations

from typing import Any

from medssl.scans.store import Store
from medssl.transforms.preprocessing import PreprocessingConfig
from medssl.transforms.requests import SampleRequest


def image_contract(store: Store, request: SampleRequest) -> dict[str, Any]:
    """Return the fields that a checkpoint's contract records, and later uses must agree with.

    Args:
        store: prepared scans.
        request: the crops that the backbone sees.
    """
    preprocessing = PreprocessingConfig.model_validate(store.preprocessing)
    return {
        "spacing_mm": preprocessing.spacing_mm,
        "orientation": preprocessing.orientation,
        "intensity": preprocessing.intensity.model_dump(mode="json"),
        "blank": preprocessing.blank,
        "axis_order": "CXYZ" if request.spatial_dims == 3 else "CXY",
        "plane": request.plane,
    }
