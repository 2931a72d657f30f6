from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from medssl.models.backbones.base import Backbone
from medssl.models.backbones.monai import Config
from medssl.models.build import build_backbone, seeded_construction
from medssl.models.inits.random import Config as RandomConfig

SMALL = Config(depth=10, spatial_dims=2, base_channels=4)


def build(seed: int) -> Backbone:
    backbone, _ = build_backbone(SMALL, RandomConfig(), in_channels=1, seed=seed)
    return backbone


def flat(backbone: Backbone) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in backbone.parameters()])


def test_the_same_seed_gives_the_same_weights_whatever_ran_before():
    first = flat(build(1))
    torch.rand(100)
    assert torch.equal(flat(build(1)), first)


def test_another_seed_gives_other_weights():
    assert not torch.equal(flat(build(1)), flat(build(2)))


def test_no_global_random_state_is_changed():
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    numpy_state = np.random.get_state(legacy=False)["state"]["pos"]  # noqa: NPY002
    build(1)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert np.random.get_state(legacy=False)["state"]["pos"] == numpy_state  # noqa: NPY002


def test_the_random_state_comes_back_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError), seeded_construction(0, "test"):
        torch.rand(3).view(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_purposes_draw_different_weights():
    drawn = []
    for purpose in ("head", "decoder"):
        with seeded_construction(0, purpose):
            drawn.append(torch.nn.Linear(4, 4).weight)
    assert not torch.equal(*drawn)
