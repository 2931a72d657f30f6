"""What tasks with one answer a voxel have in common: masks, a decoder, windows over a case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pydantic import Field
from torch import Tensor, nn

from medssl.downstream._windows import in_windows
from medssl.downstream.base import DownstreamBatch, DownstreamConfig, DownstreamTask
from medssl.models.backbones.base import Backbone
from medssl.models.decoders import UNetDecoder
from medssl.transforms.sampling import SampleRequest


class VoxelConfig(DownstreamConfig):
    """Base of the configurations of tasks with one answer a voxel.

    Attributes:
        mask: the name under which masks, or points, are kept in the store.
        min_foreground: least share of a training crop that is not air.
    """

    mask: str
    min_foreground: float = Field(default=0.1, ge=0, le=1)


class VoxelTask(DownstreamTask):
    """A task with one answer a voxel, which a decoder draws; its ``Config`` is a `VoxelConfig`."""

    dense = True

    def request(self, base: SampleRequest) -> SampleRequest:
        return replace(base, mask=self.config.mask, min_foreground=self.config.min_foreground)

    def build_head(self, backbone: Backbone) -> nn.Module:
        return UNetDecoder(backbone, out_channels=self.num_outputs)

    def forward(self, backbone: Backbone, head: nn.Module, batch: DownstreamBatch) -> Tensor:
        """Return what the decoder draws, (B, K, X, Y[, Z])."""
        drawn: Tensor = head(backbone(batch.inputs), tuple(batch.inputs.shape[2:]))
        return drawn

    def infer(
        self,
        network: Callable[[DownstreamBatch], Tensor],
        images: Tensor,
        crop_size: tuple[int, ...],
    ) -> Tensor:
        return in_windows(network, images, crop_size)
