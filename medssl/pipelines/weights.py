"""Weight files: which are published, which are here, fetching them, and checking them.

For a machine without a network: fetch on another, carry the file over, verify it there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from medssl.atomic import atomic_write
from medssl.config import validate_config
from medssl.errors import ConfigError, MachineError, WeightsError
from medssl.models.backbones import BACKBONES
from medssl.models.backbones.base import ImagenetWeights
from medssl.models.checkpoints import (
    CONTRACT_FILE,
    RUN_SUBFOLDER,
    WEIGHTS_FILE,
    load_contract,
    read_weights,
)
from medssl.models.inits._published import (
    check_hash,
    download,
    hub_repository,
    local_name,
    places,
    receive,
    torch_cache,
    wanted_hash,
)
from medssl.models.inits._tensor_files import file_sha256, read_state
from medssl.pipelines.progress import Progress, silent

_NAMED_HASH = re.compile(r"-([0-9a-f]{8,64})\.pth$")
"""PyTorch's convention: a file's name ends with the first digits of its hash."""

_WEIGHT_SUFFIXES = (".pth", ".pt", ".safetensors")


@dataclass(frozen=True)
class Row:
    """One architecture with published ImageNet weights.

    Attributes:
        backbone: ``family:variant``, as `fetch` takes it.
        file: the file's name, as `fetch` writes it.
        sha256: its hash or the first digits, as its publisher states them; None: not stated.
        licence: of the weights.
        place: where on this machine it was found; None: nowhere.
        path: the file that was found.
        remedy: how to get it, where it was not found.
    """

    backbone: str
    file: str
    sha256: str | None
    licence: str
    place: str | None
    path: str | None
    remedy: str | None


@dataclass(frozen=True)
class Check:
    """One file whose hash was checked.

    Attributes:
        file: its name.
        path: where it is.
        is_right: whether it is what it should be; not so where nobody states what that is.
        sha256: the hash that was found; empty where the file could not be read that far.
        text: what it is, or what is wrong.
    """

    file: str
    path: str
    is_right: bool
    sha256: str
    text: str


def table() -> list[Row]:
    """Return every architecture that a backbone family declares ImageNet weights for."""
    return [_row(name, weights) for name, weights in _declared().items()]


def fetch(
    backbone: str,
    out: Path | None = None,
    *,
    sha256: str | None = None,
    progress: Progress = silent,
) -> Check:
    """Download the ImageNet weights of an architecture, and check them.

    A file that is there already, and right, is left as it is.

    Args:
        backbone: ``family:variant``, for example ``torchvision:resnet50``.
        out: folder to write into; None: the torch hub cache, where init ``imagenet`` looks.
        sha256: the hash it must have, where its publisher states none. Where nobody states one,
            the file is kept and its hash is in the result, for the config to state.
        progress: receives how far it is.

    Raises:
        ConfigError: no such backbone, or none with ImageNet weights.
        MachineError: no network, no address, or the disk cannot be written.
        WeightsError: what arrived is another file, or none of tensors; nothing is kept.
    """
    weights = weights_of(backbone)
    target = (out or torch_cache()) / local_name(weights)
    unchecked = weights.sha256 is None and sha256 is None

    def report(done: int, total: int) -> None:
        progress(f"fetch {backbone}", done >> 20, total >> 20, "MiB")

    if target.is_file() and not unchecked:
        here = _checked(target, weights, sha256)
        if here.is_right:
            return replace(here, text="is there already, and right")
    if unchecked:

        def keep_tensors(temporary: Path) -> None:
            receive(weights, temporary, report)
            try:
                read_state(temporary)  # a page that asks to log in has a hash as well
            except WeightsError:
                raise WeightsError(
                    f"{target.name}: what arrived is no file of tensors, and was not kept. Look at "
                    "the address in a browser: it may ask you to log in."
                ) from None

        atomic_write(target, keep_tensors)
        text = (
            "its publisher states no hash, so nothing could be compared: state this one as "
            "init.sha256"
        )
        return Check(target.name, str(target), True, file_sha256(target), text)
    download(weights, target, sha256, report)
    return Check(target.name, str(target), True, file_sha256(target), "fetched, and right")


def verify(target: Path | None = None, *, sha256: str | None = None) -> list[Check]:
    """Check the hashes of weight files.

    Args:
        target: a weight file, a checkpoint, or a folder with either; None: all published files
            that are on this machine.
        sha256: the hash that the file must have.

    Returns:
        One result a file, those that are wrong included.

    Raises:
        ConfigError: a hash is given for more than one file.
        MachineError: there is no weight file.
    """
    if target is None:
        checks = [
            _checked(file, weights, None)
            for weights in _declared().values()
            for _, file in places(weights)
            if weights.sha256 is not None
        ]
        where = "on this machine: medssl weights list says how to get one"
    else:
        checks = list(_checks(target, sha256))
        where = f"at the path given (…/{target.name})"
    if sha256 and len(checks) > 1:
        raise ConfigError("--sha256 belongs to one file, and there are several. Name the file.")
    if not checks:
        raise MachineError(f"there is no weight file whose hash is known {where}.")
    return checks


def weights_of(backbone: str) -> ImagenetWeights:
    """Return the published file of an architecture, without building it.

    Args:
        backbone: ``family:variant``.

    Raises:
        ConfigError: no such backbone, or none with ImageNet weights; known ones are named.
    """
    family, colon, variant = backbone.partition(":")
    if not colon or not variant:
        raise ConfigError(
            f"{backbone!r} is not of the form FAMILY:VARIANT. "
            f"For example: {', '.join(list(_declared())[:3])}."
        )
    config = validate_config(
        {"name": family, "variant": variant},
        BACKBONES.config_class(family),
        source=f"backbone {backbone!r}",
    )
    weights = BACKBONES.load(family).published(config)
    if weights is None:
        raise ConfigError(
            f"there are no published ImageNet weights for {backbone!r}. "
            f"There are for: {', '.join(_declared())}."
        )
    return weights


def remedy_of(name: str, weights: ImagenetWeights) -> str:
    """Return what to run or set for a file that is not here.

    Args:
        name: its architecture, ``family:variant``.
        weights: the file.
    """
    if weights.extra:
        return f"pip install 'medssl[{weights.extra}]'"
    return f"medssl weights fetch {name}" if weights.url else "no address is known; set init.path"


def failure(checks: list[Check]) -> WeightsError | None:
    """Return the error that says which files are wrong, if any is."""
    wrong = [check.file for check in checks if not check.is_right]
    if not wrong:
        return None
    return WeightsError(
        f"{len(wrong)} of {len(checks)} weight file(s) are not shown to be what they should be: "
        f"{', '.join(wrong)}. Fetch or copy them again, or state their hash with --sha256."
    )


def facts_of(items: list[Row] | list[Check]) -> list[dict[str, Any]]:
    """Return rows or checks as JSON values."""
    return [asdict(item) for item in items]


def describe(rows: list[Row]) -> list[str]:
    """Return the table in lines for people."""
    lines = []
    for row in rows:
        digits = f"sha256 {row.sha256[:8]}…" if row.sha256 else "no hash stated"
        licence = row.licence or "licence not stated"
        lines.append(f"{row.backbone}: {row.file}, {digits}, {licence}")
        lines.append(f"  in the {row.place}" if row.place else f"  not here: {row.remedy}")
    return lines


def _declared() -> dict[str, ImagenetWeights]:
    """Return all published files by ``family:variant``."""
    found: dict[str, ImagenetWeights] = {}
    for family in BACKBONES:
        declared: Mapping[str, ImagenetWeights] = BACKBONES.load(family).imagenet
        found |= {f"{family}:{variant}": weights for variant, weights in declared.items()}
    return found


def _row(name: str, weights: ImagenetWeights) -> Row:
    place, path = next(places(weights), (None, None))
    return Row(
        backbone=name,
        file=local_name(weights),
        sha256=weights.sha256,
        licence=weights.licence,
        place=place,
        path=str(path) if path else None,
        remedy=None if path else remedy_of(name, weights),
    )


def _checks(target: Path, sha256: str | None) -> Iterator[Check]:
    """Yield the results for a file, a checkpoint, or what a folder holds of both."""
    if target.is_file() and target.name != WEIGHTS_FILE:
        yield _checked_file(target, sha256)
        return
    folders = [target.parent] if target.is_file() else [target, target / RUN_SUBFOLDER]
    for folder in folders:
        if (folder / WEIGHTS_FILE).exists() or (folder / CONTRACT_FILE).exists():
            yield _checked_checkpoint(folder)
    if target.is_dir():
        for file in sorted(target.iterdir()):
            if file.suffix in _WEIGHT_SUFFIXES and file.name != WEIGHTS_FILE and file.is_file():
                yield _checked_file(file, sha256)


def _checked_file(file: Path, sha256: str | None) -> Check:
    known = {
        name: weights
        for weights in _declared().values()
        for name in _names_of(weights)
        if weights.sha256 is not None
    }
    if file.name in known:
        return _checked(file, known[file.name], sha256)
    named = _NAMED_HASH.search(file.name)
    if sha256 is None and named is None:
        found = file_sha256(file)
        text = "nobody states its hash: give --sha256"
        return Check(file.name, str(file), False, found, text)
    weights = ImagenetWeights(file.name, named[1] if named else None)
    return _checked(file, weights, sha256)


def _names_of(weights: ImagenetWeights) -> tuple[str, ...]:
    """Return the names that tell a file: that of a hub's file says nothing without its folder."""
    own = local_name(weights)
    return (own,) if hub_repository(weights) else (own, weights.file_name)


def _checked(file: Path, weights: ImagenetWeights, sha256: str | None) -> Check:
    wanted_hash(weights, sha256)
    try:
        return Check(file.name, str(file), True, check_hash(file, weights, sha256), "right")
    except WeightsError as error:
        return Check(file.name, str(file), False, file_sha256(file), str(error))


def _checked_checkpoint(folder: Path) -> Check:
    name = f"{folder.name}/{WEIGHTS_FILE}"
    path = str(folder / WEIGHTS_FILE)
    try:
        contract = load_contract(folder)
        read_weights(folder, contract)
    except WeightsError as error:
        return Check(name, path, False, "", str(error))
    return Check(name, path, True, str(contract.weights_sha256), "agrees with its contract")
