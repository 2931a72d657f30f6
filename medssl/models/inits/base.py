"""What an init declares, and the strict loading that all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from medssl.config import ComponentConfig
from medssl.errors import WeightsError
from medssl.models.backbones.base import Backbone
from medssl.models.decoders import UNetDecoder

_SHOWN = 4
"""Tensors named in a message before the rest is only counted."""


@dataclass(frozen=True)
class LoadReport:
    """What an init put into a backbone.

    Attributes:
        source: where the weights came from: ``random``, or a file's name.
        loaded: number of the backbone's tensors that were set.
        missing: tensors of the backbone that were not set; empty unless the init is random.
        unexpected: tensors of the file that belong to the known classifier head, left out.
        adapted: (tensor, how) for every tensor that differs from the file's own.
        percent: share of the backbone's tensors that were set.
        sha256: hash of the file's content.
        origin: ``inflated ImageNet``, ``slice-by-slice ImageNet``, or either after ``from`` where
            pretraining came in between; empty where nothing was taken from 2D to 3D.
    """

    source: str
    loaded: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    adapted: tuple[tuple[str, str], ...] = ()
    percent: float = 0.0
    sha256: str | None = None
    origin: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers, for JSON."""
        plain = asdict(self)
        plain["missing"] = list(self.missing)
        plain["unexpected"] = list(self.unexpected)
        plain["adapted"] = [list(pair) for pair in self.adapted]
        return plain

    def __str__(self) -> str:
        if self.sha256 is None:
            return f"{self.source}: no weights loaded"
        text = f"{self.source}: {self.loaded} tensors loaded ({self.percent:.0f} %)"
        if self.origin:
            text += f", {self.origin}"
        if self.adapted:
            text += f", adapted {name_some([name for name, _ in self.adapted])}"
        if self.unexpected:
            text += f", head left out ({len(self.unexpected)} tensors)"
        return f"{text}, sha256 {self.sha256[:12]}"


class Init(ABC):
    """The starting weights of a backbone.

    Args:
        config: the init's configuration.
        expected: contract fields (see `medssl.models.checkpoints.Contract`) that weights with a
            contract must agree with, for example ``{"spacing_mm": (1.0, 1.0, 1.0)}``.
    """

    def __init__(self, config: ComponentConfig, expected: Mapping[str, Any] | None = None) -> None:
        self.config = config
        self.expected = dict(expected or {})

    @abstractmethod
    def apply(self, backbone: Backbone) -> LoadReport:
        """Set the backbone's weights in place; all of them, or raise.

        Raises:
            WeightsError: the weights do not fit the backbone exactly.
            ConfigError: this init cannot serve this architecture.
            MachineError: a file is not on this machine.
        """

    def apply_decoder(self, decoder: UNetDecoder) -> str:
        """Set the weights of a voxel task's decoder in place, but for its last layer.

        Returns:
            What was loaded, in words; empty where the init brings no decoder.

        Raises:
            WeightsError: the weights do not fit the decoder exactly.
        """
        return ""


def init_provenance(config: ComponentConfig, report: LoadReport) -> dict[str, Any]:
    """Return an init's configuration without paths, plus what was loaded, for a contract."""
    settings = config.model_dump(mode="json", exclude={"path"})
    return {**settings, "source": report.source, "sha256": report.sha256}


def load_strict(backbone: Backbone, state: Mapping[str, Tensor], source: str) -> int:
    """Copy every tensor of ``state`` into the backbone, and return their number.

    Raises:
        WeightsError: a tensor is missing or too many, has another shape or type, or holds a value
            that is not finite. Nothing has been changed then.
    """
    wanted = backbone.state_dict()
    check_tensors(wanted, state, f"backbone {backbone.describe()}", source)
    backbone.load_state_dict(dict(state), strict=True)
    return len(wanted)


def check_tensors(
    wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], whose: str, source: str
) -> None:
    """Refuse tensors that are not exactly those of a network: by name, shape, type and value.

    Args:
        wanted: the network's own.
        state: what is to be loaded.
        whose: what the network is called in messages.
        source: what the tensors' file is called in messages.

    Raises:
        WeightsError: see `load_strict`.
    """
    missing = [name for name in wanted if name not in state]
    if missing:
        raise WeightsError(
            f"{source}: {len(missing)} of the {len(wanted)} tensors of {whose} are missing: "
            f"{name_some(missing)}. Choose the backbone the weights were made with."
        )
    extra = [name for name in state if name not in wanted]
    if extra:
        raise WeightsError(
            f"{source}: holds {len(extra)} tensors that {whose} does not have: "
            f"{name_some(extra)}. Choose the backbone the weights were made with."
        )
    for name, tensor in wanted.items():
        _check_tensor(name, state[name], tensor, source)


def _check_tensor(name: str, found: Tensor, wanted: Tensor, source: str) -> None:
    if found.shape != wanted.shape:
        raise WeightsError(
            f"{source}: tensor {name} has shape {tuple(found.shape)}, wanted "
            f"{tuple(wanted.shape)}. Choose the backbone the weights were made with."
        )
    if found.dtype != wanted.dtype:
        raise WeightsError(
            f"{source}: tensor {name} is of type {found.dtype}, wanted {wanted.dtype}. "
            "Export the weights again without converting them."
        )
    if found.layout != torch.strided or found.device.type == "meta":
        kind = "without values (meta)" if found.device.type == "meta" else str(found.layout)
        raise WeightsError(
            f"{source}: tensor {name} is stored as {kind}, wanted plain values (torch.strided). "
            "Export the weights again as plain tensors."
        )
    if not bool(torch.isfinite(found).all()):
        raise WeightsError(
            f"{source}: tensor {name} holds values that are not finite. "
            "The training that wrote it diverged; use an earlier checkpoint."
        )


def name_some(names: Sequence[str]) -> str:
    """Return the first few names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
