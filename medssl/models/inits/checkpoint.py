"""The init that continues from a checkpoint of medssl, under the contract it was made under."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from medssl.config import ComponentConfig
from medssl.models.backbones.base import Backbone
from medssl.models.checkpoints import (
    DECODER_FILE,
    check_agreement,
    check_contract,
    checkpoint_name,
    lineage,
    load_contract,
    read_decoder,
    read_weights,
)
from medssl.models.decoders import UNetDecoder
from medssl.models.inits.base import Init, LoadReport, check_tensors, load_strict
from medssl.models.origin import FROM, beginning, taken_to_3d


class Config(ComponentConfig):
    """Which checkpoint.

    Attributes:
        path: a run folder, a checkpoint folder, its ``backbone.safetensors``, or a model of
            MLflow's registry: ``models:/name@alias`` or ``models:/name/version``.
        decoder: start the decoder of tasks with one answer a voxel from the pretext task's own,
            where it drew images (inpainting); only its last layer is new.
    """

    name: Literal["checkpoint"] = "checkpoint"
    path: Path
    decoder: bool = False


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

    def apply_decoder(self, decoder: UNetDecoder) -> str:
        """Load the pretext task's decoder, if it is wanted; see `Init.apply_decoder`."""
        if not self.config.decoder:
            return ""
        path = self.config.path
        state = read_decoder(path, load_contract(path))
        own = decoder.inner_state()
        check_tensors(
            own, state, "the decoder", f"{DECODER_FILE} of checkpoint {checkpoint_name(path)!r}"
        )
        decoder.load_state_dict(state, strict=False)  # all but its last layer, as checked
        return f"decoder of {len(own)} tensors loaded, its last layer new"
