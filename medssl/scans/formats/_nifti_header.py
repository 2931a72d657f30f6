"""What a NIfTI header says of the voxels: type, axes, scaling, and where they begin.

Source: https://nifti.nimh.nih.gov/pub/dist/src/niftilib/nifti1.h and nifti2.h.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header

from medssl.errors import RejectedScan
from medssl.scans.formats.base import Dims, check_size

HEADER_BYTES = 540  # of NIfTI-2; NIfTI-1 takes 348
_V1: np.dtype[Any] = Nifti1Header.template_dtype
_V2: np.dtype[Any] = Nifti2Header.template_dtype
_MAX_OFFSET_BYTES = 2**24  # header extensions before the voxels; real ones take kilobytes
_GREY = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8",
    1280: "u8",
}  # fmt: skip
_COLOUR = {128: 3, 2304: 4}  # samples a voxel, of one byte each
_COMPLEX = (32, 1792, 2048)
_FLOAT128 = 1536
_LABEL_INTENTS = (1002, 1003)  # label, neuroname
# Statistics; matrices, displacements, points, triangles, quaternions.
_COMPUTED_INTENTS = (*range(2, 25), 1001, 1004, 1005, 1006, 1008, 1009, 1010)
_TIME_UNITS = (8, 16, 24)  # s, ms, µs; other codes are frequencies and shifts


@dataclass(frozen=True)
class Layout:
    """How the voxels lie in the file, and what a scan of them looks like.

    Attributes:
        fields: the header, one field a name.
        offset: bytes before the voxels.
        dtype: of one sample, in the file's byte order.
        samples: a voxel in the file: 1 grey, 3 RGB, 4 RGBA.
        scaling: (slope, intercept) to apply, or None.
        dims: of the scan.
        shape: (X, Y), (X, Y, Z) or (X, Y, T).
        num_channels: colours, time points or sequences.
        flags: what a reader should know.
        reason: why the content is no scan although it can be read, or "".
    """

    fields: Any
    offset: int
    dtype: np.dtype[Any]
    samples: int
    scaling: tuple[float, float] | None
    dims: Dims
    shape: tuple[int, ...]
    num_channels: int
    flags: tuple[str, ...]
    reason: str

    @property
    def colour(self) -> bool:
        """Whether a voxel holds several colours side by side."""
        return self.samples > 1

    @property
    def num_values(self) -> int:
        """How many numbers the scan holds, all channels counted."""
        return math.prod(self.shape) * self.num_channels

    @property
    def num_bytes(self) -> int:
        """Bytes that the voxels take in the file, uncompressed."""
        samples = self.samples if self.colour else self.num_channels
        return math.prod(self.shape) * samples * self.dtype.itemsize

    def arrange(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Give the numbers of the file, in their order, the axes (C, X, Y[, Z or T]); no copy."""
        if self.colour:
            return values.reshape((self.num_channels, *self.shape), order="F")
        return np.moveaxis(values.reshape((*self.shape, self.num_channels), order="F"), -1, 0)


def byte_order(head: bytes) -> Literal["<", ">", ""]:
    """Return ``"<"`` or ``">"`` for what starts like NIfTI or Analyze 7.5, else ""."""
    sizes = (_V1.itemsize, _V2.itemsize)
    if int.from_bytes(head[:4], "little") in sizes:
        return "<"
    return ">" if int.from_bytes(head[:4], "big") in sizes else ""


def is_single_file(head: bytes) -> bool:
    """Say whether bytes hold the magic word of a NIfTI file whose voxels follow its header."""
    return bool(byte_order(head)) and (head[344:348] == b"n+1\x00" or head[4:8] == b"n+2\x00")


def read_layout(head: bytes) -> Layout:
    """Understand the first 540 bytes of a file.

    Raises:
        RejectedScan: they are no NIfTI header, contradict themselves, or describe what is not read.
    """
    fields, version = _fields(head)
    dtype, samples, flags = _kind(fields, head)
    dims, shape, channels = _axes(fields, flags, colour=samples > 1)
    intent = int(fields["intent_code"])
    reason = ""
    if intent in _LABEL_INTENTS:
        flags.append("label_intent")
        reason = "label_map"
    elif intent in _COMPUTED_INTENTS:
        reason = "derived"
    layout = Layout(
        fields=fields,
        offset=_offset(fields, (_V1 if version == 1 else _V2).itemsize + 4),
        dtype=dtype,
        samples=samples,
        scaling=None if samples > 1 else _scaling(fields),
        dims=dims,
        shape=shape,
        num_channels=min(samples, 3) if samples > 1 else channels,
        flags=tuple(flags),
        reason=reason,
    )
    check_size(layout.num_values)
    return layout


