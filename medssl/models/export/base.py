"""What an export format declares, and what all of them share: the subject, and the comparison.

A format writes files that work where medssl is not installed. Each compares what it has written
with the backbone itself before it is done, and raises where the two differ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from medssl.errors import WeightsError
from medssl.models.backbones.base import Backbone
from medssl.models.checkpoints import Contract
from medssl.models.export._capture import Captured, capture

TOLERANCE = 1e-4
"""Largest difference between an export and its backbone, as a share; see `check_equal`."""

EMBEDDING = "embedding"
"""Name of the output that holds one vector an image: the last stage's global mean."""

_SEED = 20261122
"""Of the images that exports are compared on."""


@dataclass(frozen=True)
class Subject:
    """What is exported.

    Attributes:
        backbone: in evaluation mode, on the CPU.
        contract: what it was trained under.
        title: what it is called in documents, for example ``inpainting``.
        preprocessing: how scans were prepared, in full; None where nobody knows.
        values: what voxels of the images mean that the bundle will be given; needed where the
            contract's intensity rule is ``auto``.
        image_size: voxels along each axis, for networks that can be captured at one size only;
            None: a size that suits most.
        card: the text of the model card.
        licence: of the weights.
    """

    backbone: Backbone
    contract: Contract
    title: str
    preprocessing: Mapping[str, Any] | None = None
    values: Literal["hu", "arbitrary"] | None = None
    image_size: tuple[int, ...] | None = None
    card: str = ""
    licence: str = ""

    @cached_property
    def captured(self) -> Captured:
        """The backbone as a program of its own; captured once for all formats."""
        return capture(self.backbone, self.image_size)

    def output_names(self) -> tuple[str, ...]:
        """Return the names of what an export returns: every stage, finest first, the embedding."""
        return (*(stage.name for stage in self.backbone.stages), EMBEDDING)

    def answers(self, images_BC: Tensor) -> dict[str, Tensor]:
        """Return what the backbone itself says to images: every stage by name, the embedding."""
        with torch.inference_mode():
            stages = self.backbone(images_BC)
            embedding = self.backbone.pool(stages[-1])
        return dict(zip(self.output_names(), [*stages, embedding], strict=True))

    def sample_images(self, batch: int, size: Sequence[int]) -> Tensor:
        """Return images of noise in [0, 1], the same on every machine."""
        generator = torch.Generator().manual_seed(_SEED)
        return torch.rand(batch, self.backbone.in_channels, *size, generator=generator)


class Export(ABC):
    """A format of exported weights.

    Attributes:
        description: one line for people, as the command's help shows it.
        extra: the extra of medssl that installs what the format needs, if any.
    """

    description: ClassVar[str]
    extra: ClassVar[str | None] = None

    def check(self, subject: Subject) -> None:  # noqa: B027  (most formats take every backbone)
        """Refuse, before anything is computed or written, what the format cannot hold.

        Raises:
            WeightsError, ConfigError: the message says what stands against it, and what to do.
            MachineError: a package is not installed.
        """

    @abstractmethod
    def files(self, subject: Subject) -> tuple[str, ...]:
        """Return the paths that `write` writes, relative to the folder of the export."""

    @abstractmethod
    def write(self, subject: Subject, folder: Path) -> dict[str, Any]:
        """Write the files, compare them with the backbone, and return facts for ``export.json``.

        Raises:
            WeightsError: what was written does not answer as the backbone does.
        """

    @abstractmethod
    def usage(self, subject: Subject) -> str:
        """Return how to load the files, as Markdown."""


def check_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str) -> float:
    """Return the largest difference, as a share of an output's largest value (or of 1, if larger).

    Raises:
        WeightsError: an output is missing, has another shape, is not finite, or differs by more
            than `TOLERANCE`.
    """
    worst = 0.0
    for name, tensor in wanted.items():
        answer = found.get(name)
        if answer is None or answer.shape != tensor.shape:
            shape = None if answer is None else tuple(answer.shape)
            raise WeightsError(
                f"{what} is wrong and was not kept: output {name} has shape {shape}, wanted "
                f"{tuple(tensor.shape)}. Please report this architecture."
            )
        scale = max(1.0, float(tensor.abs().max()))
        difference = float((answer.double() - tensor.double()).abs().max()) / scale
        if not difference <= TOLERANCE:  # also where it is not a number
            raise WeightsError(
                f"{what} is wrong and was not kept: output {name} differs from the backbone's by "
                f"{difference:.1e}, allowed is {TOLERANCE:.0e}. Please report this architecture."
            )
        worst = max(worst, difference)
    return worst
