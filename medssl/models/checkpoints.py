"""Checkpoints: a backbone's weights (safetensors) and the contract they were made under (JSON).

Nothing is ever unpickled. Who loads weights says what is expected of them, and a mismatch is
refused with the field, what was found and what was wanted.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as dump_safetensors
from torch import Tensor

from medssl.atomic import atomic_write
from medssl.config import ComponentConfig, Config, validate_config
from medssl.errors import WeightsError
from medssl.models.backbones import BACKBONES
from medssl.models.backbones.base import Backbone
from medssl.models.contracts import (
    CONTRACT_FILE,
    CONTRACT_VERSION,
    MIGRATIONS,
    Contract,
    history_of,
    lineage,
    migrated,
)
from medssl.models.decoders import UNetDecoder
from medssl.tracking import registry

__all__ = [
    "CONTRACT_FILE", "CONTRACT_VERSION", "DECODER_FILE", "MIGRATIONS", "RELATIVE_TOLERANCE",
    "RUN_SUBFOLDER", "WEIGHTS_FILE", "Contract", "backbone_config", "check_agreement",
    "check_contract", "checkpoint_name", "find_checkpoint", "history_of", "lineage",
    "load_backbone", "load_contract", "read_decoder", "read_weights", "save_checkpoint",
]  # fmt: skip

WEIGHTS_FILE = "backbone.safetensors"
DECODER_FILE = "decoder.safetensors"
RUN_SUBFOLDER = Path("checkpoints") / "backbone"
RELATIVE_TOLERANCE = 1e-6
"""Two numbers of a contract are equal when they differ by less than this share."""


def save_checkpoint(
    folder: Path, backbone: Backbone, contract: Contract, decoder: UNetDecoder | None = None
) -> Contract:
    """Write ``backbone.safetensors`` and ``contract.json``, each atomically.

    Args:
        decoder: the pretext task's own, kept beside the backbone as ``decoder.safetensors``
            without its last layer.

    Returns:
        The contract as written, with the hashes of the weights.
    """
    content = _dumped(backbone.state_dict())
    update = {"weights_sha256": hashlib.sha256(content).hexdigest()}
    atomic_write(folder / WEIGHTS_FILE, content)
    if decoder is not None:
        content = _dumped(decoder.inner_state())
        update["decoder_sha256"] = hashlib.sha256(content).hexdigest()
        atomic_write(folder / DECODER_FILE, content)
    written = contract.model_copy(update=update)
    atomic_write(folder / CONTRACT_FILE, written.model_dump_json(indent=2) + "\n")
    return written


def _dumped(state: Mapping[str, Tensor]) -> bytes:
    return dump_safetensors({k: v.detach().cpu().contiguous() for k, v in state.items()})


def load_contract(path: Path) -> Contract:
    """Read the contract of a run folder, a checkpoint folder or a weight file.

    Raises:
        WeightsError: there is no checkpoint at the path, or its contract cannot be read.
    """
    name = checkpoint_name(path)
    file = find_checkpoint(path) / CONTRACT_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError):
        raise WeightsError(
            f"{CONTRACT_FILE} of checkpoint {name!r} cannot be read: it is not JSON. "
            "Copy it again, or export or train the checkpoint again."
        ) from None
    content = migrated(content, name)
    problems = {"missing": sorted(Contract.model_fields.keys() - content.keys())}
    problems["unknown"] = sorted(content.keys() - Contract.model_fields.keys())
    try:
        contract = Contract.model_validate(
            {key: value for key, value in content.items() if key in Contract.model_fields}
        )
    except ValidationError as error:
        wrong = {".".join(map(str, item["loc"])) for item in error.errors()}
        problems["wrong"] = sorted(wrong - {*problems["missing"]})
    if any(problems.values()):
        shown = "; ".join(
            f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names
        )
        raise WeightsError(
            f"{CONTRACT_FILE} of checkpoint {name!r} is not a contract of version "
            f"{CONTRACT_VERSION}; field(s) {shown}. Copy it again as it was written, or export or "
            "train the checkpoint again."
        )
    return contract


def check_contract(contract: Contract, **expected: Any) -> None:
    """Refuse a contract that differs from what is expected.

    Args:
        contract: the contract of the weights.
        expected: fields of `Contract` with the values the caller works under.

    Raises:
        WeightsError: at least one field differs; the message names each, found and wanted.
    """
    found = contract.model_dump(mode="json")
    if "backbone" in expected:  # settings that came later have their defaults in it
        found["backbone"] = backbone_config(contract).model_dump(mode="json")
    unknown = [name for name in expected if name not in found]
    if unknown:
        raise WeightsError(f"a contract has no field {unknown[0]!r}: {', '.join(found)}.")
    problems = [
        f"{name}: found {_short(found[name])}, wanted {_short(wanted)}"
        for name, wanted in expected.items()
        if not _same(found[name], wanted)
    ]
    if problems:
        raise WeightsError(
            f"the checkpoint was made under another contract. {'; '.join(problems)}. "
            "Prepare the scans as the checkpoint wants them, or choose another checkpoint."
        )


def check_agreement(contract: Contract, backbone: Backbone, name: str) -> None:
    """Refuse a contract that contradicts itself, or the backbone that it describes.

    Args:
        contract: as it was read.
        backbone: built from the contract's own configuration.
        name: of the checkpoint, for messages.

    Raises:
        WeightsError: at least one field says otherwise than another; the message names each.
    """
    wanted: dict[str, Any] = {
        "spatial_dims": backbone.spatial_dims,
        "axis_order": "CXYZ" if backbone.spatial_dims == 3 else "CXY",
    }
    stated = dict(contract.preprocessing or {})
    shared = ("spacing_mm", "orientation", "intensity", "blank")
    if isinstance(stated.get("intensity"), dict):  # settings that came later are in one alone
        stated["intensity"] = {**contract.intensity, **stated["intensity"]}
    wanted |= {field: stated[field] for field in shared if field in stated}
    found = contract.model_dump(mode="json", include=set(wanted))
    problems = [
        f"{field} is {_short(found[field])}, its "
        f"{'preprocessing' if field in shared else 'backbone'} says {_short(value)}"
        for field, value in wanted.items()
        if not _same(found[field], value)
    ]
    if problems:
        raise WeightsError(
            f"{CONTRACT_FILE} of checkpoint {name!r} contradicts itself: {'; '.join(problems)}. "
            "Copy it again as it was written, or train the checkpoint again."
        )


def read_weights(path: Path, contract: Contract) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, checked against the hash in its contract.

    Raises:
        WeightsError: the file is missing, cut short, damaged, or not safetensors.
    """
    content = (find_checkpoint(path) / WEIGHTS_FILE).read_bytes()
    return _parsed(content, contract.weights_sha256, WEIGHTS_FILE, checkpoint_name(path))


