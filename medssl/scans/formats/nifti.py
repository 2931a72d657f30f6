"""NIfTI-1 and NIfTI-2, single files, plain or gzipped, by nibabel."""

from __future__ import annotations

import gzip
import hashlib
import logging
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from medssl.errors import RejectedScan
from medssl.scans.formats.base import Group, GroupingConfig, Header, ScanFormat, Volume, check_size
from medssl.scans.geometry import shear_of
from medssl.scans.identity import Salt

_SUFFIXES = (".nii", ".nii.gz")
_MAX_OFFSET_BYTES = 2**24  # header extensions before the voxels; real ones take kilobytes
_MAX_SHEAR = 1e-3  # cosine between two axes
_AFFINE_TOLERANCE_MM = 1e-2
_LABEL_INTENT = 1002
_LABEL_MAP_VALUES = 8  # a scan has more different values than this
_MM_PER_UNIT = {"meter": 1000.0, "micron": 0.001}


class NiftiFormat(ScanFormat):
    """NIfTI files: one 2D image or 3D volume each."""

    name = "nifti"

    def claims(self, path: Path, head: bytes) -> bool:
        """See `ScanFormat.claims`: by name, or by the magic word of an uncompressed file."""
        return path.name.lower().endswith(_SUFFIXES) or head[344:348] == b"n+1\x00"

    def read_header(self, path: Path, relative: str, salt: Salt) -> Header:
        """See `ScanFormat.read_header`: the voxels are read, to see whether they are usable."""
        with _quiet():
            volume, flags = _read(path)
            reason = "label_map" if "label_intent" in flags else _unusable(volume.voxels_CXYZ)
        digest = hashlib.sha256(
            repr((volume.voxels_CXYZ.shape[1:], volume.affine.tolist())).encode()
        )
        digest.update(np.ascontiguousarray(volume.voxels_CXYZ).data)
        return Header(
            path=relative,
            format=self.name,
            reason=reason,
            digest="" if reason else digest.hexdigest(),
            facts={
                "shape": list(volume.voxels_CXYZ.shape[1:]),
                "affine": volume.affine.ravel().tolist(),
                "flags": flags,
            },
        )

    def group(self, headers: Sequence[Header], config: GroupingConfig) -> list[Group]:
        """See `ScanFormat.group`: every file is a scan of its own."""
        return [
            Group(
                identity=header.path,
                headers=(header,),
                modality="",
                dims="2D" if len(header.facts["shape"]) == 2 else "3D",
                shape=tuple(header.facts["shape"]),
                affine=np.array(header.facts["affine"]).reshape(4, 4),
                intensity="arbitrary",
                flags=tuple(header.facts["flags"]),
            )
            for header in headers
        ]

    def read_voxels(self, paths: Sequence[Path], reading: Mapping[str, Any]) -> Volume:
        """See `ScanFormat.read_voxels`."""
        with _quiet():
            return _read(paths[0])[0]


def read_grid(path: Path) -> Volume:
    """Read a NIfTI file as it stands, mask or scan.

    Raises:
        RejectedScan: it cannot be read.
    """
    with _quiet():
        return _read(path)[0]


def _read(path: Path) -> tuple[Volume, list[str]]:
    shape = _shape_in_file(path)
    try:
        image: Any = nib.load(path)
        header = image.header
        flags: list[str] = []
        affine = _affine(image, flags)
        if int(header["intent_code"]) == _LABEL_INTENT:
            flags.append("label_intent")
        dtype = image.get_data_dtype()
        if dtype.kind == "c":
            raise RejectedScan("complex_unsupported")
        if dtype.names:
            raise RejectedScan("colour_unsupported")
        voxels = np.asarray(image.dataobj, dtype=np.float32)
    except RejectedScan:
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile, OSError, ValueError) as error:
        # nibabel reports missing bytes as OSError "Expected … bytes, got …".
        short = isinstance(error, EOFError) or "xpected" in str(error)
        raise RejectedScan("truncated_pixels" if short else "unreadable") from None
    except Exception:  # noqa: BLE001  (a damaged file can fail in any way)
        raise RejectedScan("unreadable") from None
    return Volume(voxels.reshape(1, *shape), affine), flags


