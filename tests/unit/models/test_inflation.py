from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import AvgPool2dSame, Conv2dSame
from timm.layers.pool2d_same import MaxPool2dSame
from torch import Tensor, nn
from torchvision import models

from medssl.errors import ConfigError
from medssl.models.build import seeded_construction
from medssl.models.inflated_layers import repeat_ends, spread_kernel
from medssl.models.inflation import (
    LAW_TOLERANCE,
    check_law,
    evaluating,
    inflate,
    inflate_state,
    law_difference,
    num_draws,
    random_state,
)

SPREADS = ("mean", "centre")


def run(net: Any, images: Tensor) -> Sequence[Tensor]:
    found = net(images)
    return found if isinstance(found, list) else [found]


def image(channels: int = 3, x: int = 64, y: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(1, channels, x, y, generator=generator)


def layers_differ(flat: nn.Module, deep: nn.Module, image_BCXY: Tensor, num_slices: int) -> float:
    """Return the largest violation of the law, over all features and slices."""
    volume = image_BCXY.unsqueeze(-1).expand(*image_BCXY.shape, num_slices)
    with torch.no_grad(), evaluating(flat), evaluating(deep):
        pairs = zip(run(deep, volume), run(flat, image_BCXY), strict=True)
        return max(law_difference(found, wanted) for found, wanted in pairs)


# ----------------------------------------------------------------------------------- the law

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "torchvision densenet121": lambda: models.densenet121(weights=None).features,
    "torchvision efficientnet_b0": lambda: models.efficientnet_b0(weights=None).features,
    "torchvision convnext_tiny": lambda: models.convnext_tiny(weights=None).features,
    "torchvision mobilenet_v3": lambda: models.mobilenet_v3_small(weights=None).features,
    **{
        f"timm {name}": lambda name=name: timm.create_model(name, features_only=True)
        for name in (
            "convnext_atto",  # one convolution a step of its MLP
            "densenet121",
            "efficientnet_b0",
            "regnety_002",  # its gates are of another type
            "resnet10t",  # pools before shortcuts
            "tf_efficientnet_lite0",
            "tf_mobilenetv3_small_minimal_100",
        )
    },
}


@pytest.fixture(scope="module", params=NETWORKS)  # one network at a time is kept
def network(request: pytest.FixtureRequest) -> nn.Module:
    """A 2D network with its own random weights, and statistics as after some training."""
    with seeded_construction(0, "test"):
        flat = NETWORKS[request.param]()
        for name, tensor in flat.state_dict().items():
            if name.endswith(("running_mean", "bias")):
                tensor.normal_(0, 0.1)
            elif tensor.is_floating_point() and tensor.ndim in (1, 3):
                tensor.uniform_(0.5, 1.5)
    return flat


@pytest.mark.parametrize(("spread", "z_downsampling"), [("mean", 1), ("centre", None)])
def test_a_repeated_image_gives_the_2d_features_in_every_slice(network, spread, z_downsampling):
    deep, _ = inflate(network, image(), run, z_downsampling=z_downsampling, spread=spread)
    assert layers_differ(network, deep, image(), num_slices=3) <= LAW_TOLERANCE


