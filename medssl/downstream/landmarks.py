"""Landmarks: points in a scan, found as the peaks of heatmaps.

The network is trained to draw a Gaussian of a width in mm around each point (Payer et al.,
"Regressing heatmaps for multiple landmark localization using CNNs", MICCAI 2016). What it draws
over a whole case is read off at the peak, and the distance to the point is told in mm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor

from medssl.downstream._per_voxel import VoxelConfig, VoxelTask
from medssl.downstream.base import DownstreamBatch
from medssl.errors import LabelError
from medssl.scans.index import Index
from medssl.scans.labels import By
from medssl.scans.masks import MaskFolder
from medssl.scans.points import PointSource, voxel_of
from medssl.transforms.cases import Case
from medssl.transforms.sampling import Sample

_PEAK_SIGMAS = 2.0
"""The centre of mass is taken within so many standard deviations of the highest voxel."""

_EPSILON = 1e-6


class Config(VoxelConfig):
    """Configuration of a landmark task; give either ``table`` or ``masks``.

    Attributes:
        table: CSV or Parquet file with one row a point: the scan, the point's name, and x, y, z in
            mm.
        by: what the rows of the table are about.
        id_column, name_column: the columns of the scan and of the point's name.
        coordinates: RAS as NIfTI files have them, or LPS as DICOM.
        masks: folder of masks; the points are the centroids of their values 1, 2, …
        classes: the points in order; sorted from the table by default, needed with masks.
        sigma_mm: standard deviation of the Gaussian that is drawn around a point.
        metric: the primary metric, fixed before anything runs.
    """

    name: Literal["landmarks"] = "landmarks"
    table: Path | None = None
    by: By = "scan"
    id_column: str = "scan"
    name_column: str = "name"
    coordinates: Literal["RAS", "LPS"] = "RAS"
    masks: Path | None = None
    classes: tuple[str, ...] | None = Field(default=None, min_length=1, max_length=255)
    sigma_mm: float = Field(default=4.0, gt=0)
    mask: str = "landmarks"
    metric: Literal["radial_error_mm", "success_rate_4mm"] = "radial_error_mm"

    @model_validator(mode="after")
    def _one_source(self) -> Config:
        if (self.table is None) == (self.masks is None):
            raise ValueError("give either table or masks")
        if self.masks is not None and self.classes is None:
            raise ValueError("with masks, give the names of their values 1, 2, … (classes)")
        return self

    def source(self) -> PointSource:
        """Return where the points come from."""
        return PointSource(
            self.table, self.masks, self.classes, self.by, self.id_column, self.name_column,
            self.coordinates,
        )  # fmt: skip


class Landmarks(VoxelTask):
    """Find points in a scan."""

    kind = "landmarks"
    answer = "numbers"

    def __init__(self, config: Config, spatial_dims: int, index: Index) -> None:
        super().__init__(config, spatial_dims, index)
        points = config.source().read(index)
        self.classes = points.names
        self.labels = points.report
        self.metric = config.metric
        self.targets: Mapping[str, tuple[float, ...]] = {
            key: tuple(chain.from_iterable(points[key])) for key in sorted(points)
        }
        dims = dict(zip(index.accepted["scan_key"], index.accepted["dims"], strict=True))
        others = sorted(key for key in points if dims[key] != f"{spatial_dims}D")
        if others:
            raise LabelError(
                f"landmarks are looked for in {spatial_dims}D, and {len(others)} of the scans are "
                f"not (keys {', '.join(others[:3])}). A slice of a volume seldom holds the point, "
                "and cannot tell which slice does: give three crop sizes and a 3D backbone (2D "
                "ones: inflated), or leave such scans out (select.dims)."
            )

    @classmethod
    def masks(cls, config: Config) -> dict[str, MaskFolder | PointSource]:
        return {config.mask: config.source()}

    @property
    def num_outputs(self) -> int:
        return len(self.classes)

    def batch_of(self, sample: Sample, generator: torch.Generator) -> DownstreamBatch:
        """Return images and heatmaps (B, K, X, Y[, Z]); NaN where a scan's point is unknown."""
        if sample.masks is None or not sample.spacing_mm:
            raise ValueError("the sampler was not asked for points")
        device = sample.images.device
        known = torch.tensor(
            [[not math.isnan(x) for x in self.targets[key][::3]] for key in sample.scan_keys]
        ).to(device, non_blocking=True)
        steps = torch.tensor(sample.spacing_mm) / self.config.sigma_mm
        heatmaps = draw_heatmaps(
            sample.masks, self.num_outputs, steps.to(device, non_blocking=True)
        )
        known = known.reshape(*known.shape, *(1,) * (heatmaps.ndim - 2))
        return DownstreamBatch(sample.images, torch.where(known, heatmaps, math.nan))

    def loss(self, output: Tensor, batch: DownstreamBatch) -> Tensor:
        """Return the mean squared error over all voxels, plus that around the points.

        A point takes up a thousandth of a crop: by the first part alone, drawing nothing would do.
        """
        error, target, known = _errors(output, batch.target)
        everywhere = error.sum() / known.sum().clamp(min=1)
        around = (error * target).sum() / target.sum().clamp(min=_EPSILON)
        return everywhere + around

    def metrics(self, output: Tensor, batch: DownstreamBatch) -> dict[str, Tensor]:
        error, target, _ = _errors(output, batch.target)
        around = (error * target).sum() / target.sum().clamp(min=_EPSILON)
        return {"error_at_points": around.sqrt()}

    def score_case(self, logits: Tensor, case: Case) -> list[float]:
        """Return the distance in mm from each point to where it was found; NaN where unknown."""
        heatmaps = logits[0].float().cpu().numpy()
        known = np.reshape(self.targets[case.scan_key], (-1, 3))
        dims = len(case.spacing_mm)
        errors = []
        for heatmap, (x, y, z) in zip(heatmaps, known.tolist(), strict=True):
            if math.isnan(x):
                errors.append(math.nan)
                continue
            # Of a 2D image, what lies across it is left out on both sides.
            true = voxel_of((x, y, z), case.affine)[:dims]
            found = find_peak(heatmap, self.config.sigma_mm / np.array(case.spacing_mm))
            errors.append(float(np.linalg.norm((found - true) * np.array(case.spacing_mm))))
        return errors

    def case_scores(self, logits: Tensor, masks: Tensor | None) -> list[float]:
        raise ValueError("landmarks are scored in mm, by score_case: masks hold whole voxels")


