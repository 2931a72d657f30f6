import re
import shutil
from collections import namedtuple
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medssl.errors import DataError, LabelError, MachineError
from medssl.executors.local import Config as LocalConfig
from medssl.pipelines import prepare as module
from medssl.pipelines.prepare import PrepareConfig, plan, prepare, run, store_folder
from medssl.scans.building import IndexConfig, build_index
from medssl.scans.index import Index
from medssl.scans.selection import SelectionConfig
from medssl.scans.store import Store
from medssl.transforms.preprocessing import PreprocessingConfig

COARSE = PreprocessingConfig(spacing_mm=(2.0, 2.0, 2.0))
NAMES = ("anna", "berta", "carla")


def write(path: Path, voxels: np.ndarray, affine: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.nifti1.Nifti1Image(voxels, affine), path)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three NIfTI scans with masks, written left-posterior, of three patients."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    affine = np.diag([-1.0, -1.0, 1.5, 1.0])
    for number, name in enumerate(NAMES):
        voxels = np.random.default_rng(number).normal(100, 5, (20, 24, 16)).astype(np.float32)
        voxels[5:12, 6:14, 4:10] += 400
        write(images / f"{name}.nii.gz", voxels, affine)
        write(masks / f"{name}.nii.gz", (voxels > 300).astype(np.uint8), affine)
    return images, masks


@pytest.fixture
def index(folders: tuple[Path, Path], tmp_path: Path) -> Index:
    return build_index(IndexConfig(folder=folders[0]), tmp_path / "index")


