"""Hostile DICOM of many frames, and DICOM that is no scan at all."""

from __future__ import annotations

import gc
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.fileset import FileSet
from pydicom.sequence import Sequence as Items
from pydicom.uid import UID, RLELossless, generate_uid

from hostile_outcomes import Case, Right, linear, pixels, rejected
from hostile_pixels import coloured, image, real_slice
from hostile_series import NUM, SHAPE, Outcome, copy_of, edit, series, set_to, whole
from samples import OBLIQUE, linear_volume, rotation_affine

ENHANCED = {"CT": "1.2.840.10008.5.1.4.1.1.2.1", "MR": "1.2.840.10008.5.1.4.1.1.4.1",
            "PT": "1.2.840.10008.5.1.4.1.1.130"}  # fmt: skip
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def item(**values: Any) -> Dataset:
    dataset = Dataset()
    set_to(**values)(dataset)
    return dataset


def measures(affine: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Return the functional groups that say how a stack lies."""
    lps = _LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    cosines = (lps[:3, :2] / spacing[:2]).T.ravel()
    size = item(PixelSpacing=[f"{value:.10g}" for value in spacing[[1, 0]]])
    size.SliceThickness = f"{spacing[2]:.10g}"
    plane = item(ImageOrientationPatient=[f"{value:.12f}"[:16] for value in cosines])
    return {"PixelMeasuresSequence": [size], "PlaneOrientationSequence": [plane]}


def frame(affine: npt.NDArray[np.float64], index: int, stack: str, **content: Any) -> Dataset:
    """Return the per-frame groups of one slice."""
    place = (_LPS @ affine)[:3] @ np.array([0, 0, index, 1])
    said = item(StackID=stack, InStackPositionNumber=index + 1, **content)
    said.DimensionIndexValues = [int(stack), index + 1]
    groups = item(FrameContentSequence=[said])
    position = item(ImagePositionPatient=[f"{value:.10f}"[:16] for value in place])
    groups.PlanePositionSequence = [position]
    return groups


def enhanced(
    folder: Path,
    stacks: Sequence[tuple[npt.NDArray[np.float64], npt.NDArray[Any], dict[str, Any]]],
    modality: str = "MR",
    shuffle: int | None = None,
    rescale: Callable[[int], tuple[float, float]] | None = None,
) -> Path:
    """Write one enhanced file.

    Args:
        stacks: affine, values (X, Y, Z) and the further groups of each frame; a key
            ``FrameContent`` holds what stands in the frame content.
        shuffle: seed of the order of the frames.
        rescale: slope and intercept of each frame, by its slice.
    """
    path = series(folder, (4, 4, 1), modality="CT")[0]
    dataset = dcmread(path)
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
                 "SliceThickness", "RescaleSlope", "RescaleIntercept", "RescaleType"):  # fmt: skip
        delattr(dataset, name)
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = UID(ENHANCED[modality])
    dataset.Modality = modality
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    same = all(np.allclose(stack[0][:3, :3], stacks[0][0][:3, :3]) for stack in stacks)
    dataset.SharedFunctionalGroupsSequence = [item(**(measures(stacks[0][0]) if same else {}))]
    frames: list[tuple[Dataset, npt.NDArray[Any]]] = []
    for number, (affine, values, more) in enumerate(stacks, start=1):
        groups = {name: value for name, value in more.items() if name != "FrameContent"}
        for index in range(values.shape[2]):
            content = more.get("FrameContent", {})
            stack = "1" if same else str(number)
            made = frame(affine, index, stack, **content)
            set_to(**({} if same else measures(affine)), **groups)(made)
            slope, intercept = rescale(index) if rescale else (1.0, 0.0)
            lut = item(RescaleSlope=slope, RescaleIntercept=intercept)
            lut.RescaleType = "HU" if modality == "CT" else "US"
            made.PixelValueTransformationSequence = [lut]
            stored = np.rint((values[:, :, index].T.astype(float) - intercept) / slope)
            frames.append((made, stored.astype(np.int16)))
    order = np.arange(len(frames))
    if shuffle is not None:
        order = np.random.default_rng(shuffle).permutation(order)
    dataset.PerFrameFunctionalGroupsSequence = Items([frames[at][0] for at in order])
    dataset.NumberOfFrames = len(frames)
    dataset.Rows, dataset.Columns = frames[0][1].shape
    dataset.PixelData = np.stack([frames[at][1] for at in order]).tobytes()
    dataset.save_as(path)
    return path


VALUES = linear_volume(SHAPE, OBLIQUE)


def one_stack(modality: str, **options: Any) -> Callable[[Path], Outcome]:
    def build(folder: Path) -> Outcome:
        enhanced(folder, [(OBLIQUE, VALUES, {})], modality, **options)
        return (whole(intensity="HU" if modality == "CT" else ""),)

    return build


def told_apart(*groups: dict[str, Any]) -> Callable[[Path], Outcome]:
    """Return one file of two volumes at the same places, told apart by their groups."""

    def build(folder: Path) -> Outcome:
        volumes = [(OBLIQUE, VALUES * (number + 1), more) for number, more in enumerate(groups)]
        enhanced(folder, volumes, shuffle=2)
        return (whole(), Right(SHAPE, linear(scale=2.0, atol=1.1)))

    return build


def diffusion(value: float) -> dict[str, Any]:
    return {"MRDiffusionSequence": [item(DiffusionBValue=value, DiffusionDirectionality="NONE")]}


def two_stacks(folder: Path) -> Outcome:
    other = rotation_affine((80.0, 0.0, 10.0), (1.0, 1.0, 4.0))
    volumes = [(OBLIQUE, VALUES, {}), (other, linear_volume(SHAPE, other), {})]
    enhanced(folder, volumes, shuffle=4)
    return (whole(), whole())


def concatenated(folder: Path) -> Outcome:
    """One volume, divided into two files."""
    path = enhanced(folder, [(OBLIQUE, VALUES, {})])
    dataset = dcmread(path)
    groups, stored = list(dataset.PerFrameFunctionalGroupsSequence), dataset.pixel_array
    path.unlink()
    for number, part in enumerate((slice(0, 3), slice(3, NUM)), start=1):
        dataset.PerFrameFunctionalGroupsSequence = Items(groups[part])
        dataset.NumberOfFrames = len(groups[part])
        dataset.PixelData = stored[part].tobytes()
        set_to(ConcatenationUID="2.25.1", InConcatenationNumber=number,
               InConcatenationTotalNumber=2, SOPInstanceUID=generate_uid())(dataset)  # fmt: skip
        dataset.save_as(folder / f"{number}.dcm")
    return (rejected("multi_frame_unsupported", 2),)


def frame_gone(folder: Path) -> Outcome:
    def without_one(dataset: Dataset) -> None:
        del dataset.PerFrameFunctionalGroupsSequence[2]
        dataset.NumberOfFrames = NUM - 1
        size = SHAPE[0] * SHAPE[1] * 2
        dataset.PixelData = dataset.PixelData[: 2 * size] + dataset.PixelData[3 * size :]

    edit(enhanced(folder, [(OBLIQUE, VALUES, {})]), without_one)
    return (rejected("missing_slice"),)


def fewer_pixels(folder: Path) -> Outcome:
    path = enhanced(folder, [(OBLIQUE, VALUES, {})])
    path.write_bytes(path.read_bytes()[:-300])
    return (rejected("truncated_pixels"),)


def frames_without_places(folder: Path) -> Outcome:
    def forget(dataset: Dataset) -> None:
        for groups in dataset.PerFrameFunctionalGroupsSequence:
            del groups.PlanePositionSequence

    edit(enhanced(folder, [(OBLIQUE, VALUES, {})]), forget)
    return (rejected("no_orientation"),)


def more_frames_than_groups(folder: Path) -> Outcome:
    def lie(dataset: Dataset) -> None:
        dataset.NumberOfFrames = NUM + 3
        dataset.PixelData = dataset.PixelData + bytes(SHAPE[0] * SHAPE[1] * 2 * 3)

    edit(enhanced(folder, [(OBLIQUE, VALUES, {})]), lie)
    return (rejected("unreadable|no_orientation|multi_frame_unsupported"),)


def movie(num_frames: int = 5) -> Any:
    """Return real pixels (T, rows, columns) that wander from frame to frame."""
    chest = real_slice()
    return np.stack([np.roll(chest, 3 * number, axis=1) for number in range(num_frames)])


def cine(folder: Path, modality: str, sop_class: str, frames: Any, **values: Any) -> Path:
    """Write a cine; its first frame stands for the size."""
    path, dataset = image(folder, frames[0], modality, sop_class, NumberOfFrames=len(frames))
    dataset.PixelData = np.ascontiguousarray(frames).tobytes()
    dataset.FrameTime = "40"
    set_to(**values)(dataset)
    dataset.save_as(path)
    return path


REGION = {
    "RegionSpatialFormat": 1, "RegionDataType": 1, "RegionFlags": 0, "RegionLocationMinX0": 0,
    "RegionLocationMinY0": 0, "RegionLocationMaxX1": 79, "RegionLocationMaxY1": 63,
    "PhysicalUnitsXDirection": 3, "PhysicalUnitsYDirection": 3, "PhysicalDeltaX": 0.05,
    "PhysicalDeltaY": 0.025,
}  # fmt: skip


def as_time(frames: Any) -> Any:
    """Return (T, rows, columns) as (C, X, Y, T)."""
    return frames.transpose(2, 1, 0)[None]


def ultrasound(folder: Path) -> Outcome:
    regions = [item(**REGION)]
    cine(folder, "US", "1.2.840.10008.5.1.4.1.1.3.1", movie(), PixelSpacing=None,
         SequenceOfUltrasoundRegions=regions)  # fmt: skip
    check = pixels(as_time(movie()), spacing_mm=(0.5, 0.25))
    return (Right((80, 64, 5), check, dims="2D+t", flags=frozenset({"ultrasound_regions"})),)


def coloured_ultrasound(folder: Path) -> Outcome:
    frames = np.stack([coloured(), 255 - coloured(), coloured()[::-1]])
    cine(folder, "US", "1.2.840.10008.5.1.4.1.1.3.1", frames)
    wanted = frames.transpose(3, 2, 1, 0)
    return (Right((80, 64, 3), pixels(wanted), dims="2D+t", num_channels=3),)


def angiography(folder: Path) -> Outcome:
    cine(folder, "XA", "1.2.840.10008.5.1.4.1.1.12.1", movie(), PixelSpacing=None,
         ImagerPixelSpacing=[0.25, 0.5])  # fmt: skip
    return (Right((80, 64, 5), pixels(as_time(movie()), spacing_mm=(0.5, 0.25)), dims="2D+t"),)


def rotating(folder: Path) -> Outcome:
    """Frames by angle, not by time."""
    cine(folder, "XA", "1.2.840.10008.5.1.4.1.1.12.1", movie(), FrameIncrementPointer=0x00181510)
    return (rejected("multi_frame_unsupported"),)


def cine_of_few_fragments(folder: Path) -> Outcome:
    path = cine(folder, "US", "1.2.840.10008.5.1.4.1.1.3.1", movie())
    dataset = dcmread(path)
    dataset.compress(RLELossless, generate_instance_uid=False)
    dataset.NumberOfFrames = 9
    dataset.save_as(path)
    return (rejected("truncated_pixels"),)


def cine_lying(folder: Path) -> Outcome:
    cine(folder, "XA", "1.2.840.10008.5.1.4.1.1.12.1", movie(), NumberOfFrames=500)
    return (rejected("truncated_pixels"),)


def burned_in(folder: Path) -> Outcome:
    edit(series(folder), set_to(BurnedInAnnotation="YES"))
    return (rejected("quarantined", NUM),)


def secondary_capture(folder: Path) -> Outcome:
    image(folder, coloured(), "OT", "1.2.840.10008.5.1.4.1.1.7")
    return (rejected("secondary_capture"),)


def coloured_capture_of_frames(folder: Path) -> Outcome:
    cine(folder, "OT", "1.2.840.10008.5.1.4.1.1.7.4", np.stack([coloured()] * 3))
    return (rejected("secondary_capture"),)


def reformat_beside(folder: Path) -> Outcome:
    path = series(folder)[2]
    reformat = ["DERIVED", "SECONDARY", "MPR"]
    copy_of(path, "zz.dcm", set_to(ImageType=reformat, SeriesInstanceUID=generate_uid()))
    return (whole(), rejected("derived"))


def not_images(folder: Path) -> Outcome:
    kinds = ("481.3", "66.4", "88.11", "104.1", "11.1", "9.1.1", "481.5")
    for number, kind in enumerate(kinds):
        path = series(folder / str(number), (4, 4, 1), number=number)[0]
        uid = UID(f"1.2.840.10008.5.1.4.1.1.{kind}")
        edit(path, set_to(SOPClassUID=uid, Modality="OT", PixelData=None, Rows=None, Columns=None))
    return (rejected("not_an_image", len(kinds)),)


def no_scans(folder: Path) -> Outcome:
    (folder / "empty.dcm").touch()
    (folder / "text.dcm").write_text("DOE^JANE, please call back\n" * 40)
    (folder / "empty").touch()
    (folder / "mark.dcm").write_bytes(bytes(128) + b"DICM")
    (folder / "noise.dcm").write_bytes(np.random.default_rng(0).bytes(5000))
    return (rejected("unreadable|not_a_scan", 4), rejected("not_a_scan"))


def dicomdir(folder: Path) -> Outcome:
    files = FileSet()
    for path in series(folder / "draft", modality="CT"):
        dataset = dcmread(path)
        dataset.StudyDate, dataset.StudyTime, dataset.StudyID = "20200101", "120000", "1"
        dataset.AccessionNumber = "7"
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID
        files.add(dataset)
    files.write(folder / "disc")
    shutil.rmtree(folder / "draft")
    with warnings.catch_warnings():  # pydicom leaves its draft folder to the garbage collector
        warnings.simplefilter("ignore", ResourceWarning)
        del files
        gc.collect()
    return (whole(), rejected("dicomdir"))


FRAME_CASES = (
    Case("enhanced CT", one_stack("CT", rescale=lambda index: (1.0, -1024.0))),
    Case("enhanced CT, frames shuffled", one_stack("CT", shuffle=3)),
    Case("enhanced MR", one_stack("MR")),
    Case(
        "enhanced PET, rescaled frame by frame",
        one_stack("PT", shuffle=1, rescale=lambda index: (0.1 + index / 50, index)),
    ),
    Case("enhanced MR of two stacks", two_stacks),
    Case(
        "enhanced MR of two time points",
        told_apart(
            {"FrameContent": {"TemporalPositionIndex": 1}},
            {"FrameContent": {"TemporalPositionIndex": 2}},
        ),
    ),
    Case(
        "enhanced MR of two echoes",
        told_apart(
            {"MREchoSequence": [item(EffectiveEchoTime=3.5)]},
            {"MREchoSequence": [item(EffectiveEchoTime=9.0)]},
        ),
    ),
    Case("enhanced MR of two b-values", told_apart(diffusion(0.0), diffusion(1000.0))),
    Case(
        "enhanced MR, two volumes alike",
        lambda folder: (
            enhanced(folder, [(OBLIQUE, VALUES, {}), (OBLIQUE, VALUES * 2, {})])
            and (rejected("duplicate_position"),)
        ),
    ),
    Case("enhanced MR without one frame", frame_gone),
    Case("enhanced MR cut short", fewer_pixels),
    Case("enhanced MR in two files", concatenated),
    Case("angiography of a rotation", rotating),
    Case("cine of fewer fragments than frames", cine_of_few_fragments),
    Case("enhanced MR without places", frames_without_places),
    Case("enhanced MR, more frames than groups", more_frames_than_groups),
    Case("ultrasound cine with regions", ultrasound),
    Case("ultrasound cine in colour", coloured_ultrasound),
    Case("angiography cine", angiography),
    Case("cine of fewer frames than it says", cine_lying),
    Case("text in the pixels", burned_in),
    Case("secondary capture", secondary_capture),
    Case("secondary capture of frames", coloured_capture_of_frames),
    Case("a reformat beside its series", reformat_beside),
    Case("plans, reports, waveforms", not_images),
    Case("files that only look like DICOM", no_scans),
    Case("a disc with a DICOMDIR", dicomdir),
)