def read_decoder(path: Path, contract: Contract) -> dict[str, Tensor]:
    """Read the tensors of the pretext task's decoder, checked against the hash in its contract.

    Raises:
        WeightsError: the pretext task has none, or its file is missing, cut short or damaged.
    """
    name = checkpoint_name(path)
    file = find_checkpoint(path) / DECODER_FILE
    if contract.decoder_sha256 is None:
        raise WeightsError(
            f"checkpoint {name!r} holds no decoder ({lineage(contract)}): its pretext task has "
            "none, or it was written by an older medssl. Leave decoder out, or pretrain with a "
            "task that draws images, like inpainting."
        )
    if not file.is_file():
        raise WeightsError(
            f"{CONTRACT_FILE} of checkpoint {name!r} names a decoder, and there is no "
            f"{DECODER_FILE} beside it. Copy that file too, or leave decoder out."
        )
    return _parsed(file.read_bytes(), contract.decoder_sha256, DECODER_FILE, name)


def _parsed(content: bytes, sha256: str | None, file: str, name: str) -> dict[str, Tensor]:
    """Return the tensors of a file's content; refuse it where they are not what was written."""
    try:
        state: dict[str, Tensor] = parse_safetensors(content)
    except (SafetensorError, ValueError, KeyError):
        raise WeightsError(
            f"{file} of checkpoint {name!r} cannot be read: it is cut short, damaged, "
            "or not a safetensors file. Copy or export it again."
        ) from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        raise WeightsError(
            f"{file} of checkpoint {name!r} has sha256 {digest[:12]}, its contract "
            f"says {str(sha256)[:12]}. The two files do not belong together: "
            "copy both again, or resume the run that writes them."
        )
    return state


