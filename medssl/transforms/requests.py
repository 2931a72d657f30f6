"""What a task asks of the sampler: the size, plane, channels and quality of each sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from medssl.errors import ConfigError, DataError
from medssl.scans.store import Entry

Plane = Literal["sagittal", "coronal", "axial"]

Isotropy = Literal["none", "in_plane", "all"]

AXES = ("X", "Y", "Z")
ACROSS = {"sagittal": 0, "coronal": 1, "axial": 2}
"""The RAS voxel axis that a plane's slices are stacked along."""

_ISOTROPY: tuple[Isotropy, ...] = ("none", "in_plane", "all")

ISOTROPY_TOLERANCE = 0.01
"""Relative difference of voxel spacings up to which a turn by 90 degrees keeps the shape."""


@dataclass(frozen=True)
class SampleRequest:
    """What a task needs of each sample.

    Attributes:
        spatial_dims: 2 for slices, 3 for volumes.
        crop_size: voxels along each spatial axis, in RAS order.
        plane: of 2D slices from 3D scans: sagittal is cut across X and has axes (Y, Z), coronal
            across Y with (X, Z), axial across Z with (X, Y).
        num_neighbours: slices on each side that come as further channels (2D).
        repeat_slices: where a scan has too few slices, repeat the last one; otherwise refuse it.
        num_sequences: co-registered sequences, one channel each.
        isotropic: which voxel spacings of the crop must be equal (within 1 %): ``none``, those of
            the first two axes (``in_plane``), or ``all``.
        min_foreground: part of the crop, inside the scan, that must be foreground.
        allow_padding: pad scans smaller than the crop with zeros; otherwise refuse them.
        mask: name of the mask to deliver with the image.
    """

    spatial_dims: int
    crop_size: tuple[int, ...]
    plane: Plane | None = None
    num_neighbours: int = 0
    repeat_slices: bool = True
    num_sequences: int = 1
    isotropic: Isotropy = "none"
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
            repeat_slices=self.repeat_slices and other.repeat_slices,
            num_sequences=max(self.num_sequences, other.num_sequences),
            isotropic=max(self.isotropic, other.isotropic, key=_ISOTROPY.index),
            min_foreground=max(self.min_foreground, other.min_foreground),
            allow_padding=self.allow_padding and other.allow_padding,
            mask=self.mask or other.mask,
        )

    def check(self, entry: Entry, *, whole: bool = False) -> None:
        """Refuse a scan that cannot answer this request.

        Args:
            entry: the scan.
            whole: the scan is read whole, so its size does not matter.

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
        self._check_neighbours(entry, kept)
        sizes = [entry.shape[axis] for axis in kept]
        if not (self.allow_padding or whole) and any(
            found < wanted for found, wanted in zip(sizes, self.crop_size, strict=True)
        ):
            raise DataError(
                f"{scan} has {_times(sizes)} voxels, the task needs {_times(self.crop_size)} "
                "without padding. Make the crop smaller, or the voxels finer "
                "(preprocessing.spacing_mm)."
            )
        spacing = list(self.spacing_of(entry))
        if self.isotropic == "in_plane":
            spacing = spacing[:2]
        if self.isotropic != "none" and max(spacing) > min(spacing) * (1 + ISOTROPY_TOLERANCE):
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

    def _check_neighbours(self, entry: Entry, kept: tuple[int, ...]) -> None:
        if not self.num_neighbours:
            return
        across = [entry.shape[axis] for axis in range(len(entry.shape)) if axis not in kept]
        if not across:
            raise DataError(
                f"scan {entry.scan_key} is 2D and has no neighbouring slices, the task needs "
                f"{self.num_neighbours} on each side. Leave 2D scans out (select.dims)."
            )
        wanted = 2 * self.num_neighbours + 1
        if not self.repeat_slices and across[0] < wanted:
            raise DataError(
                f"scan {entry.scan_key} has {across[0]} slices, the task needs {wanted} different "
                "ones. Ask for fewer neighbours (pretext.step), or leave such scans out."
            )

    def spacing_of(self, entry: Entry) -> tuple[float, ...]:
        """Return the voxel spacing of crops of a scan, in mm along their axes."""
        return tuple(entry.spacing_mm[axis] for axis in self.kept_axes(entry))

    def kept_axes(self, entry: Entry) -> tuple[int, ...]:
        """Return which of a scan's spatial axes the crop keeps.

        Raises:
            DataError: 3D crops of a 2D scan, or slices of a 3D scan without a plane.
        """
        scan_dims = len(entry.shape)
        if entry.dims == "2D+t":
            if self.spatial_dims == 2 and self.plane == "axial":
                return (0, 1)  # a frame of a cine takes the place of a slice
            raise DataError(
                f"scan {entry.scan_key} is a cine (2D+t); of it a task can take 2D frames: give "
                "two crop sizes and plane: axial, or leave cines out (select.dims)."
            )
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


def _times(sizes: Sequence[int]) -> str:
    return " x ".join(str(size) for size in sizes)
