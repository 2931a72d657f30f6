"""The networks of MONAI, in 3D (or 2D), as encoders: without classifier or decoder.

Sources: Hara et al., Can spatiotemporal 3D CNNs retrace the history of 2D CNNs and ImageNet?, CVPR
2018 (resnet); Huang et al., Densely connected convolutional networks, CVPR 2017 (densenet);
Hatamizadeh et al., Swin UNETR, BrainLes 2021 (swin_unetr); Myronenko, 3D MRI brain tumor
segmentation using autoencoder regularization, BrainLes 2018 (segresnet). As implemented by MONAI.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal, cast

from monai.networks.nets.densenet import DenseNet
from monai.networks.nets.resnet import ResNet
from monai.networks.nets.segresnet import SegResNet
from monai.networks.nets.swin_unetr import SwinTransformer
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from medssl.errors import MachineError
from medssl.models.backbones.base import Backbone, Stage
from medssl.models.norms import NormConfig, refuse_norm, replace_batch_norms

RESNET_BLOCKS: dict[int, tuple[str, list[int]]] = {
    10: ("basic", [1, 1, 1, 1]),
    18: ("basic", [2, 2, 2, 2]),
    34: ("basic", [3, 4, 6, 3]),
    50: ("bottleneck", [3, 4, 6, 3]),
}
EXPANSION = {"basic": 1, "bottleneck": 4}
DENSENET_BLOCKS: dict[int, tuple[int, ...]] = {121: (6, 12, 24, 16), 169: (6, 12, 32, 32)}

SWIN_DEPTHS, SWIN_HEADS, SWIN_WINDOW, SWIN_PATCH = (2, 2, 2, 2), (3, 6, 12, 24), 7, 2
"""As in SwinUNETR, whose encoder has the same names here without ``swinViT.``."""

SEGRESNET_BLOCKS = (1, 2, 2, 4)
"""Residual blocks a level, as in the paper."""

INPUT_MEAN, INPUT_STD = 0.5, 0.5
"""Brings images in [0, 1] to [-1, 1]."""


@dataclass(frozen=True)
class Kind:
    """Which settings a variant takes.

    Attributes:
        base_channels: the default.
        multiple: what base_channels must be a multiple of.
        depths: the depths there are, the default first; empty: it has but one.
        residual: whether the stride of the stem and the shortcut can be chosen.
    """

    base_channels: int
    multiple: int = 1
    depths: tuple[int, ...] = ()
    residual: bool = False


KINDS: dict[str, Kind] = {
    "resnet": Kind(64, depths=(18, 10, 34, 50), residual=True),
    "densenet": Kind(64, multiple=2, depths=(121, 169)),  # each layer adds half as many
    "swin_unetr": Kind(48, multiple=12),  # MONAI's own rule
    "segresnet": Kind(32, multiple=8),  # its norm has 8 groups
}


class Config(NormConfig):
    """Which network. Settings that are not given take the variant's default.

    Attributes:
        variant: the kind of network.
        depth: number of layers: of resnet 10, 18 (default), 34 or 50; of densenet 121 (default) or
            169.
        spatial_dims: 2 or 3.
        base_channels: feature maps of the first stage (resnet and densenet: 64, swin_unetr: 48,
            segresnet: 32); later stages have multiples of it.
        stem_stride: of resnet: 2 (default) halves the image at once, as in 2D; 1 keeps small
            structures, at eight times the cost of the stem in 3D. All later strides follow.
        shortcut: of resnet: how a block that halves the resolution passes its input on: ``B``
            (default) through a 1 x 1 convolution, ``A`` as it is, every second voxel, with channels
            of zeros added (MedicalNet's networks of depth 18 and 34).
    """

    name: Literal["monai"] = "monai"
    variant: Literal["resnet", "densenet", "swin_unetr", "segresnet"] = "resnet"
    depth: Literal[10, 18, 34, 50, 121, 169] | None = None
    spatial_dims: Literal[2, 3] = 3
    base_channels: int | None = Field(default=None, ge=4, le=256)
    stem_stride: Literal[1, 2] | None = None
    shortcut: Literal["A", "B"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        """Write down the variant's defaults, so that a resolved configuration states them."""
        kind = KINDS.get(given.get("variant", "resnet")) if isinstance(given, dict) else None
        if kind is None:
            return given
        complete = dict(given)
        defaults = {
            "base_channels": kind.base_channels,
            "depth": kind.depths[0] if kind.depths else None,
            "stem_stride": 2 if kind.residual else None,
        }
        if kind.residual and complete.get("shortcut") == "B":
            complete["shortcut"] = None  # as in every configuration from before there was a choice
        for key, default in defaults.items():
            if complete.get(key) is None:
                complete[key] = default
        return complete

    @model_validator(mode="after")
    def _fits(self) -> Config:
        kind = KINDS[self.variant]
        if self.depth is not None and self.depth not in kind.depths:
            known = ", ".join(map(str, sorted(kind.depths)))
            remedy = f"choose one of {known}" if kind.depths else "leave depth out"
            raise ValueError(f"there is no {self.variant} of depth {self.depth}: {remedy}")
        for key in ("stem_stride", "shortcut"):
            if getattr(self, key) is not None and not kind.residual:
                raise ValueError(f"{key}: {self.variant} has no such setting, leave it out")
        if self.base_channels is not None and self.base_channels % kind.multiple:
            raise ValueError(
                f"base_channels: those of {self.variant} are multiples of {kind.multiple}, found "
                f"{self.base_channels}"
            )
        return self


class _ResNet(ResNet):
    """MONAI's network, whose shortcut of type A passes gradients on; MONAI's detaches it."""

    def _downsample_basic_block(
        self, x: Tensor, planes: int, stride: int, spatial_dims: int = 3
    ) -> Tensor:
        every = (slice(None, None, stride),) * spatial_dims
        taken = x[(slice(None), slice(None), *every)]
        added = planes - taken.shape[1]
        return functional.pad(taken, (0, 0) * spatial_dims + (0, added))


class MonaiBackbone(Backbone):
    """The encoder of one of MONAI's networks; every parameter takes part in its last stage.

    - ``resnet``: the stem and the four layers.
    - ``densenet``: the stem and the four dense blocks, the last with the final norm and ReLU that
      stand before its pooling. Its transitions leave out an odd last row, so images are padded to
      multiples of 32.
    - ``swin_unetr``: SwinUNETR's encoder with its five normalised outputs, strides 2 to 32. It pads
      odd maps itself.
    - ``segresnet``: the four levels of SegResNet's encoder, strides 1 to 8.

    No ImageNet weights exist for them.
    """

    def __init__(self, config: Config, in_channels: int = 1) -> None:
        build = {
            "resnet": _resnet,
            "densenet": _densenet,
            "swin_unetr": _swin_unetr,
            "segresnet": _segresnet,
        }[config.variant]
        net, named, strides = build(config, in_channels)
        super().__init__(
            config,
            in_channels=in_channels,
            spatial_dims=config.spatial_dims,
            stages=tuple(
                Stage(name, width, (stride,) * config.spatial_dims)
                for (name, width), stride in zip(named.items(), strides, strict=True)
            ),
            input_mean=(INPUT_MEAN,) * in_channels,
            input_std=(INPUT_STD,) * in_channels,
            divisor=strides[-1] if config.variant == "densenet" else 1,
        )
        self.variant = config.variant
        self.net = net

    def extract(self, x_BC: Tensor) -> list[Tensor]:
        """See `Backbone.extract`."""
        if self.variant == "resnet":
            return _resnet_features(self.net, x_BC)
        if self.variant == "densenet":
            return _densenet_features(self.net, x_BC)
        if self.variant == "swin_unetr":
            return cast("list[Tensor]", self.net(x_BC))
        return cast("list[Tensor]", self.net.encode(x_BC)[1])


Built = tuple[Any, dict[str, int], list[int]]
"""A network, its stages' names and channels, and their strides."""


def _base(config: Config) -> int:
    return cast("int", config.base_channels)  # completed by Config


def _resnet(config: Config, in_channels: int) -> Built:
    block, layers = RESNET_BLOCKS[cast("int", config.depth)]
    stem_stride = cast("int", config.stem_stride)
    widths = [_base(config) * factor for factor in (1, 2, 4, 8)]
    net = _ResNet(
        block,
        layers,
        widths,
        spatial_dims=config.spatial_dims,
        n_input_channels=in_channels,
        conv1_t_stride=stem_stride,
        shortcut_type=config.shortcut or "B",
        feed_forward=False,
        bias_downsample=False,  # a batch norm follows, which takes any bias away
    )
    # Not through MONAI's own argument: it reaches the stem alone, and no block (MONAI 1.6.1).
    replace_batch_norms(net, config.norm, "resnet")
    channels = [_base(config), *(width * EXPANSION[block] for width in widths)]
    names = ("stem", "layer1", "layer2", "layer3", "layer4")
    return net, dict(zip(names, channels, strict=True)), [stem_stride * 2**n for n in range(5)]


def _resnet_features(net: Any, x_BC: Tensor) -> list[Tensor]:
    x = net.act(net.bn1(net.conv1(x_BC)))
    features = [x]
    x = net.maxpool(x)
    for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
        x = layer(x)
        features.append(x)
    return features


def _densenet(config: Config, in_channels: int) -> Built:
    blocks = DENSENET_BLOCKS[cast("int", config.depth)]
    base, growth = _base(config), _base(config) // 2
    net = DenseNet(
        config.spatial_dims,
        in_channels,
        out_channels=1,
        init_features=base,
        growth_rate=growth,
        block_config=blocks,
    )
    net.class_layers = nn.Sequential()
    replace_batch_norms(net, config.norm, "densenet")
    named = {"stem": base}
    width = base
    for number, layers in enumerate(blocks, start=1):
        width += layers * growth
        named[f"denseblock{number}" if number < len(blocks) else "norm5"] = width
        width //= 2  # by the transition to the next block
    return net, named, [2, 4, 8, 16, 32]


def _densenet_features(net: Any, x_BC: Tensor) -> list[Tensor]:
    features = []
    x = x_BC
    for name, module in net.features.named_children():
        x = module(x)
        if name == "relu0" or name.startswith("denseblock"):
            features.append(x)
    features[-1] = functional.relu(x)  # of norm5, which comes last
    return features


def _swin_unetr(config: Config, in_channels: int) -> Built:
    refuse_norm(config.norm, "swin_unetr")
    if importlib.util.find_spec("einops") is None:
        raise MachineError(
            "backbone monai (variant swin_unetr): MONAI needs the package einops for it, which is "
            "not installed. Run: pip install einops"
        )
    dims, base = config.spatial_dims, _base(config)
    net = SwinTransformer(
        in_channels,
        base,
        window_size=(SWIN_WINDOW,) * dims,
        patch_size=(SWIN_PATCH,) * dims,
        depths=SWIN_DEPTHS,
        num_heads=SWIN_HEADS,
        spatial_dims=dims,
    )
    names = ("patch_embed", "layers1", "layers2", "layers3", "layers4")
    return net, {name: base * 2**n for n, name in enumerate(names)}, [2, 4, 8, 16, 32]


def _segresnet(config: Config, in_channels: int) -> Built:
    base = _base(config)
    net = SegResNet(
        config.spatial_dims,
        init_filters=base,
        in_channels=in_channels,
        norm=("group", {"num_groups": 8}) if config.norm is None else "batch",
        blocks_down=SEGRESNET_BLOCKS,
        blocks_up=(),
        use_conv_final=False,
    )
    net.conv_final = nn.Sequential()  # made all the same, and the decoder's
    replace_batch_norms(net, config.norm, "segresnet")
    names = [f"down{level}" for level in range(len(SEGRESNET_BLOCKS))]
    return net, {name: base * 2**n for n, name in enumerate(names)}, [1, 2, 4, 8]