def load_backbone(checkpoint_or_run: Path | str) -> tuple[Backbone, Contract]:
    """Return a pretrained backbone, in evaluation mode, with the contract it was made under.

    Args:
        checkpoint_or_run: a run folder, a checkpoint folder, a ``backbone.safetensors`` file, or
            ``models:/name@alias`` or ``models:/name/version`` in MLflow's model registry.

    Raises:
        WeightsError: there is no checkpoint, or it does not fit its own contract.
        ConfigError, MachineError: see `medssl.tracking.registry.resolve`.
    """
    from medssl.models.inits.base import load_strict

    path = Path(checkpoint_or_run)
    contract = load_contract(path)
    state = read_weights(path, contract)
    with torch.random.fork_rng(devices=[]):  # construction draws weights that are replaced
        config = backbone_config(contract)
        backbone = BACKBONES.build(config, in_channels=contract.in_channels)
    check_agreement(contract, backbone, checkpoint_name(path))
    load_strict(backbone, state, f"checkpoint {checkpoint_name(path)!r}")
    return backbone.eval(), contract


def backbone_config(contract: Contract) -> ComponentConfig:
    """Return the backbone's configuration that a contract holds, validated."""
    cls: type[ComponentConfig] = BACKBONES.config_class(str(contract.backbone.get("name")))
    return validate_config(contract.backbone, cls, source=f"backbone in {CONTRACT_FILE}")


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint folder that a run folder, folder, weight file or registry URI means.

    Raises:
        WeightsError: nothing there, a pickled file, weights without a contract, or a contract
            without weights.
        ConfigError, MachineError: see `medssl.tracking.registry.resolve`.
    """
    if registry.is_registry_uri(path):
        return find_checkpoint(registry.resolve(str(path)))
    if path.is_symlink() and not path.exists():
        raise WeightsError(
            f"{path.name!r} is a symbolic link that leads nowhere, or in a circle. "
            "Give the folder itself."
        )
    if path.is_file() and path.suffix != ".safetensors":
        raise WeightsError(
            f"{path.name!r} is not a checkpoint of medssl: give a run folder, a checkpoint folder "
            f"or a {WEIGHTS_FILE} file. Pickled files (.pt, .pth) are not read: they can run code."
        )
    if path.is_file() and path.name != WEIGHTS_FILE:
        raise WeightsError(
            f"{path.name!r}: a checkpoint's weight file is called {WEIGHTS_FILE} and lies beside "
            f"its {CONTRACT_FILE}. Give the folder that holds both, or use init foreign."
        )
    candidates = [path.parent] if path.is_file() else [path, path / RUN_SUBFOLDER]
    for folder in candidates:
        weights, contract = (folder / WEIGHTS_FILE).is_file(), (folder / CONTRACT_FILE).is_file()
        if weights and not contract:
            raise WeightsError(
                f"{WEIGHTS_FILE} of checkpoint {path.name!r} has no {CONTRACT_FILE} beside it, "
                "so nobody can say what images it expects. Copy both files."
            )
        if contract and not weights:
            raise WeightsError(
                f"{CONTRACT_FILE} of checkpoint {path.name!r} has no {WEIGHTS_FILE} beside it: "
                "there is nothing to load. Copy both files, or resume the run that writes them."
            )
        if weights:
            return folder
    if path.is_dir() and not any(path.iterdir()):
        raise WeightsError(
            f"the folder {path.name!r} is empty, and should hold {WEIGHTS_FILE} and "
            f"{CONTRACT_FILE}. Copy both files into it."
        )
    raise WeightsError(
        f"there is no checkpoint at {path.name!r}: looked for {WEIGHTS_FILE} there and under "
        f"{RUN_SUBFOLDER.as_posix()}. Give a finished run folder or a checkpoint folder."
    )


def checkpoint_name(path: Path) -> str:
    """Return what a checkpoint is called in messages: no folder above it."""
    return str(path) if registry.is_registry_uri(path) else path.name


def _same(found: Any, wanted: Any) -> bool:
    """Compare values of a contract: numbers nearly, tuples as lists, configs as dictionaries."""
    if isinstance(wanted, Config):
        wanted = wanted.model_dump(mode="json")
    if isinstance(found, dict) and isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(_same(found[k], wanted[k]) for k in found)
    if isinstance(found, (list, tuple)) and isinstance(wanted, (list, tuple)):
        return len(found) == len(wanted) and all(map(_same, found, wanted))
    if isinstance(found, (int, float)) and isinstance(wanted, (int, float)):
        return math.isclose(found, wanted, rel_tol=RELATIVE_TOLERANCE)
    return bool(found == wanted)


def _short(value: Any) -> str:
    if isinstance(value, Config):
        value = value.model_dump(mode="json")
    text = json.dumps(value, default=str)
    return text if len(text) <= 160 else text[:159] + "…"
