"""Sampling: crops or slices cut from the store, as a `SampleRequest` asks for them.

The sampler knows requests, never tasks. A batch is a function of
(seed, purpose, step, size) alone: the same with any number of workers, in any order, after resume.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from medssl.errors import DataError
from medssl.randomness import numpy_generator
from medssl.scans.store import Entry, Region, Store
from medssl.transforms.requests import Plane, SampleRequest
from medssl.transforms.sample import Batches, Sample, Share
from medssl.transforms.scan_cache import ScanCache

__all__ = ["CropSampler", "Draw", "Plane", "Sample", "SampleRequest", "Share"]

Array = npt.NDArray[Any]

MAX_TRIES = 20
"""Crops tried for enough foreground; then the fullest one found is taken."""

CACHE_BYTES = 1 << 30

_BLOCK = 32
"""Voxels per axis that the store decompresses together in 3D; only costs depend on it."""


@dataclass(frozen=True)
class Draw:
    """Where one crop of the stream lies.

    Attributes:
        entry: the scan, as the store's table lists it.
        region: one slice for each of the scan's axes.
        crop_CS: what was looked at there.
        rejected: regions drawn before it that held too little foreground.
    """

    entry: Entry
    region: Region
    crop_CS: Array
    rejected: int


class CropSampler:
    """Random crops of a set of scans, in epochs that visit each scan exactly once.

    Args:
        store: prepared scans.
        scan_keys: which to sample; their order does not matter.
        request: what each sample must be.
        seed: the study's seed.
        purpose: names the stream, for example ``"train"``.
        cache_bytes: memory for decoded scans, shared with all forked workers. As many scans are
            kept as fit; the others are read crop by crop.
        crops_per_scan: consecutive crops of the stream that each visit of a scan gives. With more
            than one, a scan that is not kept is decoded once for all of them, where that is the
            cheaper way. A batch of B crops then comes from about B / crops_per_scan scans.

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
        crops_per_scan: int = 1,
    ) -> None:
        if not scan_keys:
            raise DataError(f"there are no scans to sample for {purpose!r}.")
        self.store = store
        self.scan_keys = sorted(set(scan_keys))
        self.request = request
        self.seed = seed
        self.purpose = purpose
        self.cache_bytes = cache_bytes
        self.crops_per_scan = crops_per_scan
        for scan_key in self.scan_keys:
            request.check(store.listed(scan_key))
        self._caches: dict[int, ScanCache] = {}
        self._held: dict[tuple[str, str | None], Array] = {}
        self._choices: dict[str, Array] = {}
        self._order: tuple[int, list[int]] = (-1, [])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_caches": {}, "_held": {}}

    def reading(self, *, cache_bytes: int, crops_per_scan: int) -> CropSampler:
        """Return this sampler with other settings of reading; scans kept in memory stay kept."""
        sampler = copy.copy(self)
        sampler.cache_bytes, sampler.crops_per_scan = cache_bytes, crops_per_scan
        sampler._caches = self._caches
        sampler._held = {}
        return sampler

    @property
    def cache(self) -> ScanCache:
        """The decoded scans. Ask for it before workers are forked, so that they share it."""
        if self.cache_bytes not in self._caches:
            self._caches.clear()  # the memory of another budget is given back first
            entries = [self.store.listed(scan_key) for scan_key in self.scan_keys]
            self._caches[self.cache_bytes] = ScanCache(entries, self.request.mask, self.cache_bytes)
        return self._caches[self.cache_bytes]

    def batch(self, step: int, size: int) -> Sample:
        """Return batch number ``step`` of ``size`` crops.

        Crop number ``step * size + i`` of the stream is the same whoever asks.
        """
        request = self.request
        images = np.zeros((size, request.in_channels, *request.crop_size), np.float32)
        masks = np.zeros((size, *request.crop_size), np.int64) if request.mask else None
        keys, spacing_mm, rejected = [], [], 0
        for i in range(size):
            draw = self.draw(step * size + i, self._look)
            inside: tuple[slice, ...] = tuple(
                slice((wanted - found) // 2, (wanted - found) // 2 + found)
                for wanted, found in zip(request.crop_size, draw.crop_CS.shape[1:], strict=True)
            )
            images[i][(slice(None), *inside)] = draw.crop_CS
            if masks is not None:
                mask_S = self.read(draw.entry, draw.region, request.mask)
                masks[i][inside] = drop_slice_axis(mask_S, request.kept_axes(draw.entry))
            keys.append(draw.entry.scan_key)
            spacing_mm.append(request.spacing_of(draw.entry))
            rejected += draw.rejected
        return Sample(
            torch.from_numpy(images),
            None if masks is None else torch.from_numpy(masks),
            keys,
            rejected,
            step,
            spacing_mm=spacing_mm,
        )

    def as_dataset(self, start_step: int, stop_step: int, share: Share) -> Batches:
        """Return the micro batches that one process computes in some steps, in order.

        Use it with ``DataLoader(..., batch_size=None, num_workers=n)``.
        """
        return Batches(self.batch, start_step, stop_step, share)

    def draw(self, position: int, look: Callable[[Entry, Region], Array]) -> Draw:
        """Draw crop number ``position`` of the stream: a scan, and a region of it.

        Args:
            position: in the stream.
            look: returns what is in a region, (C, *S): voxels, or where they are foreground.
        """
        entry = self.store.listed(self._scan_key(position))
        generator = numpy_generator(self.seed, self.purpose, "crop", position)
        best_fraction = -1.0
        best: Draw | None = None
        for rejected in range(MAX_TRIES):
            region = self._draw_region(entry, generator)
            draw = Draw(entry, region, look(entry, region), rejected)
            if not self.request.min_foreground:
                return draw
            crop_CS = draw.crop_CS
            if crop_CS.dtype != np.bool_:
                crop_CS = crop_CS > np.float16(entry.foreground_threshold)
            fraction = float(crop_CS.any(axis=0).mean())
            if fraction >= self.request.min_foreground:
                return draw
            if best is None or fraction > best_fraction:
                best_fraction, best = fraction, draw
        return replace(best or draw, rejected=MAX_TRIES - 1)

    def _scan_key(self, position: int) -> str:
        visit = position // self.crops_per_scan
        epoch, index = divmod(visit, len(self.scan_keys))
        if self._order[0] != epoch:
            generator = numpy_generator(self.seed, self.purpose, "epoch", epoch)
            self._order = (epoch, generator.permutation(len(self.scan_keys)).tolist())
        return self.scan_keys[self._order[1][index]]

    def _look(self, entry: Entry, region: Region) -> Array:
        return cut_image(self.read, self.request, entry, region)

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
        if entry.scan_key not in self._choices:
            depth, k = entry.shape[axis], self.request.num_neighbours
            inner = np.arange(k, depth - k) if depth > 2 * k else np.arange(depth)
            counts = self.store.entry(entry.scan_key).foreground_counts[axis]
            area = 1
            for wanted, other in zip(
                self.request.crop_size, self.request.kept_axes(entry), strict=True
            ):
                area *= min(wanted, entry.shape[other])
            enough = inner[np.asarray(counts)[inner] >= self.request.min_foreground * area]
            chosen = enough if len(enough) else inner
            self._choices[entry.scan_key] = chosen.astype(np.int32)
        return self._choices[entry.scan_key]

    def read(self, entry: Entry, region: Region, mask: str | None = None) -> Array:
        """Return a region of an image, or of a mask, from memory or from the store."""
        whole = self.cache.get(entry.scan_key, mask, lambda: self._from_store(entry.scan_key, mask))
        if whole is None:
            whole = self._whole(entry, mask)
        if whole is not None:
            inside: Any = (..., *region)
            part: Array = whole[inside]
            return part
        return self._from_store(entry.scan_key, mask, region)

    def _from_store(self, scan_key: str, mask: str | None, region: Region | None = None) -> Array:
        if mask is None:
            return self.store.read(scan_key, region)
        return self.store.read_mask(scan_key, mask, region)

    def _whole(self, entry: Entry, mask: str | None) -> Array | None:
        """Return the scan that this visit is at, decoded whole, where its crops are worth it."""
        if self.crops_per_scan == 1 or not self._worth_decoding(entry):
            return None
        if (entry.scan_key, mask) not in self._held:
            if any(scan_key != entry.scan_key for scan_key, _ in self._held):
                self._held.clear()
            # Asked for as a region: checked as the crops are that it stands for, by its length.
            full: Region = tuple(slice(0, size) for size in entry.shape)
            self._held[entry.scan_key, mask] = self._from_store(entry.scan_key, mask, full)
        return self._held[entry.scan_key, mask]

    def _worth_decoding(self, entry: Entry) -> bool:
        kept = self.request.kept_axes(entry)
        sizes = dict(zip(kept, self.request.crop_size, strict=True))
        one_crop = every = 1
        for axis, length in enumerate(entry.shape):
            size = sizes.get(axis, 2 * self.request.num_neighbours + 1)
            blocks = -(-length // _BLOCK)
            one_crop *= min(blocks, 1 + -(-(size - 1) // _BLOCK))
            every *= blocks
        return self.crops_per_scan * one_crop >= every


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