def test_every_accepted_scan_is_prepared_with_its_mask(
    index: Index, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    store = prepare(index, COARSE, tmp_path / "store", {"organ": folders[1]})
    assert store.scan_keys == sorted(index.accepted["scan_key"])
    for key in store.scan_keys:
        entry = store.entry(key)
        assert entry.spacing_mm == pytest.approx((2, 2, 2))
        assert entry.masks == ("organ",)
        image, mask = store.read(key)[0], store.read_mask(key, "organ") > 0
        assert image[mask].mean() > image[~mask].mean() + 0.5
        assert entry.patient_key == index.row(key)["patient_key"]


def test_a_second_run_prepares_nothing_anew(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(index, COARSE, tmp_path / "store")
    monkeypatch.setattr(module, "_put", lambda plan, job, scan: pytest.fail(job.scan_key))
    again = prepare(index, COARSE, tmp_path / "store")
    assert again.digest == first.digest


def test_only_what_is_new_or_damaged_is_prepared(
    index: Index, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = prepare(index, COARSE, tmp_path / "store")
    damaged = store.scan_keys[0]
    address = store.entry(damaged).address
    (path,) = (store.folder / "scans").rglob(f"{address}/image.b2nd")
    path.write_bytes(b"cut")
    volume = np.random.default_rng(9).normal(100, 5, (12, 12, 12)).astype(np.float32)
    write(folders[0] / "dora.nii.gz", volume, np.eye(4))
    bigger = build_index(IndexConfig(folder=folders[0]), index.folder)
    done = []
    original = module._put
    monkeypatch.setattr(
        module,
        "_put",
        lambda plan, job, scan: (done.append(job.scan_key), original(plan, job, scan))[1],
    )
    again = prepare(bigger, COARSE, tmp_path / "store")
    new = set(bigger.accepted["scan_key"]) - set(index.accepted["scan_key"])
    assert set(done) == {damaged, *new}
    assert len(again.scan_keys) == 4
    again.read(damaged)


def test_a_scan_taken_out_of_the_index_leaves_the_store(
    index: Index, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    prepare(index, COARSE, tmp_path / "store")
    (folders[0] / "anna.nii.gz").unlink()
    smaller = build_index(IndexConfig(folder=folders[0]), index.folder)
    assert len(prepare(smaller, COARSE, tmp_path / "store").scan_keys) == 2


def test_an_altered_mask_is_prepared_again(
    index: Index, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    masks = {"organ": folders[1]}
    whole = COARSE.model_copy(update={"crop_foreground": False})
    digest = prepare(index, whole, tmp_path / "store", masks).digest
    affine = np.diag([-1.0, -1.0, 1.5, 1.0])
    write(folders[1] / "anna.nii.gz", np.full((20, 24, 16), 3, np.uint8), affine)
    after = prepare(index, whole, tmp_path / "store", masks)
    assert digest != after.digest
    found = [int(after.read_mask(key, "organ").max()) for key in after.scan_keys]
    assert sorted(found) == [1, 1, 3]


def test_one_bad_mask_is_named_and_the_other_scans_are_kept(
    index: Index, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    write(folders[1] / "anna.nii.gz", np.ones((5, 5, 5), np.uint8), np.eye(4))
    with pytest.raises(DataError, match=r"1 of 3 scans could not be prepared:\n.* has shape 5 x 5"):
        prepare(index, COARSE, tmp_path / "store", {"organ": folders[1]})
    assert len(list((tmp_path / "store" / "scans").rglob("entry.json"))) == 2
    with pytest.raises(DataError, match="never finished"):
        Store.open(tmp_path / "store")


def test_failures_carry_keys_and_no_names(
    index: Index, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    write(folders[1] / "anna.nii.gz", np.ones((5, 5, 5), np.uint8), np.eye(4))
    with pytest.raises(DataError) as caught:
        prepare(index, COARSE, tmp_path / "store", {"organ": folders[1]})
    assert "anna" not in str(caught.value)
    written = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert not any(b"anna" in path.read_bytes() or "anna" in str(path.name) for path in written)


def test_masks_that_fit_no_scan_are_refused(index: Index, tmp_path: Path) -> None:
    write(tmp_path / "other" / "zoe.nii.gz", np.ones((5, 5, 5), np.uint8), np.eye(4))
    with pytest.raises(LabelError, match="none of the 1 masks fits"):
        prepare(index, COARSE, tmp_path / "store", {"organ": tmp_path / "other"})


def test_scans_without_a_mask_are_prepared_without(
    index: Index, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    (folders[1] / "anna.nii.gz").unlink()
    store = prepare(index, COARSE, tmp_path / "store", {"organ": folders[1]})
    assert sorted(len(store.entry(key).masks) for key in store.scan_keys) == [0, 1, 1]


def test_an_index_without_scans_is_refused(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no scan")
    try:
        index = build_index(IndexConfig(folder=tmp_path / "texts"), tmp_path / "index")
    except DataError:
        return  # refused even earlier
    with pytest.raises(DataError, match="holds no accepted scan"):
        prepare(index, COARSE, tmp_path / "store")


def test_progress_runs_to_the_end(index: Index, tmp_path: Path) -> None:
    told = []
    prepare(index, COARSE, tmp_path / "store", progress=lambda *args: told.append(args[:3]))
    assert told == [("prepare", done, 3) for done in range(4)]


@pytest.mark.slow
def test_workers_prepare_the_same_store(index: Index, tmp_path: Path) -> None:
    one = prepare(index, COARSE, tmp_path / "one", executor=LocalConfig(num_workers=0))
    two = prepare(index, COARSE, tmp_path / "two", executor=LocalConfig(num_workers=2))
    assert one.digest == two.digest
    for key in one.scan_keys:
        np.testing.assert_array_equal(one.read(key), two.read(key))


def test_a_plan_touches_nothing(index: Index, folders: tuple[Path, Path], tmp_path: Path) -> None:
    config = PrepareConfig(
        index=index.folder, preprocessing=COARSE, masks={"organ": folders[1]}, out=tmp_path / "s"
    )
    found = plan(config)
    assert found["scans_to_prepare"] == found["scans"] == found["patients"] == 3
    assert found["scans_with_mask"] == {"organ": 3}
    assert found["scans_already_prepared"] == 0
    assert not (tmp_path / "s").exists()
    run(config)
    assert plan(config)["scans_already_prepared"] == 3


def test_the_estimate_is_near_the_truth(index: Index, tmp_path: Path) -> None:
    found = module.estimate(index, PreprocessingConfig(spacing_mm=(1.0, 1.0, 1.0)))
    store = prepare(index, PreprocessingConfig(spacing_mm=(1.0, 1.0, 1.0)), tmp_path / "store")
    size = sum(path.stat().st_size for path in store.folder.rglob("*.b2nd")) / 1e6
    assert 0.5 * size < found["estimated_megabytes"] + 0.05 < 2 * size + 0.1


def test_a_store_lies_beside_its_index_unless_chosen(tmp_path: Path) -> None:
    one = store_folder(tmp_path, COARSE)
    assert one.is_relative_to(tmp_path)
    assert one != store_folder(tmp_path, PreprocessingConfig())
    assert store_folder(tmp_path, COARSE, tmp_path / "x") == tmp_path / "x"


def test_too_small_a_disk_is_said_before_the_work(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(10, 10, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(MachineError, match=re.escape("the disk has 0 MB free")):
        prepare(index, PreprocessingConfig(spacing_mm=(0.1, 0.1, 0.1)), tmp_path / "store")


def test_mask_names_are_plain(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="masks"):
        PrepareConfig(index=tmp_path, masks={"../evil": tmp_path})


def test_only_selected_scans_are_prepared(index: Index, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="`select` leaves none of 3 scans. The index holds: 3 "):
        index.select(SelectionConfig(dims=("2D+t",)))
    two = set(index.accepted["scan_key"][:2])
    flat = index.select(SelectionConfig(modalities=("",)))
    assert len(prepare(flat, COARSE, tmp_path / "store").scan_keys) == 3
    assert two < set(flat.accepted["scan_key"])


def test_a_scan_that_ends_its_reader_costs_one_scan(
    index: Index, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    path = folders[0] / "anna.nii.gz"
    path.write_bytes(b"\x1f\x8b" + bytes(path.stat().st_size - 2))
    with pytest.raises(DataError, match="1 of 3 scans could not be prepared:\n  scan "):
        prepare(index, COARSE, tmp_path / "store")
    assert len(list((tmp_path / "store" / "scans").rglob("entry.json"))) == 2
