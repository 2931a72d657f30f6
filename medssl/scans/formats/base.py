"""What every scan format offers, and the reasons for which a file or series is rejected."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from medssl.config import Config
from medssl.errors import RejectedScan
from medssl.scans.formats import FORMATS
from medssl.scans.identity import Salt

MAX_VOXELS = 2**29  # 2 GiB as float32; a whole-body CT of 1024 x 1024 x 500 just fits
MAX_FILE_BYTES = 2**32

REASONS: dict[str, str] = {
    "analyze": "Analyze 7.5 or a NIfTI pair; left and right are not safe. Convert to .nii.gz.",
    "archive": "A zip or tar archive; its members have rows of their own. Nothing to do.",
    "archive_in_archive": "An archive inside an archive. Unpack it if it holds scans.",
    "archive_unsafe": "An archive that would grow too large, or is encrypted. Unpack it yourself.",
    "changed_while_read": "The file changed while it was read. Index again when it is at rest.",
    "colour_unsupported": "A colour image of an unusual kind. Convert it to RGB or grey.",
    "complex_unsupported": "Complex voxels. Export the magnitude.",
    "constant": "Every voxel has the same value: an empty or blanked image. Leave it out.",
    "derived": "Computed from other images (reformat, projection, map). Use the original series.",
    "dicomdir": "A table of contents; the files it names are read themselves. Nothing to do.",
    "duplicate_file": "The same image under a second name; the first one is used. Nothing to do.",
    "duplicate_position": "Two slices lie at one place. Export each time point as its own series.",
    "excluded": "The index config excludes it. Nothing to do.",
    "gantry_tilt": "The slices lean. Set index.gantry_tilt=resample to straighten them.",
    "irregular_spacing": "The gaps between slices differ. Set index.irregular_spacing=resample.",
    "label_map": "A mask, not a scan: a few whole numbers only. Name it as labels instead.",
    "localizer": "A planning image. Nothing to do.",
    "missing_slice": "A gap in an evenly spaced series. Export the series again.",
    "mixed_orientation": "One series holds slices of several orientations. Export them apart.",
    "mixed_patients": "One series names several patients: the export mixed them up. Separate them.",
    "mixed_size": "One series holds slices of several sizes or spacings. Export them apart.",
    "multi_frame_unsupported": "Several frames of a kind that is not read. Export single images.",
    "nan_voxels": "Some voxels are not finite. Replace them (for example by 0) and index again.",
    "no_access": "The file or folder may not be opened. Give read permission and index again.",
    "no_orientation": "The file does not say how it lies in the patient. Export with geometry.",
    "nonfinite_geometry": "Position, spacing or rescaling is missing, zero or not finite.",
    "not_a_scan": "Neither DICOM nor NIfTI. Nothing to do unless you meant it as a scan.",
    "not_an_image": "DICOM without an image (report, structure set, segmentation). Nothing to do.",
    "out_of_memory": "Reading it took more memory than a worker may have. Crop or split it.",
    "quarantined": "It may show who the patient is (its flags say how). See index.quarantine.",
    "reader_crashed": "Reading it ended the worker process. The file is damaged or hostile.",
    "secondary_capture": "A screenshot or a scanned page. Nothing to do.",
    "sidecar": "Describes the scan beside it, and was read with it. Nothing to do.",
    "stray_slice": "Single slices left over beside the volumes of their series. Check the export.",
    "too_large": "Larger than medssl reads. Crop or split it.",
    "too_slow": "Reading it took longer than a worker may take. The file is damaged or hostile.",
    "truncated_pixels": "The file ends before its pixels do. Copy or export it again.",
    "unreadable": "The file is damaged or not what its name says. Copy or export it again.",
    "unsupported_dimensions": "More than four dimensions. Split it into volumes.",
    "unsupported_transfer_syntax": "Compressed in a way that is not read. Export uncompressed.",
}
"""Reason codes of rejected rows, each with its meaning and remedy."""

Dims = Literal["2D", "3D", "2D+t"]


class GroupingConfig(Config):
    """What is done with series whose slices do not form an even, straight stack.

    Attributes:
        irregular_spacing: ``skip`` rejects series whose gaps differ by more than 1 %; a number
            allows so much of the mean gap; ``resample`` interpolates between the slices to an even
            stack. What was widened or resampled is flagged.
        gantry_tilt: ``skip`` rejects stacks that lean; ``resample`` straightens them.
    """

    irregular_spacing: Literal["skip", "resample"] | Annotated[float, Field(gt=0, le=0.5)] = "skip"
    gantry_tilt: Literal["skip", "resample"] = "skip"


@dataclass(frozen=True)
class Header:
    """What the index remembers of one file: plain values, no identifiers but keys.

    Attributes:
        path: relative to the indexed folder; private.
        format: name of the format, or "" when no format claims the file.
        reason: why the file cannot belong to a scan; "" when it may.
        patient_key, study_key, series_key: keys, or "" where the file names none.
        digest: of the voxels and of all that decides how they are read.
        facts: what the format needs for grouping (JSON values).
    """

    path: str
    format: str
    reason: str = ""
    patient_key: str = ""
    study_key: str = ""
    series_key: str = ""
    digest: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Files that make one row of the index.

    Attributes:
        identity: distinguishes the scan from all others of its format; hashed into the key.
        headers: in the order in which the voxels are stacked.
        reason: "" when accepted.
        shape: (X, Y), (X, Y, Z), or (X, Y, T) for a cine.
        num_channels: 3 for colour; time points or sequences of a 4D file.
        affine: (4, 4), voxel index to RAS mm, or None when unknown. The third column of a 2D scan
            or a cine is the direction across the image.
        reading: what `ScanFormat.read_voxels` must know beside the files (JSON values): which
            frames, whether to resample.
    """

    identity: str
    headers: tuple[Header, ...]
    reason: str = ""
    modality: str = ""
    dims: Dims | Literal[""] = ""
    shape: tuple[int, ...] = ()
    num_channels: int = 1
    affine: npt.NDArray[np.float64] | None = None
    intensity: Literal["HU", "arbitrary", ""] = ""
    flags: tuple[str, ...] = ()
    reading: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Volume:
    """Voxels (C, X, Y), (C, X, Y, Z) or (C, X, Y, T) float32, and the (4, 4) affine to RAS mm."""

    voxels_CXYZ: npt.NDArray[np.float32]
    affine: npt.NDArray[np.float64]


