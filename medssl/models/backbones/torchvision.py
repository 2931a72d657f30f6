"""The 2D residual networks of torchvision, without their classifier.

Source: He et al., Deep residual learning for image recognition, CVPR 2016.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torchvision import models

from medssl.config import ComponentConfig
from medssl.errors import WeightsError
from medssl.models.backbones.base import (
    AdaptedState,
    Backbone,
    ImagenetWeights,
    Stage,
    missing_names,
)

RGB_MEAN = (0.485, 0.456, 0.406)
RGB_STD = (0.229, 0.224, 0.225)
GREY_MEAN, GREY_STD = 0.449, 0.226
"""The means over R, G, B: the normalisation of images that are not of three channels."""

HEAD = ("fc.weight", "fc.bias")
COUNTER = "num_batches_tracked"
_SITE = "https://download.pytorch.org/models/"


def _published(file_name: str) -> ImagenetWeights:
    """Return torchvision's file; its name carries the first digits of its hash."""
    digits = file_name.removesuffix(".pth").rpartition("-")[2]
    return ImagenetWeights(file_name, digits, url=_SITE + file_name, licence="BSD-3-Clause")


class Config(ComponentConfig):
    """Which residual network."""

    name: Literal["torchvision"] = "torchvision"
    variant: Literal["resnet18", "resnet34", "resnet50"]


class TorchvisionBackbone(Backbone):
    """A residual network in five stages: its stem (stride 2) and its four layers (4 to 32).

    Images of three channels are normalised as torchvision's weights expect, each channel with its
    own constants; images of any other number with the mean of the three constants.
    """

    imagenet: ClassVar = {
        "resnet18": _published("resnet18-f37072fd.pth"),
        "resnet34": _published("resnet34-b627a593.pth"),
        "resnet50": _published("resnet50-0676ba61.pth"),
    }

    def __init__(self, config: Config, in_channels: int = 1) -> None:
        net = models.get_model(config.variant, weights=None)
        if in_channels != len(RGB_MEAN):
            net.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        embedding = net.fc.in_features
        net.fc = nn.Identity()
        widths = (64, embedding // 8, embedding // 4, embedding // 2, embedding)
        names = ("stem", "layer1", "layer2", "layer3", "layer4")
        rgb = in_channels == len(RGB_MEAN)
        super().__init__(
            config,
            in_channels=in_channels,
            spatial_dims=2,
            stages=tuple(
                Stage(name, width, (2**depth, 2**depth))
                for depth, (name, width) in enumerate(zip(names, widths, strict=True), start=1)
            ),
            input_mean=RGB_MEAN if rgb else (GREY_MEAN,) * in_channels,
            input_std=RGB_STD if rgb else (GREY_STD,) * in_channels,
        )
        self.variant = config.variant
        self.net = net

    def extract(self, x_BC: Tensor) -> list[Tensor]:
        """See `Backbone.extract`."""
        net = self.net
        x = net.relu(net.bn1(net.conv1(x_BC)))
        features = [x]
        x = net.maxpool(x)
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = layer(x)
            features.append(x)
        return features

    @property
    def imagenet_weights(self) -> ImagenetWeights:
        """The published file of this variant."""
        return self.imagenet[self.variant]

    def adapt_imagenet(self, file_state: Mapping[str, Tensor]) -> AdaptedState:
        """Rename torchvision's tensors, and fold RGB and its normalisation into a grey stem.

        For images that are not of three channels, the stem's response to a picture with all
        channels equal is that of the published network to the grey picture in R, G and B: the
        filters of R, G, B are added, each scaled by ``GREY_STD / RGB_STD``, and what the three
        means add to every output moves into the running mean of the batch norm that follows.
        That is exact wherever the 7 x 7 window lies inside the picture; in the outermost three
        pixels, where the published network pads with its mean colour and this one with its mean
        grey, the two differ slightly (by 0.4 % in the last stage, for 64 pixels and random
        weights).
        """
        wanted = self.state_dict()
        state: dict[str, Tensor] = {}
        adapted: list[tuple[str, str]] = []
        counters = [key for key in wanted if key.endswith(COUNTER)]
        source = self.imagenet_weights.file_name
        for key, tensor in file_state.items():
            if key not in HEAD:
                state[f"net.{key}"] = tensor
        absent = [key for key in counters if key not in state]
        if len(absent) == len(counters):  # files of older PyTorch versions have no counters
            state.update((key, wanted[key].clone()) for key in absent)
            adapted.append((COUNTER, "not in the file, a count and no weight; kept at 0"))
        missing = missing_names(HEAD, file_state)
        if missing:
            raise WeightsError(f"{source}: the classifier's {', '.join(missing)} are missing.")
        if self.in_channels != len(RGB_MEAN):
            adapted += _fold_grey(state, self.in_channels, source)
        return AdaptedState(state, head=HEAD, adapted=tuple(adapted))


def _fold_grey(state: dict[str, Tensor], in_channels: int, source: str) -> list[tuple[str, str]]:
    stem, mean_name = "net.conv1.weight", "net.bn1.running_mean"
    missing = missing_names((stem, mean_name), state)
    if missing or state[stem].shape[1:2] != (3,):
        raise WeightsError(f"{source}: it has no stem of three channels to fold into a grey one.")
    weight_ORXY = state[stem].double()
    by_channel = (1, 3, 1, 1)
    std = torch.tensor(RGB_STD, dtype=torch.float64).view(by_channel)
    mean = torch.tensor(RGB_MEAN, dtype=torch.float64).view(by_channel)
    # w (g - m_c) / s_c  =  w (S / s_c) (g - M) / S  +  w (M - m_c) / s_c
    grey = (weight_ORXY * (GREY_STD / std)).sum(dim=1, keepdim=True)
    offset_O = (weight_ORXY * ((GREY_MEAN - mean) / std)).sum(dim=(1, 2, 3))
    share = grey / in_channels
    state[stem] = share.expand(-1, in_channels, -1, -1).to(state[stem].dtype).contiguous()
    running = state[mean_name]
    state[mean_name] = (running.double() - offset_O).to(running.dtype)
    how = "R, G and B added, scaled to the grey normalisation"
    if in_channels > 1:
        how += f", shared equally by {in_channels} channels"
    return [(stem, how), (mean_name, "moved by the offset of the RGB means")]