def test_inflation_keeps_names_and_leaves_the_2d_network_alone(network):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    modes = [layer.training for layer in network.modules()]
    deep, _ = inflate(network, image(), run)
    after = network.state_dict()
    assert list(deep.state_dict()) == list(before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [layer.training for layer in network.modules()] == modes
    assert not any(
        "2d" in type(layer).__name__.lower()
        for layer in deep.modules()
        if not any(layer.children())
    )


KERNELS = st.integers(1, 5)


@settings(max_examples=60, deadline=None)
@given(
    kernel=st.tuples(KERNELS, KERNELS),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
    same=st.booleans(),
    z_kernel=st.sampled_from([1, 3, 5]),
    along_z=st.booleans(),
    num_slices=st.integers(1, 7),
    spread=st.sampled_from(SPREADS),
)
def test_every_convolution_follows_the_law(
    kernel, stride, dilation, groups, same, z_kernel, along_z, num_slices, spread
):
    padding = "" if same else tuple(dilation * (k - 1) // 2 for k in kernel)
    cls = Conv2dSame if same else nn.Conv2d
    with seeded_construction(0, "test"):
        flat = nn.Sequential(
            cls(4, 8, kernel, stride, padding, dilation, groups=groups)  # type: ignore[arg-type]
        )
    x_BCXY = image(4, 12, 18)  # both multiples of every stride
    if not same and any(
        (size + 2 * p - dilation * (k - 1) - 1) // stride + 1 != size // stride
        for size, p, k in zip((12, 18), padding, kernel, strict=True)
    ):
        return  # the strides of such a layer are no numbers
    deep, strides = inflate(
        flat, x_BCXY, run, z_kernel=z_kernel, z_downsampling=None if along_z else 1, spread=spread
    )
    assert layers_differ(flat, deep, x_BCXY, num_slices) <= LAW_TOLERANCE
    volume = x_BCXY.unsqueeze(-1).expand(*x_BCXY.shape, num_slices)
    assert deep(volume).shape[-1] == math.ceil(num_slices / strides.along_z[stride])


POOLS = {
    "max": nn.MaxPool2d(3, 2, 1),
    "max, ceil": nn.MaxPool2d(2, 2, ceil_mode=True),
    "max, same": MaxPool2dSame(3, 2),
    "mean": nn.AvgPool2d(3, 2, 1),
    "mean, inside": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "mean, divided": nn.AvgPool2d(2, 2, divisor_override=3),
    "mean, same": AvgPool2dSame(3, 2),
    "mean, stays": nn.AvgPool2d(3, 1, 1),
    "global": nn.AdaptiveAvgPool2d(1),
    "global max": nn.AdaptiveMaxPool2d((1, 1)),
    "instance": nn.InstanceNorm2d(3, affine=True),
    "dropout": nn.Dropout2d(),
    "group": nn.GroupNorm(3, 3),
}


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("num_slices", [1, 3, 4])
@pytest.mark.parametrize("z_downsampling", [None, 1])
def test_every_other_layer_follows_the_law(name, num_slices, z_downsampling):
    flat = nn.Sequential(POOLS[name])
    deep, strides = inflate(flat, image(), run, z_downsampling=z_downsampling)
    assert layers_differ(flat, deep, image(), num_slices) <= LAW_TOLERANCE
    if "global" not in name:
        volume = image().unsqueeze(-1).expand(1, 3, 64, 32, num_slices)
        stride = max(strides.along_z.values())
        assert deep(volume).shape[-1] == math.ceil(num_slices / stride)


# --------------------------------------------------------------------------- where weights land


def test_a_mean_kernel_is_the_2d_one_divided_by_its_slices():
    weight = torch.arange(9.0).view(1, 1, 3, 3)
    deep = spread_kernel(weight, 3, "mean")
    assert deep.shape == (1, 1, 3, 3, 3)
    for z in range(3):
        torch.testing.assert_close(deep[..., z], weight / 3)


def test_a_centre_kernel_is_the_2d_one_in_the_middle_slice():
    weight = torch.arange(9.0).view(1, 1, 3, 3)
    deep = spread_kernel(weight, 5, "centre")
    assert torch.equal(deep[..., 2], weight)
    assert int(deep.count_nonzero()) == int(weight.count_nonzero())


def one_convolution(weight: Tensor) -> nn.Sequential:
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    conv.weight.data = weight
    return nn.Sequential(conv)


@pytest.mark.parametrize("spread", SPREADS)
def test_kernels_lie_in_x_and_y_and_reach_along_z(spread):
    """A single voxel shows the kernel: mirrored in X and Y, and its share in three slices."""
    weight = torch.arange(1.0, 10).view(1, 1, 3, 3)
    deep, _ = inflate(one_convolution(weight), image(1), run, spread=spread)
    voxel = torch.zeros(1, 1, 5, 6, 7)
    voxel[0, 0, 2, 3, 3] = 1
    answer_XYZ = deep(voxel)[0, 0].detach()
    mirrored = weight[0, 0].flip(0, 1)
    shares = {"mean": {2: 1 / 3, 3: 1 / 3, 4: 1 / 3}, "centre": {3: 1.0}}[spread]
    for z in range(7):
        torch.testing.assert_close(answer_XYZ[1:4, 2:5, z], shares.get(z, 0.0) * mirrored)
    assert int(answer_XYZ.count_nonzero()) == 9 * len(shares)


def test_a_centre_inflated_network_sees_slices_singly():
    deep, _ = inflate(
        nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, 1, 1)),
        image(1), run, z_downsampling=1, spread="centre",
    )  # fmt: skip
    volume = torch.rand(1, 1, 16, 16, 5)
    alone = torch.cat([deep(volume[..., z : z + 1]) for z in range(5)], dim=-1)
    torch.testing.assert_close(deep(volume), alone)


