"""Other projects' collections of difficult files: every file accounted for, every scan right.

What is accepted is read again by pydicom or nibabel alone, and compared.
"""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import data_store
import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.pixels import apply_color_lut, apply_modality_lut

from medssl.errors import DataError
from medssl.pipelines.index import index_scans
from medssl.scans.formats.base import REASONS
from medssl.scans.geometry import RAS_FROM_LPS
from samples import real_data

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

_LOSSY_LEVELS = 2.0  # by which two decoders of a lossy image may differ, on average


def folders_of(name):
    """Return the folders of a collection."""
    inside = {
        "pydicom": (Path(pydicom.__file__).parent / "data",),
        "pydicom-data": (Path(data_store.__path__[0]),),
        "nibabel": tuple(sorted(Path(nib.__file__).parent.glob("**/tests/data"))),
    }
    if name in inside:
        return inside[name]
    return (real_data("dicom", name),)


def index_of(name, work):
    """Return the index of a collection, and how many files it holds."""
    folders = folders_of(name)
    root = work / "files"
    root.mkdir()
    for number, folder in enumerate(folders):
        (root / str(number)).symlink_to(folder)
    num_files = sum(path.is_file() for folder in folders for path in folder.rglob("*"))
    return index_scans(root, work / "index", num_workers=1), num_files


@pytest.fixture(
    scope="module", params=["pydicom", "pydicom-data", "nibabel", "sag_mprage", "siim_chest_ct"]
)
def indexed(request, tmp_path_factory):
    """Return a collection's name, its index, and how many files it holds."""
    return request.param, *index_of(request.param, tmp_path_factory.mktemp("corpus"))


def test_every_file_is_accounted_for(indexed):
    _, index, num_files = indexed
    assert index.table["num_files"].sum() >= num_files  # more: a file may hold several stacks
    places = {path.resolve() for key in index.table["scan_key"] for path in index.files(key)}
    assert len(places) == num_files


def test_every_rejection_has_a_known_reason(indexed):
    _, index, _ = indexed
    rejected = index.table[index.table["status"] == "rejected"]
    assert set(rejected["reason"]) <= set(REASONS)
    assert set(index.accepted["reason"]) <= {""}


def read(index, row):
    """Return an accepted scan, or None where reading it raises an error that says why."""
    try:
        return index.read_volume(row["scan_key"])
    except DataError as error:
        if not any(f"({reason})" in str(error) for reason in REASONS):
            raise
        return None


def test_every_accepted_scan_is_finite_and_as_the_table_says(indexed):
    _, index, _ = indexed
    for row in index.accepted.to_dict("records"):
        volume = read(index, row)
        if volume is not None:
            assert volume.voxels_CXYZ.shape == (row["num_channels"], *row["shape"])
            assert np.isfinite(volume.voxels_CXYZ).all(), index.files(row["scan_key"])[0].name


COMPARED_AT_LEAST = {
    "pydicom": 14,
    "pydicom-data": 18,
    "nibabel": 5,
    "sag_mprage": 1,
    "siim_chest_ct": 94,
}


def test_accepted_voxels_equal_an_independent_reading(indexed):
    name, index, _ = indexed
    outcomes = Counter(compare(index, row) for row in index.accepted.to_dict("records"))
    assert outcomes["same"] >= COMPARED_AT_LEAST[name], outcomes
    # Compressed pixels are decoded when they are read: only then some show their damage.
    assert outcomes["not read"] <= 1, outcomes


def compare(index, row):
    paths = index.files(row["scan_key"])
    volume = read(index, row)
    if volume is None:
        return "not read"
    if row["format"] == "nifti":
        same_as_nibabel(paths[0], volume, row)
        return "same"
    if any(flag.endswith("resampled") for flag in row["flags"]):
        return "not comparable"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if len(paths) == 1:
            return same_as_pydicom(paths[0], volume.voxels_CXYZ, row)
        for number, path in enumerate(paths):
            assert same_as_pydicom(path, volume.voxels_CXYZ[..., number], row) == "same"
            place = [float(value) for value in pydicom.dcmread(path).ImagePositionPatient]
            corner = RAS_FROM_LPS @ volume.affine @ [0, 0, number, 1]
            np.testing.assert_allclose(corner[:3], place, atol=0.02, err_msg=path.name)
    return "same"


