"""The init that loads published ImageNet weights from a file known by name and hash."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from medssl.config import ComponentConfig
from medssl.errors import ConfigError, MachineError
from medssl.models.backbones.base import Backbone, ImagenetWeights
from medssl.models.inits._published import (
    check_hash,
    download,
    find_weights,
    local_name,
    remedy,
    torch_cache,
    wanted_hash,
)
from medssl.models.inits._tensor_files import Sha256, read_state
from medssl.models.inits.base import Init, LoadReport, load_strict
from medssl.models.origin import taken_to_3d

__all__ = ["Config", "ImagenetInit", "check_hash", "download", "find_weights", "read_state"]


class Config(ComponentConfig):
    """Where the weight file is.

    Attributes:
        path: the file, or a folder that holds it; None: look in the torch hub cache, the Hugging
            Face hub cache, and the pip package that carries it.
        download: allow fetching the file into the torch hub cache when it is nowhere.
        sha256: of the file's content; needed where its publisher states none.
    """

    name: Literal["imagenet"] = "imagenet"
    path: Path | None = None
    download: bool = False
    sha256: Sha256 | None = None


class ImagenetInit(Init):
    """Every tensor of the backbone from the published file; only its classifier is left out."""

    config: Config

    def apply(self, backbone: Backbone) -> LoadReport:
        """Load the published file; see `Init.apply`."""
        weights = backbone.imagenet_weights
        if weights is None:
            raise ConfigError(
                f"there are no ImageNet weights for backbone {backbone.describe()}: ImageNet "
                "weights are 2D. Use init random or checkpoint, or a 2D backbone of torchvision "
                "or timm; in 3D, inside of backbone inflated or slicewise."
            )
        wanted_hash(weights, self.config.sha256)
        file = self._find(weights)
        digest = check_hash(file, weights, self.config.sha256)
        adapted = backbone.adapt_imagenet(read_state(file))
        loaded = load_strict(backbone, adapted.state, file.name)
        return LoadReport(
            source=local_name(weights),
            loaded=loaded,
            unexpected=adapted.head,
            adapted=adapted.adapted,
            percent=100.0 * loaded / len(backbone.state_dict()),
            sha256=digest,
            origin=taken_to_3d("imagenet", backbone.config.name),
        )

    def _find(self, weights: ImagenetWeights) -> Path:
        given = self.config.path
        file = find_weights(weights, given)
        if file is not None:
            return file
        if given is not None:
            raise MachineError(
                f"init imagenet: {local_name(weights)} is not at the path given "
                f"(…/{given.name}). {remedy(weights)}"
            )
        if not self.config.download:
            raise MachineError(
                f"init imagenet: {local_name(weights)} is not on this machine, and the config "
                f"does not allow a download. {remedy(weights)}"
            )
        return download(weights, torch_cache() / local_name(weights), self.config.sha256)
