"""The init that continues from a checkpoint of medssl, under the contract it was made under."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from medssl.config import ComponentConfig
from medssl.models.backbones.base import Backbone
from medssl.models.checkpoints import (
    check_agreement,
    check_contract,
    checkpoint_name,
    lineage,
    load_contract,
    read_weights,
)
from medssl.models.inits.base import Init, LoadReport, load_strict
from medssl.models.origin import FROM, beginning, taken_to_3d


class Config(ComponentConfig):
    """Which checkpoint.

    Attributes:
        path: a run folder, a checkpoint folder, its ``backbone.safetensors``, or a model of
            MLflow's registry: ``models:/name@alias`` or ``models:/name/version``.
    """

    name: Literal["checkpoint"] = "checkpoint"
    path: Path


class CheckpointInit(Init):
    """Every tensor from a checkpoint; the backbone and all expected contract fields must agree."""

    config: Config

    def apply(self, backbone: Backbone) -> LoadReport:
        """Load the checkpoint; see `Init.apply`."""
        path = self.config.path
        contract = load_contract(path)
        check_contract(
            contract,
            **{
                **self.expected,
                "backbone": backbone.config,
                "in_channels": backbone.in_channels,
                "spatial_dims": backbone.spatial_dims,
            },
        )
        check_agreement(contract, backbone, checkpoint_name(path))
        source = f"checkpoint {checkpoint_name(path)!r}"
        loaded = load_strict(backbone, read_weights(path, contract), source)
        origin = taken_to_3d(*beginning(contract.model_dump(mode="json")))
        return LoadReport(
            source=f"{source} ({lineage(contract)})",
            loaded=loaded,
            percent=100.0,
            sha256=contract.weights_sha256,
            origin=f"{FROM} {origin}" if origin else "",
        )
