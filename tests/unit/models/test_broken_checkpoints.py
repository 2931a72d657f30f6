"""Ways to break a checkpoint: each is refused, with a message of its own, and nothing is run."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from hostile_weights import Bomb, hostile_files
from medssl.errors import MedsslError
from medssl.models.backbones.monai import Config as BackboneConfig
from medssl.models.build import build_backbone
from medssl.models.checkpoints import (
    CONTRACT_FILE,
    WEIGHTS_FILE,
    Contract,
    save_checkpoint,
)
from medssl.models.inits.checkpoint import Config as CheckpointConfig
from medssl.models.inits.random import Config as RandomConfig

SMALL = BackboneConfig(depth=10, spatial_dims=2, base_channels=4)
TENSOR = "net.layer2.0.conv1.weight"
EXPECTED = {
    "spacing_mm": (1.0, 1.0, 1.5),
    "orientation": "RAS",
    "axis_order": "CXY",
    "intensity": {"kind": "percentile", "lower": 0.5, "upper": 99.5},
    "blank": ("text",),
    "plane": "axial",
}
State = dict[str, torch.Tensor]


@dataclass
class Place:
    """A checkpoint folder about to be broken, and where a hostile file would leave its mark."""

    folder: Path
    mark: Path
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS_FILE

    @property
    def contract(self) -> Path:
        return self.folder / CONTRACT_FILE

    def rewrite(self, content: bytes) -> None:
        """Replace the weights, with the hash in the contract, as a foreign tool would."""
        self.weights.write_bytes(content)
        self.state_in_contract(weights_sha256=hashlib.sha256(content).hexdigest())

    def tensors(self, change: Callable[[State], object]) -> None:
        state = load(self.weights.read_bytes())
        change(state)
        self.rewrite(save(state))

    def state_in_contract(self, **changes: Any) -> None:
        content = json.loads(self.contract.read_text())
        self.contract.write_text(json.dumps({**content, **changes}))


def loop(place: Place) -> None:
    shutil.rmtree(place.folder)
    place.folder.symlink_to(place.folder)


def emptied(place: Place) -> None:
    shutil.rmtree(place.folder)
    place.folder.mkdir()


def with_tensor(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Place], object]:
    return lambda place: place.tensors(lambda state: state.update({TENSOR: change(state[TENSOR])}))


def without_field(name: str) -> Callable[[Place], object]:
    def break_it(place: Place) -> None:
        content = json.loads(place.contract.read_text())
        del content[name]
        place.contract.write_text(json.dumps(content))

    return break_it


def stating(**changes: Any) -> Callable[[Place], object]:
    return lambda place: place.state_in_contract(**changes)


OTHER = SMALL.model_copy(update={"depth": 18}).model_dump(mode="json")
WIDE = SMALL.model_copy(update={"spatial_dims": 3}).model_dump(mode="json")

# what is done to it, and what its message must name: the field or tensor, then the remedy
BREAKAGES: dict[str, tuple[Callable[[Place], object], str, str]] = {
    "missing tensor": (
        lambda place: place.tensors(lambda state: state.pop(TENSOR)),
        rf"missing: {TENSOR}", "Choose the backbone",
    ),
    "extra tensor": (
        lambda place: place.tensors(lambda state: state.update(head=torch.zeros(2))),
        r"does not have: head\.", "Choose the backbone",
    ),
    "shape": (
        with_tensor(lambda tensor: tensor[:, :1].contiguous()),
        rf"{TENSOR} has shape \(8, 1, 3, 3\), wanted \(8, 4, 3, 3\)", "Choose the backbone",
    ),
    "dtype": (
        with_tensor(torch.Tensor.half),
        rf"{TENSOR} is of type torch\.float16, wanted torch\.float32", "Export the weights again",
    ),
    "not a number": (
        with_tensor(lambda tensor: tensor * torch.nan),
        rf"{TENSOR} holds values that are not finite", "use an earlier checkpoint",
    ),
    "infinite": (
        lambda place: place.tensors(lambda s: s["net.bn1.running_var"].fill_(torch.inf)),
        r"net\.bn1\.running_var holds values that are not finite", "use an earlier checkpoint",
    ),
    "cut short": (
        lambda place: place.weights.write_bytes(place.weights.read_bytes()[:-1]),
        r"backbone\.safetensors .* cut short", "Copy or export it again",
    ),
    "wrong hash": (
        lambda place: place.state_in_contract(weights_sha256="0" * 64),
        r"sha256 [0-9a-f]{12}, its contract says 000000000000", "copy both again",
    ),
    "weights of another checkpoint": (
        lambda place: place.weights.write_bytes(
            save({name: t + 1 for name, t in load(place.weights.read_bytes()).items()})
        ),
        r"sha256 [0-9a-f]{12}, its contract says (?!0{12})", "copy both again",
    ),
    "pickled payload, given by its folder": (
        lambda place: (
            place.weights.unlink(),
            (place.folder / "backbone.pt").write_bytes(pickle.dumps(Bomb(place.mark))),
        ),
        r"contract\.json .* has no backbone\.safetensors beside it", "resume the run",
    ),
    "no contract": (
        lambda place: place.contract.unlink(),
        r"has no contract\.json beside it", "Copy both files",
    ),
    "contract not JSON": (
        lambda place: place.contract.write_text("{not json"), "is not JSON", "Copy it again",
    ),
    "contract without version": (
        without_field("version"), "states no version", "Copy the file that was written",
    ),
    "contract of a later version": (
        stating(version=99), "version 99, this medssl reads versions 1 to", "Install a newer",
    ),
    "contract of a version that never was": (
        stating(version=0), "version 0, which no medssl wrote", "Copy the file again",
    ),
    "contract with an unknown field": (
        stating(colour="blue"), r"unknown: colour", "Copy it again as it was written",
    ),
    "contract without a field": (
        without_field("blank"), r"missing: blank", "Copy it again as it was written",
    ),
    "contract with a wrong field": (
        stating(axis_order="CYX"), r"wrong: axis_order", "Copy it again as it was written",
    ),
    "axis order": (
        stating(axis_order="CXYZ"),
        r'axis_order: found "CXYZ", wanted "CXY"', "Prepare the scans as",
    ),
    "spacing": (
        stating(spacing_mm=[1.0, 1.0, 3.0]),
        r"spacing_mm: found \[1\.0, 1\.0, 3\.0\], wanted \[1\.0, 1\.0, 1\.5\]",
        "Prepare the scans as",
    ),
    "orientation": (
        stating(orientation="LPS"), r'orientation: found "LPS", wanted "RAS"',
        "Prepare the scans as",
    ),
    "intensity rule": (
        stating(intensity={"kind": "window_hu", "window_hu": [-160, 240]}),
        r"intensity: found .*window_hu.*wanted .*percentile", "Prepare the scans as",
    ),
    "blank rule": (
        stating(blank=[]), r'blank: found \[\], wanted \["text"\]', "Prepare the scans as",
    ),
    "plane": (
        stating(plane="coronal"), r'plane: found "coronal", wanted "axial"',
        "Prepare the scans as",
    ),
    "input channels": (
        stating(in_channels=3), "in_channels: found 3, wanted 1", "Prepare the scans as",
    ),
    "dimensions": (
        stating(spatial_dims=3), "spatial_dims: found 3, wanted 2", "Prepare the scans as",
    ),
    "depth of the backbone": (
        stating(backbone=OTHER), r'backbone: found .*"depth": 18.*', "choose another checkpoint",
    ),
    "dimensions of the backbone": (
        stating(backbone=WIDE), r'backbone: found .*"spatial_dims": 3.*wanted .*"spatial_dims": 2',
        "choose another checkpoint",
    ),
    "unknown backbone": (
        stating(backbone={"name": "monay"}), "no backbone 'monay'. Did you mean 'monai'",
        "There are:",
    ),
    "unknown setting of the backbone": (
        stating(backbone={**OTHER, "colour": "blue"}), "colour: unknown key", "Known keys",
    ),
    "empty folder": (emptied, "is empty, and should hold backbone.safetensors", "Copy both"),
    "symbolic link in a circle": (loop, "leads nowhere, or in a circle", "Give the folder itself"),
    "nothing there": (
        lambda place: shutil.rmtree(place.folder), "no checkpoint at 'backbone'",
        "Give a finished run",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "backbone"
    backbone, _ = build_backbone(SMALL, RandomConfig(), in_channels=1, seed=5)
    contract = Contract(
        **EXPECTED,
        in_channels=1,
        spatial_dims=2,
        backbone=SMALL.model_dump(mode="json"),
        init={"name": "random"},
        pretext={"name": "rotation"},
        index_digest="a" * 64,
        store_digest="b" * 64,
        patients=("0123456789abcdef",),
        seed=7,
        steps=100,
        package_versions={},
    )
    save_checkpoint(folder, backbone, contract)
    return folder


def message_of(place: Place) -> str:
    """Offer the checkpoint, and return the message that refuses it."""
    init = CheckpointConfig(path=place.folder)
    with pytest.raises(MedsslError) as raised:
        build_backbone(SMALL, init, in_channels=1, seed=0, expected=EXPECTED)
    assert raised.value.exit_code in (2, 3)
    return str(raised.value)


def broken(whole: Path, folder: Path, how: str) -> Place:
    shutil.copytree(whole, folder / "backbone")
    place = Place(folder / "backbone", folder / "ran")
    BREAKAGES[how][0](place)
    return place


def test_what_is_broken_below_loads_whole(whole):
    _, report = build_backbone(
        SMALL, CheckpointConfig(path=whole), in_channels=1, seed=0, expected=EXPECTED
    )
    assert report.percent == 100


@pytest.mark.parametrize("how", BREAKAGES)
def test_a_broken_checkpoint_is_refused_with_field_and_remedy(whole, tmp_path, how):
    place = broken(whole, tmp_path, how)
    message = message_of(place)
    _, named, remedy = BREAKAGES[how]
    assert re.search(named, message), message
    assert remedy in message
    assert str(tmp_path) not in message
    assert not place.mark.exists()


def test_every_breakage_has_a_message_of_its_own(whole, tmp_path):
    assert len(BREAKAGES) >= 20
    messages = {}
    for number, how in enumerate(BREAKAGES):
        folder = tmp_path / str(number)
        folder.mkdir()
        messages[how] = message_of(broken(whole, folder, how))
    assert len(set(messages.values())) == len(messages)


@pytest.mark.parametrize("name", [WEIGHTS_FILE, "model.pt", "model.safetensors"])
def test_a_hostile_pickle_is_refused_as_a_checkpoint_and_not_run(whole, tmp_path, name):
    shutil.copytree(whole, tmp_path / "backbone")
    place = Place(tmp_path / "backbone", tmp_path / "ran")
    for content in hostile_files(place.mark).values():
        place.rewrite(content)
        (place.folder / name).write_bytes(content)
        with pytest.raises(MedsslError):
            build_backbone(SMALL, CheckpointConfig(path=place.folder / name), in_channels=1, seed=0)
        assert not place.mark.exists()


def test_the_payload_is_a_real_one(tmp_path):
    pickle.loads(hostile_files(tmp_path / "ran")["pickle"])  # noqa: S301
    assert (tmp_path / "ran").exists()
