"""Hostile NIfTI files: geometry, numbers, sizes, damage."""

from __future__ import annotations

import gzip
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from hostile_outcomes import Case, Rejected, Right, linear, rejected, same_as
from samples import OBLIQUE, hippocampus, linear_volume, rotation_affine

Outcome = tuple[Right | Rejected, ...]
SHAPE = (9, 8, 6)
VALUES = linear_volume(SHAPE, OBLIQUE)
NAME = "volume.nii.gz"


def write(
    folder: Path,
    voxels: npt.NDArray[Any] = VALUES,
    affine: npt.NDArray[np.float64] | None = OBLIQUE,
    *,
    name: str = NAME,
    change: Callable[[Any], object] = lambda image: None,
    kind: type[Any] = nib.Nifti1Image,
) -> Path:
    """Write one file, its header changed before."""
    image = kind(voxels, affine)
    image.header.set_xyzt_units("mm", "sec")
    change(image)
    image.to_filename(folder / name)
    return folder / name


def right(**options: Any) -> Outcome:
    return (Right(SHAPE, linear(), **options),)


def plain(**options: Any) -> Callable[[Path], Outcome]:
    return lambda folder: write(folder, **options) and right()


def refused(reasons: str, **options: Any) -> Callable[[Path], Outcome]:
    return lambda folder: write(folder, **options) and (rejected(reasons),)


def header_set(**values: Any) -> Callable[[Any], None]:
    """Return a change of header fields, geometry codes among them, made last."""

    def change(image: Any) -> None:
        for name, value in values.items():
            image.header[name] = value

    return change


def poked(
    outcome: Outcome, *pokes: tuple[int, str, Any], affine: Any = OBLIQUE, **options: Any
) -> Callable[[Path], Outcome]:
    """Return a file into whose NIfTI-1 header values are written, as no library would."""

    def build(folder: Path) -> Outcome:
        path = write(folder, affine=affine, name="volume.nii", **options)
        content = bytearray(path.read_bytes())
        for offset, form, value in pokes:
            struct.pack_into(f"<{form}", content, offset, value)
        path.write_bytes(content)
        return outcome

    return build


DIM, PIXDIM, SLOPE, INTER, OFFSET, UNITS, QCODE, SCODE = 40, 76, 112, 116, 108, 123, 252, 254


def real(folder: Path) -> Outcome:
    voxels, affine = hippocampus(3)
    write(folder, voxels, affine)
    return (Right(voxels.shape, same_as(voxels[None], affine)),)


def big_endian(folder: Path) -> Outcome:
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    nib.Nifti1Image(VALUES.astype(">i2"), OBLIQUE, header).to_filename(folder / NAME)
    if nib.load(folder / NAME).header.endianness != ">":
        raise ValueError("not written with the high byte first")
    return right()


def scaled(folder: Path) -> Outcome:
    stored = np.rint((VALUES.astype(float) + 100) / 0.5).astype(np.int16)
    path = write(folder, stored, name="volume.nii")
    content = bytearray(path.read_bytes())
    struct.pack_into("<2f", content, SLOPE, 0.5, -100.0)
    path.write_bytes(content)
    return right()


def forms(sform: int, qform: int) -> Callable[[Any], None]:
    def change(image: Any) -> None:
        image.set_qform(OBLIQUE if qform else None, qform)
        image.set_sform(OBLIQUE if sform else None, sform)

    return change


def disagreeing(folder: Path) -> Outcome:
    def change(image: Any) -> None:
        image.set_sform(OBLIQUE, 1)
        image.set_qform(rotation_affine((0, 0, 40.0)), 1)

    write(folder, change=change)
    return right(flags=frozenset({"sform_qform_differ"}))


def no_forms(image: Any) -> None:
    image.set_sform(None, 0)
    image.set_qform(None, 0)


def oriented(code: str) -> Callable[[Path], Outcome]:
    """Return the volume with its axes turned round, as files of other vendors have it."""
    turn = nib.orientations.axcodes2ornt(code)
    back = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), turn)
    base = rotation_affine((4.0, -3.0, 5.0), (0.9, 1.1, 2.5))
    voxels = nib.orientations.apply_orientation(linear_volume(SHAPE, base), back)
    affine = base @ nib.orientations.inv_ornt_aff(back, SHAPE)

    def build(folder: Path) -> Outcome:
        write(folder, voxels, affine)
        return (Right(voxels.shape, linear()),)

    return build


def in_unit(unit: str, factor: float) -> Callable[[Path], Outcome]:
    def build(folder: Path) -> Outcome:
        affine = OBLIQUE.copy()
        affine[:3] *= factor
        write(folder, affine=affine, change=lambda image: image.header.set_xyzt_units(unit, "sec"))
        return right()

    return build


SHEARED = OBLIQUE.copy()
SHEARED[:3, 0] += 0.3 * OBLIQUE[:3, 1]


def over_time(folder: Path) -> Outcome:
    points = np.stack([VALUES, VALUES * 2, VALUES * 3], axis=-1)
    write(folder, points, change=lambda image: image.header.set_zooms((0.9, 1.1, 2.5, 2.0)))
    check = same_as(np.moveaxis(points, -1, 0), OBLIQUE)
    flags = frozenset({"fourth_axis_time"})
    return (Right(SHAPE, check, num_channels=3, flags=flags),)


