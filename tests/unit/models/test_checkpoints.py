from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from medssl.errors import ConfigError, WeightsError
from medssl.models.backbones.base import Backbone
from medssl.models.backbones.monai import Config as BackboneConfig
from medssl.models.build import build_backbone
from medssl.models.checkpoints import (
    CONTRACT_FILE,
    CONTRACT_VERSION,
    MIGRATIONS,
    WEIGHTS_FILE,
    Contract,
    check_contract,
    history_of,
    lineage,
    load_backbone,
    load_contract,
    save_checkpoint,
)
from medssl.models.inits.checkpoint import Config as CheckpointConfig
from medssl.models.inits.random import Config as RandomConfig

STORED = Path(__file__).parent / "stored_contracts"
SMALL = BackboneConfig(depth=10, spatial_dims=2, base_channels=4)


def new_backbone(seed: int = 0, config: BackboneConfig = SMALL, in_channels: int = 1) -> Backbone:
    backbone, _ = build_backbone(config, RandomConfig(), in_channels=in_channels, seed=seed)
    return backbone


@pytest.fixture
def contract() -> Contract:
    return Contract(
        spacing_mm=(1.0, 1.0, 1.5),
        orientation="RAS",
        axis_order="CXY",
        intensity={"kind": "percentile", "lower": 0.5, "upper": 99.5},
        in_channels=1,
        spatial_dims=2,
        plane="axial",
        backbone=SMALL.model_dump(mode="json"),
        init={"name": "random", "source": "random", "sha256": None},
        pretext={"name": "rotation", "num_rotations": 4},
        index_digest="a" * 64,
        store_digest="b" * 64,
        patients=("0123456789abcdef",),
        seed=7,
        steps=100,
        package_versions={"torch": "2.10"},
        git_commit=None,
    )


@pytest.fixture
def folder(tmp_path: Path, contract: Contract) -> Path:
    """Return a run folder that holds a checkpoint."""
    save_checkpoint(tmp_path / "run" / "checkpoints" / "backbone", new_backbone(5), contract)
    return tmp_path / "run"


@pytest.fixture
def checkpoint(folder: Path) -> Path:
    return folder / "checkpoints" / "backbone"


def continue_from(path: Path, config: BackboneConfig = SMALL, **expected: Any) -> Backbone:
    backbone, _ = build_backbone(
        config, CheckpointConfig(path=path), in_channels=1, seed=0, expected=expected
    )
    return backbone


