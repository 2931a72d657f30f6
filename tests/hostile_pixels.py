"""Hostile DICOM pixels: kinds of number and colour, compression, and files that lie about them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gdcm
import numpy as np
from PIL import Image
from pydicom import dcmread
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from hostile_outcomes import Case, Check, Right, inverted, linear, pixels, rejected, same_as
from hostile_series import SHAPE, Outcome, edit, series, set_to, whole
from samples import OBLIQUE, hippocampus, linear_volume, real_data, write_dicom_series

PIXEL_DATA = (0x7FE0, 0x0010)


def real_series(folder: Path, **options: Any) -> tuple[list[Path], Any]:
    """Write real hippocampus pixels of 12 bits under an oblique affine."""
    voxels, _ = hippocampus()
    stored = np.rint(voxels * (4000.0 / voxels.max()))
    return write_dicom_series(stored, OBLIQUE, folder, seed=None, **options), stored


def real_slice(size: int = 64) -> Any:
    """Return real 8-bit pixels (rows, columns) of a chest."""
    path = min(real_data("dicom", "siim_chest_ct").glob("*.dcm"))
    pixels_RC = dcmread(path).pixel_array[100 : 100 + size, 150 : 150 + size + 16].astype(float)
    low, high = pixels_RC.min(), pixels_RC.max()
    return np.rint((pixels_RC - low) * (255 / (high - low))).astype(np.uint8)


def number_type(bits: int, signed: bool) -> Callable[[Path], Outcome]:
    """Return a linear series stored in integers of so many bits."""
    dtype = np.dtype(f"{'i' if signed else 'u'}{bits // 8}")

    def build(folder: Path) -> Outcome:
        values = linear_volume(SHAPE, OBLIQUE).astype(np.float64)
        low, high = values.min(), values.max()
        # All the numbers of the type are used, the last bit and the sign among them.
        limits = np.iinfo(dtype)
        slope = (high - low) / (float(limits.max) - float(limits.min))
        intercept = low - slope * limits.min
        for index, path in enumerate(series(folder)):
            stored = np.clip(np.rint((values[:, :, index].T - intercept) / slope),
                             limits.min, limits.max).astype(dtype)  # fmt: skip
            dataset = dcmread(path)
            dataset.BitsAllocated = dataset.BitsStored = bits
            dataset.HighBit, dataset.PixelRepresentation = bits - 1, int(signed)
            data = stored.astype(dtype.newbyteorder("<")).tobytes()
            dataset.PixelData = data
            dataset[PIXEL_DATA].VR = "OB" if bits == 8 else "OW"
            dataset.RescaleSlope, dataset.RescaleIntercept = f"{slope:.10g}", f"{intercept:.10g}"
            dataset.save_as(path)
        return (Right(SHAPE, linear(atol=0.6 + slope)),)

    return build


def overlay_bits(folder: Path) -> Outcome:
    paths, stored = real_series(folder)
    noise = np.random.default_rng(1)
    for path in paths:
        dataset = dcmread(path)
        words = np.frombuffer(dataset.PixelData, np.uint16)
        garbage = noise.integers(0, 16, words.shape).astype(np.uint16) << 12
        dataset.PixelData = (words | garbage).tobytes()
        dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 12, 11, 0
        dataset.save_as(path)
    return (Right(stored.shape, same_as(stored[None], OBLIQUE)),)


def pet(folder: Path) -> Outcome:
    values = linear_volume(SHAPE, OBLIQUE).astype(np.float64)
    for index, path in enumerate(series(folder, modality="PT")):
        slope, intercept = 0.05 + 0.01 * index, -1500.0 + index
        stored = np.rint((values[:, :, index].T - intercept) / slope).astype(np.uint16)
        change = set_to(PixelData=stored.tobytes(), PixelRepresentation=0, RescaleSlope=slope)
        edit(path, change)
        edit(path, set_to(RescaleIntercept=intercept))
    return (whole(),)


def rescaled_ct(folder: Path) -> Outcome:
    series(folder, modality="CT", rescale=(0.5, -1024.0), signed=False)
    return (whole(intensity="HU"),)


def image(
    folder: Path, pixels_RC: Any, modality: str, sop_class: str, **values: Any
) -> tuple[Path, Dataset]:
    """Write one 8-bit image without a place in the patient."""
    path = series(folder, (4, 4, 1), modality="CT")[0]
    dataset = dcmread(path)
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "RescaleSlope",
                    "RescaleIntercept", "RescaleType", "FrameOfReferenceUID"):  # fmt: skip
        delattr(dataset, keyword)
    dataset.Modality, dataset.SOPClassUID = modality, UID(sop_class)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.ImageType = ["ORIGINAL", "PRIMARY"]
    dataset.Rows, dataset.Columns = pixels_RC.shape[:2]
    dataset.SamplesPerPixel = 3 if pixels_RC.ndim == 3 else 1
    if pixels_RC.ndim == 3:
        dataset.PhotometricInterpretation, dataset.PlanarConfiguration = "RGB", 0
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.PixelSpacing = [0.25, 0.5]
    data = np.ascontiguousarray(pixels_RC).tobytes()
    dataset.PixelData = data + b"\0" * (len(data) % 2)
    dataset[PIXEL_DATA].VR = "OB"
    dataset.BurnedInAnnotation = "NO"
    set_to(**values)(dataset)
    dataset.save_as(path)
    return path, dataset


CR, XC, US = "1.2.840.10008.5.1.4.1.1.1", "1.2.840.10008.5.1.4.1.1.77.1.4", \
    "1.2.840.10008.5.1.4.1.1.6.1"  # fmt: skip


def flat(pixels_RC: Any) -> Any:
    """Return (rows, columns[, colours]) as (C, X, Y)."""
    return (pixels_RC if pixels_RC.ndim == 3 else pixels_RC[..., None]).transpose(2, 1, 0)


def radiograph(folder: Path) -> Outcome:
    chest = real_slice()
    image(folder, chest, "CR", CR)
    check = pixels(flat(chest), spacing_mm=(0.5, 0.25))
    return (Right((80, 64), check, dims="2D", flags=frozenset({"no_patient_geometry"})),)


def radiograph_dark_for_high(folder: Path) -> Outcome:
    chest = real_slice()
    image(folder, chest, "CR", CR, PhotometricInterpretation="MONOCHROME1")
    flags = frozenset({"monochrome1"})
    return (Right((80, 64), inverted(flat(chest)), dims="2D", flags=flags),)


def ct_dark_for_high(folder: Path) -> Outcome:
    edit(series(folder, modality="CT"), set_to(PhotometricInterpretation="MONOCHROME1"))
    return (whole(flags=frozenset({"monochrome1"})),)


def coloured() -> Any:
    """Return real pixels as (rows, columns, 3), different in every colour."""
    chest = real_slice()
    return np.rint(chest[..., None] * np.array([1.0, 0.75, 0.5])).astype(np.uint8)


def in_colour(check: Check) -> Outcome:
    return (Right((80, 64), check, dims="2D", num_channels=3),)


def rgb(folder: Path) -> Outcome:
    image(folder, coloured(), "XC", XC)
    return in_colour(pixels(flat(coloured())))


def rgb_by_planes(folder: Path) -> Outcome:
    path, dataset = image(folder, coloured(), "XC", XC, PlanarConfiguration=1)
    dataset.PixelData = np.ascontiguousarray(coloured().transpose(2, 0, 1)).tobytes()
    dataset.save_as(path)
    return in_colour(pixels(flat(coloured())))


def ybr_full(folder: Path) -> Outcome:
    ybr = np.asarray(Image.fromarray(coloured()).convert("YCbCr"))
    image(folder, ybr, "XC", XC, PhotometricInterpretation="YBR_FULL")
    return in_colour(pixels(flat(coloured()), atol=4))


def ybr_baseline_jpeg(folder: Path) -> Outcome:
    path, dataset = image(folder, coloured(), "XC", XC, PhotometricInterpretation="YBR_FULL_422")
    stream = io.BytesIO()
    Image.fromarray(coloured()).save(stream, "JPEG", quality=100, subsampling=1)
    encapsulated(path, dataset, stream.getvalue(), JPEGBaseline8Bit)
    return in_colour(pixels(flat(coloured()), atol=12))


def encapsulated(path: Path, dataset: Dataset, frame: bytes, syntax: UID) -> None:
    """Put one compressed frame into a file."""
    dataset.PixelData = encapsulate([frame])
    dataset[PIXEL_DATA].VR = "OB"
    dataset[PIXEL_DATA].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.save_as(path)


def baseline_jpeg(folder: Path) -> Outcome:
    path, dataset = image(folder, real_slice(), "CR", CR)
    stream = io.BytesIO()
    Image.fromarray(real_slice()).save(stream, "JPEG", quality=100)
    encapsulated(path, dataset, stream.getvalue(), JPEGBaseline8Bit)
    return (Right((80, 64), pixels(flat(real_slice()), atol=6), dims="2D"),)


def palette(folder: Path) -> Outcome:
    indices = real_slice()
    _, dataset = image(folder, indices, "US", US, PhotometricInterpretation="PALETTE COLOR")
    table = np.random.default_rng(5).integers(0, 256, (3, 256)).astype(np.uint8)
    for colour, values in zip(("Red", "Green", "Blue"), table, strict=True):
        name = f"{colour}PaletteColorLookupTable"
        dataset.add_new(tag_for_keyword(f"{name}Descriptor"), "US", [256, 0, 8])
        dataset.add_new(tag_for_keyword(f"{name}Data"), "OW", values.tobytes())
    dataset.save_as(folder / "0001.dcm")
    return in_colour(pixels(flat(table[:, indices].transpose(1, 2, 0))))


def compressed(syntax: UID, atol: float = 1e-3, **options: Any) -> Callable[[Path], Outcome]:
    """Return a series of real pixels, compressed."""

    def build(folder: Path) -> Outcome:
        paths, stored = real_series(folder, signed=False)
        edit(paths, set_to(BitsStored=12, HighBit=11))
        for path in paths:
            dataset = dcmread(path)
            dataset.compress(syntax, generate_instance_uid=False, **options)
            dataset.save_as(path)
        return (Right(stored.shape, same_as(stored[None], OBLIQUE, atol=atol)),)

    return build


def lossless_jpeg(folder: Path) -> Outcome:
    paths, stored = real_series(folder, signed=False)
    for path in paths:
        reader = gdcm.ImageReader()
        reader.SetFileName(str(path))
        change = gdcm.ImageChangeTransferSyntax()
        change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
        if not reader.Read():
            raise ValueError("GDCM did not read")
        change.SetInput(reader.GetImage())
        if not change.Change():
            raise ValueError("GDCM did not compress")
        writer = gdcm.ImageWriter()
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        writer.SetFileName(str(path))  # empties the file
        writer.Write()
    return (Right(stored.shape, same_as(stored[None], OBLIQUE)),)


def rewritten(syntax: UID) -> Callable[[Path], Outcome]:
    def build(folder: Path) -> Outcome:
        for path in series(folder):
            dataset = dcmread(path)
            if syntax == ExplicitVRBigEndian:
                words = np.frombuffer(dataset.PixelData, "<i2")
                dataset.PixelData = words.astype(">i2").tobytes()
            dataset.file_meta.TransferSyntaxUID = syntax
            implicit, little = syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian
            # pydicom turns values round only for a data set that names no encoding of its own.
            fresh = Dataset(dataset)
            fresh.file_meta = dataset.file_meta
            fresh.save_as(path, implicit_vr=implicit, little_endian=little)
        return (whole(),)

    return build


def turned_frame(syntax: UID) -> Callable[[Path], Outcome]:
    """Return slices whose frames are as wide as the header says they are high."""

    def build(folder: Path) -> Outcome:
        for path in series(folder, (64, 48, 4)):
            dataset = dcmread(path)
            dataset.compress(syntax, generate_instance_uid=False)
            dataset.Rows, dataset.Columns = dataset.Columns, dataset.Rows
            dataset.save_as(path)
        return (rejected("unreadable", 4),)

    return build


PIXEL_CASES = (
    *(
        Case(f"{'signed' if signed else 'unsigned'} {bits} bits", number_type(bits, signed))
        for bits in (8, 16, 32)
        for signed in (True, False)
    ),
    Case("12 bits in 16, garbage above", overlay_bits),
    Case("PET, rescaled slice by slice", pet),
    Case("CT rescaled to HU", rescaled_ct),
    Case("radiograph", radiograph),
    Case("radiograph, dark for high", radiograph_dark_for_high),
    Case("CT, dark for high", ct_dark_for_high),
    Case("RGB", rgb),
    Case("RGB in planes", rgb_by_planes),
    Case("YBR_FULL", ybr_full),
    Case("YBR_FULL_422, JPEG baseline", ybr_baseline_jpeg),
    Case("JPEG baseline, grey", baseline_jpeg),
    Case("palette", palette),
    Case("RLE", compressed(RLELossless)),
    Case("JPEG-LS lossless", compressed(JPEGLSLossless)),
    Case("JPEG-LS near lossless", compressed(JPEGLSNearLossless, atol=2.001, jls_error=2)),
    Case("JPEG 2000 lossless", compressed(JPEG2000Lossless)),
    Case("JPEG 2000", compressed(JPEG2000, atol=400, j2k_psnr=[60])),
    Case("JPEG lossless", lossless_jpeg),
    Case("JPEG 2000 with rows for columns", turned_frame(JPEG2000Lossless)),
    Case("JPEG-LS with rows for columns", turned_frame(JPEGLSLossless)),
    Case("implicit little endian", rewritten(ImplicitVRLittleEndian)),
    Case("explicit big endian", rewritten(ExplicitVRBigEndian)),
    Case("deflated", rewritten(DeflatedExplicitVRLittleEndian)),
)
