"""DICOM segmentations become masks on the grid of the series that they refer to."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from medssl.downstream.segmentation import Config, Segmentation
from medssl.errors import LabelError, MachineError
from medssl.pipelines.index import index_scans
from medssl.pipelines.prepare import prepare
from medssl.scans.index import Index
from medssl.scans.masks import MaskFolder, mask_digest, match_masks, read_mask
from medssl.scans.points import PointSource
from medssl.scans.scan import Scan, read_scan
from medssl.transforms.preprocessing import PreprocessingConfig
from samples import NAME, OBLIQUE, PATIENT_ID, PLANTED, UID_ROOT, write_dicom_series, write_nifti
from segmentations import write_segmentation

SHAPE = (9, 8, 7)
CLASSES = ("liver", "lesion")


def organs() -> dict[str, np.ndarray]:
    """Return two organs that touch, none in the first and last slice."""
    liver, lesion = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    liver[1:6, 2:7, 1:5] = 1
    lesion[3:5, 3:5, 2:4] = 1
    liver[lesion > 0] = 0
    return {"Liver": liver, "lesion": lesion}


def wanted() -> np.ndarray:
    """Return the mask of both, in the voxel order of the written series."""
    found = organs()
    return found["Liver"] + 2 * found["lesion"]


class Place:
    """Two series of one shape, and a folder for masks."""

    def __init__(self, folder: Path, affine: np.ndarray = OBLIQUE) -> None:
        self.folder, self.masks = folder, folder / "masks"
        self.masks.mkdir()
        self.affine = affine
        rng = np.random.default_rng(0)
        self.series = [
            write_dicom_series(
                rng.integers(0, 500, SHAPE).astype(np.int16), affine, folder / "scans" / str(n),
                number=n, patient_id=f"{PATIENT_ID}-{n}", patient_name=f"{NAME}-{n}",
            )
            for n in (1, 2)
        ]  # fmt: skip
        self.index: Index = index_scans(folder / "scans", folder / "index")

    def key(self, number: int) -> str:
        (key,) = [k for k, path, _ in self.index.file_names() if path.startswith(f"{number}/")]
        return key

    def scan(self, number: int = 1) -> Scan:
        return read_scan(self.index, self.key(number))

    def on_scan(self, mask: np.ndarray, number: int = 1) -> np.ndarray:
        """Return a mask in the voxel order in which the scan is read, by way of NIfTI."""
        path = write_nifti(self.folder / "same.nii.gz", mask.astype(np.uint8), self.affine)
        return read_mask(path, self.scan(number))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
@pytest.mark.parametrize("omit", [True, False], ids=["without empty frames", "all frames"])
def test_a_segmentation_is_the_mask_that_was_drawn(place, kind, omit):
    path = write_segmentation(
        place.masks / "a.dcm", place.series[0], organs(), kind=kind, omit_empty_frames=omit
    )
    found = read_mask(path, place.scan(), CLASSES)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, place.on_scan(wanted()))


def test_classes_are_found_by_label_whatever_the_order(place):
    path = write_segmentation(place.masks / "a.dcm", place.series[0], organs())
    turned = np.choose(wanted(), [0, 2, 1])
    np.testing.assert_array_equal(
        read_mask(path, place.scan(), (" LESION", "liver")), place.on_scan(turned)
    )
    one = read_mask(path, place.scan(), ("lesion",))
    np.testing.assert_array_equal(one, place.on_scan(organs()["lesion"]))
    np.testing.assert_array_equal(read_mask(path, place.scan()), place.on_scan(wanted()))


def test_frames_of_one_slice_are_put_where_they_lie(place):
    single = np.zeros(SHAPE, np.uint8)
    single[2:5, 3, 4] = 1
    path = write_segmentation(place.masks / "a.dcm", place.series[0], {"liver": single})
    np.testing.assert_array_equal(read_mask(path, place.scan(), ("liver",)), place.on_scan(single))


def test_fractions_below_one_half_are_outside(place):
    shares = organs()["Liver"] * np.linspace(0.2, 0.8, SHAPE[0])[:, None, None]
    path = write_segmentation(
        place.masks / "a.dcm", place.series[0], {"liver": shares}, kind="FRACTIONAL"
    )
    found = read_mask(path, place.scan(), ("liver",))
    np.testing.assert_array_equal(found, place.on_scan(np.rint(shares * 255) / 255 >= 0.5))


def test_segmentations_find_their_series_whatever_their_names(place):
    for number in (1, 2):
        write_segmentation(
            place.masks / f"{9 - number}.dcm", place.series[number - 1], organs(), number=number
        )
    found = match_masks(place.index, place.masks)
    assert {key: path.name for key, path in found.items()} == {
        place.key(1): "8.dcm",
        place.key(2): "7.dcm",
    }
    assert found.report.counts == {}


def test_other_dicom_files_and_strange_series_are_counted(place, tmp_path):
    write_segmentation(place.masks / "a.dcm", place.series[0], organs())
    write_dicom_series(np.zeros((4, 4, 1), np.int16), np.eye(4), place.masks / "images", number=5)
    elsewhere = write_dicom_series(np.zeros(SHAPE, np.int16), OBLIQUE, tmp_path / "x", number=9)
    write_segmentation(place.masks / "b.dcm", elsewhere, organs(), number=2)
    report = match_masks(place.index, place.masks).report
    assert (report.num_given, report.num_labelled) == (3, 1)
    assert report.counts == {"files_without_scan": 2, "scans_without_label": 1}


def test_a_list_may_name_segmentations_too(place):
    write_segmentation(place.masks / "a.dcm", place.series[0], organs())
    (place.masks / "masks.csv").write_text(f"scan,mask\n{UID_ROOT}.2.1,a.dcm\n")
    assert match_masks(place.index, place.masks).keys() == {place.key(1)}


def test_a_segmentation_of_another_series_of_the_grid_elsewhere_is_refused(place, tmp_path):
    moved = OBLIQUE.copy()
    moved[:3, 3] += 0.4
    other = write_dicom_series(np.zeros(SHAPE, np.int16), moved, tmp_path / "x", number=9)
    path = write_segmentation(place.masks / "b.dcm", other, organs())
    with pytest.raises(LabelError, match="do not lie on the voxels of the scan"):
        read_mask(path, place.scan(), CLASSES)


def test_frames_outside_the_scan_are_refused(place, tmp_path):
    moved = OBLIQUE.copy()
    moved[:3, 3] += 5 * OBLIQUE[:3, 2]  # slices further on
    other = write_dicom_series(np.zeros(SHAPE, np.int16), moved, tmp_path / "x", number=9)
    path = write_segmentation(place.masks / "b.dcm", other, organs())
    with pytest.raises(LabelError, match=r"9 x 8 x 7\)\. A mask must lie on its scan's grid"):
        read_mask(path, place.scan(), CLASSES)


def test_a_segmentation_without_the_classes_is_refused(place):
    path = write_segmentation(place.masks / "a.dcm", place.series[0], organs())
    with pytest.raises(LabelError) as refused:
        read_mask(path, place.scan(), ("kidney",))
    assert str(refused.value) == (
        f"the mask of scan {place.key(1)}: none of the 2 segments of a DICOM segmentation is "
        "labelled as one of the classes ['kidney']. Name classes as the segments are labelled."
    )


def test_classes_that_share_voxels_are_refused(place):
    both = {**organs(), "Lesion": organs()["Liver"]}
    del both["lesion"]
    path = write_segmentation(place.masks / "a.dcm", place.series[0], both)
    with pytest.raises(LabelError, match="two classes of a DICOM segmentation share voxels"):
        read_mask(path, place.scan(), CLASSES)


@pytest.mark.parametrize("cut", [400, 3000])
def test_a_damaged_segmentation_is_refused_without_its_words(place, cut):
    path = write_segmentation(place.masks / "a.dcm", place.series[0], organs())
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(LabelError, match=r"cannot be read \(\w+\)") as refused:
        read_mask(path, place.scan(), CLASSES)
    assert not any(word in str(refused.value) for word in PLANTED)


def test_without_highdicom_the_message_says_what_to_install(place, monkeypatch):
    path = write_segmentation(place.masks / "a.dcm", place.series[0], organs())
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(MachineError, match=r"Install it: pip install 'medssl\[seg\]'"):
        read_mask(path, place.scan(), CLASSES)


def test_other_classes_are_another_mask(place):
    path = write_segmentation(place.masks / "a.dcm", place.series[0], organs())
    assert mask_digest(path, CLASSES) == mask_digest(path, CLASSES)
    assert mask_digest(path, CLASSES) != mask_digest(path, CLASSES[::-1])
    nifti = write_nifti(place.masks / "a.nii.gz")
    assert mask_digest(nifti, CLASSES) == mask_digest(nifti, CLASSES[::-1])


def test_the_store_holds_the_same_mask_from_a_segmentation_and_from_nifti(place, tmp_path):
    for number in (1, 2):
        write_segmentation(
            place.masks / f"{number}.dcm", place.series[number - 1], organs(), number=number
        )
        write_nifti(tmp_path / "nifti" / f"{number}.nii.gz", wanted(), OBLIQUE)
    rows = "".join(f"{n},{n}.nii.gz\n" for n in (1, 2))
    (tmp_path / "nifti" / "masks.csv").write_text(f"scan,mask\n{rows}")
    sources = {
        "seg": MaskFolder(place.masks, CLASSES),
        "nifti": tmp_path / "nifti",
    }
    config = PreprocessingConfig(spacing_mm=(1.0, 1.0, 1.0), crop_foreground=False)
    store = prepare(place.index, config, tmp_path / "store", masks=sources)
    for key in store.scan_keys:
        mask = store.read_mask(key, "seg")
        assert mask.max() == 2
        np.testing.assert_array_equal(mask, store.read_mask(key, "nifti"))


def test_a_segmentation_task_reads_them(place, tmp_path):
    write_segmentation(place.masks / "a.dcm", place.series[0], organs())
    config = Config(masks=place.masks, classes=CLASSES)
    task = Segmentation(config, 3, place.index)
    assert set(task.targets) == {place.key(1)}
    store = prepare(
        place.index,
        PreprocessingConfig(crop_foreground=False),
        tmp_path / "store",
        masks=Segmentation.masks(config),
    )
    assert sorted(np.unique(store.read_mask(place.key(1), "segmentation"))) == [0, 1, 2]


def test_centroids_of_segments_are_points(place):
    write_segmentation(place.masks / "a.dcm", place.series[0], organs())
    points = PointSource(masks=place.masks, names=CLASSES).read(place.index)
    for number, name in enumerate(("Liver", "lesion")):
        voxel = np.argwhere(organs()[name]).mean(axis=0)
        wanted_mm = OBLIQUE[:3, :3] @ voxel + OBLIQUE[:3, 3]
        np.testing.assert_allclose(points[place.key(1)][number], wanted_mm, atol=1e-3)
