from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hostile_weights import hostile_files
from medssl.config import validate_config
from medssl.errors import ConfigError, MachineError, WeightsError
from medssl.models.backbones.base import Backbone
from medssl.models.backbones.monai import Config as BackboneConfig
from medssl.models.build import build_backbone
from medssl.models.inits._tensor_files import read_state
from medssl.models.inits.base import LoadReport, init_provenance
from medssl.models.inits.foreign import Config
from medssl.models.inits.random import Config as RandomConfig

SMALL = BackboneConfig(depth=10, spatial_dims=2, base_channels=4)
State = dict[str, torch.Tensor]
RULES = [[r"^module\.encoder\.", "net."]]


@functools.cache
def own_state() -> State:
    backbone, _ = build_backbone(SMALL, RandomConfig(), in_channels=1, seed=5)
    return {name: tensor.clone() for name, tensor in backbone.state_dict().items()}


def foreign_state(**more: torch.Tensor) -> State:
    """Return the backbone's tensors as another project would name them."""
    renamed = {f"module.encoder.{n.removeprefix('net.')}": t for n, t in own_state().items()}
    return {**renamed, **more}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "theirs.safetensors"
    save_file(foreign_state(), path)
    return path


def load(path: Path, **settings: Any) -> tuple[Backbone, LoadReport]:
    content = {"name": "foreign", "path": str(path), "key_map": RULES, **settings}
    return build_backbone(SMALL, validate_config(content, Config), in_channels=1, seed=0)


def is_own(backbone: Backbone) -> bool:
    return all(torch.equal(t, own_state()[n]) for n, t in backbone.state_dict().items())


def saved(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def test_every_tensor_comes_from_the_file(file):
    backbone, report = load(file)
    assert is_own(backbone)
    assert report.percent == 100
    assert report.loaded == len(backbone.state_dict())
    assert report.missing == report.unexpected == report.adapted == ()
    assert report.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("content", "section"),
    [
        (lambda state: state, None),
        (lambda state: {"state_dict": state, "epoch": 3}, "state_dict"),
        (lambda state: {"network_weights": state, "name": "x"}, "network_weights"),
        (lambda state: {"model": {"student": state}, "lr": 0.1}, "model.student"),
    ],
    ids=["plain", "state_dict", "network_weights", "nested twice"],
)
def test_tensors_are_found_under_their_section(tmp_path, content, section):
    path = saved(content(foreign_state()), tmp_path / "theirs.pth")
    assert is_own(load(path, section=section)[0])


def test_rules_apply_in_order(file):
    rules = [[r"^module\.", ""], [r"^encoder\.(.+)$", r"net.\1"]]
    assert is_own(load(file, key_map=rules)[0])


def test_what_is_ignored_is_reported(tmp_path):
    path = tmp_path / "theirs.safetensors"
    save_file(foreign_state(**{"decoder.weight": torch.zeros(2)}), path)
    _, report = load(path, ignore=[r"^decoder\."])
    assert report.unexpected == ("decoder.weight",)
    assert report.percent == 100


def test_a_file_without_batch_counters_says_so(tmp_path):
    state = {n: t for n, t in foreign_state().items() if not n.endswith("num_batches_tracked")}
    path = saved(state, tmp_path / "old.pth")
    _, report = load(path)
    assert report.percent == 100
    assert report.adapted == (
        ("num_batches_tracked", "not in the file, a count and no weight; kept at 0"),
    )


def test_the_contract_gets_the_rules_and_no_path(file):
    config = validate_config(
        {"name": "foreign", "path": str(file), "key_map": RULES, "ignore": []}, Config
    )
    _, report = build_backbone(SMALL, config, in_channels=1, seed=0)
    found = init_provenance(config, report)
    assert str(file.parent) not in json.dumps(found)
    assert found["key_map"] == RULES
    assert found["sha256"] == report.sha256


# ----------------------------------------------------------------------------- what it refuses


def test_missing_rules_are_proposed(file):
    with pytest.raises(WeightsError) as raised:
        load(file, key_map=[])
    message = str(raised.value)
    assert "tensors of backbone monai" in message
    assert "are not in the file: net.conv1.weight" in message
    assert r"['^module\.encoder\.', 'net.']" in message
    rule = message.split("['^")[1].split("',", maxsplit=1)[0]
    assert is_own(load(file, key_map=[[f"^{rule}", "net."]])[0])


def test_a_file_of_another_architecture_gets_no_proposal(tmp_path):
    path = saved({"blocks.0.attn.weight": torch.zeros(3, 3)}, tmp_path / "vit.pth")
    with pytest.raises(WeightsError, match=r"made with another architecture; choose the backbone"):
        load(path, key_map=[])


def test_a_tensor_that_belongs_to_none_is_named(tmp_path):
    path = tmp_path / "theirs.safetensors"
    save_file(foreign_state(**{"module.encoder.head": torch.zeros(2)}), path)
    with pytest.raises(
        WeightsError, match=r"1 of its tensors belong to none: module\.encoder\.head \(as net\.head"
    ):
        load(path)