def _fields(head: bytes) -> tuple[Any, int]:
    order = byte_order(head)
    size = int.from_bytes(head[:4], "little" if order == "<" else "big")
    if not order or len(head) < size:
        raise RejectedScan("unreadable", "no NIfTI header")
    version, fields_dtype = (1, _V1) if size == _V1.itemsize else (2, _V2)
    fields = np.frombuffer(head[:size], fields_dtype.newbyteorder(order))[0]
    magic = bytes(fields["magic"])
    if magic == f"n+{version}".encode():
        ends = b"" if version == 1 else head[8:12]
        if ends not in (b"", b"\r\n\x1a\n", bytes(4)):
            raise RejectedScan("unreadable", "line ends were changed: it was copied as text")
        return fields, version
    if version == 1 or magic == b"ni2":
        raise RejectedScan("analyze", "the magic word is not that of a single file")
    raise RejectedScan("unreadable", "no NIfTI header")


def _kind(fields: Any, head: bytes) -> tuple[np.dtype[Any], int, list[str]]:
    """Return the type of a sample, samples a voxel, and flags."""
    code = int(fields["datatype"])
    if code in _COMPLEX:
        raise RejectedScan("complex_unsupported")
    if code == _FLOAT128:
        raise RejectedScan("unreadable", "128-bit floats have no portable form; save as float32")
    flags: list[str] = []
    if code in _COLOUR:
        dtype, samples = np.dtype("u1"), _COLOUR[code]
        flags = ["colour"] if samples == 3 else ["alpha_dropped", "colour"]
    elif code in _GREY:
        dtype, samples = np.dtype(byte_order(head) + _GREY[code]), 1
    else:
        raise RejectedScan("unreadable", f"voxel type {code} is unknown")
    if int(fields["bitpix"]) != 8 * dtype.itemsize * samples:
        raise RejectedScan("unreadable", "the voxels' type and their size contradict each other")
    return dtype, samples, flags


def _axes(fields: Any, flags: list[str], *, colour: bool) -> tuple[Dims, tuple[int, ...], int]:
    """Return what the axes of the file mean: dims, shape, channels; append flags."""
    dim = [int(size) for size in fields["dim"]]
    if not 1 <= dim[0] <= 7 or min(dim[1 : dim[0] + 1]) < 1:
        raise RejectedScan("unreadable", "the dimensions in the header are invalid")
    x, y, z, fourth, fifth, sixth, seventh = (*dim[1 : dim[0] + 1], *[1] * (7 - dim[0]))
    check_size(x * y * z * fourth * fifth * sixth * seventh)
    if dim[0] < 2:
        raise RejectedScan("nonfinite_geometry", "fewer than two dimensions")
    beyond = sum(size > 1 for size in (fourth, fifth, sixth, seventh))
    if sixth * seventh > 1 or (z > 1 and beyond > 1) or (x == y == z == 1 and beyond):
        raise RejectedScan("unsupported_dimensions", "more axes than a volume and its channels")
    timed = _is_time(fields)
    cine = z == 1 and fourth > 1
    channels = fifth if cine else fourth * fifth
    if colour and channels > 1:
        raise RejectedScan("unsupported_dimensions", "several volumes in colour")
    if cine:
        flags.append("fourth_axis_time" if timed else "fourth_axis_assumed_time")
        return "2D+t", (x, y, fourth), channels
    if fourth > 1:
        flags.append("fourth_axis_time" if timed else "fourth_axis_channels")
    elif fifth > 1:
        flags.append("fourth_axis_channels")
    return ("2D", (x, y), channels) if z == 1 else ("3D", (x, y, z), channels)


def _is_time(fields: Any) -> bool:
    step = float(fields["pixdim"][4])
    return math.isfinite(step) and step > 0 and (int(fields["xyzt_units"]) & 0x38) in _TIME_UNITS


def _offset(fields: Any, smallest: int) -> int:
    offset = float(fields["vox_offset"])
    if offset == 0:
        return smallest  # writers that leave it out mean: right after the header
    if not math.isfinite(offset) or offset < smallest or offset != int(offset):
        raise RejectedScan("unreadable", "the voxels' place in the file is invalid")
    if offset > _MAX_OFFSET_BYTES:
        raise RejectedScan("too_large", "the header extensions are too large")
    return int(offset)


def _scaling(fields: Any) -> tuple[float, float] | None:
    slope, intercept = float(fields["scl_slope"]), float(fields["scl_inter"])
    if slope == 0:
        return None  # the standard: 0 means that values are stored as they are
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        raise RejectedScan("nonfinite_geometry", "the scaling of the values is not finite")
    return None if (slope, intercept) == (1.0, 0.0) else (slope, intercept)
