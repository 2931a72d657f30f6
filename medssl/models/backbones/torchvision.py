"""The 2D networks of torchvision, without their classifier.

Sources: He et al., Deep residual learning, CVPR 2016 (resnet); Huang et al., Densely connected
convolutional networks, CVPR 2017 (densenet); Tan & Le, EfficientNet, ICML 2019; Liu et al., A
ConvNet for the 2020s, CVPR 2022 (convnext); Dosovitskiy et al., An image is worth 16x16 words, ICLR
2021 (vit); Liu et al., Swin transformer, ICCV 2021 (swin).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision import models
from torchvision.ops import StochasticDepth

from medssl.errors import WeightsError
from medssl.models.backbones.base import (
    AdaptedState,
    Backbone,
    ImagenetWeights,
    Stage,
    missing_names,
)
from medssl.models.norms import NormConfig, check_file_norm, refuse_norm, replace_batch_norms
from medssl.models.stems import RGB, fold_rgb, input_constants, needs_inside, widen_stem

RGB_MEAN = (0.485, 0.456, 0.406)
RGB_STD = (0.229, 0.224, 0.225)
COUNTER = "num_batches_tracked"

Variant = Literal[
    "resnet18",
    "resnet34",
    "resnet50",
    "densenet121",
    "efficientnet_b0",
    "convnext_tiny",
    "vit_b_16",
    "swin_t",
]


@dataclass(frozen=True)
class Part:
    """One stage: the modules that lead to it from the stage before.

    Attributes:
        stage: as reports name it; one stride serves both axes.
        modules: paths of the modules, in the order they are applied.
    """

    stage: Stage
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """How torchvision's network of one family is taken apart.

    Attributes:
        parts: the stages, finest first.
        stem: path of the first convolution.
        head: path of the classifier, which the backbone does not have.
        head_tensors: the names of its tensors in the published file.
        divisor: the network takes sizes that are multiples of this alone.
        final_relu: torchvision applies a ReLU after the last module, outside of any.
        channels_last: its features are (B, X, Y, C).
        layer_norm: it has no batch norm that could be replaced.
    """

    parts: tuple[Part, ...]
    stem: str
    head: str
    head_tensors: tuple[str, ...]
    divisor: int = 1
    final_relu: bool = False
    channels_last: bool = False
    layer_norm: bool = False


def _part(name: str, channels: int, stride: int, *modules: str) -> Part:
    return Part(Stage(name, channels, (stride, stride)), modules or (name,))


def _resnet(expansion: int) -> Layout:
    return Layout(
        parts=(
            _part("stem", 64, 2, "conv1", "bn1", "relu"),
            _part("layer1", 64 * expansion, 4, "maxpool", "layer1"),
            _part("layer2", 128 * expansion, 8),
            _part("layer3", 256 * expansion, 16),
            _part("layer4", 512 * expansion, 32),
        ),
        stem="conv1",
        head="fc",
        head_tensors=("fc.weight", "fc.bias"),
    )


LAYOUTS: dict[str, Layout] = {
    "resnet18": _resnet(1),
    "resnet34": _resnet(1),
    "resnet50": _resnet(4),
    # The last norm and the ReLU after it belong to the features: they are what torchvision pools.
    "densenet121": Layout(
        parts=(
            _part("stem", 64, 2, "features.conv0", "features.norm0", "features.relu0"),
            _part("denseblock1", 256, 4, "features.pool0", "features.denseblock1"),
            _part("denseblock2", 512, 8, "features.transition1", "features.denseblock2"),
            _part("denseblock3", 1024, 16, "features.transition2", "features.denseblock3"),
            _part(
                "norm5",
                1024,
                32,
                "features.transition3",
                "features.denseblock4",
                "features.norm5",
            ),
        ),
        stem="features.conv0",
        head="classifier",
        head_tensors=("classifier.weight", "classifier.bias"),
        divisor=32,  # a transition halves by 2 x 2 means, which leave out an odd last row
        final_relu=True,
    ),
    # The 1 x 1 convolution to 1280 channels stands in features, so it is the last stage's.
    "efficientnet_b0": Layout(
        parts=(
            _part("features.1", 16, 2, "features.0", "features.1"),
            _part("features.2", 24, 4),
            _part("features.3", 40, 8),
            _part("features.5", 112, 16, "features.4", "features.5"),
            _part("features.8", 1280, 32, "features.6", "features.7", "features.8"),
        ),
        stem="features.0.0",
        head="classifier",
        head_tensors=("classifier.1.weight", "classifier.1.bias"),
    ),
    # The norm in the classifier is applied to pooled features: it is the head's.
    "convnext_tiny": Layout(
        parts=(
            _part("features.1", 96, 4, "features.0", "features.1"),
            _part("features.3", 192, 8, "features.2", "features.3"),
            _part("features.5", 384, 16, "features.4", "features.5"),
            _part("features.7", 768, 32, "features.6", "features.7"),
        ),
        stem="features.0.0",
        head="classifier",
        head_tensors=(
            "classifier.0.weight",
            "classifier.0.bias",
            "classifier.2.weight",
            "classifier.2.bias",
        ),
        divisor=32,
        layer_norm=True,
    ),
    # Twelve blocks of one resolution; `_patch_tokens` adds tokens and positions before the first.
    "vit_b_16": Layout(
        parts=(
            *(
                _part(
                    f"encoder_layer_{last}",
                    768,
                    16,
                    *(f"encoder.layers.encoder_layer_{n}" for n in range(last - 2, last + 1)),
                )
                for last in (2, 5, 8)
            ),
            _part(
                "encoder.ln",
                768,
                16,
                *(f"encoder.layers.encoder_layer_{n}" for n in (9, 10, 11)),
                "encoder.ln",
            ),
        ),
        stem="conv_proj",
        head="heads",
        head_tensors=("heads.head.weight", "heads.head.bias"),
        divisor=16,
        layer_norm=True,
    ),
    # Later halvings pad odd maps themselves, so only the patches' size matters.
    "swin_t": Layout(
        parts=(
            _part("features.1", 96, 4, "features.0", "features.1"),
            _part("features.3", 192, 8, "features.2", "features.3"),
            _part("features.5", 384, 16, "features.4", "features.5"),
            _part("norm", 768, 32, "features.6", "features.7", "norm"),
        ),
        stem="features.0.0",
        head="head",
        head_tensors=("head.weight", "head.bias"),
        divisor=4,
        channels_last=True,
        layer_norm=True,
    ),
}

HEAD: dict[str, tuple[str, ...]] = {
    variant: layout.head_tensors for variant, layout in LAYOUTS.items()
}
"""What the published file of a variant holds beside the backbone: exactly its classifier."""

RENAMED = (
    # As in torchvision.models.densenet._load_state_dict.
    (re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)"), r"\1\2"),
    # As in torchvision.models.vision_transformer.MLPBlock._load_from_state_dict.
    (re.compile(r"\.mlp\.linear_1\."), ".mlp.0."),
    (re.compile(r"\.mlp\.linear_2\."), ".mlp.3."),
)
"""Names in files older than the code: torchvision renames them when it loads them itself."""

_DIGITS = re.compile(r"-([0-9a-f]{8,64})\.pth$")


def _published(variant: str) -> ImagenetWeights:
    """Return torchvision's first ImageNet file; its name carries the first digits of its hash."""
    url: str = models.get_model_weights(variant).IMAGENET1K_V1.url
    file_name = url.rpartition("/")[2]
    digits = _DIGITS.search(file_name)
    return ImagenetWeights(
        file_name, digits.group(1) if digits else None, url=url, licence="BSD-3-Clause"
    )


