"""Sampling: what a task asks for, and crops or slices cut from the store to answer it.

A task states a `SampleRequest`; the sampler knows requests, never tasks. A batch is a function of
(seed, purpose, step, size) alone: the same with any number of workers, in any order, after resume.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from medssl.errors import ConfigError, DataError
from medssl.randomness import numpy_generator
from medssl.scans.store import Entry, Store

Plane = Literal["sagittal", "coronal", "axial"]
Array = npt.NDArray[Any]

AXES = ("X", "Y", "Z")
ACROSS = {"sagittal": 0, "coronal": 1, "axial": 2}
"""The RAS voxel axis that a plane's slices are stacked along."""

ISOTROPY_TOLERANCE = 0.01
"""Relative difference of voxel spacings up to which a turn by 90 degrees keeps the shape."""

MAX_TRIES = 20
"""Crops tried for enough foreground; then the fullest one found is taken."""

CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class SampleRequest:
    """What a task needs of each sample.

    Attributes:
        spatial_dims: 2 for slices, 3 for volumes.
        crop_size: voxels along each spatial axis, in RAS order.
        plane: of 2D slices from 3D scans: sagittal is cut across X and has axes (Y, Z), coronal
            across Y with (X, Z), axial across Z with (X, Y).
        num_neighbours: slices on each side that come as further channels (2D); at the scan's edge
            the last slice is repeated.
        num_sequences: co-registered sequences, one channel each.
        isotropic: the voxel spacings along the crop's axes must be equal (within 1 %).
        min_foreground: part of the crop, inside the scan, that must be foreground.
        allow_padding: pad scans smaller than the crop with zeros; otherwise refuse them.
        mask: name of the mask to deliver with the image.
    """

    spatial_dims: int
    crop_size: tuple[int, ...]
    plane: Plane | None = None
    num_neighbours: int = 0
    num_sequences: int = 1
    isotropic: bool = False
    min_foreground: float = 0.0
    allow_padding: bool = True
    mask: str | None = None

    def __post_init__(self) -> None:
        if self.spatial_dims not in (2, 3):
            raise ConfigError(f"spatial_dims must be 2 or 3, found {self.spatial_dims}.")
        if len(self.crop_size) != self.spatial_dims or min(self.crop_size) < 1:
            raise ConfigError(
                f"crop_size must hold {self.spatial_dims} positive numbers of voxels, "
                f"found {list(self.crop_size)}."
            )
        if self.plane is not None and self.plane not in ACROSS:
            raise ConfigError(f"plane must be one of {', '.join(ACROSS)}, found {self.plane!r}.")
        if self.spatial_dims == 3 and (self.plane is not None or self.num_neighbours):
            raise ConfigError("plane and num_neighbours are for 2D slices; spatial_dims is 3.")
        if self.num_neighbours < 0 or self.num_sequences < 1:
            raise ConfigError("num_neighbours must be 0 or more, and num_sequences 1 or more.")
        if not 0 <= self.min_foreground <= 1:
            raise ConfigError(f"min_foreground must lie in [0, 1], found {self.min_foreground}.")

    @property
    def axes(self) -> tuple[str, ...]:
        """The RAS axis of each spatial dimension; (X, Y) for 2D scans without a plane."""
        if self.spatial_dims == 3:
            return AXES
        return tuple(axis for axis in AXES if axis != AXES[ACROSS[self.plane or "axial"]])

    @property
    def in_channels(self) -> int:
        """Channels of the images that answer this request."""
        return self.num_sequences * (2 * self.num_neighbours + 1)

    def merge(self, other: SampleRequest) -> SampleRequest:
        """Return the request that serves both tasks, whose backbone sees one kind of sample.

        Raises:
            ConfigError: dimensions, crop sizes, planes or masks differ.
        """
        for name in ("spatial_dims", "crop_size", "plane"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise ConfigError(
                    f"tasks trained together must agree on {name}: found {ours} and {theirs}."
                )
        if self.mask and other.mask and self.mask != other.mask:
            raise ConfigError(
                f"tasks trained together may use one mask: found {self.mask!r} and {other.mask!r}."
            )
        return replace(
            self,
            num_neighbours=max(self.num_neighbours, other.num_neighbours),
            num_sequences=max(self.num_sequences, other.num_sequences),
            isotropic=self.isotropic or other.isotropic,
            min_foreground=max(self.min_foreground, other.min_foreground),
            allow_padding=self.allow_padding and other.allow_padding,
            mask=self.mask or other.mask,
        )

    def check(self, entry: Entry) -> None:
        """Refuse a scan that cannot answer this request.

        Raises:
            DataError: the message names the scan by key, what was found and wanted, and a remedy.
        """
        scan = f"scan {entry.scan_key}"
        kept = self.kept_axes(entry)
        if entry.channels != self.num_sequences:
            raise DataError(
                f"{scan} has {entry.channels} sequences, the task needs {self.num_sequences}. "
                "Set num_sequences to what the scans have."
            )
        sizes = [entry.shape[axis] for axis in kept]
        if not self.allow_padding and any(
            found < wanted for found, wanted in zip(sizes, self.crop_size, strict=True)
        ):
            raise DataError(
                f"{scan} has {_times(sizes)} voxels, the task needs {_times(self.crop_size)} "
                "without padding. Make the crop smaller, or the voxels finer "
                "(preprocessing.spacing_mm)."
            )
        spacing = [entry.spacing_mm[axis] for axis in kept]
        if self.isotropic and max(spacing) > min(spacing) * (1 + ISOTROPY_TOLERANCE):
            found = " x ".join(f"{mm:.2f}" for mm in spacing)
            raise DataError(
                f"{scan} has voxels of {found} mm, the task needs equal spacings (within 1 %). "
                "Set preprocessing.spacing_mm to three equal numbers, or turn only within a plane."
            )
        if self.mask is not None and self.mask not in entry.masks:
            raise DataError(
                f"{scan} has no mask {self.mask!r} in the store (it has: "
                f"{', '.join(entry.masks) or 'none'}). Prepare the store with that mask folder."
            )

    def kept_axes(self, entry: Entry) -> tuple[int, ...]:
        """Return which of a scan's spatial axes the crop keeps.

        Raises:
            DataError: 3D crops of a 2D scan, or slices of a 3D scan without a plane.
        """
        scan_dims = len(entry.shape)
        if scan_dims < self.spatial_dims:
            raise DataError(
                f"scan {entry.scan_key} is 2D, the task needs 3D. "
                "Use spatial_dims 2, or leave 2D scans out."
            )
        if scan_dims == self.spatial_dims:
            return tuple(range(scan_dims))
        if self.plane is None:
            raise DataError(
                f"scan {entry.scan_key} is 3D and the task takes 2D slices: "
                "give plane: sagittal, coronal or axial."
            )
        return tuple(axis for axis in range(3) if axis != ACROSS[self.plane])


@dataclass
class Sample:
    """A batch of crops.

    Attributes:
        images: (B, C, *S) float32 in [0, 1].
        masks: (B, *S) int64, or None when the request names no mask.
        scan_keys: the scan of each crop.
        rejected: crops thrown away for too little foreground while this batch was made.
    """

    images: Tensor
    masks: Tensor | None
    scan_keys: list[str] = field(default_factory=list)
    rejected: int = 0

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Sample:
        """Return the batch on a device."""
        masks = self.masks
        return replace(
            self,
            images=self.images.to(device, non_blocking=non_blocking),
            masks=None if masks is None else masks.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Sample:
        """Return the batch in page-locked memory; DataLoader calls this."""
        masks = None if self.masks is None else self.masks.pin_memory()
        return replace(self, images=self.images.pin_memory(), masks=masks)


class CropSampler:
    """Random crops of a set of scans, in epochs that visit each scan exactly once.

    Args:
        store: prepared scans.
        scan_keys: which to sample; their order does not matter.
        request: what each sample must be.
        seed: the study's seed.
        purpose: names the stream, for example ``"train"``.
        cache_bytes: memory for decoded scans, shared by all workers of a loader. Scans are kept
            until it is full; the others are read crop by crop.

    Raises:
        DataError: there are no scans, or one cannot answer the request.
    """

    def __init__(
        self,
        store: Store,
        scan_keys: Sequence[str],
        request: SampleRequest,
        seed: int,
        purpose: str,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        if not scan_keys:
            raise DataError(f"there are no scans to sample for {purpose!r}.")
        self.store = store
        self.scan_keys = sorted(set(scan_keys))
        self.request = request
        self.seed = seed
        self.purpose = purpose
        self.cache_bytes = cache_bytes
        for scan_key in self.scan_keys:
            request.check(store.entry(scan_key))
        self._cache: dict[tuple[str, str | None], Array] = {}
        self._cached_bytes = 0
        self._order: tuple[int, Array] = (-1, np.empty(0))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}, "_cached_bytes": 0}

    def batch(self, step: int, size: int) -> Sample:
        """Return batch number ``step`` of ``size`` crops.

        Crop number ``step * size + i`` of the stream is the same whoever asks; so rank r of n
        processes takes ``batch(step * n + r, size)``.
        """
        request = self.request
        images = np.zeros((size, request.in_channels, *request.crop_size), np.float32)
        masks = np.zeros((size, *request.crop_size), np.int64) if request.mask else None
        keys, rejected = [], 0
        for i in range(size):
            position = step * size + i
            entry = self.store.entry(self._scan_key(position))
            region, crop_CS, rejected_here = self._crop(entry, position)
            inside = tuple(
                slice((wanted - found) // 2, (wanted - found) // 2 + found)
                for wanted, found in zip(request.crop_size, crop_CS.shape[1:], strict=True)
            )
            images[i, :, *inside] = crop_CS
            if masks is not None:
                masks[i, *inside] = self._mask(entry, region)
            keys.append(entry.scan_key)
            rejected += rejected_here
        return Sample(
            torch.from_numpy(images),
            None if masks is None else torch.from_numpy(masks),
            keys,
            rejected,
        )

    def as_dataset(self, start: int, stop: int, size: int) -> Dataset[Sample]:
        """Return a dataset whose item i is ``batch(start + i, size)``.

        Use it with ``DataLoader(..., batch_size=None, num_workers=n)``.
        """
        return _Batches(self, start, stop, size)

    def _scan_key(self, position: int) -> str:
        epoch, index = divmod(position, len(self.scan_keys))
        if self._order[0] != epoch:
            generator = numpy_generator(self.seed, self.purpose, "epoch", epoch)
            self._order = (epoch, generator.permutation(len(self.scan_keys)))
        return self.scan_keys[self._order[1][index]]

    def _crop(self, entry: Entry, position: int) -> tuple[tuple[slice, ...], Array, int]:
        generator = numpy_generator(self.seed, self.purpose, "crop", position)
        best_fraction, best_region, best_crop = -1.0, (), np.empty(0)
        for rejected in range(MAX_TRIES):
            region = self._draw_region(entry, generator)
            crop_CS = cut_image(self, entry, region)
            if not self.request.min_foreground:
                return region, crop_CS, rejected
            threshold = np.float16(entry.foreground_threshold)
            fraction = float((crop_CS > threshold).any(axis=0).mean())
            if fraction >= self.request.min_foreground:
                return region, crop_CS, rejected
            if fraction > best_fraction:
                best_fraction, best_region, best_crop = fraction, region, crop_CS
        return best_region, best_crop, MAX_TRIES - 1

    def _draw_region(self, entry: Entry, generator: np.random.Generator) -> tuple[slice, ...]:
        kept = self.request.kept_axes(entry)
        region: list[slice] = []
        sizes = iter(self.request.crop_size)
        for axis, length in enumerate(entry.shape):
            if axis in kept:
                size = min(next(sizes), length)
                start = int(generator.integers(length - size + 1))
                region.append(slice(start, start + size))
            else:
                choices = self._slices(entry, axis)
                index = int(choices[generator.integers(len(choices))])
                region.append(slice(index, index + 1))
        return tuple(region)

    def _slices(self, entry: Entry, axis: int) -> Array:
        """Return the slices across an axis that may hold enough foreground; all, if none does."""
        depth, k = entry.shape[axis], self.request.num_neighbours
        inner = np.arange(k, depth - k) if depth > 2 * k else np.arange(depth)
        counts = np.asarray(entry.foreground_counts[axis])[inner]
        area = 1
        for wanted, other in zip(
            self.request.crop_size, self.request.kept_axes(entry), strict=True
        ):
            area *= min(wanted, entry.shape[other])
        enough = inner[counts >= self.request.min_foreground * area]
        return enough if len(enough) else inner

    def _mask(self, entry: Entry, region: tuple[slice, ...]) -> Array:
        mask_S = self.read(entry, region, self.request.mask)
        return drop_slice_axis(mask_S, self.request.kept_axes(entry))

    def read(self, entry: Entry, region: tuple[slice, ...], mask: str | None = None) -> Array:
        """Return a region of an image, or of a mask, from memory or from the store."""
        whole = self._cached(entry, mask)
        if whole is not None:
            return whole[(..., *region)]
        if mask is None:
            return self.store.read(entry.scan_key, region)
        return self.store.read_mask(entry.scan_key, mask, region)

    def _cached(self, entry: Entry, mask: str | None) -> Array | None:
        name = (entry.scan_key, mask)
        if name not in self._cache:
            size = entry.num_voxels * (2 * entry.channels if mask is None else 1)
            worker = get_worker_info()
            budget = self.cache_bytes // (worker.num_workers if worker else 1)
            if self._cached_bytes + size > budget:
                return None
            key = entry.scan_key
            self._cache[name] = (
                self.store.read(key) if mask is None else self.store.read_mask(key, mask)
            )
            self._cached_bytes += size
        return self._cache[name]


class _Batches(Dataset[Sample]):
    def __init__(self, sampler: CropSampler, start: int, stop: int, size: int) -> None:
        self.sampler, self.start, self.stop, self.size = sampler, start, stop, size

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.sampler.batch(self.start + index, self.size)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))


