"""What tasks with one answer a scan have in common: a head on pooled features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medssl.downstream.base import DownstreamBatch, DownstreamTask
from medssl.models.backbones.base import Backbone
from medssl.models.heads import PooledHead
from medssl.transforms.sampling import Sample


class ScanTask(DownstreamTask):
    """A task with one answer a scan, which a linear layer reads off its pooled features."""

    dense = False

    @property
    def num_outputs(self) -> int:
        return len(self.classes)

    def build_head(self, backbone: Backbone) -> nn.Module:
        return PooledHead(backbone.stages[-1].channels, self.num_outputs)

    def batch_of(self, sample: Sample, generator: torch.Generator) -> DownstreamBatch:
        """Return images and what is known of their scans, (B, K) float32."""
        target = torch.tensor([self.targets[key] for key in sample.scan_keys])
        device = sample.images.device
        if device.type == "cuda":
            target = target.pin_memory()
        return DownstreamBatch(sample.images, target.to(device, non_blocking=True))

    def forward(self, backbone: Backbone, head: nn.Module, batch: DownstreamBatch) -> Tensor:
        """Return the head's answer (B, K)."""
        answers: Tensor = head(backbone.embed(batch.inputs))
        return answers