def test_a_gate_looks_at_the_whole_volume():
    flat = timm.create_model("efficientnet_b0", features_only=True).blocks[0][0].se
    with torch.no_grad():
        flat.conv_expand.weight.mul_(50)
    deep, _ = inflate(flat, image(32), run)
    volume = torch.cat([torch.zeros(1, 32, 4, 4, 2), torch.ones(1, 32, 4, 4, 2)], dim=-1)
    wanted = torch.full((1, 32, 4, 4), 0.5)
    gate = flat(wanted) / wanted
    torch.testing.assert_close(deep(volume)[..., -1], gate)


@pytest.mark.parametrize("spread", SPREADS)
def test_state_is_inflated_by_the_rule_of_the_network(spread):
    flat = nn.Sequential(nn.Conv2d(3, 4, 7, 2, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 1, 2))
    deep, _ = inflate(flat, image(), run, spread=spread)
    own = deep.state_dict()
    state, how = inflate_state(flat.state_dict(), own, spread)
    assert all(torch.equal(state[name], own[name]) for name in own)
    laid = {
        "mean": "7 x 7 spread over 3 slices, divided by 3",
        "centre": "7 x 7 in the middle one of 3 slices, zeros in the others",
    }
    assert how == {
        "0.weight": f"inflated: {laid[spread]}",
        "2.weight": "inflated: 1 x 1 in one slice",
    }


def test_a_layer_scale_gets_an_axis_and_says_so():
    like = {"scale": torch.zeros(6, 1, 1, 1)}
    state, how = inflate_state({"scale": torch.rand(6, 1, 1)}, like, "mean")
    assert state["scale"].shape == (6, 1, 1, 1)
    assert how == {"scale": "one axis added for the slices"}


def test_random_kernels_have_the_spread_of_a_3d_draw_and_differ_from_slice_to_slice():
    def draw() -> nn.Sequential:
        conv = nn.Conv2d(32, 64, 3, padding=1)
        nn.init.kaiming_normal_(conv.weight)
        return nn.Sequential(conv)

    with seeded_construction(0, "test"):
        draws = [draw() for _ in range(3)]
        wanted = nn.Conv3d(32, 64, 3)
        expected = float(nn.init.kaiming_normal_(wanted.weight).detach().std())
    deep, _ = inflate(draws[0], image(32), run)
    assert num_draws(draws[0], deep) == 3
    state = random_state([net.state_dict() for net in draws], deep.state_dict())
    weight = state["0.weight"]
    assert weight.shape == wanted.weight.shape
    assert float(weight.std()) == pytest.approx(expected, rel=0.02)
    slices = weight.movedim(-1, 0).flatten(1)
    assert float(torch.corrcoef(slices).fill_diagonal_(0).abs().max()) < 0.05
    assert torch.equal(state["0.bias"], draws[0].state_dict()["0.bias"])


