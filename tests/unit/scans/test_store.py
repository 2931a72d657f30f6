import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import blosc2
import numpy as np
import pytest

from medssl.errors import DataError, MachineError
from medssl.scans.store import Entry, Store, content_address
from stores import make_store, numbered_volume

IMAGE = numbered_volume((1, 20, 30, 25))
MASK = (numbered_volume((20, 30, 25)) > 0.5).astype(np.uint8)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "store", {"a1": IMAGE}, masks={"a1": {"organ": MASK}})


def entry(key: str, address: str) -> Entry:
    affine = tuple(tuple(row) for row in np.eye(4).tolist())
    return Entry(address, key, "p", "3D", 1, (20, 30, 25), affine, (1.0, 1.0, 1.0), 0.1)


def test_a_scan_comes_back_as_it_was_put(store: Store) -> None:
    np.testing.assert_array_equal(store.read("a1"), IMAGE)
    np.testing.assert_array_equal(store.read_mask("a1", "organ"), MASK)
    assert store.read("a1").dtype == np.float16
    assert store.read_mask("a1", "organ").dtype == np.uint8


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_region_is_what_numpy_would_cut(store: Store, axis: int) -> None:
    region = tuple(slice(7, 8) if a == axis else slice(2, 19) for a in range(3))
    np.testing.assert_array_equal(store.read("a1", region), IMAGE[(slice(None), *region)])
    np.testing.assert_array_equal(store.read_mask("a1", "organ", region), MASK[region])


def test_an_entry_keeps_geometry_and_foreground(store: Store) -> None:
    found = store.entry("a1")
    foreground = IMAGE[0] > np.float16(0.1)
    assert found.shape == (20, 30, 25)
    assert found.foreground_counts[1] == tuple(foreground.sum(axis=(0, 2)).tolist())
    assert found.foreground_fraction == pytest.approx(foreground.mean())
    assert found.masks == ("organ",)
    row = store.entries.iloc[0]
    assert list(row["shape"]) == [20, 30, 25]
    assert row["patient_key"] == "a"
    np.testing.assert_array_equal(np.reshape(row["affine"], (4, 4)), np.eye(4))


def test_the_table_says_of_a_scan_what_its_description_says(store: Store) -> None:
    whole = store.entry("a1")
    assert store.listed("a1") == replace(whole, foreground_counts=(), files=None)
    with pytest.raises(DataError, match="scan b1 is not in the store of 1 scans"):
        store.listed("b1")


def test_descriptions_in_memory_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medssl.scans.store._KEPT_ENTRIES", 2)
    store = make_store(tmp_path, dict.fromkeys(("a1", "b1", "c1"), IMAGE))
    found = [store.entry(key) for key in ("a1", "b1", "c1", "a1")]
    assert len(store._loaded) == 2
    assert found[0] == found[3]


def test_a_slice_in_any_plane_touches_few_blocks(tmp_path: Path) -> None:
    make_store(tmp_path / "s", {"a1": np.zeros((1, 128, 128, 128), np.float16)})
    (path,) = (tmp_path / "s").rglob("image.b2nd")
    array = blosc2.open(str(path), mode="r")
    grid = [-(-size // block) for size, block in zip(array.shape, array.blocks, strict=True)]
    total = int(np.prod(grid))
    for axis in (1, 2, 3):
        assert total // grid[axis] <= total / 4


def test_a_finished_store_lists_its_scans_sorted(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", {"b1": IMAGE, "a1": IMAGE})
    assert store.scan_keys == ["a1", "b1"]


def test_the_digest_depends_on_the_scans_alone(tmp_path: Path) -> None:
    one = make_store(tmp_path / "1", {"a1": IMAGE, "b1": IMAGE})
    two = make_store(tmp_path / "2", {"b1": IMAGE, "a1": IMAGE})
    three = make_store(tmp_path / "3", {"a1": IMAGE})
    assert one.digest == two.digest != three.digest


def test_an_unfinished_store_is_not_opened(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "s", {})
    store.put(entry("a1", "x"), IMAGE)
    with pytest.raises(DataError, match="never finished"):
        Store.open(tmp_path / "s")


def test_a_store_is_continued_and_not_made_again(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "s", {"spacing_mm": [1.0]})
    store.put(entry("a1", "x"), IMAGE)
    again = Store.create(tmp_path / "s", {"spacing_mm": [1.0]})
    assert again.has("x")
    assert not again.has("y")


def test_other_preprocessing_closes_the_store_until_it_is_finished_again(tmp_path: Path) -> None:
    make_store(tmp_path / "s", {"a1": IMAGE}, spacing_mm=(1, 1, 1))
    Store.create(tmp_path / "s", {"spacing_mm": [2, 2, 2]})
    with pytest.raises(DataError, match="never finished"):
        Store.open(tmp_path / "s")


def test_a_folder_without_a_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no store"):
        Store.open(tmp_path)


def test_a_store_of_another_version_is_refused(store: Store) -> None:
    path = store.folder / "store.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(DataError, match="format 99, this medssl reads 1"):
        Store.open(store.folder)


def test_a_cut_file_is_named_by_its_scan(store: Store) -> None:
    (path,) = store.folder.rglob("image.b2nd")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=re.escape("scan a1 is damaged in the store: image.b2nd")):
        store.read("a1")
    assert not store.has("address-a1")
    assert store.verify() == ["a1"]


def test_altered_bytes_are_found(store: Store) -> None:
    (path,) = store.folder.rglob("image.b2nd")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))
    assert store.verify() == ["a1"]
    with pytest.raises(DataError, match="scan a1 is damaged in the store: image.b2nd differs"):
        store.read("a1")


