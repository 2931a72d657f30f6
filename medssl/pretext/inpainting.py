"""Inpainting: restore parts that were cut out of the image.

Source: Pathak et al., "Context encoders: feature learning by inpainting", CVPR 2016; random blocks
at a high ratio with the loss on hidden voxels alone follow He et al., "Masked autoencoders are
scalable vision learners", CVPR 2022.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from medssl.models.backbones.base import Backbone
from medssl.models.decoders import UNetDecoder
from medssl.pretext._masks import Holes, dilate, hole_mask
from medssl.pretext._scores import biharmonic_fill, masked_mean, masked_psnr, masked_ssim
from medssl.pretext.base import Panel, PretextBatch, PretextConfig, PretextTask, middle_slice

_NUM_PANELS = 3

_BASELINE_IMAGES, _BASELINE_VOXELS = 32, 2**16
"""Most images that are filled for comparison, and their voxels in all; but one image at least."""

_DISCRIMINATOR_CHANNELS = (32, 64, 128)


class Config(PretextConfig):
    """Configuration of the inpainting task.

    Attributes:
        holes: ``blocks``, random blocks of a grid (0.75 or more of them: high-ratio masking);
            ``centre``, one box in the middle of the body; ``region``, a random smooth shape.
        ratio: share of the body that is hidden; of its blocks, for holes of blocks.
        block: side of a block, voxels; for a region, the scale of its lobes.
        fill: what the network sees in the holes: the mean of what is visible, or noise of the
            same mean and deviation.
        criterion: ``l1`` or ``l2``, on hidden voxels.
        overlap: width, voxels, of the visible band around the holes that is to be restored as
            well, so that the answer joins its surroundings (Pathak et al.: 7).
        overlap_weight: weight of a voxel of that band in the loss; a hidden one has 1.
        adversarial: weight of a discriminator's opinion in the loss (Pathak et al.: 0.001).
        exclude_blank: leave hidden voxels that are exactly as dark as the darkest of the crop, in
            every channel, out of loss and metrics. These are air, and what was cut away to make a
            face unrecognisable: restoring the cut would teach the tool that made it. Noise hides
            them (set augmentation.noise_std to 0); brightness, contrast and gamma do not.
    """

    name: Literal["inpainting"] = "inpainting"
    holes: Holes = "blocks"
    ratio: float = Field(default=0.5, gt=0, lt=1)
    block: int = Field(default=8, ge=2)
    fill: Literal["mean", "noise"] = "mean"
    criterion: Literal["l1", "l2"] = "l1"
    overlap: int = Field(default=0, ge=0)
    overlap_weight: float = Field(default=10.0, gt=0)
    adversarial: float = Field(default=0.0, ge=0)
    exclude_blank: bool = False


class Judged(NamedTuple):
    """An answer, and the discriminator's opinion of it: logits (B, 1, *patches) of being real.

    Attributes:
        restored: the decoder's output, (B, C, *S).
        real: of the image; moves the discriminator alone.
        fake: of the image with its holes restored; moves the discriminator alone.
        deceived: the same numbers as ``fake``; moves backbone and decoder alone.
    """

    restored: Tensor
    real: Tensor
    fake: Tensor
    deceived: Tensor


class AdversarialDecoder(nn.Module):
    """A decoder, and a small discriminator that looks at patches of what it restored.

    One backward pass and one optimiser serve both: the discriminator learns from answers cut off
    from the decoder, and the decoder from a copy of the discriminator whose weights are constant.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        conv = nn.Conv2d if backbone.spatial_dims == 2 else nn.Conv3d
        self.decoder = UNetDecoder(backbone, out_channels=backbone.in_channels)
        layers: list[nn.Module] = []
        below = backbone.in_channels
        for channels in _DISCRIMINATOR_CHANNELS:
            layers += [conv(below, channels, 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
            below = channels
        self.discriminator = nn.Sequential(*layers, conv(below, 1, 1))

    def forward(self, features: list[Tensor], batch: PretextBatch) -> Judged:
        """Restore the images from their features, and judge the result."""
        image = batch.target
        restored = self.decoder(features, tuple(image.shape[2:]))
        composite = torch.where(batch.extras["hidden"], restored.to(image.dtype), image)
        real, fake = self.discriminator(torch.cat([image, composite.detach()])).chunk(2)
        constant = {name: value.detach() for name, value in self.discriminator.named_parameters()}
        deceived = functional_call(self.discriminator, constant, (composite,))
        return Judged(restored, real, fake, deceived)


class Inpainting(PretextTask):
    """Restore the hidden voxels.

    Beside error, PSNR and SSIM inside the holes, the metrics give those of the trivial answer (the
    mean of what is visible), and `baselines` those of a smooth fill from the surroundings. SSIM is
    computed in validation alone.
    """

    draws = True
    primary_metric = "masked_l1"
    higher_is_better = False
    trivial_metric = "mean_fill_l1"
    baseline_metrics = ("biharmonic_fill_l1",)

    def __init__(self, config: Config, spatial_dims: int) -> None:
        super().__init__(config, spatial_dims)
        # The trivial answer is reported beside it, as the metric mean_fill_l1.
        self.chance_level = None
        self.healthy_range = (0.0, 0.1)

    def make_batch(self, images: Tensor, generator: torch.Generator) -> PretextBatch:
        config = self.config
        hidden = hole_mask(images, config.holes, config.ratio, config.block, generator)
        shape = (-1, *[1] * (images.ndim - 1))
        mean = masked_mean(images, ~hidden).reshape(shape)
        if config.fill == "noise":
            deviation = masked_mean((images - mean) ** 2, ~hidden).sqrt().reshape(shape)
            noise = torch.empty_like(images).normal_(generator=generator)
            fill = (mean + deviation * noise).clamp(0, 1)
        else:
            fill = mean.expand_as(images)
        counted = ~_blank(images) if config.exclude_blank else torch.ones_like(hidden)
        scored = weight = hidden & counted
        if config.overlap:
            band = dilate(hidden, config.overlap) & ~hidden & counted
            weight = scored + config.overlap_weight * band
        return PretextBatch(
            inputs=torch.where(hidden, fill, images),
            target=images,
            task=self.name,
            extras={"hidden": hidden, "scored": scored, "weight": weight, "mean": mean},
        )

    def build_head(self, backbone: Backbone) -> nn.Module:
        if self.config.adversarial:
            return AdversarialDecoder(backbone)
        return UNetDecoder(backbone, out_channels=backbone.in_channels)

    def forward(self, backbone: Backbone, head: nn.Module, batch: PretextBatch) -> Any:
        features = backbone(batch.inputs)
        if self.config.adversarial:
            return head(features, batch)
        return head(features, tuple(batch.inputs.shape[2:]))

    def loss(self, output: Tensor | Judged, batch: PretextBatch) -> Tensor:
        loss = self._error(_restored(output).float(), batch)
        if isinstance(output, Judged):
            loss = loss + _discriminator_loss(output, batch)
            loss = loss + self.config.adversarial * _deceiving_loss(output, batch)
        return loss

    def loss_of_guessing(self, batch: PretextBatch) -> Tensor:
        """Return the loss of the trivial answer, the mean of what is visible."""
        return self._error(batch.extras["mean"].float(), batch)

    def _error(self, answer: Tensor, batch: PretextBatch) -> Tensor:
        error = answer - batch.target
        error = error.abs() if self.config.criterion == "l1" else error**2
        return masked_mean(error, batch.extras["weight"]).mean()

    def metrics(self, output: Tensor | Judged, batch: PretextBatch) -> dict[str, Tensor]:
        # SSIM takes a tenth of a training step, so it is left to validation (no gradients).
        with_ssim = not _restored(output).requires_grad
        restored = _restored(output).detach().float()
        mean = batch.extras["mean"].expand_as(restored)
        metrics = _scores("masked", restored, batch, with_ssim)
        metrics |= _scores("mean_fill", mean, batch, with_ssim)
        if isinstance(output, Judged):
            patches = _patches(output, batch)
            right = ((output.real > 0).float() + (output.fake < 0).float()) / 2
            metrics["discriminator_accuracy"] = masked_mean(right, patches).mean()
        return metrics

    def baselines(self, batch: PretextBatch) -> dict[str, float]:
        """Fill a few images smoothly from what surrounds the holes.

        These are the first images of the batch: at most 32, and no more than together make 65,536
        voxels, but one at least. Volumes of more than 32 x 32 x 32 voxels are filled slice
        by slice.
        """
        target = batch.target.detach().float().cpu()
        extras = {name: value.detach().cpu() for name, value in batch.extras.items()}
        voxels = target[0, 0].numel()
        count = max(1, min(len(target), _BASELINE_IMAGES, _BASELINE_VOXELS // voxels))
        filled = [
            biharmonic_fill(target[i], extras["hidden"][i, 0], float(extras["mean"][i]))
            for i in range(count)
        ]
        few = PretextBatch(
            inputs=target[:count],
            target=target[:count],
            task=self.name,
            extras={name: value[:count] for name, value in extras.items()},
        )
        scores = _scores("biharmonic_fill", torch.stack(filled), few, with_ssim=True)
        return {name: float(value) for name, value in scores.items()}

    def panels(self, batch: PretextBatch, output: Tensor | Judged | None) -> list[list[Panel]]:
        rows = []
        for item in range(min(_NUM_PANELS, len(batch.target))):
            image, puzzle = batch.target[item], batch.inputs[item]
            row = [Panel(middle_slice(image), "image"), Panel(middle_slice(puzzle), "puzzle")]
            if output is not None:
                restored = _restored(output)[item].float().clamp(0, 1)
                restored = torch.where(batch.extras["hidden"][item], restored, image)
                row.append(Panel(middle_slice(restored), "restored"))
            rows.append(row)
        return rows


def _restored(output: Tensor | Judged) -> Tensor:
    return output.restored if isinstance(output, Judged) else output


def _blank(images: Tensor) -> Tensor:
    """Return the voxels that are the crop's darkest in every channel, (B, 1, *S) bool."""
    darkest = images.amin(tuple(range(2, images.ndim)), keepdim=True)
    return (images == darkest).all(1, keepdim=True)


def _scores(name: str, answer: Tensor, batch: PretextBatch, with_ssim: bool) -> dict[str, Tensor]:
    """Return error, PSNR and SSIM of an answer inside the holes, means over the images."""
    target, scored = batch.target.float(), batch.extras["scored"]
    # An image without a voxel to score has no score, and is passed over.
    none = ~scored.flatten(1).any(1)

    def mean(values: Tensor) -> Tensor:
        return values.masked_fill(none, torch.nan).nanmean()

    scores = {
        f"{name}_l1": mean(masked_mean((answer - target).abs(), scored)),
        f"{name}_psnr": mean(masked_psnr(answer, target, scored)),
    }
    if with_ssim:
        # Around the holes, SSIM compares what people would look at: the image itself.
        composite = torch.where(batch.extras["hidden"], answer, target)
        scores[f"{name}_ssim"] = mean(masked_ssim(composite, target, scored))
    return scores


def _patches(output: Judged, batch: PretextBatch) -> Tensor:
    """Return the discriminator's patches that hold a hidden voxel, (B, 1, *patches) bool."""
    dims = output.real.ndim - 2
    pool = functional.adaptive_max_pool2d if dims == 2 else functional.adaptive_max_pool3d
    return pool(batch.extras["hidden"].float(), output.real.shape[2:]) > 0


def _discriminator_loss(output: Judged, batch: PretextBatch) -> Tensor:
    """Return the discriminator's own loss; the decoder has no part in it.

    Source: Goodfellow et al., "Generative adversarial nets", NeurIPS 2014.
    """
    return _judgement(output.real, 1.0, output, batch) + _judgement(output.fake, 0.0, output, batch)


def _deceiving_loss(output: Judged, batch: PretextBatch) -> Tensor:
    """Return the decoder's loss, which wants to be taken for real.

    It raises log D instead of lowering log (1 - D), whose gradient vanishes while the decoder is
    easily seen through (same source).
    """
    return _judgement(output.deceived, 1.0, output, batch)


def _judgement(logits: Tensor, wanted: float, output: Judged, batch: PretextBatch) -> Tensor:
    answer = torch.full_like(logits, wanted, dtype=torch.float32)
    each = functional.binary_cross_entropy_with_logits(logits.float(), answer, reduction="none")
    return masked_mean(each, _patches(output, batch)).mean()
