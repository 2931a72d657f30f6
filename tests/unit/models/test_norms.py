from __future__ import annotations

import pytest
import torch
from monai.networks.nets.resnet import resnet10
from timm.layers.norm_act import BatchNormAct2d, GroupNormAct
from torch import nn

from medssl.errors import ConfigError
from medssl.models.norms import NormConfig, check_file_norm, replace_batch_norms


def net(channels: int = 48) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, channels, 3),
        nn.BatchNorm2d(channels, eps=1e-3),
        nn.Sequential(BatchNormAct2d(channels, act_layer=nn.SiLU)),
    )


@pytest.mark.parametrize(("norm", "groups"), [("group", 16), ("instance", 48)])
def test_every_batch_norm_is_replaced(norm, groups):
    replaced = net()
    with torch.no_grad():
        replaced[1].weight.fill_(0.25)
    replace_batch_norms(replaced, norm, "a network")
    assert not any(isinstance(m, nn.BatchNorm2d) for m in replaced.modules())
    assert isinstance(replaced[1], nn.GroupNorm)
    assert replaced[1].num_groups == groups  # of 48 channels; 16 is the largest divisor of 32
    assert replaced[1].eps == 1e-3
    assert replaced[1].weight.unique().tolist() == [0.25]


def test_a_joined_activation_stays():
    replaced = net()
    replace_batch_norms(replaced, "group", "a network")
    joined = replaced[2][0]
    assert isinstance(joined, GroupNormAct)
    assert isinstance(joined.act, nn.SiLU)
    x = torch.randn(2, 48, 5, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(joined(x), nn.functional.silu(nn.functional.group_norm(x, 16)))


def test_the_answer_to_an_image_does_not_depend_on_its_batch():
    replaced = net()
    replace_batch_norms(replaced, "instance", "a network")
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(replaced(x)[:1], replaced(x[:1]))


@pytest.mark.parametrize("norm", [None, "batch"])
def test_batch_norm_stays_where_it_is_chosen(norm):
    kept = net()
    before = [type(m) for m in kept.modules()]
    replace_batch_norms(kept, norm, "a network")
    assert [type(m) for m in kept.modules()] == before


def test_a_network_of_3d_is_replaced_wholly():
    """MONAI's own argument would reach the stem alone."""
    whole = resnet10(spatial_dims=3, n_input_channels=1)
    replace_batch_norms(whole, "group", "resnet10")
    assert not any(isinstance(m, nn.BatchNorm3d) for m in whole.modules())


@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
@pytest.mark.parametrize(
    "other", [nn.LayerNorm(4), nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm1d(4))]
)
def test_a_network_of_other_norms_refuses_the_choice(norm, other):
    with pytest.raises(ConfigError, match=f"norm: {norm} takes .* and a network has none"):
        replace_batch_norms(nn.Sequential(other), norm, "a network")


def test_published_weights_of_batch_norm_are_for_batch_norm_alone():
    check_file_norm(None, "a.pth")
    check_file_norm("batch", "a.pth")
    with pytest.raises(ConfigError, match=r"a\.pth was trained with batch norm, .* norm: group"):
        check_file_norm("group", "a.pth")


def test_a_config_without_norm_is_written_as_before():
    assert NormConfig(name="a").model_dump() == {"name": "a"}
    assert NormConfig(name="a", norm="group").model_dump(mode="json") == {
        "name": "a",
        "norm": "group",
    }