def same_as_nibabel(path, volume, row):
    image = nib.load(path)
    expected = image.get_fdata()
    expected = expected[None] if row["num_channels"] == 1 else np.moveaxis(expected, -1, 0)
    np.testing.assert_allclose(
        volume.voxels_CXYZ, expected.reshape(volume.voxels_CXYZ.shape), rtol=1e-6
    )
    np.testing.assert_allclose(volume.affine, image.affine, atol=1e-4)


def same_as_pydicom(path, x_CXYT, row):
    """Compare one file, (C, X, Y) or (C, X, Y, T), with pydicom's own decoding of it."""
    dataset = pydicom.dcmread(path, force=True)
    try:
        pixels = dataset.pixel_array
    except Exception:  # noqa: BLE001  (pydicom alone cannot read it)
        return "not comparable"
    kind = dataset.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dataset)
        if not dataset.file_meta.TransferSyntaxUID.is_little_endian:
            pixels = pixels.byteswap()  # pydicom leaves palettes in the file's byte order
    elif kind.startswith("MONOCHROME"):
        pixels = apply_modality_lut(pixels, dataset)
    elif kind != "RGB" and "JPEG" not in dataset.file_meta.TransferSyntaxUID.name:
        pixels = pydicom.pixels.convert_color_space(pixels, kind, "RGB")
    frames = int(dataset.get("NumberOfFrames") or 1)
    pixels = pixels.reshape(frames, dataset.Rows, dataset.Columns, -1).astype(np.float64)
    expected = np.transpose(pixels, (3, 2, 1, 0))
    if x_CXYT.ndim == 3:
        x_CXYT = x_CXYT[..., None]
    assert x_CXYT.shape == expected.shape, path.name
    if kind == "MONOCHROME1":  # dark and bright change places
        assert np.corrcoef(x_CXYT.ravel(), expected.ravel())[0, 1] == pytest.approx(-1), path.name
    elif "lossy" in row["flags"]:
        assert np.abs(x_CXYT - expected).mean() < _LOSSY_LEVELS, path.name
    else:
        np.testing.assert_allclose(x_CXYT, expected, rtol=1e-6, atol=1e-3, err_msg=path.name)
    return "same"


NIBABEL_NIFTI = {
    "analyze.hdr": "analyze",
    "anatomical.nii": "",
    "example4d.nii.gz": "",
    "example_nifti2.nii.gz": "",
    "functional.nii": "",
    "nifti1.hdr": "analyze",
    "nifti2.hdr": "analyze",
    "reoriented_anat_moved.nii": "",
    "resampled_anat_moved.nii": "nan_voxels",
    "row_major.dconn.nii": "unsupported_dimensions",  # a matrix of the brain's surface
    "standard.nii.gz": "label_map",  # a few whole numbers
}


def test_nifti_files_of_nibabel_have_the_outcome_they_should(tmp_path):
    index, _ = index_of("nibabel", tmp_path)
    reasons = zip(index.table["scan_key"], index.table["reason"], strict=True)
    found = {index.files(key)[0].name: reason for key, reason in reasons}
    assert {name: found[name] for name in NIBABEL_NIFTI} == NIBABEL_NIFTI


@pytest.mark.parametrize("frames", ["", "_2frame"])
def test_palette_is_read_alike_in_either_byte_order(tmp_path, frames):
    scans = []
    for order in ("", "_expb"):
        folder = tmp_path / f"files{order}"
        folder.mkdir()
        name = f"OBXXXX1A{order}{frames}.dcm"
        (folder / name).symlink_to(folders_of("pydicom-data")[0] / "data" / name)
        index = index_scans(folder, tmp_path / f"index{order}", num_workers=1)
        scans.append(index.read_volume(index.accepted["scan_key"][0]).voxels_CXYZ)
    np.testing.assert_array_equal(*scans)
