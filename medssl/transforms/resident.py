"""Scans that live on the device: crops are gathered there, in one indexed read a batch.

Regions are drawn on the host by the sampler itself, so the crops are those it would read. What
travels to the device in each step is a few numbers a crop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medssl.scans.store import Entry, Region
from medssl.transforms.sample import Batches, Sample, Share
from medssl.transforms.sampling import CropSampler, Draw, cut_image

Array = npt.NDArray[Any]

ResidentDtype = Literal["float16", "uint8"]

_DTYPES = {"float16": torch.float16, "uint8": torch.uint8}
_LEVELS = 255
"""Steps of intensity that uint8 keeps; float16 keeps what the store holds."""

_ZERO = 1
"""Voxels before the first scan: voxel 0 is zero, and padding is read from there."""


def resident_bytes(sampler: CropSampler, dtype: ResidentDtype) -> int:
    """Return the device memory that all scans of a sampler take, with the masks it names."""
    image, mask = _voxels(sampler)
    return (_ZERO + image) * _DTYPES[dtype].itemsize + (_ZERO + mask if mask else 0)


class ResidentScans:
    """All scans of a sampler, on the device.

    Args:
        sampler: whose scans, and who draws regions.
        dtype: ``float16`` keeps every bit of the store; ``uint8`` takes half the memory and rounds
            intensities to 256 levels.
        device: where they live.
    """

    def __init__(self, sampler: CropSampler, dtype: ResidentDtype, device: torch.device) -> None:
        self.sampler = sampler
        self.dtype = dtype
        self.device = device
        num_image, num_mask = _voxels(sampler)
        self._images = torch.zeros(_ZERO + num_image, dtype=_DTYPES[dtype], device=device)
        self._masks: Tensor | None = None
        if sampler.request.mask is not None:
            self._masks = torch.zeros(_ZERO + num_mask, dtype=torch.uint8, device=device)
        self._starts: dict[str, tuple[int, int]] = {}
        self._foreground: dict[str, Array] = {}
        image_at = mask_at = _ZERO
        for scan_key in sampler.scan_keys:
            entry = sampler.store.listed(scan_key)
            self._starts[scan_key] = (image_at, mask_at)
            self._load(entry, image_at, mask_at)
            image_at += entry.channels * entry.num_voxels
            mask_at += entry.num_voxels

    def batch(self, step: int, size: int) -> Sample:
        """Return what `CropSampler.batch` returns, on the device.

        Its images are equal bit by bit where the scans are kept as float16.
        """
        request = self.sampler.request
        draws = [self.sampler.draw(step * size + i, self._look) for i in range(size)]
        table = torch.from_numpy(np.stack([self._row(draw) for draw in draws]))
        if self.device.type == "cuda":
            table = table.pin_memory()
        table = table.to(self.device, non_blocking=True)
        lead, axes = table[:, : request.in_channels + 1], table[:, request.in_channels + 1 :]
        offset, inside = _offsets(axes.reshape(size, -1, 4), request.crop_size)
        images = _gather(self._images, lead[:, :-1], offset, inside)
        images = images.float() if self.dtype == "float16" else images.float() / _LEVELS
        masks = None
        if self._masks is not None:
            masks = _gather(self._masks, lead[:, -1:], offset, inside)[:, 0].long()
        keys = [draw.entry.scan_key for draw in draws]
        spacing_mm = [request.spacing_of(draw.entry) for draw in draws]
        rejected = sum(draw.rejected for draw in draws)
        return Sample(images, masks, keys, rejected, step, spacing_mm=spacing_mm)

    def as_dataset(self, start_step: int, stop_step: int, share: Share) -> Batches:
        """Return the micro batches that one process computes, as `CropSampler.as_dataset` does."""
        return Batches(self.batch, start_step, stop_step, share)

    def _load(self, entry: Entry, image_at: int, mask_at: int) -> None:
        store, request = self.sampler.store, self.sampler.request
        image_CS: Array = store.read(entry.scan_key)
        if request.min_foreground:
            threshold = np.float16(entry.foreground_threshold)
            foreground_S = np.any(image_CS > threshold, axis=0)
            self._foreground[entry.scan_key] = foreground_S[np.newaxis]
        kept = image_CS
        if self.dtype == "uint8":
            kept = np.rint(image_CS.astype(np.float32) * _LEVELS).clip(0, _LEVELS)
        voxels = torch.from_numpy(np.ascontiguousarray(kept)).flatten()
        self._images[image_at : image_at + len(voxels)] = voxels.to(_DTYPES[self.dtype])
        if self._masks is not None and request.mask is not None:
            mask = torch.from_numpy(store.read_mask(entry.scan_key, request.mask)).flatten()
            self._masks[mask_at : mask_at + len(mask)] = mask

    def _look(self, entry: Entry, region: Region) -> Array:
        """Return where a region is foreground; nothing, where no task asks."""
        if not self.sampler.request.min_foreground:
            return np.empty(0)
        return cut_image(self._read_foreground, self.sampler.request, entry, region)

    def _read_foreground(self, entry: Entry, region: Region) -> Array:
        part: Array = self._foreground[entry.scan_key][(slice(None), *region)]
        return part

    def _row(self, draw: Draw) -> Array:
        """Return the numbers that place one crop: what `_offsets` and `_gather` take apart.

        First the voxel that each channel of the image begins at, and that the mask begins at; then
        start, stride, padding and size along each axis of the crop.
        """
        request, entry, region = self.sampler.request, draw.entry, draw.region
        kept = request.kept_axes(entry)
        strides = [int(np.prod(entry.shape[axis + 1 :])) for axis in range(len(entry.shape))]
        image_at, mask_at = self._starts[entry.scan_key]
        beside = np.zeros(1, np.int64)
        for axis in set(range(len(entry.shape))) - set(kept):
            k, centre = request.num_neighbours, region[axis].start
            slices = np.clip(np.arange(centre - k, centre + k + 1), 0, entry.shape[axis] - 1)
            beside = slices * strides[axis]
            mask_at += centre * strides[axis]
        channels = np.arange(entry.channels)[:, np.newaxis] * entry.num_voxels
        row = [*(image_at + channels + beside).ravel().tolist(), mask_at]
        for axis, wanted in zip(kept, request.crop_size, strict=True):
            found = region[axis].stop - region[axis].start
            row += [region[axis].start, strides[axis], (wanted - found) // 2, found]
        return np.asarray(row, np.int64)


def _voxels(sampler: CropSampler) -> tuple[int, int]:
    """Return the voxels of all images and of all masks."""
    entries = [sampler.store.listed(scan_key) for scan_key in sampler.scan_keys]
    masks = sum(entry.num_voxels for entry in entries) if sampler.request.mask else 0
    return sum(entry.channels * entry.num_voxels for entry in entries), masks


def _offsets(axes_B: Tensor, crop_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return where the voxels of crops lie, counted from the first slice of their scan.

    Args:
        axes_B: (B, S, 4) int64: start, stride, padding and size along each axis.
        crop_size: voxels along each axis.

    Returns:
        (B, *crop_size) int64 offsets, and the same of bool: whether there is a voxel, or padding.
    """
    size, dims = len(axes_B), len(crop_size)
    offset = torch.zeros((size, *(1,) * dims), dtype=torch.int64, device=axes_B.device)
    inside = torch.ones_like(offset, dtype=torch.bool)
    for axis, wanted in enumerate(crop_size):
        sides = [size, *(1,) * dims]
        start, stride, before, found = axes_B[:, axis].reshape(size, 4, *sides[1:]).unbind(1)
        sides = [1, *(1,) * dims]
        sides[1 + axis] = wanted
        at = torch.arange(wanted, device=axes_B.device).reshape(sides) - before
        offset = offset + (start + at) * stride
        inside = inside & (at >= 0) & (at < found)
    return offset, inside


def _gather(flat: Tensor, lead_BC: Tensor, offset_BS: Tensor, inside_BS: Tensor) -> Tensor:
    """Read crops out of one flat buffer, (B, C, *S); padding is voxel 0, which is zero."""
    lead = lead_BC.reshape(*lead_BC.shape, *(1,) * (offset_BS.ndim - 1))
    index = torch.where(inside_BS.unsqueeze(1), lead + offset_BS.unsqueeze(1), 0)
    return flat[index]
