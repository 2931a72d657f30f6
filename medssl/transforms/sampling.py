"""Sampling: crops or slices cut from the store, as a `SampleRequest` asks for them.

The sampler knows requests, never tasks. A batch is a function of
(seed, purpose, step, size) alone: the same with any number of workers, in any order, after resume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from medssl.errors import DataError
from medssl.randomness import numpy_generator
from medssl.scans.store import Entry, Region, Store
from medssl.transforms.requests import Plane, SampleRequest

__all__ = ["CropSampler", "Plane", "Sample", "SampleRequest"]

Array = npt.NDArray[Any]

MAX_TRIES = 20
"""Crops tried for enough foreground; then the fullest one found is taken."""

CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class Share:
    """Which part of every global batch one process computes.

    The global batch of a step is ``num_micro_batches`` micro batches; rank r of n computes numbers
    r, r + n, and so on.
    """

    global_batch_size: int
    num_micro_batches: int = 1
    rank: int = 0
    num_ranks: int = 1

    @property
    def micro_batch_size(self) -> int:
        """Images of one micro batch."""
        return self.global_batch_size // self.num_micro_batches


@dataclass
class Sample:
    """A batch of crops.

    Attributes:
        images: (B, C, *S) float32 in [0, 1].
        masks: (B, *S) int64, or None when the request names no mask.
        scan_keys: the scan of each crop.
        rejected: crops thrown away for too little foreground while this batch was made.
        step: of the training that the crops are for; else the number of the batch.
        part: of which micro batch of the step.
    """

    images: Tensor
    masks: Tensor | None
    scan_keys: list[str] = field(default_factory=list)
    rejected: int = 0
    step: int = 0
    part: int = 0

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
        *,
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
        self._order: tuple[int, list[int]] = (-1, [])

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
            inside: tuple[slice, ...] = tuple(
                slice((wanted - found) // 2, (wanted - found) // 2 + found)
                for wanted, found in zip(request.crop_size, crop_CS.shape[1:], strict=True)
            )
            images[i][(slice(None), *inside)] = crop_CS
            if masks is not None:
                masks[i][inside] = self._mask(entry, region)
            keys.append(entry.scan_key)
            rejected += rejected_here
        return Sample(
            torch.from_numpy(images),
            None if masks is None else torch.from_numpy(masks),
            keys,
            rejected,
            step,
        )

    def as_dataset(self, start: int, stop: int, share: Share) -> Dataset[Sample]:
        """Return the crops of steps ``start`` to ``stop`` that fall to one process, in order.

        Use it with ``DataLoader(..., batch_size=None, num_workers=n)``.
        """
        return _Batches(self, start, stop, share)

    def _scan_key(self, position: int) -> str:
        epoch, index = divmod(position, len(self.scan_keys))
        if self._order[0] != epoch:
            generator = numpy_generator(self.seed, self.purpose, "epoch", epoch)
            self._order = (epoch, generator.permutation(len(self.scan_keys)).tolist())
        return self.scan_keys[self._order[1][index]]

    def _crop(self, entry: Entry, position: int) -> tuple[Region, Array, int]:
        generator = numpy_generator(self.seed, self.purpose, "crop", position)
        best_fraction = -1.0
        best_region: Region = ()
        best_crop: Array = np.empty(0)
        for rejected in range(MAX_TRIES):
            region = self._draw_region(entry, generator)
            crop_CS = cut_image(self.read, self.request, entry, region)
            if not self.request.min_foreground:
                return region, crop_CS, rejected
            threshold = np.float16(entry.foreground_threshold)
            fraction = float((crop_CS > threshold).any(axis=0).mean())
            if fraction >= self.request.min_foreground:
                return region, crop_CS, rejected
            if fraction > best_fraction:
                best_fraction, best_region, best_crop = fraction, region, crop_CS
        return best_region, best_crop, MAX_TRIES - 1

    def _draw_region(self, entry: Entry, generator: np.random.Generator) -> Region:
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

    def _mask(self, entry: Entry, region: Region) -> Array:
        mask_S = self.read(entry, region, self.request.mask)
        return drop_slice_axis(mask_S, self.request.kept_axes(entry))

    def read(self, entry: Entry, region: Region, mask: str | None = None) -> Array:
        """Return a region of an image, or of a mask, from memory or from the store."""
        whole = self._cached(entry, mask)
        if whole is not None:
            inside: Any = (..., *region)
            part: Array = whole[inside]
            return part
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
    def __init__(self, sampler: CropSampler, start: int, stop: int, share: Share) -> None:
        self.sampler, self.share = sampler, share
        self.numbers = [
            (step, part)
            for step in range(start, stop)
            for part in range(share.rank, share.num_micro_batches, share.num_ranks)
        ]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Sample:
        step, part = self.numbers[index]
        number = step * self.share.num_micro_batches + part
        sample = self.sampler.batch(number, self.share.micro_batch_size)
        return replace(sample, step=step, part=part)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))


def cut_image(
    read: Callable[[Entry, Region], Array], request: SampleRequest, entry: Entry, region: Region
) -> Array:
    """Return the crop of a region, (C, *S); neighbouring slices become channels.

    Channels run through the neighbours first, then through the sequences.
    """
    kept = request.kept_axes(entry)
    if len(kept) == len(entry.shape):
        return read(entry, region)
    (axis,) = (axis for axis in range(len(entry.shape)) if axis not in kept)
    depth, centre, k = entry.shape[axis], region[axis].start, request.num_neighbours
    low, high = max(0, centre - k), min(depth, centre + k + 1)
    wide = (*region[:axis], slice(low, high), *region[axis + 1 :])
    slab = np.moveaxis(read(entry, wide), 1 + axis, 1)  # (C, neighbours, *S)
    wanted = np.clip(np.arange(centre - k, centre + k + 1), 0, depth - 1) - low
    slab = slab[:, wanted]
    return slab.reshape(-1, *slab.shape[2:])


def drop_slice_axis(mask_S: Array, kept: tuple[int, ...]) -> Array:
    """Return a mask without the axis of length one that a slice was cut across."""
    return mask_S if len(kept) == mask_S.ndim else mask_S.squeeze(({0, 1, 2} - set(kept)).pop())
