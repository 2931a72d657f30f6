"""Cases: whole scans, in order, for evaluation; every slice of a plane or the whole volume."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from medssl.errors import DataError
from medssl.scans.store import Entry, Region, Store
from medssl.transforms.requests import SampleRequest
from medssl.transforms.sampling import Array, cut_image, drop_slice_axis


@dataclass(frozen=True)
class Case:
    """One scan, whole.

    Attributes:
        images: (N, C, *S) float32: N slices, or N = 1 for a volume or a 2D scan.
        masks: (N, *S) int64, or None when the request names no mask.
        slices: the index of each slice across the plane; (0,) for a volume or a 2D scan.
        padding: for each spatial axis, the voxels added before and after.
        spacing_mm: for each spatial axis.
        affine: (4, 4) float64, voxel of the images as they are here, padding included, to RAS mm;
            the third column of 2D images lies across them. Of several slices, the first one's.
    """

    scan_key: str
    patient_key: str
    images: Tensor
    masks: Tensor | None
    slices: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    spacing_mm: tuple[float, ...]
    affine: Array

    def unpad(self, tensor: Tensor) -> Tensor:
        """Cut the padding off the last axes of a prediction or an image."""
        return without_padding(tensor, self.padding)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield images and masks, ``size`` slices at a time."""
        for start in range(0, len(self.images), size):
            part = slice(start, start + size)
            yield self.images[part], None if self.masks is None else self.masks[part]


def without_padding(tensor: Tensor, padding: Sequence[tuple[int, int]]) -> Tensor:
    """Cut so many voxels before and after off the last axes."""
    inside: list[slice] = [
        slice(before, tensor.shape[axis] - after)
        for axis, (before, after) in enumerate(padding, tensor.ndim - len(padding))
    ]
    whole = [slice(None)] * (tensor.ndim - len(inside))
    return tensor[(*whole, *inside)]


class CaseReader(Dataset[Case]):
    """Whole scans, one at a time; also a dataset for ``DataLoader(..., batch_size=None)``.

    Args:
        store: prepared scans.
        scan_keys: which, in the order in which they are read.
        request: plane, channels and mask; sizes below its ``crop_size`` are padded up to it, as
            in training, and larger ones stay whole. ``allow_padding`` concerns training alone.
        divisor: each size is padded, evenly on both sides, to a multiple of this.
        slices: every slice, or only those that the mask labels (none, where it is empty).
        max_slices: read no more than this many of them, evenly spaced through the scan.

    Raises:
        DataError: a scan cannot answer the request, or ``with_mask`` is asked for without a mask.
    """

    def __init__(
        self,
        store: Store,
        scan_keys: Sequence[str],
        request: SampleRequest,
        *,
        divisor: int = 1,
        slices: Literal["all", "with_mask"] = "all",
        max_slices: int | None = None,
    ) -> None:
        if slices == "with_mask" and request.mask is None:
            raise DataError("only slices with a mask are wanted, but the task names no mask.")
        self.store = store
        self.scan_keys = list(scan_keys)
        self.request = request
        self.divisor = divisor
        self.slices = slices
        self.max_slices = max_slices

    def __len__(self) -> int:
        return len(self.scan_keys)

    def __getitem__(self, index: int) -> Case:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.read(self.scan_keys[index])

    def __iter__(self) -> Iterator[Case]:
        return (self.read(scan_key) for scan_key in self.scan_keys)

    def read(self, scan_key: str) -> Case:
        """Return one scan."""
        request, entry = self.request, self.store.entry(scan_key)
        request.check(entry, whole=True)
        kept = request.kept_axes(entry)
        image_CS = self.store.read(scan_key)
        mask_S = self.store.read_mask(scan_key, request.mask) if request.mask else None
        regions = self._regions(entry, kept, mask_S)
        padding = tuple(
            _padding(entry.shape[axis], wanted, self.divisor)
            for axis, wanted in zip(kept, request.crop_size, strict=True)
        )
        sizes = tuple(
            entry.shape[axis] + before + after
            for axis, (before, after) in zip(kept, padding, strict=True)
        )
        inside: tuple[slice, ...] = tuple(
            slice(before, size - after)
            for (before, after), size in zip(padding, sizes, strict=True)
        )

        def read(_: Entry, region: Region) -> Array:
            part: Array = image_CS[(slice(None), *region)]
            return part

        images = np.zeros((len(regions), request.in_channels, *sizes), np.float32)
        masks = np.zeros((len(regions), *sizes), np.int64)
        for i, region in enumerate(regions):
            images[i][(slice(None), *inside)] = cut_image(read, request, entry, region)
            if mask_S is not None:
                masks[i][inside] = drop_slice_axis(mask_S[region], kept)
        whole = len(kept) == len(entry.shape)
        across = next((axis for axis in range(len(entry.shape)) if axis not in kept), 0)
        return Case(
            scan_key=scan_key,
            patient_key=entry.patient_key,
            images=torch.from_numpy(images),
            masks=None if mask_S is None else torch.from_numpy(masks),
            slices=(0,) if whole else tuple(region[across].start for region in regions),
            padding=padding,
            spacing_mm=request.spacing_of(entry),
            affine=_affine(entry, kept, padding, regions),
        )

    def _regions(self, entry: Entry, kept: tuple[int, ...], mask_S: Array | None) -> list[Region]:
        full: Region = tuple(slice(0, size) for size in entry.shape)
        if len(kept) == len(entry.shape):
            return [full]
        (across,) = (axis for axis in range(len(entry.shape)) if axis not in kept)
        indices = np.arange(entry.shape[across])
        if self.slices == "with_mask" and mask_S is not None:
            indices = indices[(mask_S > 0).any(axis=kept)]
        if self.max_slices is not None and len(indices) > self.max_slices:
            # The middles of equal parts: the first and last slices of a scan hold little.
            parts = (np.arange(self.max_slices) + 0.5) * len(indices) / self.max_slices
            indices = indices[parts.astype(int)]
        return [
            (*full[:across], slice(index, index + 1), *full[across + 1 :])
            for index in indices.tolist()
        ]


def _padding(found: int, wanted: int, divisor: int) -> tuple[int, int]:
    size = -(-max(found, wanted) // divisor) * divisor
    before = (size - found) // 2
    return before, size - found - before


def _affine(
    entry: Entry,
    kept: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    regions: Sequence[Region],
) -> Array:
    """Return the affine of the padded images that are cut out of a scan."""
    found = np.array(entry.affine, dtype=np.float64)
    start = np.zeros(4)
    start[3] = 1
    for axis, (before, _) in zip(kept, padding, strict=True):
        start[axis] = -before
    across = [axis for axis in range(3) if axis not in kept]
    if entry.dims == "3D" and across and regions:
        start[across[0]] = regions[0][across[0]].start
    origin = found @ start
    moved = np.column_stack([found[:, [*kept, *across]], origin])
    return np.asarray(moved)