# ------------------------------------------------------------------------------------ strides


@pytest.fixture(scope="module")
def steps() -> nn.Sequential:
    """Five halvings, as most networks have them; a parallel branch in the fourth."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, 2, 1)
            self.pool = nn.AvgPool2d(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + self.pool(x)

    with seeded_construction(0, "test"):
        halves = [nn.Conv2d(1, 2, 7, 2, 3), nn.MaxPool2d(3, 2, 1), nn.Conv2d(2, 2, 1, 2)]
        return nn.Sequential(*halves, Branches(), nn.Conv2d(2, 2, 2, 2))


@pytest.mark.parametrize(
    ("z_downsampling", "wanted"),
    [
        (None, [1, 2, 4, 8, 16, 32]),
        (32, [1, 2, 4, 8, 16, 32]),
        (4, [1, 1, 1, 1, 2, 4]),
        (2, [1, 1, 1, 1, 1, 2]),
        (1, [1, 1, 1, 1, 1, 1]),
    ],
)
def test_the_last_steps_shrink_z(steps, z_downsampling, wanted):
    deep, strides = inflate(steps, image(1), run, z_downsampling=z_downsampling)
    assert strides.along_z == dict(zip([1, 2, 4, 8, 16, 32], wanted, strict=True))
    for num_slices in (1, 5, 33):
        found = deep(torch.rand(1, 1, 64, 32, num_slices))
        assert found.shape == (1, 2, 2, 1, math.ceil(num_slices / wanted[-1]))
    assert layers_differ(steps, deep, image(1), num_slices=5) <= LAW_TOLERANCE


def test_a_step_of_four_can_be_shared():
    flat = nn.Sequential(nn.Conv2d(1, 2, 4, 4), nn.Conv2d(2, 2, 2, 2))
    deep, strides = inflate(flat, image(1), run, z_downsampling=4)
    assert strides.along_z == {1: 1, 4: 2, 8: 4}
    assert deep[0].kernel_size == (4, 4, 3)
    assert deep[1].kernel_size == (2, 2, 2)


def test_an_even_kernel_does_not_reach_along_a_z_that_stays():
    deep, _ = inflate(nn.Sequential(nn.Conv2d(1, 2, 2, 2)), image(1), run, z_downsampling=1)
    assert deep[0].kernel_size == (2, 2, 1)


def test_no_slice_is_skipped_where_the_2d_kernel_skips_no_pixel():
    deep, _ = inflate(nn.Sequential(nn.Conv2d(1, 2, 4, 4)), image(1), run, z_kernel=1)
    assert deep[0].kernel_size == (4, 4, 4)


@pytest.mark.parametrize("z_downsampling", [3, 64, 6])
def test_a_z_downsampling_that_cannot_be_had_names_those_that_can(steps, z_downsampling):
    with pytest.raises(
        ConfigError,
        match=rf"z_downsampling: {z_downsampling} cannot be had with this network, which shrinks X "
        r"and Y by 32 in steps\. Choose one of 1, 2, 4, 8, 16, 32\.",
    ):
        inflate(steps, image(1), run, z_downsampling=z_downsampling)


@given(length=st.integers(1, 20), kernel=st.integers(1, 7), stride=st.integers(1, 5))
def test_repeated_ends_are_copies_of_the_outermost_slices(length, kernel, stride):
    x = torch.arange(1.0, length + 1).view(1, 1, 1, 1, length)
    row = repeat_ends(x, kernel, stride).flatten().tolist()
    num = math.ceil(length / stride)
    assert len(row) == (num - 1) * stride + kernel
    assert row == sorted(row)
    assert set(row) <= set(x.flatten().tolist())


# ---------------------------------------------------------------------------------- refusals


class WithPosition(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 4, 1, 1))
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.position


class MeanOfRows(nn.Module):
    """2D code between layers: on volumes it runs, and means something else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x - x.mean(-1, keepdim=True)


class Transposed(MeanOfRows):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.permute(0, 1, 3, 2))