def channels(folder: Path) -> Outcome:
    parts = np.stack([VALUES, VALUES * 2], axis=-1)

    def change(image: Any) -> None:
        image.header.set_xyzt_units("mm", "unknown")
        image.header["pixdim"][4] = 0

    write(folder, parts, change=change)
    check = same_as(np.moveaxis(parts, -1, 0), OBLIQUE)
    flags = frozenset({"fourth_axis_channels"})
    return (Right(SHAPE, check, num_channels=2, flags=flags),)


def vectors(num_times: int) -> Callable[[Path], Outcome]:
    def build(folder: Path) -> Outcome:
        parts = np.stack([VALUES, VALUES * 2, VALUES * 3], axis=-1).astype(np.float32)
        field = np.stack([parts] * num_times, axis=3)
        write(folder, field, change=lambda image: image.header.set_intent("vector"))
        if num_times > 1:
            return (rejected("unsupported_dimensions"),)
        return (Right(SHAPE, same_as(np.moveaxis(parts, -1, 0), OBLIQUE), num_channels=3),)

    return build


def coloured(names: str) -> Callable[[Path], Outcome]:
    def build(folder: Path) -> Outcome:
        noise = np.random.default_rng(3).integers(0, 256, (*SHAPE, len(names))).astype(np.uint8)
        dtype = np.dtype([(name, "u1") for name in names])
        write(folder, np.ascontiguousarray(noise).view(dtype)[..., 0])
        check = same_as(np.moveaxis(noise[..., :3], -1, 0), OBLIQUE)
        return (Right(SHAPE, check, num_channels=3, flags=frozenset({"colour"})),)

    return build


def spoilt(value: float) -> npt.NDArray[np.float32]:
    voxels = VALUES.astype(np.float32)
    voxels[4, 4, 4] = value
    return voxels


def large_numbers(folder: Path) -> Outcome:
    write(folder, VALUES.astype(np.int32) + 2**26 + 1)
    flags = frozenset({"beyond_float32"})
    return (Right(SHAPE, linear(offset=2**26 + 1, atol=8.6), flags=flags),)


def cut(keep: float, name: str) -> Callable[[Path], Outcome]:
    def build(folder: Path) -> Outcome:
        path = write(folder, np.random.default_rng(0).normal(size=(30, 20, 10)), name=name)
        content = path.read_bytes()
        path.write_bytes(content[: int(keep * len(content))])
        return (rejected("truncated_pixels|unreadable"),)

    return build


def gzip_damaged(folder: Path) -> Outcome:
    """One wrong bit in stored blocks: only gzip's check sum at the very end tells."""
    content = write(folder, name="volume.nii").read_bytes()
    (folder / "volume.nii").unlink()
    packed = bytearray(gzip.compress(content, compresslevel=0))
    packed[-60] ^= 1
    (folder / NAME).write_bytes(packed)
    return (rejected("unreadable|truncated_pixels"),)


def gzip_bomb(folder: Path) -> Outcome:
    """A header that claims just more than is read, and a gigabyte of zeros behind it."""
    content = bytearray(write(folder, name="volume.nii").read_bytes()[:352])
    struct.pack_into("<4h", content, DIM, 3, 1024, 1024, 1024)
    (folder / "volume.nii").unlink()
    with gzip.open(folder / NAME, "wb", compresslevel=9) as file:
        file.write(content)
        for _ in range(64):
            file.write(bytes(2**24))
    return (rejected("too_large|constant"),)


def bytes_behind(folder: Path) -> Outcome:
    """A small honest volume, and 64 MiB of zeros behind its voxels."""
    content = write(folder, name="volume.nii").read_bytes()
    (folder / "volume.nii").unlink()
    with gzip.open(folder / NAME, "wb", compresslevel=1) as file:
        file.write(content)
        for _ in range(4):
            file.write(bytes(2**24))
    return (rejected("unreadable|too_large"),)


def flat(folder: Path) -> Outcome:
    write(folder, VALUES[:, :, :1])
    return (Right(SHAPE[:2], linear(), dims="2D"),)


def no_suffix(folder: Path) -> Outcome:
    write(folder, name="volume.nii").rename(folder / "volume")
    return right()


def gzip_named_nii(folder: Path) -> Outcome:
    write(folder).rename(folder / "volume.nii")
    return right()


def pair(kind: type[Any]) -> Callable[[Path], Outcome]:
    def build(folder: Path) -> Outcome:
        kind(VALUES, OBLIQUE).to_filename(folder / "volume.hdr")
        (folder / "volume.mat").unlink(missing_ok=True)
        return (rejected("analyze", 2),)

    return build


def sidecar(folder: Path) -> Outcome:
    write(folder)
    (folder / "volume.json").write_text('{"Modality": "MR", "EchoTime": 0.003}')
    return (*right(), rejected("sidecar"))


