"""The contract of a checkpoint: what its images must be, and how its weights came about.

Contracts of earlier versions migrate as they are read; a file on disk is never rewritten.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, field_validator

from medssl.config import Config
from medssl.errors import WeightsError
from medssl.models.origin import beginning, taken_to_3d

CONTRACT_VERSION = 3
CONTRACT_FILE = "contract.json"
MOST_CHANNELS = 1024
"""A contract that states more is damaged, and would ask for more memory than there is."""

_HISTORY_FIELDS = ("init", "pretext", "steps", "seed", "index_digest", "weights_sha256")
_ENDS_OF_AXES = ("LR", "PA", "IS")

_Content = dict[str, Any]


class Contract(Config):
    """What must be true of the images a backbone is given, and how its weights came about.

    Attributes:
        version: version of this format.
        spacing_mm: voxel spacing of the prepared scans along X, Y, Z; None: each scan's own.
        orientation: canonical orientation of the prepared scans, for example ``RAS``.
        axis_order: axes of an image as the backbone takes it: ``CXY`` or ``CXYZ``.
        intensity: the rule that brought intensities to [0, 1].
        blank: what was blanked before: burned-in text, the padding around a field of view.
        preprocessing: all that was done to each scan before; None: an older medssl did not say.
        in_channels: channels of an image.
        spatial_dims: 2 or 3.
        plane: the plane that 2D slices of 3D scans were cut in, if any.
        backbone: the backbone's configuration.
        init: the init's configuration without paths, and the hash of its file.
        pretext: the pretext task's configuration; None: not pretrained here.
        permutation_set_hash: of tasks that use a permutation set.
        permutation_set: its kind, size, and least and mean Hamming distance; None also where a
            contract of version 1 holds only the hash.
        index_digest: of the index the scans came from.
        store_digest: of the prepared scans.
        patients: keys of the patients whose scans were trained on, here and in all of `history`.
        history: the pretrainings that the init went through before this one, oldest first; each
            with the ``init``, ``pretext``, ``steps``, ``seed``, ``index_digest`` and
            ``weights_sha256`` of its own contract.
        num_scans: how many scans were trained on; None: an older medssl did not say.
        seed: the training's seed.
        steps: optimisation steps taken.
        package_versions: see `medssl.provenance.package_versions`.
        git_commit: see `medssl.provenance.git_commit`.
        weights_sha256: hash of the weight file; filled in by `save_checkpoint`.
        decoder_sha256: hash of the file of the pretext task's decoder, likewise; None: the task
            has no decoder, or an older medssl did not keep it.
    """

    version: Literal[3] = 3
    spacing_mm: tuple[float, float, float] | None
    orientation: str
    axis_order: Literal["CXY", "CXYZ"]
    intensity: dict[str, Any]
    blank: tuple[str, ...] = ()
    preprocessing: dict[str, Any] | None = None
    in_channels: int = Field(ge=1, le=MOST_CHANNELS)
    spatial_dims: Literal[2, 3]
    plane: Literal["sagittal", "coronal", "axial"] | None = None
    backbone: dict[str, Any]
    init: dict[str, Any]
    pretext: dict[str, Any] | None = None
    permutation_set_hash: str | None = None
    permutation_set: dict[str, Any] | None = None
    index_digest: str
    store_digest: str
    patients: tuple[str, ...]
    history: tuple[dict[str, Any], ...] = ()
    num_scans: int | None = None
    seed: int
    steps: int
    package_versions: dict[str, str]
    git_commit: str | None = None
    weights_sha256: str | None = None
    decoder_sha256: str | None = None

    @field_validator("spacing_mm")
    @classmethod
    def _is_a_length(cls, spacing_mm: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if spacing_mm is not None and not all(0 < mm < math.inf for mm in spacing_mm):
            raise ValueError("must hold positive numbers of millimetres")
        return spacing_mm

    @field_validator("orientation")
    @classmethod
    def _names_every_axis_once(cls, orientation: str) -> str:
        found = sorted(
            n for code in orientation for n, ends in enumerate(_ENDS_OF_AXES) if code in ends
        )
        if len(orientation) != len(_ENDS_OF_AXES) or found != [0, 1, 2]:
            raise ValueError("must name each axis of the body once, like RAS")
        return orientation

    @field_validator("init", "pretext")
    @classmethod
    def _is_named(cls, component: dict[str, Any] | None) -> dict[str, Any] | None:
        if component is not None and not isinstance(component.get("name"), str):
            raise ValueError("must have a name")
        return component

    @field_validator("history")
    @classmethod
    def _is_told_in_full(cls, history: tuple[_Content, ...]) -> tuple[_Content, ...]:
        for stage in history:
            if stage.keys() != set(_HISTORY_FIELDS):
                raise ValueError(f"each must hold {', '.join(_HISTORY_FIELDS)}")
            for part in ("init", "pretext"):
                if stage[part] is not None and not isinstance(stage[part], dict):
                    raise ValueError(f"{part} must be a configuration")
            if stage["init"] is None:
                raise ValueError("init must be a configuration")
        return history


def migrated(content: Any, name: str) -> _Content:
    """Return a contract's content as this version writes it.

    Raises:
        WeightsError: it states no version, or one that no step leads from.
    """
    version = content.get("version") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(version, int) or isinstance(version, bool):
        raise WeightsError(
            f"{CONTRACT_FILE} of checkpoint {name!r} states no version, so it is not a contract of "
            "medssl. Copy the file that was written with the weights, or train again."
        )
    if version > CONTRACT_VERSION:
        raise WeightsError(
            f"checkpoint {name!r} has a contract of version {version}, this medssl reads versions "
            f"{min(MIGRATIONS)} to {CONTRACT_VERSION}. Install a newer medssl."
        )
    while version < CONTRACT_VERSION:
        if version not in MIGRATIONS:
            raise WeightsError(
                f"checkpoint {name!r} has a contract of version {version}, which no medssl wrote; "
                f"versions {min(MIGRATIONS)} to {CONTRACT_VERSION} are read. Copy the file again."
            )
        content = MIGRATIONS[version](content)
        version = content["version"]
    return dict(content)


def _from_1(content: _Content) -> _Content:
    """Version 2 states what was blanked, and the pretrainings before.

    Contracts of version 1 without ``blank`` were written when nothing could be blanked. They say
    nothing of earlier pretrainings but the hash in ``init``; what is not known is not invented.
    """
    unknown = {"permutation_set": None, "preprocessing": None, "num_scans": None}
    return {"blank": [], "history": [], **unknown, **content, "version": 2}


def _from_2(content: _Content) -> _Content:
    """Version 3 states the hash of the pretext task's decoder, which was not kept before."""
    return {"decoder_sha256": None, **content, "version": 3}


MIGRATIONS: dict[int, Callable[[_Content], _Content]] = {1: _from_1, 2: _from_2}
"""By the version that each step starts from. A file on disk is never rewritten."""


def history_of(contract: Contract) -> tuple[_Content, ...]:
    """Return the history of a backbone that goes on from this contract's weights."""
    own = contract.model_dump(mode="json", include=set(_HISTORY_FIELDS))
    return (*contract.history, own)


def lineage(contract: Contract) -> str:
    """Return how weights came about, in words: ``imagenet → rotation → jigsaw``.

    ImageNet's weights that were taken to 3D are called so: ``inflated ImageNet → rotation``.
    """
    stages = history_of(contract)
    init, backbone = beginning(contract.model_dump(mode="json"))
    first = taken_to_3d(init, backbone) or init
    return " → ".join(
        [first, *(str(stage["pretext"].get("name", "?")) for stage in stages if stage["pretext"])]
    )