def test_a_region_that_cannot_be_decompressed_is_named_by_its_scan(store: Store) -> None:
    (path,) = store.folder.rglob("image.b2nd")
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(DataError, match="scan a1 is damaged in the store: image.b2nd cannot"):
        store.read("a1", (slice(0, 1), slice(0, 1), slice(0, 1)))


def test_a_lost_description_is_named_by_its_scan(store: Store) -> None:
    (path,) = store.folder.rglob("entry.json")
    path.unlink()
    with pytest.raises(DataError, match="scan a1 is damaged"):
        Store.open(store.folder).read("a1")


def test_an_unknown_scan_or_mask_is_named(store: Store) -> None:
    with pytest.raises(DataError, match="scan zz is not in the store of 1 scans"):
        store.read("zz")
    with pytest.raises(DataError, match=re.escape("no mask 'tumour' in the store (it has: organ)")):
        store.read_mask("a1", "tumour")


def test_a_mask_of_another_shape_is_refused(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "s", {})
    with pytest.raises(DataError, match=re.escape("mask 'm' has shape (2, 2, 2)")):
        store.put(entry("a1", "x"), IMAGE, {"m": np.zeros((2, 2, 2), np.uint8)})
    assert list((tmp_path / "s" / "scans").rglob("*.b2nd")) == []


def test_a_scan_listed_but_absent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing from the store"):
        Store.create(tmp_path / "s", {}).commit(["nowhere"])


def test_a_killed_write_leaves_no_scan_and_is_repeated(tmp_path: Path) -> None:
    script = f"""
import os, sys
sys.path[:0] = [{str(Path(__file__).parents[3])!r}, {str(Path(__file__).parents[2])!r}]
import medssl.scans.store as module
from unit_entry import entry, IMAGE
module._sha256 = lambda path: os._exit(9)  # dies when files are written and not yet named
module.Store.create(module.Path({str(tmp_path)!r}), {{}}).put(entry("a1", "x"), IMAGE)
"""
    helper = tmp_path / "unit_entry.py"
    helper.write_text(
        "import numpy as np\nfrom medssl.scans.store import Entry\n"
        "IMAGE = np.zeros((1, 8, 8, 8), np.float16)\n"
        "def entry(key, address):\n"
        "    affine = tuple(tuple(row) for row in np.eye(4).tolist())\n"
        "    return Entry(address, key, 'p', '3D', 1, (8, 8, 8), affine, (1.0,) * 3, 0.1)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert done.returncode == 9
    store = Store.create(tmp_path, {})
    assert not store.has("x")
    store.put(entry("a1", "x"), IMAGE)
    store.commit(["x"])
    np.testing.assert_array_equal(Store.open(tmp_path).read("a1"), IMAGE)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if (
        shutil.which("mount") is None
        or subprocess.run(mount, capture_output=True, check=False).returncode
    ):
        pytest.skip("mounting a small disk needs privileges that this user lacks")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_said_and_leaves_whole_scans_alone(small_disk: Path) -> None:
    store = Store.create(small_disk / "s", {})
    noise = np.random.default_rng(0).random((1, 64, 64, 64)).astype(np.float16)

    def fill() -> None:
        for number in range(9):
            store.put(entry(f"a{number}", f"address-{number}"), noise)

    with pytest.raises(MachineError, match=r"no space left on the disk.*start the same command"):
        fill()
    assert store.has("address-0")
    assert list(small_disk.rglob(".part-*")) == []


def test_the_address_follows_scan_preprocessing_and_masks() -> None:
    base = content_address("scan", "config", {"m": "1"})
    assert base == content_address("scan", "config", {"m": "1"})
    others = {
        content_address("scan2", "config", {"m": "1"}),
        content_address("scan", "config2", {"m": "1"}),
        content_address("scan", "config", {"m": "2"}),
        content_address("scan", "config", {}),
    }
    assert base not in others
    assert len(others) == 4


def test_writing_a_scan_again_replaces_a_damaged_one(store: Store) -> None:
    (path,) = store.folder.rglob("image.b2nd")
    path.write_bytes(b"")
    store.put(store.entry("a1"), IMAGE, {"organ": MASK})
    np.testing.assert_array_equal(store.read("a1"), IMAGE)


def test_the_module_needs_neither_torch_nor_monai() -> None:
    code = "import sys, medssl.scans.store; print({'torch', 'monai'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_files_are_those_that_were_hashed(store: Store) -> None:
    files = store.entry("a1").files or {}
    (path,) = store.folder.rglob("image.b2nd")
    assert files["image.b2nd"][1] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert set(files) == {"image.b2nd", "mask-organ.b2nd"}