def same_weights(a: Backbone, b: Backbone) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def edit_weights(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors, and the hash in the contract with them, as a foreign tool would."""
    state = load((checkpoint / WEIGHTS_FILE).read_bytes())
    change(state)
    replace_weights(checkpoint, save(state))


def replace_weights(checkpoint: Path, content: bytes) -> None:
    (checkpoint / WEIGHTS_FILE).write_bytes(content)
    edit_contract(checkpoint, weights_sha256=hashlib.sha256(content).hexdigest())


def edit_contract(checkpoint: Path, **changes: Any) -> None:
    content = json.loads((checkpoint / CONTRACT_FILE).read_text())
    (checkpoint / CONTRACT_FILE).write_text(json.dumps({**content, **changes}))


# ------------------------------------------------------------------------------- what it gives


@pytest.mark.parametrize(
    "inside", [".", "checkpoints/backbone", f"checkpoints/backbone/{WEIGHTS_FILE}"]
)
def test_a_run_a_checkpoint_and_its_file_give_the_same_backbone(folder, contract, inside):
    backbone, found = load_backbone(folder / inside)
    assert same_weights(backbone, new_backbone(5))
    assert not backbone.training
    assert found.model_copy(update={"weights_sha256": None}) == contract


def test_the_public_function_is_this_one(folder):
    import medssl

    backbone, _ = medssl.load_backbone(str(folder))
    assert same_weights(backbone, new_backbone(5))


def test_the_contract_carries_the_hash_of_the_weights(checkpoint):
    content = (checkpoint / WEIGHTS_FILE).read_bytes()
    assert load_contract(checkpoint).weights_sha256 == hashlib.sha256(content).hexdigest()


def test_loading_keeps_the_random_state_of_the_process(folder):
    before = torch.get_rng_state()
    load_backbone(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_checkpoint_can_be_written_again(checkpoint, contract):
    save_checkpoint(checkpoint, new_backbone(6), contract)
    backbone, _ = load_backbone(checkpoint)
    assert same_weights(backbone, new_backbone(6))
    assert sorted(file.name for file in checkpoint.iterdir()) == [WEIGHTS_FILE, CONTRACT_FILE]


def test_the_init_continues_from_a_checkpoint(folder):
    backbone, report = build_backbone(
        SMALL,
        CheckpointConfig(path=folder),
        in_channels=1,
        seed=0,
        expected={"spacing_mm": [1, 1, 1.5], "orientation": "RAS"},
    )
    assert same_weights(backbone, new_backbone(5))
    assert report.percent == 100
    assert report.missing == report.unexpected == report.adapted == ()
    assert report.sha256 == load_contract(folder).weights_sha256


# ----------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("net.bn1.bias"), r"1 of the \d+ tensors .* are missing: net\.bn1\.bias\."),
        (
            lambda s: s.update(head=torch.zeros(2)),
            r"holds 1 tensors that backbone monai .* does not have: head\.",
        ),
        (
            lambda s: s.update({"net.bn1.bias": torch.zeros(3)}),
            r"tensor net\.bn1\.bias has shape \(3,\), wanted \(4,\)",
        ),
        (
            lambda s: s.update({"net.bn1.bias": torch.zeros(4, dtype=torch.float16)}),
            r"tensor net\.bn1\.bias is of type torch\.float16, wanted torch\.float32",
        ),
        (
            lambda s: s.update({"net.bn1.bias": torch.full((4,), torch.inf)}),
            r"tensor net\.bn1\.bias holds values that are not finite",
        ),
    ],
    ids=["missing", "extra", "shape", "dtype", "infinite"],
)
def test_tensors_that_do_not_fit_are_refused(checkpoint, change, message):
    edit_weights(checkpoint, change)
    with pytest.raises(WeightsError, match=message):
        load_backbone(checkpoint)
    with pytest.raises(WeightsError, match=message):
        continue_from(checkpoint)


@pytest.mark.parametrize("left", [0, 4, 2000, -1])
def test_a_file_cut_short_is_refused(checkpoint, left):
    content = (checkpoint / WEIGHTS_FILE).read_bytes()
    (checkpoint / WEIGHTS_FILE).write_bytes(content[:left])
    with pytest.raises(WeightsError, match="cut short, damaged, or not a safetensors file"):
        load_backbone(checkpoint)


def test_one_changed_bit_is_refused(checkpoint):
    content = bytearray((checkpoint / WEIGHTS_FILE).read_bytes())
    content[-1] ^= 1
    (checkpoint / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(WeightsError, match=r"has sha256 .*, its contract says .* do not belong"):
        load_backbone(checkpoint)


def test_a_hostile_pickle_under_the_right_name_is_refused_and_not_run(checkpoint, tmp_path):
    mark = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (os.system, (f"touch {mark}",))

    replace_weights(checkpoint, pickle.dumps(Bomb()))
    with pytest.raises(WeightsError, match="not a safetensors file"):
        load_backbone(checkpoint)
    assert not mark.exists()


def test_a_pickled_file_is_refused_unread(tmp_path):
    file = tmp_path / "model.pt"
    torch.save({"a": torch.zeros(1)}, file)
    with pytest.raises(WeightsError, match=r"Pickled files \(\.pt, \.pth\) are not read"):
        load_backbone(file)


def test_a_foreign_weight_file_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(save({"a": torch.zeros(1)}))
    with pytest.raises(WeightsError, match=r"called backbone\.safetensors and lies beside"):
        load_backbone(file)


def test_a_place_without_checkpoint_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"no checkpoint at 'nowhere': looked for backbone\.saf"):
        load_backbone(tmp_path / "nowhere")


def test_weights_without_contract_are_refused(checkpoint):
    (checkpoint / CONTRACT_FILE).unlink()
    with pytest.raises(WeightsError, match=r"has no contract\.json beside it"):
        load_backbone(checkpoint)


@pytest.mark.parametrize("text", ["", "{", "\udcff", "[" * 100_000], ids=len)
def test_a_contract_that_is_not_json_is_refused(checkpoint, text):
    (checkpoint / CONTRACT_FILE).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(WeightsError, match=r"contract\.json of checkpoint .* it is not JSON"):
        load_contract(checkpoint)


@pytest.mark.parametrize("text", ["[]", "{}", "null", '{"version": "2"}', '{"version": true}'])
def test_a_contract_without_a_version_is_refused(checkpoint, text):
    (checkpoint / CONTRACT_FILE).write_text(text)
    with pytest.raises(WeightsError, match=r"states no version, so it is not a contract"):
        load_contract(checkpoint)


@pytest.mark.parametrize("version", [0, -1])
def test_a_contract_of_a_version_that_never_was_is_refused(checkpoint, version):
    edit_contract(checkpoint, version=version)
    with pytest.raises(WeightsError, match=rf"of version {version}, which no medssl wrote"):
        load_contract(checkpoint)


def test_a_contract_of_a_later_version_is_refused(checkpoint):
    edit_contract(checkpoint, version=CONTRACT_VERSION + 1)
    with pytest.raises(
        WeightsError,
        match=r"contract of version 4, this medssl reads versions 1 to 3\. Install a newer medssl",
    ):
        load_contract(checkpoint)


def test_a_contract_with_a_wrong_field_names_it(checkpoint):
    edit_contract(checkpoint, in_channels="many", colour="blue")
    with pytest.raises(WeightsError, match=r"field\(s\) unknown: colour; wrong: in_channels\."):
        load_contract(checkpoint)


@pytest.mark.parametrize("field", sorted(Contract.model_fields.keys() - {"version"}))
def test_a_contract_that_lacks_a_field_names_it(checkpoint, field):
    content = json.loads((checkpoint / CONTRACT_FILE).read_text())
    del content[field]
    (checkpoint / CONTRACT_FILE).write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=rf"field\(s\) missing: {field}\."):
        load_contract(checkpoint)


# ------------------------------------------------------------------------------- its versions


def stored(name: str, folder: Path) -> Contract:
    """Return a contract as a medssl of that time wrote it, read by this one."""
    folder.mkdir()
    shutil.copy(STORED / f"{name}.json", folder / CONTRACT_FILE)
    (folder / WEIGHTS_FILE).touch()
    return load_contract(folder)


def test_every_version_has_a_stored_contract():
    stated = {json.loads(file.read_text())["version"] for file in STORED.glob("*.json")}
    assert stated == set(range(1, CONTRACT_VERSION + 1))
    assert set(MIGRATIONS) == set(range(1, CONTRACT_VERSION))


def test_the_first_contracts_of_version_1_were_made_without_blanking(tmp_path):
    found = stored("version_1_first", tmp_path / "old")
    assert found.version == CONTRACT_VERSION
    assert found.blank == ()
    assert found.permutation_set_hash == "c0ffee00" * 8
    assert found.permutation_set is None
    assert found.history == ()
    assert found.patients == ("0123456789abcdef", "fedcba9876543210")


def test_the_last_contracts_of_version_1_keep_what_they_state(tmp_path):
    found = stored("version_1_last", tmp_path / "old")
    assert found.blank == ("text",)
    assert found.permutation_set is not None
    assert found.permutation_set["kind"] == "greedy_max_min"
    assert lineage(found) == "random → jigsaw"


def test_a_contract_of_version_2_tells_the_whole_way(tmp_path):
    found = stored("version_2", tmp_path / "now")
    assert lineage(found) == "imagenet → rotation → jigsaw"
    assert [stage["weights_sha256"][0] for stage in history_of(found)] == ["e", "d"]


def test_a_contract_of_version_3_names_the_decoder_that_earlier_ones_lack(tmp_path):
    assert stored("version_3", tmp_path / "now").decoder_sha256 == "f" * 64
    assert stored("version_2", tmp_path / "before").decoder_sha256 is None


@pytest.mark.parametrize(
    ("family", "wanted"),
    [
        ("inflated", "inflated ImageNet → rotation → jigsaw"),
        ("slicewise", "slice-by-slice ImageNet → rotation → jigsaw"),
        ("torchvision", "imagenet → rotation → jigsaw"),
    ],
)
def test_weights_that_began_at_imagenet_say_how_they_got_to_volumes(tmp_path, family, wanted):
    found = stored("version_2", tmp_path / "now")
    assert lineage(found.model_copy(update={"backbone": {"name": family}})) == wanted


def test_a_stored_backbone_agrees_with_one_that_has_later_settings(tmp_path):
    check_contract(stored("version_1_first", tmp_path / "old"), backbone=SMALL)


def test_reading_an_old_contract_leaves_its_file(tmp_path):
    stored("version_1_first", tmp_path / "old")
    kept = (tmp_path / "old" / CONTRACT_FILE).read_text()
    assert kept == (STORED / "version_1_first.json").read_text()


def test_a_contract_with_an_unknown_backbone_names_it(checkpoint):
    edit_contract(checkpoint, backbone={"name": "tensorflow"})
    with pytest.raises(ConfigError, match="no backbone 'tensorflow'"):
        load_backbone(checkpoint)


def test_a_checkpoint_of_another_backbone_is_refused(folder):
    other = SMALL.model_copy(update={"depth": 18})
    with pytest.raises(WeightsError, match=r'backbone: found .*"depth": 10.* wanted .*: 18'):
        continue_from(folder, other)


def test_a_checkpoint_of_other_channels_is_refused(folder):
    with pytest.raises(WeightsError, match="in_channels: found 1, wanted 2"):
        build_backbone(SMALL, CheckpointConfig(path=folder), in_channels=2, seed=0)


@pytest.mark.parametrize(
    ("field", "wanted", "message"),
    [
        ("spacing_mm", (1.0, 1.0, 1.0), r"spacing_mm: found \[1\.0, 1\.0, 1\.5\], wanted \[1\.0,"),
        ("spacing_mm", None, r"spacing_mm: found \[1\.0, 1\.0, 1\.5\], wanted null"),
        ("orientation", "LPS", r'orientation: found "RAS", wanted "LPS"'),
        ("axis_order", "CXYZ", r'axis_order: found "CXY", wanted "CXYZ"'),
        ("plane", "coronal", r'plane: found "axial", wanted "coronal"'),
        ("intensity", {"kind": "window_hu"}, r"intensity: found .*percentile.* wanted .*window_hu"),
        ("pretext", {"name": "jigsaw"}, r"pretext: found .*rotation.* wanted .*jigsaw"),
        ("permutation_set_hash", "c0ffee", r'permutation_set_hash: found null, wanted "c0ffee"'),
    ],
)
def test_a_contract_that_differs_names_field_found_and_wanted(folder, field, wanted, message):
    with pytest.raises(WeightsError, match=message):
        continue_from(folder, **{field: wanted})


def test_every_differing_field_is_named_at_once(contract):
    with pytest.raises(WeightsError, match=r"orientation: .*; plane: .*Prepare the scans as"):
        check_contract(contract, orientation="LPS", plane=None, seed=7)


def test_a_field_that_contracts_do_not_have_is_refused(contract):
    with pytest.raises(WeightsError, match="a contract has no field 'spacing'"):
        check_contract(contract, spacing=1)


def test_numbers_agree_up_to_rounding(contract):
    check_contract(contract, spacing_mm=[1, 1 + 1e-9, 1.5], backbone=SMALL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axis_order": "CXYZ"}, r'axis_order is "CXYZ", its backbone says "CXY"'),
        ({"spatial_dims": 3}, r"spatial_dims is 3, its backbone says 2"),
        (
            {"preprocessing": {"spacing_mm": [1.0, 1.0, 9.0]}},
            r"spacing_mm is \[1\.0, 1\.0, 1\.5\], its preprocessing says \[1\.0, 1\.0, 9\.0\]",
        ),
        (
            {"preprocessing": {"intensity": {"kind": "window_hu"}}},
            r"intensity is .*percentile.*, its preprocessing says .*window_hu.*",
        ),
        (
            {"preprocessing": {"blank": ["text"]}},
            r'blank is \[\], its preprocessing says \["text"\]',
        ),
    ],
)
def test_a_contract_that_contradicts_itself_is_refused(checkpoint, changes, message):
    edit_contract(checkpoint, **changes)
    with pytest.raises(WeightsError, match=f"contradicts itself: {message}. Copy it again"):
        load_backbone(checkpoint)
    if "spatial_dims" not in changes:  # which the init compares with the study's backbone first
        with pytest.raises(WeightsError, match=f"contradicts itself: {message}"):
            continue_from(checkpoint)


STAGE = {"init": {"name": "random"}, "pretext": None, "steps": 1, "seed": 0, "index_digest": "a",
         "weights_sha256": "b"}  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("spacing_mm", [0.0, 1.0, 1.0]),
        ("spacing_mm", [-1.0, 1.0, 1.0]),
        ("spacing_mm", [float("nan"), 1.0, 1.0]),
        ("spacing_mm", [float("inf"), 1.0, 1.0]),
        ("orientation", "XYZ"),
        ("orientation", "RLS"),
        ("orientation", "RASS"),
        ("in_channels", 0),
        ("in_channels", -1),
        ("in_channels", 10**9),
        ("init", {}),
        ("pretext", {"name": 3}),
        ("history", [{}]),
        ("history", [{**STAGE, "init": 3}]),
        ("history", [{**STAGE, "init": None}]),
    ],
)
def test_a_contract_that_states_what_cannot_be_names_the_field(checkpoint, field, value):
    edit_contract(checkpoint, **{field: value})
    with pytest.raises(WeightsError, match=rf"version 3; field\(s\) wrong: {field}"):
        load_backbone(checkpoint)


def test_a_contract_with_a_history_and_an_older_preprocessing_loads(checkpoint):
    older = {"intensity": {"kind": "percentile"}}
    edit_contract(checkpoint, history=[STAGE], preprocessing=older)
    _, contract = load_backbone(checkpoint)
    assert contract.history == (STAGE,)
    assert contract.preprocessing == older
