"""Colourisation: tell the colours of a grey image, or a hidden sequence from the other sequences.

Sources: Zhang, Isola, Efros, "Colorful image colorization", ECCV 2016, for colour from grey (here
by regression on the chroma, as Larsson et al., ICCV workshops and CVPR 2017, compare it); the
sequences of one MR study take the place of the colour channels, as in Zhang, Isola, Efros,
"Split-brain autoencoders", CVPR 2017.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from medssl.errors import ConfigError
from medssl.models.backbones.base import Backbone
from medssl.models.decoders import UNetDecoder
from medssl.pretext._masks import body_mask
from medssl.pretext._scores import masked_mean, masked_psnr
from medssl.pretext.base import Panel, PretextBatch, PretextConfig, PretextTask, middle_slice
from medssl.transforms.sampling import SampleRequest

_NUM_PANELS = 3

_LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in the brightness that people see; ITU-R BT.601."""

_BLUE_SPAN, _RED_SPAN = 2 * (1 - _LUMA[2]), 2 * (1 - _LUMA[0])
"""Divided by these, blue and red minus luma lie in [-0.5, 0.5]; ITU-R BT.601."""


class Config(PretextConfig):
    """Configuration of the colourisation task.

    Attributes:
        mode: ``sequence``, one of the co-registered sequences is hidden and told from the others;
            ``rgb``, the colours of an image are told from its brightness.
        hidden: which sequence is hidden, counted from 0; by default one drawn for each image, all
            equally often in a batch.
        criterion: ``l1`` or ``l2``, within the body on what is hidden.
    """

    name: Literal["colorization"] = "colorization"
    mode: Literal["sequence", "rgb"] = "sequence"
    hidden: int | None = Field(default=None, ge=0)
    criterion: Literal["l1", "l2"] = "l1"


def chroma_of(images: Tensor) -> tuple[Tensor, Tensor]:
    """Take colour images apart into brightness and colour.

    Args:
        images: (B, 3, *S) red, green and blue in [0, 1].

    Returns:
        Luma (B, 1, *S) in [0, 1], and the chroma (B, 2, *S), Cb and Cr in [-0.5, 0.5].

    Source: ITU-R BT.601, full range.
    """
    red, green, blue = images.unbind(1)
    luma = _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue
    chroma = torch.stack([(blue - luma) / _BLUE_SPAN, (red - luma) / _RED_SPAN], dim=1)
    return luma[:, None], chroma


def coloured(luma: Tensor, chroma: Tensor) -> Tensor:
    """Return the colour images (B, 3, *S) in [0, 1] that `chroma_of` takes apart."""
    grey = luma[:, 0]
    blue = grey + _BLUE_SPAN * chroma[:, 0]
    red = grey + _RED_SPAN * chroma[:, 1]
    green = (grey - _LUMA[0] * red - _LUMA[2] * blue) / _LUMA[1]
    return torch.stack([red, green, blue], dim=1).clamp(0, 1)