@pytest.mark.parametrize(
    ("flat", "words"),
    [
        (nn.Sequential(nn.ConvTranspose2d(3, 4, 3)), r"ConvTranspose2d \(0\)"),
        (nn.Sequential(nn.ZeroPad2d(1)), r"ZeroPad2d \(0\)"),
        (nn.Sequential(nn.Upsample(scale_factor=2)), r"Upsample \(0\)"),
        (WithPosition(), r"WithPosition \(the network itself\)"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")),
            r"Conv2d \(0\) with padding_mode 'reflect'",
        ),
        (nn.Sequential(nn.AdaptiveAvgPool2d(7)), r"AdaptiveAvgPool2d \(0\) with output_size 7"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3, stride=(2, 1), padding=1)),
            r"the strides of 0, which differ in X and Y",
        ),
        (
            nn.Sequential(*[nn.Bilinear(1, 1, 1) for _ in range(5)]),
            r"Bilinear \(0, 1, 2 and 2 more\)",
        ),
    ],
)
def test_what_has_no_3d_form_is_refused_by_name(flat, words):
    with pytest.raises(
        ConfigError,
        match=rf"this network cannot be inflated to 3D; there is no 3D form of {words}.*Choose a "
        "convolutional network, .*or backbone slicewise",
    ):
        inflate(flat, image(), run)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_transformers_are_refused_by_name(name):
    net = (
        timm.create_model(name, num_classes=0, depth=1)
        if "vit" in name
        else (timm.create_model(name, num_classes=0, depths=(1, 1, 1, 1)))
    )
    words = "VisionTransformer" if "vit" in name else "WindowAttention"
    with pytest.raises(ConfigError, match=rf"no 3D form of .*{words}"):
        inflate(net, image(), run)


def test_hooks_are_refused():
    flat = nn.Sequential(nn.Conv2d(3, 4, 3))
    flat[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ConfigError, match=r"no 3D form of Conv2d with hooks \(0\)"):
        inflate(flat, image(), run)


def law(flat: nn.Module) -> nn.Module:
    deep, _ = inflate(flat, image(), run)
    check_law(flat, deep, image(), run, name="this network", spread="mean")
    return deep


def test_the_check_passes_a_network_that_follows_the_law():
    deep = law(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()))
    assert deep(torch.rand(1, 3, 5, 8, 9)).shape == (1, 4, 5, 8, 9)


def test_2d_code_that_gives_other_features_is_refused():
    with pytest.raises(ConfigError, match=r"the features of stage 0 differ from the 2D network's"):
        law(MeanOfRows())


def test_2d_code_that_cannot_run_on_volumes_is_refused():
    with pytest.raises(ConfigError, match="something between its layers, which is written for 2D"):
        law(Transposed())


def test_a_layer_scale_of_nearly_zero_hides_nothing_from_the_check():
    class Hidden(MeanOfRows):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(4)
            nn.init.constant_(self.norm.weight, 1e-9)
            self.through = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.through(x) + self.norm(super().forward(x))

    with pytest.raises(ConfigError, match="differ from the 2D network's"):
        law(Hidden())


def test_the_check_changes_neither_weights_nor_random_state():
    flat = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
    deep, _ = inflate(flat, image(), run)
    before = [{k: v.clone() for k, v in net.state_dict().items()} for net in (flat, deep)]
    random = torch.get_rng_state()
    check_law(flat, deep, image(), run, name="this network", spread="mean")
    assert torch.equal(torch.get_rng_state(), random)
    for net, state in zip((flat, deep), before, strict=True):
        assert net.training
        assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())


def test_features_that_are_all_equal_prove_nothing():
    assert law_difference(torch.zeros(1, 2, 3, 3, 4), torch.zeros(1, 2, 3, 3)) == math.inf


def test_features_of_another_shape_do_not_follow_the_law():
    assert law_difference(torch.rand(1, 2, 3, 4), torch.rand(1, 2, 3, 4)) == math.inf