class Config(NormConfig):
    """Which network of torchvision.

    Attributes:
        variant: the network, by torchvision's name.
    """

    name: Literal["torchvision"] = "torchvision"
    variant: Variant


class TorchvisionBackbone(Backbone):
    """A network in four or five stages, as far as the features that torchvision pools.

    Images of three channels are normalised as torchvision's weights expect, each channel with its
    own constants; images of any other number with the mean of the three constants, and see
    `medssl.models.stems`.

    A vision transformer's stages are the maps of its patch tokens after 3, 6, 9 and 12 blocks, the
    last after the final norm. The class token takes part in every block, but is in no map. For
    other sizes than 224 x 224 the position embeddings are interpolated.
    """

    imagenet: ClassVar = {variant: _published(variant) for variant in LAYOUTS}

    def __init__(self, config: Config, in_channels: int = 1) -> None:
        layout = LAYOUTS[config.variant]
        if layout.layer_norm:
            refuse_norm(config.norm, config.variant)
        net: Any = models.get_model(config.variant, weights=None)
        _keep_all_branches(net)
        setattr(net, layout.head, nn.Identity())
        inside = needs_inside(in_channels, RGB_MEAN)
        if in_channels != RGB:
            parent, _, child = layout.stem.rpartition(".")
            wide = widen_stem(net.get_submodule(layout.stem), in_channels, inside)
            setattr(net.get_submodule(parent), child, wide)
        replace_batch_norms(net, config.norm, config.variant)
        input_mean, input_std = input_constants(in_channels, RGB_MEAN, RGB_STD)
        super().__init__(
            config,
            in_channels=in_channels,
            spatial_dims=2,
            stages=tuple(part.stage for part in layout.parts),
            input_mean=input_mean,
            input_std=input_std,
            divisor=layout.divisor,
            inside_channel=inside,
        )
        self.variant = config.variant
        self.norm = config.norm
        self.layout = layout
        self.net = net

    def extract(self, x_BC: Tensor) -> list[Tensor]:
        """See `Backbone.extract`."""
        transformer = isinstance(self.net, models.VisionTransformer)
        grid = tuple(length // self.divisor for length in x_BC.shape[2:])
        x = _patch_tokens(self.net, x_BC) if transformer else x_BC
        features = []
        for part in self.layout.parts:
            for path in part.modules:
                x = self.net.get_submodule(path)(x)
            if transformer:
                features.append(x[:, 1:].mT.unflatten(2, grid))
            else:
                features.append(x.permute(0, 3, 1, 2) if self.layout.channels_last else x)
        if self.layout.final_relu:
            features[-1] = functional.relu(features[-1])
        return features

    @property
    def imagenet_weights(self) -> ImagenetWeights:
        """The published file of this variant."""
        weights: ImagenetWeights = self.imagenet[self.variant]
        check_file_norm(self.norm, weights.file_name)
        return weights

    def adapt_imagenet(self, file_state: Mapping[str, Tensor]) -> AdaptedState:
        """Take torchvision's tensors under its own names, and fold the stem for grey images.

        See `medssl.models.stems` for images that are not of three channels.
        """
        source = self.imagenet_weights.file_name
        head = self.layout.head_tensors
        missing = missing_names(head, file_state)
        if missing:
            raise WeightsError(f"{source}: the classifier's {', '.join(missing)} are missing.")
        state = {
            f"net.{_current_name(key)}": tensor
            for key, tensor in file_state.items()
            if key not in head
        }
        adapted: list[tuple[str, str]] = []
        wanted = self.state_dict()
        counters = [key for key in wanted if key.endswith(COUNTER)]
        absent = missing_names(counters, state)
        if absent and absent == counters:  # files of older PyTorch versions have no counters
            state.update((key, wanted[key].clone()) for key in absent)
            adapted.append((COUNTER, "not in the file, a count and no weight; kept at 0"))
        stem = f"net.{self.layout.stem}.weight"
        if stem not in state:
            raise WeightsError(f"{source}: it has no stem of three channels: {stem} is missing.")
        state[stem], how = fold_rgb(
            state[stem],
            RGB_MEAN,
            RGB_STD,
            self.in_channels,
            self.input_mean[0],
            self.input_std[0],
            self.inside_channel,
        )
        if how:
            adapted.append((stem, how))
        return AdaptedState(state, head=head, adapted=tuple(adapted))


def _keep_all_branches(net: nn.Module) -> None:
    """Turn stochastic depth off, which drops residual branches at random in training.

    It belongs to one recipe of training and not to the network, and it would draw from the
    process's own generator.
    """
    for module in net.modules():
        if isinstance(module, StochasticDepth):
            module.p = 0.0


def _current_name(key: str) -> str:
    for pattern, now in RENAMED:
        key = pattern.sub(now, key)
    return key


def _patch_tokens(net: models.VisionTransformer, x_BC: Tensor) -> Tensor:
    """Return the class token and the patch tokens with their positions, (B, 1 + patches, C)."""
    patches = net.conv_proj(x_BC)
    grid = tuple(patches.shape[2:])
    tokens = torch.cat([net.class_token.expand(len(x_BC), -1, -1), patches.flatten(2).mT], dim=1)
    positions = interpolate_positions(net.encoder.pos_embedding, grid)
    return cast("Tensor", net.encoder.dropout(tokens + positions))


def interpolate_positions(embedding: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Return the embeddings of a class token and a square of patches, for another grid of patches.

    Args:
        embedding: shape (1, 1 + n * n, C).
        grid: patches along X and Y.

    Returns:
        Shape (1, 1 + X * Y, C); the embedding itself where the grid is its own.

    Source: torchvision.models.vision_transformer.interpolate_embeddings, which is for squares.
    """
    side = round((embedding.shape[1] - 1) ** 0.5)
    if grid == (side, side):
        return embedding
    square = embedding[:, 1:].mT.unflatten(2, (side, side))
    resized = functional.interpolate(square, size=grid, mode="bicubic", align_corners=True)
    return torch.cat([embedding[:, :1], resized.flatten(2).mT], dim=1)