def broken_sidecar(folder: Path) -> Outcome:
    write(folder)
    (folder / "volume.json").write_text('{"Modality": ')
    return (*right(flags=frozenset({"sidecar_unreadable"})), rejected("sidecar"))


def twice(folder: Path) -> Outcome:
    shutil.copyfile(write(folder), folder / "again.nii.gz")
    return (*right(), rejected("duplicate_file"))


QFORM_ONLY: dict[str, Any] = {"change": forms(0, 1)}
LABELS = (np.median(VALUES) < VALUES).astype(np.uint8)
NIFTI_CASES = (
    Case("NIfTI, real pixels", real),
    Case("NIfTI-1, plain", plain(name="volume.nii")),
    Case("NIfTI-1, gzip", plain()),
    Case("NIfTI-2", plain(kind=nib.Nifti2Image)),
    Case("NIfTI, high byte first", big_endian),
    Case("NIfTI scaled", scaled),
    Case("scl_slope 0", poked(right(), (SLOPE, "f", 0.0), (INTER, "f", 7.0))),
    Case(
        "scl_slope NaN",
        poked((rejected("nonfinite_geometry"),), (SLOPE, "f", np.nan), (INTER, "f", np.nan)),
    ),
    Case(
        "scl_inter NaN",
        poked(
            (rejected("nonfinite_geometry|unreadable"),), (SLOPE, "f", 2.0), (INTER, "f", np.nan)
        ),
    ),
    Case(
        "scl_slope infinite",
        poked(
            (rejected("nonfinite_geometry|unreadable|nan_voxels"),),
            (SLOPE, "f", np.inf),
            (INTER, "f", 0.0),
        ),
    ),
    Case("qform only", plain(change=forms(0, 1))),
    Case("sform only", plain(change=forms(2, 0))),
    Case("qform and sform disagree", disagreeing),
    Case("neither qform nor sform", refused("no_orientation", change=no_forms)),
    *(Case(f"axes {code}", oriented(code)) for code in ("LAS", "LPS", "PIR", "ASL")),
    Case("sheared", refused("gantry_tilt|nonfinite_geometry", affine=SHEARED)),
    Case(
        "pixdim 0", poked((rejected("nonfinite_geometry"),), (PIXDIM + 12, "f", 0.0), **QFORM_ONLY)
    ),
    Case(
        "pixdim below 0",
        poked((rejected("nonfinite_geometry|unreadable"),), (PIXDIM + 12, "f", -2.5), **QFORM_ONLY),
    ),
    Case("sform NaN", poked((rejected("nonfinite_geometry"),), (280, "f", np.nan))),
    Case(
        "sform with a zero axis",
        poked((rejected("nonfinite_geometry"),), (288, "f", 0.0), (304, "f", 0.0), (320, "f", 0.0)),
    ),
    Case("microns", in_unit("micron", 1000.0)),
    Case("metres", in_unit("meter", 0.001)),
    Case("4D in time", over_time),
    Case("4D of channels", channels),
    Case("vectors on a fifth axis", vectors(1)),
    Case("vectors over time", vectors(2)),
    Case("NIfTI in RGB", coloured("RGB")),
    Case("NIfTI in RGBA", coloured("RGBA")),
    Case("complex", refused("complex_unsupported", voxels=VALUES * np.complex64(1 + 1j))),
    Case("one NaN", refused("nan_voxels", voxels=spoilt(np.nan))),
    Case("one infinity", refused("nan_voxels", voxels=spoilt(-np.inf))),
    Case("one value", refused("constant", voxels=np.full(SHAPE, 7, np.int16))),
    Case("a mask", refused("label_map", voxels=LABELS)),
    Case("whole numbers beyond float32", large_numbers),
    Case("NIfTI cut short", cut(0.8, "volume.nii")),
    Case("gzip cut short", cut(0.8, NAME)),
    Case("gzip of 100 bytes", cut(0.002, NAME)),
    Case("gzip with one wrong bit", gzip_damaged),
    Case("gzip bomb of 1 GiB", gzip_bomb),
    Case("64 MiB behind the voxels", bytes_behind),
    Case(
        "30000³ voxels",
        poked(
            (rejected("too_large"),),
            (DIM + 2, "h", 30000),
            (DIM + 4, "h", 30000),
            (DIM + 6, "h", 30000),
        ),
    ),
    Case("more slices than there are", poked((rejected("truncated_pixels"),), (DIM + 6, "h", 60))),
    Case("dim[0] is 0", poked((rejected("unreadable"),), (DIM, "h", 0))),
    Case("a size below 0", poked((rejected("unreadable"),), (DIM + 4, "h", -8))),
    Case(
        "voxels far behind the end",
        poked((rejected("too_large|truncated_pixels|unreadable"),), (OFFSET, "f", 1e9)),
    ),
    Case("one slice", flat),
    Case("NIfTI without suffix", no_suffix),
    Case("gzip named .nii", gzip_named_nii),
    Case("Analyze pair", pair(nib.AnalyzeImage)),
    Case("NIfTI pair", pair(nib.Nifti1Pair)),
    Case("a sidecar", sidecar),
    Case("a broken sidecar", broken_sidecar),
    Case("one NIfTI twice", twice),
)