def cut_image(sampler: CropSampler, entry: Entry, region: tuple[slice, ...]) -> Array:
    """Return the crop of a region, (C, *S); neighbouring slices become channels.

    Channels run through the neighbours first, then through the sequences.
    """
    request = sampler.request
    kept = request.kept_axes(entry)
    if len(kept) == len(entry.shape):
        return sampler.read(entry, region)
    (axis,) = (axis for axis in range(len(entry.shape)) if axis not in kept)
    depth, centre, k = entry.shape[axis], region[axis].start, request.num_neighbours
    low, high = max(0, centre - k), min(depth, centre + k + 1)
    wide = (*region[:axis], slice(low, high), *region[axis + 1 :])
    slab = np.moveaxis(sampler.read(entry, wide), 1 + axis, 1)  # (C, neighbours, *S)
    wanted = np.clip(np.arange(centre - k, centre + k + 1), 0, depth - 1) - low
    slab = slab[:, wanted]
    return slab.reshape(-1, *slab.shape[2:])


def drop_slice_axis(mask_S: Array, kept: tuple[int, ...]) -> Array:
    """Return a mask without the axis of length one that a slice was cut across."""
    return mask_S if len(kept) == mask_S.ndim else mask_S.squeeze(({0, 1, 2} - set(kept)).pop())


def _times(sizes: Sequence[int]) -> str:
    return " x ".join(str(size) for size in sizes)
