"""The init that loads MedicalNet: 3D residual networks trained to segment 23 medical data sets.

The files (``resnet_18_23dataset.pth`` and the like) come from https://github.com/Tencent/MedicalNet
or from the hub's TencentMedicalNet; their publisher states no hash, so the config may. Two things
are not in the tensors, and are as MONAI has them, not as MedicalNet had them: the last two layers
halve the resolution (there they were dilated, so that it stayed), and the input is scaled from
[0, 1] to [-1, 1] (there it was standardised by the voxels that are not 0).

Source: Chen, Ma & Zheng, Med3D: Transfer learning for 3D medical image analysis, 2019.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from medssl.config import ComponentConfig
from medssl.errors import ConfigError, WeightsError
from medssl.models.backbones.base import Backbone
from medssl.models.inits._mapping import map_state
from medssl.models.inits._tensor_files import Sha256, check_stated_hash, read_state
from medssl.models.inits.base import Init, LoadReport, load_strict

SECTION = "state_dict"
RULES = ((r"^(module\.)?", "net."),)
HEAD = r"^(module\.)?conv_seg\."
"""The decoder, which most of the published files were stored without."""

SHORTCUTS = {10: "B", 18: "A", 34: "A", 50: "B"}
"""What the published networks of each depth shortcut with; A has no tensors.

Source: ``monai.networks.nets.resnet.get_medicalnet_pretrained_resnet_args``.
"""

_DOWNSAMPLING = ".downsample."


class Config(ComponentConfig):
    """Which file.

    Attributes:
        path: MedicalNet's file for the backbone's depth.
        sha256: of its content; refused if it differs. Recorded in any case.
    """

    name: Literal["medicalnet"] = "medicalnet"
    path: Path
    sha256: Sha256 | None = None


class MedicalnetInit(Init):
    """Every tensor of a 3D residual network of MONAI from MedicalNet's file of its depth."""

    config: Config

    def apply(self, backbone: Backbone) -> LoadReport:
        """Load the file; see `Init.apply`."""
        check_architecture(backbone)
        file = self.config.path
        digest = check_stated_hash(file, self.config.sha256)
        found = read_state(file, SECTION)
        shortcut = "B" if any(_DOWNSAMPLING in name for name in found) else "A"
        if shortcut != (getattr(backbone.config, "shortcut", None) or "B"):
            raise WeightsError(
                f"{file.name}: its network has shortcuts of type {shortcut}, the backbone's are of "
                f"the other. Set backbone.shortcut={shortcut}, or give the file of this depth."
            )
        has_head = any("conv_seg." in name for name in found)
        mapped = map_state(
            backbone, found, rules=RULES, ignore=(HEAD,) if has_head else (), source=file.name
        )
        loaded = load_strict(backbone, mapped.state, file.name)
        return LoadReport(
            source=file.name,
            loaded=loaded,
            unexpected=mapped.ignored,
            adapted=mapped.adapted,
            percent=100.0 * loaded / len(backbone.state_dict()),
            sha256=digest,
        )


def check_architecture(backbone: Backbone) -> None:
    """Refuse a backbone that MedicalNet's weights do not belong to.

    Raises:
        ConfigError: each setting that differs, with the value it must have.
    """
    settings: dict[str, Any] = {
        **backbone.config.model_dump(mode="json"),
        "in_channels": backbone.in_channels,
    }
    settings.setdefault("shortcut", "B")
    depth = settings.get("depth")
    wanted: dict[str, Any] = {
        "name": "monai",
        "variant": "resnet",
        "spatial_dims": 3,
        "base_channels": 64,
        "stem_stride": 2,
        "in_channels": 1,
    }
    if depth in SHORTCUTS:
        wanted["shortcut"] = SHORTCUTS[depth]
    problems = [
        f"{key} is {settings.get(key)!r}, must be {value!r}"
        for key, value in wanted.items()
        if settings.get(key) != value
    ]
    if depth not in SHORTCUTS:
        problems.append(f"depth is {depth!r}, must be one of {', '.join(map(str, SHORTCUTS))}")
    if problems:
        raise ConfigError(
            f"init medicalnet: these weights do not belong to backbone {backbone.describe()}: "
            f"{'; '.join(problems)}. Change the backbone, or use another init."
        )