def test_two_tensors_of_one_name_are_refused(tmp_path):
    path = tmp_path / "theirs.safetensors"
    save_file(foreign_state(**{"teacher.conv1.weight": torch.zeros(4, 1, 7, 7)}), path)
    with pytest.raises(WeightsError, match=r"both become net\.conv1\.weight\. Make init\.key_map"):
        load(path, key_map=[*RULES, [r"^teacher\.", "net."]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"key_map": [["^modul_", "net."]]}, r"key_map: '\^modul_' matches no tensor .* module\."),
        ({"ignore": ["^head"]}, r"ignore: '\^head' matches no tensor .*Correct the pattern"),
        ({"key_map": [["(", "net."]]}, r"key_map: '\(' is not a regular expression"),
        ({"ignore": ["["]}, r"ignore: '\[' is not a regular expression"),
        ({"key_map": [["^a", r"\1"]]}, r"the replacement .* does not fit '\^a': invalid group"),
        ({"sha256": "abc"}, r"sha256: string should match pattern"),
    ],
)
def test_rules_that_cannot_be_right_are_refused(file, settings, message):
    with pytest.raises(ConfigError, match=message):
        load(file, **settings)


def test_another_shape_is_refused(tmp_path):
    state = foreign_state()
    state["module.encoder.conv1.weight"] = torch.zeros(4, 3, 7, 7)
    path = saved(state, tmp_path / "rgb.pth")
    with pytest.raises(WeightsError, match=r"net\.conv1\.weight has shape \(4, 3, 7, 7\), wanted"):
        load(path)


def test_a_section_that_is_not_named_is_proposed(tmp_path):
    path = saved({"state_dict": foreign_state(), "epoch": 3}, tmp_path / "theirs.pth")
    with pytest.raises(WeightsError, match=r"section\(s\) state_dict: set init\.section to one"):
        load(path)


def test_a_section_that_is_not_there_is_named(tmp_path):
    path = saved({"model": {"ema": foreign_state()}}, tmp_path / "theirs.pth")
    with pytest.raises(
        WeightsError, match=r"no section 'state_dict' .* in the section\(s\) model\.e"
    ):
        load(path, section="state_dict")


def test_the_stated_hash_is_compared(file):
    load(file, sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    with pytest.raises(WeightsError, match=r"begins with [0-9a-f]{12}, init\.sha256 says 000000"):
        load(file, sha256="0" * 64)


def test_a_path_that_leads_nowhere_is_named(tmp_path):
    with pytest.raises(MachineError, match=r"no weight file at the path given \(…/typo\.pth\)"):
        load(tmp_path / "typo.pth")


@pytest.mark.parametrize("how", ["torch", "torch, before 1.6", "pickle"])
@pytest.mark.parametrize("name", ["theirs.pth", "theirs.safetensors"])
def test_a_hostile_file_is_refused_and_not_run(tmp_path, how, name):
    mark = tmp_path / "ran"
    (tmp_path / name).write_bytes(hostile_files(mark)[how])
    with pytest.raises(WeightsError, match="foreign code|cannot be read as safetensors"):
        load(tmp_path / name, section="state_dict")
    assert not mark.exists()


def test_safetensors_under_another_name_are_told_by_their_content(file, tmp_path):
    assert is_own(load(file.rename(tmp_path / "theirs.bin"))[0])


@pytest.mark.parametrize("left", [0, 5, 400])
def test_a_safetensors_file_cut_short_is_refused(file, left):
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(WeightsError, match=r"cannot be read as safetensors; it is cut short"):
        load(file)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_no_damage_to_a_file_of_torch_escapes_its_message(tmp_path, zipped):
    file = tmp_path / "theirs.pth"
    tensors = {f"layer{n}.weight": torch.ones(4, 3) for n in range(3)}
    torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
    whole, generator = file.read_bytes(), np.random.default_rng(0)
    refused = 0
    for number in range(400):
        damaged = bytearray(whole)
        if number % 2:
            damaged = damaged[: generator.integers(len(whole))]
        else:
            damaged[generator.integers(400)] = generator.integers(256)
        file.write_bytes(damaged)
        try:
            read_state(file)
        except WeightsError:  # anything else fails the test
            refused += 1
    assert refused > 200


@pytest.mark.parametrize(
    ("change", "stored"),
    [(torch.Tensor.to_sparse, r"torch\.sparse_coo"), (lambda t: t.to("meta"), r"without values")],
    ids=["sparse", "meta"],
)
def test_a_tensor_without_plain_values_is_refused(tmp_path, change, stored):
    name = "module.encoder.conv1.weight"
    file = saved(foreign_state(**{name: change(foreign_state()[name])}), tmp_path / "theirs.pth")
    with pytest.raises(WeightsError, match=rf"net\.conv1\.weight is stored as {stored}"):
        load(file)