class ScanFormat(ABC):
    """One file format of scans.

    `read_header` runs in worker processes, one file at a time; `group` sees the headers of one
    series (or of one file that names none); `read_voxels` reads what `group` put together. Each
    reports a file that cannot be used by raising `RejectedScan` with a code of `REASONS`, and never
    lets a value out of a file into a message.
    """

    name: str
    read_together: tuple[str, ...] = ()
    """Endings of files that say something of each other, where they lie beside each other and have
    the same stem: when one changes or comes, the others are read again."""

    @abstractmethod
    def claims(self, path: Path, head: bytes) -> bool:
        """Say whether a file is of this format.

        Args:
            path: the file; its name may be used, its content must not be read again.
            head: its first 512 bytes.
        """

    @abstractmethod
    def read_header(self, path: Path, relative: str, salt: Salt) -> Header:
        """Read what the index needs of one file, without decoding more than necessary.

        Raises:
            RejectedScan: the file cannot belong to a scan.
        """

    @abstractmethod
    def group(self, headers: Sequence[Header], config: GroupingConfig) -> list[Group]:
        """Put readable headers together to scans; every header ends in at least one group.

        Args:
            headers: all of one series, or the one file that belongs to no series.
            config: what to do with uneven stacks.
        """

    @abstractmethod
    def read_voxels(self, paths: Sequence[Path], reading: Mapping[str, Any]) -> Volume:
        """Read one scan from its files, given in the order of its group.

        Args:
            paths: the files.
            reading: of its group.

        Raises:
            RejectedScan: the files cannot be read any more.
        """


def load_formats() -> list[ScanFormat]:
    """Return one instance of every format, in the order of their names."""
    return [FORMATS.load(name)() for name in FORMATS.names()]


def check_size(num_voxels: int) -> None:
    """Refuse a scan that would not fit into memory, before anything is allocated.

    Raises:
        RejectedScan: ``too_large``, or ``nonfinite_geometry`` when there is no voxel at all.
    """
    if num_voxels <= 0:
        raise RejectedScan("nonfinite_geometry", "the image has no voxels")
    if num_voxels > MAX_VOXELS:
        raise RejectedScan("too_large", f"at most {MAX_VOXELS} voxels are read")
