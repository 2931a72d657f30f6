"""Rotation: tell by which right-angle turn an image was rotated.

Source: Gidaris, Singh, Komodakis, "Unsupervised representation learning by predicting image
rotations", ICLR 2018; in 3D, Taleb et al., "3D self-supervised methods for medical imaging",
NeurIPS 2020. Only exact turns (permuted and mirrored axes) are used: interpolation at other angles
would give the answer away by its blur and corners.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations, product
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from medssl.errors import ConfigError
from medssl.models.backbones.base import Backbone
from medssl.models.heads import PooledHead
from medssl.pretext._labels import deal_labels
from medssl.pretext.base import (
    ClassificationTask,
    Panel,
    PretextBatch,
    PretextConfig,
    answer_title,
    middle_slice,
)
from medssl.transforms.sampling import SampleRequest

_NUM_PANELS = 6


class Config(PretextConfig):
    """Configuration of the rotation task.

    Attributes:
        turns: ``in_plane``, 4 turns about Z (2D: the only choice); ``axes``, 10 turns about the
            three axes; ``cube``, all 24 proper rotations. Default: in_plane in 2D, cube in 3D.
        views: rotations of each image in a batch: ``all``, or a number of different ones drawn at
            random. Default: all in 2D, 2 in 3D.
        hidden: units of the hidden layer of the head; none for a linear head.
    """

    name: Literal["rotation"] = "rotation"
    turns: Literal["in_plane", "axes", "cube"] | None = None
    views: Literal["all"] | int | None = None
    hidden: int | None = Field(default=None, ge=1)


def rotation_matrices(spatial_dims: int, turns: str) -> Tensor:
    """Return the turns as integer matrices, (R, D, D); the identity comes first.

    Each is a signed permutation of the axes with determinant +1.
    """
    if spatial_dims == 2:
        return torch.tensor([[[1, 0], [0, 1]], [[0, -1], [1, 0]], [[-1, 0], [0, -1]],
                             [[0, 1], [-1, 0]]])  # fmt: skip
    cube = []
    for axes in permutations(range(3)):
        for signs in product((1, -1), repeat=3):
            matrix = torch.zeros(3, 3, dtype=torch.long)
            for row, (axis, sign) in enumerate(zip(axes, signs, strict=True)):
                matrix[row, axis] = sign
            if round(float(torch.det(matrix.double()))) == 1:
                cube.append(matrix)
    cube.sort(key=lambda matrix: -int(matrix.diagonal().sum()))  # the identity has trace 3
    if turns == "in_plane":
        cube = [matrix for matrix in cube if matrix[2, 2] == 1]
    elif turns == "axes":
        # A 1 on the diagonal: the turn leaves that axis as it is.
        cube = [matrix for matrix in cube if 1 in matrix.diagonal().tolist()]
    return torch.stack(cube)


def rotate(images: Tensor, matrices: Tensor) -> Tensor:
    """Rotate each image of a batch by its own matrix, exactly and without synchronising.

    Args:
        images: (B, C, X, Y[, Z]); axes that a matrix exchanges have equal sizes.
        matrices: (B, D, D) signed permutations.

    Returns:
        A new tensor of the same shape. Voxel ``p`` of the result is voxel ``M^-1 p`` of the
        image, coordinates counted from the centre.
    """
    sizes = images.shape[2:]
    # Where a voxel comes from is a sum of one term an axis, so it is never computed voxel by voxel.
    strides = torch.tensor([math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))])
    strides = strides.to(images.device, non_blocking=True)
    last = (torch.tensor(sizes) - 1).to(images.device, non_blocking=True)
    inverse = matrices.transpose(1, 2)  # orthogonal
    # Integer matmul is not implemented on CUDA; the products of small matrices are written out.
    step = (inverse * strides[:, None]).sum(1)  # (B, D): by a voxel along each axis of the result
    start = ((inverse.sum(2) < 0) * last * strides).sum(1)  # (B,)
    index = start.reshape(-1, *[1] * len(sizes))
    for axis, size in enumerate(sizes):
        along = torch.arange(size, device=images.device) * step[:, axis, None]  # (B, size)
        index = index + along.reshape(-1, *[size if a == axis else 1 for a in range(len(sizes))])
    flat = images.flatten(2)
    return flat.gather(2, index.flatten(1)[:, None].expand_as(flat)).reshape(images.shape)


class Rotation(ClassificationTask):
    """Predict the turn that was applied."""

    def __init__(self, config: Config, spatial_dims: int) -> None:
        super().__init__(config, spatial_dims)
        turns = config.turns or ("in_plane" if spatial_dims == 2 else "cube")
        if spatial_dims == 2 and turns != "in_plane":
            raise ConfigError(f"pretext.turns: {turns} needs 3D crops; in 2D choose in_plane.")
        self.turns = turns
        self.matrices = rotation_matrices(spatial_dims, turns)
        self.num_classes = len(self.matrices)
        views = config.views
        if views is None:
            views = "all" if spatial_dims == 2 else 2
        self.views = self.num_classes if views == "all" else int(views)
        if not 1 <= self.views <= self.num_classes:
            raise ConfigError(
                f"pretext.views: {self.views} rotations of an image asked for; "
                f"{turns} has {self.num_classes}. Choose 1 to {self.num_classes}, or all."
            )
        self.chance_level = 1 / self.num_classes
        # RotNet reaches 0.89 on ImageNet; medical crops with context reach more.
        self.healthy_range = (2 * self.chance_level, 0.99)

    def request(self, base: SampleRequest) -> SampleRequest:
        """Ask for crops that lie inside the scan, of equal sides and spacings where they turn.

        A padded border, a side longer than another, or the blur of thick slices would each tell
        the turn without a look at the anatomy.
        """
        in_plane = self.turns == "in_plane"
        turning = base.crop_size[:2] if in_plane else base.crop_size
        if len(set(turning)) != 1:
            sides = "equal sides along X and Y" if in_plane else "equal sides"
            raise ConfigError(
                f"sampling.crop_size: rotation needs {sides}, found {list(base.crop_size)}."
            )
        return replace(base, isotropic="in_plane" if in_plane else "all", allow_padding=False)

    def make_batch(self, images: Tensor, generator: torch.Generator) -> PretextBatch:
        num_images = images.shape[0]
        if self.views == self.num_classes:
            labels = torch.arange(self.num_classes, device=images.device).repeat(num_images)
        else:
            dealt = deal_labels(num_images, self.views, self.num_classes, images.device, generator)
            labels = dealt.flatten()
        repeated = images.repeat_interleave(self.views, dim=0)
        matrices = self.matrices.to(images.device, non_blocking=True)[labels]
        return PretextBatch(inputs=rotate(repeated, matrices), target=labels, task=self.name)

    def build_head(self, backbone: Backbone) -> nn.Module:
        return PooledHead(backbone.stages[-1].channels, self.num_classes, self.config.hidden)

    def class_names(self) -> Sequence[str]:
        if self.spatial_dims == 2:
            return [f"{90 * turn}°" for turn in range(self.num_classes)]
        return [turn_name(matrix) for matrix in self.matrices]

    def panels(self, batch: PretextBatch, output: Tensor | None) -> list[list[Panel]]:
        names = self.class_names()
        answers = [None] * len(batch.target) if output is None else output.argmax(1).tolist()
        row = []
        for item in range(min(_NUM_PANELS, len(batch.target))):
            row.append(
                Panel(
                    image_XY=middle_slice(batch.inputs[item]),
                    title=answer_title(names, int(batch.target[item]), answers[item]),
                )
            )
        return [row]


def turn_name(matrix: Tensor) -> str:
    """Return a turn by where it sends the axes: ``+X+Y+Z`` is none, ``+Y-X+Z`` a quarter turn."""
    names = []
    for column in matrix.T.tolist():
        axis = next(axis for axis, value in enumerate(column) if value)
        names.append(("+" if column[axis] > 0 else "-") + "XYZ"[axis])
    return "".join(names)
