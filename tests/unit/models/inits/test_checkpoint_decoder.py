"""The decoder that a pretext task leaves behind, and voxel tasks that start from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from medssl.errors import WeightsError
from medssl.models.build import seeded_construction
from medssl.models.checkpoints import DECODER_FILE, load_contract, save_checkpoint
from medssl.models.contracts import Contract
from medssl.models.decoders import UNetDecoder, decoder_in
from medssl.models.inits.checkpoint import CheckpointInit, Config
from medssl.pretext import PRETEXT_TASKS
from training import tiny_backbone


def contract_of(backbone: Any) -> Contract:
    return Contract(
        spacing_mm=(1.0, 1.0, 1.0), orientation="RAS", axis_order="CXY",
        intensity={"kind": "percentile"}, in_channels=1, spatial_dims=2, plane="axial",
        backbone=backbone.config.model_dump(mode="json"), init={"name": "random"},
        pretext={"name": "inpainting"}, index_digest="a", store_digest="b", patients=(), seed=0,
        steps=1, package_versions={},
    )  # fmt: skip


def new_decoder(seed: int, out_channels: int = 3) -> UNetDecoder:
    with seeded_construction(seed, "decoder"):
        return UNetDecoder(tiny_backbone(2, 0), out_channels=out_channels)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a checkpoint with the decoder of a task that draws one channel."""
    backbone = tiny_backbone(2, 0)
    save_checkpoint(tmp_path, backbone, contract_of(backbone), new_decoder(1, out_channels=1))
    return tmp_path


def test_all_but_the_last_layer_is_that_of_the_pretext_task(folder):
    decoder, untouched = new_decoder(2), new_decoder(2).state_dict()
    told = CheckpointInit(Config(path=folder, decoder=True)).apply_decoder(decoder)
    pretrained = new_decoder(1, out_channels=1).state_dict()
    for name, tensor in decoder.state_dict().items():
        wanted = untouched if name.startswith("out.") else pretrained
        assert torch.equal(tensor, wanted[name]), name
    number = sum(not name.startswith("out.") for name in untouched)
    assert told == f"decoder of {number} tensors loaded, its last layer new"


def test_a_decoder_is_left_as_it_is_unless_asked_for(folder):
    decoder = new_decoder(2)
    assert CheckpointInit(Config(path=folder)).apply_decoder(decoder) == ""
    before = new_decoder(2).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.state_dict().items())


def test_a_checkpoint_without_a_decoder_says_so(tmp_path):
    backbone = tiny_backbone(2, 0)
    save_checkpoint(tmp_path, backbone, contract_of(backbone))
    with pytest.raises(WeightsError, match="holds no decoder"):
        CheckpointInit(Config(path=tmp_path, decoder=True)).apply_decoder(new_decoder(2))


def test_a_decoder_that_was_not_copied_or_is_another_is_refused(folder):
    init = CheckpointInit(Config(path=folder, decoder=True))
    file = folder / DECODER_FILE
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(WeightsError, match="do not belong together"):
        init.apply_decoder(new_decoder(2))
    file.unlink()
    with pytest.raises(WeightsError, match=r"there is no decoder\.safetensors beside it"):
        init.apply_decoder(new_decoder(2))


def test_a_decoder_of_other_widths_is_refused_and_left_as_it_is(folder):
    backbone = tiny_backbone(2, 0)
    levels = len(backbone.stages)
    other = UNetDecoder(backbone, out_channels=3, channels=(8,) * levels)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(WeightsError, match="has shape"):
        CheckpointInit(Config(path=folder, decoder=True)).apply_decoder(other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_the_contract_states_the_decoder(folder):
    assert len(load_contract(folder).decoder_sha256 or "") == 64


@pytest.mark.parametrize("name", [name for name in PRETEXT_TASKS if name != "multi"])
def test_a_task_says_truly_whether_it_draws(name):
    task = PRETEXT_TASKS.build(PRETEXT_TASKS.config_class(name)(), 2)
    assert task.draws == (decoder_in(task.build_head(tiny_backbone(2, 0))) is not None)


def test_several_tasks_draw_if_one_does():
    config = PRETEXT_TASKS.config_class("multi")
    assert PRETEXT_TASKS.build(
        config(tasks=({"name": "rotation"}, {"name": "inpainting"})), 2
    ).draws
    assert not PRETEXT_TASKS.build(
        config(tasks=({"name": "rotation"}, {"name": "jigsaw"})), 2
    ).draws