class Colorization(PretextTask):
    """Restore the colours, or the hidden sequence, within the body.

    Outside the body nothing is asked: air looks the same in every sequence.
    """

    min_sequences = 2
    draws = True
    primary_metric = "masked_l1"
    higher_is_better = False
    trivial_metric = "mean_fill_l1"

    def __init__(self, config: Config, spatial_dims: int) -> None:
        super().__init__(config, spatial_dims)
        if config.mode == "rgb" and config.hidden is not None:
            raise ConfigError(
                f"pretext.hidden: {config.hidden} names a sequence, but mode rgb hides all "
                "colours. Leave it out, or choose mode: sequence."
            )
        # The trivial answer is reported beside it, as the metric mean_fill_l1.
        self.chance_level = None
        self.healthy_range = (0.0, 0.05) if config.mode == "rgb" else (0.0, 0.1)

    def request(self, base: SampleRequest) -> SampleRequest:
        """Ask for the sequences, or the three colours, as the only channels."""
        found = base.num_sequences
        if self.config.mode == "rgb" and found != 3:
            raise ConfigError(
                f"sampling.num_sequences: colorization of mode rgb takes scans of 3 channels (red, "
                f"green, blue), found {found}. Set it to 3, or choose pretext.mode: sequence."
            )
        if found < self.min_sequences:
            raise ConfigError(
                f"sampling.num_sequences: colorization needs {self.min_sequences} co-registered "
                f"sequences or more, found {found}. Set it to what the scans have, or choose "
                "another task."
            )
        if base.num_neighbours:
            raise ConfigError(
                f"colorization takes slices without neighbours, found num_neighbours "
                f"{base.num_neighbours}. Set it to 0, or choose another task."
            )
        if self.config.hidden is not None and self.config.hidden >= found:
            raise ConfigError(
                f"pretext.hidden: {self.config.hidden} is no sequence of scans that have {found} "
                f"(sampling.num_sequences). Choose 0 to {found - 1}."
            )
        return base

    def in_channels(self, request: SampleRequest) -> int:
        return 1 if self.config.mode == "rgb" else request.in_channels

    def make_batch(self, images: Tensor, generator: torch.Generator) -> PretextBatch:
        body = body_mask(images)
        if self.config.mode == "rgb":
            inputs, target = chroma_of(images)
            scored = body.expand_as(target)
            extras = {"scored": scored}
        else:
            target = images
            hidden = self._hidden(images, generator)  # (B, C, 1, ...)
            mean = masked_mean(images, ~hidden & body)
            mean = mean.reshape(-1, *[1] * (images.ndim - 1))
            inputs = torch.where(hidden, mean, images)
            extras = {"scored": hidden & body, "hidden": hidden, "visible_mean": mean}
        return PretextBatch(inputs=inputs, target=target, task=self.name, extras=extras)

    def _hidden(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return which sequence of each image is hidden, (B, C, 1, ...) bool."""
        num_images, num_sequences = images.shape[:2]
        if self.config.hidden is None:
            device = images.device
            order = torch.rand(num_images, device=device, generator=generator).argsort()
            first = torch.randint(num_sequences, (1,), device=device, generator=generator)
            chosen = (order + first) % num_sequences  # each equally often, to within one
        else:
            chosen = torch.full((num_images,), self.config.hidden, device=images.device)
        sequences = torch.arange(num_sequences, device=images.device)
        return (sequences == chosen[:, None]).reshape(*images.shape[:2], *[1] * self.spatial_dims)

    def build_head(self, backbone: Backbone) -> nn.Module:
        channels = 2 if self.config.mode == "rgb" else backbone.in_channels
        return UNetDecoder(backbone, out_channels=channels)

    def forward(self, backbone: Backbone, head: nn.Module, batch: PretextBatch) -> Any:
        return head(backbone(batch.inputs), tuple(batch.inputs.shape[2:]))

    def loss(self, output: Tensor, batch: PretextBatch) -> Tensor:
        return self._error(output.float(), batch)

    def loss_of_guessing(self, batch: PretextBatch) -> Tensor:
        """Return the loss of answering with the means of what is hidden."""
        return self._error(_own_means(batch), batch)

    def _error(self, answer: Tensor, batch: PretextBatch) -> Tensor:
        error = answer - batch.target
        error = error.abs() if self.config.criterion == "l1" else error**2
        return masked_mean(error, batch.extras["scored"]).mean()

    def metrics(self, output: Tensor, batch: PretextBatch) -> dict[str, Tensor]:
        """Return error and PSNR within the body, and the errors of two trivial answers.

        ``mean_fill_l1``: with the mean, over the body, of what is hidden, which nobody knows who
        sees the puzzle alone: it is a little harder to beat than a fixed answer.
        ``visible_fill_l1`` (sequences): with the mean of the visible sequences, voxel by voxel.
        """
        answer, scored = output.detach().float(), batch.extras["scored"]
        metrics = {
            "masked_l1": masked_mean((answer - batch.target).abs(), scored).mean(),
            "masked_psnr": masked_psnr(answer, batch.target, scored).mean(),
            "mean_fill_l1": masked_mean((_own_means(batch) - batch.target).abs(), scored).mean(),
        }
        if "hidden" in batch.extras:
            visible = ~batch.extras["hidden"]
            copied = (batch.target * visible).sum(1, keepdim=True) / visible.sum(1, keepdim=True)
            metrics["visible_fill_l1"] = masked_mean((copied - batch.target).abs(), scored).mean()
        return metrics

    def panels(self, batch: PretextBatch, output: Tensor | None) -> list[list[Panel]]:
        answer = batch.target
        if output is not None:
            answer = torch.where(batch.extras["scored"], output.float(), batch.target)
        rows = []
        for item in range(min(_NUM_PANELS, len(batch.target))):
            one = slice(item, item + 1)
            if self.config.mode == "rgb":
                luma = batch.inputs[one]
                row = [
                    Panel(_colour_slice(coloured(luma, batch.target[one])), "image"),
                    Panel(middle_slice(luma[0]), "grey"),
                ]
                if output is not None:
                    row.append(Panel(_colour_slice(coloured(luma, answer[one])), "restored"))
            else:
                chosen = int(batch.extras["hidden"][item].flatten().int().argmax())
                row = [
                    Panel(middle_slice(sequence[None]), f"sequence {number}")
                    for number, sequence in enumerate(batch.target[item])
                ]
                row[chosen] = Panel(row[chosen].image_XY, f"sequence {chosen}, hidden")
                if output is not None:
                    restored = answer[item, chosen].clamp(0, 1)
                    row.append(Panel(middle_slice(restored[None]), f"sequence {chosen}, restored"))
            rows.append(row)
        return rows


def _own_means(batch: PretextBatch) -> Tensor:
    """Return the mean of each channel of the target where it is scored, (B, C, 1, ...)."""
    target, scored = batch.target, batch.extras["scored"]
    means = masked_mean(target.flatten(0, 1), scored.flatten(0, 1))
    return means.reshape(*target.shape[:2], *[1] * (target.ndim - 2))


def _colour_slice(image: Tensor) -> Tensor:
    """Return an image (1, 3, *S) as (X, Y, 3), cut through the middle of Z where it is 3D."""
    return torch.stack([middle_slice(channel[None]) for channel in image[0]], dim=-1)
