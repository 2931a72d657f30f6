"""What a backbone family declares: ordered stages, input normalisation, ImageNet weights.

Images arrive in [0, 1]. Every backbone normalises them itself, with constants that belong to the
architecture and not to the init, so that all inits of a study see exactly the same input.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from medssl.config import ComponentConfig
from medssl.errors import ConfigError, WeightsError


@dataclass(frozen=True)
class Stage:
    """One resolution level of a backbone.

    Attributes:
        name: the layer's name, as reports print it.
        channels: number of feature maps.
        stride: input voxels per feature voxel, per spatial axis. A stage has
            ``ceil(size / stride)`` voxels along an axis.
    """

    name: str
    channels: int
    stride: tuple[int, ...]

    def size(self, input_size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the spatial size of this stage's features for an input size."""
        return tuple(-(-n // s) for n, s in zip(input_size, self.stride, strict=True))


@dataclass(frozen=True)
class ImagenetWeights:
    """A published ImageNet weight file, by name and hash.

    Attributes:
        file_name: as its publisher names it.
        sha256: the hash, or its first digits (at least 8), of the file's content; None where its
            publisher states none, so that the config must.
        url: where it can be downloaded, if anywhere.
        package: import name of a pip package that holds the file, if any.
        package_file: the file's path inside that package.
        extra: the extra of medssl that installs ``package``.
        licence: the licence the weights are given under.
    """

    file_name: str
    sha256: str | None
    url: str | None = None
    package: str | None = None
    package_file: str | None = None
    extra: str | None = None
    licence: str = ""


@dataclass(frozen=True)
class AdaptedState:
    """A weight file's tensors, renamed and reshaped for one backbone.

    Attributes:
        state: tensors by the backbone's own names.
        head: names, in the file, of the classifier's tensors, which the backbone does not have.
        adapted: (tensor, how) for every tensor that is not the file's own, bit by bit.
    """

    state: dict[str, Tensor]
    head: tuple[str, ...] = ()
    adapted: tuple[tuple[str, str], ...] = ()


class Backbone(nn.Module, ABC):
    """A network that turns images into features of several resolutions, finest first.

    Every parameter takes part in the last stage: there is no unused layer.

    Images are normalised, then padded with zeros at the far end of each axis where the network
    cannot take their size; what the padding adds to a stage is cut off again.

    Args:
        config: the family's configuration.
        in_channels: channels of the images, ``C``.
        spatial_dims: 2 or 3.
        stages: the stages that `extract` returns, finest first.
        input_mean: subtracted from the images, one value a channel.
        input_std: divides the images, one value a channel.
        divisor: the network takes sizes that are multiples of this alone; one number, or one for
            each spatial axis.
        inside_channel: hand the network one more channel, the last: 1 inside the image, 0 in any
            padding. It lets a grey stem answer as one of three channels does up to the border.
    """

    imagenet: ClassVar[Mapping[str, ImagenetWeights]] = {}

    def __init__(
        self,
        config: ComponentConfig,
        *,
        in_channels: int,
        spatial_dims: int,
        stages: tuple[Stage, ...],
        input_mean: tuple[float, ...],
        input_std: tuple[float, ...],
        divisor: int | tuple[int, ...] = 1,
        inside_channel: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.in_channels = in_channels
        self.spatial_dims = spatial_dims
        self.stages = stages
        self.input_mean = input_mean
        self.input_std = input_std
        self.divisors = (divisor,) * spatial_dims if isinstance(divisor, int) else divisor
        self.divisor = math.lcm(*self.divisors)
        self.inside_channel = inside_channel
        shape = (1, in_channels, *([1] * spatial_dims))
        # Constants of the architecture, not weights: kept out of the state dict.
        self.register_buffer("_mean", torch.tensor(input_mean).view(shape), persistent=False)
        self.register_buffer("_std", torch.tensor(input_std).view(shape), persistent=False)

    @abstractmethod
    def extract(self, x_BC: Tensor) -> list[Tensor]:
        """Return the features of every stage, for images as `forward` prepares them."""

    @classmethod
    def published(cls, config: ComponentConfig) -> ImagenetWeights | None:
        """Return the ImageNet weight file of an architecture without building it, if any."""
        return cls.imagenet.get(str(getattr(config, "variant", "")))

    @property
    def imagenet_weights(self) -> ImagenetWeights | None:
        """The ImageNet weight file of this architecture, or None where there is none."""
        return self.published(self.config)

    def adapt_imagenet(self, file_state: Mapping[str, Tensor]) -> AdaptedState:
        """Rename and reshape the tensors of `imagenet_weights` for this backbone.

        Raises:
            WeightsError: the file holds other tensors than the published ones.
        """
        raise WeightsError(
            f"backbone {self.describe()} has no ImageNet weights, found a file of "
            f"{len(file_state)} tensors for it. Use another init."
        )

    @property
    def embedding_channels(self) -> int:
        """Length of the vector that `embed` returns for an image."""
        return self.stages[-1].channels

    def describe(self) -> str:
        """Return the architecture in a few words, for messages."""
        return _in_words(self.config.model_dump(mode="json"))

    def forward(self, x_BC: Tensor) -> list[Tensor]:
        """Return the features of every stage, finest first.

        Args:
            x_BC: images in [0, 1], shape (B, C, X, Y) or (B, C, X, Y, Z), any size.
        """
        self._check(x_BC)
        mean, std = cast("Tensor", self._mean), cast("Tensor", self._std)
        x_BC = (x_BC - mean) / std
        size = tuple(x_BC.shape[2:])
        if self.inside_channel:
            x_BC = torch.cat([x_BC, torch.ones_like(x_BC[:, :1])], dim=1)
        lacking = [-n % divisor for n, divisor in zip(size, self.divisors, strict=True)]
        if not any(lacking):
            return self.extract(x_BC)
        far_ends = [number for lack in reversed(lacking) for number in (0, lack)]
        features = self.extract(functional.pad(x_BC, far_ends))
        return [
            _first(feature, stage.size(size))
            for feature, stage in zip(features, self.stages, strict=True)
        ]

    def embed(self, x_BC: Tensor) -> Tensor:
        """Return one vector an image, (B, `embedding_channels`); see `pool`."""
        return self.pool(self(x_BC)[-1])

    def pool(self, last_BC: Tensor) -> Tensor:
        """Return one vector an image from the last stage's features: their global mean."""
        return last_BC.flatten(2).mean(dim=2)

    def _check(self, x_BC: Tensor) -> None:
        wanted = 2 + self.spatial_dims
        if x_BC.ndim != wanted or x_BC.shape[1] != self.in_channels:
            axes = ("B", "C", "X", "Y", "Z")[:wanted]
            raise ConfigError(
                f"backbone {self.describe()} takes images ({', '.join(axes)}) of "
                f"{self.in_channels} channel(s), found shape {tuple(x_BC.shape)}. "
                "Choose a backbone with the spatial_dims and channels of the prepared scans."
            )


def _in_words(settings: dict[str, Any]) -> str:
    """Return a component's settings, and those of components in it, without the unset ones."""
    words = [
        f"{key} {_in_words(value) if isinstance(value, dict) else value}"
        for key, value in settings.items()
        if key != "name" and value is not None
    ]
    return f"{settings['name']} ({', '.join(words)})"


def _first(x_BC: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return the first voxels along each spatial axis."""
    for axis, length in enumerate(size, start=2):
        x_BC = x_BC.narrow(axis, 0, length)
    return x_BC


def missing_names(names: Iterable[str], state: Mapping[str, Tensor]) -> list[str]:
    """Return those of ``names`` that are no tensors of ``state``."""
    return [name for name in names if name not in state]
