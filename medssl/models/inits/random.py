"""The init that loads nothing: the backbone keeps the weights it was constructed with."""

from __future__ import annotations

from typing import Literal

from medssl.config import ComponentConfig
from medssl.models.backbones.base import Backbone
from medssl.models.inits.base import Init, LoadReport


class Config(ComponentConfig):
    """Nothing to choose: the seed is the study's."""

    name: Literal["random"] = "random"


class RandomInit(Init):
    """Seeded random weights, as `medssl.models.build.build_backbone` constructed them."""

    def apply(self, backbone: Backbone) -> LoadReport:
        """Leave the weights as they are."""
        return LoadReport(source="random", loaded=0, missing=tuple(backbone.state_dict()))
