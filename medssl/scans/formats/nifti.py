"""NIfTI-1 and NIfTI-2, single files, plain or gzipped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from medssl.errors import RejectedScan
from medssl.scans.formats._nifti_geometry import Affine, affine_of
from medssl.scans.formats._nifti_header import HEADER_BYTES, Layout, byte_order, is_single_file
from medssl.scans.formats._nifti_sidecar import SUFFIX, belongs_to_image, read_sidecar
from medssl.scans.formats._nifti_stream import open_stream, read_head, unzipped_head
from medssl.scans.formats._nifti_tilt import stack_of, straightened
from medssl.scans.formats.base import (
    Group,
    GroupingConfig,
    Header,
    ScanFormat,
    Volume,
    check_size,
)
from medssl.scans.identity import Salt

_SUFFIXES = (".nii", ".nii.gz")
_PAIR_HEADERS = (".hdr", ".hdr.gz")
_PAIR_IMAGES = (".img", ".img.gz")
_EXACT = 2.0**24  # up to here float32 holds all whole numbers
_LABEL_MAP_VALUES = 8  # a scan has more different values than this


class NiftiFormat(ScanFormat):
    """NIfTI files: one 2D image, 3D volume (with channels) or cine each.

    A JSON file beside an image gives its modality and patient. Pairs of .hdr and .img, and
    Analyze 7.5, are recognised and rejected.
    """

    name = "nifti"
    # A header tells an image of a pair from any other .img.
    read_together = (SUFFIX, ".hdr", ".hdr.gz", ".img", ".img.gz", ".nii", ".nii.gz")

    def claims(self, path: Path, head: bytes) -> bool:
        """See `ScanFormat.claims`: by name, by the magic word, or by the image it belongs to."""
        name = path.name.lower()
        if name.endswith(_SUFFIXES) or is_single_file(unzipped_head(head, HEADER_BYTES)):
            return True
        if name.endswith(SUFFIX):
            return belongs_to_image(path)
        return _is_half_of_pair(path, head)

    def read_header(self, path: Path, relative: str, salt: Salt) -> Header:
        """See `ScanFormat.read_header`: the voxels are read, to see whether they are usable."""
        name = path.name.lower()
        if name.endswith(SUFFIX):
            raise RejectedScan("sidecar")
        if name.endswith((*_PAIR_HEADERS, *_PAIR_IMAGES)):
            raise RejectedScan("analyze")
        with open_stream(path) as stream:
            layout = stream.layout
            affine, flags = _placed(layout)
            digest = blake3(repr((layout.dims, layout.shape, affine.tolist())).encode())
            look = _Look()
            for values in stream.values():
                look.at(values)
                digest.update(values.data.cast("B"))
        sidecar = read_sidecar(path, salt)
        if layout.dtype.kind in "iu" and layout.scaling is None and look.largest > _EXACT:
            flags.append("beyond_float32")
        if not sidecar.readable:
            flags.append("sidecar_unreadable")
        reason = layout.reason or look.reason
        return Header(
            path=relative,
            format=self.name,
            reason=reason,
            patient_key=sidecar.patient_key,
            digest="" if reason else digest.hexdigest(),
            facts={
                "dims": layout.dims,
                "shape": list(layout.shape),
                "num_channels": layout.num_channels,
                "affine": affine.ravel().tolist(),
                "modality": sidecar.modality,
                "sidecar": sidecar.digest,
                **{
                    fact: key
                    for fact, key in (
                        ("scanner_key", sidecar.scanner_key),
                        ("site_key", sidecar.site_key),
                    )
                    if key
                },
                "flags": sorted(flags),
            },
        )

    def group(self, headers: Sequence[Header], config: GroupingConfig) -> list[Group]:
        """See `ScanFormat.group`: every file is a scan of its own."""
        return [_group(header, config) for header in headers]

    def read_voxels(self, paths: Sequence[Path], reading: Mapping[str, Any]) -> Volume:
        """See `ScanFormat.read_voxels`."""
        volume = read_grid(paths[0])
        return straightened(volume) if reading.get("straighten") else volume


def read_grid(path: Path) -> Volume:
    """Read a NIfTI file as it stands, mask or scan.

    Raises:
        RejectedScan: it cannot be read.
    """
    with open_stream(path) as stream:
        layout = stream.layout
        affine, _ = _placed(layout)
        voxels = np.empty(layout.num_values, np.float32)
        start = 0
        for values in stream.values():
            voxels[start : start + len(values)] = values
            start += len(values)
    return Volume(layout.arrange(voxels), affine)


def _group(header: Header, config: GroupingConfig) -> Group:
    facts = header.facts
    shape, affine = tuple(facts["shape"]), np.array(facts["affine"]).reshape(4, 4)
    flags, reading, reason = list(facts["flags"]), {}, ""
    try:
        stack = stack_of(affine, shape, config) if facts["dims"] == "3D" else None
        if stack is not None and stack.resampling is not None:
            shape, affine = stack.resampling.shape, stack.affine
            check_size(math.prod(shape) * facts["num_channels"])
            flags += stack.flags
            reading = {"straighten": True}
    except RejectedScan as error:
        reason = error.reason
    return Group(
        identity=header.path,
        headers=(header,),
        reason=reason,
        modality=facts["modality"],
        dims=facts["dims"],
        shape=shape,
        num_channels=facts["num_channels"],
        affine=affine,
        intensity="arbitrary",
        flags=tuple(flags),
        reading=reading,
    )


def _placed(layout: Layout) -> tuple[Affine, list[str]]:
    with np.errstate(all="ignore"):  # what is not finite is looked for, and rejected
        affine, flags = affine_of(layout.fields, 3 if layout.dims == "3D" else 2)
    return affine, [*layout.flags, *flags]


class _Look:
    """Sees all values of a scan go by, and says why they are no scan, or ""."""

    def __init__(self) -> None:
        self._finite = True
        self._low, self._high = np.inf, -np.inf
        self._few: npt.NDArray[np.float32] | None = np.empty(0, np.float32)

    def at(self, values: npt.NDArray[np.float32]) -> None:
        self._finite = self._finite and bool(np.isfinite(values).all())
        if not self._finite:
            return
        self._low = min(self._low, float(values.min()))
        self._high = max(self._high, float(values.max()))
        # A mask holds a few whole numbers that fit a byte; the first few hundred values usually
        # show that this is none.
        for part in (values[:512], values):
            if self._few is not None:
                self._few = np.union1d(self._few, part)
                if len(self._few) > _LABEL_MAP_VALUES or (self._few != np.round(self._few)).any():
                    self._few = None

    @property
    def largest(self) -> float:
        """The largest magnitude."""
        return max(abs(self._low), abs(self._high))

    @property
    def reason(self) -> str:
        if not self._finite:
            return "nan_voxels"
        if self._low == self._high:
            return "constant"
        if self._few is not None and self._low >= 0 and self._high < 256:
            return "label_map"
        return ""


def _is_half_of_pair(path: Path, head: bytes) -> bool:
    name = path.name.lower()
    if name.endswith(_PAIR_HEADERS):
        return bool(byte_order(unzipped_head(head, HEADER_BYTES)))
    if name.endswith(_PAIR_IMAGES):
        return any(byte_order(read_head(header)) for header in _pair_headers(path))
    return False


def _pair_headers(path: Path) -> tuple[Path, ...]:
    """Return where the header of an .img file would be."""
    stem = path.name[: path.name.lower().rindex(".img")]
    return tuple(path.with_name(stem + suffix) for suffix in _PAIR_HEADERS)
