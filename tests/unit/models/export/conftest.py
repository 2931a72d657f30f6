from __future__ import annotations

import pytest

from exports import MONAI_2D, MONAI_3D, make_backbone, make_subject
from medssl.models.export.base import Subject


@pytest.fixture(scope="session")
def volumes() -> Subject:
    """Return a 3D backbone, captured once."""
    return make_subject(make_backbone(MONAI_3D))


@pytest.fixture(scope="session")
def slices() -> Subject:
    """Return a 2D backbone that pads to multiples of 16, captured once."""
    backbone = make_backbone(MONAI_2D)
    backbone.divisor = 16
    return make_subject(backbone)