def draw_heatmaps(masks: Tensor, num_points: int, steps: Tensor) -> Tensor:
    """Return a Gaussian of height one around each point, (B, K, X, Y[, Z]) float32.

    Args:
        masks: (B, X, Y[, Z]) int64, with one voxel n + 1 where point number n lies.
        num_points: K.
        steps: (B, dims), from voxel to voxel in standard deviations.
    """
    numbers = torch.arange(1, num_points + 1, device=masks.device)
    here = masks[:, None] == numbers.reshape(1, -1, *(1,) * (masks.ndim - 1))
    dims = masks.ndim - 1
    heatmaps: Tensor | None = None
    for axis in range(dims):
        others = [2 + other for other in range(dims) if other != axis]
        on_axis = here.amax(dim=others).float()  # (B, K, X): one, where the point's voxel is
        size = masks.shape[1 + axis]
        apart = torch.arange(size, device=masks.device)
        distance = (apart[:, None] - apart)[None] * steps[:, axis, None, None]
        line = on_axis @ torch.exp(-0.5 * distance**2)
        line = line.reshape(*line.shape[:2], *(size if a == axis else 1 for a in range(dims)))
        heatmaps = line if heatmaps is None else heatmaps * line
    if heatmaps is None:
        raise ValueError("masks without a spatial axis")
    return heatmaps


def find_peak(
    heatmap: npt.NDArray[np.float32], sigma_voxels: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return where a heatmap peaks, in voxels: the centre of mass around its highest voxel."""
    highest = np.array(np.unravel_index(int(heatmap.argmax()), heatmap.shape))
    reach = np.maximum(1, np.ceil(_PEAK_SIGMAS * sigma_voxels)).astype(int)
    # As far on both sides: a border that cuts one off would push the centre away from it.
    reach = np.minimum(reach, np.minimum(highest, np.array(heatmap.shape) - 1 - highest))
    around = heatmap[tuple(slice(p - r, p + r + 1) for p, r in zip(highest, reach, strict=True))]
    mass = np.maximum(around, 0).astype(np.float64)
    if mass.sum() <= 0:
        return highest.astype(np.float64)
    offsets = np.meshgrid(*(np.arange(-r, r + 1) for r in reach), indexing="ij")
    moved = np.array([(mass * offset).sum() for offset in offsets]) / mass.sum()
    return np.asarray(highest + moved, dtype=np.float64)


def _errors(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return squared errors and heatmaps, 0 where unknown, and where they are known."""
    known = ~target.isnan()
    target = target.nan_to_num()
    return torch.where(known, (output.float() - target) ** 2, 0), target, known