def _shape_in_file(path: Path) -> tuple[int, ...]:
    """Read the dimensions from the first bytes, and refuse what would be too large to load.

    Source: https://nifti.nimh.nih.gov/pub/dist/src/niftilib/nifti1.h and nifti2.h.
    """
    zipped = path.name.lower().endswith(".gz")
    try:
        with gzip.open(path) if zipped else path.open("rb") as file:
            head = file.read(540)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise RejectedScan("unreadable", "not a gzip file") from None
    for size, dim_at, dim_type, offset_at, offset_type in (
        (348, 40, "8h", 108, "f"),
        (540, 16, "8q", 168, "q"),
    ):
        for order in "<>":
            if len(head) >= size and struct.unpack_from(order + "i", head)[0] == size:
                dims = struct.unpack_from(order + dim_type, head, dim_at)
                offset = struct.unpack_from(order + offset_type, head, offset_at)[0]
                return _checked_shape(dims, float(offset))
    raise RejectedScan("unreadable", "no NIfTI header")


def _checked_shape(dims: tuple[int, ...], offset: float) -> tuple[int, ...]:
    if not 1 <= dims[0] <= 7 or min(dims[1 : dims[0] + 1]) < 1:
        raise RejectedScan("unreadable", "the dimensions in the header are invalid")
    if not 0 <= offset <= _MAX_OFFSET_BYTES:
        raise RejectedScan("too_large", "the header extensions are too large")
    shape = list(dims[1 : dims[0] + 1])
    num_voxels = 1
    for size in shape:
        num_voxels *= size
    check_size(num_voxels)
    while len(shape) > 2 and shape[-1] == 1:
        shape.pop()
    if len(shape) > 3:
        raise RejectedScan("multi_frame_unsupported", f"{len(shape)} dimensions")
    if len(shape) < 2:
        raise RejectedScan("nonfinite_geometry", "fewer than two dimensions")
    return tuple(shape)


def _affine(image: Any, flags: list[str]) -> npt.NDArray[np.float64]:
    header = image.header
    if int(header["sform_code"]) <= 0 and int(header["qform_code"]) <= 0:
        raise RejectedScan("no_orientation", "neither sform nor qform is set")
    affine = np.array(image.affine, dtype=np.float64)
    if int(header["sform_code"]) > 0 and int(header["qform_code"]) > 0:
        other = image.get_qform()
        if other is None or not np.allclose(affine, other, atol=_AFFINE_TOLERANCE_MM):
            flags.append("sform_qform_differ")
    unit = header.get_xyzt_units()[0]
    affine[:3] *= _MM_PER_UNIT.get(unit, 1.0)
    matrix = affine[:3, :3]
    lengths = np.linalg.norm(matrix, axis=0)
    if not np.isfinite(affine).all() or lengths.min() <= 0 or not np.isfinite(lengths).all():
        raise RejectedScan("nonfinite_geometry", "the affine is not finite or has a zero axis")
    if shear_of(affine) > _MAX_SHEAR:
        raise RejectedScan("gantry_tilt", f"two axes have a cosine of {shear_of(affine):.4f}")
    return affine


def _unusable(voxels: npt.NDArray[np.float32]) -> str:
    """Return why these voxels are no scan, or ""."""
    if not np.isfinite(voxels).all():
        return "nan_voxels"
    low, high = float(voxels.min()), float(voxels.max())
    if low == high:
        return "constant"
    if low >= 0 and high < 256:
        values = np.unique(voxels)
        if len(values) <= _LABEL_MAP_VALUES and (values == np.round(values)).all():
            return "label_map"
    return ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep nibabel's warnings, which may hold text from the file, from getting out."""
    logger = logging.getLogger("nibabel.global")
    was = logger.disabled
    try:
        logger.disabled = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = was
