"""Hostile DICOM series: how slices lie, and which of them belong together."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from hostile_outcomes import Case, Right, linear, rejected, same_as
from hostile_series import (
    NUM,
    SHAPE,
    Outcome,
    copy_of,
    edit,
    patch,
    series,
    set_to,
    simple_itk_volume,
    whole,
)
from samples import (
    OBLIQUE,
    UID_ROOT,
    hippocampus,
    real_data,
    rotation_affine,
    write_dicom_series,
)


def random_names(folder: Path) -> Outcome:
    for number, path in enumerate(series(folder)):
        path.rename(folder / f"{(number * 7919) % 99991:X}")
    return (whole(),)


def real_mr(folder: Path) -> Outcome:
    voxels, affine = hippocampus()
    slope = float(voxels.max()) / 2**14 or 1.0
    stored = np.rint(voxels / slope)
    write_dicom_series(stored, affine, folder)
    return (Right(voxels.shape, same_as(stored[None], affine)),)


def real_sagittal(folder: Path) -> Outcome:
    files = sorted(real_data("dicom", "sag_mprage").glob("*.dcm"))[60:80]
    for number, path in enumerate(files):
        shutil.copyfile(path, folder / f"IM{(number * 7) % 20:04d}")
    voxels, affine = simple_itk_volume(files)
    return (Right((256, 256, 20), same_as(voxels[None], affine)),)


def without(position: int) -> Callable[[Path], Outcome]:
    def build(folder: Path) -> Outcome:
        series(folder)[position].unlink()
        if position == -1:
            return (whole((*SHAPE[:2], NUM - 1)),)
        return (rejected("missing_slice", NUM - 1),)

    return build


def missing_but_resampled(folder: Path) -> Outcome:
    series(folder)[2].unlink()
    flags = frozenset({"missing_slice_resampled"})
    return (Right(SHAPE, linear(atol=1.2), flags=flags),)


def duplicate_position(folder: Path) -> Outcome:
    other = np.full((SHAPE[1], SHAPE[0]), 77, np.int16).tobytes()
    copy_of(series(folder)[2], "again.dcm", set_to(PixelData=other))
    return (rejected("duplicate_position", NUM + 1),)


def duplicate_file(folder: Path) -> Outcome:
    shutil.copyfile(series(folder)[2], folder / "zz copy.dcm")
    return (whole(), rejected("duplicate_file"))


LEANING = OBLIQUE.copy()
LEANING[:3, 2] += LEANING[:3, 1] / np.linalg.norm(LEANING[:3, 1]) * 2.5 * np.tan(np.radians(15))


def leaning(resample: bool) -> Callable[[Path], Outcome]:
    def build(folder: Path) -> Outcome:
        series(folder, affine=LEANING, modality="CT")
        if resample:
            check = linear(atol=1.2, inside=(LEANING, SHAPE))
            return (Right((0, 0, 0), check, flags=frozenset({"gantry_tilt_resampled"})),)
        return (rejected("gantry_tilt", NUM),)

    return build


def uneven(gaps_mm: Sequence[float], folder: Path) -> npt.NDArray[np.float64]:
    """Write slices at uneven distances, each with the values of its place; return the affine."""
    affine = rotation_affine((10.0, 5.0, -20.0), (0.9, 1.1, 1.0))
    for number, place in enumerate(np.cumsum([0.0, *gaps_mm])):
        at = affine.copy()
        at[:3, 3] += place * affine[:3, 2]
        one = series(folder / "parts" / str(number), (9, 8, 1), at)[0]
        uid = f"{UID_ROOT}.9.{number}"
        edit(one, set_to(SOPInstanceUID=uid, InstanceNumber=number + 1))
        one.rename(folder / f"{number}.dcm")
    shutil.rmtree(folder / "parts")
    return affine


def irregular(setting: str | float) -> Callable[[Path], Outcome]:
    gaps = (2.0, 2.3, 1.8, 2.1, 1.9, 2.2) if setting == 0.2 else (2.0, 2.0, 3.1, 2.0, 2.6, 2.0)

    def build(folder: Path) -> Outcome:
        affine = uneven(gaps, folder)
        if setting == "skip":
            return (rejected("irregular_spacing", len(gaps) + 1),)
        if setting == "resample":
            ends = affine.copy()
            ends[:3, 2] *= sum(gaps)
            flags = frozenset({"irregular_spacing_resampled"})
            check = linear(atol=1.2, inside=(ends, (9, 8, 2)))
            return (Right((9, 8, 0), check, flags=flags),)
        # Widened: each slice is taken to lie at most 0.2 of the mean gap from its place.
        flags = frozenset({"irregular_spacing_allowed"})
        check = linear(atol=0.2 * 2.05 * 14 + 0.6)
        return (Right((9, 8, len(gaps) + 1), check, flags=flags),)

    return build


def two_series(folder: Path) -> Outcome:
    for number in (1, 2):
        affine = rotation_affine((0, 0, 30.0 * number), (1, 1, 2.0 + number))
        parts = series(folder / str(number), affine=affine, number=number)
        for path in parts:
            path.rename(folder / f"{number}-{path.name}")
    return (whole(), whole())


def across_folders(folder: Path) -> Outcome:
    for number, path in enumerate(series(folder)):
        part = folder / f"disc {number % 3}"
        part.mkdir(exist_ok=True)
        path.rename(part / path.name)
    return (whole(),)


def other_orientation(folder: Path) -> Outcome:
    stranger = copy_of(
        series(folder)[2], "zz.dcm", set_to(ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    )
    edit(stranger, set_to(ImagePositionPatient=[5.0, 6.0, 7.0]))
    return (rejected("mixed_orientation", NUM + 1),)


def localizer(folder: Path) -> Outcome:
    copy_of(
        series(folder, modality="CT")[2],
        "zz.dcm",
        set_to(
            ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"],
            ImageOrientationPatient=[0, 1, 0, 0, 0, -1],
        ),
    )
    return (whole(), rejected("localizer"))


def mixed_size(folder: Path) -> Outcome:
    smaller = np.zeros((6, 9), np.int16).tobytes()
    edit(series(folder)[3], set_to(Rows=6, PixelData=smaller))
    return (rejected("mixed_size", NUM),)


def edited(reason: str, which: slice = slice(None), **values: Any) -> Callable[[Path], Outcome]:
    """Return a series of which some slices are edited; the rest has a gap."""

    def build(folder: Path) -> Outcome:
        paths = series(folder, modality="CT")
        edit(paths[which], set_to(**values))
        return bad_slices(reason, paths, which)

    return build


def bad_slices(reason: str, paths: Sequence[Path], which: slice) -> Outcome:
    """Return what becomes of a series some of whose slices are rejected by themselves."""
    bad = len(paths[which])
    if bad == len(paths):
        return (rejected(reason, bad),)
    return (rejected(reason, bad), rejected("missing_slice", len(paths) - bad))


def patched(old: str, new: str, which: slice = slice(None)) -> Callable[[Path], Outcome]:
    """Return a series with impossible numbers: what stands for ``old`` becomes ``new``."""

    def build(folder: Path) -> Outcome:
        values = {"RescaleSlope": "1.234567", "PixelSpacing": ["9.876543", "1.0"]}
        values["ImagePositionPatient"] = ["5.432109", "0.0", "0.0"]
        keyword = {"s": "RescaleSlope", "p": "PixelSpacing", "o": "ImagePositionPatient"}[old]
        paths = series(folder, modality="CT")
        edit(paths[which], set_to(**{keyword: values[keyword]}))
        mark = {"s": b"1.234567", "p": b"9.876543", "o": b"5.432109"}[old]
        patch(paths[which], mark, new.ljust(len(mark)).encode())
        return bad_slices("nonfinite_geometry", paths, which)

    return build


def turned(affine: npt.NDArray[np.float64]) -> Callable[[Path], Outcome]:
    def build(folder: Path) -> Outcome:
        series(folder, affine=affine)
        return (whole(),)

    return build


def two_decimals(folder: Path) -> Outcome:
    def change(dataset: Dataset) -> None:
        place = [f"{float(value):.2f}" for value in dataset.ImagePositionPatient]
        dataset.ImagePositionPatient = place

    edit(series(folder, affine=rotation_affine((12, -8, 25), (0.7, 0.7, 1.237))), change)
    return (Right(SHAPE, linear(atol=0.8)),)


def noisy_cosines(folder: Path) -> Outcome:
    noise = np.random.default_rng(3)

    def change(dataset: Dataset) -> None:
        cosines = np.array(dataset.ImageOrientationPatient, float) + noise.normal(0, 5e-6, 6)
        dataset.ImageOrientationPatient = [f"{value:.7f}" for value in cosines]

    edit(series(folder), change)
    return (Right(SHAPE, linear(atol=0.7)),)


def single_slice(folder: Path) -> Outcome:
    series(folder, (9, 8, 1))
    return (Right((9, 8), linear(), dims="2D"),)


def between_each_other(folder: Path) -> Outcome:
    """Magnitude and phase, half a gap apart."""
    half = OBLIQUE.copy()
    half[:3, 3] += half[:3, 2] / 2
    edit(series(folder / "m"), set_to(ImageType=["ORIGINAL", "PRIMARY", "M"]))
    edit(series(folder / "p", affine=half), set_to(ImageType=["ORIGINAL", "PRIMARY", "P"]))
    return (whole(), whole())


def blank_ends(folder: Path) -> Outcome:
    """Two time points whose last slices are both blank."""

    def change(time: int) -> Callable[[Dataset], None]:
        def multiplied(dataset: Dataset) -> None:
            values = np.frombuffer(dataset.PixelData, np.int16) * time
            set_to(TemporalPositionIdentifier=time, PixelData=values.tobytes())(dataset)

        return multiplied

    for time in (1, 2):
        paths = series(folder / str(time))
        edit(paths, change(time))
        edit(paths[-1], set_to(PixelData=bytes(SHAPE[0] * SHAPE[1] * 2)))
    seen = (OBLIQUE, (*SHAPE[:2], NUM - 1))
    twice = linear(scale=2.0, atol=1.1, inside=seen)
    return (Right(SHAPE, linear(inside=seen)), Right(SHAPE, twice))


def copies_apart(**values: tuple[Any, Any]) -> Callable[[Path], Outcome]:
    """Return one series with two volumes at the same places, told apart by some tags."""

    def build(folder: Path) -> Outcome:
        first = series(folder)
        edit(first, set_to(**{name: pair[0] for name, pair in values.items()}))
        for path in first:
            data = np.frombuffer(dcmread(path).PixelData, np.int16) * 2
            changes = {name: pair[1] for name, pair in values.items()}
            copy_of(path, f"b{path.name}", set_to(PixelData=data.tobytes(), **changes))
        return (whole(), Right(SHAPE, linear(scale=2.0, atol=1.1)))

    return build


def same_uid_twice(folder: Path) -> Outcome:
    first = series(folder / "a")
    for path in series(folder / "b"):
        data = (np.frombuffer(dcmread(path).PixelData, np.int16) * 2).tobytes()
        edit(path, set_to(PixelData=data, SOPInstanceUID=generate_uid()))
    return (rejected("duplicate_position", 2 * len(first)),)


def mixed_patients(folder: Path) -> Outcome:
    edit(series(folder)[3:], set_to(PatientID="SOMEBODY-ELSE", PatientName="ELSE^SOMEBODY"))
    return (rejected("mixed_patients", NUM),)


MIDDLE = slice(2, 3)
GEOMETRY_CASES = (
    Case("instance numbers shuffled", lambda folder: series(folder, seed=0) and (whole(),)),
    Case("names at random, no suffix", random_names),
    Case("real MR, instance numbers shuffled", real_mr),
    Case("real sagittal MR, renamed", real_sagittal),
    Case("slice missing in the middle", without(2)),
    Case("slice missing at the end", without(-1)),
    Case("slice missing, resampled", missing_but_resampled, {"irregular_spacing": "resample"}),
    Case("two slices at one place", duplicate_position),
    Case("one file twice", duplicate_file),
    Case("gantry tilt", leaning(False)),
    Case("gantry tilt, straightened", leaning(True), {"gantry_tilt": "resample"}),
    Case("uneven gaps", irregular("skip")),
    Case("uneven gaps within 0.2", irregular(0.2), {"irregular_spacing": 0.2}),
    Case("uneven gaps, resampled", irregular("resample"), {"irregular_spacing": "resample"}),
    Case("two series in one folder", two_series),
    Case("one series in three folders", across_folders),
    Case("a slice of another orientation", other_orientation),
    Case("a localizer among the slices", localizer),
    Case("slices of two sizes", mixed_size),
    Case("slices of two patients", mixed_patients),
    Case("no orientation", edited("no_orientation", ImageOrientationPatient=None)),
    Case("no position", edited("no_orientation", ImagePositionPatient=None)),
    Case("zero orientation", edited("no_orientation", ImageOrientationPatient=[0, 0, 0, 0, 0, 0])),
    Case(
        "cosines that are no unit vectors",
        edited("nonfinite_geometry", ImageOrientationPatient=[2, 0, 0, 0, 0.5, 0]),
    ),
    Case("zero pixel spacing", edited("nonfinite_geometry", PixelSpacing=[0, 0])),
    Case("no pixel spacing in one slice", edited("nonfinite_geometry", MIDDLE, PixelSpacing=None)),
    Case("rescale slope zero", edited("nonfinite_geometry", RescaleSlope=0)),
    Case("rescale slope NaN", patched("s", "nan")),
    Case("rescale slope infinite", patched("s", "inf")),
    Case("rescale slope 1e999", patched("s", "1e999")),
    Case("position NaN in one slice", patched("o", "NaN", MIDDLE)),
    Case("position 1e999 in one slice", patched("o", "-1e999", MIDDLE)),
    Case("pixel spacing NaN", patched("p", "nan")),
    Case("sagittal", turned(rotation_affine((90, 0, 90), (0.8, 0.8, 3.0)))),
    Case("coronal", turned(rotation_affine((90, 0, 0), (0.8, 0.8, 3.0)))),
    Case("oblique twice", turned(rotation_affine((-31, 22, 47), (0.8, 0.8, 3.0)))),
    Case("pixels that are not square", turned(rotation_affine((12, 0, 5), (0.5, 1.75, 3.0)))),
    Case("positions with two decimals", two_decimals),
    Case("cosines with noise", noisy_cosines),
    Case("a series of one slice", single_slice),
    Case("echoes in one series", copies_apart(EchoTime=(3.5, 9.0), EchoNumbers=(1, 2))),
    Case("b-values in one series", copies_apart(DiffusionBValue=(0.0, 1000.0))),
    Case("magnitude between phase", between_each_other),
    Case("blank ends of two time points", blank_ends),
    Case("time points in one series", copies_apart(TemporalPositionIdentifier=(1, 2))),
    Case("two acquisitions at one place", copies_apart(AcquisitionNumber=(1, 2))),
    Case("one series UID for two volumes", same_uid_twice),
)
